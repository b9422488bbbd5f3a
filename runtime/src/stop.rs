//! Ending containers, and putting away what is left of them.

use std::fs::File;
use std::time::{Duration, Instant};

use bulkhead_protocol::agent::{
    ContainerRequest, Empty, ListProcessesResponse, SignalProcessRequest, StatsResponse,
};
use rustix::fs::FlockOperation;

use crate::guest::Guest;
use crate::state::{Files, Record, Status, remove_files};
use crate::{Context, Error, Layout, Result, names};

/// How long the supervisor may take to put everything away after the container's end.
const PUT_AWAY: Duration = Duration::from_secs(20);

/// Sends a signal to the container's init.
///
/// # Errors
/// The container does not run, or its agent does not answer.
pub fn kill(layout: &Layout, record: &Record, signal: u32) -> Result<()> {
    running(record)?;
    let mut agent = Guest::new(&Files::new(layout, &record.id).vsock()).agent()?;
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
/// Not even the monitor can be ended.
pub fn stop(layout: &Layout, record: &Record, patience: Option<Duration>) -> Result<()> {
    if record.status == Status::Exited {
        return Ok(());
    }
    let files = Files::new(layout, &record.id);
    if record.status == Status::Running && kill(layout, record, record.stop_signal).is_ok() {
        match patience {
            None => return Record::wait(&files).map(drop),
            Some(patience) if ended_within(&files, patience)? => return Ok(()),
            Some(_) => {}
        }
        if kill(layout, record, 9).is_ok() && ended_within(&files, PUT_AWAY)? {
            return Ok(());
        }
    }
    end_machine(&files)?;
    if ended_within(&files, PUT_AWAY)? {
        return Ok(());
    }
    Err(Error::Monitor(format!(
        "container {} does not end: kill its supervisor, process {}",
        names::short(&record.id),
        record.supervisor_pid
    )))
}

/// Ends the microVM under a container whose agent does not answer.
fn end_machine(files: &Files) -> Result<()> {
    match vmm::control::Client::connect(&files.control())
        .and_then(|mut client| client.call(vmm::control::Method::Quit))
    {
        Ok(_) => Ok(()),
        Err(_) if ended_within(files, Duration::from_secs(1))? => Ok(()),
        Err(error) => {
            Err(Error::Other { what: "cannot end the microVM".into(), source: error.to_string().into() })
        }
    }
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
