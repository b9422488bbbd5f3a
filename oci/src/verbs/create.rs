//! `create` and `run`.

use std::io::Read;
use std::os::fd::OwnedFd;

use bulkhead_runtime::state::now_ns;
use bulkhead_runtime::supervise::Wire;
use bulkhead_runtime::terminal::{Raw, Signals};
use bulkhead_runtime::{Artefacts, Context as _, Error, Result, logs, trace};
use rustix::event::{PollFd, PollFlags, poll};

use super::life;
use crate::args::{Create, Run};
use crate::cgroup::Cgroup;
use crate::checkpoint::Checkpoint;
use crate::config::{Bundle, Root};
use crate::sandbox::{self, GoOn, Plan, Says};
use crate::store::{Container, Hooks, Status};
use crate::{Context, hooks, pod, policy};

/// Makes a container whose process waits for `start`, or the one of a checkpoint, which stands still until then. Answers the pid of its sandbox.
///
/// # Errors
/// Whatever is wrong; nothing is left then.
pub fn create(context: &Context, wish: &Create) -> Result<i32> {
    make(context, wish, true)
}

fn make(context: &Context, wish: &Create, detach: bool) -> Result<i32> {
    super::refuse_fds(wish.preserve_fds)?;
    let mut artefacts = Artefacts::find(&context.settings)?;
    let mut bundle = Bundle::read(&wish.bundle, &context.log)?;
    if let Some(kernel) = &bundle.vm.kernel {
        artefacts.kernel.clone_from(kernel);
    }
    super::check_terminal(bundle.terminal, detach, wish.console_socket.is_some())?;
    let checkpoint = wish.image_path.as_deref().map(Checkpoint::load).transpose()?;
    let group = Cgroup::locate(&bundle.cgroups_path, context.systemd_cgroup, &wish.id)?;
    if group.is_none() {
        context.log.debug("no cgroup hierarchy is mounted: the sandbox is put into no cgroup of the host");
    }
    let shared = pod::find(&context.root, &bundle)?;
    let machine_mib = match (&shared, &checkpoint) {
        (Some(shared), Some(_)) => {
            return Err(Error::Usage(format!(
                "the network is that of container {}: what goes on from a checkpoint has a microVM of its own",
                shared.pod.owner
            )));
        }
        (Some(shared), None) => shared.machine_mib,
        (None, Some(checkpoint)) => checkpoint.saved.memory_mib,
        (None, None) => {
            bundle.warn_of_limits_above_the_host(&context.log)?;
            bundle.shape(&context.settings.machine)?.memory_mib
        }
    };
    let (pod, partners) = shared.map_or_else(Default::default, |shared| (Some(shared.pod), shared.partners));
    policy::check(&bundle, &artefacts, pod.is_some())?;
    if pod.is_some() {
        bundle.warn_of_what_the_pod_decides(&context.log, machine_mib);
    }
    bundle.root_disk = wish.root_disk.as_deref().map(Root::parse).transpose()?;
    if let Some(checkpoint) = &checkpoint {
        checkpoint.fits(&bundle)?;
    }
    if let Some(root) = &bundle.root_disk {
        root.prepare(&context.settings)?;
    }
    if let Some(pod) = pod.as_ref().filter(|_| bundle.needs_shares()) {
        pod.shares()?;
    }
    trace::mark("bundle read");
    let files = context.root.reserve(&wish.id)?;
    let container = Container {
        id: wish.id.clone(),
        status: Status::Creating,
        pid: 0,
        pid_start: 0,
        sandbox: 0,
        sandbox_start: 0,
        bundle: bundle.dir.clone(),
        rootfs: bundle.rootfs.clone(),
        created: logs::rfc3339(now_ns()),
        annotations: bundle.annotations.clone(),
        hooks: bundle.hooks.clone(),
        process: bundle.process.clone(),
        network: None,
        run: files.run.clone(),
        cgroup: group.filter(|_| !context.rootless),
        machine_mib,
        server: None,
        up: false,
        fittings: None,
        guest_id: checkpoint
            .as_ref()
            .map_or_else(String::new, |checkpoint| checkpoint.saved.guest_id.clone()),
        drives: Vec::new(),
        pod,
        owner: rustix::process::getuid().as_raw(),
    };
    let hooks = container.hooks.clone();
    let plan = |caller| Plan {
        root: context.root.clone(),
        files,
        container,
        bundle,
        partners,
        checkpoint,
        artefacts,
        console_socket: wish.console_socket.clone(),
        caller,
        log: context.log.clone(),
    };
    launch(context, wish, &hooks, plan).inspect_err(|_| clean_up(context, &wish.id, &hooks))
}

