//! What each task is doing: the state machine between containerd's calls and whatever runs containers ([`Backend`]).
//!
//! Calls for one task come one after the other, and its end waits for the call that is under way. So events come in the
//! order of the life they tell of: create, start, exit, delete.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;

use crate::reap::Exit;

/// How long the end of a task that is deleted may take to be noticed.
const PATIENCE: Duration = Duration::from_secs(10);
/// Status of a process that was killed.
const KILLED: u32 = 137;

/// What went wrong, in the kinds that containerd tells apart.
#[derive(Debug)]
pub enum Error {
    /// There is no such task or process, or it has ended.
    NotFound(String),
    /// The id is in use.
    AlreadyExists(String),
    /// Not in the state it is in.
    Precondition(String),
    /// What was asked for makes no sense.
    Invalid(String),
    /// It was tried, and failed.
    Failed(anyhow::Error),
}

/// A result with that error.
pub type Result<T> = std::result::Result<T, Error>;

impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// Where a process's streams go: paths of fifos, URIs of loggers, empty for none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Read from.
    pub stdin: String,
    /// Written to.
    pub stdout: String,
    /// Written to.
    pub stderr: String,
    /// One terminal in the place of all three.
    pub terminal: bool,
}

/// What containerd is told of.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are those of containerd's events")]
pub enum Event {
    Create { id: String, bundle: PathBuf, stdio: Stdio, pid: u32 },
    Start { id: String, pid: u32 },
    ExecAdded { id: String, exec: String },
    ExecStarted { id: String, exec: String, pid: u32 },
    Oom { id: String },
    Paused { id: String },
    Resumed { id: String },
    Checkpointed { id: String, path: PathBuf },
    Exit { id: String, process: String, pid: u32, exit: Exit },
    Delete { id: String, process: String, pid: u32, exit: Exit },
}

impl Event {
    /// The task's id.
    pub fn id(&self) -> &str {
        match self {
            Self::Create { id, .. }
            | Self::Start { id, .. }
            | Self::ExecAdded { id, .. }
            | Self::ExecStarted { id, .. }
            | Self::Oom { id }
            | Self::Paused { id }
            | Self::Resumed { id }
            | Self::Checkpointed { id, .. }
            | Self::Exit { id, .. }
            | Self::Delete { id, .. } => id,
        }
    }
}

/// A task to be made.
#[derive(Clone, Debug)]
pub struct Create<M> {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its streams.
    pub stdio: Stdio,
    /// What only the backend understands.
    pub more: M,
}

/// How a task is to be saved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where to: a directory that is empty, or not there.
    pub path: PathBuf,
    /// It is to end then.
    pub exit: bool,
}

/// A process that has been made.
#[derive(Debug)]
pub struct Made<S> {
    /// Its pid on the host.
    pub pid: u32,
    /// Told of its end.
    pub ended: Receiver<Exit>,
    /// Its streams.
    pub streams: S,
}

/// The streams of a process, as far as calls reach them.
pub trait Streams: Send + 'static {
    /// Ends its standard input.
    fn close_input(&mut self);
    /// Gives its terminal another size.
    ///
    /// # Errors
    /// It has none.
    fn resize(&self, rows: u16, columns: u16) -> anyhow::Result<()>;
}

