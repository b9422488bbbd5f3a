//! The monitor's two I/O ports: timeline marks and the exit device.

use std::process::abort;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_protocol::{EXIT_IO_PORT, MARK_IO_PORT};

/// First port and number of ports between the mark and the end of the exit device.
const PORTS: (u16, u16) = (MARK_IO_PORT, EXIT_IO_PORT + 4 - MARK_IO_PORT);

/// Whether this process may use the ports. False in tests, in children, and on a machine without the monitor.
static PERMITTED: AtomicBool = AtomicBool::new(false);

/// Asks the kernel for the ports. Without them marks are skipped and [`exit`] powers the machine off.
pub fn acquire() {
    PERMITTED.store(permit(true), Ordering::Relaxed);
}

/// Gives the ports up. A child inherits them over fork and execve: a container must not end the machine.
pub fn release() {
    if PERMITTED.swap(false, Ordering::Relaxed) && !permit(false) {
        abort();
    }
}

fn permit(on: bool) -> bool {
    let (first, count) = PORTS;
    // SAFETY: ioperm takes no pointers; it changes only which I/O instructions trap.
    unsafe { libc::ioperm(first.into(), count.into(), on.into()) == 0 }
}

/// Notes a moment of the guest's life on the monitor's timeline.
pub fn mark(value: u8) {
    if PERMITTED.load(Ordering::Relaxed) {
        // SAFETY: the port is permitted (else this would fault), and the monitor's mark device does nothing but take
        // the time: no memory is involved.
        unsafe {
            core::arch::asm!("out dx, al", in("dx") MARK_IO_PORT, in("al") value, options(nomem, nostack, preserves_flags));
        }
    }
}

/// Ends the machine with `status` for the monitor; file systems are the caller's care.
pub fn exit(status: u8) -> ! {
    if PERMITTED.load(Ordering::Relaxed) {
        // SAFETY: as in `mark`; the exit device ends the machine, so nothing after it runs.
        unsafe {
            core::arch::asm!("out dx, eax", in("dx") EXIT_IO_PORT, in("eax") u32::from(status), options(nomem, nostack, preserves_flags));
        }
    }
    // No exit device: another monitor, or none. A real PID 1 must not return, a test process may.
    if rustix::process::getpid().is_init() {
        let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    }
    std::process::exit(status.into())
}
