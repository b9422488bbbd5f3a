//! What the console counts.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Bytes the guest printed.
    pub output_bytes: AtomicU64,
    /// Bytes given to the guest.
    pub input_bytes: AtomicU64,
}

impl Metrics {
    /// For report and control socket.
    pub fn to_json(&self) -> serde_json::Value {
        json!({
            "output_bytes": self.output_bytes.load(Ordering::Relaxed),
            "input_bytes": self.input_bytes.load(Ordering::Relaxed),
        })
    }
}
