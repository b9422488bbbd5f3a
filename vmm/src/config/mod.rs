//! The configuration of one microVM, as written in the JSON file given to `bulkhead-vmm --config`.

mod devices;
mod jail;

use std::fs;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use devices::{DiskConfig, EmptyNetwork, FilesystemConfig, LimitConfig, NetworkConfig};
pub use jail::{JailConfig, User};

use crate::arch::layout;
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
pub const MAX_DEVICES: usize = 16;
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
    /// What is booted; this or `restore`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootConfig>,
    /// Directory of a snapshot with which the machine goes on instead of booting. Processors, memory size and devices must
    /// be those of the snapshot; what the devices are connected to need not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<PathBuf>,
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
    /// Path of a unix socket that is connected to, and closed, as soon as the machine runs and its sockets are listened on;
    /// absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<PathBuf>,
    /// Path of the JSON report written when the machine ends; absent: none. Until then it is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<PathBuf>,
    /// What the monitor gives up before the guest runs.
    #[serde(default)]
    pub jail: JailConfig,
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

impl MachineConfig {
    /// Guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self { vcpus: 1, memory_mib: 256, kvm_fd: None }
    }
}

/// What is booted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
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

    /// The configuration of the machine that the snapshot in `directory` was taken of, to go on from it.
    ///
    /// # Errors
    /// When the snapshot cannot be used.
    pub fn of_snapshot(directory: &Path) -> Result<Self> {
        let opened = crate::snapshot::Opened::open(directory)?;
        let mut config: Self =
            serde_json::from_str(&opened.snapshot.config).map_err(|error| Error::Snapshot {
                directory: directory.to_owned(),
                why: format!("its configuration is not understood: {error}"),
            })?;
        // What was handed down to that monitor was not to this one.
        config.machine.kvm_fd = None;
        config.jail = JailConfig::default();
        (config.boot, config.restore, config.ready) = (None, Some(directory.to_owned()), None);
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
        self.jail.check().map_err(Error::Config)?;
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return complain(format!("machine.vcpus is {vcpus}, but must be 1 to {MAX_VCPUS}"));
        }
        if memory_mib == 0 || u64::from(memory_mib) > layout::MAX_MEMORY_MIB {
            return complain(format!(
                "machine.memory_mib is {memory_mib}, but must be 1 to {}",
                layout::MAX_MEMORY_MIB
            ));
        }
        match (&self.boot, &self.restore) {
            (None, None) => return complain("give \"boot\" or \"restore\"".to_owned()),
            (Some(_), Some(_)) => return complain("give \"boot\" or \"restore\", not both".to_owned()),
            (Some(boot), None) if boot.cmdline.bytes().any(|byte| byte == 0 || byte == b'\n') => {
                return complain("boot.cmdline must be one line of text".to_owned());
            }
            _ => {}
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
        assert_eq!(config.boot.as_ref().unwrap().cmdline, DEFAULT_CMDLINE);
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
            (r#"{"boot":{"kernel":"k"},"jail":{"user":{"uid":1,"gid":1}}}"#, "confine"),
            (
                r#"{"boot":{"kernel":"k"},"jail":{"confine":true,"user":{"uid":4294967295,"gid":1}}}"#,
                "no user",
            ),
            (r#"{"boot":{"kernel":"k"},"jail":{"parent_fd":1}}"#, "parent_fd"),
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
            (r#"{"boot":{"kernel":"k"},"restore":"s"}"#, "not both"),
            (r#"{}"#, "restore"),
            (r#"{"restore":"s","disks":[{"id":"a","path":"p","empty":true}]}"#, "empty"),
            (r#"{"restore":"s","filesystems":[{"tag":"t","fd":5,"empty":true}]}"#, "exactly one"),
            (r#"{"restore":"s","networks":[{"fd":5,"empty":"tap"}]}"#, "exactly one"),
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
            "serial":{"output":"stdout"},"control":"c","ready":"a","report":"r"}"#;
        let empty = r#"{"restore":"s","disks":[{"id":"a","read_only":true,"empty":true}],
            "filesystems":[{"tag":"t","empty":true}],"networks":[{"empty":"tap"},{"empty":"stream"}]}"#;
        for text in [text, empty] {
            let config = parse(text).unwrap();
            assert_eq!(config, parse(&serde_json::to_string(&config).unwrap()).unwrap());
        }
    }
}
