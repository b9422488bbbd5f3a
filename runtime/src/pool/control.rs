//! How commands talk to a pool's keeper: [`Ask`], and a [`super::Status`] as the answer; after [`Ask::Warm`] one whenever it changes.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen as hear, socket_with,
};
use serde::{Deserialize, Serialize};

use crate::supervise::Wire;
use crate::{Context, Result};

/// How many may wait to be heard.
const BACKLOG: i32 = 16;

/// What a keeper is asked for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    /// So many machines are to wait.
    Warm { count: u32 },
    /// How it is.
    Status,
    /// It is to end, with all machines that wait.
    Cool,
}

fn socket() -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Listens on `path`, where nothing may be.
///
/// # Errors
/// It cannot be made.
pub(super) fn listen(path: &Path) -> Result<OwnedFd> {
    let make = || {
        let socket = socket()?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        hear(&socket, BACKLOG)?;
        Ok(socket)
    };
    let made: rustix::io::Result<_> = make();
    made.context(|| format!("cannot listen on {}", path.display()))
}

/// The next that connects, if it is of the same user: what comes over the connection is done with this process's rights.
pub(super) fn accept(listener: &OwnedFd) -> io::Result<Wire> {
    let wire = Wire(rustix::net::accept_with(listener, SocketFlags::CLOEXEC)?);
    check_peer(&wire)?;
    Ok(wire)
}

/// Connects to who listens on `path`, likewise.
///
/// # Errors
/// Nobody does.
pub(super) fn connect(path: &Path) -> Result<Wire> {
    try_connect(path).context(|| format!("cannot connect to {}", path.display()))
}

/// The same, with the bare error.
///
/// # Errors
/// Nobody listens, or somebody else does.
pub(super) fn try_connect(path: &Path) -> io::Result<Wire> {
    let socket = socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let wire = Wire(socket);
    check_peer(&wire)?;
    Ok(wire)
}

fn check_peer(wire: &Wire) -> io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(&wire.0)?;
    if peer.uid == rustix::process::geteuid() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is another user's"))
}
