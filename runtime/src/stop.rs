//! Ending containers, and putting away what is left of them.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use bulkhead_protocol::agent::{
    ContainerRequest, Empty, ListProcessesResponse, SignalProcessRequest, StatsResponse,
};
use bulkhead_protocol::client::CallError;
use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::guest::Guest;
use crate::state::{Files, Record, Status, is_locked, remove_files};
use crate::{Context, Error, Layout, Result, names};

/// How long the supervisor may take to put everything away after the container's end.
const PUT_AWAY: Duration = Duration::from_secs(20);
/// How long a process that was killed may take to be gone.
const KILLED: Duration = Duration::from_secs(5);
/// How long the agent is listened to, at least, before its machine is taken for one that stands still.
const ANSWER: Duration = Duration::from_secs(5);
/// And at most.
const LONG_ANSWER: Duration = Duration::from_secs(30);

/// Sends a signal to the container's init. One that does not answer can still be killed: its machine ends.
///
/// # Errors
/// The container does not run, or its agent does not answer.
pub fn kill(layout: &Layout, record: &Record, signal: u32) -> Result<()> {
    let files = Files::new(layout, &record.id);
    let kills = signal == libc::SIGKILL.unsigned_abs();
    match signal_within(&files, record, signal, if kills { ANSWER } else { LONG_ANSWER }) {
        Err(Error::Io { .. } | Error::Monitor(_) | Error::Agent { source: CallError::Io { .. }, .. })
            if kills && Record::load(layout, &record.id)?.status == Status::Running =>
        {
            end_machine(layout, record, &files)
        }
        result => result,
    }
}

fn signal_within(files: &Files, record: &Record, signal: u32, patience: Duration) -> Result<()> {
    running(record)?;
    let mut agent = Guest::new(&files.vsock()).agent_within(patience, patience)?;
    let request = SignalProcessRequest {
        container: record.in_guest().to_owned(),
        exec: String::new(),
        signal,
        all: false,
    };
    let _: Empty = agent
        .call("SignalProcess", &request)
        .context(|| format!("cannot signal container {}", names::short(&record.id)))?;
    Ok(())
}

/// Ends a container: its stop signal, then after `patience` SIGKILL, then the microVM itself. `None`: no limit.
///
/// # Errors
/// Not even its processes can be killed.
pub fn stop(layout: &Layout, record: &Record, patience: Option<Duration>) -> Result<()> {
    if record.status == Status::Exited {
        return Ok(());
    }
    let files = Files::new(layout, &record.id);
    let answer = patience.map_or(LONG_ANSWER, |patience| patience.clamp(ANSWER, LONG_ANSWER));
    let signal = |signal| signal_within(&files, record, signal, answer).is_ok();
    if record.status == Status::Running && signal(record.stop_signal) {
        match patience {
            None => return Record::wait(&files).map(drop),
            Some(patience) if ended_within(&files, patience)? => return Ok(()),
            Some(_) => {}
        }
        if signal(libc::SIGKILL.unsigned_abs()) && ended_within(&files, PUT_AWAY)? {
            return Ok(());
        }
    }
    end_machine(layout, record, &files)
}

/// Ends the microVM under a container whose agent does not answer, and the processes around it if they do not answer either:
/// one that stands still can be killed all the same.
fn end_machine(layout: &Layout, record: &Record, files: &Files) -> Result<()> {
    let told = vmm::control::Client::connect(&files.control())
        .and_then(|mut client| client.call(vmm::control::Method::Quit));
    // One that ends as it should does so well within this; else the container may be about to end for another reason.
    if ended_within(files, if told.is_ok() { PUT_AWAY } else { Duration::from_secs(1) })? {
        return Ok(());
    }
    // A record that is older than its machine does not know the monitor yet.
    let record = Record::load(layout, &record.id).unwrap_or_else(|_| record.clone());
    let is_ours = |pid| parent(pid) == Some(record.supervisor_pid);
    if kill_if(record.monitor_pid, is_ours) && ended_within(files, KILLED)? {
        return Ok(());
    }
    // Its supervisor holds the lock, so for as long as that is held the process is the one that was written down.
    if kill_if(record.supervisor_pid, |_| is_locked(&files.lock())) && ended_within(files, KILLED)? {
        // Its children die with it; what they leave is cleared away by whoever looks first.
        return Record::load(layout, &record.id).map(drop);
    }
    if ended_within(files, Duration::ZERO)? {
        return Ok(());
    }
    if record.supervisor_pid == 0 {
        let id = names::short(&record.id);
        return Err(Error::Monitor(format!("container {id} is just being made: try again in a moment")));
    }
    Err(Error::Monitor(format!(
        "container {} does not end: kill its supervisor, process {}, and its monitor, process {}",
        names::short(&record.id),
        record.supervisor_pid,
        record.monitor_pid
    )))
}

