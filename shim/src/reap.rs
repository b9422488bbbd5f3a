//! Children and how they end. Containers' processes become children of this process when what started them has ended, so
//! every child is waited for in one place, and whoever cares is told.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::process::{WaitOptions, WaitStatus, wait};

/// Ends that nobody has asked for yet, at most: a child may end before its pid is known to whoever looks after it.
const MAX_UNCLAIMED: usize = 4096;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + n for signal n.
    pub status: u32,
    /// When that was noticed.
    pub at: SystemTime,
}

impl Exit {
    /// One that has just happened.
    pub fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now() }
    }
}

/// Waits for all children.
#[derive(Debug, Default)]
pub struct Reaper {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    waiting: HashMap<i32, Sender<Exit>>,
    unclaimed: VecDeque<(i32, Exit)>,
}

impl Reaper {
    /// Runs a program to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run(&self, command: &mut Command) -> io::Result<Exit> {
        command.stdin(Stdio::null());
        self.spawn(command)?.recv().map_err(|_| io::Error::other("its end went unnoticed"))
    }

    /// Starts a program; the receiver is told of its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Receiver<Exit>> {
        // Held until its pid is known, so that its end is not taken for somebody else's.
        let mut state = self.lock();
        let child = command.spawn()?;
        Ok(state.watch(child.id().cast_signed()))
    }

    /// To be told of the end of a process that is, or will be, a child. It may have ended already.
    pub fn watch(&self, pid: i32) -> Receiver<Exit> {
        self.lock().watch(pid)
    }

    /// Collects every child that has ended.
    pub fn reap(&self) {
        let mut state = self.lock();
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let exit = Exit::now(code(status));
            match state.waiting.remove(&pid.as_raw_nonzero().get()) {
                // Who has stopped listening does not care.
                Some(listener) => drop(listener.send(exit)),
                None => {
                    state.unclaimed.push_back((pid.as_raw_nonzero().get(), exit));
                    if state.unclaimed.len() > MAX_UNCLAIMED {
                        state.unclaimed.pop_front();
                    }
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here leaves it half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn watch(&mut self, pid: i32) -> Receiver<Exit> {
        let (sender, receiver) = channel();
        // Of several with this number the last is meant.
        match self.unclaimed.iter().rposition(|(ended, _)| *ended == pid) {
            Some(index) => {
                if let Some((_, exit)) = self.unclaimed.remove(index) {
                    let _ = sender.send(exit);
                }
            }
            None => drop(self.waiting.insert(pid, sender)),
        }
        receiver
    }
}

fn code(status: WaitStatus) -> u32 {
    let signal = || status.terminating_signal().map(|signal| 128 + signal);
    status.exit_status().or_else(signal).and_then(|code| u32::try_from(code).ok()).unwrap_or(255)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(clippy::zombie_processes, reason = "the reaper under test waits for them")]
    // One test: children belong to the process, which all tests share.
    #[test]
    fn ends_are_told_before_and_after_they_are_asked_for() {
        let reaper = Reaper::default();
        let mut program = Command::new("sh");
        let early = reaper.spawn(program.args(["-c", "exit 7"])).unwrap();
        let child = Command::new("sh").args(["-c", "kill -9 $$"]).spawn().unwrap();
        let pid = child.id().cast_signed();
        let ended = || {
            rustix::process::waitid(
                rustix::process::WaitId::Pid(rustix::process::Pid::from_raw(pid).unwrap()),
                rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
            )
        };
        ended().unwrap();
        let late = loop {
            reaper.reap();
            if let Ok(exit) = early.try_recv() {
                break exit;
            }
        };
        assert_eq!(late.status, 7);
        assert_eq!(reaper.watch(pid).recv().unwrap().status, 137);
        assert!(reaper.watch(pid).try_recv().is_err());
    }
}
