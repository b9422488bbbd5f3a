//! The sandbox's process: it makes the microVM, relays the streams it was started with, and has the container's
//! [stand-in](StandIn) end as the container's process ends.
//!
//! It is a fork of `create` and lives on its own after that: `start` and the other verbs reach it by a socket, or reach
//! the agent in the guest directly.

mod machine;
mod stand_in;
mod talk;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_protocol::agent::{
    ContainerRequest, CreateContainerRequest, CreateContainerResponse, Empty, ProcessRequest,
    ResizeTerminalRequest, Rootfs, SignalProcessRequest, Stdio, WaitProcessResponse,
};
use bulkhead_protocol::client::CallError;
use bulkhead_runtime::drives::Drive;
use bulkhead_runtime::guest::{Agent, Guest};
use bulkhead_runtime::network::{self, NamespaceRef};
use bulkhead_runtime::relay::{Ends, Relay, Streams};
use bulkhead_runtime::state::Files;
use bulkhead_runtime::supervise::Wire;
use bulkhead_runtime::terminal::Signals;
use bulkhead_runtime::{Artefacts, Context, Error, Result, null, trace};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::thread::UnshareFlags;
use serde_json::Value;

use self::machine::{Machine, Made};
use self::stand_in::StandIn;
pub use self::stand_in::View;
pub use self::talk::{Ask, GoOn, Says, ask, kill};
use self::talk::{answer, next_call, socket};
use crate::checkpoint::Checkpoint;
use crate::config::{Bundle, Wanted};
use crate::log::Log;
use crate::pod::Partner;
use crate::store::{Container, Root, Status, start_of};
use crate::{console, hooks};

/// How long output may lie unread when the process has ended by itself.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// And when it was killed, as somebody does who has given it up.
pub const KILLED_PATIENCE: Duration = Duration::from_secs(1);

/// All that a sandbox needs.
pub struct Plan {
    /// Where its state is kept.
    pub root: Root,
    /// Its files.
    pub files: Files,
    /// Its state so far.
    pub container: Container,
    /// What it is to run.
    pub bundle: Bundle,
    /// Monitor, kernel, initramfs.
    pub artefacts: Artefacts,
    /// Namespaces of containers in the machine that it joins.
    pub partners: Vec<Partner>,
    /// What it goes on from.
    pub checkpoint: Option<Checkpoint>,
    /// Where the terminal's master goes.
    pub console_socket: Option<PathBuf>,
    /// To `create`.
    pub caller: Wire,
    /// Where it is said what could not be done.
    pub log: Log,
}

/// How the container's process ended.
#[derive(Clone, Copy, Debug, Default)]
struct End {
    code: u8,
    signal: i32,
    /// By the guest's kernel, for want of memory.
    oom: bool,
}

/// A microVM with the container in it, its process held.
struct Vm {
    machine: Machine,
    streams: Option<Streams>,
}

struct Sandbox {
    plan: Plan,
    stand_in: StandIn,
    guest: Guest,
    ends: Option<Ends>,
    /// Our end of the container's terminal.
    terminal: Option<OwnedFd>,
    vm: Option<Vm>,
    signals: Signals,
    listener: UnixListener,
}

/// Runs a container to its end. The process ends as the container's did.
pub fn run(plan: Plan) -> ! {
    let caller = Wire(plan.caller.0.try_clone().unwrap_or_else(|_| std::process::exit(1)));
    let mut created = false;
    let end = live(plan, &mut created).unwrap_or_else(|error| {
        let words: String = error.chain().chars().take(16 << 10).collect();
        if !created {
            let _ = caller.send(&Says::Failed(words));
        }
        End { code: 255, ..End::default() }
    });
    // SAFETY: _exit has no preconditions; the caller's exit handlers are not ours.
    unsafe { libc::_exit(end.code.into()) }
}

fn live(plan: Plan, created: &mut bool) -> Result<End> {
    let mut sandbox = Sandbox::new(plan)?;
    let outcome = sandbox.live(created);
    let end = outcome.as_ref().ok().copied().unwrap_or(End { code: 255, ..End::default() });
    sandbox.put_away(end.oom);
    let group = sandbox.plan.container.cgroup.take();
    sandbox.stand_in.end(end.code, end.signal);
    if let (true, Some(group)) = (end.oom, group) {
        group.linger();
    }
    outcome
}

