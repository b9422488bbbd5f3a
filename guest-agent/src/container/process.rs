//! A process that the host has started: a container's init or an exec.

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use bulkhead_protocol::agent::{Stdio, WaitProcessResponse, stream_hello::Kind};

use crate::error::{Code, Context, Error, Result, check};
use crate::rpc::Ticket;
use crate::streams::Flow;

/// Where a process is in its life.
#[derive(Debug)]
pub enum State {
    /// The child prepares itself.
    SettingUp,
    /// Ready, waiting to be let go.
    Held,
    /// Let go; execve has not been seen to succeed.
    Starting,
    /// It runs the program.
    Running,
    /// It has ended.
    Exited(Exit),
    /// It never ran the program.
    Failed(Error),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0..255; 128+signal.
    pub code: u32,
    /// 0: exited by itself.
    pub signal: u32,
    /// By the kernel, for want of memory.
    pub oom_killed: bool,
    /// Guest wall clock, nanoseconds.
    pub at_ns: i64,
}

/// One standard stream, on the agent's side.
#[derive(Debug)]
pub enum Slot {
    /// /dev/null for the process.
    Unused,
    /// Nobody has connected it yet, or whoever did is gone; then perhaps with bytes that are still to be passed on.
    Waiting(Rc<OwnedFd>, Option<Flow>),
    /// The terminal's master has not come from the child yet.
    Coming,
    /// A connection carries it, or has.
    Connected,
}

/// What the agent knows of a process.
#[derive(Debug)]
pub struct Process {
    /// The agent's own number.
    pub id: u32,
    /// The container's id.
    pub container: String,
    /// The exec's id; empty for the init.
    pub exec: String,
    /// In the agent's pid namespace.
    pub pid: i32,
    /// The same process for as long as it is open.
    pub pidfd: OwnedFd,
    /// To the child, until it has executed its program.
    pub channel: Option<OwnedFd>,
    /// Where it is in its life.
    pub state: State,
    /// It starts when it is told to, rather than when its streams are connected.
    pub hold: bool,
    /// The create, start or exec call that is to be answered.
    pub caller: Option<Ticket>,
    /// The wait calls that are to be answered.
    pub waiters: Vec<Ticket>,
    /// Number of the connection that it is to end with.
    pub bound: Option<u32>,
    /// stdin (or the terminal), stdout, stderr.
    pub slots: [Slot; 3],
    /// The terminal's master.
    pub terminal: Option<Rc<OwnedFd>>,
}

impl State {
    /// Whether there is nothing left to wait for.
    pub fn has_ended(&self) -> bool {
        matches!(self, Self::Exited(_) | Self::Failed(_))
    }
}

impl Slot {
    /// Which of a process's slots carries this kind of stream.
    pub fn index(kind: Kind) -> usize {
        match kind {
            Kind::Stdin | Kind::Terminal => 0,
            Kind::Stdout => 1,
            _ => 2,
        }
    }

    /// The slots of a process: pipes, or a terminal that will come.
    pub fn for_process(terminal: bool, asked: &Stdio, pipes: [Option<OwnedFd>; 3]) -> [Self; 3] {
        if terminal {
            let first = if asked.stdin || asked.stdout { Self::Coming } else { Self::Unused };
            return [first, Self::Unused, Self::Unused];
        }
        pipes.map(|pipe| pipe.map_or(Self::Unused, |fd| Self::Waiting(Rc::new(fd), None)))
    }
}

impl Process {
    /// The slot that a stream connection is for.
    ///
    /// # Errors
    /// The process has no such stream.
    pub fn slot(&mut self, kind: Kind) -> Result<&mut Slot> {
        let has_terminal = self.terminal.is_some() || matches!(self.slots[0], Slot::Coming);
        if has_terminal != (kind == Kind::Terminal) {
            let other = if has_terminal { "has a terminal: connect TERMINAL" } else { "has no terminal" };
            return Err(Error::precondition(format!("{} {other}", self.name())));
        }
        Ok(&mut self.slots[Slot::index(kind)])
    }

    /// Streams that the host asked for and has not connected.
    pub fn unconnected(&self) -> bool {
        self.slots.iter().any(|slot| matches!(slot, Slot::Waiting(..) | Slot::Coming))
    }

    /// For messages.
    pub fn name(&self) -> String {
        if self.exec.is_empty() {
            format!("container {}", self.container)
        } else {
            format!("exec {} of container {}", self.exec, self.container)
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` when it has ended.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let ended = || Error::precondition(format!("{}: process already finished", self.name()));
        if self.state.has_ended() {
            return Err(ended());
        }
        // Before execve nothing of the container's runs that could handle a signal, and an init is deaf to the rest.
        let fatal = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGHUP];
        let held = !matches!(self.state, State::Running);
        let signal = if held && fatal.contains(&signal) { libc::SIGKILL } else { signal };
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: no siginfo is passed; the rest are integers.
        let sent =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.pidfd.as_raw_fd(), signal, none, 0) };
        match check(sent) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(ended()),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Err(Error::invalid(format!("signal {signal} does not exist")))
            }
            result => result.map(|_| ()).context(|| format!("signal {}", self.name())),
        }
    }

    /// The answer to a wait, once there is one.
    pub fn outcome(&self) -> Option<Result<WaitProcessResponse>> {
        match &self.state {
            State::Exited(exit) => Some(Ok(WaitProcessResponse {
                exit_code: exit.code,
                signal: exit.signal,
                oom_killed: exit.oom_killed,
                exited_at_ns: exit.at_ns,
            })),
            State::Failed(error) => Some(Err(error.clone())),
            _ => None,
        }
    }

    /// The error for a child that died before it could say anything.
    pub fn died_in_set_up(&self, exit: Exit) -> Error {
        let how = match exit {
            Exit { oom_killed: true, .. } => "out of memory".to_owned(),
            Exit { signal: 0, code, .. } => format!("exit status {code}"),
            Exit { signal, .. } => format!("signal {signal}"),
        };
        Error::new(Code::Internal, format!("{} died while it was set up: {how}", self.name()))
    }
}
