//! A snapshot's directory while it is made.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

use super::{MACHINE, SnapshotRequest};
use crate::state::private_dir;
use crate::{Context, Error, Result};

/// What is appended to its name until it is complete.
const PARTIAL: &str = ".partial";

/// A directory under another name than it will have. It is removed unless it is finished.
#[derive(Debug)]
pub struct Draft {
    directory: PathBuf,
    partial: PathBuf,
    /// Directories that were made for it to be in, the innermost first: they go with it.
    parents: Vec<PathBuf>,
    /// Held for as long as somebody works on it.
    _lock: File,
}

impl Draft {
    /// Begins `directory`, which must not exist while the one that it is in must.
    ///
    /// # Errors
    /// That is not so, it cannot be made, or somebody else makes one of that name.
    pub fn begin(directory: &Path) -> Result<Self> {
        let directory = absolute(directory)?;
        if fs::symlink_metadata(&directory).is_ok() {
            return Err(exists(&directory));
        }
        let parent = directory.parent().filter(|parent| !parent.is_dir());
        if let Some(parent) = parent {
            return Err(Error::Usage(format!(
                "there is no directory {} for a snapshot to be in",
                parent.display()
            )));
        }
        Self::make(directory, Vec::new())
    }

    /// The same in a directory that exists, if it is empty. Those that it is in are made if they do not.
    ///
    /// # Errors
    /// As [`Self::begin`]; something is in it.
    pub fn fill(directory: &Path) -> Result<Self> {
        let directory = absolute(directory)?;
        match fs::read_dir(&directory).map(Iterator::count) {
            Ok(0) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(_) => return Err(exists(&directory)),
            Err(error) => {
                return Err(error).context(|| format!("cannot make the snapshot {}", directory.display()));
            }
        }
        let missing = directory.ancestors().skip(1).take_while(|parent| !parent.exists());
        let missing: Vec<_> = missing.map(Path::to_owned).collect();
        for (index, parent) in missing.iter().enumerate().rev() {
            if let Err(error) = fs::create_dir(parent) {
                unmake(missing.get(index + 1..).unwrap_or_default());
                return Err(error).context(|| format!("cannot create {}", parent.display()));
            }
        }
        Self::make(directory, missing)
    }

    fn make(directory: PathBuf, parents: Vec<PathBuf>) -> Result<Self> {
        Self::lock(&directory).inspect_err(|_| unmake(&parents)).map(|(partial, _lock)| Self {
            directory,
            partial,
            parents,
            _lock,
        })
    }

    /// Makes the directory that stands for `directory`, and takes its lock.
    fn lock(directory: &Path) -> Result<(PathBuf, File)> {
        let shown = directory.display().to_string();
        let (Some(parent), Some(name)) = (directory.parent(), directory.file_name()) else {
            return Err(Error::Usage(format!("{shown} is no name for a snapshot's directory")));
        };
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
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .inspect_err(|_| drop(fs::remove_dir_all(&partial)))
            .context(what)?;
        Ok((partial, lock))
    }

    /// What the monitor is asked for: its part, with these disks. `durable`: it will survive a loss of power.
    #[must_use]
    pub fn request(&self, durable: bool, disks: Vec<String>) -> SnapshotRequest {
        SnapshotRequest { disks, ..SnapshotRequest::new(self.partial.join(MACHINE), durable) }
    }

    /// Adds the container's part, as JSON in a file of this name, and gives the directory its name. `durable`: it will survive a loss
    /// of power.
    ///
    /// # Errors
    /// It cannot be written; nothing is left then.
    pub fn finish(mut self, name: &str, saved: &impl Serialize, durable: bool) -> Result<()> {
        self.publish(name, saved, durable)
            .inspect(|()| self.parents.clear())
            .context(|| format!("cannot finish the snapshot {}", self.directory.display()))
    }

    fn publish(&mut self, name: &str, saved: &impl Serialize, durable: bool) -> io::Result<()> {
        let path = self.partial.join(name);
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
        unmake(&self.parents);
    }
}

fn absolute(directory: &Path) -> Result<PathBuf> {
    std::path::absolute(directory).context(|| format!("cannot make the snapshot {}", directory.display()))
}

fn exists(directory: &Path) -> Error {
    Error::Usage(format!("{} exists already: remove it first, or give another name", directory.display()))
}

/// Removes directories in which there is nothing.
fn unmake(directories: &[PathBuf]) {
    for directory in directories {
        let _ = fs::remove_dir(directory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_directory_is_filled_and_parents_are_made_and_go_with_what_fails() {
        let place = tempfile::tempdir().unwrap();
        let deep = place.path().join("a/b/image");
        drop(Draft::fill(&deep).unwrap());
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
        Draft::fill(&deep).unwrap().finish("x.json", &1, false).unwrap();
        assert_eq!(fs::read_to_string(deep.join("x.json")).unwrap(), "1");
        assert_eq!(fs::read_dir(place.path().join("a/b")).unwrap().count(), 1);
        for begin in [Draft::fill, Draft::begin] {
            let error = begin(&deep).unwrap_err().to_string();
            assert!(error.contains("exists already"), "{error}");
        }
        let empty = place.path().join("empty");
        fs::create_dir(&empty).unwrap();
        assert!(Draft::begin(&empty).is_err());
        let draft = Draft::fill(&empty).unwrap();
        // Another is in the way while it is made, and afterwards.
        assert!(Draft::fill(&empty).unwrap_err().to_string().contains("in the way"));
        draft.finish("x.json", &2, true).unwrap();
        assert_eq!(fs::read_to_string(empty.join("x.json")).unwrap(), "2");
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(Draft::fill(&file).is_err());
        assert!(Draft::fill(&file.join("below")).is_err());
    }
}
