//! `linux.seccomp` compiled to the kernel's filter language.
//!
//! Own compiler, because seccompiler has one action for all of a filter's matches, while the profiles that docker and
//! podman write mix ALLOW with different errnos. The program is a binary search over ranges of system call numbers:
//! nine comparisons instead of hundreds before a frequent call is allowed, and less for the kernel to check at load.

use std::collections::BTreeMap;
use std::str::FromStr;

use libc::sock_filter;

use super::spec::{Seccomp, SeccompArgument};
use crate::error::{Context, Error, Result, check};

const ALLOW: u32 = 0x7fff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
const ERRNO: u32 = 0x0005_0000;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQ: u16 = 0x15;
const JUMP_GT: u16 = 0x25;
const JUMP_GE: u16 = 0x35;
const RETURN: u16 = 0x06;

/// `AUDIT_ARCH_X86_64`.
const ARCH: u32 = 0xc000_003e;
/// First number of the x32 ABI's calls, which the guest kernel does not have.
const X32: u32 = 0x4000_0000;
/// The kernel's limit, in instructions.
const MAX_PROGRAM: usize = 4096;
/// Offsets in `struct seccomp_data`.
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGS: u32 = 16;

/// A program ready to be loaded.
#[derive(Clone, Debug)]
pub struct Filter {
    program: Vec<sock_filter>,
    flags: u32,
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

impl Filter {
    /// Compiles a profile. A name that x86-64 does not have is skipped: profiles list the calls of all machines.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for what the agent cannot do.
    pub fn compile(spec: &Seccomp) -> Result<Self> {
        Self::compile_inner(spec).context(|| "linux.seccomp")
    }

    fn compile_inner(spec: &Seccomp) -> Result<Self> {
        if !spec.listener_path.is_empty() {
            return Err(Error::invalid("not supported: listenerPath"));
        }
        if !spec.architectures.is_empty() && !spec.architectures.iter().any(|a| a == "SCMP_ARCH_X86_64") {
            return Err(Error::invalid("architectures lacks SCMP_ARCH_X86_64, the only one of this guest"));
        }
        let default = action(&spec.default_action, spec.default_errno_ret)?;
        let verdicts = verdicts(spec, default)?;
        let mut program = vec![
            statement(LOAD, OFFSET_ARCH),
            jump(JUMP_EQ, ARCH, 1, 0),
            statement(RETURN, KILL_PROCESS),
            statement(LOAD, 0),
        ];
        program.extend(search(&segments(&verdicts, default)));
        if program.len() > MAX_PROGRAM {
            return Err(Error::invalid(format!(
                "{} instructions, over the limit of {MAX_PROGRAM}",
                program.len()
            )));
        }
        let flags = spec.flags.iter().try_fold(0, |flags, flag| match flag.as_str() {
            "SECCOMP_FILTER_FLAG_TSYNC" => Ok(flags),
            "SECCOMP_FILTER_FLAG_LOG" => Ok(flags | 2),
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(flags | 4),
            other => Err(Error::invalid(format!("not supported: flag {other}"))),
        })?;
        Ok(Self { program, flags })
    }

    /// Puts the filter on this process.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn load(&self) -> Result<()> {
        let program = libc::sock_fprog {
            len: self.program.len() as u16,
            filter: self.program.as_ptr().cast_mut().cast(),
        };
        const SET_MODE_FILTER: u32 = 1;
        // SAFETY: `program` points to `len` instructions, which the kernel only reads and checks before use.
        check(unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, self.flags, &raw const program) })
            .context(|| "load the seccomp filter")?;
        Ok(())
    }
}

fn action(name: &str, errno: Option<u32>) -> Result<u32> {
    let errno_or = |default: u32| errno.unwrap_or(default) & 0xffff;
    Ok(match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => 0,
        "SCMP_ACT_KILL_PROCESS" => KILL_PROCESS,
        "SCMP_ACT_TRAP" => 0x0003_0000,
        "SCMP_ACT_ERRNO" => ERRNO | errno_or(libc::EPERM as u32),
        "SCMP_ACT_TRACE" => 0x7ff0_0000 | errno_or(libc::EPERM as u32),
        "SCMP_ACT_LOG" => 0x7ffc_0000,
        "SCMP_ACT_ALLOW" => ALLOW,
        other => return Err(Error::invalid(format!("not supported: action {other:?}"))),
    })
}

