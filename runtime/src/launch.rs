//! What `bulkhead run` does in its own process: decide everything, then let a supervisor do it.

use bulkhead_image::Image;
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::Value;

use crate::monitor::Shape;
use crate::options::{RunOptions, parse_signal};
use crate::pool;
use crate::relay::Ends;
use crate::shares::{Access, Shares};
use crate::spec::{self, ProcessUser};
use crate::state::{Files, Record, Reservation, private_dir, remove_files};
use crate::supervise::{self, Ask, Plan, Tell, Wire};
use crate::terminal::{DEFAULT_DETACH_KEYS, DetachKeys, Raw, Signals};
use crate::verify::Stamps;
use crate::{
    Artefacts, Error, Layout, Result, Settings, names, null, policy, seccomp, terminal, trace, verify,
};

/// How `run` ended for its caller.
#[derive(Debug)]
pub enum Launched {
    /// The container has ended with this status; the words are not empty when it was lost rather than ended.
    Exited {
        /// For the caller's own exit.
        code: u8,
        /// What happened, if not an ordinary end.
        error: String,
    },
    /// It runs in the background.
    Detached {
        /// Its id.
        id: String,
    },
}

/// What `run` was asked for, found to make sense.
pub(crate) struct Order<'a> {
    /// Where everything is.
    pub layout: &'a Layout,
    /// What it is made of.
    pub image: &'a Image,
    /// As the person called it.
    pub image_name: &'a str,
    /// Monitor, kernel, settings.
    pub artefacts: Artefacts,
    /// The wishes.
    pub options: RunOptions,
    /// The name that is wished for.
    pub name: Option<&'a str>,
    command: Vec<String>,
    stop_signal: u32,
    user: ProcessUser,
}

/// Makes a container from an image and runs it: in a machine that waits in a pool, or in one of its own.
///
/// Must be called before the process has made a thread: the supervisor is a fork of it.
///
/// # Errors
/// Bad wishes, a missing artefact, a guest that does not come up, a command that cannot be started. Nothing is left.
pub fn run(
    layout: &Layout,
    image: &Image,
    image_name: &str,
    options: RunOptions,
    name: Option<&str>,
    settings: &Settings,
) -> Result<Launched> {
    let order = Order::check(layout, image, image_name, options, name, settings)?;
    if let Some(launched) = pool::take(&order)? {
        return Ok(launched);
    }
    let reservation = Reservation::make(layout, name)?;
    let (files, reserved) = (reservation.files.clone(), reservation.name.clone());
    match prepare(order, reservation) {
        Ok((plan, wire)) => launch(plan, wire),
        Err(error) => {
            let _ = remove_files(layout, &files, &reserved);
            Err(error)
        }
    }
}

/// Whether the host's policy lets an image run with these wishes, and whether its layers are what they were.
pub(crate) fn admit(layout: &Layout, image: &Image, options: &RunOptions, settings: &Settings) -> Result<()> {
    let policy = policy::in_force()?;
    let mut known_as = image.names.clone();
    known_as.extend(std::iter::once(image.id).chain(image.manifest).map(|digest| digest.to_string()));
    policy.image(&known_as)?;
    policy.wishes(options, options.storage.unwrap_or(settings.run.storage.0))?;
    let shape = Shape::new(options.memory, options.milli_cpus, &settings.machine);
    policy.machine(shape.memory_mib, shape.vcpus)?;
    Stamps::of(layout).check(&verify::layers(image))?;
    trace::mark("image verified");
    Ok(())
}

impl<'a> Order<'a> {
    fn check(
        layout: &'a Layout,
        image: &'a Image,
        image_name: &'a str,
        options: RunOptions,
        name: Option<&'a str>,
        settings: &Settings,
    ) -> Result<Self> {
        let artefacts = Artefacts::find(settings)?;
        let command = spec::command(&options, image)?;
        detach_keys(&options)?;
        let stop_signal = match (&options.stop_signal, image.config.stop_signal.as_str()) {
            (Some(signal), _) => parse_signal(signal)?,
            (None, "") => 15,
            (None, signal) => parse_signal(signal)?,
        };
        if options.tty && !options.detach && options.interactive && !terminal::stdin_is_terminal() {
            return Err(Error::Usage(
                "-t needs a terminal on standard input: leave -t out, or add -d".into(),
            ));
        }
        crate::binds::check(&options)?;
        admit(layout, image, &options, settings)?;
        let user = resolve_user(image, options.user.as_deref().unwrap_or(&image.config.user))?;
        if let Some(hostname) = &options.hostname {
            check_hostname(hostname)?;
        }
        let order = Self { layout, image, image_name, artefacts, options, name, command, stop_signal, user };
        if !order.cwd().starts_with('/') {
            return Err(Error::Usage(format!(
                "the working directory {:?} is not an absolute path",
                order.cwd()
            )));
        }
        Ok(order)
    }

