//! Asks a running monitor.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Answer, MAX_LINE, Method, Request, Status};

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
        // Memory has to be written.
        let patience = if matches!(method, Method::Snapshot(_)) { SNAPSHOT_PATIENCE } else { PATIENCE };
        let _ = self.stream.get_ref().set_read_timeout(Some(patience));
        let id = self.next_id;
        self.next_id += 1;
        let mut line = Vec::new();
        self.exchange(&Request { id, method }, &mut line)
            .map_err(|source| ClientError::Io { path: self.path.clone(), source })?;
        let malformed = |source| ClientError::Malformed { path: self.path.clone(), source };
        let answer: Answer = serde_json::from_slice(&line).map_err(malformed)?;
        match answer.error {
            Some(error) => Err(ClientError::Refused(error)),
            None => Ok(answer.result.unwrap_or_default()),
        }
    }

    /// How the machine is.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn status(&mut self) -> Result<Status, ClientError> {
        let value = self.call(Method::Status)?;
        serde_json::from_value(value)
            .map_err(|source| ClientError::Malformed { path: self.path.clone(), source })
    }

    fn exchange(&mut self, request: &Request, line: &mut Vec<u8>) -> io::Result<()> {
        let mut text = serde_json::to_vec(request)?;
        text.push(b'\n');
        self.stream.get_mut().write_all(&text)?;
        self.stream.by_ref().take(MAX_LINE as u64).read_until(b'\n', line)?;
        if line.ends_with(b"\n") { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}
