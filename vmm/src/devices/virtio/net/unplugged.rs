//! Nothing behind a device: what the guest sends is lost, as on a cable with no other end.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::eventfd::EventFd;

use super::backend::Backend;
use super::header::{CSUM, ECN, GUEST_CSUM, TSO};
use crate::config::EmptyNetwork;

/// See the module.
#[derive(Debug)]
pub struct Unplugged {
    kind: EmptyNetwork,
    /// Never readable.
    event: EventFd,
}

impl Unplugged {
    /// A cable into which something of this kind will be plugged.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new(kind: EmptyNetwork) -> io::Result<Self> {
        Ok(Self { kind, event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)? })
    }
}

impl Backend for Unplugged {
    fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// What every tap of a kernel that the monitor runs on can do.
    fn offloads(&self) -> u64 {
        match self.kind {
            EmptyNetwork::Tap => CSUM | GUEST_CSUM | TSO | ECN,
            EmptyNetwork::Stream => 0,
        }
    }

    fn use_offloads(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    unsafe fn receive(&mut self, _: &[libc::iovec]) -> io::Result<Option<usize>> {
        Ok(None)
    }

    unsafe fn send(&mut self, _: &[libc::iovec]) -> io::Result<bool> {
        Ok(true)
    }
}
