//! `exec`: one more process in a running container, which on the host is a process that relays its streams and ends as
//! it does.

use std::os::fd::OwnedFd;

use bulkhead_protocol::agent::{
    Empty, ExecProcessRequest, ExecProcessResponse, ProcessRequest, ResizeTerminalRequest,
    SignalProcessRequest, Stdio, WaitProcessResponse,
};
use bulkhead_runtime::guest::Guest;
use bulkhead_runtime::relay::{Ends, Relay, Streams};
use bulkhead_runtime::state::now_ns;
use bulkhead_runtime::supervise::Wire;
use bulkhead_runtime::terminal::{Raw, Signals};
use bulkhead_runtime::{Context as _, Error, Result, null};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use super::{guest, in_state};
use crate::args::Exec;
use crate::config::read_json;
use crate::sandbox::{KILLED_PATIENCE, PATIENCE, refused};
use crate::store::{Container, Status};
use crate::{Context, console};

/// Status of a call whose process could not be started, as runc.
const CANNOT_START: u8 = 255;

/// Runs a process. Answers its status, 0 when detached, and 255 when it cannot be started.
pub fn exec(context: &Context, wish: &Exec) -> u8 {
    try_exec(context, wish).unwrap_or_else(|error| {
        context.log.error(&format!("exec failed: {}", error.chain()));
        CANNOT_START
    })
}

fn try_exec(context: &Context, wish: &Exec) -> Result<u8> {
    super::refuse_fds(wish.preserve_fds)?;
    if let Some(cgroup) = &wish.cgroup {
        return Err(Error::Usage(format!("--cgroup {cgroup}: processes run in the container's own group")));
    }
    let mut states = vec![Status::Running];
    if wish.ignore_paused {
        states.push(Status::Paused);
    }
    let container = in_state(context, &wish.id, &states, "exec in")?;
    let process = process(wish, &container)?;
    if process.get("capabilities") != container.process.get("capabilities") {
        crate::policy::check_process(&process)?;
    }
    let terminal = process.get("terminal").and_then(Value::as_bool).unwrap_or(false);
    super::check_terminal(terminal, wish.detach, wish.console_socket.is_some())?;
    if !wish.detach {
        let signals = Signals::block()?;
        let call = Call::make(wish, &container, &process, terminal)?;
        let raw = if terminal { Raw::enter()? } else { None };
        let status = call.run(&signals);
        drop(raw);
        return status;
    }
    detached(wish, &container, &process, terminal)
}

/// In a process of its own, which is the engine's when we have ended.
fn detached(wish: &Exec, container: &Container, process: &Value, terminal: bool) -> Result<u8> {
    let (ours, theirs) = Wire::pair()?;
    // SAFETY: the process has one thread, so the child may go on as if nothing had happened.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context(|| "cannot fork".into()),
        0 => {
            drop(ours);
            let _ = rustix::process::setsid();
            let status = (|| {
                let signals = Signals::block()?;
                Call::make(wish, container, process, terminal).and_then(|mut call| {
                    call.started = Some(theirs.0.try_clone().context(|| "cannot tell of the start".into())?);
                    call.run(&signals)
                })
            })();
            let code = status.unwrap_or_else(|error| {
                let _ = theirs.send(&error.chain());
                CANNOT_START
            });
            // SAFETY: _exit has no preconditions; the caller's exit handlers are not ours.
            unsafe { libc::_exit(code.into()) }
        }
        _ => {
            drop(theirs);
            match ours.receive::<String>() {
                Some(error) if error.is_empty() => Ok(0),
                error => {
                    let killed = || "the process that relays its streams was killed".into();
                    Err(Error::Usage(error.unwrap_or_else(killed)))
                }
            }
        }
    }
}

/// The process of config.json with what the flags change, or the file's.
fn process(wish: &Exec, container: &Container) -> Result<Value> {
    let mut process = match &wish.process {
        Some(file) => read_json(file)?,
        None => container.process.clone(),
    };
    let fields =
        process.as_object_mut().ok_or_else(|| Error::Usage("the process is no JSON object".into()))?;
    for label in ["apparmorProfile", "selinuxLabel"] {
        fields.remove(label);
    }
    if wish.process.is_some() {
        return Ok(process);
    }
    if wish.command.is_empty() {
        return Err(Error::Usage("exec needs a command, or --process".into()));
    }
    fields.insert("args".into(), json!(wish.command));
    fields.insert("terminal".into(), wish.tty.into());
    if let Some(cwd) = &wish.cwd {
        fields.insert("cwd".into(), json!(cwd));
    }
    if wish.no_new_privs {
        fields.insert("noNewPrivileges".into(), true.into());
    }
    if let Some(env) = fields.entry("env").or_insert_with(|| json!([])).as_array_mut() {
        env.extend(wish.env.iter().map(|entry| json!(entry)));
    }
    if let Some(user) = &wish.user {
        let bad = || Error::Usage(format!("--user {user}: write UID or UID:GID"));
        let (uid, gid) = user.split_once(':').unwrap_or((user, "0"));
        let uid: u32 = uid.parse().map_err(|_| bad())?;
        let gid: u32 = gid.parse().map_err(|_| bad())?;
        fields.insert("user".into(), json!({"uid": uid, "gid": gid}));
    }
    if !wish.additional_gids.is_empty()
        && let Some(user) = fields.entry("user").or_insert_with(|| json!({})).as_object_mut()
    {
        user.insert("additionalGids".into(), json!(wish.additional_gids));
    }
    for set in ["bounding", "effective", "permitted", "ambient", "inheritable"] {
        if wish.cap.is_empty() {
            break;
        }
        let sets = fields.entry("capabilities").or_insert_with(|| json!({}));
        if let Some(list) = sets.as_object_mut().map(|sets| sets.entry(set).or_insert_with(|| json!([])))
            && let Some(list) = list.as_array_mut()
        {
            for cap in &wish.cap {
                if !list.iter().any(|known| known.as_str() == Some(cap)) {
                    list.push(json!(cap));
                }
            }
        }
    }
    Ok(process)
}