/// What runs containers. No call comes for a task that is not there, and never two at a time for one.
pub trait Backend: Send + Sync + 'static {
    /// Of [`Create`].
    type More;
    /// Of its processes.
    type Streams: Streams;
    /// What it says about a task's use of resources.
    type Stats;

    /// Makes a container whose process waits.
    ///
    /// # Errors
    /// It cannot; nothing of it is left then.
    fn create(&self, create: &Create<Self::More>) -> anyhow::Result<Made<Self::Streams>>;
    /// Lets the process go.
    ///
    /// # Errors
    /// It cannot.
    fn start(&self, id: &str) -> anyhow::Result<()>;
    /// Runs one more process; `spec` is runtime-spec's `process`.
    ///
    /// # Errors
    /// It cannot.
    fn exec(&self, id: &str, exec: &str, spec: &Value, stdio: &Stdio) -> anyhow::Result<Made<Self::Streams>>;
    /// Signals the container's process, or all of them.
    ///
    /// # Errors
    /// It cannot.
    fn kill(&self, id: &str, signal: u32, all: bool) -> anyhow::Result<()>;
    /// Signals another process of the container's.
    ///
    /// # Errors
    /// It cannot.
    fn kill_exec(&self, pid: u32, signal: u32) -> anyhow::Result<()>;
    /// Suspends all processes.
    ///
    /// # Errors
    /// It cannot.
    fn pause(&self, id: &str) -> anyhow::Result<()>;
    /// Lets them go on.
    ///
    /// # Errors
    /// It cannot.
    fn resume(&self, id: &str) -> anyhow::Result<()>;
    /// Changes limits: runtime-spec's `linux.resources`.
    ///
    /// # Errors
    /// It cannot.
    fn update(&self, id: &str, resources: &Value) -> anyhow::Result<()>;
    /// Saves a container that runs or is suspended. With `exit` its process ends of it.
    ///
    /// # Errors
    /// It cannot; it goes on then as it was.
    fn checkpoint(&self, id: &str, checkpoint: &Checkpoint) -> anyhow::Result<()>;
    /// Measures.
    ///
    /// # Errors
    /// It cannot.
    fn stats(&self, id: &str) -> anyhow::Result<Self::Stats>;
    /// Whether the process that has just ended did so for want of memory.
    fn was_oom(&self, id: &str) -> bool;
    /// Removes a container, whether its process has ended or not.
    ///
    /// # Errors
    /// Something of it is left.
    fn delete(&self, id: &str) -> anyhow::Result<()>;
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It waits for `start`.
    Created,
    /// It runs.
    Running,
    /// It is suspended.
    Paused,
    /// It has ended.
    Stopped(Exit),
}

/// What is known of a process.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The task's bundle.
    pub bundle: PathBuf,
    /// 0 before it runs.
    pub pid: u32,
    /// Where it is.
    pub phase: Phase,
    /// Its streams.
    pub stdio: Stdio,
}

/// All tasks of this process.
pub struct Tasks<B: Backend> {
    backend: B,
    publish: Box<dyn Fn(Event) + Send + Sync>,
    table: Mutex<Table<B>>,
}

struct Table<B: Backend> {
    tasks: HashMap<String, Arc<Task<B>>>,
    /// Being made.
    reserved: HashSet<String>,
}

struct Task<B: Backend> {
    id: String,
    bundle: PathBuf,
    state: Mutex<State<B>>,
    /// A process has ended.
    ended: Condvar,
}

struct State<B: Backend> {
    init: Process<B>,
    execs: HashMap<String, Process<B>>,
}

struct Process<B: Backend> {
    pid: u32,
    phase: Phase,
    stdio: Stdio,
    streams: Option<B::Streams>,
    /// Of an exec that has not been started.
    spec: Value,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the process; and nothing is left half done in between.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Backend> State<B> {
    fn process(&mut self, id: &str, exec: &str) -> Result<&mut Process<B>> {
        if exec.is_empty() {
            return Ok(&mut self.init);
        }
        self.execs.get_mut(exec).ok_or_else(|| Error::NotFound(format!("task {id} has no process {exec}")))
    }
}

impl<B: Backend> Tasks<B> {
    /// None yet.
    pub fn new(backend: B, publish: impl Fn(Event) + Send + Sync + 'static) -> Arc<Self> {
        let table = Mutex::new(Table { tasks: HashMap::new(), reserved: HashSet::new() });
        Arc::new(Self { backend, publish: Box::new(publish), table })
    }

    /// Whether there is none, nor one being made.
    pub fn is_empty(&self) -> bool {
        let table = lock(&self.table);
        table.tasks.is_empty() && table.reserved.is_empty()
    }

