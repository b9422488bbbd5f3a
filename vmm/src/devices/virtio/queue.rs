//! What all queue handlers share: taking chains from a queue, giving them back, notifying the driver as seldom as it
//! allows; and bounded access to what a chain points to.

#[cfg(test)]
mod model;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::GuestError;
use super::interrupt::Interrupt;
use crate::memory::GuestMemory;

/// A chain of descriptors of this monitor's memory.
pub type Chain<'m> = DescriptorChain<&'m GuestMemory>;

/// Most descriptors taken from one chain. A chain of an indirect table could have 65,535.
pub const MAX_DESCRIPTORS: usize = 1024;

/// Where a ring's index is, and where its elements begin and how long each is (section 2.7).
const RING_INDEX: u64 = 2;
const AVAILABLE_HEADER: u64 = 4;
const AVAILABLE_ELEMENT: u64 = 2;
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;

/// A queue in the hands of its device.
#[derive(Debug)]
pub struct DeviceQueue {
    queue: Queue,
    index: u16,
    /// Chains given back since the driver was last notified, or found not to want it.
    added: u16,
    interrupt: Arc<Interrupt>,
}

impl DeviceQueue {
    /// Takes over queue number `index`.
    pub fn new(queue: Queue, index: u16, interrupt: &Arc<Interrupt>) -> Self {
        Self { queue, index, added: 0, interrupt: Arc::clone(interrupt) }
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Where it is, as if the last `held` chains had not been taken.
    pub fn state(&self, held: u16) -> QueueState {
        let state = self.queue.state();
        QueueState { next_avail: state.next_avail.wrapping_sub(held), ..state }
    }

    fn blame<T>(&self, result: Result<T, virtio_queue::Error>) -> Result<T, GuestError> {
        result.map_err(|source| GuestError::Queue { queue: self.index, source })
    }

    /// The next chain that the driver made available.
    ///
    /// # Errors
    /// When the ring makes no sense.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, GuestError> {
        let index = self.index;
        let mut available =
            self.queue.iter(memory).map_err(|source| GuestError::Queue { queue: index, source })?;
        Ok(available.next())
    }

    /// Puts the chain got last back, as if it had not been taken.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives chain `head` back with `written` bytes written into it.
    ///
    /// # Errors
    /// When the ring or the chain's index makes no sense.
    pub fn push(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), GuestError> {
        self.push_all(memory, &[(head, written)])
    }

    /// Gives several chains back, (head, bytes written) each, so that the driver sees all of them or none.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn push_all(&mut self, memory: &GuestMemory, chains: &[(u16, u32)]) -> Result<(), GuestError> {
        let size = self.queue.size();
        let mut next = self.queue.next_used();
        for (head, written) in chains {
            if *head >= size {
                return self.blame(Err(virtio_queue::Error::InvalidDescriptorIndex));
            }
            let element = [u32::from(*head).to_le(), written.to_le()];
            let at = self
                .ring_address(self.queue.used_ring(), USED_HEADER + USED_ELEMENT * u64::from(next % size))?;
            memory.write_obj(element, at)?;
            next = next.wrapping_add(1);
        }
        // The index makes them visible, and comes after them.
        let index = self.ring_address(self.queue.used_ring(), RING_INDEX)?;
        memory.store(next.to_le(), index, Ordering::Release)?;
        self.queue.set_next_used(next);
        self.added = self.added.saturating_add(chains.len() as u16);
        Ok(())
    }

    fn ring_address(&self, ring: u64, offset: u64) -> Result<GuestAddress, GuestError> {
        // `Queue::is_valid` has seen to it that rings lie in memory.
        GuestAddress(ring)
            .checked_add(offset)
            .ok_or(GuestError::Chain("a ring at the end of the address space"))
    }

    /// Interrupts the driver if it wants to know about what was given back since the last call.
    ///
    /// # Errors
    /// When the ring makes no sense.
    pub fn notify(&mut self, memory: &GuestMemory) -> Result<(), GuestError> {
        let added = std::mem::take(&mut self.added);
        // What was given back must be visible before the driver's wish is read: it writes its wish, then looks again.
        fence(Ordering::SeqCst);
        if self.queue.event_idx_enabled() {
            let at = AVAILABLE_HEADER + AVAILABLE_ELEMENT * u64::from(self.queue.size());
            let at = self.ring_address(self.queue.avail_ring(), at)?;
            let event = u16::from_le(memory.load(at, Ordering::Relaxed)?);
            // Section 2.7.10: notify when the index has passed the event.
            if self.queue.next_used().wrapping_sub(event).wrapping_sub(1) >= added {
                return Ok(());
            }
        }
        self.interrupt.used_buffer();
        Ok(())
    }

    /// Asks the driver for a notification of the next chain; true if there is one already.
    ///
    /// # Errors
    /// When the ring makes no sense.
    pub fn enable_kicks(&mut self, memory: &GuestMemory) -> Result<bool, GuestError> {
        let result = self.queue.enable_notification(memory);
        self.blame(result)
    }

    /// Tells the driver that notifications are not needed for now.
    ///
    /// # Errors
    /// When the ring makes no sense.
    pub fn disable_kicks(&mut self, memory: &GuestMemory) -> Result<(), GuestError> {
        let result = self.queue.disable_notification(memory);
        self.blame(result)
    }
}

