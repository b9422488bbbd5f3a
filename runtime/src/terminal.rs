//! The caller's terminal and signals.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use crate::{Context, Result};

/// A terminal in raw mode, put back as it was when dropped.
#[derive(Debug)]
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// Puts the terminal on standard input in raw mode; `None` when standard input is not a terminal.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn enter() -> Result<Option<Self>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let what = || "cannot put the terminal in raw mode".to_owned();
        let before = tcgetattr(&stdin).context(what)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).context(what)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// Rows and columns of the terminal on standard input, if it is one.
#[must_use]
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdin()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Whether standard input is a terminal.
#[must_use]
pub fn stdin_is_terminal() -> bool {
    isatty(io::stdin())
}

/// Signals as readable events. Made before any thread, so that every thread has them blocked.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

/// What a person or a supervisor sends to a program that stands for a container.
const FORWARDED: [i32; 8] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
    libc::SIGCONT,
];

impl Signals {
    /// Blocks the signals that are forwarded and makes them readable.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn block() -> Result<Self> {
        use std::os::fd::FromRawFd;
        let set = forwarded_set();
        // SAFETY: `set` is an initialised sigset_t that outlives both calls; the old mask is not asked for. The
        // descriptor signalfd returns is new and owned by nobody else.
        let fd = unsafe {
            libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context(|| "cannot watch for signals".into());
        }
        // SAFETY: as above, checked to be a descriptor.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Lets the signals do again what they do by default; for a child.
    pub fn unblock() {
        let set = forwarded_set();
        // SAFETY: `set` is an initialised sigset_t that outlives the call.
        unsafe { libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut()) };
    }

    /// The next signal's number, if one is waiting.
    #[must_use]
    pub fn next(&self) -> Option<u32> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.fd, &mut info) {
            Ok(read) if read == info.len() => {
                info.first_chunk::<4>().map(|number| u32::from_ne_bytes(*number)) // ssi_signo is its first field
            }
            _ => None,
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn forwarded_set() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data for which all zeroes is a value; sigemptyset and sigaddset get a valid pointer.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in FORWARDED {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

/// Recognises the keys that detach from a terminal, in bytes that arrive in pieces.
#[derive(Clone, Debug)]
pub struct DetachKeys {
    keys: Vec<u8>,
    matched: usize,
}

impl DetachKeys {
    /// Docker's notation: keys separated by commas, each a character or `ctrl-` with `a` to `z`, `@`, `[`, `\`, `]`,
    /// `^` or `_`. Empty: no keys.
    ///
    /// # Errors
    /// A key that is none.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let bad = || {
            crate::Error::Usage(format!(
                "--detach-keys {text}: write keys separated by commas, each a character or ctrl-a to ctrl-z"
            ))
        };
        let mut keys = Vec::new();
        for key in text.split(',').filter(|_| !text.is_empty()) {
            let control = key.strip_prefix("ctrl-");
            let [byte] = control.unwrap_or(key).as_bytes() else { return Err(bad()) };
            keys.push(match (control, byte) {
                (None, byte) => *byte,
                (Some(_), b'a'..=b'z') => byte - b'a' + 1,
                (Some(_), b'@' | b'['..=b'_') => byte - b'@',
                _ => return Err(bad()),
            });
        }
        Ok(Self { keys, matched: 0 })
    }

    /// Gives the bytes to pass on, and whether the keys are complete (what follows them is dropped). Keys that turn
    /// out to be something else are passed on.
    pub(crate) fn filter(&mut self, input: &[u8]) -> (Vec<u8>, bool) {
        let mut output = Vec::with_capacity(input.len());
        for &byte in input {
            if self.keys.get(self.matched) != Some(&byte) {
                output.extend_from_slice(self.keys.get(..self.matched).unwrap_or_default());
                self.matched = 0;
            }
            if self.keys.get(self.matched) == Some(&byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    return (output, true);
                }
            } else {
                output.push(byte);
            }
        }
        (output, false)
    }
}

/// Docker's default.
pub(crate) const DEFAULT_DETACH_KEYS: &str = "ctrl-p,ctrl-q";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detach_keys_are_found_across_pieces_and_nothing_else_is_lost() {
        let mut keys = DetachKeys::parse(DEFAULT_DETACH_KEYS).unwrap();
        assert_eq!(keys.filter(b"ab\x10"), (b"ab".to_vec(), false));
        assert_eq!(keys.filter(b"c"), (b"\x10c".to_vec(), false));
        assert_eq!(keys.filter(b"\x10\x10"), (b"\x10".to_vec(), false));
        assert_eq!(keys.filter(b"\x11rest"), (Vec::new(), true));
    }

    #[test]
    fn notation() {
        assert_eq!(DetachKeys::parse("ctrl-a,d").unwrap().keys, [1, b'd']);
        assert_eq!(DetachKeys::parse("ctrl-@").unwrap().keys, [0]);
        assert_eq!(DetachKeys::parse("").unwrap().filter(b"x"), (b"x".to_vec(), false));
        for bad in ["ctrl-", "ctrl-1", "ab", "a,,b"] {
            assert!(DetachKeys::parse(bad).is_err(), "{bad}");
        }
    }
}
