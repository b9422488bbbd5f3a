//! One more process in a running container. The calling process carries its streams and ends with its status.

use std::sync::atomic::{AtomicU32, Ordering};

use bulkhead_protocol::agent::{
    Empty, ExecProcessRequest, ExecProcessResponse, ProcessRequest, ResizeTerminalRequest,
    SignalProcessRequest, Stdio, WaitProcessResponse,
};
use rustix::event::{PollFd, PollFlags, poll};

use bulkhead_image::Image;
use bulkhead_protocol::client::CallError;

use crate::guest::{Agent, Guest};
use crate::relay::{Ends, Relay, Streams};
use crate::spec;
use crate::state::{Files, Record};
use crate::supervise::cannot_start;
use crate::terminal::{DEFAULT_DETACH_KEYS, DetachKeys, Raw, Signals};
use crate::{Context, Error, Layout, Result, policy, terminal};

/// What a person can ask of `exec`.
#[derive(Clone, Debug, Default)]
pub struct ExecOptions {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Keep standard input open.
    pub interactive: bool,
    /// Give the process a terminal.
    pub tty: bool,
    /// Leave it running and return.
    pub detach: bool,
    /// `KEY=value`, added to the container's environment.
    pub env: Vec<String>,
    /// Working directory; the container's when absent.
    pub workdir: Option<String>,
    /// `user[:group]`; the container's when absent.
    pub user: Option<String>,
    /// Every capability.
    pub privileged: bool,
    /// What typing detaches.
    pub detach_keys: Option<String>,
}

/// Runs a process in a container; answers its exit status, 0 when detached from.
///
/// # Errors
/// The container does not run, or the command cannot be started.
pub fn exec(layout: &Layout, record: &Record, image: &Image, options: &ExecOptions) -> Result<u8> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    if options.command.is_empty() {
        return Err(Error::Usage("exec needs a command".into()));
    }
    if options.tty && options.interactive && !options.detach && !terminal::stdin_is_terminal() {
        return Err(Error::Usage("-t needs a terminal on standard input: leave -t out, or add -d".into()));
    }
    let keys = DetachKeys::parse(options.detach_keys.as_deref().unwrap_or(DEFAULT_DETACH_KEYS))?;
    if options.privileged {
        policy::in_force()?.privileges(true, &spec::ALL_CAPABILITIES)?;
    }
    let process = process(record, image, options)?;
    let signals = Signals::block()?;
    let guest = Guest::new(&Files::new(layout, &record.id).vsock());
    let mut agent = guest.agent()?;
    let container = record.in_guest().to_owned();
    let exec = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let stdio = if options.detach {
        Stdio::default()
    } else {
        Stdio { stdin: options.interactive, stdout: true, stderr: !options.tty }
    };
    let request = ExecProcessRequest {
        container: container.clone(),
        exec: exec.clone(),
        process: process.to_string(),
        stdio: Some(stdio),
        hold: false,
    };
    // Answered when it has been made; it starts when its streams are connected, or at once if it has none. Connecting
    // them before the answer would spare a round trip, but different connections reach the agent in any order.
    let _: ExecProcessResponse = agent.call("ExecProcess", &request).map_err(cannot_start)?;
    if options.detach {
        return Ok(0);
    }
    let streams = Streams::connect(&guest, &container, &exec, &stdio, options.tty)?;
    let mut ends = Ends::own(options.interactive)?;
    ends.detach_keys = options.tty.then_some(keys);
    let raw = if options.tty && options.interactive { Raw::enter()? } else { None };
    let relay = Relay::start(streams, ends)?;
    let status = attend(&guest, &mut agent, &signals, &relay, &container, &exec, options.tty)?;
    match status {
        Some(status) => {
            relay.finish();
            drop(raw);
            Ok(status)
        }
        None => Ok(0),
    }
}

/// The spec of the process: what the container's init has, and what was asked for.
fn process(record: &Record, image: &Image, options: &ExecOptions) -> Result<serde_json::Value> {
    let of_container = &record.options;
    let wanted = options.user.as_deref().or(of_container.user.as_deref()).unwrap_or(&image.config.user);
    let user = image.resolve_user(wanted)?;
    let user = spec::ProcessUser {
        uid: user.uid,
        gid: user.gid,
        additional_gids: user.additional_gids,
        home: user.home,
    };
    let hostname =
        of_container.hostname.clone().unwrap_or_else(|| crate::names::short(&record.id).to_owned());
    let mut env = spec::environment(of_container, &image.config.env, &hostname, &user.home);
    if options.tty {
        spec::merge_env(&mut env, "TERM=xterm");
    }
    for entry in &options.env {
        spec::merge_env(&mut env, entry);
    }
    let cwd = match (&options.workdir, &of_container.workdir, image.config.working_dir.as_str()) {
        (Some(dir), _, _) | (None, Some(dir), _) => dir.as_str(),
        (None, None, "") => "/",
        (None, None, dir) => dir,
    };
    let capabilities =
        if options.privileged { spec::ALL_CAPABILITIES.to_vec() } else { spec::capabilities(of_container) };
    let terminal = options.tty.then(|| terminal::size().unwrap_or((24, 80)));
    Ok(spec::process(&user, &options.command, &env, cwd, terminal, &capabilities, of_container))
}

/// Until the process has ended (its status) or is detached from (`None`).
fn attend(
    guest: &Guest,
    agent: &mut Agent,
    signals: &Signals,
    relay: &Relay,
    container: &str,
    exec: &str,
    tty: bool,
) -> Result<Option<u8>> {
    let what = || "cannot wait for the process".to_owned();
    let request = ProcessRequest { container: container.to_owned(), exec: exec.to_owned(), bound: false };
    let call = agent.send("WaitProcess", &request).context(what)?;
    let mut detachable = true;
    loop {
        let mut fds = [
            PollFd::new(agent.stream(), PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
            PollFd::new(&relay.detached, if detachable { PollFlags::IN } else { PollFlags::empty() }),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context(what),
        }
        let [ended, signalled, detached] = fds.map(|fd| !fd.revents().is_empty());
        if ended {
            // A program that could not be executed is told here: it is only tried once the streams are connected.
            return match agent.receive::<WaitProcessResponse>("WaitProcess", call) {
                Ok(answer) => Ok(Some(u8::try_from(answer.exit_code).unwrap_or(255))),
                Err(error @ CallError::Refused { .. }) => Err(cannot_start(error)),
                Err(error) => Err(error).context(|| "the container ended under the process".into()),
            };
        }
        while let Some(signal) = if signalled { signals.next() } else { None } {
            pass_on(guest, container, exec, signal, tty);
        }
        if detachable && detached {
            let mut byte = [0];
            detachable = false;
            if matches!(rustix::io::read(&relay.detached, &mut byte), Ok(1)) {
                return Ok(None);
            }
        }
    }
}

fn pass_on(guest: &Guest, container: &str, exec: &str, signal: u32, tty: bool) {
    let (container, exec) = (container.to_owned(), exec.to_owned());
    let Ok(mut agent) = guest.agent() else { return };
    let _: Result<Empty, _> = match (signal == libc::SIGWINCH.unsigned_abs(), terminal::size()) {
        (false, _) => {
            agent.call("SignalProcess", &SignalProcessRequest { container, exec, signal, all: false })
        }
        (true, Some((rows, columns))) if tty => agent.call(
            "ResizeTerminal",
            &ResizeTerminalRequest { container, exec, rows: rows.into(), columns: columns.into() },
        ),
        (true, _) => return,
    };
}
