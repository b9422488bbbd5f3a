//! What the guest sees of a network device.

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU};
use virtio_queue::QueueState;

use super::backend::Backend;
use super::handler::{Handler, Rings, Scratch};
use super::header;
use super::metrics::Metrics;
use super::receive::ReceiveBuffers;
use super::unplugged::Unplugged;
use crate::devices::virtio::queue::DeviceQueue;
use crate::devices::virtio::{Activation, F_COMMON, GuestError, Progress, VirtioDevice};

/// Receive, transmit.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// A network interface.
pub struct Net {
    name: String,
    features: u64,
    config: [u8; 12],
    handler: Handler,
    /// It was said that the guest's offloads cannot be had: a guest could have it said at every reset.
    told: bool,
    metrics: Arc<Metrics>,
}

impl Net {
    /// A device called `name` in front of `backend`. Without a `mac` the guest makes one up.
    pub fn new(name: &str, backend: Box<dyn Backend>, mac: Option<[u8; 6]>, mtu: u16) -> Self {
        let mut device = Self::with(name, backend, mac, mtu);
        device.features |= 1 << VIRTIO_NET_F_MTU;
        device
    }

    /// A device called `name` that is connected to nothing yet. The guest learns of its address and MTU by other ways, once
    /// it is.
    pub fn unplugged(name: &str, cable: Unplugged) -> Self {
        Self::with(name, Box::new(cable), None, 0)
    }

    fn with(name: &str, backend: Box<dyn Backend>, mac: Option<[u8; 6]>, mtu: u16) -> Self {
        let mut features = F_COMMON | 1 << VIRTIO_NET_F_MRG_RXBUF | backend.offloads();
        // `struct virtio_net_config` (section 5.1.4): MAC, status, queue pairs, MTU.
        let mut config = [0; 12];
        if let Some(mac) = mac {
            features |= 1 << VIRTIO_NET_F_MAC;
            config[..6].copy_from_slice(&mac);
        }
        config[10..].copy_from_slice(&mtu.to_le_bytes());
        let metrics = Arc::new(Metrics::default());
        let handler = Handler { backend, rings: None, mtu: usize::from(mtu), metrics: Arc::clone(&metrics) };
        Self { name: name.to_owned(), features, config, handler, told: false, metrics }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn accepts(&self, features: u64) -> bool {
        header::go_together(features)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) {
        let Activation { memory, queues, interrupt, features, .. } = activation;
        if let Err(error) = self.handler.backend.use_offloads(features)
            && !std::mem::replace(&mut self.told, true)
        {
            // The host then hands over packets that the guest cannot take; they are lost, nothing else is.
            eprintln!("bulkhead-vmm: {}: the tap does not take the guest's offloads: {error}", self.name);
        }
        let mut queues = queues.into_iter().zip(0..).map(|(queue, i)| DeviceQueue::new(queue, i, &interrupt));
        if let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) {
            self.handler.rings = Some(Rings {
                memory,
                receive,
                transmit,
                features,
                buffers: ReceiveBuffers::default(),
                scratch: Scratch::default(),
            });
        }
    }

    fn queues(&self) -> Vec<QueueState> {
        let rings = self.handler.rings.as_ref();
        rings.map_or_else(Vec::new, |rings| {
            vec![rings.receive.state(rings.buffers.held()), rings.transmit.state(0)]
        })
    }

    fn reset(&mut self) {
        self.handler.rings = None;
    }

    fn queue_event(&mut self, index: usize) -> Result<Progress, GuestError> {
        match index {
            0 => self.handler.receive(),
            1 => self.handler.transmit(),
            _ => Ok(Progress::Done),
        }
    }

    fn host_fds(&self) -> Vec<RawFd> {
        vec![self.handler.backend.fd()]
    }

    fn waits_for_room(&self) -> bool {
        self.handler.backend.waits_for_room()
    }

    fn host_event(&mut self, _: RawFd) -> Result<Progress, GuestError> {
        self.handler.host_event()
    }

    fn metrics(&self) -> serde_json::Value {
        self.metrics.to_json()
    }
}
