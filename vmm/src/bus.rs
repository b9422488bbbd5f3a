//! Which device answers which address: one bus for I/O ports, one for memory-mapped registers.

use std::sync::Arc;

/// A device with registers. Called from vCPU threads: quick, never panicking, whatever the guest does.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` into the device's window. Bytes left alone read as ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

struct Window {
    start: u64,
    end: u64,
    device: Arc<dyn BusDevice>,
}

/// Devices by address. Filled while the machine is built, only read afterwards.
#[derive(Default)]
pub struct Bus {
    /// Sorted by address, without overlap.
    windows: Vec<Window>,
}

impl Bus {
    /// Gives `device` the addresses from `start` on.
    ///
    /// # Panics
    /// When another device has one of them already: an error of the monitor's own layout, met when the machine is built.
    pub fn insert(&mut self, start: u64, length: u64, device: Arc<dyn BusDevice>) {
        let end = start + length;
        let at = self.windows.partition_point(|window| window.start < start);
        let free = self.windows.get(at).is_none_or(|next| end <= next.start)
            && at
                .checked_sub(1)
                .and_then(|i| self.windows.get(i))
                .is_none_or(|previous| previous.end <= start);
        assert!(free, "two devices at {start:#x}");
        self.windows.insert(at, Window { start, end, device });
    }

    /// Reads from whatever is at `address`; nothing there reads as ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address) {
            device.read(offset, data);
        }
    }

    /// Writes to whatever is at `address`, if anything is.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        let after = self.windows.partition_point(|window| window.start <= address);
        let window = self.windows.get(after.checked_sub(1)?)?;
        (address < window.end).then(|| (window.device.as_ref(), address - window.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0.wrapping_add(offset as u8));
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    proptest! {
        #[test]
        fn every_address_finds_its_device_or_ones(mut starts in proptest::collection::btree_set(0_u64..50, 1..10), probe in 0_u64..520) {
            starts.insert(51);
            let mut bus = Bus::default();
            for start in starts.iter().rev() {
                bus.insert(start * 10, 7, Arc::new(Echo((start * 3) as u8)));
            }
            let mut data = [0];
            bus.read(probe, &mut data);
            let expected = if starts.contains(&(probe / 10)) && probe % 10 < 7 {
                (probe / 10 * 3 + probe % 10) as u8
            } else {
                0xff
            };
            prop_assert_eq!(data[0], expected);
        }
    }

    #[test]
    #[should_panic(expected = "two devices")]
    fn overlap_is_an_error() {
        let mut bus = Bus::default();
        bus.insert(10, 10, Arc::new(Echo(0)));
        bus.insert(19, 1, Arc::new(Echo(0)));
    }
}
