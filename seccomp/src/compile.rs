//! From a profile to the kernel's filter language.
//!
//! Own compiler, because seccompiler has one action for all of a filter's matches, while the profiles that docker and
//! podman write mix ALLOW with different errnos. The program is a binary search over ranges of system call numbers:
//! nine comparisons instead of hundreds before a frequent call is allowed. The kernel gains twice: it tries every number once when a
//! filter is loaded, to know which need not be asked about again.

use std::collections::BTreeMap;

use crate::{Argument, Error, Profile};

const ALLOW: u32 = 0x7fff_0000;
const LOG: u32 = 0x7ffc_0000;
const TRACE: u32 = 0x7ff0_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
const ERRNO: u32 = 0x0005_0000;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQ: u16 = 0x15;
const JUMP_GT: u16 = 0x25;
const JUMP_GE: u16 = 0x35;
const RETURN: u16 = 0x06;

/// `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;
/// `AUDIT_ARCH_I386`.
const I386: u32 = 0x4000_0003;
/// First number of the x32 ABI's calls, which the guest kernel does not have.
const X32: u32 = 0x4000_0000;
/// The kernel's limit, in instructions.
pub const MAX_PROGRAM: usize = 4096;
/// Numbers of system calls are below this. (The crate's own iterators leave the last call out.)
const MOST_CALLS: usize = 1024;
/// How far a conditional jump leads.
const REACH: usize = 255;
/// Offsets in `struct seccomp_data`.
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGS: u32 = 16;

/// One `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// How many instructions to skip if true.
    pub jt: u8,
    /// How many instructions to skip if false.
    pub jf: u8,
    /// A constant.
    pub k: u32,
}

/// A program ready to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// At most [`MAX_PROGRAM`].
    pub instructions: Vec<Instruction>,
    /// `SECCOMP_FILTER_FLAG_…` for seccomp(2).
    pub flags: u32,
}

/// What happens with one system call: conditional rules in order, then the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Verdict {
    rules: Vec<(Vec<Condition>, u32)>,
    otherwise: u32,
}

/// `(argument & mask) <op> value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Condition {
    argument: u32,
    op: Op,
    value: u64,
    mask: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Eq,
    Ne,
    Gt,
    Ge,
    Lt,
    Le,
}

