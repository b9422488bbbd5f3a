//! The queues that the backend sees: the monitor's own, in memory that is nobody else's. What a guest asks is copied
//! there, and the answer back.
//!
//! So guest memory is shared with nobody: a machine's memory can be mapped privately from a template and written by a
//! forked child while the machine runs on, and who takes the backend over has not taken the guest.
//!
//! Entry N of a queue's descriptor table always points to chunk N of the memory behind its rings; a request takes as many
//! as it needs. Nothing that the backend can write to decides where the monitor reads or writes, but how much of an
//! answer there is, which is cut to the room that the guest gave for it.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestRegionMmap, MmapRegion,
};
use vmm_sys_util::eventfd::EventFd;

use super::frontend::Lost;
use crate::devices::virtio::queue::{self, Piece, Slices};
use crate::memory::{GuestMemory, sealed_file};

/// Entries of each queue, and its chunks.
pub const ENTRIES: u16 = 256;
/// Bytes of a chunk: most requests and most answers need one. What no request has needed takes no memory.
const CHUNK: u32 = 16 << 10;
/// Where a queue's rings are, from its beginning (section 2.7), and where its chunks are.
const AVAILABLE: u64 = 16 * ENTRIES as u64;
const USED: u64 = 2 * AVAILABLE;
const CHUNKS: u64 = CHUNK as u64;
/// All of a queue.
const LENGTH: u64 = CHUNKS + ENTRIES as u64 * CHUNK as u64;
/// Where a ring's index is, and its first element.
const INDEX: u64 = 2;
const ELEMENTS: u64 = 4;

/// A request of the guest's that the backend has.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// By which the guest knows it.
    pub head: u16,
    /// Where the guest wants the answer.
    pub answer: Vec<Piece>,
}

impl Request {
    /// How many bytes of an answer there is room for.
    pub fn room(&self) -> usize {
        self.answer.iter().map(|piece| piece.length).fold(0, usize::saturating_add)
    }
}

/// A request, and the chunks that it has: those with the question first.
#[derive(Debug)]
struct Given {
    request: Request,
    chunks: Vec<u16>,
    questions: usize,
}

/// A queue that the backend sees.
#[derive(Debug)]
pub struct Shadow {
    memory: Arc<GuestMemory>,
    start: u64,
    next_available: u16,
    next_used: u16,
    /// Chunks that no request has, those used last at the end: they have memory already.
    free: Vec<u16>,
    /// By the first of their chunks.
    given: Vec<Option<Given>>,
    kick: EventFd,
    call: EventFd,
}

/// So many queues, in one file that is nothing but memory.
///
/// # Errors
/// Out of descriptors or addresses.
pub fn create(count: usize) -> io::Result<Vec<Shadow>> {
    let length = LENGTH * count as u64;
    let file: File = sealed_file(c"file-server-queues", length)?;
    let size = usize::try_from(length).map_err(io::Error::other)?;
    let mapping = MmapRegion::from_file(FileOffset::new(file, 0), size).map_err(io::Error::other)?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).ok_or(io::ErrorKind::InvalidInput)?;
    let memory = Arc::new(GuestMemory::from_regions(vec![region]).map_err(io::Error::other)?);
    (0..count as u64).map(|index| Shadow::new(Arc::clone(&memory), index * LENGTH)).collect()
}