    fn task(&self, id: &str) -> Result<Arc<Task<B>>> {
        let task = lock(&self.table).tasks.get(id).cloned();
        task.ok_or_else(|| Error::NotFound(format!("task {id} does not exist")))
    }

    /// Makes a task. Answers its pid.
    ///
    /// # Errors
    /// The id is in use, or the backend's.
    pub fn create(self: &Arc<Self>, create: &Create<B::More>) -> Result<u32> {
        {
            let mut table = lock(&self.table);
            if table.tasks.contains_key(&create.id) || !table.reserved.insert(create.id.clone()) {
                return Err(Error::AlreadyExists(format!("task {} exists", create.id)));
            }
        }
        let made = self.backend.create(create);
        let mut table = lock(&self.table);
        table.reserved.remove(&create.id);
        let Made { pid, ended, streams } = made?;
        let (phase, stdio) = (Phase::Created, create.stdio.clone());
        let init = Process { pid, phase, stdio, streams: Some(streams), spec: Value::Null };
        let task = Arc::new(Task {
            id: create.id.clone(),
            bundle: create.bundle.clone(),
            state: Mutex::new(State { init, execs: HashMap::new() }),
            ended: Condvar::new(),
        });
        let state = lock(&task.state);
        table.tasks.insert(create.id.clone(), Arc::clone(&task));
        drop(table);
        let (id, bundle, stdio) = (create.id.clone(), create.bundle.clone(), create.stdio.clone());
        (self.publish)(Event::Create { id, bundle, stdio, pid });
        drop(state);
        self.attend(task, String::new(), ended);
        Ok(pid)
    }

    /// Waits for a process's end, in a thread of its own.
    fn attend(self: &Arc<Self>, task: Arc<Task<B>>, exec: String, ended: Receiver<Exit>) {
        let tasks = Arc::clone(self);
        std::thread::spawn(move || {
            let exit = ended.recv().unwrap_or_else(|_| Exit::now(255));
            let mut state = lock(&task.state);
            if exec.is_empty() && tasks.backend.was_oom(&task.id) {
                (tasks.publish)(Event::Oom { id: task.id.clone() });
            }
            let Ok(process) = state.process(&task.id, &exec) else { return };
            process.phase = Phase::Stopped(exit);
            process.streams = None;
            let (id, pid) = (task.id.clone(), process.pid);
            let process = if exec.is_empty() { id.clone() } else { exec };
            (tasks.publish)(Event::Exit { id, process, pid, exit });
            task.ended.notify_all();
        });
    }

    /// Starts the task's process, or one that was added. Answers its pid.
    ///
    /// # Errors
    /// It has been started already, or the backend's.
    pub fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let task = self.task(id)?;
        let mut state = lock(&task.state);
        let init = state.init.phase;
        let process = state.process(id, exec)?;
        if process.phase != Phase::Created {
            return Err(Error::Precondition(format!("process {exec} of task {id} has been started already")));
        }
        if exec.is_empty() {
            self.backend.start(id)?;
            process.phase = Phase::Running;
            (self.publish)(Event::Start { id: id.to_owned(), pid: process.pid });
            return Ok(process.pid);
        }
        if init != Phase::Running {
            return Err(Error::Precondition(format!("task {id} is not running")));
        }
        let made = self.backend.exec(id, exec, &process.spec, &process.stdio);
        let Made { pid, ended, streams } = made.inspect_err(|_| {
            // Who asks for it finds that it has ended, as with any other runtime.
            process.phase = Phase::Stopped(Exit::now(255));
            task.ended.notify_all();
        })?;
        (process.pid, process.phase, process.streams) = (pid, Phase::Running, Some(streams));
        (self.publish)(Event::ExecStarted { id: id.to_owned(), exec: exec.to_owned(), pid });
        drop(state);
        self.attend(task, exec.to_owned(), ended);
        Ok(pid)
    }

