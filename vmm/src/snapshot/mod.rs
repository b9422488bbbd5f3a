//! Snapshots: a machine that stood still for a moment, as a directory from which any number of machines go on.
//!
//! | file | what |
//! |---|---|
//! | `state` | everything but memory: see [`Snapshot`] and, for its form, [`mod@file`] |
//! | `memory`, or `memory.zst` | the guest's memory, see [`mod@memory`] |
//! | `disk-ID`, or `disk-ID.packed` | disks' copies, see [`mod@disk`] |
//! | `working-set` | perhaps: which of it is written to first, see [`mod@working_set`] |
//!
//! Whoever wants a snapshot makes its files and gives them to the monitor ([`Draft`], [`Target`]): that needs no way to the
//! directory. It appears under its name when it is complete, never before. docs/snapshots.md says what is compatible with
//! what.

pub mod disk;
pub mod file;
pub mod frame;
pub mod memory;
pub mod pages;
pub mod working_set;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::arch::state::{VcpuState, VmState};
use crate::control::{Files, SnapshotRequest};
use crate::devices::virtio::mmio::TransportState;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
pub use memory::Extent;

/// Name of the file with everything but memory.
pub const STATE: &str = "state";
/// Name of the file with memory.
pub const MEMORY: &str = "memory";
/// Name of the file with memory that is compressed.
pub const MEMORY_ZSTD: &str = "memory.zst";
/// Most snapshots that one is made of: itself, the one that it is a difference from, and so on.
pub const MAX_CHAIN: usize = 32;
/// How the names of disks' copies begin; the rest is the disk's name.
pub const DISK: &str = "disk-";
/// What is appended to a snapshot's name while it is written.
pub const PARTIAL: &str = ".partial";

/// Says which memory belongs to which state.
pub type Identity = [u8; 16];

/// How memory is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Form {
    /// As it is: a machine that goes on maps it.
    #[default]
    Plain,
    /// Compressed: a machine that goes on gets it decompressed into memory of its own.
    Zstd,
}

impl Form {
    /// The one that is wished for.
    pub fn of(compress: bool) -> Self {
        if compress { Self::Zstd } else { Self::Plain }
    }

    /// The name of the file that memory is in.
    pub fn file(self) -> &'static str {
        match self {
            Self::Plain => MEMORY,
            Self::Zstd => MEMORY_ZSTD,
        }
    }
}

/// The snapshot that another is a difference from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its own.
    pub identity: Identity,
    /// CRC-32 (ISO-HDLC) of its file `state`.
    pub state: u32,
    /// Where it was when seen from this one's directory, so that both can be moved together.
    pub relative: PathBuf,
    /// Where it was.
    pub absolute: PathBuf,
}

/// Everything but the content of memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// The memory file has it too.
    pub identity: Identity,
    /// How memory is kept.
    pub form: Form,
    /// What it is a difference from; none: it is whole.
    pub base: Option<Base>,
    /// The configuration of the machine it was taken of, as JSON.
    pub config: String,
    /// Size of guest memory in bytes.
    pub memory_bytes: u64,
    /// Where in it anything but zeros is, or what differs from the base.
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
    /// Its memory, found to belong to it and to be of the right length; what is compressed, when it is read.
    pub memory: File,
    /// What it is a difference from.
    pub below: Option<Box<Self>>,
    /// CRC-32 of its state.
    checksum: u32,
    source: Source,
}

/// Where the files of a snapshot come from.
#[derive(Debug, Clone)]
enum Source {
    /// Its directory.
    Directory,
    /// Whoever asked for a difference from it has sent them: its own are those whose names begin so.
    Sent(Arc<Files>, String),
}

impl Source {
    fn file(&self, directory: &Path, name: &str) -> io::Result<File> {
        match self {
            Self::Directory => File::open(directory.join(name)),
            Self::Sent(files, prefix) => files.get(&format!("{prefix}{name}")),
        }
    }

    /// How the names of the files begin that belong to number `depth` below the snapshot that is written.
    fn prefix(depth: usize) -> String {
        format!("base{depth}/")
    }
}

impl Opened {
    /// Opens and checks the snapshot in `directory`, and all that it is a difference from.
    ///
    /// # Errors
    /// When a file is missing, damaged, of another version, or not of this snapshot.
    pub fn open(directory: &Path) -> Result<Self> {
        Self::open_with(directory, &Source::Directory, 1)
    }

