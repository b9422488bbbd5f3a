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
    /// The device's own, see [`crate::devices::virtio::VirtioDevice::save`].
    own: Vec<u8>,
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
    /// Takes the device's state. It leaves memory alone until [`Self::saved`].
    ///
    /// # Errors
    /// Why it cannot be saved as it is.
    pub fn save(&self) -> Result<TransportState, String> {
        let mut state = lock(&self.state);
        let own = state.device.save().map_err(|why| format!("{}: {why}", state.device.name()))?;
        let queues = if state.active {
            state.device.queues()
        } else {
            state.queues.iter().map(Queue::state).collect()
        };
        Ok(TransportState {
            device_type: state.device.device_type(),
            name: state.device.name().to_owned(),
            config: state.device.config().to_vec(),
            status: state.status,
            device_features_sel: state.device_features_sel,
            driver_features: state.driver_features,
            driver_features_sel: state.driver_features_sel,
            queue_sel: state.queue_sel,
            active: state.active,
            interrupt: self.interrupt.status(),
            queues: queues.into_iter().map(SavedQueue::from).collect(),
            own,
        })
    }

    /// After [`Self::save`], whatever that said, when memory is written.
    pub fn saved(&self) {
        lock(&self.state).device.saved();
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
        // What a driver has only asked for is nothing that it uses.
        let agreed = saved.active || saved.status & status::FEATURES_OK != 0;
        if agreed && lacking != 0 {
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
        state.device.load(&saved.own)?;
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::sync::Arc;

    use proptest::prelude::*;
    use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::devices::virtio::VirtioDevice;
    use crate::devices::virtio::block::Block;
    use crate::devices::virtio::block::disk::Disk;
    use crate::devices::virtio::driver::{DATA, Driver, END, WRITE};
    use crate::devices::virtio::net::{Net, Stream};
    use crate::devices::virtio::rng::Rng;
    use crate::devices::virtio::vsock::Vsock;
    use crate::memory::create;

    fn disk(directory: &Path, read_only: bool) -> Box<dyn VirtioDevice> {
        let path = directory.join("disk");
        std::fs::write(&path, [7; 8192]).unwrap();
        Box::new(Block::new("disk", Disk::raw(&path, read_only).unwrap()))
    }

    /// Asks for the disk's second sector, without a notification.
    fn ask(driver: &mut Driver) {
        driver.put(DATA, &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        driver.put(DATA + 64, &[0xee]);
        driver.offer(0, 0, &[(DATA, 16, 0), (DATA + 512, 512, WRITE), (DATA + 64, 1, WRITE)]);
    }

    #[test]
    fn a_request_that_nobody_has_seen_is_answered_after_the_move() {
        let place = tempfile::tempdir().unwrap();
        let mut driver = Driver::new(disk(place.path(), false));
        for round in 1..4 {
            ask(&mut driver);
            driver = driver.move_to(disk(place.path(), false)).unwrap();
            assert_eq!(driver.used(0), (round, (0, 513)));
            assert_eq!((driver.get(DATA + 64, 1)[0], driver.get(DATA + 512, 1)[0]), (0, 7));
            // And the driver is told, whether it was before or not.
            assert!(driver.line.read().is_ok() && driver.read(0x60) & 1 == 1);
            assert_eq!(driver.read(0x60) & 2, 0, "nothing about the disk has changed");
        }
    }

    #[test]
    fn a_drive_gets_its_disk() {
        let place = tempfile::tempdir().unwrap();
        let mut driver = Driver::new(Box::new(Block::empty("disk", false)));
        let sectors = |driver: &Driver| driver.read(0x100);
        assert_eq!(sectors(&driver), 0);
        ask(&mut driver);
        driver.kick(0);
        assert_eq!(driver.get(DATA + 64, 1)[0], 1, "an I/O error");
        let mut driver = driver.move_to(disk(place.path(), false)).unwrap();
        assert_eq!(sectors(&driver), 16);
        assert_eq!(driver.read(0x60) & 2, 2, "the driver is told to look");
        ask(&mut driver);
        driver.kick(0);
        assert_eq!((driver.get(DATA + 64, 1)[0], driver.get(DATA + 512, 1)[0]), (0, 7));
    }

    #[test]
    fn what_is_not_the_same_device_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let flush = 1 << VIRTIO_BLK_F_FLUSH;
        let refusal = |device| {
            let driver = Driver::with_features(disk(place.path(), false), flush);
            driver.move_to(device).err().expect("it was accepted")
        };
        assert!(refusal(disk(place.path(), true)).contains("read-only"));
        assert!(refusal(Box::new(Block::empty("other", false))).contains("other"));
        assert!(refusal(Box::<Rng>::default()).contains("rng"));
        let (near, _far) = UnixStream::pair().unwrap();
        let net = || {
            Box::new(Net::new("net0", Box::new(Stream::new(near.try_clone().unwrap()).unwrap()), None, 1500))
        };
        let error = Driver::new(net()).move_to(disk(place.path(), false)).err().unwrap();
        assert!(error.contains("net0"), "{error}");
    }

    #[test]
    fn a_driver_that_misbehaves_can_be_moved() {
        // One that has asked for what is not offered.
        let driver = Driver::new(Box::<Rng>::default());
        driver.write(0x70, 0);
        driver.write(0x70, 3);
        driver.write(0x20, u32::MAX);
        driver.move_to(Box::<Rng>::default()).unwrap();
        // One that asks while it is in use.
        let driver = Driver::new(Box::<Rng>::default());
        driver.write(0x70, 7);
        driver.write(0x20, u32::MAX);
        driver.move_to(Box::<Rng>::default()).unwrap();
        // One whose device was stopped: it must be reset there, too.
        let mut driver = Driver::new(Box::<Rng>::default());
        driver.offer(0, 0, &[(END + 4096, 16, WRITE)]);
        driver.kick(0);
        assert!(driver.needs_reset());
        let mut driver = driver.move_to(Box::<Rng>::default()).unwrap();
        assert!(driver.needs_reset());
        driver.start();
        assert!(!driver.needs_reset());
    }

    #[test]
    fn receive_buffers_taken_ahead_are_taken_again() {
        let net = |stream: UnixStream| {
            Box::new(Net::new("net0", Box::new(Stream::new(stream).unwrap()), None, 1500))
        };
        let frame = |value: u8| [&[0, 0, 0, 60][..], &[value; 60]].concat();
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut driver = Driver::new(net(near));
        for buffer in 0..4_u16 {
            driver.offer(0, buffer, &[(DATA + u64::from(buffer) * 4096, 4096, WRITE)]);
        }
        driver.kick(0);
        far.write_all(&frame(1)).unwrap();
        driver.transport.host_event(0);
        assert_eq!(driver.used(0).0, 1);
        for round in 2..4_u16 {
            let (near, mut far) = UnixStream::pair().unwrap();
            driver = driver.move_to(net(near)).unwrap();
            far.write_all(&frame(round as u8)).unwrap();
            driver.transport.host_event(0);
            // The next buffer in order, not one further on.
            assert_eq!(driver.used(0), (round, (u32::from(round) - 1, 72)));
            assert_eq!(driver.get(DATA + (u64::from(round) - 1) * 4096 + 12, 1), [round as u8]);
        }
    }

    #[test]
    fn no_stream_begins_before_the_guest_has_forgotten_the_old_ones() {
        let place = tempfile::tempdir().unwrap();
        let vsock = |name: &str| Box::new(Vsock::new(3, &place.path().join(name)).unwrap());
        let mut driver = Driver::new(vsock("one"));
        // Buffers for packets, and for events.
        for buffer in 0..4_u16 {
            driver.offer(0, buffer * 2, &[(DATA + u64::from(buffer) * 4096, 4096, WRITE)]);
            driver.offer(2, buffer, &[(DATA + 0x1_0000 + u64::from(buffer) * 16, 4, WRITE)]);
        }
        driver.put(DATA + 0x1_0000, &[0xff; 4]);
        let mut driver = driver.move_to(vsock("two")).unwrap();
        // The event is there: VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
        assert_eq!(driver.used(2), (1, (0, 4)));
        assert_eq!(driver.get(DATA + 0x1_0000, 4), [0; 4]);

        let mut host = UnixStream::connect(place.path().join("two")).unwrap();
        host.write_all(b"CONNECT 1024\n").unwrap();
        for _ in 0..3 {
            driver.transport.host_event(0);
            driver.kick(0);
            driver.kick(2);
        }
        assert_eq!(driver.used(0).0, 0, "a stream began that the guest would forget");
        driver.offer(2, 4, &[(DATA + 0x1_0000, 4, WRITE)]);
        driver.kick(2);
        assert_eq!(driver.used(0).0, 1, "the request for a stream");
        host.set_nonblocking(true).unwrap();
        assert!(host.read(&mut [0; 8]).is_err());
        // The buffers for events that were taken for nothing are there again for the next one.
        let driver = driver.move_to(vsock("three")).unwrap();
        assert_eq!(driver.used(2).0, 2);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        /// The checksum says that a state is what was written, not that it makes sense.
        #[test]
        fn no_state_can_break_a_device(flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            let place = tempfile::tempdir().unwrap();
            let mut driver = Driver::new(disk(place.path(), false));
            ask(&mut driver);
            let mut bytes = postcard::to_stdvec(&driver.transport.save().unwrap()).unwrap();
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let Ok(state) = postcard::from_bytes::<TransportState>(&bytes) else { return Ok(()) };
            let memory = Arc::new(create(END).unwrap());
            let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            let transport = MmioTransport::new(disk(place.path(), false), memory, line).unwrap();
            if transport.restore(&state).is_ok() {
                transport.wake();
                transport.queue_event(0);
                transport.finish();
                transport.save().unwrap();
            }
        }
    }
}
