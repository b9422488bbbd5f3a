//! The host's end of a stream: non-blocking reads and writes straight from and to guest memory.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vm_memory::VolatileSlice;

use crate::devices::virtio::queue;

/// Most unread bytes thrown away before a socket is closed.
const MAX_DISCARD: usize = 1 << 20;

/// What a connection needs of its host end. Nothing here waits.
pub trait HostStream {
    /// Reads into guest memory; 0 is the end.
    ///
    /// # Errors
    /// As `recv(2)`; `WouldBlock` when there is nothing yet.
    fn read(&mut self, into: &[VolatileSlice<'_>]) -> io::Result<usize>;
    /// Writes from guest memory.
    ///
    /// # Errors
    /// As `send(2)`; `WouldBlock` when there is no room.
    fn write(&mut self, from: &[VolatileSlice<'_>]) -> io::Result<usize>;
    /// Writes from the monitor's memory.
    ///
    /// # Errors
    /// As `send(2)`; `WouldBlock` when there is no room.
    fn write_bytes(&mut self, from: &[u8]) -> io::Result<usize>;
    /// Ends one direction or both.
    fn shutdown(&mut self, how: Shutdown);
}

impl HostStream for UnixStream {
    fn read(&mut self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let mut buffers = queue::iovecs(into);
        let mut message = message(&mut buffers);
        // SAFETY: the slices are valid for writing, and what is in guest memory is nobody's concern.
        result(unsafe { libc::recvmsg(self.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
    }

    fn write(&mut self, from: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let mut buffers = queue::iovecs(from);
        let message = message(&mut buffers);
        // SAFETY: the slices are valid for reading.
        result(unsafe { libc::sendmsg(self.as_raw_fd(), &raw const message, flags) })
    }

    fn write_bytes(&mut self, from: &[u8]) -> io::Result<usize> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: pointer and length are those of a slice.
        result(unsafe { libc::send(self.as_raw_fd(), from.as_ptr().cast(), from.len(), flags) })
    }

    fn shutdown(&mut self, how: Shutdown) {
        // Fails only when the other end is gone already.
        let _ = Self::shutdown(self, how);
    }
}

/// A message of these buffers, which must outlive it.
fn message(buffers: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: a msghdr of zeros is valid: no name, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = buffers.as_mut_ptr();
    message.msg_iovlen = buffers.len();
    message
}

fn result(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// Closes the socket so that its peer reads everything we wrote and then the end. A unix socket closed with unread input
/// would make the peer's last read an ECONNRESET instead.
pub fn close_cleanly(stream: &mut UnixStream) {
    HostStream::shutdown(stream, Shutdown::Both);
    let mut waste = [0; 4096];
    let mut discarded = 0;
    while discarded < MAX_DISCARD {
        let buffer = waste.as_mut_ptr().cast();
        // SAFETY: pointer and length are those of a buffer that lives across the call.
        match unsafe { libc::recv(stream.as_raw_fd(), buffer, waste.len(), libc::MSG_DONTWAIT) } {
            got @ 1.. => discarded += got as usize,
            _ => return,
        }
    }
}
