//! `start`, `kill`, `delete`, `pause`, `resume`, `update`.

use std::path::Path;
use std::time::Duration;

use bulkhead_protocol::agent::{ContainerRequest, Empty, SignalProcessRequest, UpdateContainerRequest};
use bulkhead_protocol::client::CallError;
use bulkhead_runtime::options::parse_signal;
use bulkhead_runtime::{Context as _, Error, Result, network};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Map, Value, json};

use super::{agent, create, guest, in_state};
use crate::args::{Kill, Update};
use crate::config::{leave_hosts_out, read_json};
use crate::sandbox::{self, Ask};
use crate::store::{Container, Status, start_of};
use crate::{Context, hooks, pod};

/// How long the agent may take to answer before a container is killed without it.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a killed sandbox may take to go.
const PATIENCE: Duration = Duration::from_secs(10);

/// Lets a created container's process go.
///
/// # Errors
/// It is in another state, or its program cannot be executed.
pub fn start(context: &Context, id: &str) -> Result<()> {
    let container = in_state(context, id, &[Status::Created], "start")?;
    sandbox::ask(&container.run, &Ask::Start)?;
    // As the specification has it since 1.2.1, and runc always: the container is stopped when one fails.
    hooks::run("poststart", &container.hooks.poststart, &container.state(Status::Running))
        .inspect_err(|_| end(&container))
}

/// Signals the container's process, or all of them.
///
/// # Errors
/// There is no such signal, or the container does not run.
pub fn kill(context: &Context, wish: &Kill) -> Result<()> {
    let signal = parse_signal(&wish.signal)?;
    let kills = signal == libc::SIGKILL.unsigned_abs();
    let container = context.root.load(&wish.id)?;
    match container.status() {
        Status::Stopped if wish.all => Ok(()),
        Status::Stopped | Status::Creating => {
            Err(Error::Usage(format!("container not running: {}", wish.id)))
        }
        Status::Created => match sandbox::ask(&container.run, &Ask::Signal(signal)) {
            Err(_) if kills && container.lives() => {
                end(&container);
                Ok(())
            }
            result => result,
        },
        Status::Running | Status::Paused => {
            let request = SignalProcessRequest {
                container: container.in_guest(),
                exec: String::new(),
                signal,
                all: wish.all,
            };
            // One that is to be killed need not be waited for.
            let agent =
                if kills { guest(&container).agent_within(ANSWER, ANSWER) } else { agent(&container) };
            match agent.and_then(|mut agent| {
                let done: Result<Empty, _> = agent.call("SignalProcess", &request);
                done.context(|| format!("cannot signal container {}", wish.id))
            }) {
                // A guest that does not answer any more can still be ended.
                Err(_) if kills && container.lives() => {
                    end(&container);
                    Ok(())
                }
                result => result.map(drop),
            }
        }
    }
}

/// Ends a container at once and waits until it and its sandbox are gone.
pub fn end(container: &Container) {
    end_process(container.pid, container.pid_start, true);
    // It has put the machine away by then, unless something hangs.
    if !end_process(container.sandbox, container.sandbox_start, false) {
        end_process(container.sandbox, container.sandbox_start, true);
    }
}

/// The same, when only its sockets are known.
fn end_unknown(run: &Path) {
    let Some(pid) = sandbox::kill(run) else { return };
    let Some(start) = start_of(pid) else { return };
    if !end_process(pid, start, false) {
        end_process(pid, start, true);
    }
}

/// Waits until a process is gone, which is killed first if `kill`. Answers whether it is.
fn end_process(pid: i32, start: u64, kill: bool) -> bool {
    let Some(process) = Pid::from_raw(pid) else { return true };
    let Ok(pidfd) = pidfd_open(process, PidfdFlags::empty()) else { return true };
    // Only now is it certain that the descriptor is of the process we mean.
    if start_of(pid) != Some(start) {
        return true;
    }
    if kill {
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    }
    let patience = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
    matches!(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience)), Ok(1))
}

