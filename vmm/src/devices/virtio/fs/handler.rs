//! Takes the guest's requests to the backend, and the answers back.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::{QueueState, QueueT};

use super::frontend::{Backend, Lost, PATIENCE};
use super::metrics::Metrics;
use super::shadow::{self, Request, Shadow};
use crate::devices::virtio::queue::{self, DeviceQueue, Slices, walk};
use crate::devices::virtio::{Activation, GuestError, Progress};
use crate::memory::GuestMemory;

/// Requests taken, or answers given, before other devices have their turn.
const ROUND: usize = 64;

/// Why something could not be done: who is to blame decides what ends.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// The device stops.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The machine ends.
    #[error(transparent)]
    Backend(#[from] Lost),
}

impl From<vm_memory::GuestMemoryError> for Trouble {
    fn from(error: vm_memory::GuestMemoryError) -> Self {
        Self::Guest(error.into())
    }
}

/// A queue of the guest's.
struct Lane {
    queue: DeviceQueue,
    /// The driver has set it up.
    ready: bool,
}

/// The active half of the device.
pub struct Handler {
    pub(super) backend: Backend,
    /// One for each of the guest's queues.
    shadows: Vec<Shadow>,
    memory: Option<Arc<GuestMemory>>,
    lanes: Vec<Lane>,
    metrics: Arc<Metrics>,
}

impl Handler {
    /// One whose queues `backend` is to serve.
    ///
    /// # Errors
    /// Out of descriptors or addresses.
    pub fn new(backend: Backend, queues: usize, metrics: Arc<Metrics>) -> io::Result<Self> {
        Ok(Self { backend, shadows: shadow::create(queues)?, memory: None, lanes: Vec::new(), metrics })
    }

    /// Takes the guest's queues over.
    ///
    /// # Errors
    /// The backend does not serve them.
    pub fn activate(&mut self, activation: Activation) -> Result<(), Lost> {
        let Activation { memory, queues, interrupt, .. } = activation;
        self.memory = Some(memory);
        let lanes = (0..).zip(queues).map(|(index, queue)| Lane {
            ready: queue.ready(),
            queue: DeviceQueue::new(queue, index, &interrupt),
        });
        self.lanes = lanes.collect();
        self.start()
    }

    /// Hands the backend its queues, empty, and has the guest's looked at.
    fn start(&mut self) -> Result<(), Lost> {
        for shadow in &mut self.shadows {
            shadow.reset().map_err(|_| Lost::Nonsense("has taken its memory away"))?;
        }
        self.backend.start(&self.shadows)?;
        for shadow in &self.shadows {
            // As if it had answered: what waits for it is taken then. A counter that is full says so already.
            let _ = shadow.call().write(1);
        }
        Ok(())
    }

    /// Whether a driver has set the device up.
    pub fn is_active(&self) -> bool {
        self.memory.is_some()
    }

    /// Forgets the guest's queues.
    ///
    /// # Errors
    /// The backend does not let go of its own.
    pub fn reset(&mut self) -> Result<(), Lost> {
        self.lanes.clear();
        self.memory = None;
        self.backend.stop()
    }

    /// Where the guest's queues are. To the point once [`Self::settle`] has been called.
    pub fn queues(&self) -> Vec<QueueState> {
        self.lanes.iter().map(|lane| lane.queue.state(0)).collect()
    }

    /// What becomes readable when there is something to do.
    pub fn fds(&self) -> Vec<RawFd> {
        let calls = self.shadows.iter().map(|shadow| shadow.call().as_raw_fd());
        [self.backend.fd()].into_iter().chain(calls).collect()
    }

    /// One of them has become it.
    ///
    /// # Errors
    /// Guest or backend break the rules, or the backend is gone.
    pub fn host_event(&mut self, fd: RawFd) -> Result<Progress, Trouble> {
        if fd == self.backend.fd() {
            self.backend.check()?;
            return Ok(Progress::Done);
        }
        // All of them: who is called again is told of the last descriptor only.
        let mut progress = Progress::Done;
        for index in 0..self.shadows.len() {
            for done in [self.answer(index)?, self.ask(index)?] {
                progress = if done == Progress::More { done } else { progress };
            }
        }
        Ok(progress)
    }

