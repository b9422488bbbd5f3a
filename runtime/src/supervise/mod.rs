//! The supervisor: one process for each container, from before its microVM to after its end.
//!
//! It holds the container's lock, is the monitor's parent (which dies with it), relays the container's streams,
//! writes the log, and leaves the record telling the truth. It is a fork of the `bulkhead run` that made it, so the
//! caller's standard streams are its own until the caller detaches or goes away.

mod boot;
mod restore;
mod wait;

pub(crate) use boot::disks;
pub(crate) use restore::Copy;
pub(crate) use wait::Waiting;

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use bulkhead_protocol::agent::{
    self, Empty, ProcessRequest, ResizeTerminalRequest, ShutdownRequest, SignalProcessRequest,
    WaitProcessResponse,
};
use bulkhead_protocol::client::CallError;
use bulkhead_protocol::wire::Code;
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::guest::{Agent, Guest};
use crate::monitor::Monitor;
use crate::network::Network;
use crate::relay::{Ends, Relay};
use crate::shares::{Server, Shares};
use crate::state::{Exit, Files, Record, Status, now_ns, release, remove_files};
use crate::{Artefacts, Context, Error, Layout, Result, trace};

/// Said by the caller of `run` to the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Pass this signal on to the container; before it runs, give up.
    Signal(u32),
    /// The caller's terminal has this size now.
    Resize { rows: u16, columns: u16 },
}

/// Said by the supervisor to the caller of `run`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Tell {
    /// A machine that waited in a pool is the container's now.
    Taken,
    /// The container runs.
    Started,
    /// The person typed the detach keys.
    Detached,
    /// It could not be started.
    Failed { status: u8, message: String },
    /// It has ended.
    Exited { code: u8, error: String },
}

/// A message socket between the two: one packet, one message.
#[derive(Debug)]
pub struct Wire(pub OwnedFd);

/// Longest message, in bytes: an error with the monitor's last words.
const MAX_MESSAGE: usize = 64 << 10;

impl Wire {
    /// Both ends.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn pair() -> Result<(Self, Self)> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .context(|| "cannot make a socket pair".into())?;
        Ok((Self(a), Self(b)))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn send(&self, message: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        rustix::net::send(&self.0, &text, rustix::net::SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The next message, `None` when the other side is gone.
    pub fn receive<M: for<'de> Deserialize<'de>>(&self) -> Option<M> {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            match rustix::io::read(&self.0, &mut *buffer) {
                Ok(0) => return None,
                Ok(read) => return serde_json::from_slice(buffer.get(..read)?).ok(),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return None,
            }
        }
    }
}

/// All that a supervisor needs; made by [`crate::launch`].
pub(crate) struct Plan {
    pub layout: Layout,
    pub files: Files,
    pub record: Record,
    pub lock: File,
    pub artefacts: Artefacts,
    pub layers: Vec<PathBuf>,
    pub hostname: String,
    pub spec: Value,
    pub seccomp: Option<agent::Seccomp>,
    pub ends: Ends,
    pub caller: Wire,
    /// What of the host the container is to see.
    pub shares: Option<Shares>,
    /// The machine is a copy of another, and the container in it.
    pub copy: Option<Copy>,
}

/// A supervisor at work.
struct Supervisor {
    plan: Plan,
    guest: Guest,
    /// Serves what of the host the container sees.
    server: Option<Server>,
    /// What the guest is given; known once the monitor is started.
    network: Network,
    /// The caller of `run` still listens.
    attended: bool,
    /// It is not known yet whose machine it will be: there is no record to be kept.
    waits: bool,
}

/// Runs a container to its end and puts everything away. Answers the exit status for the process.
pub(crate) fn run(plan: Plan) -> u8 {
    let mut supervisor = Supervisor::new(plan);
    let outcome = supervisor.live();
    supervisor.put_away(outcome)
}

impl Supervisor {
    fn new(plan: Plan) -> Self {
        let guest = Guest::new(&plan.files.vsock());
        Self { attended: true, waits: false, guest, plan, server: None, network: Network::default() }
    }

