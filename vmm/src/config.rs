//! The configuration of one microVM, as written in the JSON file given to `bulkhead-vmm --config`.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::arch::layout;
use crate::devices::virtio::fs::TAG_BYTES;
use crate::error::{Error, Result};

/// Most vCPUs a machine can have.
pub const MAX_VCPUS: u8 = 32;
/// Most disks a machine can have: what is left of the interrupt lines after the other devices.
pub const MAX_DISKS: usize = 12;
/// Most shared file systems a machine can have.
pub const MAX_FILESYSTEMS: usize = 4;
/// Most network interfaces a machine can have.
pub const MAX_NETWORKS: usize = 8;
/// Most disks, file systems and network interfaces together: interrupt lines.
const MAX_DEVICES: usize = 16;
/// Range of MTUs: what IPv4 needs, what the header of an IP packet can say.
const MTUS: std::ops::RangeInclusive<u16> = 68..=65535;
/// MTU of Ethernet.
const DEFAULT_MTU: u16 = 1500;
/// Most layers a composite disk can have: entries in its partition table.
pub const MAX_LAYERS: usize = 128;
/// Most request queues of a shared file system.
const MAX_QUEUES: u16 = 32;
const MAX_QUEUE_SIZE: u16 = 4096;
const MAX_RING_KIB: u32 = 16 * 1024;

/// Everything the monitor needs to know to run one machine. Unknown keys are errors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Processors and memory.
    #[serde(default)]
    pub machine: MachineConfig,
    /// What is booted.
    pub boot: BootConfig,
    /// Disks in the order in which the guest sees them: vda, vdb, …
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Directories of the host, each served by a process outside of the monitor.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filesystems: Vec<FilesystemConfig>,
    /// Network interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NetworkConfig>,
    /// Sockets between host and guest; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Whether the guest gets a virtio entropy device. The kernel's generator is seeded in any case.
    #[serde(default = "yes")]
    pub rng: bool,
    /// The console hvc0.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// The 8250 serial port at 0x3f8 (ttyS0). Its output always goes to the console ring; with this section it also has
    /// an output of its own and an interrupt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialConfig>,
    /// Path of the control socket to listen on; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<PathBuf>,
    /// Path of the JSON report written when the machine ends; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<PathBuf>,
}

/// Processors and memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MachineConfig {
    /// Number of virtual processors, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Descriptor of `/dev/kvm` that the monitor inherits, for one that may not open it itself: in a cgroup that
    /// allows no devices, say. Absent: it opens `/dev/kvm`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kvm_fd: Option<RawFd>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self { vcpus: 1, memory_mib: 256, kvm_fd: None }
    }
}

/// What is booted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// ELF vmlinux or bzImage.
    pub kernel: PathBuf,
    /// Archive unpacked by the kernel into its root file system; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line. The monitor appends a `virtio_mmio.device=` for each of its devices.
    #[serde(default = "default_cmdline")]
    pub cmdline: String,
}

/// The command line of a machine that was not given one: quiet, and ending rather than hanging.
pub const DEFAULT_CMDLINE: &str = "console=hvc0 panic=-1 reboot=k quiet";

fn default_cmdline() -> String {
    DEFAULT_CMDLINE.to_owned()
}

/// One disk: a raw file (`path`), or several read-only files shown as the partitions of one disk (`layers`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
}

/// A directory of the host that a vhost-user process (virtiofsd) serves, and how to reach that process: one of `socket` and
/// `fd`. Guest memory is shared with it.
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

/// One network interface: exactly one of `tap`, `fd` and `socket` says what it is connected to.
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

/// Sockets between host and guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 or above.
    #[serde(default = "default_cid")]
    pub cid: u32,
    /// Unix socket on which the host reaches the guest: connect, send `CONNECT <port>\n`, read `OK <port>\n`.
    /// What the guest connects to on port P of context 2 goes to the unix socket `<socket>_P`.
    pub socket: PathBuf,
}

fn default_cid() -> u32 {
    3
}

