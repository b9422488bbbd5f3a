//! File system device (section 5.11): a directory of the host, served by another process.
//!
//! The monitor is a vhost-user *frontend* here: it tells a backend (virtiofsd) over a unix socket where guest memory and
//! queues are, hands it the eventfds, and is out of the way from then on. The guest's requests never reach the monitor.
//!
//! What is left to do: to notice when the backend is gone. No driver survives that (requests under way are never
//! answered, processes that wait for them cannot even be killed), so the machine ends and says why.

#[cfg(test)]
pub(super) mod backend;
mod device;
mod handler;
mod metrics;
mod state;

pub use device::{Fs, TAG_BYTES};
