//! The terminal of a container: a pair on the host whose master the engine gets, and whose slave is one end of the
//! relay to the terminal in the guest. That one does the line discipline; this one is raw.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use bulkhead_runtime::relay::Ends;
use bulkhead_runtime::{Context, Result};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr};

/// A new pair: master and raw slave, which becomes this session's controlling terminal so that it hears of resizes.
///
/// # Errors
/// No terminal can be had.
pub fn open() -> Result<(OwnedFd, OwnedFd)> {
    let make = || -> rustix::io::Result<_> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let slave = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty())?;
        let mut attributes = tcgetattr(&slave)?;
        attributes.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &attributes)?;
        Ok((master, slave))
    };
    make().context(|| "cannot open a terminal".into())
}

/// Sends a descriptor to whoever listens on `socket`.
///
/// # Errors
/// Nobody does.
pub fn send(socket: &Path, name: &str, fd: &OwnedFd) -> Result<()> {
    let what = || format!("cannot send the {name} to the socket {}", socket.display());
    let stream = UnixStream::connect(socket).context(what)?;
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(&stream, &[IoSlice::new(name.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL).context(what)?;
    Ok(())
}

/// The host's ends of a process's streams, and its terminal if it has one: ours, or a new one whose master goes to `socket`.
///
/// # Errors
/// No terminal can be had, or nobody listens on the socket.
pub fn ends(terminal: bool, socket: Option<&Path>) -> Result<(Ends, Option<OwnedFd>)> {
    if !terminal {
        return Ok((Ends::own(true)?, None));
    }
    let what = || "cannot use the terminal".to_owned();
    let slave = match socket {
        Some(socket) => {
            let (master, slave) = open()?;
            send(socket, "/dev/ptmx", &master)?;
            // So that a resize is told by SIGWINCH.
            let _ = rustix::process::ioctl_tiocsctty(&slave);
            slave
        }
        None => std::io::stdin().as_fd().try_clone_to_owned().context(what)?,
    };
    let clone = || slave.try_clone().context(what);
    let ends = Ends { input: Some(clone()?), output: Some(clone()?), ..Ends::default() };
    Ok((ends, Some(slave)))
}

/// Rows and columns of a terminal.
pub fn size(terminal: &OwnedFd) -> Option<(u32, u32)> {
    let size = tcgetwinsize(terminal).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row.into(), size.ws_col.into()))
}
