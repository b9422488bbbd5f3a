//! The stream port: one connection carries one standard stream, a terminal, or an archive.
//!
//! Bytes go through a bounded buffer; the side that cannot take more stops the other. A stream has ended when its pipe
//! says so, not when its process has: what a process wrote last is what people want to read most.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use bulkhead_protocol::agent::{StreamHello, StreamReply, stream_hello::Kind};
use bulkhead_protocol::stream::MAX_HELLO;
use prost::Message;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use crate::agent::{Agent, Source};
use crate::container::process::{Slot, State};
use crate::error::{Code, Error, Result};
use crate::ports::Port;
use crate::rpc::is_of_the_past;

/// Bytes in flight per direction: as much as a pipe holds.
const BUFFER: usize = 64 << 10;
/// Buffers moved before other connections have their turn.
const TURN: usize = 16;

/// A stream connection.
pub struct Stream {
    socket: OwnedFd,
    phase: Phase,
}

enum Phase {
    /// The hello arrives, perhaps in pieces.
    Hello(Vec<u8>),
    /// It is for a terminal that has not come from the child yet.
    Parked(u32, Kind),
    /// Bytes flow.
    Open(Relay),
    /// It is no process's, but goes to a port of the loopback.
    Port(Port),
}

/// Both directions of an open stream; one of them is absent for all but a terminal.
struct Relay {
    process: u32,
    kind: Kind,
    local: Rc<OwnedFd>,
    inward: Option<Flow>,
    outward: Option<Flow>,
    /// The process has ended: an empty pipe is a finished pipe, whoever may still hold its other end.
    empty_is_end: bool,
}

/// One direction.
#[derive(Debug)]
pub struct Flow {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    ended: bool,
}

/// How a flow left off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// One side has to do something first.
    Blocked,
    /// It has had its turn.
    Unfinished,
    /// Everything has been passed on.
    Ended,
    /// Nobody takes it any more.
    Refused,
    /// The connection is not this machine's: see [`is_of_the_past`].
    Lost,
}

impl Flow {
    /// With nothing in it.
    pub fn new() -> Self {
        Self { buffer: vec![0; BUFFER].into(), start: 0, end: 0, ended: false }
    }

    /// Moves what can be moved now.
    pub fn pump(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, empty_is_end: bool) -> Pace {
        for _ in 0..TURN {
            while let Some(rest) = self.buffer.get(self.start..self.end).filter(|rest| !rest.is_empty()) {
                match rustix::io::write(to, rest) {
                    Ok(count) => self.start += count,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return Pace::Blocked,
                    Err(errno) if is_of_the_past(errno) => return Pace::Lost,
                    Err(_) => return Pace::Refused,
                }
            }
            if self.ended {
                return Pace::Ended;
            }
            (self.start, self.end) = (0, 0);
            match rustix::io::read(from, &mut *self.buffer) {
                Ok(0) => self.ended = true,
                Ok(count) => self.end = count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if !empty_is_end => return Pace::Blocked,
                Err(errno) if is_of_the_past(errno) => return Pace::Lost,
                // EIO: the last holder of a terminal has closed it.
                Err(_) => self.ended = true,
            }
        }
        Pace::Unfinished
    }
}

impl Stream {
    /// A connection that has just been accepted.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, phase: Phase::Hello(Vec::new()) }
    }

    /// From now on it goes to a port.
    pub fn carry(&mut self, port: Port) {
        self.phase = Phase::Port(port);
    }

    /// The connection and the port that it goes to.
    pub fn port(&mut self) -> Option<(BorrowedFd<'_>, &mut Port)> {
        match &mut self.phase {
            Phase::Port(port) => Some((self.socket.as_fd(), port)),
            _ => None,
        }
    }

    fn process(&self) -> Option<u32> {
        match &self.phase {
            Phase::Hello(_) | Phase::Port(_) => None,
            Phase::Parked(process, _) => Some(*process),
            Phase::Open(relay) => Some(relay.process),
        }
    }

    /// Answers the hello. The socket's buffer is empty: a reply always fits.
    pub fn reply(&self, error: &str) -> bool {
        let reply = StreamReply { error: error.to_owned() }.encode_length_delimited_to_vec();
        rustix::io::write(&self.socket, &reply).is_ok_and(|count| count == reply.len())
    }
}

