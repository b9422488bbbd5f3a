//! A guest that does anything to a virtio device, and the host behind it that does anything, too: what an input says.
//!
//! An input is a list of moves, each a byte that says which and then its numbers. What a correct driver does is one move
//! ([`op::START`], [`op::CHAIN`]), so that mutations of it get far; every part of it can also be done wrong by itself.

use std::sync::Arc;

use vm_memory::{Bytes as _, GuestAddress};
use vmm::bus::BusDevice;
use vmm::devices::virtio::VirtioDevice;
use vmm::devices::virtio::mmio::{MmioTransport, TransportState};
use vmm::memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::bytes::{Bytes, Script};

/// Bytes of memory from 0 on.
pub const END: u64 = 1 << 20;
/// Where the second range of memory begins, after the hole.
pub const HIGH: u64 = 4 << 30;
const HIGH_BYTES: u64 = 64 << 10;
/// Where a correct driver has its queues, and how far apart they are.
const QUEUES: u64 = 0x4_0000;
const STRIDE: u64 = 0x8000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x4000;
/// Where it has its buffers.
pub const DATA: u64 = 0x8_0000;
/// Most moves of one input: longer ones find nothing that shorter ones do not.
const MAX_MOVES: usize = 256;
/// How often a device that wants to go on is let.
const TURNS: usize = 8;

/// Descriptor flag: the device writes.
pub const WRITE: u8 = 2;
const NEXT: u8 = 1;

/// What a move is, by its first byte modulo [`op::COUNT`].
pub mod op {
    /// A descriptor: queue, index (8 bits), place, length (32), flags (8), next (8).
    pub const DESCRIPTOR: u8 = 0;
    /// The next entry of the available ring: queue (8), head (16).
    pub const AVAILABLE: u8 = 1;
    /// The available ring's index: queue (8), index (16).
    pub const INDEX: u8 = 2;
    /// A notification: queue (8).
    pub const KICK: u8 = 3;
    /// A register is written: offset (16), width (8), value (32).
    pub const WRITE: u8 = 4;
    /// One is read: offset (16), width (8).
    pub const READ: u8 = 5;
    /// Memory is written: place, bytes after their length.
    pub const MEMORY: u8 = 6;
    /// The device is reset and set up as the standard says: features below bit 32 (32).
    pub const START: u8 = 7;
    /// A chain of buffers with bytes in them, as the standard says, made available and notified: queue (8), number (8), then for each
    /// flags (8), length (16) and its bytes after their length.
    pub const CHAIN: u8 = 8;
    /// The host's descriptors are ready.
    pub const HOST: u8 = 9;
    /// The host's program says something: bytes after their length.
    pub const SAY: u8 = 10;
    /// It reads as much: bytes (16).
    pub const TAKE: u8 = 11;
    /// It connects to a port of the guest (32).
    pub const CONNECT: u8 = 12;
    /// It goes away.
    pub const CLOSE: u8 = 13;
    /// The drive gets a disk of so many sectors (8), or none (0).
    pub const DISK: u8 = 14;
    /// The machine is saved and goes on from there.
    pub const MOVE: u8 = 15;
    /// How many there are.
    pub const COUNT: u8 = 16;
}

/// The device's other side.
pub trait Host {
    /// A new device, each time of the same kind.
    fn device(&mut self) -> Box<dyn VirtioDevice>;
    /// A program of the host says something to the guest.
    fn say(&mut self, _bytes: &[u8]) {}
    /// It takes at most so many bytes.
    fn take(&mut self, _most: usize) {}
    /// It connects to a port of the guest.
    fn connect(&mut self, _port: u32) {}
    /// It goes away.
    fn close(&mut self) {}
    /// A disk for [`op::DISK`].
    fn disk(&mut self, _sectors: u8) -> Option<vmm::devices::virtio::block::disk::Disk> {
        None
    }
    /// Whether a machine with it can be saved at any time.
    fn can_be_saved(&self) -> bool {
        true
    }
    /// At the end: whatever must be true.
    fn check(&mut self) {}
}

/// Memory and registers, as the guest has them.
pub struct Guest {
    memory: Arc<GuestMemory>,
    transport: MmioTransport,
    sizes: Vec<u16>,
    available: Vec<u16>,
}

/// Plays `moves` on a device of `host`'s, and checks that it is as new after a reset.
pub fn play(host: &mut dyn Host, mut moves: Bytes<'_>) {
    let mut guest = Guest::new(host.device());
    for _ in 0..MAX_MOVES {
        if moves.is_empty() {
            break;
        }
        guest.play(host, &mut moves);
        guest.turn();
    }
    guest.finish();
    host.check();
}

