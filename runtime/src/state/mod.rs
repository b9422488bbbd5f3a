//! What is on disk about each container, and who holds it.
//!
//! `containers/<id>/lock` is held (flock) by the container's supervisor for as long as it lives, so a record whose
//! lock is free and which does not say `exited` belongs to a supervisor that was killed: the first to see it
//! writes that down and clears away what is left.

mod reservation;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_image::Image;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::network::{self, Network, NetworkWish};
use crate::options::RunOptions;
use crate::{Context, Error, Layout, Result, jail, names, snapshot};
pub use reservation::Reservation;
use reservation::create_locked;
pub(crate) use reservation::{Nameless, take as take_name};

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The microVM is being made.
    Created,
    /// The container's init runs.
    Running,
    /// It has ended; what is left is its record, log and scratch disk.
    Exited,
}

impl Status {
    /// The word people and scripts see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Exited => "exited",
        }
    }
}

/// How a container ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0 to 255; 128 + n for signal n.
    pub code: u8,
    /// The signal that ended its init, 0 for none.
    #[serde(default)]
    pub signal: u32,
    /// The guest kernel killed it for memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// Why it could not run or was lost, empty for an ordinary end.
    #[serde(default)]
    pub error: String,
}

/// A container's record: `state.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Format of this file.
    pub version: u32,
    /// 64 hexadecimal digits.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What the person asked for.
    pub options: RunOptions,
    /// Image as it was named.
    pub image: String,
    /// Image id.
    pub image_id: String,
    /// Program and arguments, entrypoint included.
    pub command: Vec<String>,
    /// Signal number that `stop` sends.
    pub stop_signal: u32,
    /// Where it is in its life.
    pub status: Status,
    /// How it ended, once it has.
    pub exit: Option<Exit>,
    /// Nanoseconds since the epoch.
    pub created_ns: u64,
    /// Nanoseconds since the epoch, 0 before.
    pub started_ns: u64,
    /// Nanoseconds since the epoch, 0 before.
    pub finished_ns: u64,
    /// Host pid of the supervisor, 0 once it has ended.
    pub supervisor_pid: u32,
    /// Host pid of the monitor, 0 once it has ended.
    pub monitor_pid: u32,
    /// Guest kernel release.
    #[serde(default)]
    pub kernel: String,
    /// What the guest's agent knows the container by, where that is not its id: in a copy of another's machine, that one's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub guest_id: String,
    /// The network that its guest was given, once there is one.
    #[serde(default)]
    pub given: Network,
}

/// Version of [`Record`] that this build writes and reads.
pub const RECORD_VERSION: u32 = 1;

/// Now, in nanoseconds since the epoch.
#[must_use]
pub fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map(|since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
        .unwrap_or(0)
}

/// Digits of an id in the paths of sockets, which the kernel limits to 107 bytes: 64 bits tell sandboxes apart.
pub(crate) const RUN_ID: usize = 16;

/// The files of one container.
#[derive(Clone, Debug)]
pub struct Files {
    /// `containers/<id>`.
    pub dir: PathBuf,
    /// Sockets and other things that do not outlive the sandbox.
    pub run: PathBuf,
}

