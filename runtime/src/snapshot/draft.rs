//! A snapshot's directory while it is made.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::{CONTAINER, MACHINE, Saved};
use crate::state::private_dir;
use crate::{Context, Error, Result};

/// What is appended to its name until it is complete.
const PARTIAL: &str = ".partial";

/// A directory under another name than it will have. It is removed unless it is finished.
pub(super) struct Draft {
    directory: PathBuf,
    partial: PathBuf,
    /// Held for as long as somebody works on it.
    _lock: File,
}

impl Draft {
    /// Begins `directory`, which must not exist while the one that it is in must.
    pub fn begin(directory: &Path) -> Result<Self> {
        let directory = std::path::absolute(directory)
            .context(|| format!("cannot make the snapshot {}", directory.display()))?;
        let shown = directory.display().to_string();
        if fs::symlink_metadata(&directory).is_ok() {
            return Err(Error::Usage(format!(
                "{shown} exists already: remove it first, or give another name"
            )));
        }
        let (Some(parent), Some(name)) = (directory.parent(), directory.file_name()) else {
            return Err(Error::Usage(format!("{shown} is no name for a snapshot's directory")));
        };
        if !parent.is_dir() {
            return Err(Error::Usage(format!(
                "there is no directory {} for a snapshot to be in",
                parent.display()
            )));
        }
        let mut partial = name.to_owned();
        partial.push(PARTIAL);
        let partial = parent.join(partial);
        let what = || format!("cannot make the snapshot {shown}");
        let lock_path = partial.join("lock");
        if fs::symlink_metadata(&partial).is_ok() {
            // Of one that was killed half-way, unless it is none of ours, or somebody works on it.
            let lock = File::open(&lock_path);
            if !lock.is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()) {
                return Err(Error::Usage(format!(
                    "{} is in the way of a snapshot: another is being made, or it is not ours",
                    partial.display()
                )));
            }
            fs::remove_dir_all(&partial).context(what)?;
        }
        private_dir(&partial)?;
        let lock = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&lock_path);
        let lock = lock.inspect_err(|_| drop(fs::remove_dir_all(&partial))).context(what)?;
        let draft = Self { directory, partial, _lock: lock };
        flock(&draft._lock, FlockOperation::NonBlockingLockExclusive).context(what)?;
        Ok(draft)
    }

    /// Where the monitor is to put its part.
    pub fn machine(&self) -> PathBuf {
        self.partial.join(MACHINE)
    }

    /// Adds the container's part and gives the directory its name.
    pub fn finish(self, saved: &Saved, durable: bool) -> Result<()> {
        self.publish(saved, durable)
            .context(|| format!("cannot finish the snapshot {}", self.directory.display()))
    }

    fn publish(&self, saved: &Saved, durable: bool) -> io::Result<()> {
        let path = self.partial.join(CONTAINER);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(&serde_json::to_vec_pretty(saved)?)?;
        fs::remove_file(self.partial.join("lock"))?;
        if durable {
            file.sync_all()?;
            File::open(&self.partial)?.sync_all()?;
        }
        fs::rename(&self.partial, &self.directory)?;
        match self.directory.parent() {
            Some(parent) if durable => File::open(parent)?.sync_all(),
            _ => Ok(()),
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // What is finished has another name.
        let _ = fs::remove_dir_all(&self.partial);
    }
}
