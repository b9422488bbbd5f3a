//! Fills the guest's buffers with random bytes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::metrics::Metrics;
use crate::devices::virtio::queue::{self, Buffers, DeviceQueue};
use crate::devices::virtio::{GuestError, Progress};
use crate::memory::GuestMemory;

/// Most bytes given for one request; a driver that wants more asks again.
const MAX_BYTES: usize = 256;

/// The active half of the device.
#[derive(Debug)]
pub struct Handler {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) queue: DeviceQueue,
    pub(super) metrics: Arc<Metrics>,
}

impl Handler {
    /// Works off what is available, at most one round of the ring.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn process(&mut self) -> Result<Progress, GuestError> {
        let memory = Arc::clone(&self.memory);
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.pop(&memory)? else {
                self.queue.notify(&memory)?;
                if self.queue.enable_kicks(&memory)? {
                    continue;
                }
                return Ok(Progress::Done);
            };
            let head = chain.head_index();
            let buffers = Buffers::of(&memory, chain)?;
            let mut random = [0; MAX_BYTES];
            let wanted = queue::total(&buffers.writable).min(MAX_BYTES);
            let written = queue::write(&buffers.writable, fill(&mut random[..wanted]));
            self.metrics.bytes.fetch_add(written as u64, Ordering::Relaxed);
            self.queue.push(&memory, head, written as u32)?;
        }
        self.queue.notify(&memory)?;
        Ok(Progress::More)
    }
}

/// As much of `buffer` as the host's generator filled.
fn fill(buffer: &mut [u8]) -> &[u8] {
    // SAFETY: pointer and length are those of a buffer that lives across the call.
    let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    buffer.get(..usize::try_from(got).unwrap_or(0)).unwrap_or_default()
}
