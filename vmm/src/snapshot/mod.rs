//! Snapshots: a machine that stood still for a moment, as a directory from which any number of machines go on.
//!
//! | file | what |
//! |---|---|
//! | `state` | everything but memory: see [`Snapshot`] and, for its form, [`mod@file`] |
//! | `memory` | the guest's memory, see [`mod@memory`] |
//! | `working-set` | perhaps: which of it is written to first, see [`mod@working_set`] |
//!
//! Whoever wants a snapshot makes its files and gives them to the monitor ([`Draft`], [`Target`]): that needs no way to the
//! directory. It appears under its name when it is complete, never before. docs/snapshots.md says what is compatible with
//! what.

pub mod file;
pub mod memory;
pub mod pages;
pub mod working_set;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::arch::state::{VcpuState, VmState};
use crate::control::Files;
use crate::devices::virtio::mmio::TransportState;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
pub use memory::Extent;

/// Name of the file with everything but memory.
pub const STATE: &str = "state";
/// Name of the file with memory.
pub const MEMORY: &str = "memory";
/// How the names of disks' copies begin; the rest is the disk's name.
pub const DISK: &str = "disk-";
/// What is appended to a snapshot's name while it is written.
pub const PARTIAL: &str = ".partial";

/// Says which memory belongs to which state.
pub type Identity = [u8; 16];

/// Everything but the content of memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// The memory file has it too.
    pub identity: Identity,
    /// The configuration of the machine it was taken of, as JSON.
    pub config: String,
    /// Size of guest memory in bytes.
    pub memory_bytes: u64,
    /// Where in it anything but zeros is.
    pub extents: Vec<Extent>,
    /// What the processors share.
    pub vm: VmState,
    /// The processors.
    pub vcpus: Vec<VcpuState>,
    /// The virtio devices, in the order of their windows.
    pub devices: Vec<TransportState>,
}

/// A snapshot opened to be restored.
#[derive(Debug)]
pub struct Opened {
    /// Where it is.
    pub directory: PathBuf,
    /// Its state, read whole and found undamaged.
    pub snapshot: Snapshot,
    /// Its memory, found to belong to it and to be of the right length.
    pub memory: File,
}

impl Opened {
    /// Opens and checks the snapshot in `directory`.
    ///
    /// # Errors
    /// When a file is missing, damaged, of another version, or not of this snapshot.
    pub fn open(directory: &Path) -> Result<Self> {
        let bad = |why: String| Error::Snapshot { directory: directory.to_owned(), why };
        let path = directory.join(STATE);
        let bytes = file::read(&path).map_err(|source| missing("state of the snapshot", path, source))?;
        let snapshot: Snapshot = file::decode(&bytes).map_err(|error| bad(error.to_string()))?;
        memory::check(&snapshot).map_err(bad)?;
        let path = directory.join(MEMORY);
        let memory = File::open(&path).map_err(|source| missing("memory of the snapshot", path, source))?;
        memory::check_file(&memory, &snapshot).map_err(bad)?;
        Ok(Self { directory: directory.to_owned(), snapshot, memory })
    }
}

fn missing(what: &'static str, path: PathBuf, source: io::Error) -> Error {
    Error::Input { what, path, source }
}

/// A snapshot's directory while it is written. Nobody but its owner may look into it, as it holds all that the guest held. What is not
/// finished is removed.
#[derive(Debug)]
pub struct Draft {
    directory: PathBuf,
    /// Where it is until it is complete.
    partial: PathBuf,
    durable: bool,
    finished: bool,
}

