//! What the guest sees of the entropy device.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::QueueState;

use super::handler::Handler;
use super::metrics::Metrics;
use crate::devices::virtio::queue::DeviceQueue;
use crate::devices::virtio::{Activation, F_COMMON, GuestError, Progress, VirtioDevice};

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    handler: Option<Handler>,
    metrics: Arc<Metrics>,
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &str {
        "rng"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn features(&self) -> u64 {
        F_COMMON
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn activate(&mut self, activation: Activation) {
        let Activation { memory, queues, interrupt, .. } = activation;
        self.handler = queues.into_iter().next().map(|queue| Handler {
            memory,
            queue: DeviceQueue::new(queue, 0, &interrupt),
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
        self.handler.as_mut().map_or(Ok(Progress::Done), Handler::process)
    }

    fn metrics(&self) -> serde_json::Value {
        self.metrics.to_json()
    }
}
