//! What the socket device counts.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Streams that were opened, by either side.
    pub connections: AtomicU64,
    /// Streams refused: nobody listens, or too many.
    pub refused: AtomicU64,
    /// Packets from the guest.
    pub tx_packets: AtomicU64,
    /// Payload bytes from the guest.
    pub tx_bytes: AtomicU64,
    /// Packets to the guest.
    pub rx_packets: AtomicU64,
    /// Payload bytes to the guest.
    pub rx_bytes: AtomicU64,
}

impl Metrics {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }

    /// For report and control socket.
    pub fn to_json(&self) -> serde_json::Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "connections": get(&self.connections),
            "refused": get(&self.refused),
            "tx_packets": get(&self.tx_packets),
            "tx_bytes": get(&self.tx_bytes),
            "rx_packets": get(&self.rx_packets),
            "rx_bytes": get(&self.rx_bytes),
        })
    }
}
