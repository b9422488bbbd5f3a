//! What a shared file system counts. Its requests are the backend's to count.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Metrics {
    /// How often a driver has set the device up.
    pub activations: AtomicU64,
}

impl Metrics {
    /// For report and control socket.
    pub fn to_json(&self, lost: bool) -> serde_json::Value {
        json!({ "activations": self.activations.load(Ordering::Relaxed), "backend_lost": lost })
    }
}
