//! The jail: what a guest that has taken over the monitor is left with.
//!
//! The monitor opens everything it needs with the rights of whoever started it, and then, before the first instruction of the
//! guest, gives them up: [`enter`] for the process, [`confine`] for each thread. Nothing of the guest has been read until then.
//! What it needs later (files of snapshots, disks that are put in) comes as descriptors over the control socket.
//!
//! | layer | file |
//! |---|---|
//! | system calls, for each kind of thread | [`mod@table`], `filter.rs`, `program.rs`, `refused.rs` |
//! | namespaces, an empty root | `namespaces.rs` |
//! | user, capabilities, limits | `rights.rs` |
//! | landlock | `landlock.rs` |

mod filter;
mod landlock;
mod namespaces;
mod program;
mod refused;
mod rights;
pub mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::config::JailConfig;
use crate::error::{Error, Result};
use crate::signals;
pub use filter::{Kind, begin, confine, confine_below, count, is_confined};
pub use rights::Limits;

/// What of the jail could not be had, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// The layer.
    pub layer: String,
    /// Why.
    pub why: String,
}

/// What the monitor itself knows of its jail. All else is to be seen in /proc.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// Which landlock is in force, which /proc does not tell; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub landlock: Option<String>,
    /// What was asked for and could not be had.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<Missing>,
}

impl Confinement {
    fn note(&mut self, layer: &str, result: io::Result<()>) -> bool {
        let failed = result.err().map(|error| Missing { layer: layer.to_owned(), why: error.to_string() });
        let done = failed.is_none();
        self.missing.extend(failed);
        done
    }
}

static ENTERED: OnceLock<Confinement> = OnceLock::new();

/// What [`enter`] came to.
pub fn confinement() -> Confinement {
    ENTERED.get().cloned().unwrap_or_default()
}

/// Gives up the process's rights, as far as `jail` says. The process must have one thread. `reach`: directories of sockets that it
/// connects to later.
///
/// # Errors
/// When something cannot be had and is required.
pub fn enter(jail: &JailConfig, reach: &[&Path], limits: &Limits) -> Result<()> {
    let mut confinement = Confinement::default();
    if jail.confine {
        confinement.note("limits", rights::limit(limits));
        if jail.parent_fd.is_some() && std::process::id() != 1 {
            confinement.note("pid namespace", Err(io::Error::other("whoever started it could make none")));
        }
        namespaces::enter(reach, &mut confinement);
        let user = rights::drop_all(jail.user);
        confinement.note("user", user.user);
        confinement.note("capabilities", user.capabilities);
        signals::die_with_parent_again(jail.parent_fd).map_err(Error::os("end with the parent process"))?;
        confinement.note("dumpable", rights::hide());
        confinement.note("no_new_privs", rights::no_new_privileges());
        match landlock::restrict() {
            Ok(version) => confinement.landlock = Some(version),
            Err(error) => {
                confinement.note("landlock", Err(error));
            }
        }
    }
    if jail.seccomp {
        confinement.note("seccomp", begin());
    }
    conclude(jail, confinement)
}

/// Says what is missing.
fn conclude(jail: &JailConfig, confinement: Confinement) -> Result<()> {
    let missing: Vec<_> =
        confinement.missing.iter().map(|missing| format!("{}: {}", missing.layer, missing.why)).collect();
    let _ = ENTERED.set(confinement);
    if missing.is_empty() {
        return Ok(());
    }
    let words = missing.join("; ");
    if jail.required {
        return Err(Error::Jail(words));
    }
    eprintln!("bulkhead-vmm: the jail lacks {words}");
    Ok(())
}
