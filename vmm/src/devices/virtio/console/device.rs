//! What the guest sees of the console.

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::QueueState;

use super::handler::Handler;
use super::input::Input;
use super::metrics::Metrics;
use crate::config;
use crate::devices::console_output::Outlet;
use crate::devices::virtio::queue::DeviceQueue;
use crate::devices::virtio::{Activation, F_COMMON, GuestError, Progress, VirtioDevice};
use crate::exit::ExitRequest;

/// hvc0.
#[derive(Debug)]
pub struct Console {
    /// Queues and the two ends; the ends survive a reset of the queues.
    handler: Handler,
}

impl Console {
    /// A console that prints to `outlet`.
    pub fn new(outlet: Outlet, input: config::Input, exit: ExitRequest) -> Self {
        let input = match input {
            config::Input::None => None,
            config::Input::Stdin => Some(Input::stdin(exit)),
        };
        Self { handler: Handler { queues: None, outlet, input, metrics: Arc::new(Metrics::default()) } }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn name(&self) -> &str {
        "console"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn features(&self) -> u64 {
        F_COMMON
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn activate(&mut self, activation: Activation) {
        let Activation { memory, queues, interrupt, .. } = activation;
        let mut queues = queues.into_iter().zip(0..).map(|(queue, i)| DeviceQueue::new(queue, i, &interrupt));
        if let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) {
            self.handler.queues = Some((memory, receive, transmit));
        }
    }

    fn queues(&self) -> Vec<QueueState> {
        let queues = self.handler.queues.as_ref();
        queues.map_or_else(Vec::new, |(_, receive, transmit)| vec![receive.state(0), transmit.state(0)])
    }

    fn reset(&mut self) {
        self.handler.queues = None;
    }

    fn queue_event(&mut self, index: usize) -> Result<Progress, GuestError> {
        if index == 0 { self.handler.receive() } else { self.handler.transmit() }
    }

    fn host_fds(&self) -> Vec<RawFd> {
        self.handler.input.iter().map(Input::fd).collect()
    }

    fn host_event(&mut self, _: RawFd) -> Result<Progress, GuestError> {
        self.handler.receive()
    }

    fn finish(&mut self) {
        // Gives the terminal its settings back.
        self.handler.input = None;
    }

    fn metrics(&self) -> serde_json::Value {
        self.handler.metrics.to_json()
    }
}