impl Files {
    /// Removes what is there of both directories.
    ///
    /// # Errors
    /// Something cannot be removed.
    pub fn remove(&self) -> Result<()> {
        self.forget_user();
        for dir in [&self.run, &self.dir] {
            match fs::remove_dir_all(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).context(|| format!("cannot remove {}", dir.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Lets others have the user of a sandbox that was killed.
    fn forget_user(&self) {
        if let Some(run) = self.run.parent() {
            jail::users::sweep(run);
        }
    }

    /// The files of container `id`, whether they exist or not.
    #[must_use]
    pub fn new(layout: &Layout, id: &str) -> Self {
        Self { dir: layout.containers().join(id), run: layout.run.join(id.get(..RUN_ID).unwrap_or(id)) }
    }
    /// The record.
    #[must_use]
    pub fn record(&self) -> PathBuf {
        self.dir.join("state.json")
    }
    /// Held by the supervisor.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }
    /// What virtiofsd has to say.
    #[must_use]
    pub fn shares_log(&self) -> PathBuf {
        self.dir.join("virtiofsd.log")
    }
    /// What the container wrote.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.dir.join("container.log")
    }
    /// The writable layer.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        self.dir.join("scratch.ext4")
    }
    /// The monitor's vsock socket.
    #[must_use]
    pub fn vsock(&self) -> PathBuf {
        self.run.join("vsock")
    }
    /// Where the agent says that it is ready.
    #[must_use]
    pub fn ready(&self) -> PathBuf {
        self.run.join(format!("vsock_{}", bulkhead_protocol::AGENT_PORT))
    }
    /// Where the guest has questions for a name server asked.
    #[must_use]
    pub fn names(&self) -> PathBuf {
        self.run.join(format!("vsock_{}", bulkhead_protocol::NAMES_PORT))
    }
    /// Where a machine that waits in a pool can be had.
    #[must_use]
    pub fn take(&self) -> PathBuf {
        self.run.join("take")
    }
    /// The monitor's control socket.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.run.join("control")
    }
    /// The monitor's configuration.
    #[must_use]
    pub fn monitor_config(&self) -> PathBuf {
        self.run.join("vmm.json")
    }
    /// The monitor's report, written when it ends.
    #[must_use]
    pub fn report(&self) -> PathBuf {
        self.run.join("report.json")
    }
    /// What the monitor printed.
    #[must_use]
    pub fn monitor_log(&self) -> PathBuf {
        self.run.join("vmm.log")
    }
}

/// Makes a directory and its parents, for its owner alone.
pub(crate) fn private_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .context(|| format!("cannot create {}", path.display()))
}

impl Record {
    /// Of a container of `image`, which was called `image_name`, that has no name, no command and no machine yet.
    pub(crate) fn new(id: String, image_name: &str, image: &Image, options: RunOptions) -> Self {
        Self {
            version: RECORD_VERSION,
            id,
            name: String::new(),
            image: image_name.to_owned(),
            image_id: image.id.to_string(),
            command: Vec::new(),
            stop_signal: 0,
            status: Status::Created,
            exit: None,
            created_ns: now_ns(),
            started_ns: 0,
            finished_ns: 0,
            supervisor_pid: 0,
            monitor_pid: 0,
            kernel: String::new(),
            guest_id: String::new(),
            given: Network::default(),
            options,
        }
    }

    /// The container's id for the agent in its guest.
    #[must_use]
    pub fn in_guest(&self) -> &str {
        if self.guest_id.is_empty() { &self.id } else { &self.guest_id }
    }

