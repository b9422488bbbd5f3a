//! The one thread in which devices work, the control socket answers and the end of the machine is noticed.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::Progress;
use crate::devices::virtio::mmio::MmioTransport;
use crate::error::{Error, Result};
use crate::exit::ExitRequest;

/// Events taken from the kernel at once.
const EVENTS: usize = 32;

/// The loop and everything that it serves.
pub struct EventLoop {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
}

impl EventLoop {
    /// An empty loop.
    ///
    /// # Errors
    /// When no epoll instance can be had.
    pub fn new() -> Result<Self> {
        let manager = EventManager::new_with_capacity(EVENTS).map_err(|error| Error::Os {
            what: "make an event loop",
            source: std::io::Error::other(error),
        })?;
        Ok(Self { manager })
    }

    /// Serves one more.
    pub fn add(&mut self, subscriber: Box<dyn MutEventSubscriber>) {
        self.manager.add_subscriber(subscriber);
    }

    /// Serves a device's queues and host descriptors.
    pub fn add_device(&mut self, transport: Arc<MmioTransport>) {
        self.add(Box::new(DeviceEvents { transport, again: None }));
    }

    /// Runs until `exit` has an outcome.
    ///
    /// # Errors
    /// When waiting fails, which is an error of the monitor.
    pub fn run(&mut self, exit: &ExitRequest) -> Result<()> {
        self.add(Box::new(Wake(exit.clone())));
        while exit.outcome().is_none() {
            self.manager.run().map_err(|error| Error::Os {
                what: "wait for events",
                source: std::io::Error::other(error),
            })?;
        }
        Ok(())
    }
}

/// Adds `events` and says so when the kernel refuses.
pub(crate) fn watch(ops: &mut EventOps, events: Events) {
    if let Err(error) = ops.add(events) {
        eprintln!("bulkhead-vmm: descriptor {} cannot be watched: {error:?}", events.fd());
    }
}

/// Ends the wait when the machine ends; the loop itself looks at the outcome.
struct Wake(ExitRequest);

impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, Events::new(self.0.event(), EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {}
}

/// Data word of events of host descriptors; those of queues carry the queue's index.
const HOST: u32 = u32::MAX;
/// Data word of the event with which a device calls itself again.
const AGAIN: u32 = u32::MAX - 1;

/// Brings a device its queue notifications and host events.
struct DeviceEvents {
    transport: Arc<MmioTransport>,
    /// Host descriptor whose event was not worked off, and what brings us back to it.
    again: Option<(EventFd, RawFd)>,
}

impl MutEventSubscriber for DeviceEvents {
    fn init(&mut self, ops: &mut EventOps) {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (kick, index) in self.transport.kicks().iter().zip(0..) {
            watch(ops, Events::with_data(kick, index, edge));
        }
        let room = if self.transport.waits_for_room() { EventSet::OUT } else { EventSet::empty() };
        for fd in self.transport.host_fds() {
            // Regular files are always ready and cannot be watched: /dev/null as standard input is one.
            let _ = ops.add(Events::with_data_raw(fd, HOST, edge | room));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = match events.data() {
            HOST => events.fd(),
            AGAIN => match &self.again {
                Some((_, fd)) => *fd,
                None => return,
            },
            index => return self.transport.queue_event(index as usize),
        };
        if self.transport.host_event(fd) == Progress::More {
            self.call_again(fd, ops);
        }
    }
}

impl DeviceEvents {
    /// Lets others have their turn before the rest of `fd`'s event is worked off.
    fn call_again(&mut self, fd: RawFd, ops: &mut EventOps) {
        if self.again.is_none() {
            let Ok(event) = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) else { return };
            watch(
                ops,
                Events::with_data_raw(event.as_raw_fd(), AGAIN, EventSet::IN | EventSet::EDGE_TRIGGERED),
            );
            self.again = Some((event, fd));
        }
        if let Some((event, last)) = &mut self.again {
            *last = fd;
            // Never read, but also never written often enough to be full.
            let _ = event.write(1);
        }
    }
}
