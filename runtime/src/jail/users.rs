//! Users for monitors: numbers of a range that nobody else uses, one for each living sandbox.
//!
//! A number is claimed by a locked file of its name. Whoever ends removes its file; one that is killed leaves it, unlocked, for the
//! next to take or sweep away.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::settings::Isolation;
use crate::state::private_dir;
use crate::{Context, Error, Result};

/// Name of the directory of claims.
const DIRECTORY: &str = "uids";

/// A user that is one sandbox's alone until this is dropped.
#[derive(Debug)]
pub struct Claim {
    id: u32,
    path: PathBuf,
    _lock: File,
}

impl Claim {
    /// Claims a number of the range for the sandbox `of`, whose path decides which is tried first.
    ///
    /// # Errors
    /// All are in use, or the directory `run` cannot be written.
    pub fn make(run: &Path, settings: &Isolation, of: &Path) -> Result<Self> {
        let home = run.join(DIRECTORY);
        let mut hasher = DefaultHasher::new();
        of.hash(&mut hasher);
        let count = settings.uids.max(1);
        let start = u32::try_from(hasher.finish() % u64::from(count)).unwrap_or(0);
        let numbers = (0..count).map(|step| settings.first_uid + (start + step) % count);
        for id in numbers {
            let path = home.join(id.to_string());
            let claimed =
                claim(&home, &path).context(|| format!("cannot claim the user {}", path.display()))?;
            if let Some(lock) = claimed {
                return Ok(Self { id, path, _lock: lock });
            }
        }
        Err(Error::Usage(format!(
            "all {count} users from {} on are in use by microVMs that run: isolation.uids in the configuration file says how \
             many there are",
            settings.first_uid
        )))
    }

    /// The number, for user and group.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // While it is locked: whoever has opened it meanwhile sees that it is not the one of that name any more.
        let _ = fs::remove_file(&self.path);
        // The last one leaves nothing.
        let _ = self.path.parent().map(fs::remove_dir);
    }
}

/// `None`: somebody has it.
fn claim(home: &Path, path: &Path) -> io::Result<Option<File>> {
    loop {
        private_dir(home).map_err(|error| io::Error::other(error.chain()))?;
        let file = match File::options().write(true).create(true).truncate(false).mode(0o600).open(path) {
            // The last of the others has just taken the directory away.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            locked => locked?,
        }
        let named = fs::symlink_metadata(path).is_ok_and(|named| {
            file.metadata().is_ok_and(|ours| (ours.dev(), ours.ino()) == (named.dev(), named.ino()))
        });
        if named {
            return Ok(Some(file));
        }
    }
}

/// Removes the claims of who was killed.
pub fn sweep(run: &Path) {
    let home = run.join(DIRECTORY);
    for entry in fs::read_dir(&home).into_iter().flatten().flatten() {
        let path = entry.path();
        if let Ok(Some(lock)) = claim(&home, &path) {
            drop(Claim { id: 0, path, _lock: lock });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(uids: u32) -> Isolation {
        Isolation { first_uid: 1000, uids, ..Isolation::default() }
    }

    #[test]
    fn no_two_have_the_same_and_the_last_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let claim = |name: &str| Claim::make(dir.path(), &settings(3), Path::new(name));
        let claims: Vec<_> = ["a", "a", "b"].iter().map(|name| claim(name).unwrap()).collect();
        let mut ids: Vec<_> = claims.iter().map(Claim::id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [1000, 1001, 1002]);
        let error = claim("c").unwrap_err().to_string();
        assert!(error.contains("isolation.uids"), "{error}");
        drop(claims);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let first = claim("a").unwrap().id();
        assert_eq!(claim("a").unwrap().id(), first, "the same is tried first");
    }

    #[test]
    fn who_was_killed_leaves_its_number_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join(DIRECTORY);
        fs::create_dir(&home).unwrap();
        fs::write(home.join("1000"), "").unwrap();
        let claimed = Claim::make(dir.path(), &settings(1), Path::new("a")).unwrap();
        sweep(dir.path());
        assert!(home.join("1000").exists(), "it is in use");
        std::mem::forget(claimed);
        fs::write(home.join("1001"), "").unwrap();
        sweep(dir.path());
        assert!(!home.join("1001").exists());
    }

    #[test]
    fn many_at_once_do_not_meet() {
        let dir = tempfile::tempdir().unwrap();
        let used = std::sync::Mutex::new(std::collections::HashSet::new());
        std::thread::scope(|scope| {
            for name in ["a", "b", "c", "d"] {
                let (dir, used) = (dir.path(), &used);
                scope.spawn(move || {
                    for _ in 0..50 {
                        let claim = Claim::make(dir, &settings(5), Path::new(name)).unwrap();
                        assert!(used.lock().unwrap().insert(claim.id()));
                        std::thread::yield_now();
                        assert!(used.lock().unwrap().remove(&claim.id()));
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
