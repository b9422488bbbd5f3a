//! virtiofsd, the program: where it is, how it is run, how it ends.
//!
//! Its options, and why:
//!
//! - `--fd`: it is given its listening socket, to which we have connected already, so that nobody ever waits for it to
//!   listen, and no socket is left on the disk. The connection is the monitor's only way to it: when the monitor ends, so
//!   does virtiofsd.
//! - `--sandbox chroot`: it runs in a mount namespace that we made, drops all capabilities but those over files, and
//!   filters its system calls. `namespace` would add a second process that does nothing but wait.
//! - `--cache auto`: the guest caches names and attributes for a second, and file contents until it opens a file that has
//!   changed since. Engines and people change files from outside; `always` would show stale ones for ever, `never`
//!   forbids shared mappings and asks for every byte.
//! - no `--writeback`: a write that has returned is in the host's page cache, so killing the sandbox loses nothing of it.
//! - `--xattr`: file capabilities mean in the guest what they mean on the host. Not `--posix-acl`: Linux 6.12 forgets about
//!   access lists below a FUSE submount, which all shares are, so that they would cost requests for nothing.
//! - `--announce-submounts`: a mount below a share is one in the guest too, so that device and inode numbers together
//!   name one file.
//! - `--inode-file-handles never`: a descriptor for each inode the guest knows, so the limit on open files is high.
//!   Handles would need CAP_DAC_READ_SEARCH, with which a virtiofsd taken over by the guest could open any file.

use std::env;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::CWD;
use rustix::process::{PidfdFlags, Resource, Rlimit, Signal, setrlimit};
use rustix::thread::UnshareFlags;
use vmm::config::FilesystemConfig;

use super::{Shares, device, mount};
use crate::jail::Spawn;
use crate::jail::process::{Namespaces, Process};
use crate::{Context, Error, Result, null, settings};

/// Where distributions put it, besides PATH.
const PLACES: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/local/libexec/virtiofsd"];
/// Names the program outright.
const VARIABLE: &str = "BULKHEAD_VIRTIOFSD";

/// What it is told besides where its socket and its directory are: see above.
const OPTIONS: [&str; 6] = [
    "--sandbox=chroot",
    "--cache=auto",
    "--xattr",
    "--announce-submounts",
    "--inode-file-handles=never",
    "--log-level=warn",
];
/// Namespaces of its own, besides those of mounts and pids.
const APART: [UnshareFlags; 4] =
    [UnshareFlags::NEWNET, UnshareFlags::NEWIPC, UnshareFlags::NEWUTS, UnshareFlags::NEWCGROUP];

/// What a virtiofsd ends with, besides its monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// With the thread that starts it, for a supervisor.
    Parent,
    /// With its monitor alone, for a caller that ends before the sandbox does.
    Monitor,
}

