//! The store's lock, and files that appear complete or not at all.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, RenameFlags, flock, renameat_with, statvfs};
use rustix::io::Errno;

use super::Store;
use crate::{Error, Progress, Result};

/// Held while the store is changed. Adding takes it shared; removing exclusively, so that a layer which one command
/// found present is not removed by another before the first refers to it.
pub(crate) struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// For adding. Clears stale temporary files if nobody else is at work.
    pub(crate) fn shared(store: &Store, progress: &dyn Progress) -> Result<Self> {
        let lock = Self::create(store)?;
        if lock.attempt(FlockOperation::NonBlockingLockExclusive)? {
            store.clear_temporary()?;
        }
        if !lock.attempt(FlockOperation::NonBlockingLockShared)? {
            progress.note("waiting for another command that removes images");
            lock.wait(FlockOperation::LockShared)?;
        }
        Ok(lock)
    }

    /// For removing. Clears stale temporary files.
    pub(crate) fn exclusive(store: &Store) -> Result<Self> {
        let lock = Self::create(store)?;
        lock.wait(FlockOperation::LockExclusive)?;
        store.clear_temporary()?;
        Ok(lock)
    }

    /// For cleaning up where that is possible without waiting.
    pub(crate) fn upgrade_now(&self) -> Result<bool> {
        self.attempt(FlockOperation::NonBlockingLockExclusive)
    }

    fn create(store: &Store) -> Result<Self> {
        for directory in ["names", "images", "blobs/sha256", "layers/sha256", "tmp"] {
            let path = store.root.join(directory);
            let mut builder = fs::DirBuilder::new();
            builder
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(Error::io("create directory", &path))?;
        }
        let path = store.root.join("lock");
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

/// A file in `tmp`, gone when dropped unless published.
#[derive(Debug)]
pub(crate) struct TempFile {
    file: File,
    path: PathBuf,
}

impl TempFile {
    /// A new empty file, readable and writable.
    pub(crate) fn create(store: &Store) -> Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = store.root.join("tmp").join(format!("{}-{serial}", std::process::id()));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(Error::io("create", &path))?;
        Ok(Self { file, path })
    }

    /// A new file that has no name any more: it goes with its last descriptor, even at a kill.
    pub(crate) fn anonymous(store: &Store) -> Result<File> {
        let named = Self::create(store)?;
        named.file.try_clone().map_err(Error::io("duplicate", &named.path))
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its name, complete and on disk. If `replace` is false and there is a file of that name, that one
    /// stays: it has the same content, and running sandboxes share its pages.
    pub(crate) fn publish(self, to: &Path, replace: bool) -> io::Result<()> {
        self.file.sync_data()?;
        let flags = if replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        match renameat_with(rustix::fs::CWD, &self.path, rustix::fs::CWD, to, flags) {
            Err(Errno::EXIST) => return Ok(()),
            // Not every file system knows the flag; replacing is then no worse than one copy more.
            Err(Errno::INVAL) => fs::rename(&self.path, to)?,
            other => other?,
        }
        sync_directory_of(to)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        // After a publication there is nothing of this name, and no one else uses it.
        let _ = fs::remove_file(&self.path);
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