/// Removes a container.
///
/// # Errors
/// It runs and `force` is not given, or it does not exist.
pub fn delete(context: &Context, id: &str, force: bool) -> Result<()> {
    let container = match context.root.load(id) {
        Ok(container) => container,
        // Half made, damaged or not there at all: with force, nothing of it is left.
        Err(_) if force && context.root.exists(id) => {
            end_unknown(&context.root.files(id)?.run);
            // A sandbox that has ended in order has written it anew.
            match context.root.load(id) {
                Ok(container) => container,
                Err(_) => return context.root.remove(id),
            }
        }
        Err(_) if force => return Ok(()),
        Err(error) => return Err(error),
    };
    match container.status() {
        Status::Stopped => {}
        Status::Created => end(&container),
        _ if force => end(&container),
        status => {
            return Err(Error::Usage(format!(
                "cannot delete container {id} that is not stopped: {} (`delete --force` kills it)",
                status.name()
            )));
        }
    }
    // Unless its sandbox has done that.
    if context.root.load(id).is_ok_and(|container| container.status != Status::Stopped) {
        pod::leave(&container);
    }
    if let (Some(namespace), None) = (&container.network, &container.pod) {
        let files = context.root.files(id)?;
        let _ = network::detach(namespace, &sandbox::tag(&files));
    }
    if let Some(group) = &container.cgroup {
        group.remove();
    }
    context.root.remove(id)?;
    hooks::run_all("poststop", &container.hooks.poststop, &container.state(Status::Stopped), &context.log);
    Ok(())
}

/// Suspends or resumes all processes of a container.
///
/// # Errors
/// It is in another state.
pub fn pause(context: &Context, id: &str, pause: bool) -> Result<()> {
    let (from, to, method, verb) = if pause {
        (Status::Running, Status::Paused, "PauseContainer", "pause")
    } else {
        (Status::Paused, Status::Running, "ResumeContainer", "resume")
    };
    let mut container = in_state(context, id, &[from], verb)?;
    let request = ContainerRequest { container: container.in_guest() };
    let mut agent = agent(&container)?;
    // Paused for longer than it is, rather than for less: whoever is killed here leaves what `resume` mends, not a container
    // that is said to run and answers nobody.
    container.status = Status::Paused;
    context.root.save(&container)?;
    let done: Result<Empty, CallError> = agent.call(method, &request);
    container.status = match &done {
        Ok(_) => to,
        // Whether it has come to that nobody knows.
        Err(CallError::Io { .. }) => Status::Paused,
        Err(_) => from,
    };
    if container.status != Status::Paused {
        context.root.save(&container)?;
    }
    done.map(drop).context(|| format!("cannot {verb} container {id}"))
}

/// Changes a container's limits.
///
/// # Errors
/// It does not run, or a limit is refused.
pub fn update(context: &Context, wish: &Update) -> Result<()> {
    let container =
        in_state(context, &wish.id, &[Status::Running, Status::Paused, Status::Created], "update")?;
    let resources = match &wish.resources {
        Some(path) if path.as_os_str() == "-" => serde_json::from_slice(&create::standard_input()?)
            .context(|| "the resources on standard input are malformed".into())?,
        Some(path) => read_json(path)?,
        None => from_flags(wish),
    };
    let limit = resources.pointer("/memory/limit").and_then(Value::as_i64).unwrap_or(0);
    if u64::try_from(limit).is_ok_and(|limit| limit > u64::from(container.machine_mib) << 20) {
        return Err(Error::Usage(format!(
            "cannot update container {}: its microVM was made with {} MiB, a memory limit above that takes a new container",
            wish.id, container.machine_mib
        )));
    }
    let mut inside = resources.clone();
    leave_hosts_out(&mut inside);
    let request = UpdateContainerRequest { container: container.in_guest(), resources: inside.to_string() };
    let done: Result<Empty, _> = agent(&container)?.call("UpdateContainer", &request);
    done.map(drop).context(|| format!("cannot update container {}", wish.id))?;
    match &container.cgroup {
        Some(group) => group.limit(&resources, container.machine_mib),
        None => Ok(()),
    }
}

fn from_flags(wish: &Update) -> Value {
    let object = |fields: Vec<(&str, Option<Value>)>| {
        let given =
            fields.into_iter().filter_map(|(name, value)| value.map(|value| (name.to_owned(), value)));
        let given: Map<String, Value> = given.collect();
        (!given.is_empty()).then_some(Value::Object(given))
    };
    let number = |value: Option<i64>| value.map(|value| json!(value));
    let memory = object(vec![
        ("limit", number(wish.memory)),
        ("reservation", number(wish.memory_reservation)),
        ("swap", number(wish.memory_swap)),
    ]);
    let cpu = object(vec![
        ("period", wish.cpu_period.map(|value| json!(value))),
        ("quota", number(wish.cpu_quota)),
        ("shares", wish.cpu_share.map(|value| json!(value))),
        ("cpus", wish.cpuset_cpus.as_ref().map(|value| json!(value))),
        ("mems", wish.cpuset_mems.as_ref().map(|value| json!(value))),
    ]);
    let pids = object(vec![("limit", number(wish.pids_limit))]);
    let block = object(vec![("weight", wish.blkio_weight.map(|value| json!(value)))]);
    object(vec![("memory", memory), ("cpu", cpu), ("pids", pids), ("blockIO", block)])
        .unwrap_or_else(|| json!({}))
}
