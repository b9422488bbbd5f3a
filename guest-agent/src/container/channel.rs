//! The socket pair between the agent and a child that sets itself up: whole messages, with descriptors.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use crate::error::{Code, Error, Result};

/// Longest message, in bytes; a longer error text is cut.
const MAX: usize = 4096;

/// What the child says.
#[derive(Debug)]
pub enum Report {
    /// Set up, held before execve; the terminal's master if one was asked for.
    Ready(Option<OwnedFd>),
    /// It failed and ends.
    Failed(Error),
    /// Its end is closed: execve has succeeded, or the child has died.
    Closed,
    /// Nothing yet.
    Nothing,
}

/// Makes the pair: the agent's end does not block, the child's does.
pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

/// Lets the child take its next step.
pub fn proceed(channel: impl AsFd) -> rustix::io::Result<()> {
    rustix::net::send(channel, b"P", SendFlags::NOSIGNAL).map(|_| ())
}

/// Child: waits for [`proceed`]. False when the agent has given the child up.
pub fn wait(channel: impl AsFd) -> bool {
    let mut byte = [0u8];
    rustix::io::retry_on_intr(|| rustix::io::read(&channel, &mut byte)).is_ok_and(|n| n == 1)
}

/// Child: says that it is set up.
pub fn send_ready(channel: impl AsFd, terminal: Option<BorrowedFd<'_>>) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = terminal.into_iter().collect();
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    rustix::net::sendmsg(channel, &[IoSlice::new(b"R")], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Child: says why it ends.
pub fn send_failed(channel: impl AsFd, error: &Error) {
    let mut message = vec![b'E', error.code as u8];
    message.extend(error.message.bytes().take(MAX - 2));
    let _ = rustix::net::send(channel, &message, SendFlags::NOSIGNAL);
}

/// Agent: the next report.
pub fn receive(channel: impl AsFd) -> Report {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [0; MAX];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(&channel, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, flags)
    });
    let length = match received {
        Ok(received) => received.bytes,
        Err(Errno::AGAIN) => return Report::Nothing,
        Err(_) => 0,
    };
    let mut fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    match buffer.get(..length) {
        Some([b'R', ..]) => Report::Ready(fds.next().and_then(|mut fds| fds.next())),
        Some([b'E', code, text @ ..]) => {
            Report::Failed(Error::new(Code::from_number((*code).into()), String::from_utf8_lossy(text)))
        }
        _ => Report::Closed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_cross_whole_and_in_order() {
        let (agent, child) = pair().unwrap();
        assert!(matches!(receive(&agent), Report::Nothing));
        let file = tempfile::tempfile().unwrap();
        send_ready(&child, None).unwrap();
        send_ready(&child, Some(file.as_fd())).unwrap();
        send_failed(&child, &Error::not_found("é".repeat(4000)));
        proceed(&agent).unwrap();
        assert!(wait(&child));
        drop(child);
        assert!(matches!(receive(&agent), Report::Ready(None)));
        assert!(matches!(receive(&agent), Report::Ready(Some(_))));
        let Report::Failed(error) = receive(&agent) else { panic!("no failure") };
        assert_eq!(error.code, Code::NotFound);
        assert!(error.message.starts_with("ééé") && error.message.len() < MAX + 4);
        assert!(matches!(receive(&agent), Report::Closed));
    }

    #[test]
    fn a_child_that_is_given_up_notices() {
        let (agent, child) = pair().unwrap();
        drop(agent);
        assert!(!wait(&child));
    }
}