/// Numbers of system calls by name, sorted.
struct Names(Vec<(&'static str, u32)>);

impl Names {
    fn new(all: impl Iterator<Item = (&'static str, u32)>) -> Self {
        let mut names: Vec<_> = all.collect();
        names.sort_unstable();
        Self(names)
    }

    fn x86_64() -> Self {
        let calls = (0..MOST_CALLS).filter_map(syscalls::x86_64::Sysno::new);
        Self::new(calls.map(|call| (call.name(), call.id() as u32)))
    }

    fn i386() -> Self {
        let calls = (0..MOST_CALLS).filter_map(syscalls::x86::Sysno::new);
        Self::new(calls.map(|call| (call.name(), call.id() as u32)))
    }

    fn find(&self, name: &str) -> Option<u32> {
        let index = self.0.binary_search_by_key(&name, |(known, _)| known).ok()?;
        self.0.get(index).map(|(_, number)| *number)
    }
}

impl Program {
    /// Compiles a profile. A name that the machine does not have is skipped: profiles list the calls of all machines.
    ///
    /// # Errors
    /// What a guest cannot do.
    pub fn compile(profile: &Profile) -> Result<Self, Error> {
        if !profile.listener_path.is_empty() {
            return Err(Error("not supported: listenerPath".into()));
        }
        let wanted = |name: &str| profile.architectures.iter().any(|known| known == name);
        if !profile.architectures.is_empty() && !wanted("SCMP_ARCH_X86_64") {
            return Err(Error("architectures lacks SCMP_ARCH_X86_64, the guest's own".into()));
        }
        let default = action(&profile.default_action, profile.default_errno_ret)?;
        let native = section(profile, &Names::x86_64(), default)?;
        // A program for 32 bits has other numbers. Its calls are all refused by killing it where a profile does not know them.
        let compat =
            if wanted("SCMP_ARCH_X86") { section(profile, &Names::i386(), default)? } else { Vec::new() };
        let mut other = vec![statement(RETURN, KILL_PROCESS)];
        if !compat.is_empty() {
            let over = statement(JUMP, 1 + native.len() as u32);
            other.splice(0..0, [jump(JUMP_EQ, I386, 0, 1), over]);
        }
        let mut instructions =
            vec![statement(LOAD, OFFSET_ARCH), jump(JUMP_EQ, X86_64, other.len() as u8, 0)];
        instructions.extend(other.into_iter().chain(native).chain(compat));
        if instructions.len() > MAX_PROGRAM {
            let length = instructions.len();
            return Err(Error(format!("{length} instructions, over the limit of {MAX_PROGRAM}")));
        }
        let flags = profile.flags.iter().try_fold(0, |flags, flag| match flag.as_str() {
            "SECCOMP_FILTER_FLAG_TSYNC" => Ok(flags),
            "SECCOMP_FILTER_FLAG_LOG" => Ok(flags | 2),
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(flags | 4),
            other => Err(Error(format!("not supported: flag {other}"))),
        })?;
        Ok(Self { instructions, flags })
    }

    /// An array of `struct sock_filter`, as it is on x86-64.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let bytes = |instruction: &Instruction| {
            let Instruction { code, jt, jf, k } = *instruction;
            let ([a, b], [c, d, e, f]) = (code.to_le_bytes(), k.to_le_bytes());
            [a, b, jt, jf, c, d, e, f]
        };
        self.instructions.iter().flat_map(bytes).collect()
    }
}

/// The part of a program for one kind of machine code.
fn section(profile: &Profile, names: &Names, default: u32) -> Result<Vec<Instruction>, Error> {
    let verdicts = verdicts(profile, names, default)?;
    let mut code = vec![statement(LOAD, 0)];
    code.extend(Search::code(&segments(&verdicts, default)));
    Ok(code)
}

fn action(name: &str, errno: Option<u32>) -> Result<u32, Error> {
    let errno_or = |default: u32| errno.unwrap_or(default) & 0xffff;
    Ok(match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => 0,
        "SCMP_ACT_KILL_PROCESS" => KILL_PROCESS,
        "SCMP_ACT_TRAP" => 0x0003_0000,
        "SCMP_ACT_ERRNO" => ERRNO | errno_or(EPERM),
        "SCMP_ACT_TRACE" => TRACE | errno_or(EPERM),
        "SCMP_ACT_LOG" => LOG,
        "SCMP_ACT_ALLOW" => ALLOW,
        other => return Err(Error(format!("not supported: action {other:?}"))),
    })
}

fn verdicts(profile: &Profile, names: &Names, default: u32) -> Result<BTreeMap<u32, Verdict>, Error> {
    // An unconditional entry decides what no condition of any entry has decided, wherever it stands.
    let mut table: BTreeMap<u32, (Vec<_>, Option<u32>)> = BTreeMap::new();
    for entry in &profile.syscalls {
        let action = action(&entry.action, entry.errno_ret)?;
        let conditions = entry.args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
        for name in &entry.names {
            let Some(number) = names.find(name) else { continue };
            let (rules, otherwise) = table.entry(number).or_default();
            if conditions.is_empty() {
                otherwise.get_or_insert(action);
            } else {
                rules.push((conditions.clone(), action));
            }
        }
    }
    let verdict =
        |(rules, otherwise): (_, Option<u32>)| Verdict { rules, otherwise: otherwise.unwrap_or(default) };
    Ok(table.into_iter().map(|(number, entry)| (number, verdict(entry))).collect())
}

fn condition(argument: &Argument) -> Result<Condition, Error> {
    if argument.index > 5 {
        return Err(Error(format!("argument {} does not exist", argument.index)));
    }
    let plain = |op| Condition { argument: argument.index, op, value: argument.value, mask: u64::MAX };
    Ok(match argument.op.as_ref() {
        "SCMP_CMP_EQ" => plain(Op::Eq),
        "SCMP_CMP_NE" => plain(Op::Ne),
        "SCMP_CMP_GT" => plain(Op::Gt),
        "SCMP_CMP_GE" => plain(Op::Ge),
        "SCMP_CMP_LT" => plain(Op::Lt),
        "SCMP_CMP_LE" => plain(Op::Le),
        "SCMP_CMP_MASKED_EQ" => {
            Condition { value: argument.value_two, mask: argument.value, ..plain(Op::Eq) }
        }
        other => return Err(Error(format!("unknown comparison {other:?}"))),
    })
}

