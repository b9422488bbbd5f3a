//! Console device (section 5.3) with one port: hvc0 in the guest.

mod device;
mod handler;
mod input;
mod metrics;

pub use device::Console;
