//! Moves bytes between a process in the guest and the descriptors of a process on the host.
//!
//! Each direction is a thread with one buffer: a reader that does not keep up stops the guest's writer and nothing
//! else, so `cat | bulkhead run -i … cat` cannot lock itself up.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bulkhead_protocol::agent::Stdio;
use bulkhead_protocol::agent::stream_hello::Kind;
use rustix::event::{PollFd, PollFlags, poll};

use crate::guest::Guest;
use crate::logs::{self, Stream};
use crate::terminal::DetachKeys;
use crate::{Context, Result};

const BUFFER: usize = 64 << 10;
/// Pumps have a buffer on the heap and shallow calls.
const STACK: usize = 128 << 10;

/// The streams that a process was started with.
pub struct Streams {
    stdin: Option<UnixStream>,
    stdout: Option<UnixStream>,
    stderr: Option<UnixStream>,
}

impl Streams {
    /// Connects the streams that were asked for; a terminal is one connection both ways.
    pub fn connect(guest: &Guest, container: &str, exec: &str, wanted: &Stdio, tty: bool) -> Result<Self> {
        let open = |wanted: bool, kind| wanted.then(|| guest.stream(container, exec, kind, "")).transpose();
        if tty {
            let stdout = guest.stream(container, exec, Kind::Terminal, "")?;
            let stdin = wanted
                .stdin
                .then(|| stdout.try_clone())
                .transpose()
                .context(|| "cannot share a stream".into())?;
            return Ok(Self { stdin, stdout: Some(stdout), stderr: None });
        }
        Ok(Self {
            stdin: open(wanted.stdin, Kind::Stdin)?,
            stdout: open(wanted.stdout, Kind::Stdout)?,
            stderr: open(wanted.stderr, Kind::Stderr)?,
        })
    }

    /// The same for a container's init in a machine that went on from a snapshot. What had come to its end before is not there.
    pub fn reconnect(guest: &Guest, container: &str, wanted: &Stdio, tty: bool) -> Self {
        let open = |wanted: bool, kind| {
            let stream = wanted.then(|| guest.stream(container, "", kind, ""));
            stream.and_then(Result::ok)
        };
        if tty {
            let stdout = open(true, Kind::Terminal);
            let stdin = stdout.as_ref().filter(|_| wanted.stdin).and_then(|stream| stream.try_clone().ok());
            return Self { stdin, stdout, stderr: None };
        }
        Self {
            stdin: open(wanted.stdin, Kind::Stdin),
            stdout: open(wanted.stdout, Kind::Stdout),
            stderr: open(wanted.stderr, Kind::Stderr),
        }
    }
}

/// Where the bytes of the guest's process go, and come from, on the host.
#[derive(Default)]
pub struct Ends {
    /// Read for the process's standard input.
    pub input: Option<OwnedFd>,
    /// Its standard output is written here.
    pub output: Option<OwnedFd>,
    /// Its standard error is written here.
    pub error: Option<OwnedFd>,
    /// Its outputs are kept here.
    pub log: Option<logs::Writer>,
    /// Keys in the input that detach from a terminal.
    pub detach_keys: Option<DetachKeys>,
}

impl Ends {
    /// The calling process's own standard streams.
    pub fn own(input: bool) -> Result<Self> {
        let clone = |fd: std::os::fd::BorrowedFd<'_>| {
            fd.try_clone_to_owned().context(|| "cannot use the standard streams".into())
        };
        Ok(Self {
            input: if input { Some(clone(std::io::stdin().as_fd())?) } else { None },
            output: Some(clone(std::io::stdout().as_fd())?),
            error: Some(clone(std::io::stderr().as_fd())?),
            log: None,
            detach_keys: None,
        })
    }
}

/// A relay under way.
pub struct Relay {
    outputs: Vec<JoinHandle<()>>,
    /// Says nothing, and is closed when all outputs have ended.
    ended: Receiver<Infallible>,
    shared: Arc<Shared>,
    /// Becomes readable when the person has typed the detach keys; closed when input has ended.
    pub detached: UnixStream,
    stop_input: UnixStream,
}

struct Shared {
    log: Mutex<Option<logs::Writer>>,
    /// The host's output and error. Taken away when nobody listens any more: the guest is still drained, for the log,
    /// and who reads the other end sees its end at once.
    ends: Mutex<[Option<Arc<OwnedFd>>; 2]>,
    released: AtomicBool,
    /// Bytes that were passed on.
    passed: AtomicU64,
}