/// What happens with calls that are newer than the newest that the profile names. As with runc it is what a kernel that lacks them
/// says: programs then do without, which they do not after EPERM.
fn newer(default: u32) -> u32 {
    let lets_through = matches!(default & 0xffff_0000, ALLOW | LOG | TRACE);
    if lets_through { default } else { ERRNO | ENOSYS }
}

/// Cuts all numbers into ranges with one verdict each; every range begins where the one before ends.
fn segments(verdicts: &BTreeMap<u32, Verdict>, default: u32) -> Vec<(u32, Verdict)> {
    let plain = |otherwise| Verdict { rules: Vec::new(), otherwise };
    let mut segments = vec![(0, plain(default))];
    let mut push = |start: u32, verdict: Verdict| match segments.last_mut() {
        Some((last, known)) if *last == start => *known = verdict,
        Some((_, known)) if *known == verdict => {}
        _ => segments.push((start, verdict)),
    };
    for (&number, verdict) in verdicts {
        push(number, verdict.clone());
        if !verdicts.contains_key(&(number + 1)) {
            push(number + 1, plain(default));
        }
    }
    if let Some((&last, _)) = verdicts.last_key_value() {
        push(last + 1, plain(newer(default)));
    }
    push(X32, plain(ERRNO | ENOSYS));
    segments
}

/// A binary search over ranges of numbers, written from its end to its beginning: jumps lead forward only, so that where they
/// lead is known then, and verdicts are shared by all that reach them.
#[derive(Default)]
struct Search {
    /// The last instruction first.
    reversed: Vec<Instruction>,
    /// Where the nearest `RETURN` with each value is.
    returns: BTreeMap<u32, usize>,
}

impl Search {
    /// The accumulator has the number.
    fn code(segments: &[(u32, Verdict)]) -> Vec<Instruction> {
        let mut search = Self::default();
        let root = search.node(segments);
        if search.distance(root) > 0 {
            search.trampoline(root);
        }
        search.reversed.reverse();
        search.reversed
    }

    /// Writes the search of some ranges; answers where it begins.
    fn node(&mut self, segments: &[(u32, Verdict)]) -> usize {
        let (left, right) = segments.split_at(segments.len() / 2);
        let (Some((start, _)), false) = (right.first(), left.is_empty()) else {
            let none = Verdict { rules: Vec::new(), otherwise: KILL_PROCESS };
            return self.verdict(right.first().map_or(&none, |(_, verdict)| verdict));
        };
        let (mut right, mut left) = (self.node(right), self.node(left));
        // The first may push the second out of reach.
        if self.distance(right) >= REACH {
            right = self.trampoline(right);
        }
        if self.distance(left) > REACH {
            left = self.trampoline(left);
        }
        let (yes, no) = (self.distance(right) as u8, self.distance(left) as u8);
        self.push(jump(JUMP_GE, *start, yes, no))
    }

    fn verdict(&mut self, verdict: &Verdict) -> usize {
        if verdict.rules.is_empty() {
            return self.returned(verdict.otherwise);
        }
        for instruction in verdict.code().into_iter().rev() {
            self.push(instruction);
        }
        self.reversed.len() - 1
    }

    /// A `RETURN` that can be reached from here, and from a few instructions before.
    fn returned(&mut self, value: u32) -> usize {
        match self.returns.get(&value) {
            Some(&known) if self.distance(known) < REACH / 2 => known,
            _ => {
                let place = self.push(statement(RETURN, value));
                self.returns.insert(value, place);
                place
            }
        }
    }

    /// Conditional jumps reach 255 instructions; an unconditional one any distance.
    fn trampoline(&mut self, to: usize) -> usize {
        let far = self.distance(to) as u32;
        self.push(statement(JUMP, far))
    }

    fn push(&mut self, instruction: Instruction) -> usize {
        self.reversed.push(instruction);
        self.reversed.len() - 1
    }

