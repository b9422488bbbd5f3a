//! Snapshots of containers: the machine as its monitor saves it, and what the container is, in one directory.
//!
//! | name | what |
//! |---|---|
//! | `container.json` | [`Saved`] |
//! | `machine/` | the monitor's snapshot: `state`, `memory`, `disk-scratch` |
//!
//! It appears under its name when it is complete.

mod draft;
mod fork;
mod machine;
mod restore;
mod take;

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use vmm::control::SavedDisk;
pub use vmm::control::SnapshotRequest;

use crate::monitor::Shape;
use crate::state::Record;
use crate::{Context, Error, Result};

pub use draft::Draft;
pub(crate) use fork::sweep;
pub use fork::{Forked, fork};
pub use machine::{Machine, SavedMachine, Summary, Then};
pub use restore::{Wishes, restore};
pub use take::{Manner, take};

/// The monitor's part of a snapshot.
pub const MACHINE: &str = "machine";
/// The container's part.
const CONTAINER: &str = "container.json";
/// Version of [`Saved`] that this build writes and reads.
const VERSION: u32 = 1;

/// What a container was when it was saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// Format of this file.
    pub version: u32,
    /// When, in nanoseconds since the epoch.
    pub taken_ns: u64,
    /// The container.
    pub record: Record,
    /// Its host name.
    pub hostname: String,
    /// Its machine's.
    pub shape: Shape,
    /// Copies of its disks.
    pub disks: Vec<SavedDisk>,
}

impl Saved {
    /// Reads the snapshot in `directory`.
    ///
    /// # Errors
    /// There is none, it is damaged, or of another version.
    pub fn load(directory: &Path) -> Result<Self> {
        let path = directory.join(CONTAINER);
        let text = fs::read(&path).map_err(|source| Error::Io {
            what: format!("{} is no snapshot of a container", directory.display()),
            source,
        })?;
        let damaged = || format!("the snapshot {} is damaged ({CONTAINER})", directory.display());
        let version = serde_json::from_slice::<Version>(&text).context(damaged)?.version;
        if version != VERSION {
            return Err(Error::Usage(format!(
                "the snapshot {} is of version {version}, this program reads version {VERSION}: restore it with the program \
                 that made it",
                directory.display()
            )));
        }
        serde_json::from_slice(&text).context(damaged)
    }
}

/// What every version of [`Saved`] has.
#[derive(Deserialize)]
struct Version {
    version: u32,
}
