//! The victim: a process that the host's kernel kills for want of memory in a container's group, so that it is counted there
//! (`memory.events`; on v1 `memory.oom_control` and whoever has an eventfd on it).

use std::fs;
use std::path::Path;

/// What the victim may take before it is one.
const ROOM_BYTES: usize = 16 << 20;

/// Makes one in the group `dir`, which this process is in, and waits for its end. Nothing is to live on in that group.
pub fn report(dir: &Path, v1: bool) {
    let (current, limit, swap) = if v1 {
        ("memory.usage_in_bytes", "memory.limit_in_bytes", "memory.swappiness")
    } else {
        ("memory.current", "memory.max", "memory.swap.max")
    };
    let number = |file: &str| -> Option<u64> { fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok() };
    let Some(current) = number(current) else { return };
    let (limit, swap) = (dir.join(limit), dir.join(swap));
    let most = (current + ROOM_BYTES as u64).to_string();
    // SAFETY: the child only makes system calls and writes to memory it has just mapped: nothing in it waits for a lock
    // that another thread of the sandbox holds.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let _ = fs::write("/proc/self/oom_score_adj", "1000");
        let _ = fs::write(&swap, "0");
        if fs::write(&limit, &most).is_ok() {
            let (size, kind) = (4 * ROOM_BYTES, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE);
            // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is in use.
            unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_WRITE, kind, -1, 0) };
        }
        // SAFETY: _exit has no preconditions.
        unsafe { libc::_exit(0) }
    }
    if let Some(child) = rustix::process::Pid::from_raw(child) {
        let _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
    }
}
