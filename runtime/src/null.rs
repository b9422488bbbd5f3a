//! `/dev/null`, opened once and kept: an engine may put a container into a cgroup in which no device may be opened, and
//! all that works for the container is in there.

use std::fs::File;
use std::io;
use std::process::Stdio;
use std::sync::OnceLock;

static NULL: OnceLock<File> = OnceLock::new();

/// The device, for reading and writing. To be called before the process enters a container's cgroup.
///
/// # Errors
/// It cannot be opened.
pub fn file() -> io::Result<&'static File> {
    if let Some(file) = NULL.get() {
        return Ok(file);
    }
    let file = File::options().read(true).write(true).open("/dev/null")?;
    Ok(NULL.get_or_init(|| file))
}

/// A standard stream of a child that is the device.
///
/// # Errors
/// It cannot be opened.
pub fn stdio() -> io::Result<Stdio> {
    Ok(file()?.try_clone()?.into())
}

/// Puts it in the place of this process's standard streams: whoever waits for their end must not wait for this process.
pub fn let_go_of_streams() {
    let Ok(null) = file() else { return };
    let _ = rustix::stdio::dup2_stdin(null);
    let _ = rustix::stdio::dup2_stdout(null);
    let _ = rustix::stdio::dup2_stderr(null);
}