    fn cwd(&self) -> &str {
        match (&self.options.workdir, self.image.config.working_dir.as_str()) {
            (Some(dir), _) => dir.as_str(),
            (None, "") => "/",
            (None, dir) => dir,
        }
    }

    /// The host name of container `id`.
    pub fn hostname(&self, id: &str) -> String {
        self.options.hostname.clone().unwrap_or_else(|| names::short(id).to_owned())
    }

    /// The record of container `id`, which nobody runs yet.
    pub fn record(&self, id: &str, name: &str) -> Record {
        Record {
            name: name.to_owned(),
            command: self.command.clone(),
            stop_signal: self.stop_signal,
            ..Record::new(id.to_owned(), self.image_name, self.image, self.options.clone())
        }
    }

    /// What the agent is to run as container `id`; `shared` is how the guest knows the directories of the host.
    pub fn spec(&self, id: &str, shared: &[String]) -> Value {
        let Self { options, image, user, .. } = self;
        let hostname = self.hostname(id);
        let process = spec::process(
            user,
            &self.command,
            &spec::environment(options, &image.config.env, &hostname, &user.home),
            self.cwd(),
            options.tty.then(|| terminal::size().unwrap_or((24, 80))),
            &spec::capabilities(options),
            options,
        );
        spec::container(options, process, &hostname, id, shared)
    }
}

/// The keys that detach.
pub(crate) fn detach_keys(options: &RunOptions) -> Result<Option<DetachKeys>> {
    let keys = DetachKeys::parse(options.detach_keys.as_deref().unwrap_or(DEFAULT_DETACH_KEYS))?;
    Ok(options.tty.then_some(keys))
}

fn prepare(order: Order<'_>, reservation: Reservation) -> Result<(Plan, Wire)> {
    let Order { options, artefacts, .. } = &order;
    let files: Files = reservation.files.clone();
    private_dir(&files.run)?;
    let seccomp = seccomp::filter(options)?;
    let (shares, shared) = share(&files, options, &artefacts.settings)?;
    let record = order.record(&reservation.id, &reservation.name);
    let spec = order.spec(&record.id, &shared);
    record.save(&files)?;
    let mut ends = if options.detach { Ends::default() } else { Ends::own(options.interactive)? };
    ends.detach_keys = detach_keys(options)?;
    let (wire, caller) = Wire::pair()?;
    let plan = Plan {
        layout: order.layout.clone(),
        lock: reservation.into_lock(),
        layers: order.image.layers.clone(),
        hostname: order.hostname(&record.id),
        artefacts: order.artefacts,
        files,
        record,
        spec,
        seccomp,
        ends,
        caller,
        shares,
        copy: None,
    };
    Ok((plan, wire))
}

/// Takes what the container is to see of the host; answers how the guest knows each.
pub(crate) fn share(
    files: &Files,
    options: &RunOptions,
    settings: &Settings,
) -> Result<(Option<Shares>, Vec<String>)> {
    if options.binds.is_empty() {
        return Ok((None, Vec::new()));
    }
    let mut shares = Shares::new(&files.run, settings)?;
    let paths = options
        .binds
        .iter()
        .map(|bind| {
            bind.prepare()?;
            shares.add(&bind.source, if bind.read_only { Access::ReadOnly } else { Access::ReadWrite })
        })
        .collect::<Result<_>>()?;
    Ok((Some(shares), paths))
}

/// What `sethostname(2)` and `/etc/hosts` take: at most 64 bytes of letters, digits, `-` and `.`.
fn check_hostname(name: &str) -> Result<()> {
    let good = (1..=64).contains(&name.len())
        && !name.starts_with('-')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    if good {
        Ok(())
    } else {
        Err(Error::Usage(format!("--hostname {name:?}: write at most 64 letters, digits, `-` or `.`")))
    }
}

fn resolve_user(image: &Image, wanted: &str) -> Result<ProcessUser> {
    let user = image.resolve_user(wanted)?;
    Ok(ProcessUser { uid: user.uid, gid: user.gid, additional_gids: user.additional_gids, home: user.home })
}

