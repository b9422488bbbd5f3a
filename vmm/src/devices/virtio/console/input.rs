//! Console input from the monitor's standard input: a terminal in raw mode, or a pipe.

use std::io;
use std::os::fd::RawFd;

use crate::exit::{ExitRequest, Outcome};

/// Ctrl-A: then x leaves, then Ctrl-A again is itself.
const ESCAPE: u8 = 0x01;
/// Bytes read at once.
const CHUNK: usize = 256;

/// Standard input as the guest's keyboard.
#[derive(Debug)]
pub struct Input {
    fd: RawFd,
    /// Terminal settings to go back to.
    restore: Option<libc::termios>,
    escaped: bool,
    ended: bool,
    exit: ExitRequest,
}

impl Input {
    /// Takes over standard input; a terminal becomes raw until this value is dropped.
    pub fn stdin(exit: ExitRequest) -> Self {
        let fd = libc::STDIN_FILENO;
        let restore = make_raw(fd);
        if restore.is_some() {
            eprint!("bulkhead-vmm: console attached, Ctrl-A x leaves\r\n");
        }
        Self { fd, restore, escaped: false, ended: false, exit }
    }

    /// The descriptor to watch.
    pub fn fd(&self) -> RawFd {
        self.fd
    }

    /// Reads what there is, at most `limit` bytes, without waiting.
    pub fn read(&mut self, limit: usize) -> Vec<u8> {
        let mut buffer = [0; CHUNK];
        let length = limit.min(CHUNK);
        if self.ended || length == 0 || !readable(self.fd) {
            return Vec::new();
        }
        // SAFETY: pointer and length are within a buffer that lives across the call.
        let got = unsafe { libc::read(self.fd, buffer.as_mut_ptr().cast(), length) };
        let bytes = buffer.get(..usize::try_from(got).unwrap_or(0)).unwrap_or_default();
        if bytes.is_empty() {
            self.ended = got == 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted;
        }
        if self.restore.is_some() { self.unescape(bytes) } else { bytes.to_vec() }
    }

    /// Takes the escape sequences out of what a person typed.
    fn unescape(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut kept = Vec::with_capacity(bytes.len());
        for byte in bytes {
            match (std::mem::take(&mut self.escaped), *byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x' | b'X') => self.exit.request(Outcome::Quit),
                (true, ESCAPE) | (false, _) => kept.push(*byte),
                (true, other) => kept.extend([ESCAPE, other]),
            }
        }
        kept
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        if let Some(settings) = &self.restore {
            // SAFETY: the settings were read from this very descriptor.
            unsafe { libc::tcsetattr(self.fd, libc::TCSANOW, settings) };
        }
    }
}

/// Makes a terminal raw; gives back its former settings, or nothing when `fd` is no terminal.
fn make_raw(fd: RawFd) -> Option<libc::termios> {
    // SAFETY: a termios of zeros is valid, and both calls only touch the one they are given.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(fd, &raw mut settings) != 0 {
            return None;
        }
        let before = settings;
        libc::cfmakeraw(&raw mut settings);
        (libc::tcsetattr(fd, libc::TCSANOW, &raw const settings) == 0).then_some(before)
    }
}

fn readable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that lives across the call; it does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}
