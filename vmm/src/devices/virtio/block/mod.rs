//! Block device (section 5.2): raw files, and composite disks of several read-only files.

pub mod backup;
mod device;
pub mod disk;
pub mod gpt;
mod handler;
mod limit;
mod metrics;
mod request;
#[cfg(test)]
mod tests;

pub use device::Block;