    /// From nothing to the container's end.
    fn live(&mut self) -> Result<Exit> {
        let monitor = self.boot()?;
        trace::mark("agent up");
        let agent = self.guest.agent();
        self.live_in(monitor, agent, |supervisor, agent, monitor| {
            let relay = match supervisor.plan.copy.take() {
                Some(copy) => supervisor.go_on(agent, &copy)?,
                None => {
                    supervisor.configure(agent)?;
                    supervisor.start_container(agent)?
                }
            };
            trace::mark("container started");
            monitor.teach_template();
            Ok(relay)
        })
    }

    /// From a guest that is up to the container's end; `start` makes it run.
    fn live_in(
        &mut self,
        mut monitor: Monitor,
        agent: Result<Agent>,
        start: impl FnOnce(&mut Self, &mut Agent, &mut Monitor) -> Result<Relay>,
    ) -> Result<Exit> {
        let worked = agent.and_then(|agent| self.work(&mut monitor, agent, start));
        let (mut agent, relay, exit) = match worked {
            // Why the machine ended says more than which call broke off.
            Err(error @ (Error::Io { .. } | Error::Agent { source: CallError::Io { .. }, .. }))
                if monitor.ends_soon() =>
            {
                let happened = format!("the microVM ended under the container: {}", error.chain());
                return Err(Error::Monitor(monitor.last_words(&happened)));
            }
            other => other?,
        };
        trace::mark("container ended");
        relay.finish();
        trace::mark("output passed on");
        let timeline = if trace::enabled() { monitor.timeline() } else { None };
        if self.plan.record.options.auto_remove {
            // Nothing in the guest is wanted any more: all output has been passed on.
            monitor.discard();
            if let Some(server) = self.server.take() {
                server.leave();
            }
        } else {
            let shutdown = ShutdownRequest { status: exit.code.into(), sync: true };
            // The answer never comes when the machine is quick: its end is the answer.
            let _ = agent.send("Shutdown", &shutdown);
            monitor.end();
        }
        trace::mark("microVM ended");
        trace::write(timeline.as_ref());
        Ok(exit)
    }

    fn work(
        &mut self,
        monitor: &mut Monitor,
        mut agent: Agent,
        start: impl FnOnce(&mut Self, &mut Agent, &mut Monitor) -> Result<Relay>,
    ) -> Result<(Agent, Relay, Exit)> {
        let relay = start(self, &mut agent, monitor)?;
        self.plan.record.status = Status::Running;
        self.plan.record.started_ns = now_ns();
        self.plan.record.save(&self.plan.files)?;
        self.attended = self.plan.caller.send(&Tell::Started).is_ok();
        if self.plan.record.options.detach {
            self.attended = false;
        }
        let exit = self.attend(monitor, &relay)?;
        Ok((agent, relay, exit))
    }

    /// Until the container's init has ended: passes on what the caller asks for.
    fn attend(&mut self, monitor: &mut Monitor, relay: &Relay) -> Result<Exit> {
        let id = self.plan.record.in_guest().to_owned();
        let mut waiting = self.guest.agent()?;
        let request = ProcessRequest { container: id, exec: String::new(), bound: false };
        let call =
            waiting.send("WaitProcess", &request).context(|| "cannot wait for the container".into())?;
        let mut detachable = self.attended;
        loop {
            let ended = monitor.ended();
            let nothing = &ended;
            let mut fds = [
                PollFd::new(waiting.stream(), PollFlags::IN),
                PollFd::new(&ended, PollFlags::IN),
                if self.attended {
                    PollFd::new(&self.plan.caller.0, PollFlags::IN)
                } else {
                    PollFd::new(nothing, PollFlags::empty())
                },
                if detachable {
                    PollFd::new(&relay.detached, PollFlags::IN)
                } else {
                    PollFd::new(nothing, PollFlags::empty())
                },
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno).context(|| "cannot wait for the container".into()),
            }
            let [ended, lost, asked, detached] = fds.map(|fd| !fd.revents().is_empty());
            if ended {
                match waiting.receive::<WaitProcessResponse>("WaitProcess", call) {
                    Ok(answer) => return Ok(exit_of(&answer)),
                    Err(CallError::Io { .. }) => {
                        return Err(Error::Monitor(
                            monitor.last_words("the microVM ended under the container"),
                        ));
                    }
                    Err(error) => return Err(error).context(|| "cannot tell how the container ended".into()),
                }
            }
            if lost {
                return Err(Error::Monitor(monitor.last_words("the microVM ended under the container")));
            }
            if self.attended && asked {
                match self.plan.caller.receive::<Ask>() {
                    Some(ask) => self.pass_on(&ask),
                    None => {
                        self.attended = false;
                        detachable = false;
                        relay.release();
                    }
                }
            }
            if detachable && detached {
                let mut byte = [0];
                detachable = false;
                if matches!(rustix::io::read(&relay.detached, &mut byte), Ok(1)) {
                    relay.release();
                    let _ = self.plan.caller.send(&Tell::Detached);
                    self.attended = false;
                }
            }
        }
    }