    /// Writes the record so that readers see the old one or the new one, whole.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn save(&self, files: &Files) -> Result<()> {
        let path = files.record();
        let temporary = files.dir.join(format!(".state.{}", std::process::id()));
        let text = serde_json::to_vec(self).context(|| "cannot encode a container record".into())?;
        let write = || -> io::Result<()> {
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?
                .write_all(&text)?;
            fs::rename(&temporary, &path)
        };
        write()
            .inspect_err(|_| drop(fs::remove_file(&temporary)))
            .context(|| format!("cannot write {}", path.display()))
    }

    /// Reads a record and, if its supervisor is gone without a word, makes it tell the truth.
    ///
    /// # Errors
    /// It is not there, or does not parse.
    pub fn load(layout: &Layout, id: &str) -> Result<Self> {
        let files = Files::new(layout, id);
        let record = Self::read(&files)?;
        if record.status == Status::Exited || is_locked(&files.lock()) {
            return Ok(record);
        }
        Self::reconcile(layout, &files)
    }

    fn read(files: &Files) -> Result<Self> {
        let path = files.record();
        let text = fs::read(&path).context(|| format!("cannot read {}", path.display()))?;
        let record: Self = serde_json::from_slice(&text).context(|| {
            format!("{} is damaged: remove the container with `bulkhead rm -f`", path.display())
        })?;
        if record.version != RECORD_VERSION {
            return Err(Error::Usage(format!(
                "{} has version {}, this bulkhead reads version {RECORD_VERSION}",
                path.display(),
                record.version
            )));
        }
        Ok(record)
    }

    fn reconcile(layout: &Layout, files: &Files) -> Result<Self> {
        let _lock = create_locked(&files.lock())?;
        let mut record = Self::read(files)?;
        if record.status != Status::Exited {
            record.finish(Exit {
                code: 137,
                signal: 9,
                error: "its supervisor was killed".into(),
                ..Exit::default()
            });
            record.leave_network();
            if record.options.auto_remove {
                remove_files(layout, files, &record.name)?;
            } else {
                record.save(files)?;
                files.forget_user();
                let _ = fs::remove_dir_all(&files.run);
            }
        }
        Ok(record)
    }

    /// Marks the container as ended.
    pub fn finish(&mut self, exit: Exit) {
        self.status = Status::Exited;
        self.exit = Some(exit);
        self.finished_ns = now_ns();
        self.supervisor_pid = 0;
        self.monitor_pid = 0;
    }

    /// Takes what joined the container to a network namespace out of it. What cannot be removed is told, and in nobody's
    /// way: the next sandbox in that namespace removes it.
    pub(crate) fn leave_network(&self) {
        if let NetworkWish::Namespace(namespace) = &self.options.network
            && let Err(error) = network::detach(namespace, &self.id)
        {
            eprintln!("bulkhead: {}", error.chain());
        }
    }

    /// Waits until the supervisor has ended, and answers the container's exit status; `None` if the supervisor was
    /// killed, or the container is not there.
    ///
    /// # Errors
    /// The lock cannot be opened.
    pub fn wait(files: &Files) -> Result<Option<u8>> {
        let path = files.lock();
        match File::open(&path) {
            Ok(lock) => status_when_free(lock).context(|| format!("cannot wait for {}", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context(|| format!("cannot open {}", path.display())),
        }
    }
}

fn status_when_free(mut lock: File) -> io::Result<Option<u8>> {
    rustix::fs::flock(&lock, FlockOperation::LockShared)?;
    let mut status = String::new();
    lock.read_to_string(&mut status)?;
    Ok(status.trim().parse().ok())
}

/// Lets go of a container's lock. The exit status goes into it, for those who wait and find all else removed.
pub(crate) fn release(mut lock: &File, status: u8) {
    let _ = writeln!(lock, "{status}");
    let _ = rustix::fs::flock(lock, FlockOperation::Unlock);
}

/// Whether somebody holds the lock.
pub(crate) fn is_locked(path: &Path) -> bool {
    File::open(path)
        .is_ok_and(|file| rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_err())
}

/// Removes everything of a container; the name first, so that it can be taken again at once.
///
/// # Errors
/// Something cannot be removed.
pub fn remove_files(layout: &Layout, files: &Files, name: &str) -> Result<()> {
    let link = layout.names().join(name);
    let id = files.dir.file_name().and_then(|id| id.to_str()).unwrap_or_default();
    if fs::read_to_string(&link).is_ok_and(|owner| owner == id) {
        let _ = fs::remove_file(&link);
    }
    files.remove()
}

/// The id of the container that a name, an id or the beginning of an id means.
///
/// # Errors
/// [`Error::NoSuchContainer`], [`Error::Ambiguous`].
pub fn find(layout: &Layout, wanted: &str) -> Result<String> {
    if names::check(wanted).is_ok() {
        if let Ok(id) = fs::read_to_string(layout.names().join(wanted))
            && layout.containers().join(&id).exists()
        {
            return Ok(id);
        }
        // Without a record it is none yet, or never will be.
        let is_one = |id: &String| id.starts_with(wanted) && Files::new(layout, id).record().exists();
        let ids: Vec<_> = ids(layout)?.into_iter().filter(is_one).collect();
        match ids.as_slice() {
            [] => {}
            [id] => return Ok(id.clone()),
            _ => return Err(Error::Ambiguous(wanted.into())),
        }
    }
    Err(Error::NoSuchContainer(wanted.into()))
}

fn ids(layout: &Layout) -> Result<Vec<String>> {
    let dir = layout.containers();
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(|| format!("cannot list {}", dir.display())),
    };
    Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// All records, newest first. Directories without a record whose maker is gone are cleared away, and what killed forks have left.
///
/// # Errors
/// The directory cannot be listed.
pub fn list(layout: &Layout) -> Result<Vec<Record>> {
    snapshot::sweep(layout);
    let mut records = Vec::new();
    for id in ids(layout)? {
        match Record::load(layout, &id) {
            Ok(record) if record.status == Status::Exited && record.options.auto_remove => {}
            Ok(record) => records.push(record),
            Err(error) => {
                let files = Files::new(layout, &id);
                // One that was just removed, or is not one yet, is nobody's loss; of one that cannot be read it must be said.
                if !matches!(&error, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound) {
                    eprintln!("bulkhead: {}", error.chain());
                }
                if !files.record().exists() && files.lock().exists() && !is_locked(&files.lock()) {
                    forget_names(layout, &id);
                    let _ = remove_files(layout, &files, "");
                }
            }
        }
    }
    records.sort_by_key(|record| std::cmp::Reverse(record.created_ns));
    Ok(records)
}

/// Removes whatever names a container that was never recorded: only the name itself knows whose it is.
fn forget_names(layout: &Layout, id: &str) {
    for entry in fs::read_dir(layout.names()).into_iter().flatten().flatten() {
        if fs::read_to_string(entry.path()).is_ok_and(|owner| owner == id) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> (tempfile::TempDir, Layout) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path()), &crate::settings::Paths::default()).unwrap();
        (dir, layout)
    }

    fn record(reservation: &Reservation) -> Record {
        Record {
            version: RECORD_VERSION,
            id: reservation.id.clone(),
            name: reservation.name.clone(),
            options: RunOptions::default(),
            image: "busybox".into(),
            image_id: "sha256:0".into(),
            command: vec!["true".into()],
            stop_signal: 15,
            status: Status::Running,
            exit: None,
            created_ns: now_ns(),
            started_ns: 0,
            finished_ns: 0,
            supervisor_pid: 1,
            monitor_pid: 1,
            kernel: String::new(),
            guest_id: String::new(),
            given: Network::default(),
        }
    }

    #[test]
    fn a_name_is_taken_once_and_free_again_after_removal() {
        let (_dir, layout) = layout();
        let first = Reservation::make(&layout, Some("web")).unwrap();
        assert!(matches!(Reservation::make(&layout, Some("web")), Err(Error::NameInUse { .. })));
        assert_eq!(fs::read_dir(layout.containers()).unwrap().count(), 1, "the loser leaves nothing");
        remove_files(&layout, &first.files, "web").unwrap();
        assert!(Reservation::make(&layout, Some("web")).is_ok());
    }

    #[test]
    fn a_name_whose_container_is_gone_can_be_taken() {
        let (_dir, layout) = layout();
        let first = Reservation::make(&layout, Some("web")).unwrap();
        fs::remove_dir_all(&first.files.dir).unwrap();
        assert!(Reservation::make(&layout, Some("web")).is_ok());
    }

    #[test]
    fn a_record_whose_supervisor_is_gone_says_so() {
        let (_dir, layout) = layout();
        let reservation = Reservation::make(&layout, None).unwrap();
        let id = reservation.id.clone();
        record(&reservation).save(&reservation.files).unwrap();
        assert_eq!(Record::load(&layout, &id).unwrap().status, Status::Running);
        drop(reservation);
        let after = Record::load(&layout, &id).unwrap();
        assert_eq!((after.status, after.exit.unwrap().code), (Status::Exited, 137));
    }

    #[test]
    fn a_waiter_learns_the_status_of_a_container_that_is_gone() {
        let (_dir, layout) = layout();
        let reservation = Reservation::make(&layout, None).unwrap();
        let files = reservation.files.clone();
        let opened = File::open(files.lock()).unwrap();
        let waiter = std::thread::spawn(move || status_when_free(opened).unwrap());
        remove_files(&layout, &files, &reservation.name).unwrap();
        release(&reservation.into_lock(), 42);
        assert_eq!(waiter.join().unwrap(), Some(42));
        assert_eq!(Record::wait(&files).unwrap(), None, "gone");
    }

    #[test]
    fn find_takes_names_ids_and_prefixes() {
        let (_dir, layout) = layout();
        let web = Reservation::make(&layout, Some("web")).unwrap();
        record(&web).save(&web.files).unwrap();
        assert_eq!(find(&layout, "web").unwrap(), web.id);
        assert_eq!(find(&layout, &web.id).unwrap(), web.id);
        assert_eq!(find(&layout, names::short(&web.id)).unwrap(), web.id);
        assert!(matches!(find(&layout, "nope"), Err(Error::NoSuchContainer(_))));
        assert!(matches!(find(&layout, "../names"), Err(Error::NoSuchContainer(_))));
    }

    #[test]
    fn a_half_made_container_is_cleared_away() {
        let (_dir, layout) = layout();
        drop(Reservation::make(&layout, Some("web")).unwrap());
        assert!(list(&layout).unwrap().is_empty());
        let left = [layout.containers(), layout.names()].map(|dir| fs::read_dir(dir).unwrap().count());
        assert_eq!(left, [0, 0], "containers and names");
    }
}
