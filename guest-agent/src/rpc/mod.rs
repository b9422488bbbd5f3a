//! The ttrpc server: frames in, calls out to [`dispatch`], answers back in any order.

mod dispatch;
mod guest;
#[cfg(test)]
pub mod tests;

use std::os::fd::OwnedFd;

use bulkhead_protocol::wire::{self, Decoder, Kind, Request, Response};
use prost::Message;
use rustix::io::Errno;

use crate::agent::Agent;
use crate::container::process::Process;
use crate::error::{Code, Error, Result};

/// Unsent answers of one connection beyond which its requests are left where they are, in bytes.
const MAX_OUTPUT: usize = 4 << 20;

/// Where an answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Number of the connection.
    pub connection: u32,
    stream: u32,
}

/// One ttrpc connection.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    decoder: Decoder,
    output: Vec<u8>,
    sent: usize,
}

impl Connection {
    /// A connection that has just been accepted.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, decoder: Decoder::default(), output: Vec::new(), sent: 0 }
    }

    /// Sends what can be sent.
    fn flush(&mut self) -> rustix::io::Result<()> {
        while let Some(rest) = self.output.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(&self.socket, rest, rustix::net::SendFlags::NOSIGNAL) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(())
    }

    fn is_congested(&self) -> bool {
        self.output.len() - self.sent > MAX_OUTPUT
    }

    /// The next whole request that has arrived.
    ///
    /// # Errors
    /// The peer has gone, or what it says is not ttrpc: the connection is of no more use.
    fn next_request(&mut self) -> Result<Option<(u32, Request)>> {
        loop {
            let frame = self.decoder.next_frame().map_err(|error| Error::invalid(error.to_string()))?;
            if let Some((header, payload)) = frame {
                if header.kind != Kind::Request {
                    return Err(Error::invalid("a response where a request should be"));
                }
                let request =
                    Request::decode(payload.as_slice()).map_err(|e| Error::invalid(e.to_string()))?;
                return Ok(Some((header.stream_id, request)));
            }
            let mut buffer = [0; 16 << 10];
            match rustix::io::read(&self.socket, &mut buffer) {
                Ok(0) => return Err(Error::new(Code::Unavailable, "closed")),
                Ok(count) => self.decoder.push(buffer.get(..count).unwrap_or_default()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) if is_of_the_past(errno) => {
                    return Err(Error::new(Code::Aborted, "it was another machine's"));
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Whether a connection of vsock has ended because the machine went on from a snapshot, where the kernel was told that all of them
/// are gone (`virtio_vsock_reset_sock`). One that a peer ends is said to be at its end, or broken, instead.
pub fn is_of_the_past(errno: Errno) -> bool {
    errno == Errno::NOTCONN
}

impl Agent {
    /// Goes on with a connection that is ready.
    pub fn serve(&mut self, id: u32) {
        while let Some(connection) = self.connections.get_mut(&id) {
            if let Err(errno) = connection.flush() {
                return self.hang_up(id, is_of_the_past(errno));
            }
            if connection.is_congested() {
                return;
            }
            match connection.next_request() {
                Ok(Some((stream, request))) => self.dispatch(Ticket { connection: id, stream }, &request),
                Ok(None) => return,
                Err(error) => {
                    // One bad peer is no reason to end anything but its own connection.
                    return self.hang_up(id, error.code == Code::Aborted);
                }
            }
        }
    }

    /// Forgets a connection, and kills what was bound to it. `lost`: it was one of the machine that this one is a copy of; then
    /// somebody else comes for the containers, but nobody for their other processes.
    fn hang_up(&mut self, id: u32, lost: bool) {
        self.connections.remove(&id);
        self.resume_with(id, lost);
        let is_bound = |process: &&Process| process.bound == Some(id) && !(lost && process.exec.is_empty());
        let bound = self.processes.values().filter(is_bound);
        for process in bound.filter(|process| !process.state.has_ended()) {
            // One that has just ended needs no signal.
            let _ = process.signal(libc::SIGKILL);
        }
    }

    /// Sends an answer; to nobody, if the caller has gone.
    pub fn answer<M: Message>(&mut self, ticket: Ticket, result: Result<M>) {
        let Some(connection) = self.connections.get_mut(&ticket.connection) else { return };
        let response = match result {
            Ok(message) => Response::ok(&message),
            Err(Error { code, message }) => Response::error(code, message),
        };
        let frame = wire::encode(Kind::Response, ticket.stream, &response).or_else(|error| {
            let response = Response::error(Code::ResourceExhausted, error.to_string());
            wire::encode(Kind::Response, ticket.stream, &response)
        });
        connection.output.extend(frame.unwrap_or_default());
        if let Err(errno) = connection.flush() {
            self.hang_up(ticket.connection, is_of_the_past(errno));
        }
    }

    /// The same for a caller that may have been answered already.
    pub fn answer_maybe<M: Message>(&mut self, ticket: Option<Ticket>, result: Result<M>) {
        if let Some(ticket) = ticket {
            self.answer(ticket, result);
        }
    }

    /// Tells whoever waits for a process how it ended.
    pub fn answer_waiters(&mut self, id: u32) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        let Some(outcome) = process.outcome() else { return };
        for ticket in std::mem::take(&mut process.waiters) {
            self.answer(ticket, outcome.clone());
        }
    }
}
