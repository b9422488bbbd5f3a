//! Carries out the guest's disk requests, one after the other, in the event loop's thread.
//!
//! Reads of images are answered from the host's page cache in microseconds; handing each to a thread or to io_uring
//! would cost more than it saves until many requests wait for a real disk.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

use super::disk::Disk;
use super::limit::Limit;
use super::metrics::Metrics;
use super::request::{Operation, Range, Request};
use crate::devices::virtio::queue::{self, Buffers, DeviceQueue};
use crate::devices::virtio::{GuestError, Progress};
use crate::memory::GuestMemory;
use crate::timeline::now_ns;

/// Bytes after whose moving others have their turn: a ring full of the largest requests is 4 GiB.
const ROUND_BYTES: usize = 32 << 20;
/// Length of the name that GET_ID tells.
const ID_BYTES: usize = 20;

/// The active half of the device.
#[derive(Debug)]
pub struct Handler {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) queue: DeviceQueue,
    pub(super) disk: Option<Arc<Disk>>,
    pub(super) id: String,
    pub(super) metrics: Arc<Metrics>,
}

impl Handler {
    /// Works off what is available, at most one round of the ring, and about [`ROUND_BYTES`].
    ///
    /// Stops at a request that `limit` does not admit yet, which is to call again then. Requests to a drive that is empty move nothing and
    /// are not limited.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn process(&mut self, limit: Option<&mut Limit>) -> Result<Progress, GuestError> {
        let mut limit = limit.filter(|_| self.disk.is_some());
        let memory = Arc::clone(&self.memory);
        self.queue.disable_kicks(&memory)?;
        let mut moved = 0_usize;
        for _ in 0..self.queue.size() {
            if moved >= ROUND_BYTES {
                break;
            }
            let Some(chain) = self.queue.pop(&memory)? else {
                self.queue.notify(&memory)?;
                if self.queue.enable_kicks(&memory)? {
                    continue;
                }
                return Ok(Progress::Done);
            };
            let head = chain.head_index();
            let request = Request::parse(Buffers::of(&memory, chain)?)?;
            let bytes = request.operation.bytes();
            if limit.as_mut().is_some_and(|limit| !limit.admits(now_ns(), bytes)) {
                self.queue.undo_pop();
                self.metrics.limited.fetch_add(1, Ordering::Relaxed);
                self.queue.notify(&memory)?;
                return Ok(Progress::Done);
            }
            moved = moved.saturating_add(bytes);
            let (status, written) = match self.execute(request.operation) {
                Ok(Done::Written(bytes)) => (VIRTIO_BLK_S_OK, bytes),
                Ok(Done::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
                Err(_) => (VIRTIO_BLK_S_IOERR, 0),
            };
            if status != VIRTIO_BLK_S_OK {
                self.metrics.errors.fetch_add(1, Ordering::Relaxed);
            }
            request.status.copy_from(&[status as u8]);
            self.queue.push(&memory, head, written.saturating_add(1))?;
        }
        self.queue.notify(&memory)?;
        Ok(Progress::More)
    }

    fn execute(&self, operation: Operation<'_>) -> io::Result<Done> {
        let disk = || self.disk.as_ref().ok_or_else(|| io::Error::other("the drive is empty"));
        match operation {
            Operation::Read { offset, to } => {
                let bytes = queue::total(&to);
                // SAFETY: slices of guest memory, which is mapped for good and whose content the monitor never relies on.
                unsafe { disk()?.read(offset, queue::iovecs(&to))? };
                self.count(&self.metrics.reads, 1);
                self.count(&self.metrics.read_bytes, bytes as u64);
                // Requests are capped far below 4 GiB.
                Ok(Done::Written(bytes as u32))
            }
            Operation::Write { offset, from } => {
                // SAFETY: slices of guest memory, which is mapped for good.
                unsafe { disk()?.write(offset, queue::iovecs(&from))? };
                self.count(&self.metrics.writes, 1);
                self.count(&self.metrics.write_bytes, queue::total(&from) as u64);
                Ok(Done::Written(0))
            }
            Operation::Flush => {
                disk()?.flush()?;
                self.count(&self.metrics.flushes, 1);
                Ok(Done::Written(0))
            }
            Operation::Discard(ranges) => self.zero(disk()?, &ranges, |_| true),
            Operation::WriteZeroes(ranges) => self.zero(disk()?, &ranges, |range| range.unmap),
            Operation::GetId { to } => {
                let mut id = [0; ID_BYTES];
                for (to, from) in id.iter_mut().zip(self.id.bytes()) {
                    *to = from;
                }
                Ok(Done::Written(queue::write(&to, &id) as u32))
            }
            Operation::Unsupported => Ok(Done::Unsupported),
            Operation::Invalid => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Discarded ranges read as zeros, as those that were asked to be zero.
    fn zero(&self, disk: &Disk, ranges: &[Range], punch: impl Fn(&Range) -> bool) -> io::Result<Done> {
        for range in ranges {
            disk.zero(range.offset, range.length, punch(range))?;
        }
        self.count(&self.metrics.discards, 1);
        Ok(Done::Written(0))
    }

    fn count(&self, counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}

/// How a request ended that did not fail.
enum Done {
    /// This many bytes were written into the guest's memory.
    Written(u32),
    /// It is not offered.
    Unsupported,
}
