//! What the entropy device counts.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Bytes given to the guest.
    pub bytes: AtomicU64,
}

impl Metrics {
    /// For report and control socket.
    pub fn to_json(&self) -> serde_json::Value {
        json!({ "bytes": self.bytes.load(Ordering::Relaxed) })
    }
}