    /// How many instructions the next one would skip to get there.
    fn distance(&self, to: usize) -> usize {
        self.reversed.len() - 1 - to
    }
}

impl Verdict {
    fn code(&self) -> Vec<Instruction> {
        let mut code = Vec::new();
        for (conditions, action) in &self.rules {
            let mut rule = vec![statement(RETURN, *action)];
            for condition in conditions.iter().rev() {
                let mut block = condition.code(rule.len());
                block.append(&mut rule);
                rule = block;
            }
            code.append(&mut rule);
        }
        code.push(statement(RETURN, self.otherwise));
        code
    }
}

/// Where a comparison leads.
#[derive(Clone, Copy)]
enum To {
    Next,
    Pass,
    Fail,
}

impl Condition {
    /// Falls through when the condition holds, else skips `rest` instructions more.
    fn code(&self, rest: usize) -> Vec<Instruction> {
        let (pass, fail, op) = match self.op {
            Op::Lt => (To::Fail, To::Pass, Op::Ge),
            Op::Le => (To::Fail, To::Pass, Op::Gt),
            Op::Ne => (To::Fail, To::Pass, Op::Eq),
            op => (To::Pass, To::Fail, op),
        };
        let (high, low) = ((self.value >> 32) as u32, self.value as u32);
        let (mask_high, mask_low) = ((self.mask >> 32) as u32, self.mask as u32);
        let word = OFFSET_ARGS + 8 * self.argument;
        let mut steps = vec![(LOAD, word + 4, To::Next, To::Next)];
        if mask_high != u32::MAX {
            steps.push((AND, mask_high, To::Next, To::Next));
        }
        if op != Op::Eq {
            steps.push((JUMP_GT, high, pass, To::Next));
        }
        steps.push((JUMP_EQ, high, To::Next, fail));
        steps.push((LOAD, word, To::Next, To::Next));
        if mask_low != u32::MAX {
            steps.push((AND, mask_low, To::Next, To::Next));
        }
        let last = match op {
            Op::Gt => JUMP_GT,
            Op::Ge => JUMP_GE,
            _ => JUMP_EQ,
        };
        steps.push((last, low, pass, fail));
        let count = steps.len();
        let place = |(index, (code, k, yes, no)): (usize, (u16, u32, To, To))| {
            let distance = |to| match to {
                To::Next => 0,
                To::Pass => count - 1 - index,
                To::Fail => count - 1 - index + rest,
            };
            // Six conditions of at most seven instructions each: far below 255.
            jump(code, k, distance(yes) as u8, distance(no) as u8)
        };
        steps.into_iter().enumerate().map(place).collect()
    }
}