impl Draft {
    /// Begins a snapshot in `directory`, which must not exist. `durable`: it will survive a loss of power.
    ///
    /// # Errors
    /// When it exists, or cannot be made.
    pub fn begin(directory: &Path, durable: bool) -> Result<Self> {
        let refused = |why: &str| Error::Snapshot { directory: directory.to_owned(), why: why.to_owned() };
        if !directory.is_absolute() {
            let words = format!("the snapshot's directory {directory:?} is no absolute path");
            return Err(Error::Config(words));
        }
        if directory.exists() {
            return Err(refused("it exists already; remove it first, or give another name"));
        }
        let mut partial = directory.as_os_str().to_owned();
        partial.push(PARTIAL);
        let partial = PathBuf::from(partial);
        sweep(&partial);
        fs::DirBuilder::new().mode(0o700).create(&partial).map_err(|source| unwritten(directory, source))?;
        Ok(Self { directory: directory.to_owned(), partial, durable, finished: false })
    }

    /// Its files, empty, for the monitor that fills them: [`Target`] and the copies of `disks`.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn files(&self, disks: &[String]) -> Result<Files> {
        let disks = disks.iter().map(|id| format!("{DISK}{id}"));
        let mut files = Files::default();
        for name in [MEMORY.to_owned(), STATE.to_owned()].into_iter().chain(disks) {
            if name.contains('/') {
                return Err(Error::Config(format!("the machine can have no disk {name:?} to copy")));
            }
            let file =
                File::options().write(true).create_new(true).mode(0o600).open(self.partial.join(&name));
            files.push(name, file.map_err(|source| unwritten(&self.directory, source))?);
        }
        Ok(files)
    }

    /// Gives the directory its name: it is complete.
    ///
    /// # Errors
    /// When that is impossible; nothing is left then.
    pub fn finish(mut self) -> Result<()> {
        self.publish().map_err(|source| unwritten(&self.directory, source))?;
        self.finished = true;
        Ok(())
    }

    fn publish(&self) -> io::Result<()> {
        if self.durable {
            File::open(&self.partial)?.sync_all()?;
        }
        fs::rename(&self.partial, &self.directory)?;
        match self.directory.parent() {
            Some(parent) if self.durable => File::open(parent)?.sync_all(),
            _ => Ok(()),
        }
    }
}

/// The files of a snapshot that a monitor writes; whoever wants it has made them.
#[derive(Debug)]
pub struct Target {
    memory: File,
    state: File,
    durable: bool,
}

impl Target {
    /// Those among `files`. `durable`: what is in them will survive a loss of power.
    ///
    /// # Errors
    /// They did not come.
    pub fn of(files: &mut Files, durable: bool) -> io::Result<Self> {
        Ok(Self { memory: files.take(MEMORY)?, state: files.take(STATE)?, durable })
    }

    /// Their descriptors.
    pub fn fds(&self) -> [RawFd; 2] {
        [self.memory.as_raw_fd(), self.state.as_raw_fd()]
    }

    /// Writes memory and state. `snapshot` has everything but extents; `base` is what of memory was mapped from an earlier snapshot.
    /// Answers how many bytes of memory it holds.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(&self, mut snapshot: Snapshot, guest: &GuestMemory, base: &[Extent]) -> io::Result<u64> {
        let Self { memory, state, durable } = self;
        let mut state = state;
        snapshot.extents = memory::write(guest, base, memory, &snapshot.identity)?;
        let bytes = snapshot.extents.iter().map(|extent| extent.length).sum();
        state.write_all(&file::encode(&snapshot)?)?;
        if *durable {
            memory.sync_all()?;
            state.sync_all()?;
        }
        Ok(bytes)
    }
}

pub(crate) fn unwritten(directory: &Path, source: io::Error) -> Error {
    Error::Input { what: "directory for the snapshot", path: directory.to_owned(), source }
}

