//! Packets of the guest whose data is in several buffers.
//!
//! Since Linux 6.18, and the stable kernels that took the change back, the driver hands large packets over as a header
//! and many pages. virtio-vsock reads packets of one or two buffers, without copying; those of more are put together
//! here first.

use std::io::Read;

use virtio_queue::Reader;
use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};

use super::connection::MAX_PAYLOAD;
use crate::devices::virtio::GuestError;
use crate::devices::virtio::queue::Chain;
use crate::memory::GuestMemory;

/// Buffers that virtio-vsock takes by itself.
const PLAIN: usize = 2;
/// Where the header has its little-endian 32-bit data length (section 5.10.6).
const LENGTH_AT: usize = 24;

/// Room for one packet.
#[derive(Debug)]
pub struct Gather {
    header: [u8; PKT_HEADER_SIZE],
    data: Vec<u8>,
}

impl Gather {
    /// Empty room; it grows to at most [`MAX_PAYLOAD`] bytes.
    pub fn new() -> Self {
        Self { header: [0; PKT_HEADER_SIZE], data: Vec::new() }
    }

    /// The packet of a chain of the transmit queue.
    ///
    /// # Errors
    /// When the chain is no packet.
    pub fn packet<'a>(
        &'a mut self,
        memory: &'a GuestMemory,
        chain: &mut Chain<'a>,
    ) -> Result<VsockPacket<'a, ()>, GuestError> {
        if chain.clone().nth(PLAIN).is_none() {
            return Ok(VsockPacket::from_tx_virtq_chain(memory, chain, MAX_PAYLOAD)?);
        }
        let reader = chain
            .clone()
            .reader(memory)
            .map_err(|_| GuestError::Chain("a vsock packet points outside of memory"))?;
        self.fill(reader)?;
        let data = if self.data.is_empty() { None } else { Some(self.data.as_mut_slice()) };
        let header = self.header;
        // SAFETY: the packet refers to `header` and `data`, which are borrowed for as long as it lives.
        let mut packet = unsafe { VsockPacket::new(&mut self.header, data) }?;
        packet.set_header_from_raw(&header)?;
        Ok(packet)
    }

    fn fill(&mut self, mut reader: Reader<'_, ()>) -> Result<(), GuestError> {
        let short = |_| GuestError::Chain("a vsock packet is shorter than its header says");
        reader.read_exact(&mut self.header).map_err(short)?;
        let length =
            self.header.get(LENGTH_AT..).and_then(|bytes| bytes.first_chunk()).copied().unwrap_or_default();
        let length = u32::from_le_bytes(length);
        if length > MAX_PAYLOAD {
            return Err(GuestError::Chain("a vsock packet is over the size limit"));
        }
        self.data.resize(length as usize, 0);
        reader.read_exact(&mut self.data).map_err(short)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;

    const DATA: u64 = 0x10_000;

    /// What the packet of a chain of buffers of these lengths, filled with `bytes` one after the other, carries.
    fn carried(lengths: &[u32], bytes: &[u8], writable: bool) -> Result<Vec<u8>, GuestError> {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let queue = MockSplitQueue::new(&memory, 64);
        let (mut at, mut rest) = (DATA, bytes);
        let mut descriptors = Vec::new();
        for &length in lengths {
            let (piece, left) = rest.split_at(rest.len().min(length as usize));
            memory.write_slice(piece, GuestAddress(at)).unwrap();
            let flags = if writable { VRING_DESC_F_WRITE as u16 } else { 0 };
            descriptors.push(RawDescriptor::from(Descriptor::new(at, length, flags, 0)));
            // A hole between two buffers, so that they are not one by chance.
            at += u64::from(length) + 512;
            rest = left;
        }
        let mut chain = queue.build_desc_chain(&descriptors).unwrap();
        let mut gather = Gather::new();
        let packet = gather.packet(&memory, &mut chain)?;
        let mut data = vec![0; packet.len() as usize];
        if let Some(slice) = packet.data_slice() {
            slice.copy_to(&mut data[..]);
        }
        Ok(data)
    }

    fn packet(data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; PKT_HEADER_SIZE];
        bytes[LENGTH_AT..LENGTH_AT + 4].copy_from_slice(&(data.len() as u32).to_le_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    proptest! {
        #[test]
        fn data_in_any_number_of_buffers_arrives(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 1..20)) {
            let data = pieces.concat();
            let mut lengths = vec![PKT_HEADER_SIZE as u32];
            lengths.extend(pieces.iter().map(|piece| piece.len() as u32));
            prop_assert_eq!(carried(&lengths, &packet(&data), false).unwrap(), data);
        }

        #[test]
        fn chains_of_noise_never_panic(lengths in prop::collection::vec(0u32..200, 1..10), bytes in prop::collection::vec(any::<u8>(), 0..400), writable: bool) {
            let _ = carried(&lengths, &bytes, writable);
        }
    }

    #[test]
    fn a_length_beyond_the_buffers_or_the_limit_is_an_error() {
        let mut bytes = packet(&[1; 100]);
        assert!(carried(&[44, 50, 49], &bytes, false).is_err());
        bytes[LENGTH_AT..LENGTH_AT + 4].copy_from_slice(&(MAX_PAYLOAD + 1).to_le_bytes());
        assert!(carried(&[44, 50, 50], &bytes, false).is_err());
    }
}
