//! What `create` and the other verbs say to a sandbox, and how.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_runtime::{Context, Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

/// Said to `create`, over the socket pair of the fork.
#[derive(Debug, Serialize, Deserialize)]
pub enum Says {
    /// The process and its network namespace are there: hooks of the runtime's namespaces may run.
    Here(i32),
    /// The container waits for `start`.
    Created,
    /// It could not be created.
    Failed(String),
}

/// Said by `create`: its hooks have run.
#[derive(Debug, Serialize, Deserialize)]
pub struct GoOn;

/// Said over the sandbox's socket, one line of JSON each way.
#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Let the process go.
    Start,
    /// Signal it.
    Signal(u32),
}

/// The answer: empty when done, else why not.
type Answer = String;

/// Longest line over the socket, in bytes.
const MAX_LINE: u64 = 64 << 10;
/// How long a caller on the socket may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// The socket of a container's sandbox.
pub fn socket(run: &Path) -> PathBuf {
    run.join("oci")
}

/// Asks the sandbox for something and waits until it is done: for a start as long as its hooks take, for all else not long.
///
/// # Errors
/// The sandbox is gone, stands still, or says no.
pub fn ask(run: &Path, ask: &Ask) -> Result<()> {
    let what = || "cannot reach the container's sandbox".to_owned();
    let mut stream = UnixStream::connect(socket(run)).context(what)?;
    let line = serde_json::to_string(ask).context(what)? + "\n";
    stream.write_all(line.as_bytes()).context(what)?;
    if !matches!(ask, Ask::Start) {
        stream.set_read_timeout(Some(PATIENCE)).context(what)?;
    }
    let mut answer = String::new();
    stream.take(MAX_LINE).read_to_string(&mut answer).map_err(silent).context(what)?;
    match serde_json::from_str::<Answer>(&answer) {
        Ok(answer) if answer.is_empty() => Ok(()),
        Ok(answer) => Err(Error::Usage(answer)),
        Err(_) => Err(Error::Usage("the container's sandbox ended before it answered".into())),
    }
}

fn silent(error: io::Error) -> io::Error {
    if error.kind() != io::ErrorKind::WouldBlock {
        return error;
    }
    let words = format!(
        "no answer within {} seconds: it stands still (`delete --force` ends it)",
        PATIENCE.as_secs()
    );
    io::Error::new(io::ErrorKind::TimedOut, words)
}

/// Tells the sandbox to kill its container, and answers the sandbox's pid. `None` when nobody listens.
pub fn kill(run: &Path) -> Option<i32> {
    let mut stream = UnixStream::connect(socket(run)).ok()?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
    let line = serde_json::to_string(&Ask::Signal(libc::SIGKILL.unsigned_abs())).ok()? + "\n";
    // One that is too busy to listen is known all the same.
    let _ = stream.write_all(line.as_bytes());
    Some(peer.pid.as_raw_nonzero().get())
}

/// The next caller, if one waits, and what it wants.
pub fn next_call(listener: &UnixListener) -> Option<(UnixStream, Ask)> {
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    if !matches!(poll(&mut fds, Some(&now)), Ok(1)) {
        return None;
    }
    let (stream, _) = listener.accept().ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let mut line = Vec::new();
    // Byte by byte, but the lines are short.
    while line.last() != Some(&b'\n') && line.len() < 4096 {
        let mut byte = [0];
        (&stream).read_exact(&mut byte).ok()?;
        line.push(byte[0]);
    }
    serde_json::from_slice(&line).ok().map(|ask| (stream, ask))
}

/// Answers a caller.
pub fn answer(caller: &mut UnixStream, text: &str) {
    let line = serde_json::to_string(text).unwrap_or_default() + "\n";
    // Who does not wait for the answer does not need it.
    let _ = caller.write_all(line.as_bytes());
}
