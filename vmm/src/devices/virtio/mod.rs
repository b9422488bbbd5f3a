//! Virtio devices (OASIS Virtual I/O Device version 1.2), all behind the MMIO transport.
//!
//! One device is one folder with the same files: `device.rs` is what the guest sees of it, `handler.rs` what happens to
//! its queues, `metrics.rs` what is counted. Devices do their work in the event loop's thread; vCPU threads only touch
//! their registers.

pub mod block;
pub mod console;
#[cfg(test)]
mod driver;
pub mod fs;
pub mod interrupt;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod vsock;

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_queue::{Queue, QueueState};

use crate::memory::GuestMemory;
use block::disk::Disk;
use interrupt::Interrupt;

/// Feature bit: the device follows version 1 of the standard.
pub const F_VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
/// Feature bit: a descriptor can point to a table of descriptors.
pub const F_INDIRECT: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// Feature bit: both sides say up to where they need no notification.
pub const F_EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// Features of every device here.
pub const F_COMMON: u64 = F_VERSION_1 | F_INDIRECT | F_EVENT_IDX;

/// Something the guest did that no correct driver does. The device stops until the guest resets it.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The rings themselves make no sense.
    #[error("queue {queue}: {source}")]
    Queue {
        /// Index of the queue.
        queue: u16,
        /// What is wrong with it.
        source: virtio_queue::Error,
    },
    /// A descriptor chain makes no sense for this device.
    #[error("{0}")]
    Chain(&'static str),
    /// A descriptor points outside of the guest's memory.
    #[error("a descriptor points outside of memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Whether a device has more to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All that was there is done.
    Done,
    /// It stopped so that other devices get their turn, and wants to be called again.
    More,
}

/// What a device gets when the guest's driver is ready: from then on the queues are its own.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The queues, checked to be valid.
    pub queues: Vec<Queue>,
    /// The device's interrupt line.
    pub interrupt: Arc<Interrupt>,
    /// Features that the driver accepted.
    pub features: u64,
}

/// A virtio device without its transport.
pub trait VirtioDevice: Send {
    /// Device type of chapter 5 of the standard.
    fn device_type(&self) -> u32;
    /// Name in messages and metrics.
    fn name(&self) -> &str;
    /// Size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// A driver has found the device and will ask for its features next.
    fn acknowledged(&mut self) {}
    /// Features it offers.
    fn features(&self) -> u64;
    /// Whether these, all of which it offers, go together.
    fn accepts(&self, _features: u64) -> bool {
        true
    }
    /// Its configuration space.
    fn config(&self) -> &[u8];
    /// The driver is ready.
    fn activate(&mut self, activation: Activation);
    /// Where its queues are, all of them, as if nothing had been taken out of them that was not given back. Called while
    /// the driver is ready.
    fn queues(&self) -> Vec<QueueState>;
    /// What must be saved of it besides queues and configuration. Called before [`Self::queues`]; from then on it leaves guest memory
    /// alone until [`Self::saved`].
    ///
    /// # Errors
    /// Why it cannot be saved now; [`Self::saved`] is due all the same.
    fn save(&mut self) -> Result<Vec<u8>, String> {
        Ok(Vec::new())
    }
    /// The machine is saved, or is not going to be: it goes on.
    fn saved(&mut self) {}
    /// Takes in what [`Self::save`] gave. Called before it is activated.
    ///
    /// # Errors
    /// Why it cannot go on with that.
    fn load(&mut self, _state: &[u8]) -> Result<(), String> {
        Ok(())
    }
    /// It was activated for a driver that goes on from a snapshot, and that may know of what no longer is.
    fn restored(&mut self) {}
    /// Forgets everything the driver said. Called with no queue in use.
    fn reset(&mut self);
    /// The driver notified queue `index`.
    ///
    /// # Errors
    /// When the guest did what it must not; the transport then stops the device.
    fn queue_event(&mut self, index: usize) -> Result<Progress, GuestError>;
    /// Host descriptors whose readiness matters to it. They stay the same for its life and are watched edge-triggered.
    fn host_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }
    /// Whether they are watched for room to write, too.
    fn waits_for_room(&self) -> bool {
        false
    }
    /// The host descriptor `fd` became ready.
    ///
    /// # Errors
    /// As [`Self::queue_event`].
    fn host_event(&mut self, _fd: RawFd) -> Result<Progress, GuestError> {
        Ok(Progress::Done)
    }
    /// Changes what is in a drive: another disk, or none. Only drives are asked to.
    ///
    /// # Errors
    /// As [`Self::queue_event`]. The disk is changed all the same.
    fn change_disk(&mut self, _disk: Option<Disk>) -> Result<Progress, GuestError> {
        Ok(Progress::Done)
    }
    /// The machine ends: hands on, within bounded time, what the guest has given it already.
    fn finish(&mut self) {}
    /// What is in it, if it is a drive and not empty.
    fn disk(&self) -> Option<Arc<Disk>> {
        None
    }
    /// What it counted.
    fn metrics(&self) -> serde_json::Value;
}
