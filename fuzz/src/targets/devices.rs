//! Each virtio device through its registers and queues.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use vmm::config::{FilesystemConfig, Input, Output};
use vmm::devices::console_output::{ConsoleOutput, Outlet};
use vmm::devices::virtio::VirtioDevice;
use vmm::devices::virtio::block::Block;
use vmm::devices::virtio::block::disk::Disk;
use vmm::devices::virtio::console::Console;
use vmm::devices::virtio::fs::Fs;
use vmm::devices::virtio::net::{Net, Stream};
use vmm::devices::virtio::rng::Rng;
use vmm::exit::ExitRequest;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::backend;
use super::packets::Sockets;
use crate::bytes::{Bytes, Script};
use crate::guest::{Host, WRITE, play};
use crate::{Seed, Target, seed};

/// virtio-blk.
pub const BLOCK: Target = Target {
    name: "block",
    surface: "virtio-blk queue: requests of the guest's kernel, read by the monitor",
    run: |data| play(&mut Drive::new(), Bytes(data)),
    seeds: block_seeds,
};
/// virtio-net.
pub const NET: Target = Target {
    name: "net",
    surface: "virtio-net queues: packets of the guest, and frames that come from a socket",
    run: |data| play(&mut Cable::default(), Bytes(data)),
    seeds: net_seeds,
};
/// virtio-vsock.
pub const VSOCK: Target = Target {
    name: "vsock",
    surface: "virtio-vsock queues: packets of the guest, connections of the host",
    run: |data| play(&mut Sockets::new(), Bytes(data)),
    seeds: super::packets::queue_seeds,
};
/// virtio-rng.
pub const RNG: Target = Target {
    name: "rng",
    surface: "virtio-rng queue",
    run: |data| play(&mut Entropy, Bytes(data)),
    seeds: || {
        vec![
            seed("entropy", Script::new().start(0).chain(0, &[(WRITE, 32, b""), (WRITE, 300, b"")])),
            seed("entropy into memory that is read", Script::new().start(0).chain(0, &[(0, 32, b"")])),
            seed(
                "an indirect table",
                Script::new().start(1 << 28).descriptor(0, 0, 0x8_0000, 32, 4, 0).offer(0, 0),
            ),
        ]
    },
};
/// virtio-console.
pub const CONSOLE: Target = Target {
    name: "console",
    surface: "virtio-console queues: what the guest prints",
    run: |data| play(&mut Screen::default(), Bytes(data)),
    seeds: || {
        let panic = b"Kernel panic - not syncing: test\n";
        vec![
            seed("hello", Script::new().start(0).chain(1, &[(0, 5, b"hello"), (0, 1, b"\n")]).moved()),
            seed("a panic", Script::new().start(1 << 29).chain(1, &[(0, 33, panic)])),
            seed(
                "a descriptor of 4 GiB",
                Script::new().start(0).descriptor(1, 0, 0, u32::MAX, 0, 0).offer(1, 0),
            ),
        ]
    },
};
/// virtio-fs: the guest's queues, and those that virtiofsd sees.
pub const FS: Target = Target {
    name: "fs",
    surface: "virtio-fs queues, and what a virtiofsd that a guest has taken over writes into its own",
    run: |data| play(&mut Shared::default(), Bytes(data)),
    seeds: || {
        let ask = Script::new().start(0).chain(1, &[(0, 40, &[7; 40]), (WRITE, 90, b"")]);
        // Which place of its memory, which bytes: here of the used ring of the second queue.
        let word = |at: u32, words: &[u32]| {
            let at = SECOND_USED + at;
            [at.to_le_bytes().to_vec(), words.iter().flat_map(|word| word.to_le_bytes()).collect()].concat()
        };
        let answer = |id, length| ask.clone().say(&word(4, &[id, length])).say(&word(0, &[1 << 16])).host();
        vec![
            seed("set up and reset", Script::new().start(0).start(0).moved().start(0)),
            seed("queues moved while in use", Script::new().start(0).register(0x80, 0xffff_f000).offer(1, 0)),
            seed("an answer", answer(0, 90)),
            seed("an answer that is too long", answer(0, u32::MAX)),
            seed("an answer to nothing", answer(77, 90)),
            seed("an answer twice", answer(0, 9).say(&word(0, &[2 << 16])).host()),
            seed("65,535 answers", ask.clone().say(&word(0, &[u32::MAX])).host()),
            seed("a request of 4 GiB", {
                let huge = Script::new().start(0).descriptor(1, 0, 0, u32::MAX, 0, 0);
                huge.offer(1, 0)
            }),
            seed("a request that goes round", {
                let round = Script::new().start(0).descriptor(1, 0, 0, 1 << 16, 1, 1).descriptor(
                    1,
                    1,
                    0,
                    1 << 16,
                    1,
                    0,
                );
                round.offer(1, 0)
            }),
        ]
    },
};

