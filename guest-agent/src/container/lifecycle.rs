//! What the agent does with containers for the host: create, start, exec, delete.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use bulkhead_protocol::agent::{
    CreateContainerRequest, CreateContainerResponse, Empty, ExecProcessRequest, ExecProcessResponse,
    Rootfs as Layers, Stdio,
};
use bulkhead_protocol::mark;

use super::capabilities::Sets;
use super::cgroup::Cgroup;
use super::channel::{self, Report};
use super::child::{self, Common, Init};
use super::namespaces::{Forked, Namespaces, fork_beside, loopback_up, map_ids};
use super::process::{Exit, Process, Slot, State};
use super::rootfs::Rootfs;
use super::seccomp::Filter;
use super::spec::{self, Spec};
use super::{Container, check_id, disks, shared};
use crate::agent::{Agent, Source};
use crate::error::{Code, Context, Error, Result};
use crate::hw;
use crate::rpc::Ticket;

/// Ended execs that can still be asked about, per container.
const MAX_ENDED_EXECS: usize = 256;

/// A forked child, before it has a name.
struct Child {
    pid: i32,
    pidfd: OwnedFd,
    channel: OwnedFd,
    slots: [Slot; 3],
}

impl Agent {
    /// Sets a container up. The call is answered when its init is held.
    ///
    /// # Errors
    /// Whatever is wrong with the request; nothing is left behind.
    pub fn create_container(&mut self, ticket: Ticket, request: &CreateContainerRequest) -> Result<()> {
        let id = &request.id;
        check_id("container id", id)?;
        if self.containers.contains_key(id) {
            return Err(Error::new(Code::AlreadyExists, format!("container {id} exists")));
        }
        let mut spec = Spec::parse(&request.spec)?;
        if let Some(process) = &mut spec.process {
            process.pause = request.pause;
        }
        let mut namespaces = Namespaces::from_spec(&spec.linux, |id| self.init_of(id))?;
        let seccomp = request.seccomp.as_ref().map(Filter::from_message).transpose()?;
        shared::take(&mut spec.mounts)?;
        request.disks.iter().try_for_each(|disk| crate::disk::wait_for_size(&disk.source, disk.bytes))?;
        disks::renumber(&mut spec)?;
        let mut rootfs = self.root_of(id, request.rootfs.as_ref().unwrap_or(&Layers::default()))?;
        let created = Cgroup::create(id, &spec.linux.resources, &self.machine).and_then(|cgroup| match self
            .fork_init(request, &spec, &namespaces, &rootfs, &cgroup, seccomp.as_ref())
        {
            Ok(child) => Ok((cgroup, child)),
            Err(error) => {
                let _ = cgroup.kill();
                let _ = cgroup.remove();
                Err(error)
            }
        });
        let (cgroup, child) = match created {
            Ok(created) => created,
            Err(error) => {
                let _ = rootfs.unmount(&mut self.layers);
                return Err(error);
            }
        };
        namespaces.let_go();
        let init = self.adopt(child, id, "", ticket, true);
        let oom_score_adj = spec.process.as_ref().and_then(|process| process.oom_score_adj);
        let container = Container {
            id: id.clone(),
            init,
            execs: BTreeMap::new(),
            cgroup,
            shares: shared::below_shares(request, &spec.mounts),
            rootfs,
            namespaces,
            seccomp,
            oom_score_adj,
            oom_kills_seen: 0,
            deleting: None,
            emptied: None,
            never_created: None,
        };
        self.containers.insert(id.clone(), container);
        Ok(())
    }

    fn fork_init(
        &self,
        request: &CreateContainerRequest,
        spec: &Spec,
        namespaces: &Namespaces,
        rootfs: &Rootfs,
        cgroup: &Cgroup,
        seccomp: Option<&Filter>,
    ) -> Result<Child> {
        let process = spec.process.as_ref().ok_or_else(|| Error::invalid("the spec has no process"))?;
        let asked = request.stdio.unwrap_or_default();
        let fork = || namespaces.fork(cgroup.fd());
        if namespaces.has_user() {
            crate::boot::mount_sysfs()?;
        }
        if namespaces.shares_net() {
            loopback_up()?;
        }
        let keep: Vec<_> = namespaces.files().collect();
        let child = start_child(process, &asked, seccomp, &keep, fork, |common| {
            let init =
                Init { spec, namespaces, rootfs: &rootfs.path, cgroup: cgroup.path(), files: &request.files };
            child::init(common, &init)
        })?;
        if namespaces.has_user() {
            map_ids(child.pid, &spec.linux)?;
            channel::proceed(&child.channel).context(|| "let the container's init go on")?;
        }
        Ok(child)
    }

