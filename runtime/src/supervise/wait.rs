//! A supervisor whose machine is ready before its container is known.

use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_protocol::agent::{ConfigureRequest, Empty, PrepareRootfsRequest};
use serde_json::Value;

use super::{Plan, Supervisor, Wire};
use crate::guest::{self, Agent};
use crate::monitor::Monitor;
use crate::relay::Ends;
use crate::state::{Files, Record, remove_files};
use crate::template::rehearse;
use crate::{Context, Result, seccomp, trace};

/// A machine with its image's layers mounted, and the process that will be its container's supervisor.
pub(crate) struct Waiting {
    supervisor: Supervisor,
    monitor: Monitor,
    agent: Agent,
}

impl Waiting {
    /// Makes the machine. The plan's record has an id, and of its options those that a machine must know before it starts; its
    /// caller is who may give it up by going away. `read`: files of the image that the guest is to have in memory.
    ///
    /// # Errors
    /// What a start can say. Nothing is left.
    pub fn warm(plan: Plan, read: Vec<String>) -> Result<Self> {
        let mut supervisor = Supervisor::new(plan);
        supervisor.waits = true;
        match supervisor.make_ready(read) {
            Ok((monitor, agent)) => Ok(Self { supervisor, monitor, agent }),
            Err(error) => {
                supervisor.leave_nothing();
                Err(error)
            }
        }
    }

    /// Who may give it up by going away.
    pub fn caller(&self) -> &OwnedFd {
        &self.supervisor.plan.caller.0
    }

    /// Readable when the machine has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.monitor.ended()
    }

    /// The id of the container that it will be.
    pub fn id(&self) -> &str {
        &self.supervisor.plan.record.id
    }

    /// That container's files.
    pub fn files(&self) -> &Files {
        &self.supervisor.plan.files
    }

    /// Makes the guest that of a container, whose host name that is. A machine that has just been killed shows here: whoever wants one
    /// can still have another.
    ///
    /// # Errors
    /// As [`guest::configure`].
    pub fn greet(&mut self, hostname: &str) -> Result<()> {
        hostname.clone_into(&mut self.supervisor.plan.hostname);
        self.supervisor.configure(&mut self.agent)
    }

    /// Ends the machine.
    pub fn abandon(self) {
        drop(self.monitor);
        self.supervisor.leave_nothing();
    }

    /// Runs the container to its end and puts everything away, as [`super::run`] does. After [`Self::greet`].
    pub fn become_of(self, record: Record, spec: Value, ends: Ends, caller: Wire) -> u8 {
        let Self { mut supervisor, monitor, agent } = self;
        supervisor.waits = false;
        let Plan { record: known, .. } = &supervisor.plan;
        let supervisor_pid = std::process::id();
        let (monitor_pid, kernel) = (known.monitor_pid, known.kernel.clone());
        let record = Record { supervisor_pid, monitor_pid, kernel, ..record };
        let plan = &mut supervisor.plan;
        (plan.record, plan.spec, plan.ends, plan.caller) = (record, spec, ends, caller);
        let saved = plan.record.save(&plan.files);
        let filter = saved.and_then(|()| seccomp::filter(&plan.record.options));
        let outcome = filter.and_then(|filter| {
            supervisor.plan.seccomp = filter;
            supervisor.live_in(monitor, Ok(agent), |supervisor, agent, _| {
                let relay = supervisor.start_container(agent)?;
                trace::mark("container started");
                Ok(relay)
            })
        });
        supervisor.put_away(outcome)
    }
}

impl Supervisor {
    fn make_ready(&mut self, read: Vec<String>) -> Result<(Monitor, Agent)> {
        let what = || "cannot prepare a machine for a pool".to_owned();
        let monitor = self.boot()?;
        let mut agent = self.guest.agent()?;
        // What is done from here on is not done with the random numbers that others have, too. They are renewed when it is taken.
        guest::configure(&mut agent, ConfigureRequest::default())?;
        let rootfs = self.rootfs();
        let layers = rootfs.layers.clone();
        let prepare = PrepareRootfsRequest { id: self.plan.record.id.clone(), rootfs: Some(rootfs), read };
        let _: Empty = agent.call("PrepareRootfs", &prepare).context(what)?;
        // Once with these layers, so that what is touched first is touched by now.
        rehearse(&self.plan.files, layers)?;
        Ok((monitor, agent))
    }

    fn leave_nothing(self) {
        let Plan { layout, files, .. } = &self.plan;
        if let Err(error) = remove_files(layout, files, "") {
            eprintln!("bulkhead: {}", error.chain());
        }
    }
}