/// A file that is nothing but memory, by a path that can be opened.
pub(crate) fn memory_file(bytes: &[u8]) -> (File, PathBuf) {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "out of descriptors");
    // SAFETY: just made, owned by nobody else.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(bytes).expect("out of memory");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}

const SECTORS: u64 = 64;

/// A drive with a disk of [`SECTORS`], and whatever disks come later.
pub(super) struct Drive {
    disks: Vec<(File, PathBuf, u64)>,
}

impl Drive {
    pub(super) fn new() -> Self {
        let mut drive = Self { disks: Vec::new() };
        drive.make(SECTORS);
        drive
    }

    fn make(&mut self, sectors: u64) -> Disk {
        let content: Vec<u8> = (0..sectors * 512).map(|at| (at / 512) as u8).collect();
        let (file, path) = memory_file(&content);
        let disk = Disk::raw(&path, false).expect("a disk that cannot be opened");
        self.disks.push((file, path, sectors * 512));
        disk
    }
}

impl Host for Drive {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let disk = self.disks.last().map(|(_, path, _)| Disk::raw(path, false).expect("a disk that is gone"));
        Box::new(Block::removable("disk", disk))
    }

    fn disk(&mut self, sectors: u8) -> Option<Disk> {
        // Of many that come and go, the first and the last find all that there is to find.
        (sectors > 0 && self.disks.len() < 4).then(|| self.make(sectors.into()))
    }

    fn check(&mut self) {
        for (file, _, length) in &self.disks {
            assert_eq!(
                file.metadata().expect("a disk that is gone").len(),
                *length,
                "a disk has another size"
            );
        }
    }
}

fn request(kind: u32, sector: u64) -> Vec<u8> {
    Script::new().u32(kind).u32(0).u64(sector).into()
}

fn block_seeds() -> Vec<Seed> {
    let of = |kind, sector, data: &[(u8, u16, &[u8])]| {
        let header = request(kind, sector);
        let mut buffers = vec![(0, 16, header.as_slice())];
        buffers.extend(data);
        buffers.push((WRITE, 1, b"\xee"));
        Script::new().start(0xffff_ffff).chain(0, &buffers)
    };
    let range: Vec<u8> = Script::new().u64(8).u32(8).u32(1).into();
    let lie: Vec<u8> = Script::new().u64(u64::MAX / 512).u32(u32::MAX).u32(0).into();
    vec![
        seed("read", of(0, 3, &[(WRITE, 1024, b"")])),
        seed("write", of(1, 3, &[(0, 512, &[7; 512])])),
        seed("flush", of(4, 0, &[])),
        seed("name", of(8, 0, &[(WRITE, 20, b"")])),
        seed("discard", of(11, 0, &[(0, 16, &range)])),
        seed("zeroes", of(13, 0, &[(0, 16, &range)])),
        seed("a range that is not on the disk", of(13, 0, &[(0, 16, &lie)])),
        seed("beyond the end", of(0, u64::MAX, &[(WRITE, 512, b"")])),
        seed("another disk, and a move", of(0, 3, &[(WRITE, 512, b"")]).u8(14).u8(9).moved().u8(14).u8(0)),
        seed("a loop", Script::new().start(0).descriptor(0, 0, 0x8_0000, 16, 1, 0).offer(0, 0)),
        seed("across the hole", Script::new().start(0).descriptor(0, 0, (1 << 20) - 8, 16, 0, 0).offer(0, 0)),
    ]
}

/// An interface on a socket like passt's.
#[derive(Default)]
pub(super) struct Cable {
    far: Option<UnixStream>,
}

impl Host for Cable {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (near, far) = UnixStream::pair().expect("out of descriptors");
        far.set_nonblocking(true).expect("a socket");
        self.far = Some(far);
        Box::new(Net::new("net0", Box::new(Stream::new(near).expect("a socket")), None, 1500))
    }

    fn say(&mut self, bytes: &[u8]) {
        if let Some(far) = &mut self.far {
            let _ = far.write(bytes);
        }
    }

    fn take(&mut self, most: usize) {
        if let Some(far) = &mut self.far {
            let _ = far.read(&mut vec![0; most]);
        }
    }

    fn close(&mut self) {
        self.far = None;
    }
}

