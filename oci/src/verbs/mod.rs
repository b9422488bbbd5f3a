//! What each verb does.

pub mod checkpoint;
pub mod create;
pub mod exec;
pub mod life;
pub mod look;
pub mod templates;

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bulkhead_runtime::guest::{Agent, Guest};
use bulkhead_runtime::{Context as _, Error, Result};

use crate::store::{Container, Status};
use crate::{Context, console};

/// The agent of a container that has one.
///
/// # Errors
/// It has ended, or its microVM is not made yet.
fn agent(container: &Container) -> Result<Agent> {
    guest(container).agent()
}

fn guest(container: &Container) -> Guest {
    Guest::new(&container.vsock())
}

/// A container that must be in one of these states.
fn in_state(context: &Context, id: &str, wanted: &[Status], to: &str) -> Result<Container> {
    let container = context.root.load(id)?;
    let status = container.status();
    if wanted.contains(&status) {
        return Ok(container);
    }
    let wanted: Vec<_> = wanted.iter().map(|status| status.name()).collect();
    Err(Error::Usage(format!(
        "cannot {to} a container that is {}: {id} (it has to be {})",
        status.name(),
        wanted.join(" or ")
    )))
}

/// Writes a pid so that a reader sees all of it or nothing.
fn write_pid(path: &Path, pid: i32) -> Result<()> {
    let what = || format!("cannot write {}", path.display());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary: PathBuf = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o644).open(&temporary)?;
        file.write_all(pid.to_string().as_bytes())?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| drop(fs::remove_file(&temporary))).context(what)
}

/// Sends a pidfd of the container's process to who asked for it.
fn send_pidfd(socket: &Path, pid: i32) -> Result<()> {
    let what = || format!("cannot open a pidfd of process {pid}");
    let gone = || std::io::Error::from(std::io::ErrorKind::NotFound);
    let pid = rustix::process::Pid::from_raw(pid).ok_or_else(gone).context(what)?;
    let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).context(what)?;
    console::send(socket, "pidfd", &fd)
}

/// Whether there is a place for the terminal, as runc has it.
fn check_terminal(terminal: bool, detach: bool, socket: bool) -> Result<()> {
    let wrong = match (terminal, detach, socket) {
        (true, true, false) => {
            "cannot allocate tty if bulkhead-oci will detach without setting console socket"
        }
        (false, _, true) | (_, false, true) => {
            "cannot use console socket if bulkhead-oci will not detach or allocate tty"
        }
        _ => return Ok(()),
    };
    Err(Error::Usage(wrong.into()))
}

/// Descriptors do not cross from one kernel to another.
fn refuse_fds(count: u32) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "--preserve-fds {count}: descriptors of the host cannot be handed to a process in a microVM"
    )))
}
