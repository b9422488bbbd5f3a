//! The duty of PID 1: every process that ends is waited for, ours or an orphan.

use std::os::fd::{FromRawFd, OwnedFd};

use bulkhead_protocol::mark;
use rustix::process::{WaitOptions, WaitStatus};

use crate::agent::Agent;
use crate::container::process::{Exit, State};
use crate::error::{Context, Result, check};
use crate::hw;

/// A descriptor that is readable when a child has ended. Children get their signals back before they execute.
///
/// # Errors
/// What signalfd says.
pub fn child_signals() -> Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before it is used; no pointer outlives the calls.
    let fd = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    check(fd).context(|| "create a signalfd")?;
    // SAFETY: a descriptor the kernel has just made and nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Agent {
    /// Waits for everything that has ended, and tells whoever asked.
    pub fn reap(&mut self) {
        self.drain_signals();
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get();
            let known =
                self.processes.values().find(|process| process.pid == pid && !process.state.has_ended());
            if let Some(id) = known.map(|process| process.id) {
                // Its last words first: a failed set-up says why, then exits.
                self.hear_child(id);
                self.process_ended(id, status);
            }
        }
        self.finish_deletions();
    }

    fn drain_signals(&mut self) {
        let mut buffer = [0u8; 4 * size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(self.signals(), &mut buffer).is_ok_and(|n| n == buffer.len()) {}
    }

    fn process_ended(&mut self, id: u32, status: WaitStatus) {
        let signal = status.terminating_signal().and_then(|signal| u32::try_from(signal).ok()).unwrap_or(0);
        let code = status.exit_status().and_then(|code| u32::try_from(code).ok()).unwrap_or(128 + signal);
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let Some(process) = self.processes.get_mut(&id) else { return };
        let container = self.containers.get_mut(&process.container);
        let oom_killed = container.is_some_and(|container| container.has_new_oom_kill());
        let exit = Exit {
            code,
            signal,
            oom_killed: oom_killed && signal == libc::SIGKILL as u32,
            at_ns: now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec),
        };
        let is_init = process.exec.is_empty();
        self.fail_if_setting_up(id, exit);
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.channel = None;
        if !process.state.has_ended() {
            process.state = State::Exited(exit);
        }
        if is_init {
            hw::mark(mark::CONTAINER_EXITED);
            if let Some(container) = self.containers.get(&process.container) {
                container.init_ended();
            }
        }
        self.answer_waiters(id);
        self.drain_streams_of(id);
    }
}
