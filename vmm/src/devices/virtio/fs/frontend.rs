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
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::shadow::{self, Shadow};
use crate::devices::virtio::F_VERSION_1;
use crate::jail::{self, Kind};
use crate::memory::GuestMemory;

/// How long a backend may take for one exchange; the first includes the rest of its start.
pub const PATIENCE: Duration = if cfg!(test) { Duration::from_secs(1) } else { Duration::from_secs(10) };
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
    /// It breaks the rules of the queue that it was given.
    #[error("the process that serves it {0}")]
    Nonsense(&'static str),
    /// It has not answered what it was asked before.
    #[error(
        "the process that serves it had not answered everything within {0} seconds; is a disk or network of the host slow?"
    )]
    Busy(u64),
    /// The monitor is out of something.
    #[error("cannot talk to the process that serves it: {0}")]
    Host(#[from] io::Error),
}

impl Lost {
    /// Whether the backend goes on with its queues as if nothing had been.
    pub fn is_harmless(&self) -> bool {
        matches!(self, Self::Refused(..) | Self::Lacks(_) | Self::Host(_) | Self::Busy(_))
    }
}

/// The process that serves the queues.
pub struct Backend {
    stream: UnixStream,
    frontend: Frontend,
    queues: usize,
    /// It was asked what it can do.
    negotiated: bool,
    acknowledges: bool,
    /// What it knows of the guest can be saved.
    saves: bool,
    /// It was given the queues.
    running: bool,
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
            negotiated: false,
            acknowledges: false,
            saves: false,
            running: false,
        })
    }

    /// Becomes readable when the backend is gone.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Asks what it can do, once for each connection.
    ///
    /// # Errors
    /// It does not answer, or lacks something.
    pub fn negotiate(&mut self) -> Result<(), Lost> {
        if self.negotiated {
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
        self.negotiated = true;
        Ok(())
    }

    /// Whether it has the queues.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Whether what it knows of the guest can be saved.
    pub fn has_state(&self) -> bool {
        self.saves
    }

    /// Hands over queues of the monitor's own, the memory around them, and eventfds: from then on it serves them.
    ///
    /// # Errors
    /// It does not.
    pub fn start(&mut self, shadows: &[Shadow]) -> Result<(), Lost> {
        let region = |memory: &GuestMemory| {
            memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect::<Result<Vec<_>, _>>()
        };
        let Some(memory) = shadows.first().map(Shadow::memory) else { return Ok(()) };
        let regions = region(memory).map_err(|e| Lost::Refused("share memory", e))?;
        let rings = shadows.iter().map(ring).collect::<Option<Vec<_>>>();
        let rings = rings.ok_or(Lost::Host(io::ErrorKind::InvalidInput.into()))?;
        let acknowledges = self.acknowledges;
        self.exchange("take over the queues", |frontend| {
            frontend.set_features(F_VERSION_1 | PROTOCOL_FEATURES)?;
            // Only these are acknowledged: what goes wrong in between ends the connection, and the last one shows it.
            let ask = |frontend: &Frontend, wanted| {
                let flag = VhostUserHeaderFlag::NEED_REPLY;
                frontend.set_hdr_flags(if wanted { flag } else { VhostUserHeaderFlag::empty() });
            };
            ask(frontend, acknowledges);
            frontend.set_mem_table(&regions)?;
            ask(frontend, false);
            for (index, (shadow, ring)) in shadows.iter().zip(&rings).enumerate() {
                frontend.set_vring_num(index, ring.queue_size)?;
                frontend.set_vring_base(index, 0)?;
                frontend.set_vring_addr(index, ring)?;
                frontend.set_vring_call(index, shadow.call())?;
                frontend.set_vring_kick(index, shadow.kick())?;
            }
            ask(frontend, acknowledges);
            for index in 0..rings.len() {
                frontend.set_vring_enable(index, true)?;
            }
            ask(frontend, false);
            Ok(())
        })?;
        self.running = true;
        Ok(())
    }

    /// Takes the queues back: what it has not begun it will not, and what it has is answered.
    ///
    /// # Errors
    /// It does not answer.
    pub fn stop(&mut self) -> Result<(), Lost> {
        if !std::mem::take(&mut self.running) {
            return Ok(());
        }
        let queues = self.queues;
        self.exchange("give the queues back", |frontend| {
            for index in 0..queues {
                frontend.set_vring_enable(index, false)?;
                frontend.get_vring_base(index)?;
            }
            Ok(())
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
fn ring(shadow: &Shadow) -> Option<VringConfigData> {
    let host = |address| Some(shadow.memory().get_host_address(GuestAddress(address)).ok()? as u64);
    Some(VringConfigData {
        queue_max_size: shadow::ENTRIES,
        queue_size: shadow::ENTRIES,
        flags: 0,
        desc_table_addr: host(shadow.descriptors())?,
        used_ring_addr: host(shadow.used())?,
        avail_ring_addr: host(shadow.available())?,
        log_addr: None,
    })
}
