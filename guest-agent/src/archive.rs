//! Archives for `cp`: a forked child enters the container's view of its files and packs or unpacks there.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use bulkhead_protocol::agent::{StreamHello, StreamReply, stream_hello::Kind};
use bulkhead_protocol::stream::write_message;
use rustix::thread::ThreadNameSpaceType;

use crate::agent::Agent;
use crate::container::child::close_all_but;
use crate::container::namespaces::{Forked, fork};
use crate::container::process::State;
use crate::error::{Context, Error, Result};
use crate::hw;

/// Between the tar and the socket, in bytes.
const BUFFER: usize = 64 << 10;

impl Agent {
    /// Starts the child that speaks on `socket` from now on. A stopped container is served from its mounted root.
    ///
    /// # Errors
    /// There is no such container, or it has no files any more.
    pub fn start_archive(&self, socket: &OwnedFd, hello: &StreamHello) -> Result<()> {
        let container = self.container(&hello.container)?;
        let init = self.processes.get(&container.init);
        let init = init.filter(|init| matches!(init.state, State::Held | State::Starting | State::Running));
        if init.is_none() && !container.rootfs.is_mounted() {
            return Err(Error::precondition(format!("container {} has no root file system", container.id)));
        }
        let init = init.map(|init| (init.pidfd.as_fd(), container.namespaces.has_user()));
        match fork(0, None)? {
            Forked::Parent { .. } => Ok(()),
            Forked::Child => {
                hw::release();
                std::panic::set_hook(Box::new(|info| {
                    crate::boot::console(&format!("bulkhead agent, archive: {info}"))
                }));
                let keep: Vec<_> = init.iter().map(|(pidfd, _)| *pidfd).chain([socket.as_fd()]).collect();
                close_all_but(&keep);
                let Err(error) = serve(socket, init, &container.rootfs.path, hello);
                let _ = reply(socket.as_fd(), &error.message);
                end(1)
            }
        }
    }
}

/// SIGPIPE, open files, buffers: all of it goes with the child.
fn end(status: i32) -> ! {
    // SAFETY: _exit takes no pointers; the agent's own exit handlers must not run in its child.
    unsafe { libc::_exit(status) }
}

/// Ends the process when everything is done.
fn serve(
    socket: &OwnedFd,
    init: Option<(BorrowedFd<'_>, bool)>,
    rootfs: &Path,
    hello: &StreamHello,
) -> Result<Infallible> {
    rustix::io::ioctl_fionbio(socket, false).context(|| "prepare the connection")?;
    enter(init, rootfs)?;
    let path = Path::new("/").join(&hello.path);
    let stream = || socket.try_clone().map(File::from).context(|| "duplicate the connection");
    if hello.kind() == Kind::ArchiveOut {
        let meta = std::fs::symlink_metadata(&path).context(|| hello.path.clone())?;
        reply(socket.as_fd(), "")?;
        // From here the stream is the archive: an error can only cut it short, before the closing blocks.
        if pack(&path, meta.is_dir(), stream()?).is_err() {
            end(1);
        }
    } else {
        if !std::fs::metadata(&path).context(|| hello.path.clone())?.is_dir() {
            return Err(Error::invalid(format!("{}: not a directory", hello.path)));
        }
        reply(socket.as_fd(), "")?;
        unpack(&path, stream()?)?;
        reply(socket.as_fd(), "")?;
    }
    end(0)
}

/// Sees the container's files and no others: neither a link nor `..` leads out of a root.
fn enter(init: Option<(BorrowedFd<'_>, bool)>, rootfs: &Path) -> Result<()> {
    if let Some((pidfd, user)) = init {
        let mut flags = ThreadNameSpaceType::MOUNT;
        flags.set(ThreadNameSpaceType::USER, user);
        rustix::thread::move_into_thread_name_spaces(pidfd, flags)
            .context(|| "join the container's mounts")?;
    } else {
        rustix::process::chroot(rootfs).context(|| "enter the container's root")?;
    }
    rustix::process::chdir("/").context(|| "enter the container's root")
}

fn reply(socket: BorrowedFd<'_>, error: &str) -> Result<()> {
    let mut socket = File::from(socket.try_clone_to_owned().context(|| "duplicate the connection")?);
    write_message(&mut socket, &StreamReply { error: error.to_owned() }).context(|| "answer")
}

/// The entry is named by the last part of its path, as `docker cp` has it; `/` and `x/.` are their contents.
fn pack(path: &Path, is_directory: bool, stream: impl Write) -> Result<()> {
    let mut archive = tar::Builder::new(BufWriter::with_capacity(BUFFER, stream));
    archive.follow_symlinks(false);
    let name = path.file_name().filter(|_| !path.as_os_str().as_encoded_bytes().ends_with(b"/."));
    let name = name.unwrap_or(OsStr::new("."));
    let packed = if is_directory {
        archive.append_dir_all(name, path).context(|| "pack the directory")
    } else {
        archive.append_path_with_name(path, name).context(|| "pack the file")
    };
    if let Err(error) = packed {
        // Dropped, it would end as an archive that is complete.
        std::mem::forget(archive);
        return Err(error);
    }
    archive.into_inner().and_then(|mut inner| inner.flush()).context(|| "end the archive")
}

fn unpack(path: &Path, stream: impl Read) -> Result<()> {
    let mut stream = BufReader::with_capacity(BUFFER, stream);
    let mut archive = tar::Archive::new(&mut stream);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_overwrite(true);
    archive.unpack(path).map_err(|error| Error::internal(whole_story(&error)))?;
    // The host may pad the end: it must not find the connection closed while it does.
    std::io::copy(&mut stream, &mut std::io::sink()).context(|| "read to the end")?;
    let directory = File::open(path).context(|| "open the directory")?;
    rustix::fs::syncfs(&directory).context(|| "write everything to disk")
}

/// tar's errors say what was being done; why it failed is in their sources.
fn whole_story(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |story, cause| format!("{story}: {cause}"))
}