fn net_seeds() -> Vec<Seed> {
    let packet: Vec<u8> = [vec![0; 12], vec![7; 60]].concat();
    let checksum: Vec<u8> = [vec![1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], vec![7; 100]].concat();
    let frame: Vec<u8> = [vec![0, 0, 0, 60], vec![9; 60]].concat();
    let receive = Script::new().start(0xffff_ffff).chain(0, &[(WRITE, 2000, b"")]);
    vec![
        seed("send", Script::new().start(0).chain(1, &[(0, 12, &packet[..12]), (0, 60, &packet[12..])])),
        seed("offloads", Script::new().start(0xffff_ffff).chain(1, &[(0, 112, &checksum)])),
        seed("receive", receive.clone().say(&frame).host().moved()),
        seed("receive into small buffers", {
            let one = receive.clone().chain(0, &[(WRITE, 20, b"")]).chain(0, &[(WRITE, 20, b"")]);
            one.say(&frame).say(&frame).host()
        }),
        seed("a frame too long", receive.clone().say(&[0xff; 8]).host()),
        seed("half a frame, and the end", receive.say(&frame[..30]).u8(13).host()),
        seed("a packet in memory to be written", Script::new().start(0).chain(1, &[(WRITE, 72, &packet)])),
    ]
}

/// Randomness.
pub(super) struct Entropy;

impl Host for Entropy {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::<Rng>::default()
    }
}

/// A console whose ring is small.
#[derive(Default)]
pub(super) struct Screen {
    ring: Option<ConsoleOutput>,
}

const RING: usize = 300;

impl Host for Screen {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let ring = self.ring.get_or_insert_with(|| ConsoleOutput::new(RING));
        let outlet = Outlet::open(ring, &Output::None).expect("an outlet to nowhere");
        Box::new(Console::new(outlet, Input::None, exit()))
    }

    fn check(&mut self) {
        let ring = self.ring.as_ref().expect("there was a device");
        // A replacement character for each byte that is no text, at most.
        assert!(ring.tail(usize::MAX).len() <= 3 * RING);
    }
}

pub(super) fn exit() -> ExitRequest {
    ExitRequest::new().expect("out of descriptors")
}

/// A shared directory whose server says yes to all that it is asked, and writes anything to the memory that it is given.
#[derive(Default)]
struct Shared {
    far: Vec<UnixStream>,
    given: Option<File>,
}

/// Where the used ring of the second queue is in that memory.
const SECOND_USED: u32 = (16 << 10) + 256 * (16 << 10) + 8192;

impl Shared {
    /// The memory that was given to the server last.
    fn memory(&self) -> Option<File> {
        let mut found = None;
        let stream = self.far.last()?;
        stream.set_nonblocking(true).expect("a socket");
        let (mut bytes, mut files) = ([0; 4096], [0; 8]);
        let mut into = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        // SAFETY: the only buffer is `bytes`, which outlives the call.
        while let Ok((1.., count)) = unsafe { stream.recv_with_fds(&mut into, &mut files) } {
            for fd in files.iter().take(count) {
                // SAFETY: just received, owned by nobody else.
                let file = unsafe { File::from_raw_fd(*fd) };
                // Eventfds have no length.
                if file.metadata().is_ok_and(|metadata| metadata.len() > 0) {
                    found = Some(file);
                }
            }
        }
        found
    }
}

impl Host for Shared {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (near, mut far) = UnixStream::pair().expect("out of descriptors");
        far.write_all(&backend::yes(64)).expect("a socket that is full");
        // Who asks more than there are answers finds nobody there, rather than waiting.
        far.shutdown(std::net::Shutdown::Write).expect("a socket");
        self.far.push(far);
        self.given = None;
        Box::new(shared(near))
    }

    /// Where, in 4 bytes, and what.
    fn say(&mut self, bytes: &[u8]) {
        if let Some(file) = self.memory() {
            self.given = Some(file);
        }
        if let (Some(file), Some((at, what))) = (&self.given, bytes.split_first_chunk::<4>()) {
            // What lies outside of it is not there: it is sealed.
            let _ = file.write_at(what, u32::from_le_bytes(*at).into());
        }
    }

    /// Its server cannot save what it knows, and may be gone.
    fn can_be_saved(&self) -> bool {
        false
    }
}

/// The device of one request queue whose server is at the other end of a socket.
pub(super) fn shared(near: UnixStream) -> Fs {
    let config = FilesystemConfig {
        tag: "host".into(),
        socket: None,
        fd: Some(near.into_raw_fd()),
        empty: false,
        queues: 1,
        queue_size: 64,
    };
    Fs::new(&config, exit()).expect("a connected socket")
}
