//! All streams of the device, and the host's sockets behind them. Owns an epoll instance of its own, so that streams
//! come and go without the event loop knowing.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{BUFFER, Connection, Credit, Fate, Outgoing, op};
use super::metrics::Metrics;
use super::packet::Header;
use super::stream::close_cleanly;
use crate::devices::virtio::Progress;
use crate::listen::Listener;
use crate::timeline::now_ns;

/// The host's context id.
const HOST_CID: u64 = 2;
const TYPE_STREAM: u16 = 1;
/// Most streams, handshakes included; fewer where the process may not have so many descriptors.
const MAX_STREAMS: usize = 1024;
/// Of the descriptors that the process may have, streams get one in so many: the guest must not be able to leave none for those
/// who come to the control socket.
const SHARE_OF_DESCRIPTORS: u64 = 2;
/// Credit of a stream by how many there are already, so that a guest whose streams nobody reads costs 28 MiB and not 256.
const WINDOWS: [(usize, u32); 3] = [(32, BUFFER), (128, BUFFER / 4), (MAX_STREAMS, BUFFER / 16)];
/// Most refusals that wait for a receive buffer. A guest that makes more gets no answer to some.
const MAX_REFUSALS: usize = 256;
/// First port number given to host ends.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Longest `CONNECT <port>\n`.
const MAX_GREETING: usize = 32;
/// Epoll data of the listener; streams count from 1.
const LISTENER: u64 = 0;
const EVENTS: usize = 64;
/// At the end: how long the host may take nothing, and how long it may take in all.
const FINISH_STALL: Duration = Duration::from_secs(5);
const FINISH_TOTAL: Duration = Duration::from_secs(30);

/// The two ports of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Ports {
    host: u32,
    guest: u32,
}

enum Entry {
    /// A host program that has not said yet where it wants to.
    Greeting(UnixStream),
    Stream {
        ports: Ports,
        connection: Connection<UnixStream>,
        queued: bool,
    },
}

/// See the module.
pub struct Muxer {
    cid: u64,
    listener: Listener,
    epoll: Epoll,
    entries: BTreeMap<u64, Entry>,
    /// Streams that the guest knows.
    by_ports: BTreeMap<Ports, u64>,
    /// Streams that may have something for the guest, each at most once.
    sending: VecDeque<u64>,
    /// Streams to refuse.
    refusals: VecDeque<Ports>,
    next_entry: u64,
    next_port: u32,
    max_streams: usize,
    metrics: Arc<Metrics>,
}

