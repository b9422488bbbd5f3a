//! More directories and files for a sandbox that runs already: a container that joins the microVM of another.
//!
//! They are put into the mount namespace of the virtiofsd that serves the sandbox, which finds them when the guest asks
//! for their names. A thread of short life enters that namespace; nothing is seen of it on the host.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::mount::UnmountFlags;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::{Access, MAX_SHARES, Shared, in_guest, mount};
use crate::{Context, Error, Result, policy};

/// A virtiofsd that runs.
#[derive(Debug)]
pub struct Living {
    namespace: File,
    directory: PathBuf,
}

/// What is to be shared with a sandbox besides what it was started with.
#[derive(Debug)]
pub struct More {
    prefix: String,
    shared: Vec<Shared>,
}

impl Living {
    /// The virtiofsd with process id `pid`, which serves the sandbox whose directory on the host is `sandbox`. Whoever
    /// knows when that process started should check it after this call: pids are used again.
    ///
    /// # Errors
    /// It has ended.
    pub fn find(pid: i32, sandbox: &Path) -> Result<Self> {
        let path = format!("/proc/{pid}/ns/mnt");
        let namespace =
            File::open(&path).context(|| format!("cannot open {path}: the file server has ended"))?;
        Ok(Self { namespace, directory: super::directory(sandbox) })
    }

    /// Takes out what was shared with this prefix. What the guest still has open stays readable until it lets go.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn part(&self, prefix: &str) -> Result<()> {
        let mark = format!("{prefix}-");
        self.within("cannot take shared files back", || {
            let points = mount::writable(&self.directory)?;
            for entry in fs::read_dir(&self.directory)? {
                let entry = entry?;
                if !entry.file_name().to_string_lossy().starts_with(&mark) {
                    continue;
                }
                let _ = rustix::mount::unmount(entry.path(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
                let name = entry.file_name();
                rustix::fs::unlinkat(&points, &name, AtFlags::REMOVEDIR)
                    .or_else(|_| rustix::fs::unlinkat(&points, &name, AtFlags::empty()))?;
            }
            Ok(())
        })
    }

    /// Does something in the server's mount namespace. The rest of the process stays where it is.
    fn within<T: Send>(&self, what: &str, work: impl FnOnce() -> io::Result<T> + Send) -> Result<T> {
        let enter = || -> io::Result<()> {
            // SAFETY: only the working directory, root and umask become this thread's own.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
            move_into_link_name_space(self.namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
            Ok(())
        };
        let done = std::thread::scope(|scope| {
            let name = "shares".to_owned();
            let run = || enter().and_then(|()| work());
            let thread = std::thread::Builder::new().name(name).spawn_scoped(scope, run)?;
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread ended unexpectedly")))
        });
        done.context(|| what.to_owned())
    }
}

impl More {
    /// Nothing yet. The names of what is added begin with `prefix`, which tells one container's from another's.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned(), shared: Vec::new() }
    }

    /// As [`super::Shares::add`].
    ///
    /// # Errors
    /// It does not exist, or there are too many.
    pub fn add(&mut self, path: &Path, access: Access) -> Result<String> {
        if self.shared.len() >= MAX_SHARES {
            return Err(Error::Usage(format!("more than {MAX_SHARES} directories and files to be shared")));
        }
        let what = || format!("cannot share {}", path.display());
        let name = format!("{}-{}", self.prefix, self.shared.len());
        let (found, place) = mount::find(path).context(what)?;
        policy::in_force()?.host_path(&place, access)?;
        let tree = mount::take(&found, access == Access::ReadOnly).context(what)?;
        let guest = in_guest(&name);
        let name = CString::new(name).map_err(io::Error::other).context(what)?;
        self.shared.push(Shared { tree, name });
        Ok(guest)
    }

    /// Has `living` serve it all.
    ///
    /// # Errors
    /// Its namespace cannot be entered, or has no room. Nothing of it is left there then.
    pub fn join(self, living: &Living) -> Result<()> {
        let joined = living.within("cannot share files with a microVM that runs", || {
            let points = mount::writable(&living.directory)?;
            let staging: OwnedFd = rustix::fs::open(
                &living.directory,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            for Shared { tree, name } in &self.shared {
                mount::point(&points, &name.to_string_lossy(), tree)?;
                mount::put(tree.as_fd(), staging.as_fd(), name)?;
            }
            Ok(())
        });
        joined.inspect_err(|_| drop(living.part(&self.prefix)))
    }
}
