//! Saves a container that runs.

use std::fs;
use std::path::{Path, PathBuf};

use vmm::control::SnapshotRequest;

use super::draft::Draft;
use super::machine::{Machine, Summary, Then};
use super::{MACHINE, Saved, VERSION};
use crate::guest::Guest;
use crate::state::{Files, Record, now_ns};
use crate::{Context, Layout, Result, names, stop};

/// How a container is saved.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    /// It survives a loss of power.
    pub durable: bool,
    /// Memory and disk are compressed: copies take longer to start, and have no memory in common.
    pub compress: bool,
    /// Another container's snapshot, or an earlier one of this: only what differs from it is written, and copies need both.
    pub base: Option<PathBuf>,
}

/// Saves a running container to `directory`, which must not exist. The container goes on.
///
/// # Errors
/// It does not run, it has what cannot be saved, the directory cannot be written, or a signal came: nothing is left.
pub fn take(layout: &Layout, record: &Record, directory: &Path, manner: &Manner) -> Result<Summary> {
    stop::running(record)?;
    let Manner { durable, compress, .. } = *manner;
    let base = manner.base.as_deref().map(base).transpose()?;
    let files = Files::new(layout, &record.id);
    let what = format!("container {}", names::short(&record.id));
    let mut machine = Machine::reach(&files.control(), &Guest::new(&files.vsock()), &what)?;
    let draft = Draft::begin(directory)?;
    let disks = machine.disks().iter().filter(|id| *id == "scratch").cloned().collect();
    let request = SnapshotRequest { compress, base, ..draft.request(durable, disks) };
    let taken = machine.save(request, Then::GoOn, false)?;
    let hostname = record.options.hostname.clone().unwrap_or_else(|| names::short(&record.id).to_owned());
    let saved = Saved {
        version: VERSION,
        taken_ns: now_ns(),
        record: record.clone(),
        hostname,
        shape: taken.shape,
        disks: taken.disks,
    };
    draft.finish(super::CONTAINER, &saved, durable)?;
    Ok(taken.summary)
}

/// The machine's part of the snapshot in `directory`.
fn base(directory: &Path) -> Result<PathBuf> {
    Saved::load(directory)?;
    let found = fs::canonicalize(directory.join(MACHINE));
    found.context(|| format!("cannot take the difference from {}", directory.display()))
}