/// After a failed `create`: the sandbox has ended or is ended.
fn clean_up(context: &Context, id: &str, hooks: &Hooks) {
    if let Ok(container) = context.root.load(id) {
        life::end(&container);
        pod::leave(&container);
        if let Some(group) = &container.cgroup {
            group.remove();
        }
        let state = container.state(Status::Stopped);
        hooks::run_all("poststop", &hooks.poststop, &state, &context.log);
    }
    let _ = context.root.remove(id);
}

fn launch(context: &Context, wish: &Create, hooks: &Hooks, plan: impl FnOnce(Wire) -> Plan) -> Result<i32> {
    let (wire, theirs) = Wire::pair()?;
    let plan = plan(theirs);
    // SAFETY: the process has one thread, so the child may go on as if nothing had happened.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context(|| "cannot fork the container's sandbox".into()),
        0 => {
            // With our side of the socket open in the child, our death would go unnoticed.
            drop(wire);
            sandbox::run(plan)
        }
        _ => {
            drop(plan);
            attend(context, wish, hooks, &wire)
        }
    }
}

/// Follows the sandbox until the container is created.
fn attend(context: &Context, wish: &Create, hooks: &Hooks, wire: &Wire) -> Result<i32> {
    let mut pid = 0;
    loop {
        match wire.receive::<Says>() {
            Some(Says::Here(its)) => {
                pid = its;
                let state = context.root.load(&wish.id)?.state(Status::Creating);
                hooks::run("prestart", &hooks.prestart, &state)?;
                hooks::run("createRuntime", &hooks.create_runtime, &state)?;
                wire.send(&GoOn).context(|| "the container's sandbox has ended".into())?;
            }
            Some(Says::Created) => {
                if let Some(file) = &wish.pid_file {
                    super::write_pid(file, pid)?;
                }
                if let Some(socket) = &wish.pidfd_socket {
                    super::send_pidfd(socket, pid)?;
                }
                return Ok(pid);
            }
            Some(Says::Failed(message)) => return Err(Error::Monitor(message)),
            None => return Err(Error::Monitor("the container's sandbox was killed".into())),
        }
    }
}

/// Creates and starts a container; unless detached, stands for it until its end and removes it.
///
/// # Errors
/// It cannot be created or started.
pub fn run(context: &Context, wish: &Run) -> Result<u8> {
    let signals = Signals::block()?;
    let pid = make(context, &wish.create, wish.detach)?;
    let id = &wish.create.id;
    let started = life::start(context, id);
    if let Err(error) = started {
        let _ = life::delete(context, id, true);
        return Err(error);
    }
    if wish.detach {
        return Ok(0);
    }
    let container = context.root.load(id)?;
    let raw = if container.has_terminal() { Raw::enter()? } else { None };
    let status = stand_for(pid, &signals);
    drop(raw);
    if !wish.keep {
        life::delete(context, id, true)?;
    }
    status
}

/// Passes signals on to the sandbox, a child of ours, until it ends as the container's process did.
fn stand_for(pid: i32, signals: &Signals) -> Result<u8> {
    let what = || "cannot wait for the container".to_owned();
    let none = || std::io::Error::from(std::io::ErrorKind::NotFound);
    let child = rustix::process::Pid::from_raw(pid).ok_or_else(none).context(what)?;
    let pidfd: OwnedFd =
        rustix::process::pidfd_open(child, rustix::process::PidfdFlags::empty()).context(what)?;
    loop {
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context(what),
        }
        if !fds[0].revents().is_empty() {
            let status =
                rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty()).context(what)?;
            let status = status.map(|(_, status)| status);
            let code = status.and_then(|status| {
                status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal))
            });
            return Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255));
        }
        while let Some(signal) = signals.next() {
            // SAFETY: kill takes integers; the child is not reaped yet, so the pid is its own.
            unsafe { libc::kill(pid, signal.cast_signed()) };
        }
    }
}

/// Reads all of standard input, for `update --resources -`.
///
/// # Errors
/// It cannot be read.
pub fn standard_input() -> Result<Vec<u8>> {
    let mut text = Vec::new();
    std::io::stdin().take(1 << 20).read_to_end(&mut text).context(|| "cannot read standard input".into())?;
    Ok(text)
}