/// A process that is held, its streams connected.
struct Call {
    guest: Guest,
    container: String,
    exec: String,
    streams: Streams,
    ends: Ends,
    terminal: Option<OwnedFd>,
    /// Told when the program runs.
    started: Option<OwnedFd>,
}

impl Call {
    fn make(wish: &Exec, container: &Container, process: &Value, terminal: bool) -> Result<Self> {
        let (guest, tty) = (guest(container), terminal);
        // First of all: nobody would end a process in the guest when nobody takes its terminal.
        let (ends, terminal) = console::ends(tty, wish.console_socket.as_deref())?;
        let stdio = Stdio { stdin: true, stdout: true, stderr: !tty };
        // A machine that goes on from a checkpoint remembers those of another host, or of another boot of this one.
        let exec = format!("oci-{}-{:x}", std::process::id(), now_ns());
        let container = container.in_guest();
        let request = ExecProcessRequest {
            container: container.clone(),
            exec: exec.clone(),
            process: process.to_string(),
            stdio: Some(stdio),
            hold: true,
        };
        let _: ExecProcessResponse = guest.agent()?.call("ExecProcess", &request).map_err(refused)?;
        let streams = Streams::connect(&guest, &container, &exec, &stdio, tty)?;
        let call = Self { guest, container, exec, streams, ends, terminal, started: None };
        call.announce(wish).inspect_err(|_| call.give_up())?;
        Ok(call)
    }

    /// Tells of this process, which stands for the one in the guest.
    fn announce(&self, wish: &Exec) -> Result<()> {
        let pid = std::process::id().cast_signed();
        wish.pid_file.as_ref().map_or(Ok(()), |file| super::write_pid(file, pid))?;
        wish.pidfd_socket.as_ref().map_or(Ok(()), |socket| super::send_pidfd(socket, pid))
    }

    /// Ends the held process, for which nobody else would ever come.
    fn give_up(&self) {
        let Ok(mut agent) = self.guest.agent() else { return };
        let (container, exec) = (self.container.clone(), self.exec.clone());
        let signal = libc::SIGKILL.unsigned_abs();
        let request = SignalProcessRequest { container, exec, signal, all: false };
        let _: Result<Empty, _> = agent.call("SignalProcess", &request);
    }

    /// From its start to its end and the last of its output.
    fn run(self, signals: &Signals) -> Result<u8> {
        let Self { guest, container, exec, streams, ends, terminal, started } = self;
        let what = || "cannot wait for the process".to_owned();
        let target = || ProcessRequest { container: container.clone(), exec: exec.clone(), bound: true };
        let mut agent = guest.agent()?;
        let resize = |agent: &mut bulkhead_runtime::guest::Agent| {
            if let Some((rows, columns)) = terminal.as_ref().and_then(console::size) {
                let (container, exec) = (container.clone(), exec.clone());
                let request = ResizeTerminalRequest { container, exec, rows, columns };
                let _: Result<Empty, _> = agent.call("ResizeTerminal", &request);
            }
        };
        resize(&mut agent);
        let relay = Relay::start(streams, ends)?;
        let _: Empty = agent.call("StartProcess", &target()).map_err(refused)?;
        let detached = started.is_some();
        if let Some(started) = started {
            let _ = Wire(started).send(&"");
            // The standard streams stay open in the relay alone.
            null::let_go_of_streams();
        }
        let call = agent.send("WaitProcess", &target()).context(what)?;
        loop {
            let mut fds = [PollFd::new(agent.stream(), PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno).context(what),
            }
            let ended = !fds[0].revents().is_empty();
            while let Some(signal) = signals.next() {
                let Ok(mut other) = guest.agent() else { break };
                if signal == libc::SIGWINCH.unsigned_abs() && terminal.is_some() {
                    resize(&mut other);
                    continue;
                }
                let (container, exec) = (container.clone(), exec.clone());
                let request = SignalProcessRequest { container, exec, signal, all: false };
                let _: Result<Empty, _> = other.call("SignalProcess", &request);
            }
            if ended {
                let end: WaitProcessResponse = agent
                    .receive("WaitProcess", call)
                    .context(|| "the container ended under the process".into())?;
                if detached {
                    relay.finish_unless_stalled(if end.signal == 0 { PATIENCE } else { KILLED_PATIENCE });
                } else {
                    relay.finish();
                }
                return Ok(u8::try_from(end.exit_code).unwrap_or(255));
            }
        }
    }
}
