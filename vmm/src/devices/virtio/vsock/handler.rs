//! Moves packets between the guest's queues and the multiplexer.

use std::sync::Arc;

use super::connection::MAX_PAYLOAD;
use super::metrics::Metrics;
use super::muxer::Muxer;
use super::packet;
use crate::devices::virtio::queue::{self, Buffers, DeviceQueue};
use crate::devices::virtio::{GuestError, Progress};
use crate::memory::GuestMemory;

/// Memory and the driver's queues.
pub struct Queues {
    pub(super) memory: Arc<GuestMemory>,
    /// To the guest.
    pub(super) receive: DeviceQueue,
    /// From it.
    pub(super) transmit: DeviceQueue,
    /// What happens to the device as a whole.
    pub(super) events: DeviceQueue,
    /// The guest was told to forget its streams and has not done so yet. One that began now would be forgotten, too.
    pub(super) forgetting: bool,
    /// Buffers for events that were taken and are not used.
    pub(super) held: u16,
}

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, `struct virtio_vsock_event` (section 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// The active half of the device.
pub struct Handler {
    /// What there is while the driver is ready.
    pub(super) queues: Option<Queues>,
    pub(super) muxer: Muxer,
    pub(super) metrics: Arc<Metrics>,
}

impl Handler {
    /// Takes the guest's packets, at most one round of the ring, and sends what they bring about.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn transmit(&mut self) -> Result<Progress, GuestError> {
        let Some(Queues { memory, transmit, .. }) = &mut self.queues else { return Ok(Progress::Done) };
        let mut progress = Progress::More;
        transmit.disable_kicks(memory)?;
        for _ in 0..transmit.size() {
            let Some(chain) = transmit.pop(memory)? else {
                if transmit.enable_kicks(memory)? {
                    continue;
                }
                progress = Progress::Done;
                break;
            };
            let head = chain.head_index();
            let (header, payload) = packet::parse(&Buffers::of(memory, chain)?, MAX_PAYLOAD)?;
            Metrics::add(&self.metrics.tx_packets, 1);
            Metrics::add(&self.metrics.tx_bytes, u64::from(header.len));
            self.muxer.on_packet(&header, &payload);
            transmit.push(memory, head, 0)?;
        }
        transmit.notify(memory)?;
        self.receive().map(|received| if received == Progress::More { received } else { progress })
    }

    /// Gives the guest what waits for it, as far as it has buffers, at most one round of the ring.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn receive(&mut self) -> Result<Progress, GuestError> {
        let Some(Queues { memory, receive, forgetting: false, .. }) = &mut self.queues else {
            return Ok(Progress::Done);
        };
        let mut progress = Progress::More;
        let mut used = false;
        for _ in 0..receive.size() {
            if !self.muxer.wants_to_send() {
                progress = Progress::Done;
                break;
            }
            let Some(chain) = receive.pop(memory)? else {
                if receive.enable_kicks(memory)? {
                    continue;
                }
                progress = Progress::Done;
                break;
            };
            let head = chain.head_index();
            let (room, payload) = packet::receive_buffer(&Buffers::of(memory, chain)?)?;
            let Some(header) = self.muxer.next(&payload) else {
                receive.undo_pop();
                progress = Progress::Done;
                break;
            };
            Metrics::add(&self.metrics.rx_packets, 1);
            Metrics::add(&self.metrics.rx_bytes, u64::from(header.len));
            queue::write(&room, &header.to_bytes());
            receive.push(memory, head, packet::HEADER_BYTES as u32 + header.len)?;
            used = true;
        }
        if used {
            receive.notify(memory)?;
        }
        Ok(progress)
    }

    /// Tells the guest that all its streams have ended. A driver that has made no buffer available for that has none.
    pub fn announce_reset(&mut self) {
        let Some(Queues { memory, events, forgetting, held, .. }) = &mut self.queues else { return };
        let mut tell = || {
            let Some(chain) = events.pop(memory)? else { return Ok(()) };
            let head = chain.head_index();
            let buffers = Buffers::of(memory, chain)?;
            let written = queue::write(&buffers.writable, &TRANSPORT_RESET);
            // The driver gives the buffer back when it has done what it says. It tells so only when that is the next one that
            // the device has not seen.
            while events.pop(memory)?.is_some() {
                *held = held.wrapping_add(1);
            }
            if !events.enable_kicks(memory)? {
                *forgetting = true;
            }
            events.push(memory, head, written as u32)?;
            events.notify(memory)
        };
        // A guest that breaks the rules of this queue keeps streams that answer with a reset.
        let _: Result<(), GuestError> = tell();
    }

    /// The guest has forgotten its streams.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn forgotten(&mut self) -> Result<Progress, GuestError> {
        if let Some(Queues { memory, events, forgetting, held, .. }) = &mut self.queues
            && *forgetting
            && events.pop(memory)?.is_some()
        {
            *forgetting = false;
            *held = held.wrapping_add(1);
        }
        self.receive()
    }

    /// Something happened on the host's sockets.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn host_event(&mut self) -> Result<Progress, GuestError> {
        let host = self.muxer.on_host_events(self.queues.is_some());
        let guest = self.receive()?;
        Ok(if host == Progress::More || guest == Progress::More { Progress::More } else { Progress::Done })
    }
}
