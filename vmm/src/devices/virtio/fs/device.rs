//! What the guest sees of a shared file system.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::handler::{Backend, Lost};
use super::metrics::Metrics;
use crate::config::FilesystemConfig;
use crate::devices::virtio::{Activation, F_COMMON, GuestError, Progress, VirtioDevice};
use crate::error::{Error, Result};
use crate::exit::{ExitRequest, Outcome};

/// Length of the tag in the configuration space, zeros at its end included.
pub const TAG_BYTES: usize = 36;

/// A directory of the host that another process serves.
pub struct Fs {
    tag: String,
    config: [u8; TAG_BYTES + 4],
    queue_sizes: Vec<u16>,
    backend: Backend,
    /// Set once the backend is gone; nothing is said to it any more.
    lost: bool,
    exit: ExitRequest,
    metrics: Arc<Metrics>,
}

impl Fs {
    /// A device as `config` describes it, connected to its backend. `exit` ends the machine when that is lost.
    ///
    /// # Errors
    /// Nobody listens on the socket, or the descriptor is no connected socket.
    pub fn new(config: &FilesystemConfig, exit: ExitRequest) -> Result<Self> {
        let failed = |source| Error::Backend { tag: config.tag.clone(), source };
        let queues = usize::from(config.queues);
        let stream = config.connect().map_err(failed)?;
        Ok(Self {
            tag: config.tag.clone(),
            config: config_space(&config.tag, config.queues),
            // One queue for urgent requests comes first.
            queue_sizes: vec![config.queue_size; queues + 1],
            backend: Backend::new(stream, queues + 1).map_err(failed)?,
            lost: false,
            exit,
            metrics: Arc::new(Metrics::default()),
        })
    }

    fn lose(&mut self, why: &Lost) {
        if !self.lost && self.exit.outcome().is_none() {
            eprintln!(
                "bulkhead-vmm: the shared file system {:?} is lost, so the machine ends: {why}",
                self.tag
            );
        }
        self.lost = true;
        self.exit.request(Outcome::DeviceLost);
    }
}

/// `struct virtio_fs_config` (section 5.11.4).
fn config_space(tag: &str, queues: u16) -> [u8; TAG_BYTES + 4] {
    let mut config = [0; TAG_BYTES + 4];
    let bytes = tag.bytes().take(TAG_BYTES).chain(std::iter::repeat(0)).take(TAG_BYTES);
    for (to, from) in config.iter_mut().zip(bytes.chain(u32::from(queues).to_le_bytes())) {
        *to = from;
    }
    config
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn name(&self) -> &str {
        &self.tag
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn is_remote(&self) -> bool {
        true
    }

    /// Not earlier, so that the backend starts while the guest boots.
    fn acknowledged(&mut self) {
        if !self.lost
            && let Err(why) = self.backend.negotiate()
        {
            self.lose(&why);
        }
    }

    fn features(&self) -> u64 {
        self.backend.features() & F_COMMON
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) {
        if self.lost {
            return;
        }
        match self.backend.start(&activation) {
            Ok(()) => {
                self.metrics.activations.fetch_add(1, Ordering::Relaxed);
            }
            Err(why) => self.lose(&why),
        }
    }

    fn reset(&mut self) {
        if !self.lost
            && let Err(why) = self.backend.stop()
        {
            self.lose(&why);
        }
    }

    /// The backend is notified, not the monitor.
    fn queue_event(&mut self, _: usize) -> Result<Progress, GuestError> {
        Ok(Progress::Done)
    }

    fn host_fds(&self) -> Vec<RawFd> {
        vec![self.backend.fd()]
    }

    fn host_event(&mut self, _: RawFd) -> Result<Progress, GuestError> {
        if !self.lost
            && let Err(why) = self.backend.check()
        {
            self.lose(&why);
        }
        Ok(Progress::Done)
    }

    fn metrics(&self) -> serde_json::Value {
        self.metrics.to_json(self.lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_space_has_tag_and_queues() {
        let space = config_space("host", 1);
        assert_eq!(&space[..6], b"host\0\0");
        assert_eq!(space[36..], [1, 0, 0, 0]);
        assert_eq!(config_space(&"x".repeat(50), 2)[..36], [b'x'; 36]);
    }
}