/// Reads a length-delimited hello byte by byte: what follows belongs to the stream. `None` when more must come.
fn read_hello(socket: &OwnedFd, bytes: &mut Vec<u8>) -> Result<Option<StreamHello>> {
    let too_long = || Error::invalid(format!("a hello of over {MAX_HELLO} bytes"));
    loop {
        let missing = match length_prefix(bytes) {
            Some((prefix, length)) if length <= MAX_HELLO => match (prefix + length).checked_sub(bytes.len())
            {
                Some(0) | None => {
                    let hello = StreamHello::decode(bytes.get(prefix..).unwrap_or_default());
                    return hello.map(Some).map_err(|error| Error::invalid(error.to_string()));
                }
                Some(missing) => missing,
            },
            None if bytes.len() < 3 => 1,
            _ => return Err(too_long()),
        };
        let mut buffer = [0; 512];
        let wanted = missing.min(buffer.len());
        match rustix::io::read(socket, &mut buffer[..wanted]) {
            Ok(0) => return Err(Error::new(Code::Unavailable, "closed")),
            Ok(count) => bytes.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A varint of at most three bytes: its own length and its value.
fn length_prefix(bytes: &[u8]) -> Option<(usize, usize)> {
    let end = bytes.iter().take(3).position(|byte| byte & 0x80 == 0)?;
    let digits = bytes.get(..=end)?.iter().rev();
    Some((end + 1, digits.fold(0, |value, byte| value << 7 | usize::from(byte & 0x7f))))
}

impl Agent {
    /// Goes on with a stream that is ready.
    pub fn relay(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        match &mut stream.phase {
            Phase::Hello(bytes) => match read_hello(&stream.socket, bytes) {
                Ok(None) => {}
                Ok(Some(hello)) => self.connect(id, &hello),
                Err(error) => {
                    stream.reply(&error.message);
                    self.streams.remove(&id);
                }
            },
            Phase::Parked(..) => {}
            Phase::Port(_) => self.go_on_with_port(id),
            Phase::Open(relay) => {
                let (socket, local) = (stream.socket.as_fd(), relay.local.as_fd());
                let inward = relay.inward.as_mut().map(|flow| flow.pump(socket, local, false));
                let outward = relay.outward.as_mut().map(|flow| flow.pump(local, socket, relay.empty_is_end));
                if inward == Some(Pace::Lost) || outward == Some(Pace::Lost) {
                    return self.lose_stream(id);
                }
                if matches!(inward, Some(Pace::Ended | Pace::Refused)) {
                    relay.inward = None;
                }
                let over = |pace| matches!(pace, Some(Pace::Ended | Pace::Refused));
                // A terminal lives by what it says, the others have one direction only.
                if over(outward) || (over(inward) && relay.kind != Kind::Terminal) {
                    self.close_stream(id, outward == Some(Pace::Refused));
                } else if inward == Some(Pace::Unfinished) || outward == Some(Pace::Unfinished) {
                    self.unfinished.push(id);
                }
            }
        }
    }

    fn connect(&mut self, id: u32, hello: &StreamHello) {
        let kind = hello.kind();
        if matches!(kind, Kind::ArchiveIn | Kind::ArchiveOut) {
            // The child that does it has its own copy of the socket.
            let Some(stream) = self.streams.remove(&id) else { return };
            if let Err(error) = self.start_archive(&stream.socket, hello) {
                stream.reply(&error.message);
            }
            return;
        }
        let connected = match kind {
            Kind::Port => self.connect_port(id, hello),
            _ => {
                let process = self.process_id(&hello.container, &hello.exec);
                process.and_then(|process| self.attach(id, process, kind))
            }
        };
        if let Err(error) = connected
            && let Some(stream) = self.streams.remove(&id)
        {
            stream.reply(&error.message);
        }
    }

    /// Lets go of the connection of a process's stream if it is one of the machine that this one is a copy of. One that is only written to
    /// does not show that by itself.
    fn lose_if_of_the_past(&mut self, process: u32, kind: Kind) {
        let lost = self.streams.iter().find_map(|(&id, stream)| match &stream.phase {
            Phase::Open(relay) if relay.process == process && relay.kind == kind => {
                let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
                recv(&stream.socket, &mut [0; 1], flags).is_err_and(is_of_the_past).then_some(id)
            }
            _ => None,
        });
        if let Some(id) = lost {
            self.lose_stream(id);
        }
    }

    /// Joins a connection with its process's stream.
    fn attach(&mut self, id: u32, process_id: u32, kind: Kind) -> Result<()> {
        self.lose_if_of_the_past(process_id, kind);
        let process =
            self.processes.get_mut(&process_id).ok_or_else(|| Error::not_found("no such process"))?;
        let (name, ended) = (process.name(), process.state.has_ended());
        let slot = process.slot(kind)?;
        let (local, rest) = match slot {
            Slot::Unused => return Err(Error::precondition(format!("{kind:?} of {name} was not asked for"))),
            Slot::Connected => {
                return Err(Error::new(
                    Code::AlreadyExists,
                    format!("{kind:?} of {name} is connected already"),
                ));
            }
            Slot::Coming => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.phase = Phase::Parked(process_id, kind);
                }
                return Ok(());
            }
            Slot::Waiting(local, rest) => (Rc::clone(local), rest.take()),
        };
        *slot = Slot::Connected;
        self.watch(local.as_fd(), Source::Stream(id))?;
        let empty_is_end = ended;
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        let flow = |wanted: bool| wanted.then(Flow::new);
        stream.phase = Phase::Open(Relay {
            process: process_id,
            kind,
            local,
            inward: flow(matches!(kind, Kind::Stdin | Kind::Terminal)),
            outward: rest.or_else(|| flow(kind != Kind::Stdin)),
            empty_is_end,
        });
        if !stream.reply("") {
            self.close_stream(id, true);
        }
        self.release_if_connected(process_id);
        self.relay(id);
        Ok(())
    }

    /// Joins the connections that came before their terminal did.
    pub fn connect_parked_streams(&mut self, process: u32) {
        let parked = self.streams.iter().filter_map(|(&id, stream)| match stream.phase {
            Phase::Parked(wanted, kind) if wanted == process => Some((id, kind)),
            _ => None,
        });
        for (id, kind) in parked.collect::<Vec<_>>() {
            if let Err(error) = self.attach(id, process, kind)
                && let Some(stream) = self.streams.remove(&id)
            {
                stream.reply(&error.message);
            }
        }
    }

    /// The machine went on from a snapshot: whoever restored it will connect the process's streams anew, and nothing that it
    /// said is lost.
    fn lose_stream(&mut self, id: u32) {
        let Some(stream) = self.streams.remove(&id) else { return };
        let Phase::Open(relay) = stream.phase else { return };
        self.forget(relay.local.as_fd());
        if let Some(process) = self.processes.get_mut(&relay.process) {
            process.slots[Slot::index(relay.kind)] = Slot::Waiting(relay.local, relay.outward);
        }
    }

    fn close_stream(&mut self, id: u32, peer_lost: bool) {
        let Some(stream) = self.streams.remove(&id) else { return };
        let Phase::Open(relay) = stream.phase else { return };
        if relay.kind == Kind::Terminal {
            // The process holds the master too, so the kernel would go on reporting it.
            self.forget(relay.local.as_fd());
            // Who has lost a terminal may come back to it.
            if let Some(process) = self.processes.get_mut(&relay.process).filter(|_| peer_lost) {
                process.slots[0] = Slot::Waiting(relay.local, None);
            }
        }
    }

    /// The process has ended: its stdin is of no use, the rest of its output is what its pipes still hold.
    ///
    /// An init's output goes on to the real end of its pipe, which its pid namespace's end has brought about.
    pub fn drain_streams_of(&mut self, process_id: u32) {
        let Some(process) = self.processes.get(&process_id) else { return };
        let has_pid_namespace =
            self.containers.get(&process.container).is_some_and(|c| c.namespaces.has_pid());
        let to_the_end =
            process.exec.is_empty() && has_pid_namespace && matches!(process.state, State::Exited(_));
        for id in self.streams_where(|process| process == process_id) {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            match &mut stream.phase {
                Phase::Open(relay) if relay.outward.is_some() => {
                    relay.empty_is_end = !to_the_end;
                    self.relay(id);
                }
                _ => self.close_stream(id, false),
            }
        }
    }

    /// Closes every stream of a container that is being deleted.
    pub fn drop_streams_of(&mut self, container: &str) {
        let of_container = self.processes.values().filter(|process| process.container == container);
        for id in of_container.map(|process| process.id).collect::<Vec<_>>() {
            self.drop_streams_of_process(id);
        }
    }

    /// Closes every stream of a process that is being forgotten.
    pub fn drop_streams_of_process(&mut self, process: u32) {
        for id in self.streams_where(|owner| owner == process) {
            self.close_stream(id, false);
        }
    }

    fn streams_where(&self, wanted: impl Fn(u32) -> bool) -> Vec<u32> {
        let matching = self.streams.iter().filter(|(_, stream)| stream.process().is_some_and(&wanted));
        matching.map(|(&id, _)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, OwnedFd) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (theirs, ours.into())
    }

    proptest! {
        #[test]
        fn a_hello_in_pieces_is_read_to_its_last_byte_only(container in ".{0,200}", cut in any::<prop::sample::Index>(), rest in prop::collection::vec(any::<u8>(), 1..20)) {
            let hello = StreamHello { container, kind: Kind::Stdin.into(), ..Default::default() };
            let bytes = hello.encode_length_delimited_to_vec();
            let (mut theirs, ours) = pair();
            let mut seen = Vec::new();
            let cut = cut.index(bytes.len());
            theirs.write_all(&bytes[..cut]).unwrap();
            prop_assert!(read_hello(&ours, &mut seen).unwrap().is_none());
            theirs.write_all(&bytes[cut..]).unwrap();
            theirs.write_all(&rest).unwrap();
            prop_assert_eq!(read_hello(&ours, &mut seen).unwrap(), Some(hello));
            let mut after = vec![0; 32];
            let count = rustix::io::read(&ours, &mut after).unwrap();
            prop_assert_eq!(&after[..count], rest.as_slice());
        }

        #[test]
        fn noise_is_an_error_or_too_short(noise in prop::collection::vec(any::<u8>(), 0..64)) {
            let (mut theirs, ours) = pair();
            theirs.write_all(&noise).unwrap();
            let _ = read_hello(&ours, &mut Vec::new());
        }
    }

    #[test]
    fn a_flow_stops_for_whoever_is_slow_and_loses_nothing() {
        let (mut source, from) = pair();
        let (sink, to) = pair();
        let data: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
        let sent = data.clone();
        let writer = std::thread::spawn(move || source.write_all(&sent).unwrap());
        let mut flow = Flow::new();
        // Nobody reads: the flow must come to rest with a bounded amount taken.
        for _ in 0..50 {
            flow.pump(from.as_fd(), to.as_fd(), false);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(flow.pump(from.as_fd(), to.as_fd(), false), Pace::Blocked);
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            std::io::Read::read_to_end(&mut { sink }, &mut all).unwrap();
            all
        });
        while flow.pump(from.as_fd(), to.as_fd(), false) != Pace::Ended {
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
        writer.join().unwrap();
        drop(to);
        assert!(reader.join().unwrap() == data);
    }

    #[test]
    fn an_absurd_hello_is_refused() {
        let (mut theirs, ours) = pair();
        theirs.write_all(&[0xff, 0xff, 0x7f]).unwrap();
        assert!(read_hello(&ours, &mut Vec::new()).unwrap_err().message.contains("over"));
    }
}
