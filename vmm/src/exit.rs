//! How a machine ends, and the one place where that is decided.

use std::sync::{Arc, Mutex, OnceLock};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::error::STATUS_CRASH;
use crate::report::Crash;
use crate::sync::lock;

/// How the machine ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
            Self::Signal(signal) => 128_u8.saturating_add(*signal),
        }
    }

    /// The outcome's name in the report.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Exited(_) => "exited",
            Self::Reboot => "reboot",
            Self::Panic => "panic",
            Self::Crash => "crash",
            Self::Quit => "quit",
            Self::Signal(_) => "signal",
        }
    }
}

/// Lets any thread end the machine. The first request counts.
#[derive(Debug, Clone)]
pub struct ExitRequest(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    outcome: OnceLock<Outcome>,
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
        Ok(Self(Arc::new(Inner { outcome: OnceLock::new(), crash: Mutex::new(None), event })))
    }

    /// Ends the machine with `outcome`, unless its end was decided already.
    pub fn request(&self, outcome: Outcome) {
        if self.0.outcome.set(outcome).is_ok() {
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
    pub fn outcome(&self) -> Option<&Outcome> {
        self.0.outcome.get()
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
