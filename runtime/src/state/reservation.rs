//! How a container comes to its id, its name and its directory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::FlockOperation;

use super::{Files, is_locked, private_dir};
use crate::{Context, Error, Layout, Result, names};

/// A new container's directory, with its lock held.
#[derive(Debug)]
pub struct Reservation {
    /// Its files.
    pub files: Files,
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    lock: File,
}

impl Reservation {
    /// Makes the directory of a new container and takes its name, or leaves nothing behind.
    ///
    /// # Errors
    /// [`Error::NameInUse`], or the directories cannot be written.
    pub fn make(layout: &Layout, name: Option<&str>) -> Result<Self> {
        if let Some(name) = name {
            names::check(name)?;
        }
        let Nameless { files, id, lock } = Nameless::make(layout)?;
        match take(layout, name, &id) {
            Ok(name) => Ok(Self { files, id, name, lock }),
            Err(error) => {
                // Its descriptor may be the one that is missing.
                drop(lock);
                let _ = fs::remove_dir_all(&files.dir);
                Err(error)
            }
        }
    }

    /// The lock, to hand to the supervisor.
    #[must_use]
    pub fn into_lock(self) -> File {
        self.lock
    }
}

/// The directory of a container that is still to come, with its lock held. Without a record nobody takes it for a container, and
/// without its lock the next command that lists containers clears it away.
#[derive(Debug)]
pub(crate) struct Nameless {
    /// Its files.
    pub files: Files,
    /// Its id.
    pub id: String,
    /// Its lock.
    pub lock: File,
}

impl Nameless {
    /// Makes the directory, or leaves nothing behind.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn make(layout: &Layout) -> Result<Self> {
        let id = names::new_id()?;
        let files = Files::new(layout, &id);
        private_dir(&files.dir)?;
        let lock = create_locked(&files.lock()).inspect_err(|_| drop(fs::remove_dir_all(&files.dir)))?;
        Ok(Self { files, id, lock })
    }
}

/// Makes a name belong to `id`: the one that was wished for, or one that is free.
///
/// # Errors
/// [`Error::NameInUse`], it is no name, or the directory cannot be written.
pub(crate) fn take(layout: &Layout, name: Option<&str>, id: &str) -> Result<String> {
    if let Some(name) = name {
        names::check(name)?;
    }
    private_dir(&layout.names())?;
    for attempt in 0.. {
        let wanted = name.map_or_else(|| names::generate(id, attempt), str::to_owned);
        match take_name(layout, &wanted, id)? {
            None => return Ok(wanted),
            Some(owner) if name.is_some() => {
                return Err(Error::NameInUse { name: wanted, id: names::short(&owner).to_owned() });
            }
            Some(_) => {}
        }
    }
    Err(Error::Usage("no name is free".into()))
}

/// Makes `name` belong to `id`. Answers the owner when it belongs to another that exists.
fn take_name(layout: &Layout, name: &str, id: &str) -> Result<Option<String>> {
    let path = layout.names().join(name);
    // Written beside and linked into place: a name never exists without its id.
    let temporary = layout.names().join(format!(".{id}"));
    let what = || format!("cannot write {}", path.display());
    fs::write(&temporary, id).context(what)?;
    let result = (|| {
        for _ in 0..2 {
            match fs::hard_link(&temporary, &path) {
                Ok(()) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).context(what),
            }
            let owner = fs::read_to_string(&path).unwrap_or_default();
            if !owner.is_empty() && layout.containers().join(&owner).exists() && !never_was(layout, &owner) {
                return Ok(Some(owner));
            }
            let _ = fs::remove_file(&path);
        }
        Ok(Some(String::new()))
    })();
    let _ = fs::remove_file(&temporary);
    result
}

/// Whether the container's maker was killed before it had a record.
fn never_was(layout: &Layout, id: &str) -> bool {
    let files = Files::new(layout, id);
    !files.record().exists() && files.lock().exists() && !is_locked(&files.lock())
}

pub(super) fn create_locked(path: &Path) -> Result<File> {
    let what = || format!("cannot lock {}", path.display());
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).context(what)?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive).context(what)?;
    Ok(file)
}