/// Removes what a monitor that was killed half-way has left; somebody else's directory of that name stays.
fn sweep(partial: &Path) {
    let Ok(entries) = fs::read_dir(partial) else { return };
    let ours = |name: &str| name == STATE || name == MEMORY || name.starts_with(DISK);
    let paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    if paths.iter().all(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(ours)) {
        let _ = fs::remove_dir_all(partial);
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::memory::{Backing, create};

    pub(crate) fn snapshot(memory_bytes: u64, extents: Vec<Extent>) -> Snapshot {
        Snapshot {
            identity: [7; 16],
            config: "{}".into(),
            memory_bytes,
            extents,
            vm: VmState::default(),
            vcpus: Vec::new(),
            devices: Vec::new(),
        }
    }

    fn write(directory: &Path, snapshot: Snapshot, guest: &GuestMemory) -> Result<()> {
        let draft = Draft::begin(directory, true)?;
        let mut files = draft.files(&[]).unwrap();
        Target::of(&mut files, true).unwrap().write(snapshot, guest, &[]).unwrap();
        draft.finish()
    }

    #[test]
    fn what_is_there_is_not_written_over_and_a_failure_leaves_nothing() {
        let place = tempfile::tempdir().unwrap();
        let guest = create(1 << 20, Backing::Private).unwrap();
        let directory = place.path().join("one");
        write(&directory, snapshot(1 << 20, Vec::new()), &guest).unwrap();
        assert_eq!(Opened::open(&directory).unwrap().snapshot.memory_bytes, 1 << 20);
        use std::os::unix::fs::PermissionsExt;
        for path in [directory.clone(), directory.join(STATE), directory.join(MEMORY)] {
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{path:?} can be read by others");
        }
        let error = write(&directory, snapshot(1 << 20, Vec::new()), &guest).unwrap_err();
        assert!(error.to_string().contains("exists already"), "{error}");

        let nowhere = place.path().join("no/such/place");
        assert!(write(&nowhere, snapshot(1 << 20, Vec::new()), &guest).is_err());
        let left: Vec<_> =
            fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["one"]);
    }

    #[test]
    fn what_is_not_finished_goes_away() {
        let place = tempfile::tempdir().unwrap();
        let draft = Draft::begin(&place.path().join("one"), false).unwrap();
        draft.files(&["scratch".into()]).unwrap();
        assert!(place.path().join("one.partial/disk-scratch").exists());
        assert!(draft.files(&["../scratch".into()]).is_err());
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
        drop(draft);
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);

        // Nor does what another left in our place stay, unless it is none of ours.
        let partial = place.path().join("one.partial");
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("disk-scratch"), "half").unwrap();
        Draft::begin(&place.path().join("one"), false).unwrap();
        assert!(!partial.exists());
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("diary"), "mine").unwrap();
        Draft::begin(&place.path().join("one"), false).unwrap_err();
        assert!(partial.join("diary").exists());
    }

    #[test]
    fn each_missing_or_wrong_file_is_named() {
        let place = tempfile::tempdir().unwrap();
        let guest = create(1 << 20, Backing::Private).unwrap();
        let good = place.path().join("good");
        let make = |directory: &Path| write(directory, snapshot(1 << 20, Vec::new()), &guest).unwrap();
        make(&good);
        let why = |directory: &Path| {
            let error = Opened::open(directory).unwrap_err();
            assert_eq!(error.exit_status(), crate::error::STATUS_NO_INPUT);
            error.to_string()
        };
        for (name, damage, word) in [
            ("a", (|at: &Path| fs::remove_file(at.join(STATE)).unwrap()) as fn(&Path), "state"),
            ("b", |at| fs::remove_file(at.join(MEMORY)).unwrap(), "memory"),
            ("c", |at| fs::write(at.join(STATE), "something else").unwrap(), "no state"),
            ("d", |at| fs::write(at.join(MEMORY), "short").unwrap(), "cut off"),
            (
                "e",
                |at| File::options().append(true).open(at.join(STATE)).unwrap().set_len(30).unwrap(),
                "bytes long",
            ),
        ] {
            let directory = place.path().join(name);
            make(&directory);
            damage(&directory);
            assert!(why(&directory).contains(word), "{name}: {}", why(&directory));
        }
        Opened::open(&good).unwrap();
    }
}