impl Muxer {
    /// Listens on `socket` for streams to the guest.
    pub fn new(cid: u64, socket: &Path, metrics: Arc<Metrics>) -> io::Result<Self> {
        let listener = Listener::bind(socket)?;
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, LISTENER);
        epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
        Ok(Self {
            cid,
            listener,
            epoll,
            entries: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            sending: VecDeque::new(),
            refusals: VecDeque::new(),
            next_entry: LISTENER + 1,
            next_port: FIRST_HOST_PORT,
            max_streams: MAX_STREAMS.min((descriptors() / SHARE_OF_DESCRIPTORS) as usize),
            metrics,
        })
    }

    /// Credit for one more stream.
    fn window(&self) -> u32 {
        let streams = self.entries.len();
        WINDOWS.iter().find(|(until, _)| streams < *until).map_or(BUFFER / 16, |(_, window)| *window)
    }

    /// Readable when something happened on the host's side.
    pub fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// The guest goes on from a snapshot, and may still hold streams of the machine that it was part of: until its programs have
    /// let go of those, a new one with the same ports would be taken for an old one. So port numbers begin somewhere else.
    pub fn forget_ports(&mut self) {
        let mut random = [0; 4];
        // Without randomness, the time tells one machine from an earlier one as well.
        let filled = crate::random::fill(&mut random);
        let number = filled.map_or_else(|_| now_ns() as u32, |()| u32::from_ne_bytes(random));
        self.next_port = FIRST_HOST_PORT + number / 2;
    }

    /// The guest's driver has gone: all streams end. What the host has not taken yet is lost.
    pub fn reset(&mut self) {
        for (_, mut entry) in std::mem::take(&mut self.entries) {
            if let Entry::Stream { connection, .. } = &mut entry {
                close_cleanly(&mut connection.stream);
            }
        }
        self.by_ports.clear();
        self.sending.clear();
        self.refusals.clear();
    }

    /// Whether [`Self::next`] may have something.
    pub fn wants_to_send(&self) -> bool {
        !self.refusals.is_empty() || !self.sending.is_empty()
    }

    /// A packet from the guest.
    pub fn on_packet(&mut self, packet: &Header, payload: &[VolatileSlice<'_>]) {
        let ports = Ports { host: packet.dst_port, guest: packet.src_port };
        let credit = Credit { buf_alloc: packet.buf_alloc, fwd_cnt: packet.fwd_cnt };
        let addressed =
            packet.dst_cid == HOST_CID && packet.src_cid == self.cid && packet.kind == TYPE_STREAM;
        let known = self.by_ports.get(&ports).copied().filter(|_| addressed);
        let Some(id) = known else {
            match packet.op {
                op::REQUEST if addressed => self.connect(ports, credit),
                op::RST => {}
                _ => self.refuse(ports),
            }
            return;
        };
        let Some(Entry::Stream { connection, .. }) = self.entries.get_mut(&id) else { return };
        match packet.op {
            op::RESPONSE => connection.on_response(credit, format!("OK {}\n", ports.host).as_bytes()),
            op::RST => connection.on_reset(),
            op::SHUTDOWN => {
                connection.on_credit(credit);
                connection.on_shutdown(packet.flags);
            }
            op::RW => {
                connection.on_credit(credit);
                connection.on_data(payload);
            }
            op::CREDIT_UPDATE => connection.on_credit(credit),
            op::CREDIT_REQUEST => {
                connection.on_credit(credit);
                connection.on_credit_request();
            }
            _ => connection.reset(),
        }
        self.settle(id);
    }

    /// The next packet for the guest, its payload already in `payload`.
    pub fn next(&mut self, payload: &[VolatileSlice<'_>]) -> Option<Header> {
        if let Some(ports) = self.refusals.pop_front() {
            let credit = Credit { buf_alloc: 0, fwd_cnt: 0 };
            return Some(self.header(ports, Outgoing { op: op::RST, flags: 0, length: 0, credit }));
        }
        while let Some(id) = self.sending.pop_front() {
            let Some(Entry::Stream { ports, connection, queued }) = self.entries.get_mut(&id) else {
                continue;
            };
            *queued = false;
            let ports = *ports;
            let outgoing = connection.next(payload);
            // Behind all others, if it has more: streams take turns.
            self.settle(id);
            if let Some(outgoing) = outgoing {
                return Some(self.header(ports, outgoing));
            }
        }
        None
    }

    fn header(&self, ports: Ports, outgoing: Outgoing) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len: outgoing.length,
            kind: TYPE_STREAM,
            op: outgoing.op,
            flags: outgoing.flags,
            buf_alloc: outgoing.credit.buf_alloc,
            fwd_cnt: outgoing.credit.fwd_cnt,
        }
    }

    /// Works off what happened on the host's sockets. `active`: whether the guest can have new streams.
    pub fn on_host_events(&mut self, active: bool) -> Progress {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(count) {
            match event.data() {
                LISTENER => self.accept(active),
                id => self.on_stream_event(id, event.event_set()),
            }
        }
        if count == EVENTS { Progress::More } else { Progress::Done }
    }

    fn accept(&mut self, active: bool) {
        while let Ok(stream) = self.listener.accept() {
            if !active || self.entries.len() >= self.max_streams || stream.set_nonblocking(true).is_err() {
                Metrics::add(&self.metrics.refused, 1);
                continue;
            }
            self.insert(&stream.as_raw_fd(), |_| Entry::Greeting(stream));
        }
    }

    /// Watches `fd` and remembers its entry. Without a watch there is no entry: its socket closes.
    fn insert(&mut self, fd: &RawFd, entry: impl FnOnce(u64) -> Entry) -> Option<u64> {
        let id = self.next_entry;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, *fd, EpollEvent::new(events, id)).ok()?;
        self.next_entry += 1;
        self.entries.insert(id, entry(id));
        Some(id)
    }

    fn on_stream_event(&mut self, id: u64, events: EventSet) {
        match self.entries.get_mut(&id) {
            None => {}
            Some(Entry::Greeting(_)) => self.on_greeting(id),
            Some(Entry::Stream { connection, .. }) => {
                let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
                if hung_up || events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
                    connection.on_host_readable(hung_up);
                }
                if hung_up || events.contains(EventSet::OUT) {
                    connection.on_host_writable();
                }
                self.settle(id);
            }
        }
    }

    /// A host program says where it wants to, or something wrong, or only a part so far.
    fn on_greeting(&mut self, id: u64) {
        let Some(Entry::Greeting(stream)) = self.entries.get(&id) else { return };
        let guest = match read_greeting(stream) {
            Greeting::Port(port) => port,
            Greeting::Incomplete => return,
            Greeting::Wrong => {
                self.entries.remove(&id);
                return;
            }
        };
        let host = self.free_port(guest);
        let Some(Entry::Greeting(stream)) = self.entries.remove(&id) else { return };
        let ports = Ports { host, guest };
        let connection = Connection::request(stream, self.window());
        self.entries.insert(id, Entry::Stream { ports, connection, queued: false });
        self.by_ports.insert(ports, id);
        Metrics::add(&self.metrics.connections, 1);
        self.settle(id);
    }

    /// A host port that makes a new pair with `guest`. There are far more ports than streams.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    /// The guest wants a stream to a host program.
    fn connect(&mut self, ports: Ports, credit: Credit) {
        let mut path = self.listener.path().as_os_str().to_owned();
        path.push(format!("_{}", ports.host));
        let room = self.entries.len() < self.max_streams;
        let stream = if room { connect_now(Path::new(&path)).ok() } else { None };
        let window = self.window();
        let entry = stream.and_then(|stream| {
            self.insert(&stream.as_raw_fd(), |_| Entry::Stream {
                ports,
                connection: Connection::accept(stream, credit, window),
                queued: false,
            })
        });
        match entry {
            Some(id) => {
                self.by_ports.insert(ports, id);
                Metrics::add(&self.metrics.connections, 1);
                self.settle(id);
            }
            None => self.refuse(ports),
        }
    }

    fn refuse(&mut self, ports: Ports) {
        Metrics::add(&self.metrics.refused, 1);
        if self.refusals.len() < MAX_REFUSALS {
            self.refusals.push_back(ports);
        }
    }

    /// After anything happened to a stream: it is queued to send, or forgotten by the guest, or closed.
    fn settle(&mut self, id: u64) {
        let Some(Entry::Stream { ports, connection, queued }) = self.entries.get_mut(&id) else { return };
        if connection.wants_to_send() && !*queued {
            *queued = true;
            self.sending.push_back(id);
        }
        match connection.fate() {
            Fate::Alive => {}
            fate => {
                if self.by_ports.get(ports) == Some(&id) {
                    self.by_ports.remove(ports);
                }
                if fate == Fate::Finished {
                    close_cleanly(&mut connection.stream);
                    self.entries.remove(&id);
                }
            }
        }
    }

    /// Gives the host what the guest has sent, waiting for a while where a reader is slow, and ends all streams.
    pub fn finish(&mut self) {
        self.listener.unlink();
        let start = Instant::now();
        let mut last = start;
        while start.elapsed() < FINISH_TOTAL && last.elapsed() < FINISH_STALL {
            let mut waiting = Vec::new();
            let (mut before, mut after) = (0, 0);
            for entry in self.entries.values_mut() {
                let Entry::Stream { connection, .. } = entry else { continue };
                before += connection.buffered();
                connection.on_host_writable();
                after += connection.buffered();
                if connection.buffered() > 0 {
                    let fd = connection.stream.as_raw_fd();
                    waiting.push(libc::pollfd { fd, events: libc::POLLOUT, revents: 0 });
                }
            }
            if waiting.is_empty() {
                break;
            }
            if after < before {
                last = Instant::now();
            }
            let timeout = FINISH_STALL.as_millis() as libc::c_int;
            // SAFETY: as many pollfds as it is told of, living across the call.
            unsafe { libc::poll(waiting.as_mut_ptr(), waiting.len() as libc::nfds_t, timeout) };
        }
        self.reset();
    }
}

