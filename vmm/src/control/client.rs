//! Asks a running monitor.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Answer, MAX_LINE, Method, Progress, Request, SnapshotRequest, Status, Taken};

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
        let id = self.next_id;
        self.next_id += 1;
        self.send(&Request { id, method }).map_err(|source| self.lost(source))?;
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

    fn send(&mut self, request: &Request) -> io::Result<()> {
        let mut text = serde_json::to_vec(request)?;
        text.push(b'\n');
        self.stream.get_mut().write_all(&text)
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
