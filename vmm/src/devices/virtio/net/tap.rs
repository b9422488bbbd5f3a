//! A tap: the host's kernel takes and gives Ethernet frames through a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use super::backend::Backend;
use super::header::{CSUM, ECN, GUEST_CSUM, HEADER_BYTES, TSO, UFO, USO};

/// Where taps come from.
pub const TUN_DEVICE: &str = "/dev/net/tun";
/// What a tap must be: no prefix of its own, and a virtio header before every frame.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// What `TUNSETOFFLOAD` calls the features.
const OFFLOADS: [(u32, u32); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
    (VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, libc::TUN_F_USO6),
];

/// See the module.
#[derive(Debug)]
pub struct Tap {
    file: File,
    offloads: u64,
}

impl Tap {
    /// Opens the tap `name` of this process's network namespace, or makes one that ends with this process.
    ///
    /// # Errors
    /// It is in use, not a tap, not permitted, or the host has none.
    pub fn open(name: &str) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(Path::new(TUN_DEVICE))
            .map_err(|error| io::Error::new(error.kind(), format!("{TUN_DEVICE}: {error}")))?;
        let mut request = interface_request();
        for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes an ifreq, which `request` is.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        Self::new(file)
    }

    /// Takes over a tap that is open already.
    ///
    /// # Errors
    /// The descriptor is none of a tap with virtio headers.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let mut request = interface_request();
        // SAFETY: TUNGETIFF writes an ifreq, which `request` is.
        let result = check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) });
        result.map_err(|error| {
            io::Error::new(error.kind(), format!("the descriptor is not one of a tap: {error}"))
        })?;
        // SAFETY: TUNGETIFF stores flags, and any bits are a valid number.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & FLAGS != FLAGS {
            return Err(io::Error::other(
                "the descriptor is of an interface that is no tap, or a tap without virtio headers: open it with \
                 IFF_TAP, IFF_NO_PI and IFF_VNET_HDR",
            ));
        }
        // SAFETY: F_SETFL takes flags and touches no memory.
        check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) })?;
        // SAFETY: the same with F_SETFD.
        check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) })?;
        Self::new(file)
    }

    fn new(file: File) -> io::Result<Self> {
        let size = HEADER_BYTES as i32;
        // SAFETY: TUNSETVNETHDRSZ reads an int, which `size` is.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })?;
        let mut tap = Self { file, offloads: 0 };
        // What this host's kernel has: USO came with 6.2.
        for offloads in [CSUM | GUEST_CSUM | TSO | ECN | UFO | USO, CSUM | GUEST_CSUM | TSO | ECN | UFO] {
            if tap.use_offloads(offloads).is_ok() {
                tap.offloads = offloads;
                break;
            }
        }
        // Until the driver says what it can take.
        tap.use_offloads(0)?;
        Ok(tap)
    }
}

fn interface_request() -> libc::ifreq {
    // SAFETY: ifreq is plain data, for which zero is valid.
    unsafe { std::mem::zeroed() }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn transferred(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

impl Backend for Tap {
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn offloads(&self) -> u64 {
        self.offloads
    }

    fn use_offloads(&mut self, features: u64) -> io::Result<()> {
        let flags = OFFLOADS.iter().filter(|(feature, _)| features & 1 << feature != 0);
        let flags = flags.fold(0, |all, (_, flag)| all | flag);
        // SAFETY: TUNSETOFFLOAD takes flags and touches no memory.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    unsafe fn receive(&mut self, to: &[libc::iovec]) -> io::Result<Option<usize>> {
        // SAFETY: the caller's promise. The number of pieces is capped far below i32::MAX.
        let result = unsafe { libc::readv(self.file.as_raw_fd(), to.as_ptr(), to.len() as i32) };
        match transferred(result) {
            Ok(length) => Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    unsafe fn send(&mut self, packet: &[libc::iovec]) -> io::Result<bool> {
        // SAFETY: the caller's promise. The number of pieces is capped far below i32::MAX.
        let result = unsafe { libc::writev(self.file.as_raw_fd(), packet.as_ptr(), packet.len() as i32) };
        // A tap that is down, or a queue on the way that is full, loses packets, as networks do.
        transferred(result).map(|_| true)
    }
}
