//! The MMIO transport (section 4.2 of the standard, version 2): registers that vCPU threads read and write, behind which
//! a device works in the event loop's thread.

mod state;

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::json;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

pub use state::TransportState;

use super::block::disk::Disk;
use super::interrupt::Interrupt;
use super::{Activation, GuestError, Progress, VirtioDevice};
use crate::bus::BusDevice;
use crate::memory::GuestMemory;
use crate::sync::lock;
use crate::timeline::now_ns;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"BLKH");

/// Register offsets, by their names in the standard.
mod register {
    pub const MAGIC_VALUE: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    /// The driver writes a queue's index here when it has made buffers available.
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    /// Length and address of a shared memory region, of which no device here has one.
    pub const SHM_FIRST: u64 = 0xb0;
    pub const SHM_LAST: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}
pub use register::QUEUE_NOTIFY;

/// Device status bits (section 2.1).
mod status {
    pub const FEATURES_OK: u32 = 8;
    pub const DRIVER_OK: u32 = 4;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// Complaints about the guest printed per device; a hostile guest must not fill the host's log.
const MAX_COMPLAINTS: u32 = 5;

/// A virtio device and its registers.
pub struct MmioTransport {
    state: Mutex<State>,
    interrupt: Arc<Interrupt>,
    memory: Arc<GuestMemory>,
    kicks: Vec<EventFd>,
    kick_count: AtomicU64,
    /// The configuration space is not what the driver saw before it was saved.
    changed: AtomicBool,
    /// Another one after each change of the configuration space: a driver that reads it meanwhile begins anew. It starts
    /// anywhere, so that a driver that goes on from a snapshot sees another one, too.
    generation: AtomicU32,
}

struct State {
    device: Box<dyn VirtioDevice>,
    status: u32,
    device_features_sel: u32,
    driver_features: u64,
    driver_features_sel: u32,
    queue_sel: u32,
    /// Configured by the driver; moved into the device when it is activated.
    queues: Vec<Queue>,
    active: bool,
    complaints: u32,
}

impl MmioTransport {
    /// Puts `device` behind registers, interrupting by the irqfd `line`.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Arc<GuestMemory>, line: EventFd) -> io::Result<Self> {
        let kicks = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        let queues = fresh_queues(device.as_ref());
        let state = State {
            device,
            status: 0,
            device_features_sel: 0,
            driver_features: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            queues,
            active: false,
            complaints: 0,
        };
        Ok(Self {
            state: Mutex::new(state),
            interrupt: Arc::new(Interrupt::new(line)),
            memory,
            kicks,
            kick_count: AtomicU64::new(0),
            changed: AtomicBool::new(false),
            generation: AtomicU32::new(now_ns() as u32),
        })
    }

    /// One eventfd per queue, written when the driver notifies it. They are watched edge-triggered and never read.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The device's host descriptors.
    pub fn host_fds(&self) -> Vec<RawFd> {
        lock(&self.state).device.host_fds()
    }

    /// Whether they are watched for room to write, too.
    pub fn waits_for_room(&self) -> bool {
        lock(&self.state).device.waits_for_room()
    }

    /// In the event loop: queue `index` was notified.
    pub fn queue_event(&self, index: usize) {
        self.kick_count.fetch_add(1, Ordering::Relaxed);
        let mut state = lock(&self.state);
        if !state.active {
            return;
        }
        let result = state.device.queue_event(index);
        if self.conclude(&mut state, result) == Progress::More
            && let Some(kick) = self.kicks.get(index)
        {
            // Never read, but also never written often enough to be full.
            let _ = kick.write(1);
        }
    }

    /// In the event loop: the host descriptor `fd` is ready. Tells whether to call again.
    pub fn host_event(&self, fd: RawFd) -> Progress {
        let mut state = lock(&self.state);
        let result = state.device.host_event(fd);
        self.conclude(&mut state, result)
    }