/// Forks the supervisor and stands for the container until it has ended or is left alone.
pub(crate) fn launch(mut plan: Plan, wire: Wire) -> Result<Launched> {
    let id = plan.record.id.clone();
    let signals = Signals::block()?;
    // SAFETY: the process has one thread (see `run`), so the child may go on as if nothing had happened.
    match unsafe { libc::fork() } {
        -1 => {
            let source = std::io::Error::last_os_error();
            let _ = remove_files(&plan.layout, &plan.files, &plan.record.name);
            Err(Error::Io { what: "cannot fork a supervisor".into(), source })
        }
        0 => {
            drop(signals);
            // The caller's side of the socket: with it open here, the caller's death would go unnoticed.
            drop(wire);
            become_supervisor();
            plan.record.supervisor_pid = std::process::id();
            let code = supervise::run(plan);
            // Not the caller's exit handlers, and no destructor of anything it shares with us.
            // SAFETY: _exit has no preconditions.
            unsafe { libc::_exit(code.into()) }
        }
        child => {
            let options = std::mem::take(&mut plan.record.options);
            drop(plan);
            let result = attend(&wire, &signals, &id, &options);
            // Reaps a supervisor that has ended; one that goes on is init's when we leave.
            let mut status = 0;
            // SAFETY: `status` is a valid place for the result.
            unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) };
            result
        }
    }
}

/// Stands for the container towards a person or a program until it has ended or is left alone.
pub(crate) fn attend(wire: &Wire, signals: &Signals, id: &str, options: &RunOptions) -> Result<Launched> {
    let RunOptions { tty, interactive, detach, .. } = *options;
    let _raw = if tty && interactive && !detach { Raw::enter()? } else { None };
    stand_in(wire, signals, id, tty, detach)
}

/// A session of its own: the terminal's Ctrl-C is the caller's business, its hang-up too.
pub(crate) fn become_supervisor() {
    Signals::unblock();
    let _ = rustix::process::setsid();
    let _ = std::env::set_current_dir("/");
    // The relay has descriptors of its own for what it needs of these, and lets go of them when the caller does.
    null::let_go_of_streams();
}

/// So many signals that would end a program mean it.
const URGENT: u32 = 3;

/// The caller's part: signals and terminal sizes one way, the end the other way.
fn stand_in(wire: &Wire, signals: &Signals, id: &str, tty: bool, detach: bool) -> Result<Launched> {
    let mut urges = 0;
    loop {
        let mut fds = [PollFd::new(&wire.0, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                return Err(Error::Io { what: "cannot wait for the container".into(), source: errno.into() });
            }
        }
        if !fds[1].revents().is_empty() {
            while let Some(signal) = signals.next() {
                let resize = signal == libc::SIGWINCH.unsigned_abs();
                urges += u32::from(supervise::ends_a_program(signal));
                let ask = match (resize, terminal::size()) {
                    // A container's init that has no handler does not see Ctrl-C, and the person cannot know.
                    (false, _) if urges == URGENT => {
                        eprintln!("bulkhead: signalled {URGENT} times, killing the container");
                        Ask::Signal(libc::SIGKILL.unsigned_abs())
                    }
                    (false, _) => Ask::Signal(signal),
                    (true, Some((rows, columns))) if tty => Ask::Resize { rows, columns },
                    (true, _) => continue,
                };
                let _ = wire.send(&ask);
            }
        }
        if fds[0].revents().is_empty() {
            continue;
        }
        match wire.receive::<Tell>() {
            Some(Tell::Taken) => {}
            Some(Tell::Started) if !detach => {}
            Some(Tell::Started | Tell::Detached) => return Ok(Launched::Detached { id: id.to_owned() }),
            Some(Tell::Exited { code, error }) => return Ok(Launched::Exited { code, error }),
            Some(Tell::Failed { status, message }) => return Err(failure(status, message)),
            None => {
                return Err(Error::Monitor(format!(
                    "the supervisor of container {} was killed; `bulkhead ps -a` shows what is left",
                    names::short(id)
                )));
            }
        }
    }
}

/// A supervisor's failure, for its caller.
pub(crate) fn failure(status: u8, message: String) -> Error {
    match status {
        130 => Error::Interrupted,
        126 | 127 => Error::CannotStart { status, message },
        _ => Error::Monitor(message),
    }
}