    /// Runs one more process. The call is answered when it is held, or, if no stream is to be connected, runs.
    ///
    /// # Errors
    /// Whatever is wrong with the request.
    pub fn exec_process(&mut self, ticket: Ticket, request: &ExecProcessRequest) -> Result<()> {
        check_id("exec id", &request.exec)?;
        let process = spec::Process::parse(&request.process)?;
        let container = self.container(&request.container)?;
        if container.execs.contains_key(&request.exec) {
            return Err(Error::new(Code::AlreadyExists, format!("exec {} exists", request.exec)));
        }
        let init = self.processes.get(&container.init).filter(|init| matches!(init.state, State::Running));
        let init = init
            .ok_or_else(|| Error::precondition(format!("container {} is not running", request.container)))?;
        let asked = request.stdio.unwrap_or_default();
        let pidfd = init.pidfd.as_fd();
        let cgroup = container.cgroup.for_exec(init.pid)?;
        let fork = || fork_beside(pidfd, cgroup.as_fd());
        let child = start_child(&process, &asked, container.seccomp.as_ref(), &[pidfd], fork, |common| {
            child::exec(common, pidfd, &container.namespaces, container.oom_score_adj)
        })?;
        let id = self.adopt(child, &request.container, &request.exec, ticket, request.hold);
        if let Some(container) = self.containers.get_mut(&request.container) {
            container.execs.insert(request.exec.clone(), id);
        }
        self.forget_old_execs(&request.container);
        Ok(())
    }

    /// Knows the child from now on. If it cannot be watched, it sees its channel closed and ends.
    fn adopt(&mut self, child: Child, container: &str, exec: &str, ticket: Ticket, hold: bool) -> u32 {
        let id = self.new_id();
        let Child { pid, pidfd, channel, slots } = child;
        let channel = self.watch(&channel, Source::Channel(id)).is_ok().then_some(channel);
        let process = Process {
            id,
            container: container.to_owned(),
            exec: exec.to_owned(),
            pid,
            pidfd,
            channel,
            state: State::SettingUp,
            hold,
            caller: Some(ticket),
            waiters: Vec::new(),
            bound: None,
            slots,
            terminal: None,
        };
        self.processes.insert(id, process);
        id
    }

    /// Lets a held process go. The call is answered when the program runs, or cannot.
    ///
    /// # Errors
    /// It is not held, or its streams are not connected.
    pub fn start_process(&mut self, ticket: Ticket, container: &str, exec: &str) -> Result<()> {
        let id = self.process_id(container, exec)?;
        let process = self.processes.get(&id).ok_or_else(|| Error::internal("the container has no init"))?;
        match &process.state {
            State::Held if process.unconnected() => {
                Err(Error::precondition(format!("{}: not every stream is connected", process.name())))
            }
            State::Held => {
                if let Some(process) = self.processes.get_mut(&id) {
                    process.caller = Some(ticket);
                }
                self.release(id);
                Ok(())
            }
            State::SettingUp => Err(Error::precondition(format!("{} is not created yet", process.name()))),
            State::Starting | State::Running => Err(Error::precondition(format!("{} runs", process.name()))),
            State::Exited(_) | State::Failed(_) => {
                Err(Error::precondition(format!("{} has ended already", process.name())))
            }
        }
    }

    /// Starts an exec whose last stream has just been connected.
    pub fn release_if_connected(&mut self, id: u32) {
        let Some(process) = self.processes.get(&id) else { return };
        if matches!(process.state, State::Held) && !process.hold && !process.unconnected() {
            self.release(id);
        }
    }

