//! The store's locks, and files that appear complete or not at all.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{
    AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags, flock, linkat, renameat_with, statvfs,
};
use rustix::io::Errno;

use super::Store;
use crate::{Error, Progress, Result};

/// Held while the store is changed. Adding takes it shared; removing layers exclusively, so that a layer which one
/// command found present is not removed by another before the first refers to it.
pub(crate) struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// For adding. Clears stale temporary files if nobody else is at work.
    pub(crate) fn shared(store: &Store, progress: &dyn Progress) -> Result<Self> {
        let lock = Self::create(store, "lock")?;
        if lock.attempt(FlockOperation::NonBlockingLockExclusive)? {
            store.clear_temporary()?;
        }
        if !lock.attempt(FlockOperation::NonBlockingLockShared)? {
            progress.note("waiting for another command that removes images");
            lock.wait(FlockOperation::LockShared)?;
        }
        Ok(lock)
    }

    /// For removing layers. Waits until nothing is being added. Clears stale temporary files.
    pub(crate) fn exclusive(store: &Store) -> Result<Self> {
        let lock = Self::create(store, "lock")?;
        lock.wait(FlockOperation::LockExclusive)?;
        store.clear_temporary()?;
        Ok(lock)
    }

    /// The same without waiting; none if something is being added.
    pub(crate) fn exclusive_now(store: &Store) -> Result<Option<Self>> {
        let lock = Self::create(store, "lock")?;
        Ok(lock.attempt(FlockOperation::NonBlockingLockExclusive)?.then_some(lock))
    }

    /// For a change of names and records, which takes moments. Taken last, whatever other lock is held.
    pub(crate) fn records(store: &Store) -> Result<Self> {
        let lock = Self::create(store, "records.lock")?;
        lock.wait(FlockOperation::LockExclusive)?;
        Ok(lock)
    }

    /// For cleaning up where that is possible without waiting.
    pub(crate) fn upgrade_now(&self) -> Result<bool> {
        self.attempt(FlockOperation::NonBlockingLockExclusive)
    }

    fn create(store: &Store, name: &str) -> Result<Self> {
        for directory in ["names", "images", "blobs/sha256", "layers/sha256", "tmp"] {
            let path = store.root.join(directory);
            let mut builder = fs::DirBuilder::new();
            builder
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(Error::io("create directory", &path))?;
        }
        let path = store.root.join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(Error::io("open", &path))?;
        Ok(Self { file, path })
    }

    fn attempt(&self, operation: FlockOperation) -> Result<bool> {
        match rustix::io::retry_on_intr(|| flock(&self.file, operation)) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(Error::io("lock", &self.path)(error)),
        }
    }

    fn wait(&self, operation: FlockOperation) -> Result<()> {
        rustix::io::retry_on_intr(|| flock(&self.file, operation)).map_err(Error::io("lock", &self.path))
    }
}

/// A file being written, gone when dropped unless published.
///
/// Where the file system can (all common ones but NFS), it has no name meanwhile, so that it is gone after a kill too;
/// elsewhere it is in `tmp`.
#[derive(Debug)]
pub(crate) struct TempFile {
    file: File,
    /// Its name in `tmp`.
    path: Option<PathBuf>,
}

impl TempFile {
    /// A new empty file, readable and writable.
    pub(crate) fn create(store: &Store) -> Result<Self> {
        let directory = store.root.join("tmp");
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(&directory, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Ok(Self { file: file.into(), path: None }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Self::named(store),
            Err(error) => Err(Error::io("create a file in", &directory)(error)),
        }
    }

    /// The same with a name, for what replaces another file.
    pub(crate) fn named(store: &Store) -> Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = store.root.join("tmp").join(format!("{}-{serial}", std::process::id()));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(Error::io("create", &path))?;
        Ok(Self { file, path: Some(path) })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The file alone; it goes with its last descriptor.
    pub(crate) fn into_anonymous(self) -> Result<File> {
        self.file.try_clone().map_err(Error::io("duplicate a descriptor of", Path::new("a temporary file")))
    }

    /// Gives the file its name, complete and on disk. If there is a file of that name, that one stays: it has the same
    /// content, and running sandboxes share its pages.
    pub(crate) fn publish(self, to: &Path) -> io::Result<()> {
        self.file.sync_data()?;
        let result = match &self.path {
            None => self.link(to),
            Some(path) => match renameat_with(CWD, path, CWD, to, RenameFlags::NOREPLACE) {
                // Not every file system knows the flag; replacing is then no worse than one copy more.
                Err(Errno::INVAL) => rustix::fs::rename(path, to),
                other => other,
            },
        };
        match result {
            Err(Errno::EXIST) => Ok(()),
            other => other.map_err(io::Error::from).and_then(|()| sync_directory_of(to)),
        }
    }

    /// Gives the file its name, in place of what went by it. The file must have been made by [`TempFile::named`].
    pub(crate) fn replace(self, to: &Path) -> io::Result<()> {
        self.file.sync_data()?;
        fs::rename(self.path.as_deref().ok_or(io::ErrorKind::InvalidInput)?, to)?;
        sync_directory_of(to)
    }

    fn link(&self, to: &Path) -> rustix::io::Result<()> {
        match linkat(&self.file, "", CWD, to, AtFlags::EMPTY_PATH) {
            // Older kernels want CAP_DAC_READ_SEARCH for that.
            Err(Errno::NOENT | Errno::PERM) => {
                let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                linkat(CWD, path, CWD, to, AtFlags::SYMLINK_FOLLOW)
            }
            other => other,
        }
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // After a publication there is nothing of this name, and no one else uses it.
            let _ = fs::remove_file(path);
        }
    }
}

/// Makes a rename or removal last.
pub(super) fn sync_directory_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

impl Store {
    /// Only under the exclusive lock: whoever writes a temporary file holds the lock at least shared.
    fn clear_temporary(&self) -> Result<()> {
        let directory = self.root.join("tmp");
        let entries = fs::read_dir(&directory).map_err(Error::io("list", &directory))?;
        for entry in entries {
            let path = entry.map_err(Error::io("list", &directory))?.path();
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        Ok(())
    }

    /// Bytes free for us on the store's file system.
    pub(crate) fn free_space(&self) -> u64 {
        statvfs(&self.root).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// A write into the store failed.
    pub(crate) fn write_error(&self, what: &str, needed: u64, source: io::Error) -> Error {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::NoSpace {
                path: self.root.clone(),
                what: what.to_owned(),
                needed,
                free: self.free_space(),
            },
            _ => Error::Io { action: "write", path: self.root.join(what), source },
        }
    }
}