    /// A request of the caller's that fails is no reason to end the container.
    fn pass_on(&self, ask: &Ask) {
        let container = self.plan.record.in_guest().to_owned();
        let Ok(mut agent) = self.guest.agent() else { return };
        let _: Result<Empty, _> = match *ask {
            Ask::Signal(signal) => agent.call(
                "SignalProcess",
                &SignalProcessRequest { container, exec: String::new(), signal, all: false },
            ),
            Ask::Resize { rows, columns } => agent.call(
                "ResizeTerminal",
                &ResizeTerminalRequest {
                    container,
                    exec: String::new(),
                    rows: rows.into(),
                    columns: columns.into(),
                },
            ),
        };
    }

    /// Writes down how it went, removes what is not to stay, and tells the caller last.
    fn put_away(mut self, outcome: Result<Exit>) -> u8 {
        let Plan { layout, files, record, .. } = &mut self.plan;
        let started = record.started_ns != 0;
        let (exit, tell) = match outcome {
            Ok(exit) => {
                let tell = Tell::Exited { code: exit.code, error: String::new() };
                (exit, tell)
            }
            Err(error) => {
                let message: String = error.chain().chars().take(MAX_MESSAGE / 8).collect();
                let code = if started { 137 } else { error.exit_status() };
                let exit = Exit { code, error: message.clone(), ..Exit::default() };
                let tell = if started {
                    Tell::Exited { code, error: message }
                } else {
                    Tell::Failed { status: code, message }
                };
                (exit, tell)
            }
        };
        let code = exit.code;
        record.finish(exit);
        record.leave_network();
        // A container that never ran leaves nothing, as with docker run --rm; one that ran stays unless told not to.
        let removed = if record.options.auto_remove || !started {
            remove_files(layout, files, &record.name)
        } else {
            let _ = fs::remove_dir_all(&files.run);
            record.save(files)
        };
        if let Err(error) = removed {
            eprintln!("bulkhead: {}", error.chain());
        }
        trace::mark("put away");
        release(&self.plan.lock, code);
        let _ = self.plan.caller.send(&tell);
        code
    }
}

/// Whether a signal would end an ordinary program: then it ends a start that is under way.
pub(crate) fn ends_a_program(signal: u32) -> bool {
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT]
        .iter()
        .any(|&known| known.unsigned_abs() == signal)
}

fn exit_of(answer: &WaitProcessResponse) -> Exit {
    Exit {
        code: u8::try_from(answer.exit_code).unwrap_or(255),
        signal: answer.signal,
        oom_killed: answer.oom_killed,
        error: String::new(),
    }
}

/// The agent's refusal of a command, as docker numbers it.
pub(crate) fn cannot_start(error: CallError) -> Error {
    match error.code() {
        Some(Code::NotFound) => Error::CannotStart { status: 127, message: error.to_string() },
        Some(Code::PermissionDenied) => Error::CannotStart { status: 126, message: error.to_string() },
        _ => Error::Agent { what: "cannot start the container".into(), source: error },
    }
}
