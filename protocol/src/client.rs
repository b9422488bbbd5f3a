//! A blocking ttrpc client for one caller: write the request, read until its response.
//!
//! A connection over vsock costs little, so a caller that waits for something long opens one of its own; nothing
//! here needs a thread.

use std::io::{self, Read, Write};

use prost::Message;

use crate::stream::read_within;
use crate::wire::{self, Code, HEADER_LEN, Header, Kind, Request, Response, WireError};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The peer answered with an error.
    #[error("{message}")]
    Refused {
        /// What kind of refusal.
        code: Code,
        /// The peer's words, cut to a length that can be printed.
        message: String,
    },
    /// The connection broke.
    #[error("the connection to the agent broke during {method}")]
    Io {
        /// The call under way.
        method: &'static str,
        /// What the socket said.
        #[source]
        source: io::Error,
    },
    /// The peer does not speak ttrpc.
    #[error("the agent's answer to {method} is not valid")]
    Wire {
        /// The call under way.
        method: &'static str,
        /// What is wrong with it.
        #[source]
        source: WireError,
    },
}

impl CallError {
    /// The peer's code, if it answered at all.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// Longest error text that is taken from the peer, in characters.
const MAX_MESSAGE: usize = 4096;
/// Most frames that belong to no call of this client's before it gives up: none comes from an agent.
const MAX_STRAYS: u32 = 16;

/// The peer's words as they can be shown: cut to a length that can be printed, and without anything that a terminal would
/// obey.
#[must_use]
pub fn words(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).take(MAX_MESSAGE).collect()
}

/// A time limit of the socket has passed: says what that means.
fn silent(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock {
        return io::Error::new(
            io::ErrorKind::TimedOut,
            "no answer in time: the guest, or its monitor, stands still",
        );
    }
    error
}

/// One connection to a service.
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
    service: &'static str,
    next_id: u32,
}

impl<S: Read + Write> Client<S> {
    /// Speaks to `service` over a connected stream.
    pub fn new(stream: S, service: &'static str) -> Self {
        Self { stream, service, next_id: 1 }
    }

    /// The connection, to wait on it or to set time limits.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Sends a request without waiting; [`Client::receive`] takes its answer.
    ///
    /// # Errors
    /// The connection broke, or the request is over the size limit.
    pub fn send(&mut self, method: &'static str, request: &impl Message) -> Result<u32, CallError> {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(2);
        let request = Request {
            service: self.service.to_owned(),
            method: method.to_owned(),
            payload: request.encode_to_vec(),
            timeout_nano: 0,
        };
        let frame =
            wire::encode(Kind::Request, id, &request).map_err(|source| CallError::Wire { method, source })?;
        self.stream.write_all(&frame).map_err(|source| CallError::Io { method, source })?;
        Ok(id)
    }

    /// Waits for the answer to request `id`. Answers to other requests are dropped, as far as there are few: one call at a time.
    ///
    /// # Errors
    /// Every [`CallError`].
    pub fn receive<R: Message + Default>(&mut self, method: &'static str, id: u32) -> Result<R, CallError> {
        let io = |source| CallError::Io { method, source: silent(source) };
        let bad = |source| CallError::Wire { method, source };
        for _ in 0..=MAX_STRAYS {
            let mut begun = None;
            let mut header = [0; HEADER_LEN];
            read_within(&mut self.stream, &mut header, &mut begun).map_err(io)?;
            let header = Header::parse(&header).map_err(bad)?;
            let mut payload = vec![0; header.length];
            read_within(&mut self.stream, &mut payload, &mut begun).map_err(io)?;
            if header.kind != Kind::Response || header.stream_id != id {
                continue;
            }
            let response = Response::decode(payload.as_slice()).map_err(|e| bad(e.into()))?;
            if let Some(status) = response.status.filter(|status| status.code != 0) {
                let message = words(&status.message);
                return Err(CallError::Refused { code: Code::from_number(status.code), message });
            }
            return wire::decode_answer(&response.payload).map_err(bad);
        }
        Err(bad(WireError::Unasked))
    }

    /// A call and its answer.
    ///
    /// # Errors
    /// Every [`CallError`].
    pub fn call<R: Message + Default>(
        &mut self,
        method: &'static str,
        request: &impl Message,
    ) -> Result<R, CallError> {
        let id = self.send(method, request)?;
        self.receive(method, id)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::agent::{ContainerRequest, CreateContainerResponse};

    fn answered_with(response: Response) -> Result<CreateContainerResponse, CallError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&wire::encode(Kind::Response, 1, &response).unwrap()).unwrap();
        Client::new(ours, "s").call("M", &ContainerRequest { container: "c".into() })
    }

    #[test]
    fn a_call_returns_its_answer() {
        let answer = answered_with(Response::ok(&CreateContainerResponse { pid: 42 })).unwrap();
        assert_eq!(answer.pid, 42);
    }

    #[test]
    fn a_refusal_keeps_code_and_words() {
        let error = answered_with(Response::error(Code::NotFound, "no such thing")).unwrap_err();
        assert_eq!(error.code(), Some(Code::NotFound));
        assert_eq!(error.to_string(), "no such thing");
    }

    #[test]
    fn a_refusal_does_nothing_to_a_terminal() {
        let said = format!("no\x1b]0;owned\x07 such\tthing\n\u{9b}2J{}", "x".repeat(5000));
        let shown = answered_with(Response::error(Code::NotFound, said)).unwrap_err().to_string();
        assert!(shown.starts_with("no]0;owned such\tthing\n2Jxxx"), "{shown:?}");
        assert_eq!(shown.chars().count(), MAX_MESSAGE);
    }

    #[test]
    fn who_says_much_that_nobody_asked_for_is_not_listened_to() {
        for (strays, heard) in [(MAX_STRAYS, true), (MAX_STRAYS + 1, false)] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let answer = Response::ok(&CreateContainerResponse { pid: 42 });
            for _ in 0..strays {
                theirs.write_all(&wire::encode(Kind::Response, 7, &answer).unwrap()).unwrap();
            }
            theirs.write_all(&wire::encode(Kind::Response, 1, &answer).unwrap()).unwrap();
            let result =
                Client::new(ours, "s").call::<CreateContainerResponse>("M", &ContainerRequest::default());
            assert_eq!(result.is_ok(), heard, "{strays}: {result:?}");
        }
    }

    #[test]
    fn a_silent_peer_is_not_waited_for_longer_than_the_socket_says() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(std::time::Duration::from_millis(5))).unwrap();
        let error = Client::new(ours, "s").call::<CreateContainerResponse>("M", &ContainerRequest::default());
        let Err(CallError::Io { source, .. }) = error else { panic!("{error:?}") };
        assert_eq!(source.kind(), io::ErrorKind::TimedOut);
        assert!(source.to_string().contains("stands still"), "{source}");
    }

    #[test]
    fn a_closed_connection_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let error = Client::new(ours, "s")
            .call::<CreateContainerResponse>("M", &ContainerRequest::default())
            .unwrap_err();
        assert!(matches!(error, CallError::Io { .. }));
    }
}
