//! A virtio-mmio device's interrupt: a status word that the guest reads and acknowledges, and the line.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Status bit: a queue has used buffers.
const USED_BUFFER: u32 = 1;
/// Status bit: configuration or device status changed.
const CONFIG_CHANGE: u32 = 2;

/// Shared between device and transport without a lock: the guest reads it on every interrupt.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    line: EventFd,
    count: AtomicU64,
}

impl Interrupt {
    /// An interrupt raised by writing to `line`, an irqfd.
    pub fn new(line: EventFd) -> Self {
        Self { status: AtomicU32::new(0), line, count: AtomicU64::new(0) }
    }

    /// Tells the guest that a queue has used buffers.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the guest to look at configuration and device status.
    pub fn config_change(&self) {
        self.raise(CONFIG_CHANGE);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.count.fetch_add(1, Ordering::Relaxed);
        // An irqfd is consumed by KVM at once and cannot be full.
        let _ = self.line.write(1);
    }

    /// What the guest has not acknowledged yet.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// Sets what the guest has not acknowledged, without interrupting it.
    pub fn restore(&self, bits: u32) {
        self.status.store(bits & (USED_BUFFER | CONFIG_CHANGE), Ordering::SeqCst);
    }

    /// The guest has seen `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Interrupts raised since the start.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}
