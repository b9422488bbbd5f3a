//! Pools: machines that are ready before anybody asks for their container.
//!
//! A pool has a *keeper*, a process that holds its lock. The keeper forks a future supervisor for each machine; that one starts the
//! machine, has the image's layers mounted in it and waits. Whoever runs a container of that kind connects to one of
//! them and sends it what the container is, with its own standard streams; from then on it is the container's supervisor like any other
//! (decision 0001), in a session of its own, and the keeper makes the next.
//!
//! | place | what |
//! |---|---|
//! | `pools/<id>/` | `lock`, held by the keeper; `pool.json`, what it is of |
//! | `warm/<kind>.<container id>` | a machine that can be had; the kind says for which containers |
//! | `containers/<container id>/` | its files, without a record: no container yet |
//! | `<run>/pool-<id>` | the keeper's socket |
//! | `<run>/<container id>/take` | the socket of one that waits |
//!
//! When the keeper ends, however, those that wait see it and end; what is left when all are killed at once is cleared away by the next
//! command that lists containers or pools.

mod control;
mod keeper;
mod kind;
mod letter;
mod take;
mod waiter;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::launch::become_supervisor;
use crate::network::NetworkWish;
use crate::state::{self, private_dir};
use crate::{Context, Error, Layout, Result, names};

use control::Ask;
use keeper::Keeper;
pub(crate) use take::take;

/// Most machines of one pool: the keeper has two descriptors for each.
pub const MOST: u32 = 256;
/// Letters of a pool's id.
const ID: usize = 12;
/// How long a keeper may take to put its pool away.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a pool is to hold: all of its containers' wishes that a machine must know before it starts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Wishes {
    /// The image, as the person called it.
    pub image: String,
    /// How many machines wait.
    pub count: u32,
    /// As in [`crate::options::RunOptions`].
    pub memory: Option<u64>,
    /// Likewise.
    pub milli_cpus: Option<u64>,
    /// Likewise.
    pub storage: Option<u64>,
    /// None, or passt without ports.
    pub network: NetworkWish,
}

impl Wishes {
    /// Names the pool: the same wishes, whatever their number, are the same pool.
    fn id(&self) -> Result<String> {
        let wishes = Self { count: 0, ..self.clone() };
        let text = serde_json::to_vec(&wishes).context(|| "cannot name a pool".into())?;
        let digest = names::hex(&Sha256::digest(&text));
        Ok(digest.get(..ID).unwrap_or(&digest).to_owned())
    }
}

/// How a pool is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// 12 hexadecimal digits.
    pub id: String,
    /// What it is to hold.
    pub wishes: Wishes,
    /// The image that its name means now; empty when it means none.
    pub image_id: String,
    /// Machines that can be had.
    pub waiting: u32,
    /// Machines that are being made.
    pub warming: u32,
    /// Machines that were taken since it exists.
    pub taken: u64,
    /// Why it is not full, if that is not just a matter of time.
    pub problem: Option<String>,
    /// The keeper's process id.
    pub pid: u32,
    /// Nanoseconds since the epoch.
    pub created_ns: u64,
}

/// What is known of a pool without its keeper: `pool.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    image_id: String,
}

/// Where a pool's things are.
#[derive(Clone, Debug)]
struct Place {
    dir: PathBuf,
    socket: PathBuf,
}

impl Place {
    fn new(layout: &Layout, id: &str) -> Self {
        Self { dir: layout.pools().join(id), socket: layout.run.join(format!("pool-{id}")) }
    }

    fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }

    fn record(&self) -> PathBuf {
        self.dir.join("pool.json")
    }

    /// Removes everything, the directory of all pools too when this was the last. The lock is held, or was found free.
    fn remove(&self) {
        let _ = fs::remove_file(&self.socket);
        let _ = fs::remove_dir_all(&self.dir);
        let _ = self.dir.parent().map(fs::remove_dir);
    }
}

/// Makes a pool and fills it, or changes how many machines wait in one; returns when all do. A signal ends the waiting, not the pool.
///
/// Must be called before the process has made a thread: the keeper is a fork of it.
///
/// # Errors
/// The wishes make no sense, or a machine cannot be made: a new pool is gone again then.
pub fn warm(layout: &Layout, wishes: &Wishes) -> Result<Status> {
    if !(1..=MOST).contains(&wishes.count) {
        return Err(Error::Usage(format!("a pool has 1 to {MOST} machines, not {}", wishes.count)));
    }
    if matches!(wishes.network, NetworkWish::Namespace(_)) {
        return Err(Error::Usage(
            "a network namespace has room for one machine, whose container is known: a pool is for --network none or \
             passt"
                .into(),
        ));
    }
    sweep(layout)?;
    let id = wishes.id()?;
    let place = Place::new(layout, &id);
    let new = match lock(&place)? {
        Some(lock) => {
            if let Err(error) = begin(layout, &id, wishes, lock, &place) {
                place.remove();
                return Err(error);
            }
            true
        }
        None => false,
    };
    let wire = control::connect(&place.socket)?;
    let ask = |ask: &Ask| wire.send(ask).context(|| format!("cannot reach the keeper of pool {id}"));
    ask(&Ask::Warm { count: wishes.count })?;
    loop {
        let gone = || Error::Monitor(format!("the keeper of pool {id} has ended"));
        let status: Status = wire.receive().ok_or_else(gone)?;
        match &status.problem {
            Some(problem) => {
                if new {
                    cool(layout, &id)?;
                }
                return Err(Error::Monitor(format!("pool {id} cannot be filled: {problem}")));
            }
            None if status.waiting >= wishes.count => return Ok(status),
            None => {}
        }
    }
}

