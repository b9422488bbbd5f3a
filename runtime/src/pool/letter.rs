//! What is sent to a machine that waits: all that its container is, and the caller's standard streams.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::state::Record;
use crate::supervise::Wire;
use crate::trace::Trace;

/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest letter: command lines and environments have 2 MiB at most.
const MAX_BYTES: u64 = 16 << 20;
/// The letter itself, and three streams.
const MOST_FDS: usize = 4;

/// A container for a machine that waits.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Letter {
    /// Of the machine that is meant.
    pub kind: String,
    /// The name that is wished for.
    pub name: Option<String>,
    /// The container; its name and process ids are still to come.
    pub record: Record,
    /// For the agent.
    pub spec: Value,
    /// Its host name.
    pub hostname: String,
    /// The timeline until now.
    pub trace: Option<Trace>,
}

/// Gives up on a peer that does not answer within [`PATIENCE`]; or never, again.
pub(super) fn impatient(wire: &Wire, impatient: bool) -> io::Result<()> {
    let patience = impatient.then_some(PATIENCE);
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&wire.0, timeout, patience)?;
    }
    Ok(())
}

/// Sends a letter with descriptors, three at most.
///
/// # Errors
/// The other side is gone, or a descriptor is none.
pub(super) fn send(wire: &Wire, letter: &Letter, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut paper = File::from(memfd_create("container", MemfdFlags::CLOEXEC)?);
    paper.write_all(&serde_json::to_vec(letter)?)?;
    let all: Vec<_> = [paper.as_fd()].into_iter().chain(fds.iter().copied()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&all)) {
        return Err(io::Error::other("too many descriptors"));
    }
    sendmsg(&wire.0, &[IoSlice::new(b"container")], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one.
///
/// # Errors
/// The other side is gone, or sends something else.
pub(super) fn receive(wire: &Wire) -> io::Result<(Letter, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut word = [0; 16];
    recvmsg(&wire.0, &mut [IoSliceMut::new(&mut word)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds: Vec<OwnedFd> = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if fds.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut paper = File::from(fds.remove(0));
    paper.rewind()?;
    let mut text = Vec::new();
    paper.take(MAX_BYTES).read_to_end(&mut text)?;
    Ok((serde_json::from_slice(&text)?, fds))
}
