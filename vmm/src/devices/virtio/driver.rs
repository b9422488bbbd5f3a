//! For tests: the guest's side of a virtio device, well-behaved or not.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use super::mmio::MmioTransport;
use crate::bus::BusDevice;
use crate::memory::{self, GuestMemory};

const QUEUE_STRIDE: u64 = 0x1_0000;
const QUEUES: u64 = 0x10_0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Where tests may put buffers.
pub const DATA: u64 = 0x20_0000;
/// End of memory.
pub const END: u64 = 4 << 20;

pub const WRITE: u16 = 2;
const NEXT: u16 = 1;

pub struct Driver {
    pub memory: Arc<GuestMemory>,
    pub transport: MmioTransport,
    /// The interrupt line.
    pub line: EventFd,
    available: Vec<u16>,
    sizes: Vec<u16>,
    /// Features accepted besides VERSION_1, below bit 32.
    features: u32,
}

impl Driver {
    /// Sets the device up as a driver does.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_features(device, 0)
    }

    /// The same, accepting features of the device's own.
    pub fn with_features(device: Box<dyn VirtioDevice>, features: u32) -> Self {
        let memory = Arc::new(memory::create(END).unwrap());
        let sizes = device.queue_sizes().to_vec();
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let transport = MmioTransport::new(device, Arc::clone(&memory), line.try_clone().unwrap()).unwrap();
        let mut driver = Self { memory, transport, line, available: vec![0; sizes.len()], sizes, features };
        driver.start();
        driver
    }

    /// Saves the device and lets `device` go on from there, in the same memory.
    pub fn move_to(self, device: Box<dyn VirtioDevice>) -> Result<Self, String> {
        let saved = self.transport.save()?;
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let transport =
            MmioTransport::new(device, Arc::clone(&self.memory), line.try_clone().unwrap()).unwrap();
        transport.restore(&saved)?;
        transport.wake();
        for queue in 0..self.sizes.len() {
            transport.queue_event(queue);
        }
        Ok(Self { transport, line, ..self })
    }

    pub fn start(&mut self) {
        self.available.fill(0);
        self.write(0x70, 0);
        assert_eq!(self.read(0x70), 0);
        self.write(0x70, 3);
        // VERSION_1 and nothing else that is common: without EVENT_IDX every completion interrupts.
        self.write(0x24, 1);
        self.write(0x20, 1);
        self.write(0x24, 0);
        self.write(0x20, self.features);
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11);
        for (queue, size) in (0_u32..).zip(self.sizes.clone()) {
            let base = queue_base(queue);
            self.memory.write_slice(&[0; QUEUE_STRIDE as usize], GuestAddress(base)).unwrap();
            self.write(0x30, queue);
            assert_eq!(self.read(0x34), u32::from(size));
            self.write(0x38, u32::from(size));
            self.write(0x80, base as u32);
            self.write(0x90, (base + AVAILABLE) as u32);
            self.write(0xa0, (base + USED) as u32);
            self.write(0x44, 1);
        }
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15);
    }

    pub fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Makes a chain available; its descriptors are (address, length, flags), linked here.
    pub fn offer(&mut self, queue: u32, first: u16, chain: &[(u64, u32, u16)]) {
        for (i, (address, length, flags)) in chain.iter().enumerate() {
            let next = if i + 1 < chain.len() { NEXT } else { 0 };
            self.descriptor(queue, first + i as u16, *address, *length, flags | next, first + i as u16 + 1);
        }
        self.avail(queue, first);
    }

    pub fn descriptor(&self, queue: u32, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let at = queue_base(queue) + u64::from(index) * 16;
        let _ = self.memory.write_slice(&bytes, GuestAddress(at));
    }

    pub fn avail(&mut self, queue: u32, head: u16) {
        let (Some(index), Some(size)) =
            (self.available.get_mut(queue as usize), self.sizes.get(queue as usize))
        else {
            return;
        };
        let ring = queue_base(queue) + AVAILABLE;
        let slot = u64::from(*index % size);
        self.memory.write_obj(head, GuestAddress(ring + 4 + 2 * slot)).unwrap();
        *index = index.wrapping_add(1);
        self.memory.write_obj(*index, GuestAddress(ring + 2)).unwrap();
    }

    /// Sets the available index to anything.
    pub fn set_available(&self, queue: u32, index: u16) {
        self.memory.write_obj(index, GuestAddress(queue_base(queue) + AVAILABLE + 2)).unwrap();
    }

    pub fn kick(&self, queue: u32) {
        // For a device served elsewhere; nobody reads the others' here.
        self.write(0x50, queue);
        self.transport.queue_event(queue as usize);
    }

    /// Chains given back so far, and the last of them: (head, bytes written).
    pub fn used(&self, queue: u32) -> (u16, (u32, u32)) {
        let ring = queue_base(queue) + USED;
        let count: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let slot = u64::from(count.wrapping_sub(1) % self.sizes[queue as usize]);
        let id = self.memory.read_obj(GuestAddress(ring + 4 + 8 * slot)).unwrap();
        let length = self.memory.read_obj(GuestAddress(ring + 8 + 8 * slot)).unwrap();
        (count, (id, length))
    }

    pub fn needs_reset(&self) -> bool {
        self.read(0x70) & 64 != 0
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

fn queue_base(queue: u32) -> u64 {
    QUEUES + u64::from(queue) * QUEUE_STRIDE
}

mod tests {
    use proptest::prelude::*;

    use super::*;
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use crate::config::{FilesystemConfig, Input, Output};
    use crate::devices::console_output::{ConsoleOutput, Outlet};
    use crate::devices::virtio::block::Block;
    use crate::devices::virtio::block::disk::Disk;
    use crate::devices::virtio::console::Console;
    use crate::devices::virtio::fs::Fs;
    use crate::devices::virtio::fs::backend::serve;
    use crate::devices::virtio::net::{Net, Stream};
    use crate::devices::virtio::rng::Rng;
    use crate::devices::virtio::vsock::Vsock;
    use crate::exit::ExitRequest;

    fn disk(dir: &tempfile::TempDir, read_only: bool) -> Box<dyn VirtioDevice> {
        let path = dir.path().join("disk");
        std::fs::write(&path, (0..1 << 16_u32).map(|i| (i / 512) as u8).collect::<Vec<_>>()).unwrap();
        Box::new(Block::new("name of the disk", Disk::raw(&path, read_only).unwrap()))
    }

    fn request(driver: &mut Driver, kind: u32, sector: u64, data: (u64, u32, u16)) -> (u8, u32) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        driver.put(DATA, &header);
        driver.put(DATA + 64, &[0xee]);
        let before = driver.used(0).0;
        driver.offer(0, 0, &[(DATA, 16, 0), data, (DATA + 64, 1, WRITE)]);
        driver.kick(0);
        let (count, (_, length)) = driver.used(0);
        assert_eq!(count, before + 1);
        (driver.get(DATA + 64, 1)[0], length)
    }

    #[test]
    fn a_disk_reads_writes_and_tells_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut driver = Driver::new(disk(&dir, false));
        assert_eq!(request(&mut driver, 0, 3, (DATA + 4096, 1024, WRITE)), (0, 1025));
        assert_eq!(driver.get(DATA + 4096, 1024), [[3; 512], [4; 512]].concat());
        driver.put(DATA + 4096, &[9; 512]);
        assert_eq!(request(&mut driver, 1, 3, (DATA + 4096, 512, 0)), (0, 1));
        assert_eq!(std::fs::read(dir.path().join("disk")).unwrap()[3 * 512..4 * 512], [9; 512]);
        assert_eq!(request(&mut driver, 8, 0, (DATA + 4096, 20, WRITE)), (0, 21));
        assert_eq!(driver.get(DATA + 4096, 20), b"name of the disk\0\0\0\0");
        // Beyond the end, not whole sectors, unknown: answered, not fatal.
        assert_eq!(request(&mut driver, 0, 128, (DATA + 4096, 512, WRITE)).0, 1);
        assert_eq!(request(&mut driver, 0, u64::MAX, (DATA + 4096, 512, WRITE)).0, 1);
        assert_eq!(request(&mut driver, 0, 0, (DATA + 4096, 100, WRITE)).0, 1);
        assert_eq!(request(&mut driver, 77, 0, (DATA + 4096, 512, WRITE)).0, 2);
        // Discard of sectors 8 to 15.
        driver.put(DATA + 4096, &[8_u64.to_le_bytes(), 8_u64.to_le_bytes()].concat());
        assert_eq!(request(&mut driver, 11, 0, (DATA + 4096, 16, 0)), (0, 1));
        assert_eq!(std::fs::read(dir.path().join("disk")).unwrap()[8 * 512..16 * 512], [0; 4096]);
        assert!(!driver.needs_reset());

        let mut driver = Driver::new(disk(&dir, true));
        assert_eq!(request(&mut driver, 1, 3, (DATA + 4096, 512, 0)).0, 1);
    }

    #[test]
    fn a_ring_full_of_large_requests_lets_others_have_their_turn() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
        let mut driver = Driver::new(Box::new(Block::new("disk", Disk::raw(&path, false).unwrap())));
        driver.put(DATA, &[0; 16]);
        let mut chain = vec![(DATA, 16, 0)];
        chain.extend([(DATA + 4096, 1 << 20, WRITE); 16]);
        chain.push((DATA + 64, 1, WRITE));
        for request in 0..6_u16 {
            driver.offer(0, request * 20, &chain);
        }
        driver.kick(0);
        assert_eq!(driver.used(0), (2, (20, (16 << 20) + 1)));
        // It has called itself again.
        for done in [4, 6] {
            assert!(driver.transport.kicks()[0].read().is_ok());
            driver.transport.queue_event(0);
            assert_eq!(driver.used(0).0, done);
        }
    }

    #[test]
    fn a_device_that_was_misused_works_again_after_a_reset() {
        let dir = tempfile::tempdir().unwrap();
        let mut driver = Driver::new(disk(&dir, false));
        driver.offer(0, 0, &[(END + 4096, 16, 0), (DATA, 1, WRITE)]);
        driver.kick(0);
        assert!(driver.needs_reset());
        assert_eq!(driver.read(0x60) & 2, 2);
        driver.start();
        assert!(!driver.needs_reset());
        assert_eq!(request(&mut driver, 0, 3, (DATA + 4096, 512, WRITE)), (0, 513));
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let driver = Driver::new(Box::new(Rng::default()));
        driver.write(0x70, 0);
        driver.write(0x70, 3);
        driver.write(0x24, 0);
        driver.write(0x20, 1);
        driver.write(0x70, 11);
        assert_eq!(driver.read(0x70), 3);
    }

    #[test]
    fn entropy_fills_buffers() {
        let mut driver = Driver::new(Box::new(Rng::default()));
        driver.offer(0, 0, &[(DATA, 32, WRITE), (DATA + 100, 32, WRITE)]);
        driver.kick(0);
        assert_eq!(driver.used(0), (1, (0, 64)));
        assert!(driver.get(DATA, 32).iter().any(|byte| *byte != 0));
    }

    #[test]
    fn the_console_prints() {
        let output = ConsoleOutput::new(100);
        let outlet = Outlet::open(&output, &Output::None).unwrap();
        let console = Console::new(outlet, Input::None, ExitRequest::new().unwrap());
        let mut driver = Driver::new(Box::new(console));
        driver.put(DATA, b"hello");
        driver.offer(1, 0, &[(DATA, 3, 0), (DATA + 3, 2, 0)]);
        driver.kick(1);
        assert_eq!(output.tail(100), "hello");
        assert_eq!(driver.used(1).0, 1);
    }

    /// Anything a guest can do to a device.
    #[derive(Debug, Clone)]
    enum Move {
        Descriptor {
            queue: u32,
            index: u16,
            address: u64,
            length: u32,
            flags: u16,
            next: u16,
        },
        Available {
            queue: u32,
            head: u16,
        },
        Index {
            queue: u32,
            index: u16,
        },
        Kick(u32),
        Register {
            offset: u64,
            value: u32,
        },
        Memory {
            address: u64,
            value: u64,
        },
        Start,
        /// What the host does: another disk of so many sectors in the drive, or none.
        Disk(Option<u8>),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let address = prop_oneof![0..END, DATA..DATA + 64, END - 64..END + 64, any::<u64>(), Just(QUEUES)];
        let length = prop_oneof![0_u32..100, Just(512), Just(16), Just(44), 0_u32..1 << 20, any::<u32>()];
        let queue = 0_u32..3;
        let one = prop_oneof![
            8 => (queue.clone(), 0_u16..16, address.clone(), length, 0_u16..8, 0_u16..20).prop_map(
                |(queue, index, address, length, flags, next)| Move::Descriptor { queue, index, address, length, flags, next }
            ),
            6 => (queue.clone(), prop_oneof![0_u16..16, any::<u16>()]).prop_map(|(queue, head)| Move::Available { queue, head }),
            1 => (queue.clone(), any::<u16>()).prop_map(|(queue, index)| Move::Index { queue, index }),
            6 => queue.prop_map(Move::Kick),
            1 => (prop_oneof![0_u64..0x200, Just(0x70)], prop_oneof![0_u32..20, any::<u32>()])
                .prop_map(|(offset, value)| Move::Register { offset, value }),
            4 => (DATA..DATA + 128, prop_oneof![0_u64..16, any::<u64>()]).prop_map(|(address, value)| Move::Memory { address, value }),
            1 => Just(Move::Start),
            1 => proptest::option::of(1..20_u8).prop_map(Move::Disk),
        ];
        proptest::collection::vec(one, 1..80)
    }

    fn play(driver: &mut Driver, moves: &[Move], place: &Path) {
        let mut made = Vec::new();
        for one in moves {
            match *one {
                Move::Descriptor { queue, index, address, length, flags, next } => {
                    driver.descriptor(queue, index, address, length, flags, next);
                }
                Move::Available { queue, head } => driver.avail(queue, head),
                Move::Index { queue, index } => driver.set_available(queue, index),
                Move::Kick(queue) => driver.kick(queue),
                Move::Register { offset, value } => driver.write(offset, value),
                Move::Memory { address, value } => driver.put(address, &value.to_le_bytes()),
                Move::Start => driver.start(),
                Move::Disk(sectors) => {
                    let disk = sectors.map(|sectors| {
                        let path = place.join(format!("disk{}", made.len()));
                        std::fs::write(&path, vec![0; usize::from(sectors) * 512]).unwrap();
                        let disk = Disk::raw(&path, false).unwrap();
                        made.push((path, u64::from(sectors) * 512));
                        disk
                    });
                    driver.transport.change_disk(disk);
                }
            }
        }
        for (path, bytes) in made {
            assert_eq!(std::fs::metadata(path).unwrap().len(), bytes);
        }
        // Whatever happened, a reset makes it as new.
        driver.start();
        assert!(!driver.needs_reset());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn no_guest_can_break_a_device(moves in moves()) {
            let dir = tempfile::tempdir().unwrap();
            let outlet = Outlet::open(&ConsoleOutput::new(1000), &Output::None).unwrap();
            let (near, far) = UnixStream::pair().unwrap();
            // A frame of 20 bytes that waits to be received.
            std::io::Write::write_all(&mut &far, &[&[0, 0, 0, 20], &[7; 20][..]].concat()).unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            serve(theirs, Default::default());
            let config = FilesystemConfig {
                tag: "t".into(),
                socket: None,
                fd: Some(3),
                empty: false,
                queues: 1,
                queue_size: 64,
            };
            let fs = Fs::served_by(ours, &config, ExitRequest::new().unwrap()).unwrap();
            let devices: [Box<dyn VirtioDevice>; 6] = [
                disk(&dir, false),
                Box::new(Rng::default()),
                Box::new(Console::new(outlet, Input::None, ExitRequest::new().unwrap())),
                Box::new(Vsock::new(3, &dir.path().join("vsock")).unwrap()),
                Box::new(Net::new("net0", Box::new(Stream::new(near).unwrap()), None, 1500)),
                Box::new(fs),
            ];
            for device in devices {
                play(&mut Driver::new(device), &moves, dir.path());
            }
        }
    }
}
