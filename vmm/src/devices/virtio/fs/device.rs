//! What the guest sees of a shared file system.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::{Queue, QueueState};

use super::frontend::{Backend, Lost};
use super::handler::{Handler, Trouble};
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
    handler: Option<Handler>,
    /// The queues, where nobody serves them.
    unserved: Vec<Queue>,
    /// The backend has given its queues back for a while.
    stopped: bool,
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
            return Ok(Self::with(None, config, exit, Arc::default()));
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
        let queues = usize::from(config.queues) + 1;
        let metrics = Arc::<Metrics>::default();
        let handler = Handler::new(Backend::new(stream, queues)?, queues, Arc::clone(&metrics))?;
        Ok(Self::with(Some(handler), config, exit, metrics))
    }

    fn with(
        handler: Option<Handler>,
        config: &FilesystemConfig,
        exit: ExitRequest,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            tag: config.tag.clone(),
            config: config_space(&config.tag, config.queues),
            // One queue for urgent requests comes first.
            queue_sizes: vec![config.queue_size; usize::from(config.queues) + 1],
            handler,
            unserved: Vec::new(),
            stopped: false,
            lost: false,
            exit,
            metrics,
        }
    }

    /// Does something, if somebody serves it.
    fn tell(
        &mut self,
        say: impl FnOnce(&mut Handler) -> Result<Progress, Trouble>,
    ) -> Result<Progress, GuestError> {
        let Some(handler) = self.handler.as_mut().filter(|_| !self.lost) else { return Ok(Progress::Done) };
        match say(handler) {
            Ok(progress) => Ok(progress),
            Err(Trouble::Guest(error)) => Err(error),
            Err(Trouble::Backend(why)) => {
                self.lose(&why);
                Ok(Progress::Done)
            }
        }
    }

    /// The same where the guest cannot be to blame.
    fn tell_backend(&mut self, say: impl FnOnce(&mut Handler) -> Result<(), Lost>) {
        if let Some(handler) = self.handler.as_mut().filter(|_| !self.lost)
            && let Err(why) = say(handler)
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

    /// Not earlier, so that the backend starts while the guest boots.
    fn acknowledged(&mut self) {
        self.tell_backend(|handler| handler.backend.negotiate());
    }

    /// Whatever the backend offers: it sees other queues than the guest.
    fn features(&self) -> u64 {
        F_COMMON
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) {
        if self.handler.is_none() {
            self.unserved = activation.queues;
            return;
        }
        self.tell_backend(|handler| handler.activate(activation));
        if !self.lost {
            self.metrics.activations.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn queues(&self) -> Vec<QueueState> {
        match &self.handler {
            Some(handler) => handler.queues(),
            None => self.unserved.iter().map(Queue::state).collect(),
        }
    }

    /// Everything is answered, so that nothing is on its way; what the guest asks from now on waits for [`Self::saved`].
    fn save(&mut self) -> Result<Vec<u8>, String> {
        let Some(handler) = self.handler.as_mut().filter(|handler| handler.is_active()) else {
            return Ok(Vec::new());
        };
        if !handler.backend.has_state() {
            return Err("a directory of the host is shared with it, and the process that serves it cannot save what it knows \
                 of the guest: virtiofsd 1.11 or later can"
                .to_owned());
        }
        let settled = handler.settle();
        self.stopped = settled.is_ok();
        match settled.and_then(|()| Ok(handler.backend.state()?)) {
            Ok(state) => Ok(state),
            Err(Trouble::Guest(why)) => Err(why.to_string()),
            // It goes on serving them.
            Err(Trouble::Backend(why)) if why.is_harmless() => {
                Err(format!("a directory of the host is shared with it, and {why}"))
            }
            Err(Trouble::Backend(why)) => {
                self.lose(&why);
                Err(why.to_string())
            }
        }
    }

    fn saved(&mut self) {
        if std::mem::take(&mut self.stopped) {
            self.tell_backend(Handler::resume);
        }
    }

    fn load(&mut self, state: &[u8]) -> Result<(), String> {
        if state.is_empty() {
            return Ok(());
        }
        let Some(Handler { backend, .. }) = &mut self.handler else {
            return Err(format!(
                "a directory of the host was shared with it as {:?}, and nobody serves that in the configuration",
                self.tag
            ));
        };
        backend.set_state(state).map_err(|why| format!("the shared file system {:?}: {why}", self.tag))
    }

    fn reset(&mut self) {
        self.unserved.clear();
        self.tell_backend(Handler::reset);
    }

    fn queue_event(&mut self, index: usize) -> Result<Progress, GuestError> {
        self.tell(|handler| handler.ask(index))
    }

    fn host_fds(&self) -> Vec<RawFd> {
        self.handler.as_ref().map(Handler::fds).unwrap_or_default()
    }

    fn host_event(&mut self, fd: RawFd) -> Result<Progress, GuestError> {
        self.tell(|handler| handler.host_event(fd))
    }

    fn metrics(&self) -> serde_json::Value {
        self.metrics.to_json(self.lost)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
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

    /// What the event loop does when a descriptor of the host's is ready: it is not long in coming.
    fn eventually(driver: &Driver, what: &str, is: impl Fn() -> bool) {
        let start = Instant::now();
        while !is() {
            assert!(start.elapsed() < Duration::from_secs(10), "{what}");
            std::thread::sleep(Duration::from_millis(1));
            host_event(&driver.transport);
        }
    }

    fn ask(driver: &mut Driver, queue: u32) {
        let before = driver.used(queue).0;
        driver.put(DATA, b"stressed");
        driver.offer(queue, 0, &[(DATA, 8, 0), (DATA + 64, 8, WRITE)]);
        driver.kick(queue);
        // The interrupt comes after the answer.
        eventually(driver, "no interrupt", || driver.line.read().is_ok());
        assert_eq!(driver.used(queue), (before + 1, (0, 8)));
        assert_eq!(driver.get(DATA + 64, 8), b"desserts");
        assert_eq!(driver.read(0x60), 1);
        driver.write(0x64, 1);
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

    fn knowing(what: &[u8]) -> (UnixStream, Arc<Mutex<Vec<u8>>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let knows = Arc::new(Mutex::new(what.to_vec()));
        serve(theirs, backend::Backend::knowing(Arc::clone(&knows)));
        (ours, knows)
    }

    fn offer(driver: &mut Driver) {
        driver.put(DATA, b"stressed");
        driver.put(DATA + 64, &[0; 8]);
        driver.offer(1, 0, &[(DATA, 8, 0), (DATA + 64, 8, WRITE)]);
    }

    fn answered(driver: &Driver, count: u16) {
        eventually(driver, "no answer", || driver.used(1).0 == count);
        assert_eq!(driver.get(DATA + 64, 8), b"desserts");
    }

    #[test]
    fn it_is_saved_with_what_its_backend_knows_and_every_request_is_answered_once() {
        let (ours, _knows) = knowing(b"inodes");
        let exit = ExitRequest::new().unwrap();
        let mut driver = Driver::new(device(ours, &exit));
        ask(&mut driver, 1);
        // It stands still while memory is written, and goes on with what has come.
        driver.transport.save().unwrap();
        offer(&mut driver);
        driver.kick(1);
        std::thread::sleep(Duration::from_millis(50));
        host_event(&driver.transport);
        assert_eq!(driver.used(1).0, 1, "it was answered while memory was written");
        driver.transport.saved();
        answered(&driver, 2);
        // And in another machine, with a request that nobody has seen.
        offer(&mut driver);
        let (ours, knows) = knowing(b"nothing");
        let driver = driver.move_to(device(ours, &exit)).unwrap();
        answered(&driver, 3);
        assert_eq!(*knows.lock().unwrap(), b"inodes");
        assert_eq!(exit.outcome(), None);
    }

    #[test]
    fn a_backend_that_cannot_save_or_load_is_named_and_the_machine_goes_on() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        serve(theirs, backend::Backend::default());
        let exit = ExitRequest::new().unwrap();
        let mut driver = Driver::new(device(ours, &exit));
        assert!(driver.transport.save().unwrap_err().contains("1.11"));
        driver.transport.saved();
        ask(&mut driver, 1);

        let (ours, knows) = knowing(b"nonsense");
        let mut driver = Driver::new(device(ours, &exit));
        let error = driver.transport.save().unwrap_err();
        assert!(error.contains("could not save"), "{error}");
        driver.transport.saved();
        ask(&mut driver, 1);
        assert_eq!(exit.outcome(), None);

        *knows.lock().unwrap() = b"inodes".to_vec();
        let (ours, theirs) = UnixStream::pair().unwrap();
        serve(theirs, backend::Backend::default());
        let error = driver.move_to(device(ours, &exit)).err().unwrap();
        assert!(error.contains("1.11"), "{error}");
    }

    #[test]
    fn the_guest_has_the_features_that_it_would_have_without_the_backend() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        serve(theirs, backend::Backend::without(crate::devices::virtio::F_EVENT_IDX));
        let exit = ExitRequest::new().unwrap();
        let mut device = device(ours, &exit);
        device.acknowledged();
        assert_eq!(device.features(), F_COMMON);
        assert_eq!(exit.outcome(), None);
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
