//! `linux.resources.devices`: a small BPF program that the kernel asks at every open and mknod.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use crate::container::spec::DeviceRule;
use crate::error::{Context, Error, Result};
use bulkhead_bpf::{self as bpf, Instruction, op};

const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const MOVE_IMMEDIATE: u8 = 0xb4;
const MOVE: u8 = 0xbc;
const JUMP_NE_IMMEDIATE: u8 = 0x55;
const JUMP_EQ_IMMEDIATE: u8 = 0x15;
const JUMP_NE: u8 = 0x5d;
const JUMP_GT_IMMEDIATE: u8 = 0x25;
const JUMP_LE_IMMEDIATE: u8 = 0xb5;
const SHIFT_RIGHT_BY: u8 = 0x7c;
const EXIT: u8 = 0x95;

/// Type, access, major and minor of the request are kept in these registers.
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// A rule in the kernel's numbers; `None` is any.
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

impl Rule {
    fn from_spec(rule: &DeviceRule) -> Result<Self> {
        let kind = match rule.kind.as_str() {
            "" | "a" => None,
            "c" | "u" => Some(CHARACTER),
            "b" => Some(BLOCK),
            other => {
                return Err(Error::invalid(format!("resources.devices type {other:?} is none of a, b, c")));
            }
        };
        let access = rule.access.chars().try_fold(0, |all, letter| match letter {
            'r' => Ok(all | READ),
            'w' => Ok(all | WRITE),
            'm' => Ok(all | MKNOD),
            other => Err(Error::invalid(format!("resources.devices access {other:?} is none of r, w, m"))),
        })?;
        let access = if access == 0 { MKNOD | READ | WRITE } else { access };
        let number = |n: Option<i64>| match n {
            None | Some(-1) => Ok(None),
            Some(n) => i32::try_from(n).map(Some).map_err(|_| Error::invalid(format!("device number {n}"))),
        };
        Ok(Self { allow: rule.allow, kind, major: number(rule.major)?, minor: number(rule.minor)?, access })
    }

    /// Answers if the rule matches, else falls through.
    fn code(&self) -> Vec<Instruction> {
        // Built from the end, where the distance to the next rule is known.
        let mut code = vec![op(MOVE_IMMEDIATE, 0, 0, 0, self.allow.into()), op(EXIT, 0, 0, 0, 0)];
        let skip = |code: &[Instruction]| code.len() as i16;
        for (register, wanted) in [(MINOR, self.minor), (MAJOR, self.major)] {
            if let Some(wanted) = wanted {
                code.insert(0, op(JUMP_NE_IMMEDIATE, register, 0, skip(&code), wanted));
            }
        }
        if self.access != MKNOD | READ | WRITE {
            // Allowed when all that is wanted is allowed; denied when anything that is wanted is denied.
            let test = if self.allow {
                op(JUMP_NE, 1, ACCESS, skip(&code), 0)
            } else {
                op(JUMP_EQ_IMMEDIATE, 1, 0, skip(&code), 0)
            };
            code.splice(0..0, [op(MOVE, 1, ACCESS, 0, 0), op(AND, 1, 0, 0, self.access), test]);
        }
        if let Some(kind) = self.kind {
            code.insert(0, op(JUMP_NE_IMMEDIATE, TYPE, 0, skip(&code), kind));
        }
        code
    }
}

/// What every container may use whatever its rules say: the devices that it is given (null 1:3, zero 1:5, full 1:7,
/// random 1:8, urandom 1:9, tun 10:200), its terminals (5:0 to 5:2, 136:*), and mknod of anything (of no use without the
/// right to open). Falls through for the rest.
///
/// By hand and not of rules: the kernel's verifier takes 20 µs for each way through a program, and this one is loaded at
/// every start of a container.
fn always() -> Vec<Instruction> {
    const MINORS_OF_MAJOR_1: i32 = 1 << 3 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 9;
    let tail = [
        op(JUMP_GT_IMMEDIATE, MINOR, 0, 6, 9),
        op(MOVE_IMMEDIATE, 0, 0, 0, MINORS_OF_MAJOR_1),
        op(SHIFT_RIGHT_BY, 0, MINOR, 0, 0),
        op(AND, 0, 0, 0, 1),
        op(JUMP_EQ_IMMEDIATE, 0, 0, 2, 0),
        op(MOVE_IMMEDIATE, 0, 0, 0, 1),
        op(EXIT, 0, 0, 0, 0),
    ];
    let end = tail.len() as i16;
    let allow = end - 2;
    let mut code = vec![
        op(JUMP_EQ_IMMEDIATE, ACCESS, 0, 7 + allow, MKNOD),
        op(JUMP_NE_IMMEDIATE, TYPE, 0, 6 + end, CHARACTER),
        op(JUMP_EQ_IMMEDIATE, MAJOR, 0, 5 + allow, 136),
        op(JUMP_NE_IMMEDIATE, MAJOR, 0, 1, 5),
        op(JUMP_LE_IMMEDIATE, MINOR, 0, 3 + allow, 2),
        op(JUMP_NE_IMMEDIATE, MAJOR, 0, 1, 10),
        op(JUMP_EQ_IMMEDIATE, MINOR, 0, 1 + allow, 200),
        op(JUMP_NE_IMMEDIATE, MAJOR, 0, end, 1),
    ];
    code.extend(tail);
    code
}

