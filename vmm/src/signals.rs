//! The monitor's own signals: orderly ends, and not outliving whoever started it.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::parent_id;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::exit::{ExitRequest, Outcome};

/// What the signal handler ends. Set once, before the handler is installed.
static EXIT: OnceLock<ExitRequest> = OnceLock::new();

/// Whether it was asked to end with its parent.
static DIES_WITH_PARENT: AtomicBool = AtomicBool::new(false);

/// Signals that ask for an orderly end.
const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Ends the machine in an orderly way when the monitor is sent SIGTERM, SIGINT, SIGHUP or SIGQUIT. A second one ends it
/// at once.
///
/// # Errors
/// When a handler cannot be installed.
pub fn end_on_signals(exit: &ExitRequest) -> Result<()> {
    let _ = EXIT.set(exit.clone());
    for signal in ENDING {
        // SAFETY: a sigaction of zeros is valid: no flags but those set here, an empty mask. The handler only does what
        // is allowed in one: an atomic store and write(2).
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESETHAND | libc::SA_RESTART;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(Error::os("handle signals")(io::Error::last_os_error()));
        }
    }
    Ok(())
}

extern "C" fn on_signal(signal: libc::c_int) {
    if let (Some(exit), Ok(signal)) = (EXIT.get(), u8::try_from(signal)) {
        exit.request(Outcome::Signal(signal));
    }
}

/// Makes the kernel kill this process when its parent ends.
///
/// # Errors
/// When the kernel refuses, or the parent has ended already.
pub fn die_with_parent() -> io::Result<()> {
    let parent = parent_id();
    ask_to_die()?;
    DIES_WITH_PARENT.store(true, Ordering::Relaxed);
    // It may have ended between start and request.
    if parent_id() == parent { Ok(()) } else { Err(io::Error::other("the parent process has ended")) }
}

/// The same again, if it was asked for before: the kernel forgets it when a process becomes another user. `parent` is a descriptor
/// of the parent, for a process in a pid namespace, in which nobody has a parent outside; it is closed.
///
/// # Errors
/// As [`die_with_parent`].
pub fn die_with_parent_again(parent: Option<RawFd>) -> io::Result<()> {
    if !DIES_WITH_PARENT.load(Ordering::Relaxed) {
        return Ok(());
    }
    ask_to_die()?;
    let Some(fd) = parent else { return Ok(()) };
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that lives across the call, which does not wait; and the descriptor, which was inherited for this, is
    // nobody else's.
    let ready = unsafe {
        let ready = libc::poll(&raw mut poll, 1, 0);
        libc::close(fd);
        ready
    };
    match ready {
        0 => Ok(()),
        _ => Err(io::Error::other("the parent process has ended")),
    }
}

fn ask_to_die() -> io::Result<()> {
    // SAFETY: plain numbers.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends this process by `signal`, which must be one whose default is to end it. Only the first process of a pid namespace
/// comes back from this: the kernel lets no signal of its own end it.
pub fn die_by(signal: u8) {
    // SAFETY: plain numbers; the default action replaces our handler.
    unsafe {
        libc::signal(libc::c_int::from(signal), libc::SIG_DFL);
        libc::raise(libc::c_int::from(signal));
    }
}