/// The virtio console hvc0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsoleConfig {
    /// Where the guest's output goes, besides the ring.
    pub output: Output,
    /// Where the guest's input comes from.
    pub input: Input,
    /// How much of the latest output is kept for the report and `status`, in KiB.
    pub ring_kib: u32,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self { output: Output::None, input: Input::None, ring_kib: 64 }
    }
}

/// The serial port.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SerialConfig {
    /// Where the guest's output goes, besides the ring.
    pub output: Output,
}

impl Default for SerialConfig {
    fn default() -> Self {
        Self { output: Output::Stdout }
    }
}

/// A place for output: `"none"`, `"stdout"` or a path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Output {
    /// Kept in the ring only.
    None,
    /// The monitor's standard output.
    Stdout,
    /// A file, created or appended to.
    File(PathBuf),
}

impl From<String> for Output {
    fn from(text: String) -> Self {
        match text.as_str() {
            "none" => Self::None,
            "stdout" => Self::Stdout,
            _ => Self::File(text.into()),
        }
    }
}

impl From<Output> for String {
    fn from(output: Output) -> Self {
        match output {
            Output::None => "none".to_owned(),
            Output::Stdout => "stdout".to_owned(),
            Output::File(path) => path.to_string_lossy().into_owned(),
        }
    }
}

/// A source of console input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// No input.
    None,
    /// The monitor's standard input, in raw mode if it is a terminal.
    Stdin,
}

fn yes() -> bool {
    true
}

