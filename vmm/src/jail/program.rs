//! Filters in the kernel's language (classic BPF, `seccomp(2)`).
//!
//! Own, because a list of all calls one after the other, as crates make it, costs where a start is counted in microseconds: when a
//! filter is installed, the kernel runs it for each of its calls, to remember those that are allowed whatever their arguments. This is a binary
//! search, seven comparisons instead of seventy.

use std::collections::BTreeMap;
use std::io;

use libc::sock_filter;

/// Actions.
pub(super) const ALLOW: u32 = 0x7fff_0000;
pub(super) const TRAP: u32 = 0x0003_0000;
/// The call fails as if the kernel did not know it.
pub(super) const NO_SUCH_CALL: u32 = 0x0005_0000 | libc::ENOSYS as u32;
const KILL_PROCESS: u32 = 0x8000_0000;

/// Instructions.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_NOT_BELOW: u16 = 0x35;
const JUMP_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// `AUDIT_ARCH_X86_64`. The x32 calls have numbers that are in no table.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Offsets in `struct seccomp_data`.
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCHITECTURE: u32 = 4;
const OFFSET_ARGUMENTS: u32 = 16;
/// Calls that are compared one after the other at the end of the search.
const LEAF: usize = 2;

/// What a call's argument may be.
#[derive(Debug, Clone, Copy)]
pub(super) enum Test {
    /// Its low 32 bits are this.
    Low { argument: u8, value: u32 },
    /// All of it is this.
    Whole { argument: u8, value: u64 },
    /// None of these bits is set.
    Without { argument: u8, bits: u64 },
}

/// What happens with a call.
#[derive(Debug, Clone, Default)]
pub(super) struct Verdict {
    /// Whatever its arguments.
    pub always: Option<u32>,
    /// Otherwise it is allowed when one of these holds.
    pub tests: Vec<Test>,
}

/// A filter.
#[derive(Debug)]
pub(super) struct Program(Vec<sock_filter>);

