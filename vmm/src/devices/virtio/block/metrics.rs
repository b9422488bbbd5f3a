//! What a disk counts.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Bytes read by the guest.
    pub read_bytes: AtomicU64,
    /// Read requests.
    pub reads: AtomicU64,
    /// Bytes written by the guest.
    pub write_bytes: AtomicU64,
    /// Write requests.
    pub writes: AtomicU64,
    /// Flush requests.
    pub flushes: AtomicU64,
    /// Discard and write-zeroes requests.
    pub discards: AtomicU64,
    /// Requests answered with an error.
    pub errors: AtomicU64,
    /// How often a request had to wait for the disk's limit.
    pub limited: AtomicU64,
}

impl Metrics {
    /// For report and control socket.
    pub fn to_json(&self) -> serde_json::Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "read_bytes": get(&self.read_bytes),
            "reads": get(&self.reads),
            "write_bytes": get(&self.write_bytes),
            "writes": get(&self.writes),
            "flushes": get(&self.flushes),
            "discards": get(&self.discards),
            "errors": get(&self.errors),
            "limited": get(&self.limited),
        })
    }
}
