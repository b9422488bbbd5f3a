//! What a machine's devices are connected to.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{DEFAULT_MTU, MAX_LAYERS, MAX_QUEUE_SIZE, MAX_QUEUES, MTUS};
use crate::devices::virtio::fs::TAG_BYTES;
use crate::error::{Error, Result};

/// One disk: a raw file (`path`), several read-only files shown as the partitions of one disk (`layers`), or a drive with
/// nothing in it (`empty`).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name for people, and the serial number the guest sees (its first 20 bytes).
    pub id: String,
    /// Whether the guest's writes are refused. Always true for `layers`.
    #[serde(default)]
    pub read_only: bool,
    /// Raw image file or block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Files shown as partitions 1, 2, … of a disk with a GPT made by the monitor.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<PathBuf>,
    /// Nothing is in it: it has no sectors until something is put in, by a machine that goes on from this one's snapshot
    /// or, if it is `removable`, while the machine runs.
    #[serde(default, skip_serializing_if = "is_false")]
    pub empty: bool,
    /// The drive's disk can be put in and taken out while the machine runs (control socket: `insert-disk`,
    /// `eject-disk`). The guest finds a drive that can be written, also while its disk is `read_only`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub removable: bool,
    /// How much the guest may have it do; absent: as much as it likes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<LimitConfig>,
}

/// How much may be done in a second; what is not used is kept for a tenth of one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitConfig {
    /// Bytes read and written together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<NonZeroU64>,
    /// Requests of any kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<NonZeroU64>,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A directory of the host that a vhost-user process (virtiofsd) serves, and how to reach that process: one of `socket`,
/// `fd` and `empty`. It sees what the guest asks of it and nothing else of the guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesystemConfig {
    /// Name by which the guest mounts it, 1 to 36 bytes.
    pub tag: String,
    /// Unix socket on which the process listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Descriptor that the monitor inherits: a unix socket connected to the process. The process then sees the monitor's
    /// end whatever happens, and no socket is left lying about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<RawFd>,
    /// Nobody serves it, until a machine that goes on from this one's snapshot has somebody. The guest must not mount it
    /// before.
    #[serde(default, skip_serializing_if = "is_false")]
    pub empty: bool,
    /// Request queues; virtiofsd has 1.
    #[serde(default = "one")]
    pub queues: u16,
    /// Entries of each queue, a power of two. A request of 1 MiB takes 260.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
}

fn one() -> u16 {
    1
}

fn default_queue_size() -> u16 {
    512
}

/// One network interface: exactly one of `tap`, `fd`, `socket` and `empty` says what it is connected to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// Name of a tap in the monitor's network namespace; one that does not exist is made and ends with the monitor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Number of an open descriptor that the monitor inherits: of a tap with `IFF_VNET_HDR`, or of a connected unix
    /// stream socket as `socket`'s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
    /// Unix socket that carries frames after their length in four bytes, most significant first: passt's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Nothing, until a machine that goes on from this one's snapshot has something of this kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty: Option<EmptyNetwork>,
    /// The guest's address, like `02:00:00:00:00:01`; absent: the guest makes one up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Largest packet without Ethernet header, 68 to 65535.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
}

fn default_mtu() -> u16 {
    DEFAULT_MTU
}

/// What an interface that is connected to nothing may be connected to later: the guest's driver is told at its start what
/// that can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmptyNetwork {
    /// A tap, with checksum and segmentation offloads.
    Tap,
    /// A unix stream socket, with none.
    Stream,
}

