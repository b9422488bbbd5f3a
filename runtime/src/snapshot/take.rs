//! Saves a container that runs.

use std::path::Path;

use super::draft::Draft;
use super::machine::{Machine, Summary, Then};
use super::{Saved, VERSION};
use crate::guest::Guest;
use crate::state::{Files, Record, now_ns};
use crate::{Layout, Result, names, stop};

/// Saves a running container to `directory`, which must not exist, with `durable` such that it survives a loss of power. The
/// container goes on.
///
/// # Errors
/// It does not run, it has what cannot be saved, the directory cannot be written, or a signal came: nothing is left.
pub fn take(layout: &Layout, record: &Record, directory: &Path, durable: bool) -> Result<Summary> {
    stop::running(record)?;
    let files = Files::new(layout, &record.id);
    let what = format!("container {}", names::short(&record.id));
    let mut machine = Machine::reach(&files.control(), &Guest::new(&files.vsock()), &what)?;
    let draft = Draft::begin(directory)?;
    let disks = machine.disks().iter().filter(|id| *id == "scratch").cloned().collect();
    let taken = machine.save(draft.request(durable, disks), Then::GoOn, false)?;
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
