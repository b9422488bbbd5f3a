//! The supervisor: one process for each container, from before its microVM to after its end.
//!
//! It holds the container's lock, is the monitor's parent (which dies with it), relays the container's streams,
//! writes the log, and leaves the record telling the truth. It is a fork of the `bulkhead run` that made it, so the
//! caller's standard streams are its own until the caller detaches or goes away.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use bulkhead_protocol::agent::{
    ConfigureRequest, ContainerRequest, CreateContainerRequest, CreateContainerResponse, Empty, Filesystem,
    ProcessRequest, ResizeTerminalRequest, Rootfs, ShutdownRequest, SignalProcessRequest, Stdio,
    WaitProcessResponse,
};
use bulkhead_protocol::client::CallError;
use bulkhead_protocol::wire::Code;
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmm::config::DiskConfig;

use crate::guest::{self, Agent, Guest};
use crate::monitor::{Links, Monitor, Shape};
use crate::network::{self, Network, NetworkWish, Passt};
use crate::options::RunOptions;
use crate::relay::{Ends, Relay, Streams};
use crate::shares::{Lifetime, Server, Shares};
use crate::state::{Exit, Files, Record, Status, now_ns, release, remove_files};
use crate::template::{self, Wanted};
use crate::{Artefacts, Context, Error, Layout, Result, Settings, logs, scratch, shares, trace};

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
    pub ends: Ends,
    pub caller: Wire,
    /// What of the host the container is to see.
    pub shares: Option<Shares>,
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
}

/// Runs a container to its end and puts everything away. Answers the exit status for the process.
pub(crate) fn run(plan: Plan) -> u8 {
    let guest = Guest::new(&plan.files.vsock());
    let mut supervisor =
        Supervisor { attended: true, guest, plan, server: None, network: Network::default() };
    let outcome = supervisor.live();
    supervisor.put_away(outcome)
}