    /// Changes what is in a drive, and tells the driver to look. Called in the event loop's thread, where requests are
    /// carried out: none is half-way.
    pub fn change_disk(&self, disk: Option<Disk>) {
        let mut state = lock(&self.state);
        let result = state.device.change_disk(disk);
        if self.conclude(&mut state, result) == Progress::More {
            for kick in self.kicks.iter() {
                // Never read, but also never written often enough to be full.
                let _ = kick.write(1);
            }
        }
        self.generation.fetch_add(1, Ordering::Release);
        if state.status & status::DRIVER_OK != 0 {
            self.interrupt.config_change();
        }
    }

    /// The machine ends: everything that the guest has put into queues is worked off, notified or not.
    pub fn finish(&self) {
        let mut state = lock(&self.state);
        if state.active {
            for index in 0..self.kicks.len() {
                // A guest that breaks the rules now is ending anyway.
                let _ = state.device.queue_event(index);
            }
        }
        state.device.finish();
    }

    /// The device's name, and what is in it if it is a drive.
    pub fn drive(&self) -> Option<(String, Arc<Disk>)> {
        let state = lock(&self.state);
        Some((state.device.name().to_owned(), state.device.disk()?))
    }

    /// The device's name and what was counted.
    pub fn metrics(&self) -> (String, serde_json::Value) {
        let state = lock(&self.state);
        let mut metrics = state.device.metrics();
        if let Some(map) = metrics.as_object_mut() {
            map.insert("kicks".to_owned(), json!(self.kick_count.load(Ordering::Relaxed)));
            map.insert("interrupts".to_owned(), json!(self.interrupt.count()));
        }
        (state.device.name().to_owned(), metrics)
    }

    /// Stops a device whose guest broke the rules.
    fn conclude(&self, state: &mut State, result: Result<Progress, GuestError>) -> Progress {
        let error = match result {
            Ok(progress) => return progress,
            Err(error) => error,
        };
        state.complain(&error.to_string());
        state.active = false;
        state.device.reset();
        // The device has taken the others along. Who saves the machine now saves a device of so many queues all the same.
        state.queues = fresh_queues(state.device.as_ref());
        state.status |= status::NEEDS_RESET;
        self.interrupt.config_change();
        Progress::Done
    }

    fn write_register(&self, offset: u64, value: u32) {
        let mut state = lock(&self.state);
        let low = (Some(value), None);
        let high = (None, Some(value));
        match offset {
            register::DEVICE_FEATURES_SEL => state.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => state.driver_features_sel = value,
            register::DRIVER_FEATURES if state.status & status::FEATURES_OK == 0 && !state.active => {
                let (shift, keep) = match state.driver_features_sel {
                    0 => (0, u64::MAX << 32),
                    1 => (32, u64::from(u32::MAX)),
                    _ => return,
                };
                state.driver_features = (state.driver_features & keep) | (u64::from(value) << shift);
            }
            register::QUEUE_SEL => state.queue_sel = value,
            register::STATUS => self.write_status(&mut state, value),
            // Where ioeventfds are not wired, notifications come here.
            QUEUE_NOTIFY => {
                if let Some(kick) = self.kicks.get(value as usize) {
                    let _ = kick.write(1);
                }
            }
            _ if state.active => {}
            _ => {
                let Some(queue) = state.selected_queue() else { return };
                match offset {
                    register::QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
                    register::QUEUE_READY => queue.set_ready(value == 1),
                    register::QUEUE_DESC_LOW => queue.set_desc_table_address(low.0, low.1),
                    register::QUEUE_DESC_HIGH => queue.set_desc_table_address(high.0, high.1),
                    register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(low.0, low.1),
                    register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(high.0, high.1),
                    register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(low.0, low.1),
                    register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(high.0, high.1),
                    _ => {}
                }
            }
        }
    }

