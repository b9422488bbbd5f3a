//! Asks a running monitor.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::files::{self, Files};
use super::{Answer, InsertRequest, MAX_LINE, Method, Progress, Request, SnapshotRequest, Status, Taken};
use crate::devices::virtio::block::disk;
use crate::error::Error;
use crate::snapshot::{Draft, working_set};

/// How long a monitor may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take for a snapshot.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(600);

/// A connection to a monitor's control socket.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
    next_id: u64,
}

/// Why a monitor could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("cannot reach a monitor at {path:?}; it may have ended")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("the monitor at {path:?} does not answer")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It answered something else than asked for.
    #[error("the monitor at {path:?} answers what cannot be understood")]
    Malformed {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// It refused.
    #[error("the monitor refuses: {0}")]
    Refused(String),
    /// A file that it was to be given cannot be opened here.
    #[error("{}", .0.chain())]
    File(Error),
}

impl Client {
    /// Connects to the control socket `path`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let connect = || {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(stream)
        };
        let stream = connect().map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), stream: BufReader::new(stream), next_id: 1 })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// When the monitor does not answer within seconds, or refuses.
    pub fn call(&mut self, method: Method) -> Result<serde_json::Value, ClientError> {
        self.call_with(method, |_| (), |_| Ok(()))
    }

    /// The same; `told` hears how far it is. `wait` is called before each line is read, with the socket, and gives up by an error.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn call_with(
        &mut self,
        method: Method,
        mut told: impl FnMut(Progress),
        mut wait: impl FnMut(BorrowedFd<'_>) -> io::Result<()>,
    ) -> Result<serde_json::Value, ClientError> {
        // Memory has to be written.
        let patience = if matches!(method, Method::Snapshot(_)) { SNAPSHOT_PATIENCE } else { PATIENCE };
        let _ = self.stream.get_ref().set_read_timeout(Some(patience));
        let (draft, files) = match &method {
            Method::Snapshot(request) => {
                let draft = Draft::begin(&request.directory, request.durable)?;
                let files = draft.files(request)?;
                (Some(draft), files)
            }
            Method::InsertDisk(wish) => (None, disk_files(wish)?),
            _ => (None, Files::default()),
        };
        let answer = self.ask(method, files, &mut told, &mut wait)?;
        if let Some(draft) = draft {
            draft.finish()?;
        }
        Ok(answer)
    }

    /// Notes in `directory`, the snapshot from which the machine went on, which memory it has written to since. Answers how many bytes.
    ///
    /// # Errors
    /// As [`Self::call`], and when the directory cannot be written to.
    pub fn record_working_set(&mut self, directory: &Path) -> Result<u64, ClientError> {
        let partial = directory.join(format!("{}.{}", working_set::WORKING_SET, std::process::id()));
        let failed = |source| {
            let what = "snapshot, to note a working set in";
            ClientError::File(Error::Input { what, path: directory.to_owned(), source })
        };
        let open = || File::options().write(true).create(true).truncate(true).mode(0o600).open(&partial);
        let mut files = Files::default();
        files.push(working_set::WORKING_SET.to_owned(), open().map_err(failed)?);
        let noted = self.ask(Method::WorkingSet, files, &mut |_| (), &mut |_| Ok(())).and_then(|answer| {
            fs::rename(&partial, directory.join(working_set::WORKING_SET)).map_err(failed)?;
            Ok(answer.get("bytes").and_then(serde_json::Value::as_u64).unwrap_or(0))
        });
        noted.inspect_err(|_| drop(fs::remove_file(&partial)))
    }

    fn ask(
        &mut self,
        method: Method,
        files: Files,
        told: &mut dyn FnMut(Progress),
        wait: &mut dyn FnMut(BorrowedFd<'_>) -> io::Result<()>,
    ) -> Result<serde_json::Value, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let request = Request { id, method, files: files.names() };
        self.send(&request, &files).map_err(|source| self.lost(source))?;
        // The monitor has its own by now.
        drop(files);
        loop {
            if self.stream.buffer().is_empty() {
                wait(self.stream.get_ref().as_fd()).map_err(|source| self.lost(source))?;
            }
            let line = self.line().map_err(|source| self.lost(source))?;
            let answer: Answer = serde_json::from_slice(&line).map_err(|source| self.malformed(source))?;
            match answer {
                Answer { error: Some(error), .. } => return Err(ClientError::Refused(error)),
                Answer { progress: Some(progress), .. } => told(progress),
                Answer { result, .. } => return Ok(result.unwrap_or_default()),
            }
        }
    }

    /// Saves the machine. `went_on` hears how long the guest stood still, when it goes on and not all is written yet; `wait` is as in
    /// [`Self::call_with`].
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn snapshot(
        &mut self,
        request: SnapshotRequest,
        mut went_on: impl FnMut(u64),
        wait: impl FnMut(BorrowedFd<'_>) -> io::Result<()>,
    ) -> Result<Taken, ClientError> {
        let method = Method::Snapshot(request);
        let value = self.call_with(method, |progress| went_on(progress.pause_ns), wait)?;
        serde_json::from_value(value).map_err(|source| self.malformed(source))
    }

    /// How the machine is.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn status(&mut self) -> Result<Status, ClientError> {
        let value = self.call(Method::Status)?;
        serde_json::from_value(value).map_err(|source| self.malformed(source))
    }

    fn send(&mut self, request: &Request, files: &Files) -> io::Result<()> {
        let mut text = serde_json::to_vec(request)?;
        text.push(b'\n');
        files::send(self.stream.get_mut(), &text, files)
    }

    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        self.stream.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line)?;
        if line.ends_with(b"\n") { Ok(line) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn lost(&self, source: io::Error) -> ClientError {
        ClientError::Io { path: self.path.clone(), source }
    }

    fn malformed(&self, source: serde_json::Error) -> ClientError {
        ClientError::Malformed { path: self.path.clone(), source }
    }
}

/// The files of a disk, opened as the drive will use them.
fn disk_files(wish: &InsertRequest) -> Result<Files, Error> {
    let mut files = Files::default();
    for path in wish.path.iter().chain(&wish.layers) {
        if !path.is_absolute() {
            return Err(Error::Drive(format!("the disk {path:?} is no absolute path")));
        }
        let write = wish.layers.is_empty() && !wish.read_only;
        let file = disk::open(path, write);
        let file = file.map_err(|source| Error::Input { what: "disk", path: path.clone(), source })?;
        files.push(path.to_string_lossy().into_owned(), file);
    }
    Ok(files)
}

impl From<Error> for ClientError {
    /// With all causes in its words, and none beside them.
    fn from(error: Error) -> Self {
        Self::File(error)
    }
}