/// How many descriptors the process may have.
fn descriptors() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: one rlimit that lives across the call.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
        0 => limit.rlim_cur,
        _ => 1024,
    }
}

/// Connects without ever waiting: a listener whose backlog is full refuses.
fn connect_now(path: &Path) -> io::Result<UnixStream> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: no pointers involved; zeros are a valid sockaddr_un.
    let (fd, mut address) = unsafe {
        let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        (libc::socket(libc::AF_UNIX, kind, 0), std::mem::zeroed::<libc::sockaddr_un>())
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor just made, owned by nobody else.
    let stream: UnixStream = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: pointer and length are those of an address that lives across the call.
    let result = unsafe { libc::connect(fd, (&raw const address).cast(), length) };
    if result == 0 { Ok(stream) } else { Err(io::Error::last_os_error()) }
}

#[derive(Debug, PartialEq, Eq)]
enum Greeting {
    Port(u32),
    Incomplete,
    Wrong,
}

/// Takes `CONNECT <port>\n` from the socket, and nothing of what follows it.
fn read_greeting(stream: &UnixStream) -> Greeting {
    let mut buffer = [0; MAX_GREETING];
    let receive = |buffer: &mut [u8], flags| {
        let pointer = buffer.as_mut_ptr().cast();
        // SAFETY: pointer and length are those of a slice.
        let got =
            unsafe { libc::recv(stream.as_raw_fd(), pointer, buffer.len(), flags | libc::MSG_DONTWAIT) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    };
    let seen = match receive(&mut buffer, libc::MSG_PEEK) {
        Ok(0) => return Greeting::Wrong,
        Ok(seen) => buffer.get(..seen).unwrap_or_default(),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            return Greeting::Incomplete;
        }
        Err(_) => return Greeting::Wrong,
    };
    let parsed = parse_greeting(seen);
    if let (Greeting::Port(_), Some(end)) = (&parsed, seen.iter().position(|byte| *byte == b'\n')) {
        let mut line = vec![0; end + 1];
        if !matches!(receive(&mut line, 0), Ok(got) if got == line.len()) {
            return Greeting::Wrong;
        }
    }
    parsed
}