fn verdicts(spec: &Seccomp, default: u32) -> Result<BTreeMap<u32, Verdict>> {
    // An unconditional entry decides what no condition of any entry has decided, wherever it stands.
    let mut table: BTreeMap<u32, (Vec<_>, Option<u32>)> = BTreeMap::new();
    for entry in &spec.syscalls {
        let action = action(&entry.action, entry.errno_ret)?;
        let conditions = entry.args.iter().map(condition).collect::<Result<Vec<_>>>()?;
        for name in &entry.names {
            let Ok(call) = syscalls::Sysno::from_str(name) else { continue };
            let (rules, otherwise) = table.entry(call.id() as u32).or_default();
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

fn condition(spec: &SeccompArgument) -> Result<Condition> {
    if spec.index > 5 {
        return Err(Error::invalid(format!("argument {} does not exist", spec.index)));
    }
    let plain = |op| Condition { argument: spec.index, op, value: spec.value, mask: u64::MAX };
    Ok(match spec.op.as_str() {
        "SCMP_CMP_EQ" => plain(Op::Eq),
        "SCMP_CMP_NE" => plain(Op::Ne),
        "SCMP_CMP_GT" => plain(Op::Gt),
        "SCMP_CMP_GE" => plain(Op::Ge),
        "SCMP_CMP_LT" => plain(Op::Lt),
        "SCMP_CMP_LE" => plain(Op::Le),
        "SCMP_CMP_MASKED_EQ" => Condition { value: spec.value_two, mask: spec.value, ..plain(Op::Eq) },
        other => return Err(Error::invalid(format!("unknown comparison {other:?}"))),
    })
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
    push(X32, plain(ERRNO | libc::ENOSYS as u32));
    segments
}

/// A binary search; the accumulator has the number.
fn search(segments: &[(u32, Verdict)]) -> Vec<sock_filter> {
    let (left, right) = segments.split_at(segments.len() / 2);
    let (Some((start, verdict)), false) = (right.first(), left.is_empty()) else {
        return right.first().map(|(_, verdict)| verdict.code()).unwrap_or_default();
    };
    let _ = verdict;
    let (left, right) = (search(left), search(right));
    let mut code = match u8::try_from(left.len()) {
        Ok(distance) => vec![jump(JUMP_GE, *start, distance, 0)],
        // Conditional jumps reach 255 instructions; an unconditional one any distance.
        Err(_) => vec![jump(JUMP_GE, *start, 0, 1), statement(JUMP, left.len() as u32)],
    };
    code.extend(left);
    code.extend(right);
    code
}

impl Verdict {
    fn code(&self) -> Vec<sock_filter> {
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
    fn code(&self, rest: usize) -> Vec<sock_filter> {
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

fn statement(code: u16, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::spec::SeccompSyscalls;
    use proptest::prelude::*;

    /// The kernel's interpreter, as far as the compiler uses it.
    fn run(program: &[sock_filter], arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = vec![number, arch, 0, 0];
        data.extend(args.iter().flat_map(|arg| [*arg as u32, (*arg >> 32) as u32]));
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
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

    fn model(spec: &Seccomp, number: u32, args: [u64; 6]) -> u32 {
        let name = syscalls::Sysno::new(number as usize).map(|call| call.name().to_owned());
        let holds = |c: &SeccompArgument| {
            let arg = args[c.index as usize];
            match c.op.as_str() {
                "SCMP_CMP_EQ" => arg == c.value,
                "SCMP_CMP_NE" => arg != c.value,
                "SCMP_CMP_GT" => arg > c.value,
                "SCMP_CMP_GE" => arg >= c.value,
                "SCMP_CMP_LT" => arg < c.value,
                "SCMP_CMP_LE" => arg <= c.value,
                _ => arg & c.value == c.value_two,
            }
        };
        let named = |e: &&SeccompSyscalls| name.as_ref().is_some_and(|name| e.names.contains(name));
        let conditional =
            spec.syscalls.iter().filter(named).find(|e| !e.args.is_empty() && e.args.iter().all(holds));
        let plain = || spec.syscalls.iter().filter(named).find(|e| e.args.is_empty());
        match conditional.or_else(plain) {
            Some(entry) => action(&entry.action, entry.errno_ret).unwrap(),
            None => action(&spec.default_action, spec.default_errno_ret).unwrap(),
        }
    }

    fn any_action() -> impl Strategy<Value = String> {
        prop::sample::select(vec!["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_LOG"])
            .prop_map(str::to_owned)
    }

    fn any_word() -> impl Strategy<Value = u64> {
        prop_oneof![0u64..4, Just(1 << 32), Just((1 << 32) | 1), Just(u64::MAX), any::<u64>()]
    }

    prop_compose! {
        fn any_entry()(names in prop::collection::vec(0usize..450, 1..60), action in any_action(), errno_ret in prop::option::of(0u32..200),
                       args in prop::collection::vec((0u32..6, any_word(), any_word(), 0usize..7), 0..3)) -> SeccompSyscalls {
            let ops = ["SCMP_CMP_EQ", "SCMP_CMP_NE", "SCMP_CMP_GT", "SCMP_CMP_GE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_MASKED_EQ"];
            let names = names.iter().filter_map(|&n| syscalls::Sysno::new(n)).map(|n| n.name().to_owned()).collect();
            let args = args.into_iter().map(|(index, value, value_two, op)| SeccompArgument { index, value, value_two, op: ops[op].into() });
            SeccompSyscalls { names, action, errno_ret, args: args.collect() }
        }
    }

    proptest! {
        #[test]
        fn the_program_decides_as_the_profile_says(
            entries in prop::collection::vec(any_entry(), 0..8), default_action in any_action(),
            calls in prop::collection::vec((0u32..470, prop::array::uniform6(any_word())), 50),
        ) {
            let spec = Seccomp { default_action, syscalls: entries, ..Default::default() };
            let filter = Filter::compile(&spec).unwrap();
            for (number, args) in calls {
                prop_assert_eq!(run(&filter.program, ARCH, number, args), model(&spec, number, args), "call {}", number);
            }
            prop_assert_eq!(run(&filter.program, ARCH, X32 + 1, [0; 6]), ERRNO | 38);
            prop_assert_eq!(run(&filter.program, 0x4000_0003, 1, [0; 6]), KILL_PROCESS);
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let allow = Seccomp { default_action: "SCMP_ACT_ALLOW".into(), ..Default::default() };
        Filter::compile(&allow).unwrap();
        let notify = Seccomp { default_action: "SCMP_ACT_NOTIFY".into(), ..Default::default() };
        let listener = Seccomp { listener_path: "/x".into(), ..allow.clone() };
        let foreign = Seccomp { architectures: vec!["SCMP_ARCH_ARM".into()], ..allow };
        for spec in [notify, listener, foreign] {
            assert!(Filter::compile(&spec).unwrap_err().message.starts_with("linux.seccomp: "));
        }
    }
}
