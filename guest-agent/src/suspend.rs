//! Everything in the guest's containers stands still, so that the guest can be saved: what goes on from the snapshot must have its own
//! entropy, clock and streams before any of it runs.

use std::time::{Duration, Instant};

use bulkhead_protocol::agent::{Empty, SuspendRequest};

use crate::agent::Agent;
use crate::container::process::State;
use crate::error::{Context, Error, Result};

/// How long the kernel may take to stop a container's processes.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it is asked.
const TICK: Duration = Duration::from_micros(200);

/// A guest that stands still.
#[derive(Debug)]
pub struct Suspended {
    /// The connection that asked for it, with whose end it ends.
    connection: u32,
    /// The containers that ran.
    containers: Vec<String>,
}

impl Agent {
    /// Freezes every container that runs, until [`Self::resume`] or the end of the connection.
    ///
    /// # Errors
    /// It is suspended already, or a container does not stop: then all go on.
    pub fn suspend(&mut self, connection: u32, request: &SuspendRequest) -> Result<Empty> {
        if self.suspended.is_some() {
            return Err(Error::precondition("the guest is being saved already"));
        }
        let running = self.containers.values().filter(|container| {
            let init = self.processes.get(&container.init).map(|process| &process.state);
            matches!(init, Some(State::Running)) && !container.cgroup.is_frozen()
        });
        let containers: Vec<_> = running.map(|container| container.id.clone()).collect();
        self.suspended = Some(Suspended { connection, containers: containers.clone() });
        let frozen = containers.iter().try_for_each(|id| self.freeze(id, true));
        let frozen = frozen.and_then(|()| self.wait_until_frozen(&containers));
        if frozen.is_err() {
            self.resume();
        } else if request.sync {
            // Also what they have written through mappings of files.
            rustix::fs::sync();
        }
        frozen.map(|()| Empty {})
    }

    /// Lets everything go on that [`Self::suspend`] has stopped.
    pub fn resume(&mut self) -> Empty {
        for id in self.suspended.take().map(|suspended| suspended.containers).unwrap_or_default() {
            // One that was deleted meanwhile needs nothing.
            let _ = self.freeze(&id, false);
        }
        Empty {}
    }

    /// A connection has ended. With `lost`, the guest has gone on from a snapshot, and whoever restored it says when it is ready.
    pub fn resume_with(&mut self, connection: u32, lost: bool) {
        if !lost && self.suspended.as_ref().is_some_and(|suspended| suspended.connection == connection) {
            self.resume();
        }
    }

    fn freeze(&self, id: &str, frozen: bool) -> Result<()> {
        self.container(id)?.cgroup.freeze(frozen).context(|| format!("container {id}"))
    }

    fn wait_until_frozen(&self, containers: &[String]) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for id in containers {
            while !self.container(id)?.cgroup.is_frozen() {
                if Instant::now() > deadline {
                    return Err(Error::internal(format!(
                        "container {id} does not stop: one of its processes waits for something in the kernel"
                    )));
                }
                std::thread::sleep(TICK);
            }
        }
        Ok(())
    }
}
