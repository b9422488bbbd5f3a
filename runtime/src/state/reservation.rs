//! How a container comes to its id, its name and its directory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::FlockOperation;

use super::{Files, private_dir};
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
        let id = names::new_id()?;
        let files = Files::new(layout, &id);
        private_dir(&files.dir)?;
        match Self::fill(layout, name, &id, &files) {
            Ok((lock, name)) => Ok(Self { files, id, name, lock }),
            Err(error) => {
                let _ = fs::remove_dir_all(&files.dir);
                Err(error)
            }
        }
    }

    fn fill(layout: &Layout, name: Option<&str>, id: &str, files: &Files) -> Result<(File, String)> {
        let lock = create_locked(&files.lock())?;
        private_dir(&layout.names())?;
        for attempt in 0.. {
            let wanted = name.map_or_else(|| names::generate(id, attempt), str::to_owned);
            match take_name(layout, &wanted, id)? {
                None => return Ok((lock, wanted)),
                Some(owner) if name.is_some() => {
                    return Err(Error::NameInUse { name: wanted, id: names::short(&owner).to_owned() });
                }
                Some(_) => {}
            }
        }
        Err(Error::Usage("no name is free".into()))
    }

    /// The lock, to hand to the supervisor.
    #[must_use]
    pub fn into_lock(self) -> File {
        self.lock
    }
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
            if !owner.is_empty() && layout.containers().join(&owner).exists() {
                return Ok(Some(owner));
            }
            let _ = fs::remove_file(&path);
        }
        Ok(Some(String::new()))
    })();
    let _ = fs::remove_file(&temporary);
    result
}

pub(super) fn create_locked(path: &Path) -> Result<File> {
    let what = || format!("cannot lock {}", path.display());
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).context(what)?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive).context(what)?;
    Ok(file)
}