impl Guest {
    /// One that has not found its device yet.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let sizes = device.queue_sizes().to_vec();
        let memory = Arc::new(memory());
        let transport = transport(device, &memory);
        Self { memory, transport, available: vec![0; sizes.len()], sizes }
    }

    fn play(&mut self, host: &mut dyn Host, input: &mut Bytes<'_>) {
        match input.u8() % op::COUNT {
            op::DESCRIPTOR => {
                let (queue, index) = (input.u8(), input.u8());
                let (address, length) = (place(input), input.u32());
                let (flags, next) = (input.u8(), input.u8());
                self.descriptor(queue, index, address, length, flags, next);
            }
            op::AVAILABLE => self.available(input.u8(), input.u16()),
            op::INDEX => {
                let (queue, index) = (input.u8(), input.u16());
                self.put(base(queue) + AVAILABLE + 2, &index.to_le_bytes());
            }
            op::KICK => self.kick(input.u8()),
            op::WRITE => {
                let (offset, width, value) = (input.u16(), input.u8(), input.u32());
                self.write(u64::from(offset) % 0x1000, width, value);
            }
            op::READ => {
                let (offset, width) = (input.u16(), input.u8());
                self.transport.read(u64::from(offset) % 0x1000, &mut vec![0xff; usize::from(width % 9)]);
            }
            op::MEMORY => {
                let address = place(input);
                self.put(address, input.part());
            }
            op::START => self.start(input.u32()),
            op::CHAIN => self.chain(input),
            op::HOST => {
                for fd in self.transport.host_fds() {
                    self.transport.host_event(fd);
                }
            }
            op::SAY => host.say(input.part()),
            op::TAKE => host.take(input.u16().into()),
            op::CONNECT => host.connect(input.u32()),
            op::CLOSE => host.close(),
            op::DISK => {
                let disk = host.disk(input.u8());
                self.transport.change_disk(disk);
            }
            _ => self.move_to(host),
        }
    }

    /// Resets the device and sets it up as a driver does; `features` below bit 32 are accepted as far as they are offered.
    fn start(&mut self, features: u32) {
        self.available.fill(0);
        self.write(0x70, 4, 0);
        self.write(0x70, 4, 3);
        self.write(0x14, 4, 0);
        let offered = self.register(0x10);
        self.write(0x24, 4, 1);
        self.write(0x20, 4, 1);
        self.write(0x24, 4, 0);
        self.write(0x20, 4, features & offered);
        self.write(0x70, 4, 11);
        for (queue, size) in (0_u8..).zip(self.sizes.clone()) {
            let at = base(queue);
            self.put(at, &[0; USED as usize + 4096]);
            self.write(0x30, 4, queue.into());
            self.write(0x38, 4, size.into());
            self.write(0x80, 4, at as u32);
            self.write(0x90, 4, (at + AVAILABLE) as u32);
            self.write(0xa0, 4, (at + USED) as u32);
            self.write(0x44, 4, 1);
        }
        self.write(0x70, 4, 15);
    }

    fn chain(&mut self, input: &mut Bytes<'_>) {
        let (queue, count) = (input.u8(), input.u8() % 9);
        let first = (self.available.get(usize::from(queue)).copied().unwrap_or(0) as u8).wrapping_mul(8) % 64;
        for number in 0..count {
            let (flags, length, bytes) = (input.u8(), input.u16(), input.part());
            let address = DATA + (u64::from(first + number) << 11);
            self.put(address, bytes);
            let next = if number + 1 < count { NEXT } else { 0 };
            let flags = flags & WRITE | next;
            self.descriptor(queue, first + number, address, length.into(), flags, first + number + 1);
        }
        self.available(queue, first.into());
        self.kick(queue);
    }

    fn descriptor(&self, queue: u8, index: u8, address: u64, length: u32, flags: u8, next: u8) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(u16::from(flags).to_le_bytes());
        bytes.extend(u16::from(next).to_le_bytes());
        self.put(base(queue) + u64::from(index) * 16, &bytes);
    }

    fn available(&mut self, queue: u8, head: u16) {
        let number = usize::from(queue);
        let (Some(index), Some(size)) = (self.available.get_mut(number), self.sizes.get(number)) else {
            return;
        };
        let slot = u64::from(*index % size);
        *index = index.wrapping_add(1);
        let index = *index;
        let ring = base(queue) + AVAILABLE;
        self.put(ring + 4 + 2 * slot, &head.to_le_bytes());
        self.put(ring + 2, &index.to_le_bytes());
    }

    fn kick(&self, queue: u8) {
        self.write(0x50, 4, queue.into());
    }

    /// What the event loop does: notified queues are worked off.
    fn turn(&self) {
        for _ in 0..TURNS {
            let mut idle = true;
            for (kick, queue) in self.transport.kicks().iter().zip(0..) {
                if kick.read().is_ok() {
                    idle = false;
                    self.transport.queue_event(queue);
                }
            }
            if idle {
                return;
            }
        }
    }

    /// What was saved can be restored into a device of the same kind, whatever the guest had done to it.
    fn move_to(&mut self, host: &mut dyn Host) {
        let saved = self.transport.save();
        if let Ok(saved) = &saved {
            let bytes = postcard::to_stdvec(saved).expect("a state that cannot be encoded");
            let again: TransportState = postcard::from_bytes(&bytes).expect("a state that cannot be read");
            assert_eq!(*saved, again);
        }
        self.transport.saved();
        match saved {
            Ok(saved) => {
                let next = transport(host.device(), &self.memory);
                match next.restore(&saved) {
                    Ok(()) => {
                        next.wake();
                        self.transport = next;
                    }
                    Err(why) => assert!(!host.can_be_saved(), "what was saved cannot be restored: {why}"),
                }
            }
            Err(why) => assert!(!host.can_be_saved(), "it cannot be saved: {why}"),
        }
    }

    fn finish(mut self) {
        let (_, metrics) = self.transport.metrics();
        assert!(metrics.is_object());
        // Whatever happened, a reset makes it as new.
        self.start(0);
        assert_eq!(self.register(0x70) & 64, 0, "a device that needs a reset after a reset");
        self.transport.finish();
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        // What lies outside of memory is not there.
        let _ = self.memory.write(bytes, GuestAddress(address));
    }

    fn write(&self, offset: u64, width: u8, value: u32) {
        let bytes = u64::from(value).to_le_bytes();
        self.transport.write(offset, &bytes[..usize::from(width % 9)]);
    }

    fn register(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

fn transport(device: Box<dyn VirtioDevice>, memory: &Arc<GuestMemory>) -> MmioTransport {
    let line = EventFd::new(libc::EFD_NONBLOCK).expect("out of descriptors");
    MmioTransport::new(device, Arc::clone(memory), line).expect("out of descriptors")
}

/// Two ranges with a hole between them.
fn memory() -> GuestMemory {
    let ranges = [(0, END), (HIGH, HIGH_BYTES)].map(|(start, length)| (GuestAddress(start), length as usize));
    GuestMemory::from_ranges(&ranges).expect("out of memory")
}

/// The state of a device that a driver has set up.
pub fn saved(device: Box<dyn VirtioDevice>) -> TransportState {
    let mut guest = Guest::new(device);
    guest.start(u32::MAX);
    guest.transport.save().expect("a device that cannot be saved")
}

/// Lets a device go on from a state, whatever that says.
pub fn go_on(device: Box<dyn VirtioDevice>, state: &TransportState) {
    let guest = Guest::new(device);
    if guest.transport.restore(state).is_err() {
        return;
    }
    guest.transport.wake();
    guest.turn();
    for fd in guest.transport.host_fds() {
        guest.transport.host_event(fd);
    }
    guest.turn();
    guest.transport.save().expect("what was restored cannot be saved");
    guest.finish();
}

fn base(queue: u8) -> u64 {
    QUEUES + u64::from(queue) * STRIDE
}

/// A place in memory, near its edges, or nowhere.
fn place(input: &mut Bytes<'_>) -> u64 {
    match input.u8() % 6 {
        0 => DATA + u64::from(input.u16()),
        1 => QUEUES + u64::from(input.u16()) * 4,
        2 => END - 64 + u64::from(input.u8()),
        3 => HIGH - 64 + u64::from(input.u16()),
        4 => HIGH + HIGH_BYTES - 64 + u64::from(input.u8()),
        _ => input.u64(),
    }
}

/// Moves for seeds.
impl Script {
    /// [`op::START`].
    pub fn start(self, features: u32) -> Self {
        self.u8(op::START).u32(features)
    }

    /// [`op::CHAIN`]: (flags, length, bytes) of each buffer.
    pub fn chain(self, queue: u8, buffers: &[(u8, u16, &[u8])]) -> Self {
        let head = self.u8(op::CHAIN).u8(queue).u8(buffers.len() as u8);
        buffers.iter().fold(head, |script, (flags, length, bytes)| script.u8(*flags).u16(*length).part(bytes))
    }

    /// [`op::DESCRIPTOR`] at any address.
    pub fn descriptor(self, queue: u8, index: u8, address: u64, length: u32, flags: u8, next: u8) -> Self {
        self.u8(op::DESCRIPTOR).u8(queue).u8(index).u8(5).u64(address).u32(length).u8(flags).u8(next)
    }

    /// [`op::AVAILABLE`] and [`op::KICK`].
    pub fn offer(self, queue: u8, head: u16) -> Self {
        self.u8(op::AVAILABLE).u8(queue).u16(head).u8(op::KICK).u8(queue)
    }

    /// [`op::WRITE`] of 32 bits.
    pub fn register(self, offset: u16, value: u32) -> Self {
        self.u8(op::WRITE).u16(offset).u8(4).u32(value)
    }

    /// [`op::SAY`].
    pub fn say(self, bytes: &[u8]) -> Self {
        self.u8(op::SAY).part(bytes)
    }

    /// [`op::HOST`].
    pub fn host(self) -> Self {
        self.u8(op::HOST)
    }

    /// [`op::MOVE`].
    pub fn moved(self) -> Self {
        self.u8(op::MOVE)
    }
}
