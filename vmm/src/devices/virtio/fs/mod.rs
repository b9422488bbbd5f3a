//! File system device (section 5.11): a directory of the host, served by another process.
//!
//! The monitor is a vhost-user *frontend* here: it tells a backend (virtiofsd) over a unix socket where the queues are, and hands it
//! the eventfds. These queues are the monitor's own (`shadow.rs`): the guest's requests and their answers are copied between them
//! and the guest's, so that the backend sees nothing else of the guest.
//!
//! No driver survives the loss of its backend (requests under way are never answered, processes that wait for them cannot
//! even be killed), so the machine ends then and says why.

#[cfg(test)]
pub(super) mod backend;
mod device;
mod frontend;
mod handler;
mod metrics;
mod shadow;
mod state;

pub use device::{Fs, TAG_BYTES};
