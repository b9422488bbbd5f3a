//! Machines that have booted once, for all that come after them: a sandbox starts from the snapshot of one whose agent was up
//! and that had nothing in its drives and nothing on its cables.
//!
//! There is one for each combination of kernel, agent, monitor, host, processors, memory and devices (see `key`), made when it is
//! first wanted. A template is a directory that appears under its key when it is complete; of two that would make the same one
//! at once, one does and the other boots. What was killed half-way is cleared away by the next that makes one.

mod key;
mod make;
mod rehearse;

pub(crate) use rehearse::rehearse;

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};

use crate::monitor::Shape;
use crate::shares;
use crate::state::private_dir;
use crate::{Artefacts, Context, Error, Layout, Result, Settings, trace};
use vmm::config::{DiskConfig, EmptyNetwork};

/// Most templates kept; the one not used for longest goes first.
const MOST: usize = 8;
/// One that was used so recently stays: somebody may be about to open it.
const FRESH: Duration = Duration::from_secs(60);
/// After a template could not be made, nobody tries again for so long.
const AFTER_FAILURE: Duration = Duration::from_secs(600);
/// Environment variable that, when it is `0`, makes every machine boot.
pub const SWITCH: &str = "BULKHEAD_TEMPLATES";

/// A template to start from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// The snapshot.
    pub(crate) directory: PathBuf,
}

/// A machine as far as its template must be like it.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// Processors and memory.
    pub shape: &'a Shape,
    /// Its disks, of which only names and whether they can be written matter.
    pub disks: &'a [DiskConfig],
    /// Whether directories of the host are shared with it.
    pub shares: bool,
    /// What its interfaces are connected to.
    pub networks: Vec<EmptyNetwork>,
}

/// Why there is no template.
enum Failed {
    /// A machine does not come up, or nobody wants it any more: the container's own would fare no better.
    Boot(Error),
    /// It cannot be kept.
    Keep(Error),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Keep(error)
    }
}

/// The template for such a machine, made now if there is none. `None`: it has to boot. `given_up` is asked whenever `interrupt`
/// is readable, as in [`crate::monitor::Monitor::wait_ready`].
///
/// # Errors
/// A machine of this kind does not come up, or it was given up.
pub fn get(
    layout: &Layout,
    artefacts: &Artefacts,
    wanted: &Wanted<'_>,
    interrupt: &impl AsFd,
    given_up: impl FnMut() -> bool,
) -> Result<Option<Template>> {
    if switched_off(&artefacts.settings) {
        return Ok(None);
    }
    match find_or_make(layout, artefacts, wanted, interrupt, given_up) {
        Ok(template) => Ok(template),
        Err(Failed::Boot(error)) => Err(error),
        Err(Failed::Keep(error)) => {
            // A machine that boots is as good, only later: no reason to bother whoever started it.
            note_failure(&layout.templates(), &error);
            Ok(None)
        }
    }
}

/// Whether every machine is to boot.
pub(crate) fn switched_off(settings: &Settings) -> bool {
    std::env::var_os(SWITCH).is_some_and(|value| value == "0") || !settings.machine.templates
}

/// Names the template for such a machine, whether there is one or not. Machines with the same name are alike.
///
/// # Errors
/// A file that it would be made of cannot be read.
pub(crate) fn key(layout: &Layout, artefacts: &Artefacts, wanted: &Wanted<'_>) -> Result<String> {
    key::of(&layout.templates(), artefacts, wanted)
}

fn find_or_make(
    layout: &Layout,
    artefacts: &Artefacts,
    wanted: &Wanted<'_>,
    interrupt: &impl AsFd,
    given_up: impl FnMut() -> bool,
) -> Result<Option<Template>, Failed> {
    let home = layout.templates();
    private_dir(&home)?;
    let name = key::of(&home, artefacts, wanted)?;
    let directory = home.join(&name);
    if use_now(&directory) {
        trace::mark("template found");
        return Ok(Some(Template { directory }));
    }
    if failed_lately(&home) {
        return Ok(None);
    }
    let lock = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(home.join("lock"))
        .context(|| format!("cannot lock {}", home.display()))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        // Another makes one, perhaps this one. To wait would be slower than to boot.
        return Ok(None);
    }
    if !use_now(&directory) {
        sweep(&home);
        make::make(layout, artefacts, wanted, &directory, interrupt, given_up)?;
        trace::mark("template made");
    }
    Ok(Some(Template { directory }))
}