impl Shared {
    fn end(&self, stream: Stream) -> Option<Arc<OwnedFd>> {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        ends.get(stream as usize).cloned().flatten()
    }

    fn close(&self, stream: Stream) {
        if let Some(end) = self.ends.lock().unwrap_or_else(PoisonError::into_inner).get_mut(stream as usize) {
            *end = None;
        }
    }
}

impl Relay {
    /// Starts the threads.
    pub fn start(streams: Streams, ends: Ends) -> Result<Self> {
        let what = || "cannot start relaying a container's streams".to_owned();
        let shared = Arc::new(Shared {
            log: Mutex::new(ends.log),
            ends: Mutex::new([ends.output.map(Arc::new), ends.error.map(Arc::new)]),
            released: AtomicBool::new(false),
            passed: AtomicU64::new(0),
        });
        let (detached, detacher) = UnixStream::pair().context(what)?;
        let (stop_input, stopped) = UnixStream::pair().context(what)?;
        let mut outputs = Vec::new();
        let (end, ended) = channel();
        for (stream, kind) in [(streams.stdout, Stream::Stdout), (streams.stderr, Stream::Stderr)] {
            let Some(stream) = stream else { continue };
            let (shared, end) = (Arc::clone(&shared), end.clone());
            let pump = move || {
                pump_output(stream, kind, &shared);
                drop(end);
            };
            outputs.push(spawn("output", pump).context(what)?);
        }
        if let Some(stream) = streams.stdin {
            match ends.input {
                Some(input) => {
                    let keys = ends.detach_keys;
                    drop(
                        spawn("input", move || pump_input(&input, &stream, &stopped, keys, &detacher))
                            .context(what)?,
                    );
                }
                None => drop(stream.shutdown(Shutdown::Write)),
            }
        }
        Ok(Self { outputs, ended, shared, detached, stop_input })
    }

    /// Stops reading the host's input and writing to its outputs; the log goes on.
    pub fn release(&self) {
        self.shared.released.store(true, Ordering::Relaxed);
        self.shared.close(Stream::Stdout);
        self.shared.close(Stream::Stderr);
        let _ = self.stop_input.shutdown(Shutdown::Both);
    }

    /// Waits until everything that the process wrote has been passed on.
    pub fn finish(self) {
        for output in self.outputs {
            let _ = output.join();
        }
        let _ = self.stop_input.shutdown(Shutdown::Both);
    }

    /// The same, but gives up when nobody takes anything for so long: then the rest is lost, and what still waits for a
    /// reader ends with the calling process.
    pub fn finish_unless_stalled(self, patience: Duration) {
        let mut before = self.shared.passed.load(Ordering::Relaxed);
        while let Err(RecvTimeoutError::Timeout) = self.ended.recv_timeout(patience) {
            let now = self.shared.passed.load(Ordering::Relaxed);
            if now == before {
                break;
            }
            before = now;
        }
        let _ = self.stop_input.shutdown(Shutdown::Both);
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.into()).stack_size(STACK).spawn(body)
}

fn pump_output(mut stream: UnixStream, kind: Stream, shared: &Shared) {
    let mut buffer = vec![0; BUFFER];
    while let Ok(read @ 1..) = stream.read(&mut buffer) {
        let bytes = buffer.get(..read).unwrap_or_default();
        if let Some(log) = shared.log.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            log.write(kind, bytes);
        }
        if let Some(fd) = shared.end(kind)
            && write_all(&fd, bytes, shared).is_err()
        {
            // The reader has gone, as in `… | head`: so does the guest's, and the writer learns it by SIGPIPE. A caller
            // that has detached wants the log instead.
            shared.close(kind);
            if !shared.released.load(Ordering::Relaxed) {
                return;
            }
        }
    }
}

