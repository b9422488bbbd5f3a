//! Moves packets between the guest's queues and what is behind the device.

use std::sync::Arc;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::backend::{Backend, MAX_FRAME, MAX_PACKET};
use super::header::{self, GUEST_SEGMENTS, HEADER_BYTES};
use super::metrics::Metrics;
use super::receive::ReceiveBuffers;
use crate::devices::virtio::queue::{self, Buffers, DeviceQueue};
use crate::devices::virtio::{GuestError, Progress};
use crate::memory::GuestMemory;

/// Packets moved before others have their turn, and before the guest hears of them at the latest.
const ROUND: usize = 64;
/// Bytes of an Ethernet header with a VLAN tag.
const LINK_HEADER: usize = 18;

/// What the device has while the driver is ready.
pub struct Rings {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) receive: DeviceQueue,
    pub(super) transmit: DeviceQueue,
    pub(super) features: u64,
    pub(super) buffers: ReceiveBuffers,
    /// Reused by every packet.
    pub(super) scratch: Scratch,
}

/// Room for the pieces of one packet.
#[derive(Default)]
pub struct Scratch(pub(super) Vec<libc::iovec>);

// SAFETY: it is empty between packets as far as anybody reads it: every use fills it anew.
unsafe impl Send for Scratch {}

/// The active half of the device.
pub struct Handler {
    pub(super) backend: Box<dyn Backend>,
    pub(super) rings: Option<Rings>,
    /// Largest packet of this network without offloads, link-layer header excluded.
    pub(super) mtu: usize,
    pub(super) metrics: Arc<Metrics>,
}

impl Handler {
    /// Sends the guest's packets.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn transmit(&mut self) -> Result<Progress, GuestError> {
        let Some(Rings { memory, transmit, features, scratch: Scratch(packet), .. }) = &mut self.rings else {
            return Ok(Progress::Done);
        };
        let metrics = &self.metrics;
        let mut progress = Progress::More;
        transmit.disable_kicks(memory)?;
        for _ in 0..ROUND {
            let Some(chain) = transmit.pop(memory)? else {
                if transmit.enable_kicks(memory)? {
                    continue;
                }
                progress = Progress::Done;
                break;
            };
            let head = chain.head_index();
            let Buffers { readable, writable } = Buffers::of(memory, chain)?;
            if !writable.is_empty() {
                return Err(GuestError::Chain("a packet to send in memory to be written"));
            }
            let mut header = [0; HEADER_BYTES];
            queue::read_exact(&readable, &mut header)
                .ok_or(GuestError::Chain("a packet to send without a whole header"))?;
            let frame = queue::total(&readable) - HEADER_BYTES;
            let checked = (frame <= MAX_FRAME).then(|| header::checked(header, frame, *features)).flatten();
            let Some(mut header) = checked else {
                Metrics::add(&metrics.tx_invalid, 1);
                transmit.push(memory, head, 0)?;
                continue;
            };
            packet.clear();
            packet.push(libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: HEADER_BYTES });
            packet.extend(after_header(&readable));
            // SAFETY: `header`, which outlives the call, and slices of guest memory, which is mapped for good.
            match unsafe { self.backend.send(packet) } {
                Ok(true) => {
                    Metrics::add(&metrics.tx_packets, 1);
                    Metrics::add(&metrics.tx_bytes, frame);
                }
                Ok(false) => {
                    // Goes on when the backend has room.
                    transmit.undo_pop();
                    progress = Progress::Done;
                    break;
                }
                Err(_) => Metrics::add(&metrics.tx_dropped, 1),
            }
            transmit.push(memory, head, 0)?;
        }
        transmit.notify(memory)?;
        Ok(progress)
    }

    /// Gives the guest the packets that wait for it, as far as it has buffers.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn receive(&mut self) -> Result<Progress, GuestError> {
        let Some(Rings { memory, receive, features, buffers, scratch: Scratch(iovecs), .. }) =
            &mut self.rings
        else {
            return Ok(Progress::Done);
        };
        let merge = *features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let segments = *features & GUEST_SEGMENTS != 0;
        let wanted = if segments { MAX_PACKET } else { self.mtu + LINK_HEADER + HEADER_BYTES };
        let metrics = &self.metrics;
        let mut progress = Progress::More;
        let mut used = false;
        receive.disable_kicks(memory)?;
        for _ in 0..ROUND {
            if !buffers.fill(receive, memory, wanted, merge)? {
                if receive.enable_kicks(memory)? {
                    continue;
                }
                Metrics::add(&metrics.rx_waits, 1);
                progress = Progress::Done;
                break;
            }
            buffers.iovecs(wanted, merge, iovecs);
            // SAFETY: pieces of guest memory, mapped for good, whose content the monitor does not rely on.
            match unsafe { self.backend.receive(iovecs) } {
                Ok(Some(length)) if length >= HEADER_BYTES => {
                    buffers.give_back(receive, memory, length)?;
                    used = true;
                    Metrics::add(&metrics.rx_packets, 1);
                    Metrics::add(&metrics.rx_bytes, length - HEADER_BYTES);
                }
                Ok(None) => {
                    progress = Progress::Done;
                    break;
                }
                Ok(Some(_)) => Metrics::add(&metrics.rx_errors, 1),
                Err(_) => {
                    Metrics::add(&metrics.rx_errors, 1);
                    progress = Progress::Done;
                    break;
                }
            }
        }
        if used {
            receive.notify(memory)?;
        }
        Ok(progress)
    }

    /// The backend has packets, or room for some.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn host_event(&mut self) -> Result<Progress, GuestError> {
        self.backend.ready();
        let received = self.receive()?;
        let sent = self.transmit()?;
        Ok(if received == Progress::More { received } else { sent })
    }
}

/// The pieces of a packet that come after its header.
fn after_header(slices: &[vm_memory::VolatileSlice<'_>]) -> impl Iterator<Item = libc::iovec> {
    let mut skip = HEADER_BYTES;
    queue::iovecs(slices).into_iter().filter_map(move |mut piece| {
        let here = skip.min(piece.iov_len);
        skip -= here;
        piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(here).cast();
        piece.iov_len -= here;
        (piece.iov_len > 0).then_some(piece)
    })
}