impl Config {
    /// Reads and checks the file `path`.
    ///
    /// # Errors
    /// When it cannot be read, is not JSON of this form, or asks for something impossible.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|source| Error::Input {
            what: "configuration",
            path: path.to_owned(),
            source,
        })?;
        let config: Self = serde_json::from_str(&text)
            .map_err(|source| Error::ConfigSyntax { path: path.to_owned(), source })?;
        config.check()?;
        Ok(config)
    }

    /// Checks what can be checked without touching a file or KVM.
    ///
    /// # Errors
    /// The first thing found to be impossible, in words that name the key.
    pub fn check(&self) -> Result<()> {
        let complain = |message: String| Err(Error::Config(message));
        let MachineConfig { vcpus, memory_mib, kvm_fd } = self.machine;
        if kvm_fd.is_some_and(|fd| fd < 3) {
            return Err(Error::Config("machine: \"kvm_fd\" must be 3 or above".to_owned()));
        }
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return complain(format!("machine.vcpus is {vcpus}, but must be 1 to {MAX_VCPUS}"));
        }
        if memory_mib == 0 || u64::from(memory_mib) > layout::MAX_MEMORY_MIB {
            return complain(format!(
                "machine.memory_mib is {memory_mib}, but must be 1 to {}",
                layout::MAX_MEMORY_MIB
            ));
        }
        if self.boot.cmdline.bytes().any(|byte| byte == 0 || byte == b'\n') {
            return complain("boot.cmdline must be one line of text".to_owned());
        }
        if self.console.ring_kib > MAX_RING_KIB {
            return complain(format!(
                "console.ring_kib is {}, but must be at most {MAX_RING_KIB}",
                self.console.ring_kib
            ));
        }
        if self.disks.len() > MAX_DISKS {
            return complain(format!(
                "{} disks are asked for, but at most {MAX_DISKS} fit",
                self.disks.len()
            ));
        }
        for disk in &self.disks {
            disk.check()?;
        }
        if self.filesystems.len() > MAX_FILESYSTEMS {
            return complain(format!(
                "{} filesystems are asked for, but at most {MAX_FILESYSTEMS} fit",
                self.filesystems.len()
            ));
        }
        for (index, filesystem) in self.filesystems.iter().enumerate() {
            filesystem.check()?;
            let before = self.filesystems.iter().take(index);
            if before.clone().any(|other| other.tag == filesystem.tag) {
                return complain(format!("two filesystems have the tag {:?}", filesystem.tag));
            }
            if filesystem.fd.is_some() && before.clone().any(|other| other.fd == filesystem.fd) {
                return complain("two filesystems have the same \"fd\"".to_owned());
            }
        }
        if self.networks.len() > MAX_NETWORKS {
            return complain(format!(
                "{} networks are asked for, but at most {MAX_NETWORKS} fit",
                self.networks.len()
            ));
        }
        if self.disks.len() + self.filesystems.len() + self.networks.len() > MAX_DEVICES {
            return complain(format!(
                "{} disks, {} filesystems and {} networks are asked for, but at most {MAX_DEVICES} of them fit",
                self.disks.len(),
                self.filesystems.len(),
                self.networks.len()
            ));
        }
        for (network, number) in self.networks.iter().zip(0..) {
            network.check().map_err(|why| Error::Config(format!("networks[{number}]: {why}")))?;
            if let Some(fd) = network.fd
                && self.networks.iter().filter(|other| other.fd == Some(fd)).count() > 1
            {
                return complain(format!("networks[{number}]: two networks have \"fd\": {fd}"));
            }
        }
        if let Some(vsock) = &self.vsock
            && (vsock.cid < 3 || vsock.cid == u32::MAX)
        {
            return complain(format!("vsock.cid is {}, but 0, 1, 2 and 2^32-1 are reserved", vsock.cid));
        }
        Ok(())
    }
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

    fn check(&self) -> Result<(), String> {
        let ways = usize::from(self.tap.is_some())
            + usize::from(self.fd.is_some())
            + usize::from(self.socket.is_some());
        if ways != 1 {
            return Err("it needs exactly one of \"tap\", \"fd\" and \"socket\"".to_owned());
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
    fn check(&self) -> Result<()> {
        let id = &self.id;
        match (&self.path, self.layers.len()) {
            (Some(_), 0) => Ok(()),
            (None, 1..=MAX_LAYERS) if self.read_only => Ok(()),
            (None, 1..=MAX_LAYERS) => {
                Err(Error::Config(format!("disk {id:?}: a disk of layers needs \"read_only\": true")))
            }
            (None, 0) => Err(Error::Config(format!("disk {id:?} needs \"path\" or \"layers\""))),
            (None, n) => {
                Err(Error::Config(format!("disk {id:?} has {n} layers, but at most {MAX_LAYERS} fit")))
            }
            (Some(_), _) => Err(Error::Config(format!("disk {id:?} has both \"path\" and \"layers\""))),
        }
    }
}

impl FilesystemConfig {
    fn check(&self) -> Result<()> {
        let Self { tag, socket, fd, queues, queue_size } = self;
        let complain = |message: String| Err(Error::Config(format!("filesystem {tag:?}: {message}")));
        if tag.is_empty() || tag.len() > TAG_BYTES || tag.contains('\0') {
            return complain(format!("the tag must have 1 to {TAG_BYTES} bytes, none of them 0"));
        }
        if socket.is_some() == fd.is_some() {
            return complain("give \"socket\" or \"fd\"".to_owned());
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config> {
        let config: Config = serde_json::from_str(text)
            .map_err(|source| Error::ConfigSyntax { path: "test".into(), source })?;
        config.check().map(|()| config)
    }

    #[test]
    fn the_smallest_configuration_is_a_kernel() {
        let config = parse(r#"{"boot":{"kernel":"k"}}"#).unwrap();
        assert_eq!(config.machine, MachineConfig { vcpus: 1, memory_mib: 256, kvm_fd: None });
        assert_eq!(config.boot.cmdline, DEFAULT_CMDLINE);
        assert!(config.rng && config.vsock.is_none() && config.disks.is_empty());
    }

    #[test]
    fn unknown_keys_are_named() {
        for text in [
            r#"{"boot":{"kernel":"k"},"memroy":1}"#,
            r#"{"boot":{"kernel":"k"},"machine":{"memroy":1}}"#,
            r#"{"boot":{"kernel":"k"},"disks":[{"id":"a","path":"p","memroy":1}]}"#,
        ] {
            let Err(Error::ConfigSyntax { source, .. }) = parse(text) else { panic!("accepted {text}") };
            assert!(source.to_string().contains("memroy"), "{source}");
        }
    }

    #[test]
    fn impossible_wishes_are_refused() {
        for (text, word) in [
            (r#"{"boot":{"kernel":"k"},"machine":{"vcpus":0}}"#, "vcpus"),
            (r#"{"boot":{"kernel":"k"},"machine":{"vcpus":33}}"#, "vcpus"),
            (r#"{"boot":{"kernel":"k"},"machine":{"memory_mib":0}}"#, "memory_mib"),
            (r#"{"boot":{"kernel":"k"},"disks":[{"id":"a"}]}"#, "path"),
            (r#"{"boot":{"kernel":"k"},"disks":[{"id":"a","path":"p","layers":["l"]}]}"#, "both"),
            (r#"{"boot":{"kernel":"k"},"disks":[{"id":"a","layers":["l"]}]}"#, "read_only"),
            (r#"{"boot":{"kernel":"k"},"vsock":{"cid":2,"socket":"s"}}"#, "cid"),
            (r#"{"boot":{"kernel":"k","cmdline":"a\nb"}}"#, "cmdline"),
            (r#"{"boot":{"kernel":"k"},"filesystems":[{"tag":"t"}]}"#, "socket"),
            (r#"{"boot":{"kernel":"k"},"filesystems":[{"tag":"t","fd":5,"socket":"s"}]}"#, "socket"),
            (r#"{"boot":{"kernel":"k"},"filesystems":[{"tag":"","fd":5}]}"#, "tag"),
            (r#"{"boot":{"kernel":"k"},"filesystems":[{"tag":"t","fd":2}]}"#, "fd"),
            (r#"{"boot":{"kernel":"k"},"filesystems":[{"tag":"t","fd":5,"queue_size":100}]}"#, "queue_size"),
            (r#"{"boot":{"kernel":"k"},"filesystems":[{"tag":"t","fd":5,"queues":0}]}"#, "queues"),
            (r#"{"boot":{"kernel":"k"},"filesystems":[{"tag":"t","fd":5},{"tag":"t","fd":6}]}"#, "tag"),
            (r#"{"boot":{"kernel":"k"},"filesystems":[{"tag":"t","fd":5},{"tag":"u","fd":5}]}"#, "fd"),
            (r#"{"boot":{"kernel":"k"},"networks":[{}]}"#, "exactly one"),
            (r#"{"boot":{"kernel":"k"},"networks":[{"tap":"t","fd":4}]}"#, "exactly one"),
            (r#"{"boot":{"kernel":"k"},"networks":[{"fd":1}]}"#, "standard"),
            (r#"{"boot":{"kernel":"k"},"networks":[{"fd":4},{"fd":4}]}"#, "two networks"),
            (r#"{"boot":{"kernel":"k"},"networks":[{"tap":"a name that is too long"}]}"#, "15"),
            (r#"{"boot":{"kernel":"k"},"networks":[{"tap":"t","mtu":67}]}"#, "mtu"),
            (r#"{"boot":{"kernel":"k"},"networks":[{"tap":"t","mac":"x"}]}"#, "mac"),
            (
                r#"{"boot":{"kernel":"k"},"networks":[{"tap":"t","mac":"01:00:00:00:00:01"}]}"#,
                "one interface",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.to_string().contains(word), "{text}: {error}");
            assert_eq!(error.exit_status(), 64);
        }
    }

    #[test]
    fn what_is_written_reads_the_same() {
        let text = r#"{"boot":{"kernel":"k","initramfs":"i","cmdline":"c"},
            "disks":[{"id":"a","read_only":true,"layers":["l1","l2"]},{"id":"b","path":"p"}],
            "filesystems":[{"tag":"t","socket":"s"},{"tag":"u","fd":7,"queues":2,"queue_size":64}],
            "networks":[{"tap":"t","mac":"02:00:00:00:00:01","mtu":9000},{"fd":7},{"socket":"s"}],
            "vsock":{"cid":3,"socket":"s"},"console":{"output":"/tmp/o","input":"stdin","ring_kib":1},
            "serial":{"output":"stdout"},"control":"c","report":"r"}"#;
        let config = parse(text).unwrap();
        assert_eq!(config, parse(&serde_json::to_string(&config).unwrap()).unwrap());
    }
}
