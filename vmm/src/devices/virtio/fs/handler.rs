//! The conversation with the process that serves the queues: vhost-user, of which the monitor is the frontend.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::devices::virtio::{Activation, F_VERSION_1};
use crate::jail::{self, Kind};
use crate::memory::GuestMemory;

/// How long a backend may take for one exchange; the first includes the rest of its start.
const PATIENCE: Duration = if cfg!(test) { Duration::from_secs(1) } else { Duration::from_secs(10) };
/// Virtio feature bit by which a backend says that it knows protocol features.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Why a backend can no longer be used.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    /// Nobody is at the other end of the socket.
    #[error("the process that serves it has closed the connection; it was killed, or its own log says why")]
    Gone,
    /// It does not answer.
    #[error(
        "the process that serves it did not {0} within {1} seconds; is it stopped, or the host overloaded?"
    )]
    Silent(&'static str, u64),
    /// It answered that it cannot.
    #[error("the process that serves it could not {0}: {1}")]
    Refused(&'static str, vhost::Error),
    /// It lacks what the device needs.
    #[error("the process that serves it lacks {0}; use virtiofsd 1.0 or later")]
    Lacks(&'static str),
    /// A queue does not lie in memory.
    #[error("queue {0} does not lie in guest memory")]
    Queue(usize),
    /// The monitor is out of something.
    #[error("cannot talk to the process that serves it: {0}")]
    Host(#[from] io::Error),
}

/// The process that serves the queues.
pub struct Backend {
    stream: UnixStream,
    frontend: Frontend,
    queues: usize,
    /// What it offers; 0 before it was asked.
    features: u64,
    acknowledges: bool,
    /// What it knows of the guest can be saved.
    saves: bool,
    /// Queues that it was given.
    running: Vec<usize>,
}

impl Backend {
    /// The one at the other end of `stream`, which is to serve so many queues.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(stream: UnixStream, queues: usize) -> io::Result<Self> {
        let frontend = Frontend::from_stream(stream.try_clone()?, queues as u64);
        Ok(Self {
            stream,
            frontend,
            queues,
            features: 0,
            acknowledges: false,
            saves: false,
            running: Vec::new(),
        })
    }

    /// Becomes readable when the backend is gone.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Features that it offers.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Asks what it can do, once for each connection.
    ///
    /// # Errors
    /// It does not answer, or lacks something.
    pub fn negotiate(&mut self) -> Result<(), Lost> {
        if self.features != 0 {
            return Ok(());
        }
        let (features, protocol) = self.exchange("say what it can do", |frontend| {
            let features = frontend.get_features()?;
            if features & PROTOCOL_FEATURES == 0 {
                return Ok((features, VhostUserProtocolFeatures::empty()));
            }
            let wanted = VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::DEVICE_STATE;
            let protocol = frontend.get_protocol_features()? & wanted;
            frontend.set_protocol_features(protocol)?;
            frontend.set_owner()?;
            Ok((features, protocol))
        })?;
        if features & PROTOCOL_FEATURES == 0 {
            return Err(Lost::Lacks("vhost-user's protocol features"));
        }
        if features & F_VERSION_1 == 0 {
            return Err(Lost::Lacks("version 1 of virtio"));
        }
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            let offered = self.exchange("say how many queues it has", Frontend::get_queue_num)?;
            if offered < self.queues as u64 {
                return Err(Lost::Lacks("so many queues as the configuration asks for"));
            }
        }
        self.acknowledges = protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        self.saves = protocol.contains(VhostUserProtocolFeatures::DEVICE_STATE);
        self.features = features;
        Ok(())
    }

    /// Whether what it knows of the guest can be saved.
    pub fn has_state(&self) -> bool {
        self.saves
    }

    /// Hands over memory, queues and eventfds: from then on it serves the guest.
    ///
    /// # Errors
    /// It does not, or a queue makes no sense.
    pub fn start(&mut self, activation: &Activation) -> Result<(), Lost> {
        let Activation { memory, queues, interrupt, features, kicks } = activation;
        let regions = memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions: Vec<_> =
            regions.collect::<Result<_, _>>().map_err(|e| Lost::Refused("share memory", e))?;
        let ready = queues.iter().zip(kicks.iter()).enumerate().filter(|(_, (queue, _))| queue.ready());
        let mut rings = Vec::new();
        for (index, (queue, kick)) in ready {
            rings.push((index, ring(memory, queue).ok_or(Lost::Queue(index))?, queue.next_avail(), kick));
        }
        let acknowledges = self.acknowledges;
        self.exchange("take over the queues", |frontend| {
            frontend.set_features(features | PROTOCOL_FEATURES)?;
            // Only these are acknowledged: what goes wrong in between ends the connection, and the last one shows it.
            let ask = |frontend: &Frontend, wanted| {
                let flag = VhostUserHeaderFlag::NEED_REPLY;
                frontend.set_hdr_flags(if wanted { flag } else { VhostUserHeaderFlag::empty() });
            };
            ask(frontend, acknowledges);
            frontend.set_mem_table(&regions)?;
            ask(frontend, false);
            for (index, ring, next, kick) in &rings {
                frontend.set_vring_num(*index, ring.queue_size)?;
                frontend.set_vring_base(*index, *next)?;
                frontend.set_vring_addr(*index, ring)?;
                frontend.set_vring_call(*index, interrupt.line())?;
                frontend.set_vring_kick(*index, kick)?;
            }
            ask(frontend, acknowledges);
            for (index, ..) in &rings {
                frontend.set_vring_enable(*index, true)?;
            }
            ask(frontend, false);
            Ok(())
        })?;
        self.running = rings.iter().map(|(index, ..)| *index).collect();
        Ok(())
    }

    /// Takes the queues back: it no longer touches guest memory. Answers which it had, and which entry of each it would have taken next.
    ///
    /// # Errors
    /// It does not answer.
    pub fn stop(&mut self) -> Result<Vec<(usize, u16)>, Lost> {
        let running = std::mem::take(&mut self.running);
        if running.is_empty() {
            return Ok(Vec::new());
        }
        self.exchange("give the queues back", |frontend| {
            let stop = |index| {
                frontend.set_vring_enable(index, false)?;
                Ok((index, frontend.get_vring_base(index)? as u16))
            };
            running.into_iter().map(stop).collect()
        })
    }

    /// Whether it is still there.
    ///
    /// # Errors
    /// It is not.
    pub fn check(&self) -> Result<(), Lost> {
        let mut byte = [0_u8];
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: pointer and length are those of a buffer that lives across the call.
        let got = unsafe { libc::recv(self.fd(), byte.as_mut_ptr().cast(), byte.len(), flags) };
        match got {
            0 => Err(Lost::Gone),
            // Nobody waits for an answer now (the transport's lock is ours): what it says unasked is its own affair.
            1.. => Ok(()),
            _ => match io::Error::last_os_error() {
                error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(()),
                _ => Err(Lost::Gone),
            },
        }
    }

    /// Says something and waits for the answer, but not for ever: `vhost` knows no timeout and takes one of the socket's
    /// for a reason to try again, so that a second thread cuts the connection when it takes too long.
    fn exchange<T>(
        &mut self,
        what: &'static str,
        say: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, Lost> {
        self.exchange_within(PATIENCE, what, say)
    }

    /// The same for state, of which there may be much: to find each file's path takes a while.
    pub(super) fn exchange_state<T>(
        &mut self,
        what: &'static str,
        say: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, Lost> {
        self.exchange_within(6 * PATIENCE, what, say)
    }

    fn exchange_within<T>(
        &mut self,
        patience: Duration,
        what: &'static str,
        say: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, Lost> {
        let (done, wait) = mpsc::channel::<()>();
        let (stream, frontend) = (&self.stream, &mut self.frontend);
        thread::scope(|scope| {
            let confined = jail::is_confined();
            let watch = move || {
                if jail::confine_below(Kind::Watch, confined).is_err() {
                    return false;
                }
                let late = wait.recv_timeout(patience) == Err(RecvTimeoutError::Timeout);
                if late {
                    let _ = stream.shutdown(Shutdown::Both);
                }
                late
            };
            let watch = thread::Builder::new().name("fs-patience".into()).spawn_scoped(scope, watch)?;
            let answer = say(frontend);
            drop(done);
            let late = watch.join().unwrap_or(false);
            answer.map_err(
                |error| if late { Lost::Silent(what, patience.as_secs()) } else { refused(what, error) },
            )
        })
    }
}

fn refused(what: &'static str, error: vhost::Error) -> Lost {
    use vhost::vhost_user::Error as Protocol;
    match error {
        vhost::Error::VhostUserProtocol(
            Protocol::Disconnected | Protocol::SocketBroken(_) | Protocol::PartialMessage,
        ) => Lost::Gone,
        other => Lost::Refused(what, other),
    }
}

/// Where a queue is, in the monitor's own addresses, which is how vhost-user counts.
fn ring(memory: &GuestMemory, queue: &Queue) -> Option<VringConfigData> {
    let host = |address| Some(memory.get_host_address(GuestAddress(address)).ok()? as u64);
    Some(VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: host(queue.desc_table())?,
        used_ring_addr: host(queue.used_ring())?,
        avail_ring_addr: host(queue.avail_ring())?,
        log_addr: None,
    })
}
