//! The receiving end of `--console-socket`: who gets a container's terminal, as conmon and the shims do.

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::process::{Collector, resize, tail};

/// Longest name that may come with the descriptor, in bytes.
const MAX_NAME: usize = 4096;

/// A socket that waits for terminals.
#[derive(Debug)]
pub struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    /// Listens at `path`, which must not be there yet.
    pub fn listen(path: PathBuf) -> Result<Self> {
        let listener = UnixListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
        Ok(Self { path, listener })
    }

    /// Its path, as a flag wants it.
    pub fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// Takes the terminal that somebody has sent, or is to send.
    pub fn take(&self) -> Result<Console> {
        let (stream, _) = self.listener.accept().context("accept the sender of a terminal")?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut name = [0; MAX_NAME];
        let received =
            recvmsg(&stream, &mut [IoSliceMut::new(&mut name)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        ensure!(received.bytes > 0, "the terminal came without a name");
        let fds: Vec<OwnedFd> = ancillary
            .drain()
            .flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
                _ => Vec::new(),
            })
            .collect();
        let [master] = <[OwnedFd; 1]>::try_from(fds)
            .map_err(|fds| anyhow::anyhow!("{} descriptors were sent, not one", fds.len()))?;
        let master = File::from(master);
        let output = Collector::of(master.try_clone()?);
        Ok(Console { master, output })
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Leaves a socket's file behind on which nobody listens, and answers its path.
pub fn stale_socket(path: &Path) -> Result<String> {
    drop(UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?);
    Ok(path.display().to_string())
}

/// The master of somebody's terminal.
#[derive(Debug)]
pub struct Console {
    master: File,
    output: Collector,
}

impl Console {
    /// Types.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> Result<()> {
        self.master.write_all(bytes.as_ref()).context("type on the terminal")
    }

    /// Changes its size.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        resize(&self.master, rows, columns)
    }

    /// All that it has shown so far.
    pub fn shown(&self) -> Vec<u8> {
        self.output.bytes()
    }

    /// Waits until it has shown `text`.
    pub fn wait_for(&self, text: &str, patience: Duration) -> Result<()> {
        if self.output.wait_for(text, patience) {
            return Ok(());
        }
        bail!("the terminal did not show {text:?} within {patience:?} but {}", tail(&self.shown()))
    }

    /// Waits until nobody has its other end any more, and answers all that it has shown.
    pub fn finish(self) -> Vec<u8> {
        self.output.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_terminal_or_none_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let socket = ConsoleSocket::listen(dir.path().join("s")).unwrap();
        let mut sender = std::os::unix::net::UnixStream::connect(socket.path()).unwrap();
        sender.write_all(b"name").unwrap();
        assert!(socket.take().unwrap_err().to_string().contains("0 descriptors"));
        drop(socket);
        let path = stale_socket(&dir.path().join("t")).unwrap();
        assert!(std::os::unix::net::UnixStream::connect(path).is_err());
    }
}
