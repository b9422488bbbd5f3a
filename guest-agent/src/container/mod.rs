//! Containers: from a request to a held process, and away again.

pub mod capabilities;
pub mod cgroup;
mod channel;
pub mod child;
mod copy_up;
mod devices;
mod disks;
mod identity;
mod lifecycle;
pub mod mounts;
pub mod namespaces;
mod pause;
mod prepared;
pub mod process;
pub mod rootfs;
pub mod seccomp;
mod shared;
pub mod spec;
pub mod terminal;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::rpc::Ticket;
use cgroup::Cgroup;
use namespaces::Namespaces;
pub use prepared::Prepared;
use rootfs::Rootfs;
use seccomp::Filter;

/// One container.
#[derive(Debug)]
pub struct Container {
    /// What the host calls it.
    pub id: String,
    /// The init's entry in [`crate::agent::Agent::processes`].
    pub init: u32,
    /// The same for execs, by their id.
    pub execs: BTreeMap<String, u32>,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its root.
    pub rootfs: Rootfs,
    /// What it has of the host's files.
    shares: Vec<PathBuf>,
    /// Its namespaces, for execs to join.
    pub namespaces: Namespaces,
    seccomp: Option<Filter>,
    oom_score_adj: Option<i32>,
    oom_kills_seen: u64,
    /// It is to go; the delete calls that wait for its last process to end.
    deleting: Option<Vec<Ticket>>,
    /// Watched while it is to be deleted: its cgroup's account of whether any process is alive.
    emptied: Option<File>,
    /// The create call to be told why there is no container.
    never_created: Option<(Ticket, Error)>,
}

impl Container {
    /// Whether the kernel has killed for want of memory since this was asked last.
    pub fn has_new_oom_kill(&mut self) -> bool {
        let kills = self.cgroup.oom_kills();
        std::mem::replace(&mut self.oom_kills_seen, kills) < kills
    }

    /// Without a pid namespace of its own nothing else ends the rest of the container.
    pub fn init_ended(&self) {
        if !self.namespaces.has_pid() {
            let _ = self.cgroup.kill();
        }
    }
}

/// An id is a file name and nothing that means more than that.
///
/// # Errors
/// `INVALID_ARGUMENT`.
pub fn check_id(what: &str, id: &str) -> Result<()> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-+".contains(&byte);
    if id.is_empty()
        || id.len() > 128
        || id.starts_with('.')
        || id.starts_with("cgroup.")
        || !id.bytes().all(good)
    {
        return Err(Error::invalid(format!(
            "{what} {id:?}: 1 to 128 of letters, digits, _ . - +, not starting with a dot"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_cannot_lead_anywhere() {
        check_id("id", "a-B_1.x+y").unwrap();
        for id in ["", ".", "..", "../x", "a/b", "a b", "a\0", "cgroup.procs", "é", &"x".repeat(129)] {
            assert!(check_id("id", id).is_err(), "{id:?}");
        }
    }
}