/// The last rule that matches decides, so the program asks from the end; what no rule names is denied.
fn program(rules: &[DeviceRule]) -> Result<Vec<Instruction>> {
    let mut code = vec![
        op(LOAD_WORD, TYPE, 1, 0, 0),
        op(MOVE, ACCESS, TYPE, 0, 0),
        op(AND, TYPE, 0, 0, 0xffff),
        op(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        op(LOAD_WORD, MAJOR, 1, 4, 0),
        op(LOAD_WORD, MINOR, 1, 8, 0),
    ];
    code.extend(always());
    for rule in rules.iter().rev() {
        let rule = Rule::from_spec(rule)?;
        code.extend(rule.code());
        if rule.kind.is_none()
            && rule.major.is_none()
            && rule.minor.is_none()
            && rule.access == MKNOD | READ | WRITE
        {
            // Matches everything; the kernel refuses a program with instructions that are never reached.
            return Ok(code);
        }
    }
    code.extend([op(MOVE_IMMEDIATE, 0, 0, 0, 0), op(EXIT, 0, 0, 0, 0)]);
    Ok(code)
}

/// Installs the rules on a group.
///
/// # Errors
/// A rule that makes no sense; a kernel without CONFIG_CGROUP_BPF.
pub fn restrict(cgroup: BorrowedFd<'_>, rules: &[DeviceRule]) -> Result<()> {
    let program = bpf::load(bpf::CGROUP_DEVICE, &program(rules)?)
        .context(|| "load the program for resources.devices")?;
    bpf::attach_to_cgroup(cgroup, &program, bpf::CGROUP_DEVICE)
        .context(|| "attach the program for resources.devices (CONFIG_CGROUP_BPF)")?;
    // Another container's program of before is as good.
    let _ = KEPT.set(program);
    Ok(())
}

/// The first program of all. The kernel compiles programs into pieces of 2 MiB that it fills with traps first, which takes a guest
/// from a template 11 ms (560 pages touched for the first time), and gives a piece back with the last program in it.
static KEPT: OnceLock<OwnedFd> = OnceLock::new();

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The kernel's interpreter, as far as these programs use it.
    fn run(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [kind | access << 16, major, minor];
        let mut r = [0i32; 11];
        let mut at = 0usize;
        loop {
            let Instruction { code, registers, offset, immediate } = program[at];
            let (to, from) = ((registers & 15) as usize, (registers >> 4) as usize);
            at += 1;
            let mut jump = |yes: bool| at += if yes { offset as usize } else { 0 };
            match code {
                LOAD_WORD => r[to] = context[offset as usize / 4],
                AND => r[to] &= immediate,
                SHIFT_RIGHT => r[to] = ((r[to] as u32) >> immediate) as i32,
                MOVE_IMMEDIATE => r[to] = immediate,
                MOVE => r[to] = r[from],
                JUMP_NE_IMMEDIATE => jump(r[to] != immediate),
                JUMP_EQ_IMMEDIATE => jump(r[to] == immediate),
                JUMP_NE => jump(r[to] != r[from]),
                JUMP_GT_IMMEDIATE => jump(r[to] as u32 > immediate as u32),
                JUMP_LE_IMMEDIATE => jump(r[to] as u32 <= immediate as u32),
                SHIFT_RIGHT_BY => r[to] = ((r[to] as u32) >> (r[from] as u32 & 31)) as i32,
                EXIT => return r[0] != 0,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn model(rules: &[DeviceRule], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let any = |wanted: Option<i32>, is| wanted.is_none_or(|wanted| wanted == is);
        let given = match major {
            1 => [3, 5, 7, 8, 9].contains(&minor),
            5 => (0..3).contains(&minor),
            10 => minor == 200,
            136 => true,
            _ => false,
        };
        if access == MKNOD || kind == CHARACTER && given {
            return true;
        }
        let matches = |rule: &&DeviceRule| {
            let rule = Rule::from_spec(rule).unwrap();
            let touches = if rule.allow { access & !rule.access == 0 } else { access & rule.access != 0 };
            touches && any(rule.kind, kind) && any(rule.major, major) && any(rule.minor, minor)
        };
        rules.iter().rev().find(matches).is_some_and(|rule| rule.allow)
    }

    prop_compose! {
        fn any_rule()(allow in any::<bool>(), kind in "[abc]?", major in prop::option::of(-1i64..4), minor in prop::option::of(-1i64..4),
                      access in "r?w?m?") -> DeviceRule {
            DeviceRule { allow, kind, major, minor, access }
        }
    }

    proptest! {
        #[test]
        fn the_program_decides_as_the_rules_say(
            rules in prop::collection::vec(any_rule(), 0..8),
            requests in prop::collection::vec(
                (1i32..3, 1i32..8, prop_oneof![0i32..12, Just(136), any::<i32>()], prop_oneof![0i32..12, Just(200), any::<i32>()]),
                60,
            ),
        ) {
            let program = program(&rules).unwrap();
            for (kind, access, major, minor) in requests {
                let expected = model(&rules, kind, access, major, minor);
                prop_assert_eq!(run(&program, kind, access, major, minor), expected, "{} {} {}:{}", kind, access, major, minor);
            }
        }
    }

    #[test]
    fn the_kernel_accepts_the_program() {
        let deny = DeviceRule { access: "rwm".into(), ..Default::default() };
        let fuse = DeviceRule {
            allow: true,
            kind: "c".into(),
            major: Some(10),
            minor: Some(229),
            access: "rw".into(),
        };
        let most = [deny.clone(), fuse.clone()];
        for rules in [
            &[][..],
            &most,
            std::slice::from_ref(&fuse),
            &[DeviceRule { access: "w".into(), ..fuse.clone() }, deny],
        ] {
            match bpf::load(bpf::CGROUP_DEVICE, &program(rules).unwrap()) {
                Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return,
                result => drop(result.unwrap()),
            }
        }
    }
}