/// Takes the lock of a new pool. `None`: it has a keeper.
fn lock(place: &Place) -> Result<Option<File>> {
    let what = || format!("cannot lock {}", place.dir.display());
    loop {
        private_dir(&place.dir)?;
        let open = File::options().write(true).create(true).truncate(false).open(place.lock());
        let file = match open {
            // Another command has just cleared it away.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            open => open.context(what)?,
        };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(None);
        }
        if place.lock().exists() {
            return Ok(Some(file));
        }
    }
}

/// Forks the keeper of a new pool. It listens when this returns.
fn begin(layout: &Layout, id: &str, wishes: &Wishes, lock: File, place: &Place) -> Result<()> {
    private_dir(&layout.run)?;
    let _ = fs::remove_file(&place.socket);
    let listener = control::listen(&place.socket)?;
    let keeper = Keeper::new(layout, id, wishes, lock, listener, place)?;
    // SAFETY: the process has one thread (see `warm`), so the child may go on as if nothing had happened.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()).context(|| "cannot fork a pool's keeper".into()),
        0 => {
            become_supervisor();
            keeper.keep();
            // SAFETY: _exit has no preconditions; the caller's exit handlers are not this process's.
            unsafe { libc::_exit(0) }
        }
        _ => Ok(()),
    }
}

/// All pools, by their images' names.
///
/// # Errors
/// Their directory cannot be read.
pub fn list(layout: &Layout) -> Result<Vec<Status>> {
    let mut found = Vec::new();
    for id in sweep(layout)? {
        let place = Place::new(layout, &id);
        // One that has just ended is none.
        let asked = control::connect(&place.socket).ok().filter(|wire| wire.send(&Ask::Status).is_ok());
        found.extend(asked.and_then(|wire| wire.receive::<Status>()));
    }
    found.sort_by(|a, b| (&a.wishes.image, &a.id).cmp(&(&b.wishes.image, &b.id)));
    Ok(found)
}

/// The ids of the images that pools are of: they are in use.
///
/// # Errors
/// Their directory cannot be read.
pub fn images(layout: &Layout) -> Result<Vec<String>> {
    let ids = sweep(layout)?;
    let record = |id: &String| {
        let text = fs::read(Place::new(layout, id).record()).ok()?;
        serde_json::from_slice::<Record>(&text).ok()
    };
    Ok(ids.iter().filter_map(record).map(|record| record.image_id).collect())
}

/// Ends the pool that an id, its beginning or an image's name means; several where several are of that image. Machines that were taken run on.
/// Answers the ids.
///
/// # Errors
/// There is none.
pub fn cool(layout: &Layout, wanted: &str) -> Result<Vec<String>> {
    let pools = list(layout)?;
    let by_id: Vec<_> = pools.iter().filter(|pool| pool.id.starts_with(wanted)).collect();
    let chosen = match by_id[..] {
        [one] => vec![one],
        _ => pools.iter().filter(|pool| pool.wishes.image == wanted).collect(),
    };
    if chosen.is_empty() {
        return Err(Error::Usage(match by_id[..] {
            [] => format!("there is no pool {wanted} (`bulkhead pool ls` lists them)"),
            _ => format!("{wanted:?} is the beginning of several pools' ids: write more of it"),
        }));
    }
    let ids: Vec<_> = chosen.into_iter().map(|pool| pool.id.clone()).collect();
    for id in &ids {
        end(&Place::new(layout, id), id)?;
    }
    // What machines that were killed have left.
    state::list(layout)?;
    Ok(ids)
}

fn end(place: &Place, id: &str) -> Result<()> {
    let Ok(wire) = control::connect(&place.socket) else { return Ok(()) };
    let _ = wire.send(&Ask::Cool);
    let deadline = Instant::now() + PATIENCE;
    // The keeper says nothing more, and is gone when all is.
    while wire.receive::<Status>().is_some() {}
    while state::is_locked(&place.lock()) {
        if Instant::now() > deadline {
            return Err(Error::Monitor(format!("the keeper of pool {id} does not end: kill its process")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Clears away what pools whose keepers were killed have left; answers the ids of the others.
fn sweep(layout: &Layout) -> Result<Vec<String>> {
    let what = || format!("cannot list {}", layout.pools().display());
    let entries = match fs::read_dir(layout.pools()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(what),
    };
    let mut alive = Vec::new();
    let mut swept = false;
    for id in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let place = Place::new(layout, &id);
        if state::is_locked(&place.lock()) {
            alive.push(id);
            continue;
        }
        // Taken for as long as it is cleared away, so that nobody begins it anew meanwhile.
        let lock = File::open(place.lock());
        if let Ok(lock) = lock
            && flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            place.remove();
            swept = true;
        }
    }
    if swept {
        forget_dead(layout);
        state::list(layout)?;
    }
    Ok(alive)
}

/// Removes what says of machines that they can be had which are not there any more.
fn forget_dead(layout: &Layout) {
    for entry in fs::read_dir(layout.warm()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(kind::container);
        if !id.is_some_and(|id| state::is_locked(&state::Files::new(layout, id).lock())) {
            forget(layout, &entry.path());
        }
    }
}

/// Takes one machine out of the list, and the list away when it was the last.
fn forget(layout: &Layout, entry: &Path) {
    let _ = fs::remove_file(entry);
    let _ = fs::remove_dir(layout.warm());
}
