//! The agent: what it knows, and the loop that waits for the next thing to do.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::SocketFlags;

use crate::boot;
use crate::container::cgroup::Machine;
use crate::container::process::Process;
use crate::container::rootfs::Layers;
use crate::container::{Container, Prepared};
use crate::error::{Context, Result};
use crate::reaper;
use crate::rpc::Connection;
use crate::streams::Stream;
use crate::suspend::Suspended;

/// More connections than this are closed as they come; descriptors must be left for containers.
const MAX_CONNECTIONS: usize = 400;

/// PID 1.
pub struct Agent {
    epoll: OwnedFd,
    rpc_listener: OwnedFd,
    stream_listener: OwnedFd,
    signals: OwnedFd,
    next_id: u32,
    /// What the containers of this guest may have.
    pub machine: Machine,
    /// ttrpc connections.
    pub connections: BTreeMap<u32, Connection>,
    /// Stream connections.
    pub streams: BTreeMap<u32, Stream>,
    /// Streams that were interrupted to let others have their turn.
    pub unfinished: Vec<u32>,
    /// Every process that was started for the host and that it can still ask about.
    pub processes: BTreeMap<u32, Process>,
    /// Containers by id.
    pub containers: BTreeMap<String, Container>,
    /// Image layers that are mounted.
    pub layers: Layers,
    /// The root of a container that is still to come.
    pub prepared: Option<Prepared>,
    /// The guest is being saved.
    pub suspended: Option<Suspended>,
}

/// Who is behind a descriptor that is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Somebody connects to the ttrpc port.
    RpcListener,
    /// Somebody connects to the stream port.
    StreamListener,
    /// A child has ended.
    Signals,
    /// An entry of [`Agent::connections`].
    Connection(u32),
    /// An entry of [`Agent::streams`].
    Stream(u32),
    /// The channel of an entry of [`Agent::processes`].
    Channel(u32),
}

impl Source {
    fn to_data(self) -> EventData {
        let (kind, id) = match self {
            Self::RpcListener => (0, 0),
            Self::StreamListener => (1, 0),
            Self::Signals => (2, 0),
            Self::Connection(id) => (3, id),
            Self::Stream(id) => (4, id),
            Self::Channel(id) => (5, id),
        };
        EventData::new_u64(kind << 32 | u64::from(id))
    }

    fn from_data(data: EventData) -> Self {
        let id = data.u64() as u32;
        match data.u64() >> 32 {
            0 => Self::RpcListener,
            1 => Self::StreamListener,
            2 => Self::Signals,
            3 => Self::Connection(id),
            4 => Self::Stream(id),
            _ => Self::Channel(id),
        }
    }
}

impl Agent {
    /// An agent that listens on two sockets, which must not block.
    ///
    /// # Errors
    /// What epoll and signalfd say.
    pub fn new(rpc_listener: OwnedFd, stream_listener: OwnedFd) -> Result<Self> {
        let agent = Self {
            epoll: epoll::create(CreateFlags::CLOEXEC).context(|| "create an epoll instance")?,
            rpc_listener,
            stream_listener,
            signals: reaper::child_signals()?,
            next_id: 0,
            machine: Machine::this(),
            connections: BTreeMap::new(),
            streams: BTreeMap::new(),
            unfinished: Vec::new(),
            processes: BTreeMap::new(),
            containers: BTreeMap::new(),
            layers: Layers::default(),
            prepared: None,
            suspended: None,
        };
        let add = |fd: &OwnedFd, source: Source| {
            epoll::add(&agent.epoll, fd, source.to_data(), EventFlags::IN).context(|| "watch a descriptor")
        };
        add(&agent.rpc_listener, Source::RpcListener)?;
        add(&agent.stream_listener, Source::StreamListener)?;
        add(&agent.signals, Source::Signals)?;
        Ok(agent)
    }

    /// Serves until the machine ends.
    ///
    /// # Errors
    /// Waiting itself failed.
    pub fn run(&mut self) -> Result<Infallible> {
        let mut events = Vec::with_capacity(32);
        loop {
            self.turn(&mut events, None)?;
        }
    }

    /// Waits once, at most for `timeout`, and does what has become possible.
    fn turn(&mut self, events: &mut Vec<epoll::Event>, timeout: Option<Timespec>) -> Result<()> {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = if self.unfinished.is_empty() { timeout } else { Some(at_once) };
        events.clear();
        match epoll::wait(&self.epoll, spare_capacity(events), timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            result => drop(result.context(|| "wait for events")?),
        }
        for event in events.drain(..) {
            match Source::from_data(event.data) {
                Source::RpcListener => self.accept(true),
                Source::StreamListener => self.accept(false),
                Source::Signals => self.reap(),
                Source::Connection(id) => self.serve(id),
                Source::Stream(id) => self.relay(id),
                Source::Channel(id) => self.hear_child(id),
            }
        }
        for id in std::mem::take(&mut self.unfinished) {
            self.relay(id);
        }
        Ok(())
    }

    /// Watches a descriptor. Edge-triggered: whoever is woken goes on until nothing more can be done.
    ///
    /// # Errors
    /// What epoll says.
    pub fn watch(&self, fd: impl AsFd, source: Source) -> Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, fd, source.to_data(), flags).context(|| "watch a descriptor")
    }

    /// Stops watching a descriptor that somebody else still holds.
    pub fn forget(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Readable when a child has ended.
    pub fn signals(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }

    /// A number for a connection, stream or process. Reused after four billion of them.
    pub fn new_id(&mut self) -> u32 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }

    fn accept(&mut self, rpc: bool) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // One at a time: the listeners are level-triggered and ask again.
        let listener = if rpc { &self.rpc_listener } else { &self.stream_listener };
        let Ok(socket) = rustix::net::accept_with(listener, flags) else { return };
        if !boot::is_host(socket.as_fd()) {
            return;
        }
        if self.connections.len() + self.streams.len() >= MAX_CONNECTIONS {
            return;
        }
        let id = self.new_id();
        let source = if rpc { Source::Connection(id) } else { Source::Stream(id) };
        if self.watch(&socket, source).is_err() {
            return;
        }
        if rpc {
            self.connections.insert(id, Connection::new(socket));
        } else {
            self.streams.insert(id, Stream::new(socket));
        }
    }
}

#[cfg(test)]
impl Agent {
    /// Serves until `done`; for tests.
    pub fn run_until(&mut self, mut done: impl FnMut(&Self) -> bool) {
        let mut events = Vec::with_capacity(32);
        let tick = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        while !done(self) {
            self.turn(&mut events, Some(tick)).unwrap();
        }
    }
}
