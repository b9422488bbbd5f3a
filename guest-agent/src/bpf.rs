//! BPF programs that the kernel asks about what the processes of a cgroup do.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::error::check;

/// One `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u8,
    /// Destination in the low half, source in the high one.
    pub registers: u8,
    /// Of a jump or in memory.
    pub offset: i16,
    /// A constant.
    pub immediate: i32,
}

/// An instruction.
pub fn op(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: to | from << 4, offset, immediate }
}

/// What a program is asked about: `BPF_PROG_TYPE_…` and `BPF_…`, as the kernel numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    program_type: u32,
    attach_type: u32,
}

/// Opening and making device nodes.
pub const CGROUP_DEVICE: Hook = Hook { program_type: 15, attach_type: 6 };
/// Connecting a socket of IPv4.
pub const CONNECT4: Hook = Hook { program_type: 18, attach_type: 10 };
/// Sending a datagram to an address of IPv4.
pub const SENDMSG4: Hook = Hook { program_type: 18, attach_type: 14 };
/// Telling from where a datagram has come.
pub const RECVMSG4: Hook = Hook { program_type: 18, attach_type: 19 };

/// The head of `union bpf_attr` for loading; the kernel takes shorter ones than it knows.
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    /// Of the verifier, which is not asked for its reasons.
    log: [u64; 2],
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// The same for attaching.
#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

/// Has the kernel check a program.
///
/// # Errors
/// It does not like it.
pub fn load(hook: Hook, program: &[Instruction]) -> io::Result<OwnedFd> {
    const COMMAND: i32 = 5;
    let attributes = LoadAttributes {
        program_type: hook.program_type,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log: [0; 2],
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        interface: 0,
        attach_type: hook.attach_type,
    };
    // SAFETY: the attributes point to `count` instructions and a C string, all alive during the call and only read.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_bpf, COMMAND, &raw const attributes, size_of_val(&attributes))
    })?;
    // SAFETY: a descriptor the kernel has just made and nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Has the kernel ask it about a group and all groups below.
///
/// # Errors
/// A kernel without CONFIG_CGROUP_BPF.
pub fn attach(cgroup: BorrowedFd<'_>, program: &OwnedFd, hook: Hook) -> io::Result<()> {
    const COMMAND: i32 = 8;
    // `BPF_F_ALLOW_MULTI`: groups below may have programs of their own.
    const ALLOW_MULTI: u32 = 2;
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        attach_type: hook.attach_type,
        flags: ALLOW_MULTI,
    };
    // SAFETY: the attributes are plain integers, alive during the call.
    check(unsafe { libc::syscall(libc::SYS_bpf, COMMAND, &raw const attributes, size_of_val(&attributes)) })?;
    Ok(())
}
