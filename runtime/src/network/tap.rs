//! Making taps.

use std::ffi::{CStr, c_char};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Makes a tap in the calling thread's network namespace, which ends with its descriptor; tells its number.
///
/// # Errors
/// `/dev/net/tun` is not there or not permitted, or the name is in use.
pub(super) fn create(name: &str) -> io::Result<(OwnedFd, u32)> {
    const DEVICE: &str = "/dev/net/tun";
    let file: File =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE).map_err(
            |error| io::Error::new(error.kind(), format!("{DEVICE}: {error} (is the module tun loaded?)")),
        )?;
    // SAFETY: ifreq is plain data, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from as c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which `request` is.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel leaves the name ended by a zero within the field; and it was zero before.
    let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
    // SAFETY: `name` is a string that outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok((file.into(), index)),
    }
}
