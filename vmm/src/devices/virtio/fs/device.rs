//! What the guest sees of a shared file system.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::{Queue, QueueState};

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
    /// None: nobody serves it.
    backend: Option<Backend>,
    /// The queues, while nobody serves them.
    waiting: Option<Activation>,
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
        if config.empty {
            return Ok(Self::with(None, config, exit));
        }
        let failed = |source| Error::Backend { tag: config.tag.clone(), source };
        let stream = config.connect().map_err(failed)?;
        Self::served_by(stream, config, exit).map_err(failed)
    }

    /// A device whose backend is at the other end of `stream`.
    pub(in super::super) fn served_by(
        stream: UnixStream,
        config: &FilesystemConfig,
        exit: ExitRequest,
    ) -> io::Result<Self> {
        let backend = Backend::new(stream, usize::from(config.queues) + 1)?;
        Ok(Self::with(Some(backend), config, exit))
    }

    fn with(backend: Option<Backend>, config: &FilesystemConfig, exit: ExitRequest) -> Self {
        Self {
            tag: config.tag.clone(),
            config: config_space(&config.tag, config.queues),
            // One queue for urgent requests comes first.
            queue_sizes: vec![config.queue_size; usize::from(config.queues) + 1],
            backend,
            waiting: None,
            lost: false,
            exit,
            metrics: Arc::new(Metrics::default()),
        }
    }

    /// Says something to the backend, if there is one left.
    fn tell(&mut self, say: impl FnOnce(&mut Backend) -> Result<(), Lost>) {
        if let Some(backend) = &mut self.backend
            && !self.lost
            && let Err(why) = say(backend)
        {
            self.lose(&why);
        }
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
        self.tell(Backend::negotiate);
    }

    /// Before there is a backend, what every one has.
    fn features(&self) -> u64 {
        self.backend.as_ref().map_or(F_COMMON, |backend| backend.features() & F_COMMON)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) {
        if self.backend.is_none() {
            self.waiting = Some(activation);
            return;
        }
        self.tell(|backend| backend.start(&activation));
        if !self.lost {
            self.metrics.activations.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn queues(&self) -> Vec<QueueState> {
        self.waiting.iter().flat_map(|waiting| &waiting.queues).map(Queue::state).collect()
    }

    /// What the backend knows of open files and of requests under way is in another process.
    fn saveable(&self) -> Result<(), String> {
        if self.backend.is_none() {
            return Ok(());
        }
        Err("a directory of the host is shared with it, and what the process that serves it knows of the guest cannot be \
             saved. Only a machine without shared directories can"
            .to_owned())
    }

    fn reset(&mut self) {
        self.waiting = None;
        self.tell(Backend::stop);
    }

    /// The backend is notified, not the monitor.
    fn queue_event(&mut self, _: usize) -> Result<Progress, GuestError> {
        Ok(Progress::Done)
    }

    fn host_fds(&self) -> Vec<RawFd> {
        self.backend.iter().map(Backend::fd).collect()
    }

    fn host_event(&mut self, _: RawFd) -> Result<Progress, GuestError> {
        self.tell(|backend| backend.check());
        Ok(Progress::Done)
    }

    fn metrics(&self) -> serde_json::Value {
        self.metrics.to_json(self.lost)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::backend::{self, QUEUE_SIZE, serve};
    use super::*;
    use crate::devices::virtio::driver::{DATA, Driver, WRITE};
    use crate::devices::virtio::mmio::MmioTransport;

    fn device(stream: UnixStream, exit: &ExitRequest) -> Box<Fs> {
        let config = FilesystemConfig {
            tag: "host".into(),
            socket: None,
            fd: Some(3),
            empty: false,
            queues: 1,
            queue_size: QUEUE_SIZE,
        };
        Box::new(Fs::served_by(stream, &config, exit.clone()).unwrap())
    }

    fn host_event(transport: &MmioTransport) {
        for fd in transport.host_fds() {
            transport.host_event(fd);
        }
    }

    fn ask(driver: &mut Driver, queue: u32) {
        let before = driver.used(queue).0;
        driver.put(DATA, b"stressed");
        driver.offer(queue, 0, &[(DATA, 8, 0), (DATA + 64, 8, WRITE)]);
        driver.kick(queue);
        let start = Instant::now();
        // The interrupt comes after the answer.
        while driver.line.read().is_err() {
            assert!(start.elapsed() < Duration::from_secs(10), "no interrupt");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(driver.used(queue), (before + 1, (0, 8)));
        assert_eq!(driver.get(DATA + 64, 8), b"desserts");
        // The monitor has no part in it, and the driver must be told to look all the same.
        assert_eq!(driver.read(0x60) & 1, 1);
        driver.write(0x64, 1);
        assert_eq!(driver.read(0x60) & 1, 1);
    }

    #[test]
    fn requests_go_to_the_backend_and_back_also_after_a_reset() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let backend = serve(theirs, backend::Backend::default());
        let exit = ExitRequest::new().unwrap();
        let mut driver = Driver::new(device(ours, &exit));
        for _ in 0..3 {
            ask(&mut driver, 0);
            ask(&mut driver, 1);
            ask(&mut driver, 1);
            host_event(&driver.transport);
            assert_eq!(exit.outcome(), None);
            driver.start();
        }
        drop(driver);
        backend.join().unwrap();
    }

    #[test]
    fn features_are_those_of_both() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let without = crate::devices::virtio::F_EVENT_IDX;
        serve(theirs, backend::Backend::without(without));
        let mut device = device(ours, &ExitRequest::new().unwrap());
        device.acknowledged();
        assert_eq!(device.features(), F_COMMON & !without);
    }

    #[test]
    fn a_backend_that_goes_away_ends_the_machine() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let cut = theirs.try_clone().unwrap();
        serve(theirs, backend::Backend::default());
        let exit = ExitRequest::new().unwrap();
        let driver = Driver::new(device(ours, &exit));
        host_event(&driver.transport);
        assert_eq!(exit.outcome(), None);
        cut.shutdown(std::net::Shutdown::Both).unwrap();
        host_event(&driver.transport);
        assert_eq!(exit.outcome(), Some(Outcome::DeviceLost));
        // And nothing waits for it any more.
        driver.write(0x70, 0);
    }

    #[test]
    fn a_backend_that_says_nothing_or_nonsense_ends_the_machine() {
        for says in [&b""[..], &[7; 64]] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            io::Write::write_all(&mut theirs, says).unwrap();
            let exit = ExitRequest::new().unwrap();
            let mut device = device(ours, &exit);
            let start = Instant::now();
            device.acknowledged();
            assert!(start.elapsed() < Duration::from_secs(5));
            assert_eq!(exit.outcome(), Some(Outcome::DeviceLost));
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        #[test]
        fn no_backend_can_break_the_monitor(says in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            io::Write::write_all(&mut theirs, &says).unwrap();
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            let exit = ExitRequest::new().unwrap();
            device(ours, &exit).acknowledged();
            assert_eq!(exit.outcome(), Some(Outcome::DeviceLost));
        }
    }

    #[test]
    fn the_configuration_space_has_tag_and_queues() {
        let space = config_space("host", 1);
        assert_eq!(&space[..6], b"host\0\0");
        assert_eq!(space[36..], [1, 0, 0, 0]);
        assert_eq!(config_space(&"x".repeat(50), 2)[..36], [b'x'; 36]);
    }
}
