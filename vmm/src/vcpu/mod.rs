//! Virtual processors: one thread each, which runs the guest until it touches something that KVM does not handle.

pub mod exit;
mod gate;
mod thread;

pub use gate::{Gate, Sample};
pub use thread::{Vcpu, Vcpus};
