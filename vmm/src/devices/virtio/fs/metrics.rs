//! What a shared file system counts.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Metrics {
    /// How often a driver has set the device up.
    pub activations: AtomicU64,
    /// Requests given to the backend.
    pub requests: AtomicU64,
    /// Bytes of them.
    pub bytes_out: AtomicU64,
    /// Bytes of answers.
    pub bytes_in: AtomicU64,
    /// How often a request had to wait for room.
    pub waits: AtomicU64,
}

impl Metrics {
    /// Counts.
    pub fn add(counter: &AtomicU64, amount: usize) {
        counter.fetch_add(amount as u64, Ordering::Relaxed);
    }

    /// For report and control socket.
    pub fn to_json(&self, lost: bool) -> serde_json::Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "activations": get(&self.activations),
            "requests": get(&self.requests),
            "bytes_out": get(&self.bytes_out),
            "bytes_in": get(&self.bytes_in),
            "waits": get(&self.waits),
            "backend_lost": lost,
        })
    }
}
