//! The machine's part of a snapshot, whoever the container in it belongs to.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_protocol::agent::{Empty, SuspendRequest};
use rustix::event::{PollFd, PollFlags, poll};
use vmm::control::{Client, ClientError, Method, SavedDisk, SnapshotRequest, Status};

use crate::guest::{Agent, Guest};
use crate::monitor::Shape;
use crate::supervise::ends_a_program;
use crate::terminal::Signals;
use crate::{Error, Result};

/// How long the containers may take to stand still.
const SUSPEND_PATIENCE: Duration = Duration::from_secs(600);

/// A machine that runs and is to be saved.
pub struct Machine {
    /// "container web".
    what: String,
    client: Client,
    status: Status,
    agent: Agent,
    /// Blocked, so that what is half made is cleared away.
    signals: Signals,
}

/// What becomes of the containers when they are saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// They go on, as soon as the machine does.
    GoOn,
    /// They stand still for as long as the [`Machine`] is there, and are meant to be ended by it: nothing of them happens after
    /// what was saved. If they could not be saved they go on.
    StandStill,
}

/// A machine that was saved.
#[derive(Debug)]
pub struct SavedMachine {
    /// Its processors and memory.
    pub shape: Shape,
    /// Copies of its disks.
    pub disks: Vec<SavedDisk>,
    /// What it cost.
    pub summary: Summary,
}

/// What a snapshot cost.
#[derive(Debug)]
pub struct Summary {
    /// How long the container stood still; of one that does not go on, how long it took.
    pub pause: Duration,
    /// How long the whole machine stood still, in nanoseconds.
    pub machine_pause_ns: u64,
    /// Bytes of memory that were not zero.
    pub memory_bytes: u64,
}

impl Machine {
    /// Reaches the monitor with the control socket `control`, and the agent in its guest. `what` is the container, for errors. Signals
    /// are blocked for as long as the answer is there; whatever is made for the snapshot is to go before it. Must be called in
    /// a process of one thread.
    ///
    /// # Errors
    /// One of them does not answer.
    pub fn reach(control: &Path, guest: &Guest, what: &str) -> Result<Self> {
        let what = what.to_owned();
        let failed = |source| failed(&what, source);
        let signals = Signals::block()?;
        let mut client = Client::connect(control).map_err(failed)?;
        let status = client.status().map_err(failed)?;
        Ok(Self { client, status, agent: guest.agent()?, signals, what })
    }

    /// Its disks that have something in them, by name.
    #[must_use]
    pub fn disks(&self) -> &[String] {
        &self.status.disks
    }

    /// How many empty drives wait for disks.
    #[must_use]
    pub fn empty_drives(&self) -> usize {
        self.status.empty_drives
    }

    /// Saves it, and tells the containers in it what to do `then`. `sync`: files of the host's that it shares are complete then.
    ///
    /// # Errors
    /// The monitor or the agent cannot, or a signal came that ends a program: then the containers go on.
    pub fn save(&mut self, request: SnapshotRequest, then: Then, sync: bool) -> Result<SavedMachine> {
        let Self { what, client, status, agent, signals } = self;
        let start = Instant::now();
        // What the containers have written may have to reach the host's disk first.
        let _ = agent.stream().set_read_timeout(Some(SUSPEND_PATIENCE));
        let _: Empty = agent
            .call("Suspend", &SuspendRequest { sync })
            .map_err(|source| Error::Agent { what: format!("cannot save {what}"), source })?;
        let mut pause = None;
        let went_on = |_| {
            if then == Then::GoOn {
                pause = Some(resume(agent, start));
            }
        };
        let taken = client.snapshot(request, went_on, |socket| wait(socket, signals));
        // Whatever came of it: who could not be saved is not stopped either.
        let pause = match pause {
            Some(pause) => pause,
            None if then == Then::GoOn || taken.is_err() => resume(agent, start),
            None => Ok(start.elapsed()),
        };
        let taken = taken.map_err(|source| failed(what, source))?;
        let summary =
            Summary { pause: pause?, machine_pause_ns: taken.pause_ns, memory_bytes: taken.memory_bytes };
        let shape = Shape { vcpus: status.machine.vcpus, memory_mib: status.machine.memory_mib };
        Ok(SavedMachine { shape, disks: taken.disks, summary })
    }
}

impl Machine {
    /// Ends it at once: its guest does nothing any more, not even close its connections, which those of a machine that goes on from it are.
    pub fn end(mut self) {
        // The monitor's end may come before its answer.
        let _ = self.client.call(Method::Quit);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        Signals::unblock();
    }
}

fn failed(what: &str, source: ClientError) -> Error {
    match source {
        ClientError::Io { source, .. } if source.kind() == io::ErrorKind::Interrupted => Error::Interrupted,
        source => Error::Monitor(format!("cannot save {what}: {}", chain(&source))),
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