impl Sandbox {
    /// What has to be there before anybody is told of us.
    fn new(mut plan: Plan) -> Result<Self> {
        let _ = rustix::process::setsid();
        null::file().context(|| "cannot open /dev/null".into())?;
        let signals = Signals::block()?;
        let (ends, terminal) = console::ends(plan.bundle.terminal, plan.console_socket.as_deref())?;
        let listener = UnixListener::bind(socket(&plan.files.run))
            .context(|| format!("cannot listen on {}", socket(&plan.files.run).display()))?;
        let container = &mut plan.container;
        // Its cgroup is known before it is there, so that a failure on the way leaves nothing.
        plan.root.save(container)?;
        let network = match &plan.bundle.network {
            Wanted::Existing(namespace) => namespace.clone(),
            Wanted::New => {
                // SAFETY: the process has one thread so far, which shares no file table with another.
                unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
                    .context(|| "cannot make a network namespace".into())?;
                NamespaceRef::Pid(std::process::id())
            }
        };
        let stand_in = StandIn::start(&network, &plan.partners)?;
        trace::mark("stand-in started");
        if let Some(group) = &container.cgroup {
            group.make(stand_in.pid, &plan.bundle.resources, container.machine_mib)?;
            trace::mark("cgroup made");
        }
        container.pid = stand_in.pid;
        container.pid_start = start_of(container.pid).unwrap_or(0);
        container.sandbox = std::process::id().cast_signed();
        container.sandbox_start = start_of(container.sandbox).unwrap_or(0);
        container.network = Some(network);
        plan.root.save(container)?;
        let guest = Guest::new(&container.vsock());
        Ok(Self { plan, stand_in, guest, ends: Some(ends), terminal, vm: None, signals, listener })
    }

    fn live(&mut self, created: &mut bool) -> Result<End> {
        let says = |plan: &Plan, message: &Says| {
            plan.caller.send(message).context(|| "the caller of create has gone".into())
        };
        says(&self.plan, &Says::Here(self.plan.container.pid))?;
        if self.plan.caller.receive::<GoOn>().is_none() {
            return Err(Error::Interrupted);
        }
        // Before the network is looked at: they may furnish it.
        self.hooks("createContainer", Status::Creating)?;
        // A new namespace may be furnished between `create` and `start`, as dockerd does: then the machine, whose
        // interfaces those are, is made at `start`.
        let late = self.plan.bundle.network == Wanted::New && !self.is_furnished();
        if !late {
            self.boot()?;
        }
        self.set_status(Status::Created)?;
        says(&self.plan, &Says::Created)?;
        *created = true;
        // The standard streams stay open in the relay alone.
        null::let_go_of_streams();
        match self.wait_for_start()? {
            Some(relay) => self.attend(relay),
            None => Ok(End { code: 137, signal: libc::SIGKILL, oom: false }),
        }
    }

    /// Whether the new namespace has any interface besides its loopback.
    fn is_furnished(&self) -> bool {
        std::fs::read_to_string("/proc/thread-self/net/dev")
            .is_ok_and(|list| list.lines().skip(2).any(|line| !line.trim_start().starts_with("lo:")))
    }

    /// Runs hooks of the container's namespaces, of which the host has the network's.
    fn hooks(&self, kind: &str, status: Status) -> Result<()> {
        let container = &self.plan.container;
        let hooks = match status {
            Status::Creating => &container.hooks.create_container,
            _ => &container.hooks.start_container,
        };
        hooks::run_inside(kind, hooks, &container.state(status), container.network.as_ref())
    }

    fn set_status(&mut self, status: Status) -> Result<()> {
        self.plan.container.status = status;
        self.plan.root.save(&self.plan.container)
    }

    /// From nothing to a held process, or from a checkpoint to one that stands still.
    fn boot(&mut self) -> Result<()> {
        let made = match self.plan.container.pod.clone() {
            None => Machine::make(&self.plan, &self.guest, &self.signals)?,
            Some(pod) => Machine::join(&mut self.plan, pod)?,
        };
        let Made { machine, root, spec, fittings } = made;
        if self.plan.container.pod.is_none() {
            // Others can join it from now on.
            (self.plan.container.up, self.plan.container.server) = (true, machine.server());
            self.plan.container.fittings = fittings;
            self.plan.root.save(&self.plan.container)?;
        }
        let streams = match &self.plan.checkpoint {
            None => self.create_container(root, &spec)?,
            Some(_) => {
                let (id, stdio) = (self.plan.container.in_guest(), self.stdio());
                Streams::reconnect(&self.guest, &id, &stdio, self.plan.bundle.terminal)
            }
        };
        self.stand_in.enter(self.plan.bundle.view());
        self.vm = Some(Vm { machine, streams: Some(streams) });
        Ok(())
    }