impl Template {
    /// Forgets one that a monitor could not use.
    pub fn discard(&self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Whether the template is there; notes that it is used.
fn use_now(directory: &Path) -> bool {
    let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
    let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
    rustix::fs::utimensat(rustix::fs::CWD, directory, &times, rustix::fs::AtFlags::empty()).is_ok()
}

/// Clears away what was left half-made, and the oldest of too many. The lock is held.
fn sweep(home: &Path) {
    let Ok(entries) = fs::read_dir(home) else { return };
    let mut kept = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().ends_with(vmm::snapshot::PARTIAL) {
            let _ = fs::remove_dir_all(entry.path());
        } else if key::is_key(&name)
            && let Ok(used) = entry.metadata().and_then(|metadata| metadata.modified())
        {
            kept.push((used, entry.path()));
        }
    }
    kept.sort();
    let excess = (kept.len() + 1).saturating_sub(MOST);
    let old = |used: &SystemTime| used.elapsed().is_ok_and(|age| age > FRESH);
    for (_, path) in kept.iter().take(excess).filter(|(used, _)| old(used)) {
        let _ = fs::remove_dir_all(path);
    }
}

/// Where the reason of the last failure is kept, for `bulkhead doctor`.
fn failure(home: &Path) -> PathBuf {
    home.join("failure")
}

fn note_failure(home: &Path, error: &Error) {
    trace::mark("template failed");
    let _ = fs::write(failure(home), format!("{}\n", error.chain()));
}

fn failed_lately(home: &Path) -> bool {
    let age = fs::metadata(failure(home)).and_then(|metadata| metadata.modified()).map(|at| at.elapsed());
    matches!(age, Ok(Ok(age)) if age < AFTER_FAILURE)
}

/// Why a template could not be made when it was last tried, unless one was made since.
#[must_use]
pub fn last_failure(layout: &Layout) -> Option<String> {
    fs::read_to_string(failure(&layout.templates())).ok()
}

/// Removes what a failure left, since it no longer tells the truth.
fn forget_failure(home: &Path) -> io::Result<()> {
    match fs::remove_file(failure(home)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The share that a machine with one has, before anybody serves it.
fn empty_share() -> vmm::config::FilesystemConfig {
    vmm::config::FilesystemConfig { fd: None, empty: true, ..shares::device(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_latest_are_kept_and_nothing_half_made() {
        let place = tempfile::tempdir().unwrap();
        let home = place.path();
        for number in 0..12_u64 {
            let directory = home.join(format!("{number:064x}"));
            fs::create_dir(&directory).unwrap();
            let used = SystemTime::now() - Duration::from_secs(1000 - number);
            File::open(&directory).unwrap().set_modified(used).unwrap();
        }
        fs::create_dir(home.join(format!("{:064x}.partial", 3))).unwrap();
        fs::create_dir(home.join("stamps")).unwrap();
        // The oldest has been used after all.
        assert!(use_now(&home.join(format!("{:064x}", 0))));
        assert!(!use_now(&home.join("nothing")));
        sweep(home);
        let mut left: Vec<_> = fs::read_dir(home)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let mut wanted: Vec<_> = [0, 6, 7, 8, 9, 10, 11].iter().map(|n| format!("{n:064x}")).collect();
        wanted.push("stamps".into());
        assert_eq!(left, wanted);
        // Not even too many go while they may be in use.
        for number in 20..40_u64 {
            fs::create_dir(home.join(format!("{number:064x}"))).unwrap();
        }
        sweep(home);
        assert!(home.join(format!("{:064x}", 0)).exists() && home.join(format!("{:064x}", 39)).exists());
    }

    #[test]
    fn a_failure_is_remembered_until_it_is_forgotten() {
        let place = tempfile::tempdir().unwrap();
        assert!(!failed_lately(place.path()));
        note_failure(place.path(), &Error::Usage("why".into()));
        assert!(failed_lately(place.path()));
        let past = SystemTime::now() - 2 * AFTER_FAILURE;
        File::options().write(true).open(failure(place.path())).unwrap().set_modified(past).unwrap();
        assert!(!failed_lately(place.path()));
        forget_failure(place.path()).unwrap();
        forget_failure(place.path()).unwrap();
        assert!(!failure(place.path()).exists());
    }
}
