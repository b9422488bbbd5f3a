//! What can go wrong before the guest runs, in words for people, and the exit status that says so to programs.

use std::io;
use std::path::PathBuf;

/// Result with the monitor's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Bad usage or configuration (EX_USAGE).
pub const STATUS_USAGE: u8 = 64;
/// A file that was asked for is missing or not what it should be (EX_NOINPUT).
pub const STATUS_NO_INPUT: u8 = 66;
/// KVM cannot be used here (EX_UNAVAILABLE).
pub const STATUS_KVM_UNUSABLE: u8 = 69;
/// The guest crashed, or the monitor did (EX_SOFTWARE).
pub const STATUS_CRASH: u8 = 70;
/// The operating system refused something (EX_OSERR).
pub const STATUS_OS: u8 = 71;
/// What serves one of the guest's devices is gone (EX_IOERR).
pub const STATUS_IO: u8 = 74;

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration file is not JSON of the right form.
    #[error("the configuration {path:?} is not understood")]
    ConfigSyntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The configuration asks for something impossible.
    #[error("bad configuration: {0}")]
    Config(String),
    /// A file named by the configuration cannot be used.
    #[error("cannot use the {what} {path:?}")]
    Input {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel file was read, but it is no kernel.
    #[error("the kernel {path:?} cannot be booted: {reason}")]
    BadKernel {
        /// The file.
        path: PathBuf,
        /// Why, and what would be right.
        reason: String,
    },
    /// Kernel and initramfs do not fit.
    #[error(
        "{memory_mib} MiB of memory are too few for this kernel and initramfs: they need at least \
         {needed_mib} MiB, set machine.memory_mib (--memory) to that or more"
    )]
    MemoryTooSmall {
        /// What was asked for.
        memory_mib: u64,
        /// What would do.
        needed_mib: u64,
    },
    /// The command line with the monitor's additions is longer than the kernel takes.
    #[error(
        "the kernel command line is {length} bytes long with what the monitor appends, but {limit} is the limit"
    )]
    CmdlineTooLong {
        /// Its length.
        length: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {reason}")]
    KvmOpen {
        /// What it means and what to do.
        reason: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// KVM lacks something the monitor cannot do without.
    #[error("this KVM lacks {0}; a host kernel of version 5.10 or later has it")]
    KvmLacks(&'static str),
    /// KVM refused a request.
    #[error("KVM refused to {what}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// KVM does not take a register's value.
    #[error(
        "KVM does not take over the model-specific register {index:#x}: the snapshot is of another processor or another \
         version of KVM"
    )]
    Msr {
        /// Its number.
        index: u32,
    },
    /// A snapshot cannot be used.
    #[error("the snapshot {directory:?} cannot be used: {why}")]
    Snapshot {
        /// Its directory.
        directory: PathBuf,
        /// Why, and what would do.
        why: String,
    },
    /// A machine cannot be saved.
    #[error("the machine cannot be saved: {0}")]
    Unsaveable(String),
    /// A disk cannot be put into a drive, or taken out.
    #[error("{0}")]
    Drive(String),
    /// A part of the jail cannot be had, and is required.
    #[error(
        "the jail cannot be entered ({0}), and the configuration says that it must be; `bulkhead doctor` says what this host lacks"
    )]
    Jail(String),
    /// The operating system refused a request.
    #[error("cannot {what}")]
    Os {
        /// What was asked of it.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A socket that the monitor should listen on.
    #[error("cannot listen on {path:?}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A process that should serve a device's queues.
    #[error("cannot reach what serves the file system {tag:?}")]
    Backend {
        /// The file system's tag.
        tag: String,
        /// Why.
        source: io::Error,
    },
    /// What a network interface should be connected to cannot be used.
    #[error("cannot use the network {what}")]
    Network {
        /// Which, in words.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// Guest memory refused an access that the monitor's own layout should have made possible.
    #[error("cannot write the {what} into guest memory")]
    GuestMemory {
        /// What was written.
        what: &'static str,
        /// Why.
        source: vm_memory::GuestMemoryError,
    },
}

impl Error {
    /// The exit status of a monitor that ends with this error.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::ConfigSyntax { .. }
            | Self::Config(_)
            | Self::Drive(_)
            | Self::MemoryTooSmall { .. }
            | Self::CmdlineTooLong { .. } => STATUS_USAGE,
            Self::Input { .. } | Self::BadKernel { .. } | Self::Backend { .. } | Self::Snapshot { .. } => {
                STATUS_NO_INPUT
            }
            Self::KvmOpen { .. } | Self::KvmLacks(_) | Self::Kvm { .. } | Self::Msr { .. } => {
                STATUS_KVM_UNUSABLE
            }
            Self::Os { .. }
            | Self::Listen { .. }
            | Self::Network { .. }
            | Self::GuestMemory { .. }
            | Self::Jail(_)
            | Self::Unsaveable(_) => STATUS_OS,
        }
    }

    /// The error and its causes on one line.
    pub fn chain(&self) -> String {
        let causes = std::iter::successors(std::error::Error::source(self), |cause| cause.source());
        causes.fold(self.to_string(), |text, cause| format!("{text}: {cause}"))
    }

    /// For `map_err`: KVM refused to do `what`.
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    /// For `map_err`: the operating system refused to do `what`.
    pub(crate) fn os<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Os { what, source: source.into() }
    }

    /// For `map_err`: `what` could not be written into guest memory.
    pub(crate) fn guest_memory(what: &'static str) -> impl FnOnce(vm_memory::GuestMemoryError) -> Self {
        move |source| Self::GuestMemory { what, source }
    }
}
