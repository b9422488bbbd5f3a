//! What a network device counts.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Packets to the guest.
    pub rx_packets: AtomicU64,
    /// Their bytes.
    pub rx_bytes: AtomicU64,
    /// Times a packet may have waited because the guest had no buffer for it.
    pub rx_waits: AtomicU64,
    /// Packets from the guest.
    pub tx_packets: AtomicU64,
    /// Their bytes.
    pub tx_bytes: AtomicU64,
    /// Packets from the guest that break a rule and were dropped.
    pub tx_invalid: AtomicU64,
    /// Packets from the guest that the host would not take.
    pub tx_dropped: AtomicU64,
    /// Errors when reading from the host.
    pub rx_errors: AtomicU64,
}

impl Metrics {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, by: usize) {
        counter.fetch_add(by as u64, Ordering::Relaxed);
    }

    /// For report and control socket.
    pub fn to_json(&self) -> serde_json::Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "rx_packets": get(&self.rx_packets),
            "rx_bytes": get(&self.rx_bytes),
            "rx_waits": get(&self.rx_waits),
            "rx_errors": get(&self.rx_errors),
            "tx_packets": get(&self.tx_packets),
            "tx_bytes": get(&self.tx_bytes),
            "tx_invalid": get(&self.tx_invalid),
            "tx_dropped": get(&self.tx_dropped),
        })
    }
}
