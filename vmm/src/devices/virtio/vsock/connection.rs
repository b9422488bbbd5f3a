//! One stream between a guest port and a host socket: its state, its credit and its end. Knows nothing of queues or
//! epoll, so that it can be tested against a model.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::Shutdown;
use std::num::Wrapping;

use vm_memory::VolatileSlice;

use super::stream::HostStream;
use crate::devices::virtio::queue;

/// Bytes kept for a host that does not read: the most credit that the guest is given.
pub const BUFFER: u32 = 256 * 1024;
/// Of its credit, so much must come free before the guest is told, if nothing else tells it.
const UPDATE_AFTER: u32 = 4;
/// Most payload bytes of a packet.
pub const MAX_PAYLOAD: u32 = 64 * 1024;

/// Operations of `struct virtio_vsock_hdr`.
pub mod op {
    /// Asks for a stream.
    pub const REQUEST: u16 = 1;
    /// Accepts one.
    pub const RESPONSE: u16 = 2;
    /// Ends or refuses one at once.
    pub const RST: u16 = 3;
    /// Ends directions of one.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Tells how much was consumed.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for that.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of [`op::SHUTDOWN`]: the sender receives no more, sends no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// See [`SHUTDOWN_RECEIVE`].
pub const SHUTDOWN_SEND: u32 = 2;
const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The credit fields that every packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credit {
    /// Size of the sender's buffer.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of it so far, modulo 2^32.
    pub fwd_cnt: u32,
}

/// A packet for the guest, without addresses. Its payload is in the guest's buffer already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outgoing {
    /// Operation.
    pub op: u16,
    /// Flags.
    pub flags: u32,
    /// Payload bytes.
    pub length: u32,
    /// Credit fields.
    pub credit: Credit,
}

/// Whether a connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It lives.
    Alive,
    /// The guest knows no more of it, but the host has data to take.
    Detached,
    /// All is done; close it.
    Finished,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The host asked, the guest has not answered.
    Requested,
    /// Both agreed.
    Established,
    /// The guest is to be told that it is over.
    Reset,
    /// The guest knows that it is over.
    Over,
}

/// See the module.
#[derive(Debug)]
pub struct Connection<S> {
    /// The host's end.
    pub stream: S,
    state: State,
    /// Control packets that wait for a receive buffer.
    send_request: bool,
    send_response: bool,
    send_credit_update: bool,
    send_credit_request: bool,
    send_shutdown: bool,
    /// What the guest was told, or will be by `send_shutdown`.
    our_shutdown: u32,
    /// What the guest told.
    guest_shutdown: u32,
    /// The host's socket may have something to read.
    readable: bool,
    /// The host closed both directions.
    hung_up: bool,
    /// The guest's data that the host has not taken, and how much of it there may be: the guest's credit.
    buffer: VecDeque<u8>,
    window: u32,
    /// Bytes from the guest that the host has taken, and how many the guest was told of.
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
    /// Bytes to the guest, and its credit.
    sent: Wrapping<u32>,
    guest_credit: Credit,
    /// A credit request is on its way; it makes no sense to ask again.
    credit_requested: bool,
}

impl<S: HostStream> Connection<S> {
    /// A stream that the host asks the guest for, which is given credit for `window` bytes.
    pub fn request(stream: S, window: u32) -> Self {
        let mut connection = Self::new(stream, State::Requested, Credit { buf_alloc: 0, fwd_cnt: 0 }, window);
        connection.send_request = true;
        connection
    }

    /// A stream that the guest asked for, and the same.
    pub fn accept(stream: S, guest_credit: Credit, window: u32) -> Self {
        let mut connection = Self::new(stream, State::Established, guest_credit, window);
        connection.send_response = true;
        connection
    }

    fn new(stream: S, state: State, guest_credit: Credit, window: u32) -> Self {
        Self {
            stream,
            state,
            send_request: false,
            send_response: false,
            send_credit_update: false,
            send_credit_request: false,
            send_shutdown: false,
            our_shutdown: 0,
            guest_shutdown: 0,
            readable: true,
            hung_up: false,
            buffer: VecDeque::new(),
            window,
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            guest_credit,
            credit_requested: false,
        }
    }