    fn release(&mut self, id: u32) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.state = State::Starting;
        if process.exec.is_empty() {
            hw::mark(mark::CONTAINER_STARTED);
        }
        // Should the child be dead, its exit says so.
        let _ = process.channel.as_ref().map(channel::proceed);
    }

    /// Takes what a child has to say about its set-up.
    pub fn hear_child(&mut self, id: u32) {
        while let Some(channel) = self.processes.get(&id).and_then(|process| process.channel.as_ref()) {
            match channel::receive(channel) {
                Report::Nothing => return,
                Report::Ready(terminal) => self.child_is_ready(id, terminal),
                Report::Failed(error) => self.child_has_failed(id, error),
                Report::Closed => self.child_is_gone(id),
            }
        }
    }

    fn child_is_ready(&mut self, id: u32, terminal: Option<OwnedFd>) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.state = State::Held;
        if let Some(terminal) = terminal {
            let _ = rustix::io::ioctl_fionbio(&terminal, true);
            let terminal = Rc::new(terminal);
            if matches!(process.slots[0], Slot::Coming) {
                process.slots[0] = Slot::Waiting(Rc::clone(&terminal), None);
            }
            process.terminal = Some(terminal);
        }
        let (pid, is_init) = (process.pid as u32, process.exec.is_empty());
        if is_init {
            let caller = process.caller.take();
            self.answer_maybe(caller, Ok(CreateContainerResponse { pid }));
        } else if process.hold || process.unconnected() {
            let caller = process.caller.take();
            self.answer_maybe(caller, Ok(ExecProcessResponse { pid }));
        }
        self.connect_parked_streams(id);
        self.release_if_connected(id);
    }

    fn child_has_failed(&mut self, id: u32, error: Error) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.channel = None;
        let before = std::mem::replace(&mut process.state, State::Failed(error.clone()));
        let caller = process.caller.take();
        let (answered, is_init) = (caller.is_some(), process.exec.is_empty());
        let container = process.container.clone();
        if is_init && matches!(before, State::SettingUp) {
            // It was never created. The caller hears of it when nothing is left and the id is free again.
            if let Some(container) = self.containers.get_mut(&container) {
                container.deleting.get_or_insert_default();
                container.never_created = caller.map(|caller| (caller, error));
            }
            return;
        }
        self.answer_maybe::<Empty>(caller, Err(error));
        self.answer_waiters(id);
        if !is_init && answered {
            self.forget_exec(id);
        } else {
            self.drain_streams_of(id);
        }
    }

    /// The child's end is closed: it has executed its program, or died, which the reaper will find.
    fn child_is_gone(&mut self, id: u32) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.channel = None;
        if !matches!(process.state, State::Starting) {
            return;
        }
        process.state = State::Running;
        let (caller, pid) = (process.caller.take(), process.pid as u32);
        if process.hold {
            self.answer_maybe(caller, Ok(Empty {}));
        } else {
            self.answer_maybe(caller, Ok(ExecProcessResponse { pid }));
        }
    }

    /// A child that ended without a word while it was setting itself up, by the OOM killer for one.
    pub fn fail_if_setting_up(&mut self, id: u32, exit: Exit) {
        let Some(process) = self.processes.get(&id) else { return };
        if matches!(process.state, State::SettingUp) {
            let error = process.died_in_set_up(exit);
            self.child_has_failed(id, error);
        }
    }

    /// Removes a container whose init does not run; the call is answered when everything of it is gone.
    ///
    /// # Errors
    /// It runs, or does not exist.
    pub fn delete_container(&mut self, ticket: Ticket, id: &str) -> Result<()> {
        let init = self.container(id)?.init;
        let state = self.processes.get(&init).map(|process| &process.state);
        if matches!(state, Some(State::Running | State::Starting | State::SettingUp)) {
            return Err(Error::precondition(format!("container {id} is running: kill it first")));
        }
        let container = self.container_mut(id)?;
        container.cgroup.kill()?;
        container.deleting.get_or_insert_default().push(ticket);
        if container.emptied.is_none() {
            // Orphans in a pid namespace of another container's are that one's children: no signal tells of their end.
            let events = container.cgroup.events()?;
            self.watch(&events, Source::Signals)?;
            self.container_mut(id)?.emptied = Some(events);
        }
        self.finish_deletions();
        Ok(())
    }

    /// Takes down the containers that are to be deleted and whose last process has ended.
    pub fn finish_deletions(&mut self) {
        let wanted = self.containers.values().filter(|container| container.deleting.is_some());
        let ids: Vec<_> = wanted.map(|container| container.id.clone()).collect();
        for id in ids {
            let mut own = self.processes.values().filter(|process| process.container == id);
            let ended = own.all(|process| process.state.has_ended());
            if !ended || self.containers.get(&id).is_some_and(|container| container.cgroup.is_populated()) {
                continue;
            }
            let Some(mut container) = self.containers.remove(&id) else { continue };
            self.drop_streams_of(&id);
            let own = self.processes.values().filter(|process| process.container == id);
            for process in own.map(|process| process.id).collect::<Vec<_>>() {
                self.answer_waiters(process);
            }
            self.processes.retain(|_, process| process.container != id);
            let done = container.cgroup.remove().and(container.rootfs.unmount(&mut self.layers));
            shared::forget(&container.shares);
            if let Some((caller, error)) = container.never_created {
                self.answer::<Empty>(caller, Err(error));
            }
            for ticket in container.deleting.unwrap_or_default() {
                self.answer(ticket, done.clone().map(|()| Empty {}));
            }
        }
    }

    fn forget_exec(&mut self, id: u32) {
        let Some(process) = self.processes.remove(&id) else { return };
        self.drop_streams_of_process(id);
        if let Some(container) = self.containers.get_mut(&process.container) {
            container.execs.remove(&process.exec);
        }
    }

    fn forget_old_execs(&mut self, container: &str) {
        let Some(execs) = self.containers.get(container).map(|container| &container.execs) else { return };
        let ended = |id: &&u32| self.processes.get(id).is_none_or(|process| process.state.has_ended());
        let mut ended: Vec<_> = execs.values().filter(ended).copied().collect();
        ended.sort_unstable();
        for id in ended.iter().rev().skip(MAX_ENDED_EXECS) {
            self.forget_exec(*id);
        }
    }

    /// The container with this id.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub fn container(&self, id: &str) -> Result<&Container> {
        self.containers.get(id).ok_or_else(|| no_container(id))
    }

    /// The pid of a container's init, which has not ended.
    fn init_of(&self, id: &str) -> Result<i32> {
        let init = self.processes.get(&self.container(id)?.init);
        let living = init.filter(|init| !init.state.has_ended() && !matches!(init.state, State::SettingUp));
        living.map(|init| init.pid).ok_or_else(|| {
            Error::precondition(format!("container {id} has ended: its namespaces cannot be joined"))
        })
    }

    fn container_mut(&mut self, id: &str) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| no_container(id))
    }

    /// The container's init, or one of its execs.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub fn process_id(&self, container: &str, exec: &str) -> Result<u32> {
        let found = self.container(container)?;
        let id = if exec.is_empty() { Some(found.init) } else { found.execs.get(exec).copied() };
        id.filter(|id| self.processes.contains_key(id))
            .ok_or_else(|| Error::not_found(format!("container {container} has no exec {exec}")))
    }
}

