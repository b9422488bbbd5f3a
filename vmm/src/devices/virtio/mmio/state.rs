//! A device's registers and queues, taken out to be put back behind another machine's device of the same kind.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

use super::{MmioTransport, status};
use crate::sync::lock;

/// Everything that the guest has told a device, and what it was told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    device_type: u32,
    name: String,
    /// The configuration space that the driver has seen.
    config: Vec<u8>,
    status: u32,
    device_features_sel: u32,
    driver_features: u64,
    driver_features_sel: u32,
    queue_sel: u32,
    active: bool,
    interrupt: u32,
    queues: Vec<SavedQueue>,
}

/// `virtio_queue::QueueState`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> Self {
        Self {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
        }
    }
}

impl SavedQueue {
    fn to_queue(self) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        })
    }
}

impl MmioTransport {
    /// Takes the device's state. Nothing of it changes.
    ///
    /// # Errors
    /// Why it cannot be saved as it is.
    pub fn save(&self) -> Result<TransportState, String> {
        let state = lock(&self.state);
        let name = state.device.name();
        state.device.saveable().map_err(|why| format!("{name}: {why}"))?;
        let queues = if state.active {
            state.device.queues()
        } else {
            state.queues.iter().map(Queue::state).collect()
        };
        Ok(TransportState {
            device_type: state.device.device_type(),
            name: name.to_owned(),
            config: state.device.config().to_vec(),
            status: state.status,
            device_features_sel: state.device_features_sel,
            driver_features: state.driver_features,
            driver_features_sel: state.driver_features_sel,
            queue_sel: state.queue_sel,
            active: state.active,
            interrupt: self.interrupt.pending(),
            queues: queues.into_iter().map(SavedQueue::from).collect(),
        })
    }

    /// Gives a new device a state. The guest must not run yet; [`Self::wake`] is due before it does.
    ///
    /// # Errors
    /// Why this device cannot go on where that one stood.
    pub fn restore(&self, saved: &TransportState) -> Result<(), String> {
        let mut state = lock(&self.state);
        let (kind, name) = (state.device.device_type(), state.device.name().to_owned());
        if (kind, &name) != (saved.device_type, &saved.name) {
            return Err(format!(
                "where it has {:?} (virtio device {}) the configuration has {name:?} (virtio device {kind})",
                saved.name, saved.device_type
            ));
        }
        if saved.status != 0 {
            state.device.acknowledged();
        }
        let lacking = saved.driver_features & !state.device.features();
        if lacking != 0 {
            return Err(format!(
                "its guest uses features of {name:?} that the one in the configuration does not have ({lacking:#x}); is \
                 it read-only, or of another kind?"
            ));
        }
        let nonsense = |why: &str| format!("what it says of {name:?} makes no sense: {why}");
        let sizes = state.device.queue_sizes();
        if saved.queues.len() != sizes.len()
            || saved.queues.iter().zip(sizes).any(|(queue, size)| queue.max_size != *size)
        {
            return Err(format!("{name:?} has other queues in the configuration than in the snapshot"));
        }
        let mut queues = Vec::with_capacity(saved.queues.len());
        for queue in &saved.queues {
            let queue = queue.to_queue().map_err(|error| nonsense(&error.to_string()))?;
            if saved.active && queue.ready() && !queue.is_valid(self.memory.as_ref()) {
                return Err(nonsense("a queue does not lie in memory"));
            }
            queues.push(queue);
        }
        state.queues = queues;
        state.status = saved.status;
        state.device_features_sel = saved.device_features_sel;
        state.driver_features = saved.driver_features;
        state.driver_features_sel = saved.driver_features_sel;
        state.queue_sel = saved.queue_sel;
        self.interrupt.restore(saved.interrupt);
        if saved.active {
            self.hand_over(&mut state);
            state.device.restored();
        }
        if saved.config != state.device.config() {
            self.changed.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// After [`Self::restore`], and after the interrupt controllers have their state: whatever was on its way when the
    /// state was taken, a notification or an interrupt, comes now, perhaps once too often, which drivers must expect.
    pub fn wake(&self) {
        let state = lock(&self.state);
        if !state.active {
            return;
        }
        for kick in self.kicks.iter() {
            // Just made: it cannot be full.
            let _ = kick.write(1);
        }
        self.interrupt.used_buffer();
        if self.changed.load(Ordering::Relaxed) && state.status & status::DRIVER_OK != 0 {
            self.interrupt.config_change();
        }
    }
}
