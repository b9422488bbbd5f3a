//! The part of `bpf(2)` that Bulkhead needs: programs of a few instructions, written by hand, that the kernel asks about
//! what the processes of a cgroup do, or for whom a connection in a network namespace is.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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
#[must_use]
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
/// Finding the listening socket for a connection that comes in, in a network namespace.
pub const SK_LOOKUP: Hook = Hook { program_type: 30, attach_type: 36 };

/// The two instructions that put a map into the register `to`.
#[must_use]
pub fn load_map(to: u8, map: &OwnedFd) -> [Instruction; 2] {
    const LOAD_IMMEDIATE_64: u8 = 0x18;
    const MAP_FD: u8 = 1;
    [op(LOAD_IMMEDIATE_64, to, MAP_FD, 0, map.as_raw_fd()), op(0, 0, 0, 0, 0)]
}

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

/// The same for attaching to a cgroup, and for making a link (which has its fields in another order).
#[repr(C)]
struct AttachAttributes {
    fds: [u32; 2],
    attach_type: u32,
    flags: u32,
}

/// The same for making a map.
#[repr(C)]
struct MapAttributes {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
}

/// The same for an entry of one.
#[repr(C)]
struct EntryAttributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Has the kernel check a program.
///
/// # Errors
/// It does not like it, or the caller may not.
pub fn load(hook: Hook, program: &[Instruction]) -> io::Result<OwnedFd> {
    const COMMAND: i32 = 5;
    let attributes = LoadAttributes {
        program_type: hook.program_type,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
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
    unsafe { descriptor(COMMAND, &attributes) }
}

/// Has the kernel ask it about a group and all groups below.
///
/// # Errors
/// A kernel without CONFIG_CGROUP_BPF.
pub fn attach_to_cgroup(cgroup: BorrowedFd<'_>, program: &OwnedFd, hook: Hook) -> io::Result<()> {
    const COMMAND: i32 = 8;
    // `BPF_F_ALLOW_MULTI`: groups below may have programs of their own.
    const ALLOW_MULTI: u32 = 2;
    let fds = [number(&cgroup), number(program)];
    let attributes = AttachAttributes { fds, attach_type: hook.attach_type, flags: ALLOW_MULTI };
    // SAFETY: the attributes are plain integers.
    unsafe { call(COMMAND, &attributes) }.map(drop)
}

/// Has the kernel ask it about a network namespace, for as long as the answer is open.
///
/// # Errors
/// A kernel before 5.9; the caller may not.
pub fn attach_to_network(namespace: BorrowedFd<'_>, program: &OwnedFd, hook: Hook) -> io::Result<OwnedFd> {
    const COMMAND: i32 = 28;
    let fds = [number(program), number(&namespace)];
    let attributes = AttachAttributes { fds, attach_type: hook.attach_type, flags: 0 };
    // SAFETY: the attributes are plain integers.
    unsafe { descriptor(COMMAND, &attributes) }
}

/// A map of these sockets (`BPF_MAP_TYPE_SOCKMAP`), by their places.
///
/// # Errors
/// A socket of a kind that cannot be in one; the caller may not.
pub fn socket_map(sockets: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    const CREATE: i32 = 0;
    const UPDATE: i32 = 2;
    const SOCKMAP: u32 = 15;
    let entries = u32::try_from(sockets.len()).map_err(io::Error::other)?;
    let attributes = MapAttributes { map_type: SOCKMAP, key_size: 4, value_size: 4, entries, flags: 0 };
    // SAFETY: the attributes are plain integers.
    let map = unsafe { descriptor(CREATE, &attributes) }?;
    for (key, socket) in (0u32..).zip(sockets) {
        let value = number(socket);
        let (key, value) = ((&raw const key) as u64, (&raw const value) as u64);
        let attributes = EntryAttributes { map: number(&map), padding: 0, key, value, flags: 0 };
        // SAFETY: key and value are 32 bits each, as the map was made for, alive during the call and only read.
        unsafe { call(UPDATE, &attributes) }?;
    }
    Ok(map)
}

fn number(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// # Safety
/// What the attributes point to must be what the command expects, alive during the call.
unsafe fn call<A>(command: i32, attributes: &A) -> io::Result<i64> {
    // SAFETY: the attributes are as long as is said and alive; the rest is the caller's promise.
    match unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of_val(attributes))
    } {
        -1 => Err(io::Error::last_os_error()),
        answer => Ok(answer),
    }
}

/// # Safety
/// As [`call`], and the command answers a new descriptor.
unsafe fn descriptor<A>(command: i32, attributes: &A) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { call(command, attributes) }?;
    // SAFETY: a descriptor that the kernel has just made and nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) })
}
