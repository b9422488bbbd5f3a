//! What is behind a network device.

use std::io;
use std::os::fd::RawFd;

use super::header::HEADER_BYTES;

/// Longest frame: 64 KiB of segmentation offload, Ethernet header and VLAN tag.
pub const MAX_FRAME: usize = 65535 + 14 + 4;
/// Longest packet: a frame and its header.
pub const MAX_PACKET: usize = MAX_FRAME + HEADER_BYTES;

/// Sends and receives packets: a header of `HEADER_BYTES` and an Ethernet frame.
pub trait Backend: Send {
    /// Becomes ready, edge-triggered, when there is a packet, or room after there was none.
    fn fd(&self) -> RawFd;
    /// Whether [`Self::send`] can ask to be tried again, so that room must be waited for.
    fn waits_for_room(&self) -> bool {
        false
    }
    /// [`Self::fd`] has become ready.
    fn ready(&mut self) {}
    /// Offload features it can be used with, of those in `super::header`.
    fn offloads(&self) -> u64;
    /// The driver accepted these features.
    ///
    /// # Errors
    /// What the host's kernel says.
    fn use_offloads(&mut self, features: u64) -> io::Result<()>;
    /// Puts the next packet into `to`, cut off where that ends, and tells its length; `None` when there is none.
    ///
    /// # Errors
    /// The way to the host is broken.
    ///
    /// # Safety
    /// `to` is memory that can be written and whose content nobody relies on.
    unsafe fn receive(&mut self, to: &[libc::iovec]) -> io::Result<Option<usize>>;
    /// Sends a packet, whose first piece is its header; false when it must be tried again once [`Self::fd`] is ready.
    ///
    /// # Errors
    /// The packet is lost.
    ///
    /// # Safety
    /// `packet` is memory that can be read.
    unsafe fn send(&mut self, packet: &[libc::iovec]) -> io::Result<bool>;
}