fn no_container(id: &str) -> Error {
    Error::not_found(format!("container {id} does not exist"))
}

/// Forks, and has the child set itself up; of the agent's descriptors it keeps its streams and `keep`.
fn start_child(
    process: &spec::Process,
    asked: &Stdio,
    seccomp: Option<&Filter>,
    keep: &[BorrowedFd<'_>],
    fork: impl FnOnce() -> Result<Forked>,
    body: impl FnOnce(&Common<'_>) -> Result<Infallible>,
) -> Result<Child> {
    let capabilities =
        Sets::from_spec(process.capabilities.as_ref().unwrap_or(&spec::Capabilities::default()))?;
    let (ours, theirs) = channel::pair().context(|| "make a channel to the child")?;
    let pipes_asked = if process.terminal { Stdio::default() } else { *asked };
    let (stdio, pipes) = child::pipes(&pipes_asked)?;
    match fork()? {
        Forked::Parent { pid, pidfd } => {
            let slots = Slot::for_process(process.terminal, asked, pipes);
            Ok(Child { pid, pidfd, channel: ours, slots })
        }
        Forked::Child => {
            let streams = [&stdio.stdin, &stdio.stdout, &stdio.stderr].into_iter().flatten();
            let keep: Vec<_> =
                streams.chain([&theirs]).map(OwnedFd::as_fd).chain(keep.iter().copied()).collect();
            child::close_all_but(&keep);
            child::run(theirs, |channel| body(&Common { channel, stdio, process, seccomp, capabilities }))
        }
    }
}
