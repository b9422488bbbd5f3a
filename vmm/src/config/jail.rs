//! What the monitor leaves itself to do its work with.

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

/// The monitor's jail. It enters it when all files are open and before the guest runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JailConfig {
    /// Each thread may make the system calls that it needs, and no others.
    pub seccomp: bool,
    /// Namespaces of its own, a root directory with nothing in it but the directories of its sockets, no capabilities, limits, landlock.
    pub confine: bool,
    /// User and group to become; absent: who it is. Needs `confine`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<User>,
    /// What cannot be had of it is an error instead of a warning.
    pub required: bool,
    /// Descriptor, inherited, of the process with which the monitor is to end (a pidfd), for `--die-with-parent` in a pid
    /// namespace, where the parent cannot be told otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_fd: Option<RawFd>,
}

/// See [`JailConfig::user`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Default for JailConfig {
    fn default() -> Self {
        Self { seccomp: true, confine: false, user: None, required: false, parent_fd: None }
    }
}

impl JailConfig {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.user.is_some() && !self.confine {
            return Err("jail: \"user\" needs \"confine\": true".to_owned());
        }
        if self.user.is_some_and(|user| user.uid == u32::MAX || user.gid == u32::MAX) {
            return Err("jail: 4294967295 is no user and no group".to_owned());
        }
        if self.parent_fd.is_some_and(|fd| fd < 3) {
            return Err("jail: \"parent_fd\" must be 3 or above".to_owned());
        }
        Ok(())
    }
}