fn instruction(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

/// A comparison that goes on with the next instruction when it holds, and leaves out `otherwise` when it does not.
fn unless(code: u16, k: u32, otherwise: u8) -> sock_filter {
    sock_filter { code, jt: 0, jf: otherwise, k }
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

fn load(argument: u8, half: u32) -> sock_filter {
    instruction(LOAD, OFFSET_ARGUMENTS + 8 * u32::from(argument) + 4 * half)
}

impl Test {
    /// Returns when it holds, goes on behind itself when not.
    fn code(self) -> Vec<sock_filter> {
        let allow = instruction(RETURN, ALLOW);
        match self {
            Self::Low { argument, value } => vec![load(argument, 0), unless(JUMP_EQUAL, value, 1), allow],
            Self::Whole { argument, value } => {
                let [low, high] = halves(value);
                vec![
                    load(argument, 0),
                    unless(JUMP_EQUAL, low, 3),
                    load(argument, 1),
                    unless(JUMP_EQUAL, high, 1),
                    allow,
                ]
            }
            Self::Without { argument, bits } => {
                let [low, high] = halves(bits);
                // The other way round: a bit that is set leads past the end.
                let past = |k, jt| sock_filter { code: JUMP_ANY_BIT, jt, jf: 0, k };
                vec![load(argument, 0), past(low, 3), load(argument, 1), past(high, 1), allow]
            }
        }
    }
}

impl Verdict {
    fn code(&self) -> Vec<sock_filter> {
        if let Some(action) = self.always {
            return vec![instruction(RETURN, action)];
        }
        let tests = self.tests.iter().flat_map(|test| test.code());
        tests.chain([instruction(RETURN, TRAP)]).collect()
    }
}

impl Program {
    /// Calls that `verdicts` does not name are refused.
    pub fn new(verdicts: &BTreeMap<u32, Verdict>) -> Self {
        let calls: Vec<_> = verdicts.iter().map(|(number, verdict)| (*number, verdict.code())).collect();
        let mut program = vec![
            instruction(LOAD, OFFSET_ARCHITECTURE),
            sock_filter { code: JUMP_EQUAL, jt: 1, jf: 0, k: ARCHITECTURE },
            instruction(RETURN, KILL_PROCESS),
            instruction(LOAD, OFFSET_NUMBER),
        ];
        program.extend(search(&calls));
        Self(program)
    }

    /// Puts it over the calling thread.
    pub fn apply(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.0.len()).map_err(io::Error::other)?,
            filter: self.0.as_ptr().cast_mut(),
        };
        // SAFETY: plain numbers; then a program that lives across the call, which copies it.
        let result = unsafe {
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Finds the call among `calls`, which are in order, and returns what is said of it.
fn search(calls: &[(u32, Vec<sock_filter>)]) -> Vec<sock_filter> {
    if calls.len() <= LEAF {
        let mut code = Vec::new();
        for (number, verdict) in calls {
            code.extend(past(JUMP_EQUAL, *number, verdict.len(), false));
            code.extend(verdict);
        }
        code.push(instruction(RETURN, TRAP));
        return code;
    }
    let (below, above) = calls.split_at(calls.len() / 2);
    let first = above.first().map_or(u32::MAX, |(number, _)| *number);
    let below = search(below);
    let mut code = past(JUMP_NOT_BELOW, first, below.len(), true);
    code.extend(below);
    code.extend(search(above));
    code
}

/// Leaves out the next `length` instructions if the comparison's result is `when`.
fn past(code: u16, k: u32, length: usize, when: bool) -> Vec<sock_filter> {
    match (u8::try_from(length), when) {
        (Ok(length), true) => vec![sock_filter { code, jt: length, jf: 0, k }],
        (Ok(length), false) => vec![sock_filter { code, jt: 0, jf: length, k }],
        // The distance of a jump that depends on something has eight bits only.
        (Err(_), when) => {
            let (jt, jf) = if when { (0, 1) } else { (1, 0) };
            vec![sock_filter { code, jt, jf, k }, instruction(JUMP, length as u32)]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the kernel would do.
    fn run(program: &Program, number: u32, arguments: [u64; 6], architecture: u32) -> (u32, usize) {
        let (mut at, mut value, mut steps) = (0, 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program.0[at];
            at += 1;
            steps += 1;
            let holds = match code {
                LOAD => {
                    value = match k {
                        OFFSET_NUMBER => number,
                        OFFSET_ARCHITECTURE => architecture,
                        offset => {
                            let word = (offset - OFFSET_ARGUMENTS) / 4;
                            halves(arguments[word as usize / 2])[word as usize % 2]
                        }
                    };
                    continue;
                }
                RETURN => return (k, steps),
                JUMP => {
                    at += k as usize;
                    continue;
                }
                JUMP_EQUAL => value == k,
                JUMP_NOT_BELOW => value >= k,
                JUMP_ANY_BIT => value & k != 0,
                _ => panic!("no such instruction"),
            };
            at += usize::from(if holds { jt } else { jf });
        }
    }

    fn test() -> impl Strategy<Value = Test> {
        prop_oneof![
            (0_u8..6, 0_u32..4).prop_map(|(argument, value)| Test::Low { argument, value }),
            (0_u8..6, word()).prop_map(|(argument, value)| Test::Whole { argument, value }),
            (0_u8..6, word()).prop_map(|(argument, bits)| Test::Without { argument, bits }),
        ]
    }

    fn word() -> impl Strategy<Value = u64> {
        (0_u64..4, 0_u64..3).prop_map(|(low, high)| low | high << 32)
    }

    fn verdict() -> impl Strategy<Value = Verdict> {
        prop_oneof![
            Just(Verdict { always: Some(ALLOW), tests: Vec::new() }),
            Just(Verdict { always: Some(NO_SUCH_CALL), tests: Vec::new() }),
            proptest::collection::vec(test(), 1..120).prop_map(|tests| Verdict { always: None, tests }),
        ]
    }

    proptest! {
        #[test]
        fn it_says_of_every_call_what_was_said(
            verdicts in proptest::collection::btree_map(0_u32..400, verdict(), 0..90),
            number in 0_u32..500,
            known in any::<prop::sample::Index>(),
            words in proptest::collection::vec(word(), 6),
        ) {
            let program = Program::new(&verdicts);
            let arguments: [u64; 6] = words.try_into().unwrap();
            let numbers: Vec<u32> = verdicts.keys().copied().chain([number]).collect();
            let number = *known.get(&numbers);
            let holds = |test: &Test| match *test {
                Test::Low { argument, value } => arguments[usize::from(argument)] as u32 == value,
                Test::Whole { argument, value } => arguments[usize::from(argument)] == value,
                Test::Without { argument, bits } => arguments[usize::from(argument)] & bits == 0,
            };
            let expected = match verdicts.get(&number) {
                None => TRAP,
                Some(Verdict { always: Some(action), .. }) => *action,
                Some(Verdict { tests, .. }) if tests.iter().any(holds) => ALLOW,
                Some(_) => TRAP,
            };
            let (action, steps) = run(&program, number, arguments, ARCHITECTURE);
            prop_assert_eq!(action, expected);
            if verdicts.get(&number).is_none_or(|verdict| verdict.always.is_some()) {
                prop_assert!(steps < 30, "{} steps", steps);
            }
            prop_assert_eq!(run(&program, number, arguments, 0x4000_0003).0, KILL_PROCESS);
        }
    }
}
