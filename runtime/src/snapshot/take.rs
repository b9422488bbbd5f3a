//! Saves a container that runs.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_protocol::agent::Empty;
use rustix::event::{PollFd, PollFlags, poll};
use vmm::control::{Client, ClientError, SnapshotRequest};

use super::draft::Draft;
use super::{MACHINE, Saved, VERSION};
use crate::guest::{Agent, Guest};
use crate::monitor::Shape;
use crate::network::NetworkWish;
use crate::state::{Files, Record, now_ns};
use crate::supervise::ends_a_program;
use crate::terminal::Signals;
use crate::{Context, Error, Layout, Result, names, stop};

/// What a snapshot cost.
#[derive(Debug)]
pub struct Summary {
    /// How long the container stood still.
    pub pause: Duration,
    /// How long the whole machine stood still, in nanoseconds.
    pub machine_pause_ns: u64,
    /// Bytes of memory that were not zero.
    pub memory_bytes: u64,
}

/// How a container is saved.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    /// It survives a loss of power.
    pub durable: bool,
    /// Memory and disk are compressed: copies take longer to start, and have no memory in common.
    pub compress: bool,
    /// Another container's snapshot, or an earlier one of this: only what differs from it is written, and copies need both.
    pub base: Option<PathBuf>,
}

/// Saves a running container to `directory`, which must not exist. The container goes on.
///
/// # Errors
/// It does not run, it has what cannot be saved, the directory cannot be written, or a signal came: nothing is left.
pub fn take(layout: &Layout, record: &Record, directory: &Path, manner: &Manner) -> Result<Summary> {
    stop::running(record)?;
    refuse(record)?;
    let Manner { durable, compress, .. } = *manner;
    let base = manner.base.as_deref().map(base).transpose()?;
    let what = || format!("cannot save container {}", names::short(&record.id));
    let failed = |source: ClientError| match source {
        ClientError::Io { source, .. } if source.kind() == io::ErrorKind::Interrupted => Error::Interrupted,
        source => Error::Monitor(format!("{}: {}", what(), chain(&source))),
    };
    let files = Files::new(layout, &record.id);
    let draft = Draft::begin(directory)?;
    let signals = Signals::block()?;
    let mut client = Client::connect(&files.control()).map_err(failed)?;
    let status = client.status().map_err(failed)?;
    let mut agent = Guest::new(&files.vsock()).agent()?;
    let disks = status.disks.into_iter().filter(|id| id == "scratch").collect();
    let request = SnapshotRequest { disks, compress, base, ..SnapshotRequest::new(draft.machine(), durable) };

    let start = Instant::now();
    let _: Empty =
        agent.call("Suspend", &Empty {}).map_err(|source| Error::Agent { what: what(), source })?;
    let mut pause = None;
    let taken = client.snapshot(
        request,
        |_| pause = Some(resume(&mut agent, start)),
        |socket| wait(socket, &signals),
    );
    let pause = pause.unwrap_or_else(|| resume(&mut agent, start));
    let taken = taken.map_err(failed)?;
    let hostname = record.options.hostname.clone().unwrap_or_else(|| names::short(&record.id).to_owned());
    let saved = Saved {
        version: VERSION,
        taken_ns: now_ns(),
        record: record.clone(),
        hostname,
        shape: Shape { vcpus: status.machine.vcpus, memory_mib: status.machine.memory_mib },
        disks: taken.disks,
    };
    draft.finish(&saved, durable)?;
    Signals::unblock();
    Ok(Summary { pause: pause?, machine_pause_ns: taken.pause_ns, memory_bytes: taken.memory_bytes })
}

/// The machine's part of the snapshot in `directory`.
fn base(directory: &Path) -> Result<PathBuf> {
    Saved::load(directory)?;
    let found = fs::canonicalize(directory.join(MACHINE));
    found.context(|| format!("cannot take the difference from {}", directory.display()))
}

/// What a copy could not have.
fn refuse(record: &Record) -> Result<()> {
    let id = names::short(&record.id);
    match &record.options.network {
        NetworkWish::Namespace(namespace) => Err(Error::Usage(format!(
            "container {id} is in the network namespace {namespace}, in which no copy of it could be: a container with \
             --network none or passt can be saved"
        ))),
        NetworkWish::None | NetworkWish::Passt => Ok(()),
    }
}

/// Lets the container go on; answers how long it stood still.
fn resume(agent: &mut Agent, start: Instant) -> Result<Duration> {
    let resumed: Result<Empty, _> = agent.call("Resume", &Empty {});
    resumed.map_err(|source| Error::Agent { what: "cannot let the container go on".into(), source })?;
    Ok(start.elapsed())
}

/// Waits for the monitor, or for somebody who gives up.
fn wait(socket: BorrowedFd<'_>, signals: &Signals) -> io::Result<()> {
    loop {
        let mut fds = [PollFd::new(&socket, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result.map(drop)?,
        }
        if std::iter::from_fn(|| signals.next()).any(ends_a_program) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