fn write_all(fd: &OwnedFd, mut bytes: &[u8], shared: &Shared) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(written) => {
                shared.passed.fetch_add(written as u64, Ordering::Relaxed);
                bytes = bytes.get(written..).unwrap_or_default();
            }
            Err(rustix::io::Errno::INTR) => {}
            // The descriptor was handed to us non-blocking: somebody else's choice, so only wait.
            Err(rustix::io::Errno::AGAIN) => {
                if shared.released.load(Ordering::Relaxed) {
                    return Err(rustix::io::Errno::PIPE);
                }
                let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
                let _ = poll(&mut [PollFd::new(fd, PollFlags::OUT)], Some(&second));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn pump_input(
    input: &OwnedFd,
    stream: &UnixStream,
    stopped: &UnixStream,
    mut keys: Option<DetachKeys>,
    detacher: &UnixStream,
) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let mut fds = [PollFd::new(input, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => break,
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        let read = match rustix::io::read(input, &mut *buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
            Err(_) => break,
        };
        let bytes = buffer.get(..read).unwrap_or_default();
        let mut writer = stream;
        let written = match &mut keys {
            Some(keys) => {
                let (bytes, detach) = keys.filter(bytes);
                let written = writer.write_all(&bytes);
                if detach {
                    let _ = (&*detacher).write_all(b"d");
                    return;
                }
                written
            }
            None => writer.write_all(bytes),
        };
        if written.is_err() {
            return;
        }
    }
    if keys.is_none() {
        let _ = stream.shutdown(Shutdown::Write);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    fn pipe() -> (File, File) {
        let (read, write) = rustix::pipe::pipe().unwrap();
        (read.into(), write.into())
    }

    #[test]
    fn bytes_go_both_ways_and_ends_are_exact() {
        let (guest_in, in_stream) = UnixStream::pair().unwrap();
        let (guest_out, out_stream) = UnixStream::pair().unwrap();
        let (input, mut typed) = pipe();
        let (mut seen, output) = pipe();
        let streams = Streams { stdin: Some(in_stream), stdout: Some(out_stream), stderr: None };
        let ends = Ends {
            input: Some(input.into()),
            output: Some(output.into()),
            error: None,
            log: None,
            detach_keys: None,
        };
        let relay = Relay::start(streams, ends).unwrap();
        // The guest: echoes until its input ends.
        let echo = thread::spawn(move || {
            let (mut from, mut to) = (guest_in, guest_out);
            std::io::copy(&mut from, &mut to).unwrap();
        });
        let payload: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let expected = payload.clone();
        let typist = thread::spawn(move || typed.write_all(&payload).unwrap());
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            seen.read_to_end(&mut all).unwrap();
            all
        });
        typist.join().unwrap();
        echo.join().unwrap();
        relay.finish();
        assert!(reader.join().unwrap() == expected);
    }

    #[test]
    fn an_output_that_nobody_reads_is_given_up_and_one_that_is_read_slowly_is_not() {
        let relay = |output: File| {
            let (guest, stream) = UnixStream::pair().unwrap();
            let streams = Streams { stdin: None, stdout: Some(stream), stderr: None };
            let relay =
                Relay::start(streams, Ends { output: Some(output.into()), ..Ends::default() }).unwrap();
            (relay, guest)
        };
        let much = vec![7; 200 << 10];
        let (_unread, output) = pipe();
        let (stalled, mut guest) = relay(output);
        let writer = thread::spawn(move || drop(guest.write_all(&vec![7; 200 << 10])));
        stalled.finish_unless_stalled(Duration::from_millis(50));
        drop(writer);

        let (mut seen, output) = pipe();
        let (slow, mut guest) = relay(output);
        let sent = much.len();
        let writer = thread::spawn(move || guest.write_all(&much).unwrap());
        let reader = thread::spawn(move || {
            let (mut all, mut part) = (0, vec![0; 20 << 10]);
            while let Ok(read @ 1..) = seen.read(&mut part) {
                all += read;
                thread::sleep(Duration::from_millis(20));
            }
            all
        });
        slow.finish_unless_stalled(Duration::from_secs(20));
        writer.join().unwrap();
        assert_eq!(reader.join().unwrap(), sent);
    }

    #[test]
    fn a_released_output_ends_at_once_for_who_reads_it() {
        let (_guest, stream) = UnixStream::pair().unwrap();
        let (mut seen, output) = pipe();
        let streams = Streams { stdin: None, stdout: Some(stream), stderr: None };
        let relay = Relay::start(streams, Ends { output: Some(output.into()), ..Ends::default() }).unwrap();
        relay.release();
        assert_eq!(seen.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn detach_keys_are_told() {
        let (_guest, stream) = UnixStream::pair().unwrap();
        let (input, mut typed) = pipe();
        let streams =
            Streams { stdin: Some(stream.try_clone().unwrap()), stdout: Some(stream), stderr: None };
        let keys = DetachKeys::parse("ctrl-p,ctrl-q").unwrap();
        let ends =
            Ends { input: Some(input.into()), output: None, error: None, log: None, detach_keys: Some(keys) };
        let mut relay = Relay::start(streams, ends).unwrap();
        typed.write_all(b"\x10\x11").unwrap();
        let mut byte = [0];
        relay.detached.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"d");
    }
}
