//! The program that leads connections to the loopback to sockets of ours, whatever their port.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_bpf::{Instruction, SK_LOOKUP, attach_to_network, load, load_map, op, socket_map};

/// In the place of a jump's distance: to the end, where the kernel is told to go on as ever.
const TO_END: i16 = i16::MAX;

/// Installs it in a namespace: connections of IPv4 go to the first socket, those of IPv6 to the second, if there is one. It
/// is there for as long as the answer is open.
///
/// # Errors
/// The kernel or the caller's rights do not allow it.
pub(super) fn install(namespace: BorrowedFd<'_>, sockets: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    let map = socket_map(sockets)?;
    let program = load(SK_LOOKUP, &program(load_map(1, &map)))?;
    attach_to_network(namespace, &program, SK_LOOKUP)
}

fn program(load_map: [Instruction; 2]) -> Vec<Instruction> {
    const LOAD_WORD: u8 = 0x61;
    const STORE_IMMEDIATE: u8 = 0x62;
    const ADD_IMMEDIATE: u8 = 0x07;
    const MOVE: u8 = 0xbf;
    const MOVE_IMMEDIATE: u8 = 0xb7;
    const JUMP: u8 = 0x05;
    const JUMP_EQUAL: u8 = 0x15;
    const JUMP_UNEQUAL: u8 = 0x55;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    // Functions of the kernel's.
    const LOOK_UP: i32 = 1;
    const RELEASE: i32 = 86;
    const ASSIGN: i32 = 124;
    // Of `struct bpf_sk_lookup`; addresses are in network order.
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_4: i16 = 40;
    const LOCAL_6: i16 = 44;
    const PASS: i32 = 1;

    let word = |octets: &[u8]| i32::from_ne_bytes([octets[0], octets[1], octets[2], octets[3]]);
    let four = Ipv4Addr::LOCALHOST.octets();
    let six = Ipv6Addr::LOCALHOST.octets();
    let mut program = vec![
        op(MOVE, 6, 1, 0, 0),
        op(LOAD_WORD, 2, 6, PROTOCOL, 0),
        op(JUMP_UNEQUAL, 2, 0, TO_END, libc::IPPROTO_TCP),
        op(LOAD_WORD, 2, 6, FAMILY, 0),
        op(JUMP_EQUAL, 2, 0, 5, libc::AF_INET6),
        op(JUMP_UNEQUAL, 2, 0, TO_END, libc::AF_INET),
        op(LOAD_WORD, 2, 6, LOCAL_4, 0),
        op(JUMP_UNEQUAL, 2, 0, TO_END, word(&four)),
        op(STORE_IMMEDIATE, 10, 0, -4, 0),
        op(JUMP, 0, 0, 9, 0),
    ];
    for (index, octets) in (0i16..).zip(six.chunks_exact(4)) {
        program.push(op(LOAD_WORD, 2, 6, LOCAL_6 + 4 * index, 0));
        program.push(op(JUMP_UNEQUAL, 2, 0, TO_END, word(octets)));
    }
    program.push(op(STORE_IMMEDIATE, 10, 0, -4, 1));
    // The socket of this place in the map, if there is one.
    program.extend(load_map);
    program.extend([
        op(MOVE, 2, 10, 0, 0),
        op(ADD_IMMEDIATE, 2, 0, 0, -4),
        op(CALL, 0, 0, 0, LOOK_UP),
        op(JUMP_EQUAL, 0, 0, TO_END, 0),
        op(MOVE, 7, 0, 0, 0),
        op(MOVE, 1, 6, 0, 0),
        op(MOVE, 2, 7, 0, 0),
        op(MOVE_IMMEDIATE, 3, 0, 0, 0),
        op(CALL, 0, 0, 0, ASSIGN),
        op(MOVE, 1, 7, 0, 0),
        op(CALL, 0, 0, 0, RELEASE),
    ]);
    let end = program.len();
    for (at, instruction) in program.iter_mut().enumerate() {
        if instruction.offset == TO_END {
            instruction.offset = i16::try_from(end - at - 1).unwrap_or(0);
        }
    }
    program.extend([op(MOVE_IMMEDIATE, 0, 0, 0, PASS), op(EXIT, 0, 0, 0, 0)]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOK: usize = 19;

    #[test]
    fn jumps_end_where_they_should() {
        let program = program([op(0x18, 1, 1, 0, 0), op(0, 0, 0, 0, 0)]);
        assert_eq!(program[LOOK].code, 0x18);
        for (at, instruction) in program.iter().enumerate() {
            let to = at + 1 + instruction.offset.unsigned_abs() as usize;
            match (instruction.code, at) {
                // Which of the two places, and back together.
                (0x15, 4) => assert_eq!(to, 10),
                (0x05, _) => assert_eq!(to, LOOK),
                (0x15 | 0x55, _) => assert_eq!(to, program.len() - 2, "{at}"),
                _ => {}
            }
        }
    }
}
