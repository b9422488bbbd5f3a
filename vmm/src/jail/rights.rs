//! User, capabilities and limits of the process.

use std::io;

use crate::config::User;

/// `struct __user_cap_header_struct`, `capget(2)`, and its version with two words for each set.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: libc::c_int,
}
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
/// `linux/capability.h`.
const CAP_SYS_ADMIN: u32 = 21;
/// More than any kernel has.
const MAX_CAPABILITIES: libc::c_ulong = 64;

/// Effective, permitted, inheritable: of capabilities 0 to 31, and of the others.
type CapabilitySets = [[u32; 3]; 2];

/// What the process may use of the host. Absent: what it could use before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Open descriptors.
    pub descriptors: u64,
    /// Length of a file that it writes, in bytes.
    pub file_bytes: Option<u64>,
}

/// What became of [`drop_all`].
pub(super) struct Dropped {
    pub user: io::Result<()>,
    pub capabilities: io::Result<()>,
}

/// Sets limits, soft and hard.
pub(super) fn limit(limits: &Limits) -> io::Result<()> {
    let set = |resource, value: u64| {
        let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: writes to the structure that it is given.
        check(unsafe { libc::getrlimit(resource, &raw mut now) })?;
        let value = value.min(now.rlim_max);
        let wanted = libc::rlimit { rlim_cur: value, rlim_max: value };
        // SAFETY: reads the structure that it is given.
        check(unsafe { libc::setrlimit(resource, &raw const wanted) })
    };
    // Of guest memory nobody shall find a copy on the host's disk.
    set(libc::RLIMIT_CORE, 0)?;
    set(libc::RLIMIT_MEMLOCK, 0)?;
    set(libc::RLIMIT_MSGQUEUE, 0)?;
    set(libc::RLIMIT_NOFILE, limits.descriptors)?;
    limits.file_bytes.map_or(Ok(()), |bytes| set(libc::RLIMIT_FSIZE, bytes))
}

/// Becomes `user`, if there is one, and gives up all capabilities for good.
pub(super) fn drop_all(user: Option<User>) -> Dropped {
    let bounded = drop_bounding_set();
    let user = user.map_or(Ok(()), become_user);
    let dropped = set_capabilities(&[[0; 3]; 2]).and_then(|()| {
        // SAFETY: plain numbers.
        check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) })
    });
    Dropped { user, capabilities: bounded.and(dropped) }
}

/// Nothing that is executed could get one back. An unprivileged process has none to give up, and may not.
fn drop_bounding_set() -> io::Result<()> {
    if !is_admin() {
        return Ok(());
    }
    for capability in 0..MAX_CAPABILITIES {
        // SAFETY: plain numbers.
        match check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }) {
            // That was the last.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            result => result?,
        }
    }
    Ok(())
}

fn become_user(User { uid, gid }: User) -> io::Result<()> {
    // SAFETY: no groups, so that no list is read; then plain numbers.
    unsafe {
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setresgid(gid, gid, gid))?;
        check(libc::setresuid(uid, uid, uid))
    }
}

/// Whether the process is privileged in its user namespace.
pub(super) fn is_admin() -> bool {
    let header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let mut sets: CapabilitySets = [[0; 3]; 2];
    // SAFETY: writes six words, which there is room for.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) };
    result == 0 && sets[0][0] & 1 << CAP_SYS_ADMIN != 0
}

fn set_capabilities(sets: &CapabilitySets) -> io::Result<()> {
    let header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    // SAFETY: reads six words, which are there.
    match unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Nobody but the host's root looks into the process or its memory, not even another process of its user.
pub(super) fn hide() -> io::Result<()> {
    // SAFETY: plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })
}

/// Nothing that is executed gets rights that the process has not.
pub(super) fn no_new_privileges() -> io::Result<()> {
    // SAFETY: plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}

pub(super) fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
