//! Directories and files of the host that a sandbox is to see, by virtio-fs: one virtiofsd for each sandbox serves all of
//! them.
//!
//! Each is taken as a detached copy of its mount when it is added (read-only where it is to be so: the host's kernel
//! enforces that, whatever the guest does). virtiofsd then runs in a mount namespace of its own, in which a small tmpfs
//! has one mount point for each:
//!
//! ```text
//! host                            virtiofsd's namespace         guest's agent
//! /var/lib/engine/c1/rootfs  →    <sandbox>/shares/0       →    /run/shares/host/0
//! /home/me/src (ro)          →    <sandbox>/shares/1 (ro)  →    /run/shares/host/1
//! /home/me/resolv.conf       →    <sandbox>/shares/2       →    /run/shares/host/2
//! ```
//!
//! Nothing of this is in the host's own mount table, and all of it goes with the process, however that ends. virtiofsd
//! itself ends when its connection to the monitor does.
//!
//! Containers that come into a sandbox later have theirs put into the namespace of the virtiofsd that runs ([`More`]).

mod more;
mod mount;
mod virtiofsd;

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use vmm::config::FilesystemConfig;

pub use more::{Living, More};
pub use virtiofsd::{Lifetime, Server, find};

use crate::settings::Jail;
use crate::{Context, Error, Result, Settings, jail, policy};

/// Tag of the virtio-fs device; the agent is told to mount it.
pub const TAG: &str = "host";
/// Most directories and files of one sandbox: an inode each in the staging file system.
pub const MAX_SHARES: usize = 1000;

/// What the guest may do with something shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Look, also below nested mounts. The host's kernel refuses the rest.
    ReadOnly,
    /// Everything that its user could do on the host.
    ReadWrite,
}

/// What is to be shared with one sandbox.
#[derive(Debug)]
pub struct Shares {
    program: PathBuf,
    jailed: bool,
    directory: PathBuf,
    staging: OwnedFd,
    shared: Vec<Shared>,
}

/// One detached tree, and where it goes.
#[derive(Debug)]
struct Shared {
    tree: OwnedFd,
    name: CString,
}

impl Shares {
    /// Nothing yet. `sandbox` is a directory of the sandbox's own, on the host; `shares` in it becomes a mount point of
    /// virtiofsd's. The settings may name the program, and say whether it has namespaces of its own.
    ///
    /// # Errors
    /// virtiofsd is not installed, or the caller is not root.
    pub fn new(sandbox: &Path, settings: &Settings) -> Result<Self> {
        let program = find(&settings.programs.virtiofsd)?;
        let jailed = jail::wish(&settings.isolation)? != Jail::Off;
        if !rustix::process::geteuid().is_root() {
            return Err(Error::Usage(
                "sharing directories of the host needs root so far: run bulkhead as root".into(),
            ));
        }
        let directory = directory(sandbox);
        fs::create_dir_all(&directory).context(|| format!("cannot create {}", directory.display()))?;
        let staging = mount::staging(MAX_SHARES).context(|| "cannot make a staging file system".into())?;
        Ok(Self { program, jailed, directory, staging, shared: Vec::new() })
    }

    /// Shares the directory or file at `path`, links followed, with everything mounted below it now. Answers the path by
    /// which the guest's agent knows it: the source of a bind mount, or a root file system.
    ///
    /// # Errors
    /// It does not exist, or there are too many.
    pub fn add(&mut self, path: &Path, access: Access) -> Result<String> {
        if self.shared.len() >= MAX_SHARES {
            return Err(Error::Usage(format!("more than {MAX_SHARES} directories and files to be shared")));
        }
        let what = || format!("cannot share {}", path.display());
        let name = self.shared.len().to_string();
        let (found, place) = mount::find(path).context(what)?;
        policy::in_force()?.host_path(&place, access)?;
        let tree = mount::take(&found, access == Access::ReadOnly).context(what)?;
        mount::point(&self.staging, &name, &tree).context(what)?;
        let guest = in_guest(&name);
        let name = CString::new(name).map_err(std::io::Error::other).context(what)?;
        self.shared.push(Shared { tree, name });
        Ok(guest)
    }

    /// Whether nothing was added.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shared.is_empty()
    }

    /// Starts virtiofsd. It is up some milliseconds later; nobody has to wait for that.
    ///
    /// # Errors
    /// It cannot be started. What it has to say goes to `log`.
    pub fn start(&self, lifetime: Lifetime, log: &File) -> Result<Server> {
        Server::start(self, lifetime, log)
    }
}

/// virtiofsd's mount point, which is empty on the host.
fn directory(sandbox: &Path) -> PathBuf {
    sandbox.join("shares")
}

/// The agent's path of a share.
fn in_guest(name: &str) -> String {
    format!("{}/{TAG}/{name}", bulkhead_protocol::SHARES)
}

/// The device for a server's connection, which the monitor must inherit as descriptor `fd`.
pub(crate) fn device(fd: i32) -> FilesystemConfig {
    FilesystemConfig {
        tag: TAG.into(),
        socket: None,
        fd: Some(fd),
        empty: false,
        queues: 1,
        queue_size: QUEUE_SIZE,
    }
}

/// Largest requests have 256 pages and some headers, each page an entry.
const QUEUE_SIZE: u16 = 512;
