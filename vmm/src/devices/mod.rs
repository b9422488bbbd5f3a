//! What the guest sees besides processors and memory.

pub mod console_output;
pub mod legacy;
pub mod virtio;