    /// The snapshot in `directory` of which `files` came, as a client sends them with a request.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn sent(directory: &Path, files: Files) -> Result<Self> {
        Self::open_with(directory, &Source::Sent(Arc::new(files), Source::prefix(1)), 1)
    }

    /// `depth`: so many is it made of at least, with those above it.
    fn open_with(directory: &Path, source: &Source, depth: usize) -> Result<Self> {
        let bad = |why: String| Error::Snapshot { directory: directory.to_owned(), why };
        let path = directory.join(STATE);
        let bytes = source.file(directory, STATE).and_then(file::read);
        let bytes = bytes.map_err(|source| missing("state of the snapshot", path, source))?;
        let snapshot: Snapshot = file::decode(&bytes).map_err(|error| bad(error.to_string()))?;
        memory::check(&snapshot).map_err(bad)?;
        let name = snapshot.form.file();
        let memory = source.file(directory, name);
        let memory =
            memory.map_err(|source| missing("memory of the snapshot", directory.join(name), source))?;
        memory::check_file(&memory, &snapshot).map_err(bad)?;
        let below = match &snapshot.base {
            Some(_) if depth >= MAX_CHAIN => {
                return Err(bad(format!(
                    "it is a difference from more than {MAX_CHAIN} others, one of the next"
                )));
            }
            Some(base) => Some(Box::new(base.open(directory, source, snapshot.memory_bytes, depth + 1)?)),
            None => None,
        };
        let checksum = crc32fast::hash(&bytes);
        let source = source.clone();
        Ok(Self { directory: directory.to_owned(), snapshot, memory, below, checksum, source })
    }

    /// One of its other files.
    ///
    /// # Errors
    /// It has none of this name.
    pub fn file(&self, name: &str) -> io::Result<File> {
        self.source.file(&self.directory, name)
    }

    /// Adds to `files` what a monitor needs to write a difference from it, which has copies of `disks`.
    ///
    /// # Errors
    /// A file cannot be opened.
    fn send(&self, disks: &[String], files: &mut Files) -> io::Result<()> {
        for (opened, depth) in std::iter::successors(Some(self), |opened| opened.below.as_deref()).zip(1..) {
            let mut add = |name: &str, file| files.push(format!("{}{name}", Source::prefix(depth)), file);
            add(STATE, opened.file(STATE)?);
            add(opened.snapshot.form.file(), opened.memory.try_clone()?);
            for id in disks {
                let raw = format!("{DISK}{id}");
                for name in [format!("{raw}{}", disk::PACKED), raw] {
                    match opened.file(&name) {
                        Ok(file) => add(&name, file),
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        Ok(())
    }

    /// What a snapshot in `directory` that is a difference from it says of it.
    ///
    /// # Errors
    /// When it cannot be one.
    pub fn difference(&self, directory: &Path) -> Result<Base> {
        let depth = std::iter::successors(Some(self), |opened| opened.below.as_deref()).count();
        if depth >= MAX_CHAIN {
            return Err(Error::Snapshot {
                directory: directory.to_owned(),
                why: format!(
                    "it would be a difference from {MAX_CHAIN} others, one of the next: take a whole one, or name one of those \
                     as its base"
                ),
            });
        }
        Ok(Base {
            identity: self.snapshot.identity,
            state: self.checksum,
            relative: relative(directory, &self.directory),
            absolute: self.directory.clone(),
        })
    }

    /// Gives `guest`, which is new, the memory of the snapshot.
    ///
    /// # Errors
    /// When a file cannot be mapped or read, or is damaged.
    pub fn fill(&self, guest: &GuestMemory) -> Result<()> {
        if let Some(below) = &self.below {
            below.fill(guest)?;
        }
        let Snapshot { form, extents, identity, .. } = &self.snapshot;
        let filled = match form {
            Form::Plain => memory::fill(guest, &self.memory, extents),
            Form::Zstd => memory::fill_compressed(guest, &self.memory, extents, identity),
        };
        filled.map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Error::Snapshot {
                directory: self.directory.clone(),
                why: format!("its memory is damaged: {error}"),
            },
            _ => Error::os("map the snapshot's memory")(error),
        })
    }

    /// Where anything but zeros can be in its memory; pieces may overlap.
    pub fn extents(&self) -> Vec<Extent> {
        let mut extents = self.below.as_ref().map(|below| below.extents()).unwrap_or_default();
        extents.extend(&self.snapshot.extents);
        extents
    }

    /// Its memory, for another to be compared with.
    ///
    /// # Errors
    /// As [`Self::fill`].
    pub fn to_base(&self) -> Result<memory::Base> {
        let memory = crate::memory::create(self.snapshot.memory_bytes)?;
        self.fill(&memory)?;
        Ok(memory::Base { memory, extents: self.extents() })
    }
}

impl Base {
    /// Opens it, as seen from the snapshot in `directory`, which has `memory_bytes`.
    fn open(&self, directory: &Path, source: &Source, memory_bytes: u64, depth: usize) -> Result<Opened> {
        let bad = |why: String| Error::Snapshot { directory: directory.to_owned(), why };
        let beside = directory.join(&self.relative);
        let (place, source) = match source {
            Source::Directory => {
                let place = [&beside, &self.absolute].into_iter().find(|place| place.join(STATE).exists());
                let place = place.ok_or_else(|| {
                    bad(format!(
                        "it has only the difference from the snapshot {}, which is not there",
                        self.absolute.display()
                    ))
                })?;
                (place, Source::Directory)
            }
            Source::Sent(files, _) => {
                (&self.absolute, Source::Sent(Arc::clone(files), Source::prefix(depth)))
            }
        };
        let opened = Opened::open_with(place, &source, depth)?;
        let same = opened.snapshot.identity == self.identity
            && opened.checksum == self.state
            && opened.snapshot.memory_bytes == memory_bytes;
        if same {
            return Ok(opened);
        }
        Err(bad(format!("it is the difference from another snapshot than the one in {}", place.display())))
    }
}

/// The way from one directory to another; both absolute.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let common = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(common).map(|_| std::path::Component::ParentDir);
    up.chain(to.components().skip(common)).collect()
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

    /// Its files, empty, for the monitor that fills them ([`Target`] and the copies of disks), and those of what it is to be a
    /// difference from.
    ///
    /// # Errors
    /// When one cannot be made, or the base is not good.
    pub fn files(&self, request: &SnapshotRequest) -> Result<Files> {
        let base = request.base.as_deref().map(Opened::open).transpose()?;
        let form = Form::of(request.compress);
        let mut wanted =
            vec![(MEMORY.to_owned(), form.file().to_owned()), (STATE.to_owned(), STATE.to_owned())];
        for id in &request.disks {
            let name = format!("{DISK}{id}");
            let packed = request.compress
                || disk::of_base(base.as_ref(), id)
                    .map_err(|source| unwritten(&self.directory, source))?
                    .is_some();
            let file = if packed { format!("{name}{}", disk::PACKED) } else { name.clone() };
            wanted.push((name, file));
        }
        let mut files = Files::default();
        for (name, file) in wanted {
            if file.contains('/') {
                return Err(Error::Config(format!("the machine can have no disk {name:?} to copy")));
            }
            let made = File::options().write(true).create_new(true).mode(0o600).open(self.partial.join(file));
            files.push(name, made.map_err(|source| unwritten(&self.directory, source))?);
        }
        if let Some(base) = &base {
            base.send(&request.disks, &mut files).map_err(|source| unwritten(&self.directory, source))?;
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

    /// Writes memory and state. `snapshot` has everything but extents; `mapped` is what of memory was mapped from an earlier
    /// snapshot. With `base`, only what differs from that is written. Answers how many bytes of memory it holds.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(
        &self,
        mut snapshot: Snapshot,
        guest: &GuestMemory,
        mapped: &[Extent],
        base: Option<&memory::Base>,
    ) -> io::Result<u64> {
        let Self { memory, state, durable } = self;
        let mut state = state;
        let Snapshot { form, identity, .. } = &snapshot;
        snapshot.extents = memory::write(guest, mapped, base, *form, memory, identity)?;
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
    let ours = |name: &str| [STATE, MEMORY, MEMORY_ZSTD].contains(&name) || name.starts_with(DISK);
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
    use crate::memory::create;

    pub(crate) fn snapshot(memory_bytes: u64, extents: Vec<Extent>) -> Snapshot {
        Snapshot {
            identity: [7; 16],
            form: Form::Plain,
            base: None,
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
        let mut files = draft.files(&SnapshotRequest::new(directory.to_owned(), true)).unwrap();
        Target::of(&mut files, true).unwrap().write(snapshot, guest, &[], None).unwrap();
        draft.finish()
    }

    #[test]
    fn what_is_there_is_not_written_over_and_a_failure_leaves_nothing() {
        let place = tempfile::tempdir().unwrap();
        let guest = create(1 << 20).unwrap();
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
        let with = |disk: &str| SnapshotRequest {
            disks: vec![disk.to_owned()],
            ..SnapshotRequest::new(place.path().join("one"), false)
        };
        draft.files(&with("scratch")).unwrap();
        assert!(place.path().join("one.partial/disk-scratch").exists());
        assert!(draft.files(&with("../scratch")).is_err());
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
        let guest = create(1 << 20).unwrap();
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
