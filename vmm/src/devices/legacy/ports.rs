//! Devices of one or two ports without any state.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::exit::{ExitRequest, Outcome};
use crate::timeline::Timeline;

/// Index port of the real-time clock; the data port follows.
pub const RTC_PORT: u64 = 0x70;
/// A byte written here is a mark in the timeline.
pub const MARK_PORT: u64 = 0xb40;
/// 32 bits written here end the machine with their low byte as exit status.
pub const EXIT_PORT: u64 = 0xb44;

/// A real-time clock that is always 0 and never busy: the guest gets its time from kvm-clock or the agent.
#[derive(Debug)]
pub struct RealTimeClock;

impl BusDevice for RealTimeClock {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

/// Notes when the guest got somewhere.
#[derive(Debug)]
pub struct MarkPort {
    timeline: Arc<Timeline>,
}

impl MarkPort {
    /// Marks go to `timeline`.
    pub fn new(timeline: Arc<Timeline>) -> Self {
        Self { timeline }
    }
}

impl BusDevice for MarkPort {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, data: &[u8]) {
        if let Some(value) = data.first() {
            self.timeline.guest_mark(*value);
        }
    }
}

/// Ends the machine at the guest's word.
#[derive(Debug)]
pub struct ExitPort {
    exit: ExitRequest,
}

impl ExitPort {
    /// Ends the machine by way of `exit`.
    pub fn new(exit: ExitRequest) -> Self {
        Self { exit }
    }
}

impl BusDevice for ExitPort {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(status)) = (offset, data.first()) {
            self.exit.request(Outcome::Exited(*status));
        }
    }
}
