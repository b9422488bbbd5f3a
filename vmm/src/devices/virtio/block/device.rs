//! What the guest sees of a disk.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::QueueState;

use super::disk::{Disk, SECTOR};
use super::handler::Handler;
use super::limit::Limit;
use super::metrics::Metrics;
use super::request::MAX_RANGES;
use crate::config::LimitConfig;
use crate::devices::virtio::queue::DeviceQueue;
use crate::devices::virtio::{Activation, F_COMMON, GuestError, Progress, VirtioDevice};

const QUEUE_SIZE: u16 = 256;
/// Data segments of one request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most sectors of one discarded or zeroed range: 1 GiB, so that no single request takes long.
const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// A disk.
#[derive(Debug)]
pub struct Block {
    name: String,
    /// None: the drive is empty.
    disk: Option<Arc<Disk>>,
    features: u64,
    config: Vec<u8>,
    handler: Option<Handler>,
    limit: Option<Limit>,
    metrics: Arc<Metrics>,
}

impl Block {
    /// A device called `id` that shows `disk`.
    pub fn new(id: &str, disk: Disk) -> Self {
        Self::drive(id, disk.read_only(), Some(disk))
    }

    /// A device called `id` whose disk can be changed while the machine runs. It is offered as writable, whatever is in it:
    /// a driver asks for that once. Writes to a disk that is read-only are answered with an error.
    pub fn removable(id: &str, disk: Option<Disk>) -> Self {
        Self::drive(id, false, disk)
    }

    /// A device called `id` with nothing in it: no sector can be read or written.
    pub fn empty(id: &str, read_only: bool) -> Self {
        Self::drive(id, read_only, None)
    }

    /// The same, limited.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn with_limit(self, limit: Option<&LimitConfig>) -> io::Result<Self> {
        Ok(Self { limit: limit.map(Limit::new).transpose()?, ..self })
    }

    fn sectors(disk: Option<&Disk>) -> u64 {
        disk.map_or(0, Disk::length) / SECTOR
    }

    fn drive(id: &str, read_only: bool, disk: Option<Disk>) -> Self {
        let mut features = F_COMMON | 1 << VIRTIO_BLK_F_SEG_MAX;
        if read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        Self {
            name: id.to_owned(),
            config: config_space(Self::sectors(disk.as_ref())),
            disk: disk.map(Arc::new),
            features,
            handler: None,
            limit: None,
            metrics: Arc::new(Metrics::default()),
        }
    }
}

/// `struct virtio_blk_config` (section 5.2.4).
fn config_space(sectors: u64) -> Vec<u8> {
    let mut config = vec![0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // Discard: sectors of a range, ranges, alignment. Write zeroes: sectors of a range, ranges, may unmap.
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &(MAX_RANGES as u32).to_le_bytes());
    put(44, &8_u32.to_le_bytes());
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &(MAX_RANGES as u32).to_le_bytes());
    put(56, &[1]);
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) {
        let Activation { memory, queues, interrupt, .. } = activation;
        self.handler = queues.into_iter().next().map(|queue| Handler {
            memory,
            queue: DeviceQueue::new(queue, 0, &interrupt),
            disk: self.disk.clone(),
            id: self.name.clone(),
            metrics: Arc::clone(&self.metrics),
        });
    }

    fn queues(&self) -> Vec<QueueState> {
        self.handler.iter().map(|handler| handler.queue.state(0)).collect()
    }

    fn reset(&mut self) {
        self.handler = None;
    }

    fn queue_event(&mut self, _: usize) -> Result<Progress, GuestError> {
        let limit = self.limit.as_mut();
        self.handler.as_mut().map_or(Ok(Progress::Done), |handler| handler.process(limit))
    }

    fn host_fds(&self) -> Vec<RawFd> {
        self.limit.iter().map(Limit::fd).collect()
    }

    /// What was not admitted may be now.
    fn host_event(&mut self, _: RawFd) -> Result<Progress, GuestError> {
        self.queue_event(0)
    }

    fn disk(&self) -> Option<Arc<Disk>> {
        self.disk.clone()
    }

    fn change_disk(&mut self, disk: Option<Disk>) -> Result<Progress, GuestError> {
        self.disk = None;
        let worked_off = match &mut self.handler {
            Some(handler) => {
                handler.disk = None;
                // Requests that wait were meant for the disk that was there: they end with an error, and none of them comes
                // to the next one.
                handler.process(None)
            }
            None => Ok(Progress::Done),
        };
        self.config = config_space(Self::sectors(disk.as_ref()));
        self.disk = disk.map(Arc::new);
        if let Some(handler) = &mut self.handler {
            handler.disk.clone_from(&self.disk);
        }
        worked_off
    }

    fn metrics(&self) -> serde_json::Value {
        self.metrics.to_json()
    }
}