impl NetworkConfig {
    /// The guest's address, once it has been checked.
    ///
    /// # Errors
    /// It is none, or one of a group.
    pub fn mac(&self) -> Result<Option<[u8; 6]>, String> {
        let Some(text) = &self.mac else { return Ok(None) };
        let bad = || format!("\"mac\" is {text:?}, but must be six bytes like 02:00:00:00:00:01");
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let digits = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            let part = parts.next().filter(digits).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(format!("\"mac\" is {text}, which cannot be the address of one interface"));
        }
        Ok(Some(mac))
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let ways = usize::from(self.tap.is_some())
            + usize::from(self.fd.is_some())
            + usize::from(self.socket.is_some())
            + usize::from(self.empty.is_some());
        if ways != 1 {
            return Err("it needs exactly one of \"tap\", \"fd\", \"socket\" and \"empty\"".to_owned());
        }
        if let Some(name) = &self.tap
            && (name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '%', '\0']))
        {
            return Err(format!("\"tap\" is {name:?}, but must be an interface's name of 1 to 15 bytes"));
        }
        if self.fd.is_some_and(|fd| fd < 3) {
            return Err("\"fd\" must be 3 or more: the others are the standard streams".to_owned());
        }
        if !MTUS.contains(&self.mtu) {
            return Err(format!("\"mtu\" is {}, but must be {} to {}", self.mtu, MTUS.start(), MTUS.end()));
        }
        self.mac().map(drop)
    }
}

impl DiskConfig {
    /// Checks what can be checked without touching a file.
    pub(crate) fn check(&self) -> Result<()> {
        let id = &self.id;
        if self.empty && (self.path.is_some() || !self.layers.is_empty()) {
            return Err(Error::Config(format!("disk {id:?} is \"empty\", yet has something in it")));
        }
        match (&self.path, self.layers.len()) {
            (Some(_), 0) => Ok(()),
            (None, 1..=MAX_LAYERS) if self.read_only => Ok(()),
            (None, 1..=MAX_LAYERS) => {
                Err(Error::Config(format!("disk {id:?}: a disk of layers needs \"read_only\": true")))
            }
            (None, 0) if self.empty => Ok(()),
            (None, 0) => {
                Err(Error::Config(format!("disk {id:?} needs \"path\", \"layers\" or \"empty\": true")))
            }
            (None, n) => {
                Err(Error::Config(format!("disk {id:?} has {n} layers, but at most {MAX_LAYERS} fit")))
            }
            (Some(_), _) => Err(Error::Config(format!("disk {id:?} has both \"path\" and \"layers\""))),
        }
    }
}

impl FilesystemConfig {
    pub(super) fn check(&self) -> Result<()> {
        let Self { tag, socket, fd, empty, queues, queue_size } = self;
        let complain = |message: String| Err(Error::Config(format!("filesystem {tag:?}: {message}")));
        if tag.is_empty() || tag.len() > TAG_BYTES || tag.contains('\0') {
            return complain(format!("the tag must have 1 to {TAG_BYTES} bytes, none of them 0"));
        }
        if usize::from(socket.is_some()) + usize::from(fd.is_some()) + usize::from(*empty) != 1 {
            return complain("give exactly one of \"socket\", \"fd\" and \"empty\"".to_owned());
        }
        if fd.is_some_and(|fd| fd < 3) {
            return complain("fd must be 3 or above".to_owned());
        }
        if !(1..=MAX_QUEUES).contains(queues) {
            return complain(format!("queues is {queues}, but must be 1 to {MAX_QUEUES}"));
        }
        if !queue_size.is_power_of_two() || *queue_size < 16 || *queue_size > MAX_QUEUE_SIZE {
            return complain(format!(
                "queue_size is {queue_size}, but must be a power of two from 16 to {MAX_QUEUE_SIZE}"
            ));
        }
        Ok(())
    }

    /// The connection to the process. To be called once: an inherited descriptor is taken over.
    ///
    /// # Errors
    /// Nobody listens, or the descriptor is no connected unix socket.
    pub(crate) fn connect(&self) -> io::Result<UnixStream> {
        if let Some(path) = &self.socket {
            return UnixStream::connect(path)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())));
        }
        let fd = self.fd.unwrap_or(-1);
        let what = |error: io::Error| io::Error::new(error.kind(), format!("descriptor {fd}: {error}"));
        // SAFETY: F_SETFD takes no pointers, and fails when there is no such descriptor.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(what(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor is open. Whoever started the monitor says that it is meant for this, `check` that it is
        // named once, and the monitor has no other use for a number that it did not open itself.
        let stream = unsafe { UnixStream::from_raw_fd(fd) };
        match stream.peer_addr() {
            Ok(_) => Ok(stream),
            Err(error) => {
                // It is something else after all, and not ours to close.
                std::mem::forget(stream);
                Err(what(error))
            }
        }
    }
}
