//! How a machine ends, and the one place where that is decided.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use crate::error::{STATUS_CRASH, STATUS_IO};
use crate::report::Crash;
use crate::sync::lock;

/// How the machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest wrote this status to the exit device.
    Exited(u8),
    /// The guest asked for a reboot by the keyboard controller.
    Reboot,
    /// The guest kernel panicked.
    Panic,
    /// A vCPU could not go on: triple fault, KVM internal error, failed entry.
    Crash,
    /// Somebody asked through the control socket.
    Quit,
    /// What serves a device outside of the monitor is gone, and the guest cannot go on without it.
    DeviceLost,
    /// This signal was sent to the monitor.
    Signal(u8),
}

impl Outcome {
    /// The exit status of the monitor. A signal is 128 + its number here; the binary dies by the signal itself.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Exited(status) => *status,
            Self::Reboot | Self::Quit => 0,
            Self::Panic | Self::Crash => STATUS_CRASH,
            Self::DeviceLost => STATUS_IO,
            Self::Signal(signal) => 128_u8.saturating_add(*signal),
        }
    }

    /// As one word that is never 0, so that a signal handler can store it.
    fn to_word(&self) -> u32 {
        match self {
            Self::Exited(status) => 0x100 | u32::from(*status),
            Self::Reboot => 0x200,
            Self::Panic => 0x300,
            Self::Crash => 0x400,
            Self::Quit => 0x500,
            Self::Signal(signal) => 0x600 | u32::from(*signal),
            Self::DeviceLost => 0x700,
        }
    }

    fn from_word(word: u32) -> Option<Self> {
        let [detail, kind, _, _] = word.to_le_bytes();
        Some(match kind {
            0 => return None,
            1 => Self::Exited(detail),
            2 => Self::Reboot,
            3 => Self::Panic,
            5 => Self::Quit,
            6 => Self::Signal(detail),
            7 => Self::DeviceLost,
            _ => Self::Crash,
        })
    }

    /// The outcome's name in the report.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Exited(_) => "exited",
            Self::Reboot => "reboot",
            Self::Panic => "panic",
            Self::Crash => "crash",
            Self::Quit => "quit",
            Self::DeviceLost => "device-lost",
            Self::Signal(_) => "signal",
        }
    }
}

/// Lets any thread end the machine. The first request counts.
#[derive(Debug, Clone)]
pub struct ExitRequest(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// [`Outcome::to_word`], or 0.
    outcome: AtomicU32,
    crash: Mutex<Option<Crash>>,
    event: EventFd,
}

impl ExitRequest {
    /// Nothing requested yet.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new() -> std::io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Inner { outcome: AtomicU32::new(0), crash: Mutex::new(None), event })))
    }

    /// Ends the machine with `outcome`, unless its end was decided already. Signal handlers may call this.
    pub fn request(&self, outcome: Outcome) {
        let word = outcome.to_word();
        if self.0.outcome.compare_exchange(0, word, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            // An eventfd that is written once cannot be full.
            let _ = self.0.event.write(1);
        }
    }

    /// Ends the machine because a vCPU cannot go on.
    pub fn crash(&self, crash: Crash) {
        lock(&self.0.crash).get_or_insert(crash);
        self.request(Outcome::Crash);
    }

    /// The outcome, once requested.
    pub fn outcome(&self) -> Option<Outcome> {
        Outcome::from_word(self.0.outcome.load(Ordering::SeqCst))
    }

    /// What is known about a crash.
    pub fn take_crash(&self) -> Option<Crash> {
        lock(&self.0.crash).take()
    }

    /// Becomes readable when an outcome is requested.
    pub fn event(&self) -> &EventFd {
        &self.0.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_survives_as_a_word() {
        for outcome in [
            Outcome::Exited(0),
            Outcome::Exited(255),
            Outcome::Reboot,
            Outcome::Panic,
            Outcome::Crash,
            Outcome::Quit,
            Outcome::DeviceLost,
            Outcome::Signal(15),
        ] {
            assert_eq!(Outcome::from_word(outcome.to_word()), Some(outcome));
        }
        assert_eq!(Outcome::from_word(0), None);
    }

    #[test]
    fn the_first_request_counts() {
        let exit = ExitRequest::new().unwrap();
        assert_eq!(exit.outcome(), None);
        exit.request(Outcome::Exited(3));
        exit.request(Outcome::Reboot);
        assert_eq!(exit.outcome(), Some(Outcome::Exited(3)));
    }
}