/// Kills a process if it is the one that is meant. Answers whether there was one.
fn kill_if(pid: u32, is_meant: impl FnOnce(u32) -> bool) -> bool {
    let Some(process) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return false };
    let Ok(pidfd) = pidfd_open(process, PidfdFlags::empty()) else { return false };
    // Only now is it certain that the descriptor is of the process that is looked at.
    is_meant(pid) && pidfd_send_signal(&pidfd, Signal::KILL).is_ok()
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // "pid (name) state ppid …", and a name may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Waits for the supervisor to end. There is no lock with a time limit, so this looks at growing intervals.
fn ended_within(files: &Files, patience: Duration) -> Result<bool> {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_millis(1);
    let Ok(lock) = File::open(files.lock()) else { return Ok(true) };
    loop {
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context(|| format!("cannot watch {}", files.lock().display())),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Removes a container that has ended; with `force`, ends it first.
///
/// # Errors
/// It runs and `force` is not given, or something cannot be removed.
pub fn remove(layout: &Layout, record: &Record, force: bool) -> Result<()> {
    if record.status != Status::Exited {
        if !force {
            return Err(Error::WrongState {
                id: names::short(&record.id).into(),
                state: record.status.name(),
                hint: "stop it first (`bulkhead stop`), or remove it with -f".into(),
            });
        }
        stop(layout, record, Some(Duration::ZERO))?;
    }
    remove_files(layout, &Files::new(layout, &record.id), &record.name)
}

/// Removes a container whose record cannot be read; its machine, which is known by its socket alone then, ends first.
///
/// # Errors
/// The machine does not end, or something cannot be removed.
pub fn remove_unreadable(layout: &Layout, id: &str, name: &str) -> Result<()> {
    let files = Files::new(layout, id);
    let told = vmm::control::Client::connect(&files.control())
        .and_then(|mut client| client.call(vmm::control::Method::Quit));
    if told.is_ok() && !ended_within(&files, PUT_AWAY)? {
        return Err(Error::Monitor(format!("container {} does not end", names::short(id))));
    }
    remove_files(layout, &files, name)
}

/// The container's processes, as the guest sees them.
///
/// # Errors
/// As for [`kill`].
pub fn processes(layout: &Layout, record: &Record) -> Result<ListProcessesResponse> {
    ask(layout, record, "ListProcesses")
}

/// What the container uses.
///
/// # Errors
/// As for [`kill`].
pub fn stats(layout: &Layout, record: &Record) -> Result<StatsResponse> {
    ask(layout, record, "Stats")
}

fn ask<R: prost::Message + Default>(layout: &Layout, record: &Record, method: &'static str) -> Result<R> {
    running(record)?;
    let mut agent = Guest::new(&Files::new(layout, &record.id).vsock()).agent()?;
    agent
        .call(method, &ContainerRequest { container: record.in_guest().to_owned() })
        .context(|| format!("cannot ask about container {}", names::short(&record.id)))
}

/// Refuses a container that does not run.
///
/// # Errors
/// [`Error::WrongState`].
pub fn running(record: &Record) -> Result<()> {
    if record.status == Status::Running {
        return Ok(());
    }
    Err(Error::WrongState {
        id: names::short(&record.id).into(),
        state: record.status.name(),
        hint: "this needs a running container".into(),
    })
}