    /// The guest accepted; `greeting` goes to the host. Anything but an expected acceptance ends the stream.
    pub fn on_response(&mut self, credit: Credit, greeting: &[u8]) {
        self.on_credit(credit);
        if self.state != State::Requested || self.send_request {
            return self.reset();
        }
        self.state = State::Established;
        // A fresh socket has room for a few bytes; a host that is gone shows when it is read or written.
        let _ = self.stream.write_bytes(greeting);
    }

    /// The guest tells how much it has taken.
    pub fn on_credit(&mut self, credit: Credit) {
        self.guest_credit = credit;
        self.credit_requested = false;
    }

    /// The guest asks how much was taken.
    pub fn on_credit_request(&mut self) {
        self.send_credit_update = true;
    }

    /// The guest sends data.
    pub fn on_data(&mut self, data: &[VolatileSlice<'_>]) {
        let length = queue::total(data);
        let established = self.state == State::Established;
        let promised = self.guest_shutdown & SHUTDOWN_SEND == 0;
        // A correct guest never has more than our buffer in flight.
        let room = (self.window as usize).saturating_sub(self.buffer.len());
        if !established || !promised || length > room {
            return self.reset();
        }
        if self.our_shutdown & SHUTDOWN_RECEIVE != 0 {
            // The host takes nothing any more; the guest has not noticed yet.
            self.forwarded += length as u32;
            return self.after_forwarding();
        }
        // What the host takes at once is never copied.
        let taken = if self.buffer.is_empty() && length > 0 { self.write_host(data) } else { Some(0) };
        let Some(taken) = taken else { return self.host_reads_no_more(length) };
        self.forwarded += taken as u32;
        if let Some((_, rest)) = queue::split(data, taken).filter(|(_, rest)| !rest.is_empty()) {
            let mut copy = vec![0; queue::total(&rest)];
            if queue::read_exact(&rest, &mut copy).is_some() {
                self.buffer.extend(copy);
            }
        }
        self.after_forwarding();
    }

    /// Writes as much as the host takes now; `None` when it takes nothing any more.
    fn write_host(&mut self, data: &[VolatileSlice<'_>]) -> Option<usize> {
        loop {
            return match self.stream.write(data) {
                Ok(written) => Some(written),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => Some(0),
                Err(_) => None,
            };
        }
    }

    /// The guest ends directions.
    pub fn on_shutdown(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.readable = false;
            self.stream.shutdown(Shutdown::Read);
        }
        self.after_forwarding();
    }

    /// The guest ends the stream at once. What it had sent is still the host's.
    pub fn on_reset(&mut self) {
        self.state = State::Over;
        self.guest_shutdown = SHUTDOWN_BOTH;
        self.after_forwarding();
    }

    /// The host's socket became readable, or has ended.
    pub fn on_host_readable(&mut self, hung_up: bool) {
        self.readable = self.guest_shutdown & SHUTDOWN_RECEIVE == 0;
        if hung_up {
            self.hung_up = true;
            if self.our_shutdown & SHUTDOWN_SEND != 0 {
                self.shut_down(SHUTDOWN_BOTH);
            }
        }
    }

    /// The host's socket has room.
    pub fn on_host_writable(&mut self) {
        while !self.buffer.is_empty() {
            let (head, _) = self.buffer.as_slices();
            match self.stream.write_bytes(head) {
                Ok(written) => {
                    self.buffer.drain(..written);
                    self.forwarded += written as u32;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => return self.host_reads_no_more(0),
            }
            self.after_forwarding();
        }
        // Streams with much traffic keep nothing when they have a pause.
        self.buffer = VecDeque::new();
    }

    /// Bytes that the host has not taken.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Ends the stream and tells the guest.
    pub fn reset(&mut self) {
        if self.state != State::Over {
            self.state = State::Reset;
        }
    }

    /// What becomes of it.
    pub fn fate(&self) -> Fate {
        match (self.state, self.buffer.is_empty()) {
            (State::Over, true) => Fate::Finished,
            (State::Over, false) => Fate::Detached,
            _ => Fate::Alive,
        }
    }

    /// Whether [`Self::next`] has something for the guest, as far as can be known without trying.
    pub fn wants_to_send(&self) -> bool {
        match self.state {
            State::Over => false,
            State::Reset => true,
            State::Requested => self.send_request,
            State::Established => {
                self.send_response
                    || self.send_credit_update
                    || self.send_credit_request
                    || self.send_shutdown
                    || (self.can_read() && (self.guest_room() > 0 || !self.credit_requested))
            }
        }
    }

    /// The next packet for the guest. Data is read into `payload`, the guest's buffer.
    pub fn next(&mut self, payload: &[VolatileSlice<'_>]) -> Option<Outgoing> {
        match self.state {
            State::Over => return None,
            State::Reset => {
                self.state = State::Over;
                return Some(self.packet(op::RST, 0, 0));
            }
            State::Requested => {
                return std::mem::take(&mut self.send_request).then(|| self.packet(op::REQUEST, 0, 0));
            }
            State::Established => {}
        }
        if std::mem::take(&mut self.send_response) {
            return Some(self.packet(op::RESPONSE, 0, 0));
        }
        if let Some(data) = self.read_host(payload) {
            return Some(data);
        }
        if std::mem::take(&mut self.send_shutdown) {
            return Some(self.packet(op::SHUTDOWN, self.our_shutdown, 0));
        }
        if std::mem::take(&mut self.send_credit_request) {
            return Some(self.packet(op::CREDIT_REQUEST, 0, 0));
        }
        std::mem::take(&mut self.send_credit_update).then(|| self.packet(op::CREDIT_UPDATE, 0, 0))
    }

    fn can_read(&self) -> bool {
        self.readable && self.our_shutdown & SHUTDOWN_SEND == 0
    }

    /// Bytes the guest has room for. A guest that claims to have taken more than was sent gets nothing.
    fn guest_room(&self) -> u32 {
        let in_flight = (self.sent - Wrapping(self.guest_credit.fwd_cnt)).0;
        self.guest_credit.buf_alloc.saturating_sub(in_flight)
    }

    /// Data from the host's socket, if the guest has room.
    fn read_host(&mut self, payload: &[VolatileSlice<'_>]) -> Option<Outgoing> {
        if !self.can_read() {
            return None;
        }
        let room = self.guest_room().min(MAX_PAYLOAD) as usize;
        if room == 0 {
            // Asked once; the guest answers when it knows, or tells by itself when it has taken something.
            if !std::mem::replace(&mut self.credit_requested, true) {
                self.send_credit_request = true;
            }
            return None;
        }
        let (slices, _) = queue::split(payload, room.min(queue::total(payload)))?;
        if slices.is_empty() {
            return None;
        }
        let read = loop {
            match self.stream.read(&slices) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        match read {
            Ok(0) => self.host_ended(),
            Ok(length) => {
                self.sent += length as u32;
                return Some(self.packet(op::RW, 0, length as u32));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            Err(_) => {
                self.hung_up = true;
                self.host_ended();
            }
        }
        None
    }

    fn packet(&mut self, op: u16, flags: u32, length: u32) -> Outgoing {
        // Every packet tells the credit.
        self.told = self.forwarded;
        self.send_credit_update = false;
        let credit = Credit { buf_alloc: self.window, fwd_cnt: self.forwarded.0 };
        Outgoing { op, flags, length, credit }
    }

    /// The host sends no more.
    fn host_ended(&mut self) {
        self.readable = false;
        self.shut_down(if self.hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND });
    }

    /// The host takes nothing any more: `dropped` bytes and the buffer are lost, as with any socket.
    fn host_reads_no_more(&mut self, dropped: usize) {
        self.forwarded += (self.buffer.len() + dropped) as u32;
        self.buffer = VecDeque::new();
        self.shut_down(SHUTDOWN_RECEIVE);
        self.after_forwarding();
    }

    fn shut_down(&mut self, flags: u32) {
        if self.our_shutdown | flags != self.our_shutdown {
            self.our_shutdown |= flags;
            self.send_shutdown = true;
        }
    }

    /// The host has taken something, or the guest has ended something: passes ends on once all before them is taken.
    fn after_forwarding(&mut self) {
        if self.buffer.is_empty() && self.guest_shutdown & SHUTDOWN_SEND != 0 {
            self.stream.shutdown(Shutdown::Write);
            if self.guest_shutdown == SHUTDOWN_BOTH {
                // The guest has closed its socket and waits for this.
                self.reset();
            }
        }
        if (self.forwarded - self.told).0 >= self.window / UPDATE_AFTER {
            self.send_credit_update = true;
        }
    }
}
