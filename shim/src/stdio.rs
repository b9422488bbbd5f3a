//! The streams of a process: from containerd's fifos, files and loggers to the descriptors that `bulkhead-oci` is given.
//!
//! Output is not copied: the sandbox writes into the fifo itself. Input is, since a fifo that nobody has opened yet looks
//! like one that has ended.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as Stream};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::reap::Reaper;
use crate::tasks::{Stdio, Streams};
use crate::terminal::{self, Console};

/// How long a logger may take to say that it is ready.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The streams of a process that has been made.
#[derive(Debug, Default)]
pub struct Open {
    /// The fifo that its input is copied from, until that is closed.
    input: Option<(PathBuf, Input)>,
    terminal: Option<File>,
}

impl Streams for Open {
    fn close_input(&mut self) {
        let Some((fifo, input)) = self.input.take() else { return };
        input.close();
        // The thread that copies may still wait for somebody to open it.
        let _ = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(fifo);
    }

    fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        match &self.terminal {
            Some(terminal) => terminal::resize(terminal, rows, columns),
            None => Ok(()),
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.close_input();
    }
}

/// The writing end of a process's input, or nothing once it is closed, by whichever side.
#[derive(Clone, Debug, Default)]
struct Input(Arc<Mutex<Option<Arc<OwnedFd>>>>);

impl Input {
    fn close(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Write for Input {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Not held while it writes, which may take for ever.
        let writer = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let writer = writer.ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(rustix::io::write(&*writer, bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Descriptors for a process to be made, and what is left to do when it is there.
#[derive(Debug)]
pub struct Prepared {
    open: Open,
    console: Option<Console>,
    stdio: Stdio,
}

impl Prepared {
    /// Opens what `stdio` names, and has `command` inherit it. `dir` is for a console socket.
    ///
    /// # Errors
    /// Something cannot be opened, a logger not started.
    pub fn new(
        stdio: &Stdio,
        dir: &Path,
        names: &Names<'_>,
        reaper: &Reaper,
        command: &mut Command,
    ) -> Result<Self> {
        let mut open = Open::default();
        command.stdin(Stream::null()).stdout(Stream::null()).stderr(Stream::null());
        if stdio.terminal {
            let console = Console::listen(dir)?;
            command.arg("--console-socket").arg(&console.path);
            return Ok(Self { open, console: Some(console), stdio: stdio.clone() });
        }
        if !stdio.stdin.is_empty() {
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).context("make a pipe")?;
            command.stdin(reader);
            let input = Input(Arc::new(Mutex::new(Some(Arc::new(writer)))));
            open.input = Some((stdio.stdin.clone().into(), input.clone()));
            let path = stdio.stdin.clone();
            std::thread::spawn(move || {
                if let Ok(fifo) = File::open(path) {
                    terminal::copy(fifo, input.clone());
                }
                input.close();
            });
        }
        let (out, err) = outputs(stdio, names, reaper)?;
        if let Some(out) = out {
            command.stdout(out);
        }
        if let Some(err) = err {
            command.stderr(err);
        }
        Ok(Self { open, console: None, stdio: stdio.clone() })
    }

    /// The process is there: takes its terminal, if it has one.
    ///
    /// # Errors
    /// The runtime has sent none.
    pub fn finish(self, names: &Names<'_>, reaper: &Reaper) -> Result<Open> {
        let Self { mut open, console, stdio } = self;
        let Some(console) = console else { return Ok(open) };
        let master = File::from(console.receive()?);
        let clone = || master.try_clone().context("copy the terminal's descriptor");
        if !stdio.stdin.is_empty() {
            // A terminal has no end of input; this is for the thread's own end.
            open.input = Some((stdio.stdin.clone().into(), Input::default()));
            let (path, to) = (stdio.stdin.clone(), clone()?);
            std::thread::spawn(move || {
                if let Ok(fifo) = File::open(path) {
                    terminal::copy(fifo, to);
                }
            });
        }
        if let (Some(out), _) = outputs(&stdio, names, reaper)? {
            let from = clone()?;
            std::thread::spawn(move || terminal::copy(from, out));
        }
        open.terminal = Some(master);
        Ok(open)
    }
}

/// Whose streams they are, for loggers.
#[derive(Clone, Copy, Debug)]
pub struct Names<'a> {
    /// Of containerd's.
    pub namespace: &'a str,
    /// The container.
    pub id: &'a str,
}

/// Where output and errors go.
fn outputs(stdio: &Stdio, names: &Names<'_>, reaper: &Reaper) -> Result<(Option<File>, Option<File>)> {
    if let Some(uri) = stdio.stdout.strip_prefix("binary://") {
        let (out, err) = logger(uri, names, reaper)?;
        return Ok((Some(out), Some(err)));
    }
    let one = |path: &str| if path.is_empty() { Ok(None) } else { output(path).map(Some) };
    if stdio.stderr == stdio.stdout {
        let out = one(&stdio.stdout)?;
        let err = out.as_ref().map(File::try_clone).transpose().context("copy a descriptor")?;
        return Ok((out, err));
    }
    Ok((one(&stdio.stdout)?, one(&stdio.stderr)?))
}

/// A fifo, or a file that is appended to.
fn output(path: &str) -> Result<File> {
    if let Some(path) = path.strip_prefix("file://") {
        let options =
            OpenOptions::new().append(true).create(true).open(path).with_context(|| format!("open {path}"));
        return options;
    }
    if path.contains("://") {
        bail!("{path}: output goes to a fifo, file:// or binary://");
    }
    // For reading, too: who reads it may come later, or go and come back.
    OpenOptions::new().read(true).write(true).open(path).with_context(|| format!("open {path}"))
}

/// Starts a logger, `/path?key=value`: it reads output and errors from descriptors 3 and 4, and closes 5 when it is ready.
fn logger(uri: &str, names: &Names<'_>, reaper: &Reaper) -> Result<(File, File)> {
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let pipe = || pipe_with(PipeFlags::CLOEXEC).context("make a pipe");
    let ((out_reader, out), (err_reader, err), (ready, told)) = (pipe()?, pipe()?, pipe()?);
    let mut command = Command::new(path);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        command.arg(key);
        if !value.is_empty() {
            command.arg(value);
        }
    }
    command.env("CONTAINER_ID", names.id).env("CONTAINER_NAMESPACE", names.namespace);
    command.stdin(Stream::null()).stdout(Stream::null()).stderr(Stream::null());
    // First out of the way of each other, then into their places.
    let given = [&out_reader, &err_reader, &told].map(|fd| fd.as_raw_fd());
    // SAFETY: between fork and execve, system calls on descriptors that are open until the child has been started.
    unsafe {
        command.pre_exec(move || {
            let mut moved = [0; 3];
            for (fd, to) in given.iter().zip(&mut moved) {
                *to = libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, 10);
                if *to < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            for (fd, place) in moved.iter().zip(3..) {
                if libc::dup2(*fd, place) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        })
    };
    let what = || format!("start the logger {path}");
    let _ = reaper.spawn(&mut command).with_context(what)?;
    drop((out_reader, err_reader, told));
    let mut fds = [PollFd::new(&ready, PollFlags::IN)];
    if poll(&mut fds, Some(&PATIENCE)).with_context(what)? == 0 {
        bail!("{}: it is not ready after {} seconds", what(), PATIENCE.tv_sec);
    }
    Ok((out.into(), err.into()))
}