/// The program: that of the variable, that of the settings if it is not empty, or one that is found.
///
/// # Errors
/// It is not there.
pub fn find(set: &Path) -> Result<PathBuf> {
    let named = match env::var_os(VARIABLE) {
        Some(named) => Some((VARIABLE.to_owned(), PathBuf::from(named))),
        None if set.as_os_str().is_empty() => None,
        None => Some((format!("programs.virtiofsd in {}", settings::source()), set.to_owned())),
    };
    if let Some((by, path)) = named {
        return if is_program(&path) {
            Ok(path)
        } else {
            Err(Error::Usage(format!("{by} names {}, which is no program", path.display())))
        };
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let candidates = env::split_paths(&path).map(|dir| dir.join("virtiofsd"));
    candidates.chain(PLACES.iter().map(PathBuf::from)).find(|path| is_program(path)).ok_or_else(|| {
        Error::Usage(format!(
            "virtiofsd is not installed, and sharing directories of the host needs it: install the package virtiofsd \
             (Debian 13, Ubuntu 24.04, Fedora, Arch and later), or name the program in \
             {VARIABLE} or the configuration file"
        ))
    })
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// A virtiofsd under way. Dropping it ends it.
#[derive(Debug)]
pub struct Server {
    child: Process,
    /// The end for the monitor.
    connection: Option<OwnedFd>,
    left_alone: bool,
}

impl Server {
    pub(super) fn start(shares: &Shares, lifetime: Lifetime, log: &File) -> Result<Self> {
        let (program, jailed) = (&shares.program, shares.jailed);
        let what = || format!("cannot start {}", program.display());
        let (listener, connection) = sockets(&shares.directory).context(what)?;
        let directory =
            CString::new(shares.directory.as_os_str().as_bytes()).map_err(io::Error::other).context(what)?;
        let staging = shares.staging.try_clone().context(what)?;
        let shared: Vec<_> = shares
            .shared
            .iter()
            .map(|shared| Ok((shared.tree.try_clone()?, shared.name.clone())))
            .collect::<io::Result<_>>()
            .context(what)?;
        let parent =
            rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).context(what)?;
        let mut arguments = vec![
            format!("--fd={}", listener.as_raw_fd()).into(),
            argument("--shared-dir=", &shares.directory),
        ];
        arguments.extend(OPTIONS.map(Into::into));
        let prepare = || -> io::Result<()> {
            if lifetime == Lifetime::Parent {
                step("ask to end with its parent", die_with(&parent))?;
            }
            // A terminal's Ctrl-C is for the container.
            step("start a session", rustix::process::setsid().map(drop).map_err(Into::into))?;
            // SAFETY: of a process with one thread, which shares no file table with another.
            let unshare = |flags| unsafe { rustix::thread::unshare_unsafe(flags) };
            step("make a mount namespace", unshare(UnshareFlags::NEWNS).map_err(Into::into))?;
            if jailed {
                // It has its sockets already, and reaches nothing else by them. Where one cannot be had, it does without:
                // `bulkhead inspect --isolation` shows that.
                for flag in APART {
                    let _ = unshare(flag);
                }
                let none = Rlimit { current: Some(0), maximum: Some(0) };
                step("write no core files", setrlimit(Resource::Core, none).map_err(Into::into))?;
                let nothing_new = rustix::thread::set_no_new_privs(true);
                step("give up the right to more rights", nothing_new.map_err(Into::into))?;
            }
            step("make the mount namespace private", mount::seclude())?;
            step("mount the staging directory", mount::put(staging.as_fd(), CWD, &directory))?;
            for (tree, name) in &shared {
                step("bind a shared directory", mount::put(tree.as_fd(), staging.as_fd(), name))?;
            }
            step("make the staging directory read-only", mount::close(staging.as_fd()))
        };
        let null = null::file().context(what)?;
        let spawn = Spawn {
            program,
            arguments,
            streams: [null.as_fd(), log.as_fd(), log.as_fd()],
            inherited: vec![listener.as_raw_fd()],
            namespaces: Namespaces { pid: jailed, user: false },
            prepare: Some(&prepare),
        };
        let child = spawn.start().context(|| format!("{}; its log may say more", what()))?;
        Ok(Self { child, connection: Some(connection.into()), left_alone: false })
    }

    /// The device for the monitor's configuration. The monitor must inherit its connection.
    #[must_use]
    pub fn filesystem(&self) -> Option<FilesystemConfig> {
        self.connection.as_ref().map(|connection| device(connection.as_raw_fd()))
    }

    /// The connection, which the monitor inherits.
    pub fn connection(&self) -> Option<RawFd> {
        self.connection.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The monitor has been started: from now on its end is virtiofsd's.
    pub fn handed_over(&mut self) {
        self.connection = None;
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Leaves it to its monitor.
    pub fn leave(mut self) {
        self.left_alone = true;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.left_alone {
            self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn argument(option: &str, path: &Path) -> std::ffi::OsString {
    let mut argument = std::ffi::OsString::from(option);
    argument.push(path);
    argument
}

/// A listening socket with one connection to it, and no name any more.
fn sockets(directory: &Path) -> io::Result<(UnixListener, UnixStream)> {
    let path = directory.with_file_name("virtiofsd.sock");
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path)?;
    let connection = UnixStream::connect(&path);
    let removed = fs::remove_file(&path);
    Ok((listener, connection.and_then(|connection| removed.map(|()| connection))?))
}

/// Writes into the log which step failed: the error alone would not say.
fn step(what: &str, result: io::Result<()>) -> io::Result<()> {
    if result.is_err() {
        let log = rustix::stdio::stderr();
        for part in ["bulkhead: cannot ", what, "\n"] {
            let _ = rustix::io::write(log, part.as_bytes());
        }
    }
    result
}

/// In a pid namespace of one's own nobody's parent has a number: a descriptor of it says whether it is still there.
fn die_with(parent: &OwnedFd) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before that.
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut [PollFd::new(parent, PollFlags::IN)], Some(&now))? {
        0 => Ok(()),
        _ => Err(io::ErrorKind::NotConnected.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sockets_are_connected_and_leave_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let (listener, connection) = sockets(&dir.path().join("shares")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let (theirs, _) = listener.accept().unwrap();
        drop(theirs);
        assert_eq!(io::Read::read(&mut &connection, &mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn a_directory_is_no_program() {
        assert!(!is_program(Path::new("/usr")));
        assert!(is_program(Path::new("/bin/sh")));
    }
}