/// Pieces of guest memory, in order.
pub type Slices<'m> = Vec<VolatileSlice<'m>>;

/// What a chain points to: first what the device reads, then what it writes.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    /// Device-readable memory.
    pub readable: Slices<'m>,
    /// Device-writable memory.
    pub writable: Slices<'m>,
}

impl<'m> Buffers<'m> {
    /// Collects the chain's memory.
    ///
    /// # Errors
    /// When it points outside of memory, has too many descriptors, or writable before readable ones.
    pub fn of(memory: &'m GuestMemory, chain: Chain<'m>) -> Result<Self, GuestError> {
        let mut buffers = Self::default();
        walk(chain, |writable, piece| {
            let list = if writable { &mut buffers.writable } else { &mut buffers.readable };
            list.push(piece.slice(memory)?);
            Ok(())
        })?;
        Ok(buffers)
    }
}

/// A piece of guest memory by its address, for what outlives the call that found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Of its first byte.
    pub address: GuestAddress,
    /// In bytes.
    pub length: usize,
}

impl Piece {
    /// The memory. The hole between the two regions cannot be crossed, and no driver does.
    ///
    /// # Errors
    /// When there is none.
    pub fn slice<'m>(&self, memory: &'m GuestMemory) -> Result<VolatileSlice<'m>, GuestError> {
        Ok(memory.get_slice(self.address, self.length)?)
    }
}

/// Tells of each piece of a chain that has any bytes, whether it is writable: those come last.
///
/// # Errors
/// As [`Buffers::of`], or `tell`'s.
pub fn walk(
    chain: Chain<'_>,
    mut tell: impl FnMut(bool, Piece) -> Result<(), GuestError>,
) -> Result<(), GuestError> {
    let mut answer = false;
    for (count, descriptor) in chain.enumerate() {
        if count >= MAX_DESCRIPTORS {
            return Err(GuestError::Chain("a chain of more than 1024 descriptors"));
        }
        if descriptor.len() > 0 {
            answer |= descriptor.is_write_only();
            tell(answer, Piece { address: descriptor.addr(), length: descriptor.len() as usize })?;
        }
        if answer && !descriptor.is_write_only() {
            return Err(GuestError::Chain("a readable descriptor after a writable one"));
        }
    }
    Ok(())
}

/// Bytes in all of `slices`.
pub fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).sum()
}

/// Splits `slices` after `at` bytes; `None` when they are shorter.
pub fn split<'m>(slices: &[VolatileSlice<'m>], at: usize) -> Option<(Slices<'m>, Slices<'m>)> {
    let (mut before, mut after, mut rest) = (Slices::new(), Slices::new(), at);
    for slice in slices {
        let here = rest.min(slice.len());
        let (left, right) = slice.split_at(here).ok()?;
        rest -= here;
        before.extend((!left.is_empty()).then_some(left));
        after.extend((!right.is_empty()).then_some(right));
    }
    (rest == 0).then_some((before, after))
}

/// Copies the first bytes of `slices` out; `None` when they are shorter than `buffer`.
pub fn read_exact(slices: &[VolatileSlice<'_>], buffer: &mut [u8]) -> Option<()> {
    let mut rest = buffer;
    for slice in slices {
        let here = rest.len().min(slice.len());
        let (now, later) = rest.split_at_mut(here);
        slice.copy_to(now);
        rest = later;
    }
    rest.is_empty().then_some(())
}

/// Copies `buffer` to the start of `slices`; tells how much fitted.
pub fn write(slices: &[VolatileSlice<'_>], buffer: &[u8]) -> usize {
    let mut rest = buffer;
    for slice in slices {
        let here = rest.len().min(slice.len());
        let (now, later) = rest.split_at(here);
        slice.copy_from(now);
        rest = later;
    }
    buffer.len() - rest.len()
}

/// What of `slice` comes after `at` bytes, if anything does.
fn after(slice: VolatileSlice<'_>, at: usize) -> Option<VolatileSlice<'_>> {
    slice.offset(at).ok().filter(|rest| !rest.is_empty())
}

/// Copies the bytes of one list of slices to another, as many as both have.
pub fn copy(from: &[VolatileSlice<'_>], to: &[VolatileSlice<'_>]) {
    let (mut sources, mut targets) = (from.iter(), to.iter());
    let (mut source, mut target) = (sources.next().copied(), targets.next().copied());
    while let (Some(here), Some(there)) = (source, target) {
        here.copy_to_volatile_slice(there);
        let both = here.len().min(there.len());
        source = after(here, both).or_else(|| sources.next().copied());
        target = after(there, both).or_else(|| targets.next().copied());
    }
}

/// The `iovec`s of `slices`, for calls that fill or empty guest memory directly. They are valid as long as guest memory,
/// which is never unmapped.
pub fn iovecs(slices: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    slices
        .iter()
        .map(|slice| libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() })
        .collect()
}