impl Shadow {
    fn new(memory: Arc<GuestMemory>, start: u64) -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self {
            memory,
            start,
            next_available: 0,
            next_used: 0,
            free: (0..ENTRIES).rev().collect(),
            given: (0..ENTRIES).map(|_| None).collect(),
            kick: event()?,
            call: event()?,
        })
    }

    /// All that the backend is given.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Address of the descriptor table in [`Self::memory`].
    pub fn descriptors(&self) -> u64 {
        self.start
    }

    /// Of what is available.
    pub fn available(&self) -> u64 {
        self.start + AVAILABLE
    }

    /// Of what is used.
    pub fn used(&self) -> u64 {
        self.start + USED
    }

    /// Written when something is available.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Written by the backend when something is used; never read.
    pub fn call(&self) -> &EventFd {
        &self.call
    }

    /// Whether the backend has everything answered.
    pub fn is_idle(&self) -> bool {
        self.free.len() == usize::from(ENTRIES)
    }

    /// As new. Only while the backend does not have it.
    ///
    /// # Errors
    /// Never: its memory is there.
    pub fn reset(&mut self) -> Result<(), GuestMemoryError> {
        for given in self.given.iter_mut().filter_map(Option::take) {
            self.free.extend(given.chunks.into_iter().rev());
        }
        (self.next_available, self.next_used) = (0, 0);
        for ring in [self.available(), self.used()] {
            // Flags and index.
            self.memory.write_obj(0_u32, GuestAddress(ring))?;
        }
        Ok(())
    }

    /// Whether a question of so many bytes with so long an answer would ever fit.
    pub fn could_take(question: usize, answer: usize) -> bool {
        chunks(question) + chunks(answer) <= usize::from(ENTRIES)
    }

    /// Makes a question available to the backend; [`Self::kick`] is due. False when there is no room until others are answered.
    ///
    /// # Errors
    /// Never: its memory is there.
    pub fn give(&mut self, question: &Slices<'_>, request: Request) -> Result<bool, GuestMemoryError> {
        let asked = queue::total(question);
        let room = request.room();
        let (questions, answers) = (chunks(asked), chunks(room));
        if questions + answers > self.free.len() {
            return Ok(false);
        }
        let taken = self.free.split_off(self.free.len() - questions - answers);
        let lengths = pieces(asked).map(|length| (length, 0));
        let lengths = lengths.chain(pieces(room).map(|length| (length, VRING_DESC_F_WRITE)));
        let followers = taken.iter().skip(1).map(Some).chain([None]);
        let mut copy = Slices::with_capacity(questions);
        for ((chunk, (length, mut flags)), next) in taken.iter().zip(lengths).zip(followers) {
            let address = self.chunk(*chunk);
            if flags == 0 {
                copy.push(self.memory.get_slice(address, length as usize)?);
            }
            if next.is_some() {
                flags |= VRING_DESC_F_NEXT;
            }
            let descriptor =
                Descriptor::new(address.0, length, flags as u16, next.copied().unwrap_or_default());
            self.memory.write_obj(descriptor, GuestAddress(self.start + 16 * u64::from(*chunk)))?;
        }
        queue::copy(question, &copy);
        let Some(head) = taken.first().copied() else { return Ok(false) };
        let at = self.available() + ELEMENTS + 2 * u64::from(self.next_available % ENTRIES);
        self.memory.write_obj(head.to_le(), GuestAddress(at))?;
        self.next_available = self.next_available.wrapping_add(1);
        // It comes after all that it makes visible.
        let index = GuestAddress(self.available() + INDEX);
        self.memory.store(self.next_available.to_le(), index, Ordering::Release)?;
        // A chunk number below ENTRIES, of which there are as many.
        if let Some(given) = self.given.get_mut(usize::from(head)) {
            *given = Some(Given { request, chunks: taken, questions });
        }
        Ok(true)
    }

    /// The next request that the backend has answered, and what it gave to `take`: at most as much as there is room for.
    ///
    /// # Errors
    /// When it breaks the rules.
    pub fn take<T>(
        &mut self,
        take: impl FnOnce(&Request, &Slices<'_>) -> T,
    ) -> Result<Option<(Request, T)>, Lost> {
        let gone = |_| Lost::Nonsense("has taken its memory away");
        let index = GuestAddress(self.used() + INDEX);
        let index: u16 = self.memory.load(index, Ordering::Acquire).map_err(gone)?;
        if u16::from_le(index) == self.next_used {
            return Ok(None);
        }
        let at = self.used() + ELEMENTS + 8 * u64::from(self.next_used % ENTRIES);
        let [id, length]: [u32; 2] = self.memory.read_obj(GuestAddress(at)).map_err(gone)?;
        let given = usize::try_from(u32::from_le(id)).ok().and_then(|id| self.given.get_mut(id));
        let given = given.and_then(Option::take);
        let Given { request, chunks, questions } =
            given.ok_or(Lost::Nonsense("has answered what it was not asked"))?;
        self.next_used = self.next_used.wrapping_add(1);
        let length = request.room().min(u32::from_le(length) as usize);
        let answer = chunks.iter().skip(questions).zip(pieces(length));
        let answer = answer.map(|(chunk, length)| self.memory.get_slice(self.chunk(*chunk), length as usize));
        let taken = take(&request, &answer.collect::<Result<_, _>>().map_err(gone)?);
        self.free.extend(chunks.into_iter().rev());
        Ok(Some((request, taken)))
    }

    /// Tells the backend of what was given.
    pub fn notify(&self) {
        // It must be visible before. A counter that is full says so already.
        fence(Ordering::SeqCst);
        let _ = self.kick.write(1);
    }

    fn chunk(&self, index: u16) -> GuestAddress {
        GuestAddress(self.start + CHUNKS + u64::from(index) * u64::from(CHUNK))
    }
}

/// How many chunks so many bytes need.
fn chunks(bytes: usize) -> usize {
    bytes.div_ceil(CHUNK as usize)
}

/// How much of so many bytes is in each chunk.
fn pieces(bytes: usize) -> impl Iterator<Item = u32> {
    (0..chunks(bytes)).map(move |index| (bytes - index * CHUNK as usize).min(CHUNK as usize) as u32)
}

#[cfg(test)]
mod tests;