    fn write_status(&self, state: &mut State, value: u32) {
        if value == 0 {
            state.reset();
            self.interrupt.acknowledge(u32::MAX);
            return;
        }
        if state.status == 0 {
            state.device.acknowledged();
        }
        let mut value = value | (state.status & status::NEEDS_RESET);
        let offered = state.device.features();
        let refused = state.driver_features & !offered != 0 || !state.device.accepts(state.driver_features);
        if value & status::FEATURES_OK != 0 && refused {
            // Refused: the driver sees that the bit does not stick.
            value &= !status::FEATURES_OK;
        }
        state.status = value;
        let ready = status::DRIVER_OK | status::FEATURES_OK;
        if value & ready == ready && value & (status::NEEDS_RESET | status::FAILED) == 0 && !state.active {
            self.activate(state);
        }
    }

    fn activate(&self, state: &mut State) {
        let event_idx = state.driver_features & super::F_EVENT_IDX != 0;
        // A queue the driver did not set up stays unused; one it did must be right.
        let valid = state.queues.iter().all(|queue| !queue.ready() || queue.is_valid(self.memory.as_ref()));
        if !valid {
            state.complain("the driver set up a queue that does not lie in memory");
            state.status |= status::NEEDS_RESET;
            self.interrupt.config_change();
            return;
        }
        for queue in &mut state.queues {
            queue.set_event_idx(event_idx);
        }
        self.hand_over(state);
    }

    /// The device gets its queues.
    fn hand_over(&self, state: &mut State) {
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            queues: std::mem::take(&mut state.queues),
            interrupt: Arc::clone(&self.interrupt),
            features: state.driver_features,
        };
        state.device.activate(activation);
        state.active = true;
    }
}

impl State {
    fn read_register(&mut self, offset: u64) -> u32 {
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.device_type(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => match self.device_features_sel {
                0 => self.device.features() as u32,
                1 => (self.device.features() >> 32) as u32,
                _ => 0,
            },
            register::QUEUE_NUM_MAX => {
                self.device.queue_sizes().get(self.queue_sel as usize).map_or(0, |size| u32::from(*size))
            }
            register::QUEUE_READY if self.active => 1,
            register::QUEUE_READY => self.selected_queue().map_or(0, |queue| u32::from(queue.ready())),
            register::STATUS => self.status,
            // "Does not exist"; 0 would be a region of no bytes, which Linux takes for a broken device.
            register::SHM_FIRST..=register::SHM_LAST => u32::MAX,
            _ => 0,
        }
    }

    fn selected_queue(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(self.queue_sel as usize)
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues = fresh_queues(self.device.as_ref());
        self.active = false;
        self.status = 0;
        self.driver_features = 0;
        (self.device_features_sel, self.driver_features_sel, self.queue_sel) = (0, 0, 0);
    }

    fn complain(&mut self, message: &str) {
        if self.complaints < MAX_COMPLAINTS {
            self.complaints += 1;
            eprintln!(
                "bulkhead-vmm: the guest misuses {}, which stops until it is reset: {message}",
                self.device.name()
            );
        }
    }
}

fn fresh_queues(device: &dyn VirtioDevice) -> Vec<Queue> {
    // A size that is no power of two cannot come from our own devices; it would show in the first test of one.
    device.queue_sizes().iter().filter_map(|size| Queue::new(*size).ok()).collect()
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= register::CONFIG {
            let state = lock(&self.state);
            let start = usize::try_from(offset - register::CONFIG).unwrap_or(usize::MAX);
            let config = state.device.config().get(start..).unwrap_or_default();
            data.fill(0);
            for (to, from) in data.iter_mut().zip(config) {
                *to = *from;
            }
            return;
        }
        let value = match offset {
            register::INTERRUPT_STATUS => self.interrupt.status(),
            register::CONFIG_GENERATION => {
                // With the lock: not in the middle of a change.
                let _state = lock(&self.state);
                self.generation.load(Ordering::Acquire)
            }
            _ => lock(&self.state).read_register(offset),
        };
        // Registers are 32 bits wide and must be read so.
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = value.to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(data);
        match offset {
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            // No device here has a configuration that can be written.
            register::CONFIG.. => {}
            _ => self.write_register(offset, value),
        }
    }
}