    /// Gives the backend what the guest asks in queue `index`, as far as there is room.
    ///
    /// # Errors
    /// The guest breaks the rules.
    pub fn ask(&mut self, index: usize) -> Result<Progress, Trouble> {
        let (Some(lane), Some(shadow), Some(memory)) =
            (self.lanes.get_mut(index), self.shadows.get_mut(index), &self.memory)
        else {
            return Ok(Progress::Done);
        };
        // While the backend does not have its queues the guest's stay as they are: they may be being saved.
        if !lane.ready || !self.backend.is_running() {
            return Ok(Progress::Done);
        }
        let queue = &mut lane.queue;
        let (mut given, mut returned) = (0, false);
        let mut progress = Progress::More;
        queue.disable_kicks(memory)?;
        for _ in 0..ROUND {
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_kicks(memory)? {
                    continue;
                }
                progress = Progress::Done;
                break;
            };
            let head = chain.head_index();
            let (mut question, mut answer) = (Slices::new(), Vec::new());
            walk(chain, |writable, piece| {
                let slice = piece.slice(memory)?;
                if writable {
                    answer.push(piece)
                } else {
                    question.push(slice)
                }
                Ok(())
            })?;
            let request = Request { head, answer };
            let asked = queue::total(&question);
            if !Shadow::could_take(asked, request.room()) {
                return Err(GuestError::Chain("a request of more than 4 MiB").into());
            }
            if question.is_empty() && request.answer.is_empty() {
                queue.push(memory, head, 0)?;
                returned = true;
                continue;
            }
            if !shadow.give(&question, request)? {
                // Goes on when an answer makes room.
                queue.undo_pop();
                Metrics::add(&self.metrics.waits, 1);
                progress = Progress::Done;
                break;
            }
            given += 1;
            Metrics::add(&self.metrics.bytes_out, asked);
        }
        if given > 0 {
            Metrics::add(&self.metrics.requests, given);
            shadow.notify();
        }
        if returned {
            queue.notify(memory)?;
        }
        Ok(progress)
    }

    /// Gives the guest what the backend has answered in queue `index`.
    fn answer(&mut self, index: usize) -> Result<Progress, Trouble> {
        let (Some(lane), Some(shadow), Some(memory)) =
            (self.lanes.get_mut(index), self.shadows.get_mut(index), &self.memory)
        else {
            return Ok(Progress::Done);
        };
        let mut progress = Progress::More;
        let mut given = false;
        for _ in 0..ROUND {
            let answered = shadow.take(|request, answer| {
                let room = request.answer.iter().map(|piece| piece.slice(memory));
                queue::copy(answer, &room.collect::<Result<Slices<'_>, _>>()?);
                Ok::<_, GuestError>(queue::total(answer))
            })?;
            let Some((request, length)) = answered else {
                progress = Progress::Done;
                break;
            };
            let length = length?;
            lane.queue.push(memory, request.head, u32::try_from(length).unwrap_or(u32::MAX))?;
            Metrics::add(&self.metrics.bytes_in, length);
            given = true;
        }
        if given {
            lane.queue.notify(memory)?;
        }
        Ok(progress)
    }

    /// Waits until the backend has answered everything, and takes its queues back.
    ///
    /// # Errors
    /// It does not, and has them still.
    pub fn settle(&mut self) -> Result<(), Trouble> {
        let end = Instant::now() + PATIENCE;
        loop {
            for shadow in &self.shadows {
                // Before the answers are looked at: one that comes later ends the waiting.
                let _ = shadow.call().read();
            }
            for index in 0..self.shadows.len() {
                while self.answer(index)? == Progress::More {}
            }
            if self.shadows.iter().all(Shadow::is_idle) {
                return Ok(self.backend.stop()?);
            }
            self.backend.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Lost::Busy(PATIENCE.as_secs()).into());
            }
            self.wait(left)?;
        }
    }

    /// Waits for an answer.
    fn wait(&self, most: Duration) -> Result<(), Lost> {
        let poll = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let calls = self.shadows.iter().map(|shadow| poll(shadow.call().as_raw_fd(), libc::POLLIN));
        let mut fds: Vec<_> = calls.chain([poll(self.backend.fd(), libc::POLLRDHUP)]).collect();
        // SAFETY: pointer and length are those of a list of initialised entries.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, millis(most)) };
        match ready {
            0.. => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
                error => Err(error.into()),
            },
        }
    }

    /// After [`Self::settle`]: goes on.
    ///
    /// # Errors
    /// The backend does not take its queues back.
    pub fn resume(&mut self) -> Result<(), Lost> {
        if self.is_active() { self.start() } else { Ok(()) }
    }
}

fn millis(duration: Duration) -> libc::c_int {
    libc::c_int::try_from(duration.as_millis()).unwrap_or(libc::c_int::MAX).max(1)
}
