//! The monitor's own signals: orderly ends, and not outliving whoever started it.

use std::io;
use std::os::unix::process::parent_id;
use std::sync::OnceLock;

use crate::error::{Error, Result};
use crate::exit::{ExitRequest, Outcome};

/// What the signal handler ends. Set once, before the handler is installed.
static EXIT: OnceLock<ExitRequest> = OnceLock::new();

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
    // SAFETY: plain numbers.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // It may have ended between start and request.
    if parent_id() == parent { Ok(()) } else { Err(io::Error::other("the parent process has ended")) }
}

/// Ends this process by `signal`, which must be one whose default is to end it.
pub fn die_by(signal: u8) {
    // SAFETY: plain numbers; the default action replaces our handler.
    unsafe {
        libc::signal(libc::c_int::from(signal), libc::SIG_DFL);
        libc::raise(libc::c_int::from(signal));
    }
}
