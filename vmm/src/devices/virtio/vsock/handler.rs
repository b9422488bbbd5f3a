//! Moves packets between the guest's queues and the multiplexer.

use std::sync::Arc;

use super::connection::MAX_PAYLOAD;
use super::metrics::Metrics;
use super::muxer::Muxer;
use super::packet;
use crate::devices::virtio::queue::{self, Buffers, DeviceQueue};
use crate::devices::virtio::{GuestError, Progress};
use crate::memory::GuestMemory;

/// The active half of the device.
pub struct Handler {
    /// Memory, receive queue (to the guest), transmit queue (from it) while the driver is ready.
    pub(super) queues: Option<(Arc<GuestMemory>, DeviceQueue, DeviceQueue)>,
    pub(super) muxer: Muxer,
    pub(super) metrics: Arc<Metrics>,
}

impl Handler {
    /// Takes the guest's packets, at most one round of the ring, and sends what they bring about.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn transmit(&mut self) -> Result<Progress, GuestError> {
        let Some((memory, _, transmit)) = &mut self.queues else { return Ok(Progress::Done) };
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
        let Some((memory, receive, _)) = &mut self.queues else { return Ok(Progress::Done) };
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