impl Supervisor {
    /// From nothing to the container's end.
    fn live(&mut self) -> Result<Exit> {
        let mut monitor = self.boot()?;
        trace::mark("agent up");
        let (mut agent, relay, exit) = match self.work(&mut monitor) {
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

    /// From a guest that is up to the container's end.
    fn work(&mut self, monitor: &mut Monitor) -> Result<(Agent, Relay, Exit)> {
        let mut agent = self.guest.agent()?;
        self.configure(&mut agent)?;
        let relay = self.start_container(&mut agent)?;
        trace::mark("container started");
        monitor.teach_template();
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

    fn boot(&mut self) -> Result<Monitor> {
        let shares = self.plan.shares.take();
        let Plan { layout, files, record, .. } = &self.plan;
        let mut disks = vec![DiskConfig {
            id: "layers".into(),
            read_only: true,
            layers: self.plan.layers.clone(),
            ..DiskConfig::default()
        }];
        let storage = record.options.storage.unwrap_or(self.plan.artefacts.settings.run.storage.0);
        if storage > 0 {
            scratch::create(layout, &files.scratch(), storage)?;
            trace::mark("scratch disk made");
            disks.push(DiskConfig {
                id: "scratch".into(),
                read_only: false,
                path: Some(files.scratch()),
                ..DiskConfig::default()
            });
        }
        if let Some(shares) = shares {
            let path = files.shares_log();
            let log = File::create(&path).context(|| format!("cannot create {}", path.display()))?;
            self.server = Some(shares.start(Lifetime::Parent, &log)?);
            trace::mark("virtiofsd spawned");
        }
        let settings = &self.plan.artefacts.settings;
        let shape = Shape::new(record.options.memory, record.options.milli_cpus, &settings.machine);
        let links = links(record, settings)?;
        if record.options.network.is_some() {
            trace::mark("network joined");
        }
        let wanted =
            Wanted { shape: &shape, disks: &disks, shares: self.server.is_some(), networks: links.kinds() };
        let caller = &self.plan.caller;
        let mut attended = true;
        let mut given_up = || match caller.receive::<Ask>() {
            Some(Ask::Signal(signal)) => ends_a_program(signal),
            Some(Ask::Resize { .. }) => false,
            // A caller that is gone before the container runs takes it along, as with docker.
            None => {
                attended = false;
                true
            }
        };
        let template = if record.options.no_template {
            None
        } else {
            template::get(layout, &self.plan.artefacts, &wanted, &caller.0, &mut given_up)?
        };
        let mut monitor = Monitor::start(
            &self.plan.artefacts,
            files,
            &shape,
            disks,
            self.server.as_mut(),
            &links,
            template.as_ref(),
        )?;
        // The monitor has the descriptors now, and the taps are to end with it alone.
        drop(links.fds);
        self.network = links.network;
        trace::mark("monitor spawned");
        self.plan.record.monitor_pid = monitor.pid();
        self.plan.record.save(&self.plan.files)?;
        monitor.wait_ready(&caller.0, &mut given_up)?;
        self.attended = attended;
        Ok(monitor)
    }

    fn configure(&mut self, agent: &mut Agent) -> Result<()> {
        let request = ConfigureRequest {
            hostname: self.plan.hostname.clone(),
            shares: self.server.iter().map(|_| shares::TAG.to_owned()).collect(),
            network: self.plan.record.options.network.is_some().then(|| self.network.to_message()),
            ..ConfigureRequest::default()
        };
        let info = guest::configure(agent, request)?;
        self.plan.record.kernel = info.kernel_release.chars().filter(|c| !c.is_control()).take(64).collect();
        Ok(())
    }

    fn start_container(&mut self, agent: &mut Agent) -> Result<Relay> {
        let Plan { record, layers, spec, files, ends, hostname, artefacts, .. } = &mut self.plan;
        let options = &record.options;
        let storage = options.storage.unwrap_or(artefacts.settings.run.storage.0);
        let writable = if storage > 0 {
            Filesystem { fstype: "ext4".into(), source: "/dev/vdb".into(), options: Vec::new() }
        } else {
            Filesystem { fstype: "tmpfs".into(), source: "tmpfs".into(), options: Vec::new() }
        };
        let erofs = |number| Filesystem {
            fstype: "erofs".into(),
            source: format!("/dev/vda{number}"),
            options: vec!["ro".into()],
        };
        let stdio = Stdio { stdin: options.interactive, stdout: true, stderr: !options.tty };
        let request = CreateContainerRequest {
            id: record.id.clone(),
            spec: spec.to_string(),
            rootfs: Some(Rootfs {
                layers: (1..=layers.len()).map(erofs).collect(),
                writable: Some(writable),
                ..Rootfs::default()
            }),
            stdio: Some(stdio),
            files: etc(hostname, options, &self.network)
                .into_iter()
                .filter(|file| !options.covers(&file.path))
                .collect(),
            pause: false,
        };
        let _: CreateContainerResponse = agent.call("CreateContainer", &request).map_err(cannot_start)?;
        trace::mark("container created");
        let streams = Streams::connect(&self.guest, &record.id, "", &stdio, options.tty)?;
        trace::mark("streams connected");
        let ends = Ends { log: Some(logs::Writer::create(&files.log())?), ..std::mem::take(ends) };
        let start = ContainerRequest { container: record.id.clone() };
        let relay = Relay::start(streams, ends)?;
        let _: Empty = agent.call("StartContainer", &start).map_err(cannot_start)?;
        Ok(relay)
    }

    /// Until the container's init has ended: passes on what the caller asks for.
    fn attend(&mut self, monitor: &mut Monitor, relay: &Relay) -> Result<Exit> {
        let id = self.plan.record.id.clone();
        let mut waiting = self.guest.agent()?;
        let request = ProcessRequest { container: id, exec: String::new(), bound: false };
        let call =
            waiting.send("WaitProcess", &request).context(|| "cannot wait for the container".into())?;
        let mut detachable = self.attended;
        loop {
            let nothing = &monitor.pidfd;
            let mut fds = [
                PollFd::new(waiting.stream(), PollFlags::IN),
                PollFd::new(&monitor.pidfd, PollFlags::IN),
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
        let container = self.plan.record.id.clone();
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

/// Joins the network that was wished for.
fn links(record: &Record, settings: &Settings) -> Result<Links> {
    match &record.options.network {
        NetworkWish::None => Ok(Links::default()),
        NetworkWish::Namespace(namespace) => {
            let attachment = network::attach(namespace, &record.id)?;
            Ok(Links { network: attachment.network, fds: attachment.taps, ..Links::default() })
        }
        NetworkWish::Passt => {
            let passt = Passt::start(&record.options.publish, &settings.programs.passt)?;
            Ok(Links { network: passt.network, fds: vec![passt.socket], ..Links::default() })
        }
    }
}

/// The files in `/etc` that every container gets; a name server only where there is a network to ask it by.
fn etc(hostname: &str, options: &RunOptions, network: &Network) -> Vec<bulkhead_protocol::agent::File> {
    let file = |path: &str, content: String| bulkhead_protocol::agent::File {
        path: path.into(),
        mode: 0o644,
        content: content.into_bytes(),
    };
    let mut files = vec![
        file("/etc/hostname", format!("{hostname}\n")),
        file("/etc/hosts", network::hosts(hostname, network)),
    ];
    let servers = match options.network {
        NetworkWish::Passt if options.dns.is_empty() => Passt::name_servers(),
        _ => options.dns.clone(),
    };
    let namespace = match &options.network {
        NetworkWish::Namespace(namespace) => Some(namespace),
        _ => None,
    };
    if options.network.is_some() || !servers.is_empty() {
        files.push(file("/etc/resolv.conf", network::resolv_conf(&servers, namespace)));
    }
    files
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
