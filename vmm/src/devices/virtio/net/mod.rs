//! Network device (section 5.1): Ethernet frames between the guest and a tap, or a stream socket that carries frames
//! (`passt`).
//!
//! Frames are read right into the guest's receive buffers and written right out of its memory. The guest's packet
//! headers are not: each is copied, checked against what was negotiated and against the frame's length, and only the
//! copy reaches the host's kernel.

mod backend;
mod device;
mod handler;
mod header;
mod metrics;
mod receive;
mod stream;
mod tap;
#[cfg(test)]
mod tests;
mod unplugged;

pub use backend::Backend;
pub use device::Net;
pub use stream::Stream;
pub use tap::Tap;
pub use unplugged::Unplugged;
