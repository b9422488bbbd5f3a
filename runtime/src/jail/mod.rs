//! What a sandbox's monitor is given of its jail by whoever starts it: a user of its own, namespaces that only a parent can give, and
//! the rest of the jail's description. The monitor does the rest itself, when it has opened its files (`vmm::jail`).

pub mod process;
pub mod users;

use std::env;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use rustix::process::{PidfdFlags, getpid, pidfd_open};
use vmm::config::{JailConfig, User};

use crate::settings::{Isolation, Jail};
use crate::state::Files;
use crate::{Context, Error, Result};
pub use process::{Process, Spawn};
pub use users::Claim;

/// Says for one call what `isolation.jail` says for all: `on`, `off` or `required`.
pub const VARIABLE: &str = "BULKHEAD_JAIL";

/// What one monitor gets.
pub(crate) struct Cell {
    /// The user that is its own for as long as this lives.
    claim: Option<Claim>,
    /// This process, with which it ends.
    parent: OwnedFd,
    wish: Jail,
}

/// What is wished for: that of the variable, or of the settings.
///
/// # Errors
/// The variable says what makes no sense.
pub fn wish(settings: &Isolation) -> Result<Jail> {
    match env::var(VARIABLE).as_deref() {
        Err(_) | Ok("") => Ok(settings.jail),
        Ok("on") => Ok(Jail::On),
        Ok("off") => Ok(Jail::Off),
        Ok("required") => Ok(Jail::Required),
        Ok(other) => Err(Error::Usage(format!("{VARIABLE} is {other:?}: on, off or required is allowed"))),
    }
}

impl Cell {
    /// Finds what the monitor of the sandbox in `files` gets. `directory` is where claims of users are kept.
    ///
    /// # Errors
    /// All users are in use, or the directory cannot be written.
    pub fn new(settings: &Isolation, directory: &Path, files: &Files) -> Result<Self> {
        let wish = wish(settings)?;
        let own_user = wish != Jail::Off && rustix::process::geteuid().is_root();
        let claim = own_user.then(|| Claim::make(directory, settings, &files.run)).transpose()?;
        let parent = pidfd_open(getpid(), PidfdFlags::empty())
            .context(|| "cannot make a descriptor of this process".into())?;
        Ok(Self { claim, parent, wish })
    }

    /// For the monitor's configuration.
    pub fn config(&self) -> JailConfig {
        JailConfig {
            seccomp: self.wish != Jail::Off,
            confine: self.wish != Jail::Off,
            user: self.user(),
            required: self.wish == Jail::Required,
            parent_fd: Some(self.parent.as_raw_fd()),
        }
    }

    /// Which namespaces it is to be started in.
    pub fn namespaces(&self) -> process::Namespaces {
        process::Namespaces {
            pid: self.wish != Jail::Off,
            user: self.wish != Jail::Off && !rustix::process::geteuid().is_root(),
        }
    }

    /// Descriptors that it must inherit.
    pub fn fd(&self) -> i32 {
        self.parent.as_raw_fd()
    }

    /// Lets it reach what it connects to when it is somebody else already: `sockets` in the sandbox's directory.
    ///
    /// # Errors
    /// They cannot be given to it.
    pub fn open(&self, files: &Files, sockets: &[&Path]) -> Result<()> {
        let Some(User { gid, .. }) = self.user() else { return Ok(()) };
        let give = |path: &Path, mode: u32| -> std::io::Result<()> {
            chown(path, None, Some(gid))?;
            fs::set_permissions(path, fs::Permissions::from_mode(mode))
        };
        let paths = std::iter::once((files.run.as_path(), 0o710))
            .chain(sockets.iter().filter(|path| path.exists()).map(|path| (*path, 0o660)));
        for (path, mode) in paths {
            match give(path, mode) {
                // In a user namespace that has no such group: the monitor will not become one of it either, and says so.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
                given => given.context(|| format!("cannot give {} to the monitor's user", path.display()))?,
            }
        }
        Ok(())
    }

    fn user(&self) -> Option<User> {
        self.claim.as_ref().map(|claim| User { uid: claim.id(), gid: claim.id() })
    }
}
