//! When things happened, on CLOCK_MONOTONIC, from the process's start to the guest's end.

use std::env;
use std::sync::Mutex;

use serde::Serialize;

use crate::sync::lock;

/// Marks beyond this number are dropped: the guest can write as many as it likes.
const MAX_EVENTS: usize = 256;

/// Environment variable with the CLOCK_MONOTONIC time in nanoseconds at which the caller started this monitor.
pub const START_ENV: &str = "BULKHEAD_START_NS";

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Event {
    /// What: a name of [`Timeline`]'s documentation, or `guest-mark-<n>`.
    pub event: String,
    /// CLOCK_MONOTONIC, nanoseconds.
    pub ns: u64,
}

/// The list of what happened. Events of the monitor: `start` (given by the caller in [`START_ENV`]), `main`,
/// `config-read`, `memory`, `kernel-loaded`, `devices`, `vcpus`, `jail` (it is entered), `first-run`, `exit`; of one that goes on from a snapshot
/// `snapshot-read`, and `populated` when that has a working set.
#[derive(Debug, Default)]
pub struct Timeline {
    events: Mutex<Vec<Event>>,
}

impl Timeline {
    /// A timeline that begins with what the caller said about the process's start, if it did.
    pub fn new() -> Self {
        let timeline = Self::default();
        if let Some(ns) = env::var(START_ENV).ok().and_then(|text| text.parse().ok()) {
            timeline.push("start".to_owned(), ns);
        }
        timeline
    }

    /// Notes that `event` happens now.
    pub fn mark(&self, event: &str) {
        self.push(event.to_owned(), now_ns());
    }

    /// Notes a mark written by the guest.
    pub fn guest_mark(&self, value: u8) {
        self.push(format!("guest-mark-{value}"), now_ns());
    }

    fn push(&self, event: String, ns: u64) {
        let mut events = lock(&self.events);
        if events.len() < MAX_EVENTS {
            events.push(Event { event, ns });
        }
    }

    /// All events so far, in the order in which they were noted.
    pub fn events(&self) -> Vec<Event> {
        lock(&self.events).clone()
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec that lives across the call; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}