fn statement(code: u16, k: u32) -> Instruction {
    jump(code, k, 0, 0)
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rule;
    use proptest::prelude::*;

    /// The kernel's interpreter, as far as the compiler uses it.
    fn run(program: &[Instruction], arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = vec![number, arch, 0, 0];
        data.extend(args.iter().flat_map(|arg| [*arg as u32, (*arg >> 32) as u32]));
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let Instruction { code, jt, jf, k } = program[at];
            at += 1;
            let mut branch = |yes: bool| at += usize::from(if yes { jt } else { jf });
            match code {
                LOAD => a = data[k as usize / 4],
                AND => a &= k,
                JUMP => at += k as usize,
                JUMP_EQ => branch(a == k),
                JUMP_GT => branch(a > k),
                JUMP_GE => branch(a >= k),
                RETURN => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn model(profile: &Profile, names: &Names, number: u32, args: [u64; 6]) -> u32 {
        let name = names.0.iter().find(|(_, known)| *known == number).map(|(name, _)| *name);
        let holds = |c: &Argument| {
            let arg = args[c.index as usize];
            match c.op.as_ref() {
                "SCMP_CMP_EQ" => arg == c.value,
                "SCMP_CMP_NE" => arg != c.value,
                "SCMP_CMP_GT" => arg > c.value,
                "SCMP_CMP_GE" => arg >= c.value,
                "SCMP_CMP_LT" => arg < c.value,
                "SCMP_CMP_LE" => arg <= c.value,
                _ => arg & c.value == c.value_two,
            }
        };
        let named = |rule: &&Rule| name.is_some_and(|name| rule.names.iter().any(|known| known == name));
        let rules = || profile.syscalls.iter().filter(named);
        let conditional = rules().find(|rule| !rule.args.is_empty() && rule.args.iter().all(holds));
        let default = action(&profile.default_action, profile.default_errno_ret).unwrap();
        let known = profile.syscalls.iter().flat_map(|rule| &rule.names).filter_map(|name| names.find(name));
        match conditional.or_else(|| rules().find(|rule| rule.args.is_empty())) {
            Some(rule) => action(&rule.action, rule.errno_ret).unwrap(),
            None if known.max().is_some_and(|newest| number > newest) => newer(default),
            None => default,
        }
    }

    fn any_action() -> impl Strategy<Value = &'static str> {
        prop::sample::select(vec!["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_LOG"])
    }

    fn any_word() -> impl Strategy<Value = u64> {
        prop_oneof![0u64..4, Just(1 << 32), Just((1 << 32) | 1), Just(u64::MAX), any::<u64>()]
    }

    prop_compose! {
        fn any_rule()(names in prop::collection::vec(0usize..450, 1..60), action in any_action(), errno_ret in prop::option::of(0u32..200),
                      args in prop::collection::vec((0u32..6, any_word(), any_word(), 0usize..7), 0..3)) -> Rule {
            let ops = ["SCMP_CMP_EQ", "SCMP_CMP_NE", "SCMP_CMP_GT", "SCMP_CMP_GE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_MASKED_EQ"];
            let names = names.iter().filter_map(|&n| syscalls::x86_64::Sysno::new(n)).map(|n| n.name().into()).collect();
            let args = args.into_iter().map(|(index, value, value_two, op)| Argument { index, value, value_two, op: ops[op].into() });
            Rule { names, action: action.into(), errno_ret, args: args.collect() }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn the_program_decides_as_the_profile_says(
            syscalls in prop::collection::vec(any_rule(), 0..5), default_action in any_action(), both in any::<bool>(),
            calls in prop::collection::vec((0u32..470, prop::array::uniform6(any_word())), 50),
        ) {
            let architectures = if both { vec!["SCMP_ARCH_X86_64".into(), "SCMP_ARCH_X86".into()] } else { Vec::new() };
            let default_action = default_action.into();
            let profile = Profile { default_action, syscalls, architectures, ..Profile::default() };
            let program = Program::compile(&profile).unwrap().instructions;
            let (native, compat) = (Names::x86_64(), Names::i386());
            for (number, args) in calls {
                prop_assert_eq!(run(&program, X86_64, number, args), model(&profile, &native, number, args), "call {}", number);
                let expected = if both { model(&profile, &compat, number, args) } else { KILL_PROCESS };
                prop_assert_eq!(run(&program, I386, number, args), expected, "32-bit call {}", number);
            }
            prop_assert_eq!(run(&program, X86_64, X32 + 1, [0; 6]), ERRNO | ENOSYS);
            prop_assert_eq!(run(&program, 0x4000_0028, 1, [0; 6]), KILL_PROCESS);
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let allow = Profile { default_action: "SCMP_ACT_ALLOW".into(), ..Profile::default() };
        Program::compile(&allow).unwrap();
        let with = |profile: Profile, words: &str| {
            let error = Program::compile(&profile).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        with(Profile::default(), "action \"\"");
        with(Profile { default_action: "SCMP_ACT_NOTIFY".into(), ..Profile::default() }, "SCMP_ACT_NOTIFY");
        with(Profile { listener_path: "/x".into(), ..allow.clone() }, "listenerPath");
        with(Profile { architectures: vec!["SCMP_ARCH_ARM".into()], ..allow.clone() }, "SCMP_ARCH_X86_64");
        with(Profile { flags: vec!["SECCOMP_FILTER_FLAG_X".into()], ..allow }, "SECCOMP_FILTER_FLAG_X");
    }

    #[test]
    fn the_bytes_are_the_kernels() {
        let program = Program { instructions: vec![jump(JUMP_EQ, 0x0403_0201, 5, 6)], flags: 0 };
        assert_eq!(program.to_bytes(), [0x15, 0, 5, 6, 1, 2, 3, 4]);
    }
}
