//! Makes copies of a container that runs.

use std::fs::{self, File};
use std::path::PathBuf;

use bulkhead_image::Store;
use rustix::fs::{FlockOperation, flock};

use super::{Manner, Summary, Wishes, restore, take};
use crate::launch::Launched;
use crate::network::NetworkWish;
use crate::state::{Record, private_dir};
use crate::{Context, Error, Layout, Result, Settings, names};

/// What became of a fork.
#[derive(Debug)]
pub struct Forked {
    /// What the snapshot in between cost.
    pub summary: Summary,
    /// The copies' ids, and why there are no more when there are fewer than asked for.
    pub copies: Vec<Result<String>>,
}

/// Makes `count` copies of a running container, each in a machine of its own, which go on from the same moment in the background.
/// With a `name` they are called NAME-1, NAME-2, …, or NAME when there is one. Ports are not published for them.
///
/// Must be called before the process has made a thread: each supervisor is a fork of it.
///
/// # Errors
/// As [`take()`]. What befalls one of the copies is in the answer.
pub fn fork(
    layout: &Layout,
    store: &Store,
    record: &Record,
    count: u32,
    wishes: &Wishes,
    settings: &Settings,
) -> Result<Forked> {
    if let NetworkWish::Namespace(namespace) = &record.options.network {
        return Err(Error::Usage(format!(
            "container {} is in the {namespace}, in which there is room for one: no copy could be beside it. `bulkhead snapshot` \
             saves it, and `bulkhead restore --network ns:PATH` gives each copy a namespace of its own",
            names::short(&record.id)
        )));
    }
    let place = Place::make(layout)?;
    let directory = place.path.join("snapshot");
    let summary = take(layout, record, &directory, &Manner::default())?;
    let mut copies = Vec::new();
    for number in 1..=count {
        let name = wishes.name.as_ref().map(|name| match count {
            1 => name.clone(),
            _ => format!("{name}-{number}"),
        });
        let publish = Some(wishes.publish.clone().unwrap_or_default());
        let wishes = Wishes { detach: true, name, publish, ..wishes.clone() };
        let copy = match restore(layout, store, &directory, &wishes, settings) {
            Ok(Launched::Detached { id }) => Ok(id),
            Ok(Launched::Exited { error, .. }) => Err(Error::Monitor(error)),
            Err(error) => Err(error),
        };
        let failed = copy.is_err();
        copies.push(copy);
        if failed {
            break;
        }
    }
    Ok(Forked { summary, copies })
}

/// Where the snapshot is until its copies run: they have what they need of it open then.
struct Place {
    path: PathBuf,
    /// Held for as long as it is used.
    _lock: File,
}

/// Where forks have their places.
fn home(layout: &Layout) -> PathBuf {
    layout.data.join("forks")
}

impl Place {
    fn make(layout: &Layout) -> Result<Self> {
        let home = home(layout);
        sweep(layout);
        private_dir(&home)?;
        let mut name = [0; 8];
        names::random(&mut name)?;
        let path = home.join(names::hex(&name));
        let what = || format!("cannot make {}", path.display());
        // Nobody may take a place for one that was left before its lock is held.
        let making = File::open(&home).context(what)?;
        flock(&making, FlockOperation::LockExclusive).context(what)?;
        private_dir(&path)?;
        let lock = File::create_new(path.join("lock")).context(what)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).context(what)?;
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
        // The last one leaves nothing at all.
        let _ = self.path.parent().map(fs::remove_dir);
    }
}

/// Removes what forks that were killed have left.
pub(crate) fn sweep(layout: &Layout) {
    let home = home(layout);
    let Ok(making) = File::open(&home) else { return };
    if flock(&making, FlockOperation::NonBlockingLockExclusive).is_err() {
        return;
    }
    let Ok(entries) = fs::read_dir(&home) else { return };
    for entry in entries.flatten() {
        let used = File::open(entry.path().join("lock"))
            .is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err());
        if !used {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    // Not if there is one in use.
    let _ = fs::remove_dir(home);
}