fn parse_greeting(seen: &[u8]) -> Greeting {
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        return if seen.len() < MAX_GREETING { Greeting::Incomplete } else { Greeting::Wrong };
    };
    let port = std::str::from_utf8(seen.get(..end).unwrap_or_default())
        .ok()
        .and_then(|line| line.trim_end_matches('\r').strip_prefix("CONNECT "))
        .and_then(|port| port.parse().ok());
    port.map_or(Greeting::Wrong, Greeting::Port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_that_nobody_reads_cost_little() {
        let of_stream =
            |number| WINDOWS.iter().find(|(until, _)| number < *until).map_or(0, |(_, window)| *window);
        let all: u32 = (0..MAX_STREAMS).map(of_stream).sum();
        assert!(all <= 28 << 20, "{all} bytes");
        assert!((0..MAX_STREAMS).all(|number| of_stream(number) >= 16 << 10));
    }

    #[test]
    fn greetings_are_understood() {
        for (text, expected) in [
            (&b"CONNECT 1024\n"[..], Greeting::Port(1024)),
            (b"CONNECT 1024\nmore", Greeting::Port(1024)),
            (b"CONNECT 10", Greeting::Incomplete),
            (b"", Greeting::Incomplete),
            (b"CONNECT -1\n", Greeting::Wrong),
            (b"CONNECT 4294967296\n", Greeting::Wrong),
            (b"GET / HTTP/1.1\r\n", Greeting::Wrong),
            (b"\xff\xfe\n", Greeting::Wrong),
            (&[b'C'; 32], Greeting::Wrong),
        ] {
            assert_eq!(parse_greeting(text), expected, "{}", String::from_utf8_lossy(text));
        }
    }
}
