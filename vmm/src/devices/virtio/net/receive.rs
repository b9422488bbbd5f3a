//! Receive buffers taken from the queue ahead of the packets that will go into them.
//!
//! A packet's length is known only when it has been read, so what it is read into must be large enough for any: with
//! mergeable buffers dozens of chains, of which a short packet uses one. Chains are taken and checked once, and those
//! that a packet did not need are there for the next.

use std::collections::VecDeque;

use super::header::{HEADER_BYTES, NUM_BUFFERS};
use crate::devices::virtio::GuestError;
use crate::devices::virtio::queue::{self, Buffers, DeviceQueue, MAX_DESCRIPTORS};
use crate::memory::GuestMemory;

/// A chain of the receive queue.
#[derive(Debug, Clone, Copy)]
struct Chain {
    head: u16,
    pieces: usize,
    bytes: usize,
}

/// A piece of guest memory.
#[derive(Debug, Clone, Copy)]
struct Piece(libc::iovec);

// SAFETY: the pointer leads into guest memory, which is mapped for the rest of the process's life and which every
// thread may write.
unsafe impl Send for Piece {}

/// See the module.
#[derive(Debug, Default)]
pub struct ReceiveBuffers {
    chains: VecDeque<Chain>,
    pieces: VecDeque<Piece>,
    bytes: usize,
    /// Reused by every packet.
    used: Vec<(u16, u32)>,
}

impl ReceiveBuffers {
    /// Takes chains until they hold `wanted` bytes: true when they do. One chain at most when packets cannot be spread
    /// over several (`merge`).
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn fill(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &GuestMemory,
        wanted: usize,
        merge: bool,
    ) -> Result<bool, GuestError> {
        loop {
            if self.is_enough(queue, wanted, merge) {
                return Ok(true);
            }
            let Some(chain) = queue.pop(memory)? else { return Ok(false) };
            let head = chain.head_index();
            let Buffers { readable, writable } = Buffers::of(memory, chain)?;
            let bytes = queue::total(&writable);
            if !readable.is_empty() || bytes < HEADER_BYTES {
                return Err(GuestError::Chain("a receive buffer with no room for a header"));
            }
            self.chains.push_back(Chain { head, pieces: writable.len(), bytes });
            self.pieces.extend(queue::iovecs(&writable).into_iter().map(Piece));
            self.bytes = self.bytes.saturating_add(bytes);
        }
    }

    /// Chains taken and not given back.
    pub fn held(&self) -> u16 {
        // No more than a queue has.
        self.chains.len() as u16
    }

    fn is_enough(&self, queue: &DeviceQueue, wanted: usize, merge: bool) -> bool {
        // A driver whose whole queue holds less gets its packets cut off: it knew what it asked for.
        let full = self.chains.len() >= usize::from(queue.size()) || self.pieces.len() >= MAX_DESCRIPTORS;
        if merge { self.bytes >= wanted || full } else { !self.chains.is_empty() }
    }

    /// Where a packet of up to `wanted` bytes goes.
    pub fn iovecs(&self, wanted: usize, merge: bool, into: &mut Vec<libc::iovec>) {
        into.clear();
        let most = if merge { MAX_DESCRIPTORS } else { self.chains.front().map_or(0, |chain| chain.pieces) };
        let mut bytes: usize = 0;
        for Piece(piece) in self.pieces.iter().take(most) {
            into.push(*piece);
            bytes = bytes.saturating_add(piece.iov_len);
            if bytes >= wanted {
                break;
            }
        }
    }

    /// Gives the guest the buffers that a packet of `length` bytes, at least a header, was read into.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn give_back(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &GuestMemory,
        length: usize,
    ) -> Result<(), GuestError> {
        let mut rest = length;
        let mut chains = 0;
        self.used.clear();
        for chain in &self.chains {
            let here = rest.min(chain.bytes);
            // A chain's used length is 32 bits wide; packets are shorter than 64 KiB and a bit.
            self.used.push((chain.head, here as u32));
            rest -= here;
            chains += 1;
            if rest == 0 {
                break;
            }
        }
        self.write(NUM_BUFFERS, &(chains as u16).to_le_bytes());
        for chain in self.chains.drain(..chains) {
            self.pieces.drain(..chain.pieces.min(self.pieces.len()));
            self.bytes -= chain.bytes;
        }
        queue.push_all(memory, &self.used)
    }

    /// Writes into the first chain, which has room for a header.
    fn write(&self, mut skip: usize, bytes: &[u8]) {
        let mut bytes = bytes.iter();
        for Piece(piece) in &self.pieces {
            while skip < piece.iov_len {
                let Some(byte) = bytes.next() else { return };
                // SAFETY: `skip` lies within the piece, which is guest memory, mapped for good; the guest may write
                // the same byte at the same time, and what it reads then is its own affair.
                unsafe { piece.iov_base.cast::<u8>().add(skip).write_volatile(*byte) };
                skip += 1;
            }
            skip -= piece.iov_len;
        }
    }
}
