//! A process's terminal: its master comes over a console socket, and its bytes are copied from and to fifos.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::{Winsize, tcsetwinsize};

/// How long the runtime may take to send the terminal, once it has said that the process is there.
const PATIENCE: Duration = Duration::from_secs(10);

/// A socket that waits for a terminal.
#[derive(Debug)]
pub struct Console {
    listener: UnixListener,
    /// Where it is.
    pub path: PathBuf,
}

impl Console {
    /// Listens in `dir`, whose path is short.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn listen(dir: &Path) -> Result<Self> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = dir.join(format!("console-{}-{number}", std::process::id()));
        let listener = UnixListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
        Ok(Self { listener, path })
    }

    /// Takes the terminal that was sent.
    ///
    /// # Errors
    /// None was.
    pub fn receive(self) -> Result<OwnedFd> {
        let patience = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
        if poll(&mut fds, Some(&patience)).context("wait for the terminal")? == 0 {
            bail!("the runtime has not sent a terminal");
        }
        let (stream, _) = self.listener.accept().context("accept the terminal")?;
        stream.set_read_timeout(Some(PATIENCE)).context("wait for the terminal")?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let (mut control, mut name) = (RecvAncillaryBuffer::new(&mut space), [0; 256]);
        let mut data = [IoSliceMut::new(&mut name)];
        recvmsg(&stream, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC).context("receive the terminal")?;
        let fds = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        fds.context("no terminal was sent")
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Gives a terminal another size.
///
/// # Errors
/// It is none.
pub fn resize(master: &File, rows: u16, columns: u16) -> Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(master, size).context("resize the terminal")
}

/// Copies until one side ends. A terminal's end is an error to read.
pub fn copy(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; 16 << 10];
    while let Ok(count) = from.read(&mut buffer) {
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else { return };
        if to.write_all(bytes).is_err() {
            return;
        }
    }
}
