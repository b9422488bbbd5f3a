//! Child processes in namespaces of their own, by clone3(2).

use std::io;

/// `struct clone_args`, clone(2), its first version.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
}

/// As fork(2), with these flags (`CLONE_NEW…`, `CLONE_PARENT`; not `CLONE_VM`) and a signal, or 0, at the child's end. `pidfd` becomes a descriptor of the
/// child, which is the caller's to close. Answers 0 in the child, its pid in the parent.
///
/// # Errors
/// The kernel refuses.
///
/// # Safety
/// The child has a copy of the calling thread alone. Where there are others, it may do only what is safe after fork(2): nothing that
/// takes a lock, or allocates.
pub unsafe fn clone3(flags: i32, exit_signal: i32, pidfd: Option<&mut i32>) -> io::Result<i32> {
    let mut arguments = CloneArgs {
        flags: u64::from(flags.unsigned_abs()),
        exit_signal: u64::from(exit_signal.unsigned_abs()),
        ..CloneArgs::default()
    };
    if let Some(pidfd) = pidfd {
        arguments.flags |= u64::from(libc::CLONE_PIDFD.unsigned_abs());
        arguments.pidfd = std::ptr::from_mut(pidfd) as u64;
    }
    // SAFETY: the arguments are initialised and as long as is said, and what `pidfd` points to lives across the call; without
    // CLONE_VM the child has a copy of this process, in which the caller does what it may.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArgs>()) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(pid).map_err(io::Error::other)
}