    /// Adds a process, to be started later.
    ///
    /// # Errors
    /// Its id is in use, or the task does not run.
    pub fn add_exec(&self, id: &str, exec: &str, spec: Value, stdio: Stdio) -> Result<()> {
        let task = self.task(id)?;
        let mut state = lock(&task.state);
        if exec.is_empty() {
            return Err(Error::Invalid("the process has no id".into()));
        }
        if state.execs.contains_key(exec) {
            return Err(Error::AlreadyExists(format!("process {exec} of task {id} exists")));
        }
        if let Phase::Stopped(_) = state.init.phase {
            return Err(Error::Precondition(format!("task {id} has ended")));
        }
        let process = Process { pid: 0, phase: Phase::Created, stdio, streams: None, spec };
        state.execs.insert(exec.to_owned(), process);
        (self.publish)(Event::ExecAdded { id: id.to_owned(), exec: exec.to_owned() });
        Ok(())
    }

    /// Removes a task, or one of its other processes. Answers its pid and how it ended.
    ///
    /// # Errors
    /// It runs, or the backend's.
    pub fn delete(&self, id: &str, exec: &str) -> Result<(u32, Exit)> {
        let task = self.task(id)?;
        let mut state = lock(&task.state);
        let (pid, phase) = state.process(id, exec).map(|process| (process.pid, process.phase))?;
        let exit = match phase {
            Phase::Stopped(exit) => exit,
            // It has never run, so nothing is lost; one that was added was never made.
            Phase::Created if exec.is_empty() => {
                self.backend.delete(id)?;
                // Its end is told first.
                let ended = |state: &mut State<B>| !matches!(state.init.phase, Phase::Stopped(_));
                let waited = task.ended.wait_timeout_while(state, PATIENCE, ended);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                match state.init.phase {
                    Phase::Stopped(exit) => exit,
                    _ => Exit::now(KILLED),
                }
            }
            Phase::Created => Exit::now(0),
            Phase::Running | Phase::Paused => {
                return Err(Error::Precondition(format!("task {id} is running: kill it first")));
            }
        };
        if !exec.is_empty() {
            state.execs.remove(exec);
            return Ok((pid, exit));
        }
        if phase != Phase::Created {
            self.backend.delete(id)?;
        }
        lock(&self.table).tasks.remove(id);
        (self.publish)(Event::Delete { id: id.to_owned(), process: String::new(), pid, exit });
        Ok((pid, exit))
    }