    /// Has the agent make the container, and connects its streams.
    fn create_container(&self, root: Rootfs, spec: &Value) -> Result<Streams> {
        let Plan { bundle, container, .. } = &self.plan;
        let mut agent = self.guest.agent()?;
        let stdio = self.stdio();
        let request = CreateContainerRequest {
            id: container.in_guest(),
            spec: spec.to_string(),
            rootfs: Some(root),
            stdio: Some(stdio),
            files: Vec::new(),
            disks: container.drives.iter().map(Drive::to_message).collect::<Result<_>>()?,
            pause: bundle.vm.pause,
            seccomp: bundle.seccomp.clone(),
        };
        let _: CreateContainerResponse = agent.call("CreateContainer", &request).map_err(refused)?;
        trace::mark("container created");
        Streams::connect(&self.guest, &container.in_guest(), "", &stdio, bundle.terminal)
    }

    fn stdio(&self) -> Stdio {
        Stdio { stdin: true, stdout: true, stderr: !self.plan.bundle.terminal }
    }

    /// `None` when it was killed before.
    fn wait_for_start(&mut self) -> Result<Option<Relay>> {
        loop {
            let sent;
            let lost = {
                let nothing = &self.listener;
                let monitor = self.vm.as_ref().map(|vm| vm.machine.end());
                let mut fds = [
                    PollFd::new(&self.listener, PollFlags::IN),
                    PollFd::new(&self.signals, PollFlags::IN),
                    PollFd::new(&self.stand_in, PollFlags::IN),
                    match &monitor {
                        Some(monitor) => PollFd::new(monitor, PollFlags::IN),
                        None => PollFd::new(nothing, PollFlags::empty()),
                    },
                ];
                wait(&mut fds)?;
                sent = !fds[2].revents().is_empty();
                !fds[3].revents().is_empty()
            };
            if lost && let Some(vm) = &mut self.vm {
                return Err(Error::Monitor(
                    vm.machine.last_words("the microVM ended before the container was started"),
                ));
            }
            // `None` is its death.
            if sent && self.stand_in.signal().is_none_or(is_fatal) {
                return Ok(None);
            }
            if std::iter::from_fn(|| self.signals.next()).any(is_fatal) {
                return Ok(None);
            }
            let Some((mut caller, asked)) = next_call(&self.listener) else { continue };
            match asked {
                Ask::Signal(signal) => {
                    answer(&mut caller, "");
                    if is_fatal(signal) || signal == libc::SIGKILL.unsigned_abs() {
                        return Ok(None);
                    }
                }
                Ask::Start => match self.start() {
                    Ok(relay) => {
                        answer(&mut caller, "");
                        return Ok(Some(relay));
                    }
                    Err(error) => {
                        answer(&mut caller, &error.chain());
                        return Err(error);
                    }
                },
            }
        }
    }

    fn start(&mut self) -> Result<Relay> {
        if self.vm.is_none() {
            self.boot()?;
        }
        self.hooks("startContainer", Status::Created)?;
        let container = &self.plan.container;
        let gone = || Error::Monitor("the sandbox has lost its microVM".into());
        let vm = self.vm.as_mut().ok_or_else(gone)?;
        let streams = vm.streams.take().ok_or_else(gone)?;
        let relay = Relay::start(streams, self.ends.take().unwrap_or_default())?;
        let mut agent = self.guest.agent()?;
        self.resize(&mut agent);
        let request = ContainerRequest { container: container.in_guest() };
        match &self.plan.checkpoint {
            None => {
                let _: Empty = agent.call("StartContainer", &request).map_err(refused)?;
            }
            Some(checkpoint) => go_on(&mut agent, &request, checkpoint)?,
        }
        trace::mark("container started");
        if let Some(vm) = &self.vm {
            vm.machine.teach_template();
        }
        self.set_status(Status::Running)?;
        Ok(relay)
    }

