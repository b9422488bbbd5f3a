//! What the guest sees of the socket device.

use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::QueueState;

use super::handler::{Handler, Queues};
use super::metrics::Metrics;
use super::muxer::Muxer;
use crate::devices::virtio::queue::DeviceQueue;
use crate::devices::virtio::{Activation, F_COMMON, GuestError, Progress, VirtioDevice};
use crate::error::{Error, Result};

/// Receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// Sockets between host and guest.
pub struct Vsock {
    config: [u8; 8],
    handler: Handler,
    metrics: Arc<Metrics>,
}

impl Vsock {
    /// A device for the guest with context id `cid`, listening on `socket`.
    ///
    /// # Errors
    /// When it cannot listen there.
    pub fn new(cid: u32, socket: &Path) -> Result<Self> {
        let metrics = Arc::new(Metrics::default());
        let muxer = Muxer::new(u64::from(cid), socket, Arc::clone(&metrics))
            .map_err(|source| Error::Listen { path: socket.to_owned(), source })?;
        Ok(Self {
            config: u64::from(cid).to_le_bytes(),
            handler: Handler { queues: None, muxer, metrics: Arc::clone(&metrics) },
            metrics,
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn name(&self) -> &str {
        "vsock"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_COMMON
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) {
        let Activation { memory, queues, interrupt, .. } = activation;
        let mut queues = queues.into_iter().zip(0..).map(|(queue, i)| DeviceQueue::new(queue, i, &interrupt));
        if let (Some(receive), Some(transmit), Some(events)) = (queues.next(), queues.next(), queues.next()) {
            self.handler.queues =
                Some(Queues { memory, receive, transmit, events, forgetting: false, held: 0 });
        }
    }

    fn queues(&self) -> Vec<QueueState> {
        let queues = self.handler.queues.as_ref();
        queues.map_or_else(Vec::new, |Queues { receive, transmit, events, held, .. }| {
            vec![receive.state(0), transmit.state(0), events.state(*held)]
        })
    }

    /// The streams that the guest knows ended with the machine it was.
    fn restored(&mut self) {
        self.handler.announce_reset();
        self.handler.muxer.forget_ports();
    }

    fn reset(&mut self) {
        self.handler.queues = None;
        self.handler.muxer.reset();
    }

    fn queue_event(&mut self, index: usize) -> Result<Progress, GuestError> {
        match index {
            0 => self.handler.receive(),
            1 => self.handler.transmit(),
            2 => self.handler.forgotten(),
            _ => Ok(Progress::Done),
        }
    }

    fn host_fds(&self) -> Vec<RawFd> {
        vec![self.handler.muxer.fd()]
    }

    fn host_event(&mut self, _: RawFd) -> Result<Progress, GuestError> {
        self.handler.host_event()
    }

    fn finish(&mut self) {
        self.handler.muxer.finish();
    }

    fn metrics(&self) -> serde_json::Value {
        self.metrics.to_json()
    }
}