    /// Signals a process, or all of the task's.
    ///
    /// # Errors
    /// It has ended, or the backend's.
    pub fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let task = self.task(id)?;
        let mut state = lock(&task.state);
        let process = state.process(id, exec)?;
        match process.phase {
            Phase::Stopped(_) => Err(Error::NotFound(format!("process of task {id} has ended already"))),
            Phase::Created if !exec.is_empty() => {
                Err(Error::Precondition(format!("process {exec} of task {id} has not been started")))
            }
            _ if exec.is_empty() => Ok(self.backend.kill(id, signal, all)?),
            _ => Ok(self.backend.kill_exec(process.pid, signal)?),
        }
    }

    /// Waits for a process's end.
    ///
    /// # Errors
    /// There is none.
    pub fn wait(&self, id: &str, exec: &str) -> Result<Exit> {
        let task = self.task(id)?;
        let mut state = lock(&task.state);
        loop {
            if let Phase::Stopped(exit) = state.process(id, exec)?.phase {
                return Ok(exit);
            }
            state = task.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The same for a task's own process, but for no longer than `patience`.
    ///
    /// # Errors
    /// There is none.
    pub fn wait_for(&self, id: &str, patience: Duration) -> Result<Option<Exit>> {
        let task = self.task(id)?;
        let lives = |state: &mut State<B>| !matches!(state.init.phase, Phase::Stopped(_));
        let waited = task.ended.wait_timeout_while(lock(&task.state), patience, lives);
        match waited.unwrap_or_else(PoisonError::into_inner).0.init.phase {
            Phase::Stopped(exit) => Ok(Some(exit)),
            _ => Ok(None),
        }
    }

    /// What is known of a process.
    ///
    /// # Errors
    /// There is none.
    pub fn state(&self, id: &str, exec: &str) -> Result<Snapshot> {
        let task = self.task(id)?;
        let mut state = lock(&task.state);
        let Process { pid, phase, stdio, .. } = state.process(id, exec)?;
        Ok(Snapshot { bundle: task.bundle.clone(), pid: *pid, phase: *phase, stdio: stdio.clone() })
    }

    /// The pids of a task's processes, with the ids of those that were added.
    ///
    /// # Errors
    /// There is no such task.
    pub fn pids(&self, id: &str) -> Result<Vec<(u32, String)>> {
        let task = self.task(id)?;
        let state = lock(&task.state);
        let others = state.execs.iter().map(|(exec, process)| (process, exec.clone()));
        let all = std::iter::once((&state.init, String::new())).chain(others);
        let lives = |process: &Process<B>| process.pid != 0 && !matches!(process.phase, Phase::Stopped(_));
        Ok(all.filter(|(process, _)| lives(process)).map(|(process, exec)| (process.pid, exec)).collect())
    }

    /// Suspends a task, or lets it go on.
    ///
    /// # Errors
    /// It is in another state, or the backend's.
    pub fn suspend(&self, id: &str, suspend: bool) -> Result<()> {
        let task = self.task(id)?;
        let mut state = lock(&task.state);
        let (from, to) =
            if suspend { (Phase::Running, Phase::Paused) } else { (Phase::Paused, Phase::Running) };
        if state.init.phase != from {
            let word = if suspend { "running" } else { "paused" };
            return Err(Error::Precondition(format!("task {id} is not {word}")));
        }
        if suspend { self.backend.pause(id) } else { self.backend.resume(id) }?;
        state.init.phase = to;
        let id = id.to_owned();
        (self.publish)(if suspend { Event::Paused { id } } else { Event::Resumed { id } });
        Ok(())
    }

    /// Saves a task that runs or is suspended. One that is to end of it does so as if it had been killed: that is told by its end.
    ///
    /// # Errors
    /// It has not been started or has ended, or the backend's.
    pub fn checkpoint(&self, id: &str, checkpoint: &Checkpoint) -> Result<()> {
        let task = self.task(id)?;
        let state = lock(&task.state);
        match state.init.phase {
            Phase::Running | Phase::Paused => {}
            Phase::Created => return Err(Error::Precondition(format!("task {id} has not been started"))),
            Phase::Stopped(_) => return Err(Error::NotFound(format!("task {id} has ended"))),
        }
        self.backend.checkpoint(id, checkpoint)?;
        // While the state is held, so that an end of it is told after.
        (self.publish)(Event::Checkpointed { id: id.to_owned(), path: checkpoint.path.clone() });
        Ok(())
    }

    /// Does something with a task that has not ended.
    fn living<T>(&self, id: &str, work: impl FnOnce(&B) -> anyhow::Result<T>) -> Result<T> {
        let task = self.task(id)?;
        let state = lock(&task.state);
        if let Phase::Stopped(_) = state.init.phase {
            return Err(Error::NotFound(format!("task {id} has ended")));
        }
        Ok(work(&self.backend)?)
    }

    /// Changes a task's limits.
    ///
    /// # Errors
    /// It has ended, or the backend's.
    pub fn update(&self, id: &str, resources: &Value) -> Result<()> {
        self.living(id, |backend| backend.update(id, resources))
    }

    /// Measures a task.
    ///
    /// # Errors
    /// It has ended, or the backend's.
    pub fn stats(&self, id: &str) -> Result<B::Stats> {
        self.living(id, |backend| backend.stats(id))
    }

    /// Does something with a process's streams, if it has them still.
    ///
    /// # Errors
    /// There is no such process, or `work`'s.
    pub fn streams(
        &self,
        id: &str,
        exec: &str,
        work: impl FnOnce(&mut B::Streams) -> anyhow::Result<()>,
    ) -> Result<()> {
        let task = self.task(id)?;
        let mut state = lock(&task.state);
        match &mut state.process(id, exec)?.streams {
            Some(streams) => Ok(work(streams)?),
            None => Ok(()),
        }
    }
}