    /// Until the container's process has ended and all it wrote has been passed on.
    fn attend(&mut self, relay: Relay) -> Result<End> {
        self.take_loopback();
        let mut waiting = self.guest.agent()?;
        let container = self.plan.container.in_guest();
        let request = ProcessRequest { container, exec: String::new(), bound: true };
        let call =
            waiting.send("WaitProcess", &request).context(|| "cannot wait for the container".into())?;
        loop {
            let Some(vm) = self.vm.as_mut() else { return Ok(End { code: 255, ..End::default() }) };
            let (ended, lost, sent) = {
                let end = vm.machine.end();
                let mut fds = [
                    PollFd::new(waiting.stream(), PollFlags::IN),
                    PollFd::new(&end, PollFlags::IN),
                    PollFd::new(&self.signals, PollFlags::IN),
                    PollFd::new(&self.listener, PollFlags::IN),
                    PollFd::new(&self.stand_in, PollFlags::IN),
                ];
                wait(&mut fds)?;
                let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
                (ready(0), ready(1), ready(4))
            };
            if ended {
                match waiting.receive::<WaitProcessResponse>("WaitProcess", call) {
                    Ok(end) => {
                        relay.finish_unless_stalled(if end.signal == 0 { PATIENCE } else { KILLED_PATIENCE });
                        return Ok(End {
                            code: u8::try_from(end.exit_code).unwrap_or(255),
                            signal: i32::try_from(end.signal).unwrap_or(0),
                            oom: end.oom_killed,
                        });
                    }
                    Err(CallError::Io { .. }) => {}
                    Err(error) => return Err(error).context(|| "cannot tell how the container ended".into()),
                }
            }
            if ended || lost {
                let words = vm.machine.last_words("the microVM ended under the container");
                let _ = std::fs::write(self.plan.files.dir.join("lost"), &words);
                return Ok(End { code: 137, signal: libc::SIGKILL, oom: false });
            }
            if sent {
                // Who kills the stand-in means the container.
                let Some(signal) = self.stand_in.signal() else {
                    return Ok(End { code: 137, signal: libc::SIGKILL, oom: false });
                };
                self.pass_on(signal);
            }
            while let Some(signal) = self.signals.next() {
                self.pass_on(signal);
            }
            if let Some((mut caller, asked)) = next_call(&self.listener) {
                match asked {
                    Ask::Start => answer(&mut caller, "cannot start a container that is running"),
                    Ask::Signal(signal) => {
                        self.pass_on(signal);
                        answer(&mut caller, "");
                    }
                }
            }
        }
    }

    /// Has connections to the loopback of one's own network namespace reach the guest's. Beside everything else: nobody has
    /// to wait for it, and a container can do without.
    fn take_loopback(&self) {
        let container = &self.plan.container;
        let (Some(namespace), None) = (container.network.clone(), &container.pod) else { return };
        let (guest, log) = (self.guest.clone(), self.plan.log.clone());
        let work = move || {
            if let Err(error) = network::loopback::serve(&namespace, &guest) {
                let rest = "`kubectl port-forward`, which connects there, does not work for this container";
                log.warn(&format!("{}; {rest}", error.chain()));
            }
        };
        if let Err(error) = std::thread::Builder::new().name("loopback".into()).spawn(work) {
            self.plan.log.warn(&format!("cannot start a thread for the container's loopback: {error}"));
        }
    }

    /// What is sent to this process is meant for the container's.
    fn pass_on(&self, signal: u32) {
        let Ok(mut agent) = self.guest.agent() else { return };
        if signal == libc::SIGWINCH.unsigned_abs() && self.terminal.is_some() {
            return self.resize(&mut agent);
        }
        let container = self.plan.container.in_guest();
        let request = SignalProcessRequest { container, exec: String::new(), signal, all: false };
        // It may just have ended.
        let _: Result<Empty, _> = agent.call("SignalProcess", &request);
    }

    fn resize(&self, agent: &mut Agent) {
        let Some((rows, columns)) = self.terminal.as_ref().and_then(console::size) else { return };
        let container = self.plan.container.in_guest();
        let request = ResizeTerminalRequest { container, exec: String::new(), rows, columns };
        let _: Result<Empty, _> = agent.call("ResizeTerminal", &request);
    }

    /// Ends the microVM, its writes on the host's disk, and leaves the network as it was. `oom`: that is what it ended of.
    fn put_away(&mut self, oom: bool) {
        let timeline = self.vm.take().and_then(|vm| {
            trace::mark("output passed on");
            vm.machine.put_away(&self.guest, &self.plan.container)
        });
        if let (Some(namespace), None) = (&self.plan.container.network, &self.plan.container.pod) {
            let _ = network::detach(namespace, &tag(&self.plan.files));
        }
        if let (true, Some(group)) = (oom, &self.plan.container.cgroup) {
            group.report_oom();
        }
        let _ = self.set_status(Status::Stopped);
        trace::mark("microVM ended");
        trace::write(timeline.as_ref());
    }
}

/// Lets the container of a checkpoint go on.
fn go_on(agent: &mut Agent, container: &ContainerRequest, checkpoint: &Checkpoint) -> Result<()> {
    let what = || "cannot let the container go on".to_owned();
    let _: Empty = agent.call("Resume", &Empty {}).context(what)?;
    if checkpoint.saved.paused {
        let _: Empty = agent.call("ResumeContainer", container).context(what)?;
    }
    Ok(())
}

/// What tells one sandbox's taps from another's.
pub fn tag(files: &Files) -> String {
    files.run.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The agent's refusal, in words that engines look for.
pub fn refused(error: CallError) -> Error {
    Error::Agent { what: "cannot start the container's process".into(), source: error }
}

fn is_fatal(signal: u32) -> bool {
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT]
        .iter()
        .any(|&known| known.unsigned_abs() == signal)
}

fn wait(fds: &mut [PollFd<'_>]) -> Result<()> {
    match poll(fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno).context(|| "cannot wait for the container".into()),
    }
}
