//! Entropy device (section 5.4): the guest hands over buffers, the host fills them from its own generator.

mod device;
mod handler;
mod metrics;

pub use device::Rng;
