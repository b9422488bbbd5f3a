//! A pseudo-terminal of the container's own devpts.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::child::duplicate_to;
use super::identity::Identity;
use super::spec::ConsoleSize;
use crate::error::{Context, Result};

/// Both ends, in the child; the master goes to the agent.
pub struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    /// Opens a new terminal in the current root.
    ///
    /// # Errors
    /// The container has no devpts.
    pub fn open(size: Option<ConsoleSize>) -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let master = rustix::fs::open("/dev/ptmx", flags, Mode::empty())
            .context(|| "open /dev/ptmx (does the spec mount devpts on /dev/pts?)")?;
        rustix::pty::unlockpt(&master).context(|| "unlock the terminal")?;
        let slave = rustix::pty::ioctl_tiocgptpeer(
            &master,
            OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
        )
        .context(|| "open the terminal")?;
        if let Some(ConsoleSize { height, width }) = size.filter(|size| size.height > 0 && size.width > 0) {
            resize(&master, height, width)?;
        }
        Ok(Self { master, slave })
    }

    /// The agent's end.
    pub fn master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    /// The container's /dev/console is its terminal.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn become_console(&self) -> Result<()> {
        let name = rustix::pty::ptsname(&self.master, Vec::new()).context(|| "name the terminal")?;
        if !Path::new("/dev/console").exists() {
            fs::File::create("/dev/console").context(|| "create /dev/console")?;
        }
        rustix::mount::mount_bind(name.as_c_str(), "/dev/console")
            .context(|| "bind the terminal on /dev/console")
    }

    /// Makes it the standard streams and the controlling terminal of this session.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attach(&self, identity: &Identity) -> Result<()> {
        rustix::process::ioctl_tiocsctty(&self.slave).context(|| "make it the controlling terminal")?;
        if identity.uid != 0 {
            // The group stays devpts's own, "tty".
            rustix::fs::fchown(&self.slave, Some(Uid::from_raw(identity.uid)), None::<Gid>)
                .context(|| "give the terminal to the user")?;
        }
        (0..=2).try_for_each(|number| duplicate_to(self.slave.as_fd(), number))
    }
}

/// Tells the terminal its size, in characters.
///
/// # Errors
/// What the kernel says.
pub fn resize(terminal: impl AsFd, rows: u16, columns: u16) -> Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(terminal, size)
        .context(|| format!("resize the terminal to {rows}x{columns}"))
}
