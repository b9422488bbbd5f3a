//! From a method's name to what does it.

use bulkhead_protocol::agent::*;
use bulkhead_protocol::wire::Request;
use prost::Message;

use super::{Ticket, guest};
use crate::agent::Agent;
use crate::container::cgroup::{Reader, processes};
use crate::container::process::State;
use crate::container::spec::Resources;
use crate::container::terminal;
use crate::error::{Code, Context, Error, Result};

/// `package.Service` of agent.proto.
const SERVICE: &str = "bulkhead.agent.v1.Agent";

impl Agent {
    /// Does what a request asks, or starts to: some are answered when something has happened.
    pub fn dispatch(&mut self, ticket: Ticket, request: &Request) {
        if request.service != SERVICE {
            let error = Error::new(Code::Unimplemented, format!("unknown service {:?}", request.service));
            return self.answer(ticket, Err::<Empty, _>(error));
        }
        let payload = request.payload.as_slice();
        match request.method.as_str() {
            "Configure" => self.now(ticket, payload, |_, request| guest::configure(&request)),
            "ConfigureNetwork" => {
                self.now(ticket, payload, |_, request| crate::network::configure(&request).map(|()| Empty {}))
            }
            "CreateContainer" => {
                self.later(ticket, payload, |agent, request| agent.create_container(ticket, &request))
            }
            "PrepareRootfs" => {
                self.now(ticket, payload, |agent, request| agent.prepare_rootfs(request).map(|()| Empty {}))
            }
            "StartContainer" => self.later(ticket, payload, |agent, request: ContainerRequest| {
                agent.start_process(ticket, &request.container, "")
            }),
            "StartProcess" => self.later(ticket, payload, |agent, request: ProcessRequest| {
                agent.start_process(ticket, &request.container, &request.exec)
            }),
            "ExecProcess" => {
                self.later(ticket, payload, |agent, request| agent.exec_process(ticket, &request))
            }
            "WaitProcess" => {
                self.later(ticket, payload, |agent, request| agent.wait_process(ticket, &request))
            }
            "SignalProcess" => self.now(ticket, payload, |agent, request| agent.signal_process(&request)),
            "ResizeTerminal" => self.now(ticket, payload, |agent, request| agent.resize_terminal(&request)),
            "PauseContainer" => {
                self.now(ticket, payload, |agent, request| agent.freeze_container(&request, true))
            }
            "ResumeContainer" => {
                self.now(ticket, payload, |agent, request| agent.freeze_container(&request, false))
            }
            "Suspend" => {
                self.now(ticket, payload, |agent, request| agent.suspend(ticket.connection, &request))
            }
            "Resume" => self.now(ticket, payload, |agent, _: Empty| Ok(agent.resume())),
            "UpdateContainer" => self.now(ticket, payload, |agent, request| agent.update_container(&request)),
            "ListProcesses" => self.now(ticket, payload, |agent, request: ContainerRequest| {
                let container = agent.container(&request.container)?;
                Ok(ListProcessesResponse { processes: processes(&container.cgroup) })
            }),
            "Stats" => self.now(ticket, payload, |agent, request: ContainerRequest| {
                Ok(Reader(&agent.container(&request.container)?.cgroup).stats())
            }),
            "DeleteContainer" => self.later(ticket, payload, |agent, request: ContainerRequest| {
                agent.delete_container(ticket, &request.container)
            }),
            "ReleaseDisk" => self.now(ticket, payload, |_, request: ReleaseDiskRequest| {
                crate::disk::release(&request.source).map(|()| Empty {})
            }),
            "Shutdown" => self.later(ticket, payload, |agent, request: ShutdownRequest| {
                agent.answer(ticket, Ok(Empty {}));
                agent.shut_down(&request)
            }),
            other => {
                let error = Error::new(Code::Unimplemented, format!("unknown method {other:?}"));
                self.answer(ticket, Err::<Empty, _>(error));
            }
        }
    }

    /// A call that is answered at once.
    fn now<Q: Message + Default, A: Message>(
        &mut self,
        ticket: Ticket,
        payload: &[u8],
        call: impl FnOnce(&mut Self, Q) -> Result<A>,
    ) {
        let result = decode(payload).and_then(|request| call(self, request));
        self.answer(ticket, result);
    }

    /// A call that answers by itself unless it fails.
    fn later<Q: Message + Default>(
        &mut self,
        ticket: Ticket,
        payload: &[u8],
        call: impl FnOnce(&mut Self, Q) -> Result<()>,
    ) {
        if let Err(error) = decode(payload).and_then(|request| call(self, request)) {
            self.answer(ticket, Err::<Empty, _>(error));
        }
    }

    fn wait_process(&mut self, ticket: Ticket, request: &ProcessRequest) -> Result<()> {
        let id = self.process_id(&request.container, &request.exec)?;
        let Some(process) = self.processes.get_mut(&id) else { return Ok(()) };
        match process.outcome() {
            Some(outcome) => self.answer(ticket, outcome),
            None => {
                process.waiters.push(ticket);
                if request.bound {
                    process.bound = Some(ticket.connection);
                }
            }
        }
        Ok(())
    }

    fn signal_process(&mut self, request: &SignalProcessRequest) -> Result<Empty> {
        let signal = i32::try_from(request.signal).ok().filter(|signal| (0..=64).contains(signal));
        let signal =
            signal.ok_or_else(|| Error::invalid(format!("signal {} does not exist", request.signal)))?;
        if request.all {
            let container = self.container(&request.container)?;
            if signal == libc::SIGKILL {
                container.cgroup.kill()?;
            } else {
                for pid in container.cgroup.pids() {
                    // SAFETY: kill takes integers; one that has ended meanwhile needs no signal.
                    unsafe { libc::kill(pid, signal) };
                }
            }
            return Ok(Empty {});
        }
        let id = self.process_id(&request.container, &request.exec)?;
        let process =
            self.processes.get(&id).ok_or_else(|| Error::not_found("the process does not exist"))?;
        process.signal(signal).map(|()| Empty {})
    }

    fn resize_terminal(&mut self, request: &ResizeTerminalRequest) -> Result<Empty> {
        let id = self.process_id(&request.container, &request.exec)?;
        let master = self.processes.get(&id).and_then(|process| process.terminal.as_ref());
        let master = master.ok_or_else(|| Error::precondition("the process has no terminal"))?;
        let size = |n: u32| u16::try_from(n).map_err(|_| Error::invalid(format!("{n} rows or columns")));
        terminal::resize(master, size(request.rows)?, size(request.columns)?)?;
        Ok(Empty {})
    }

    fn freeze_container(&mut self, request: &ContainerRequest, frozen: bool) -> Result<Empty> {
        let container = self.container(&request.container)?;
        let init = self.processes.get(&container.init).map(|process| &process.state);
        if !matches!(init, Some(State::Running)) {
            return Err(Error::precondition(format!("container {} is not running", container.id)));
        }
        container.cgroup.freeze(frozen).map(|()| Empty {})
    }

    fn update_container(&mut self, request: &UpdateContainerRequest) -> Result<Empty> {
        let resources: Resources = serde_json::from_str(&request.resources)
            .map_err(|error| Error::invalid(format!("linux.resources: {error}")))?;
        let container = self.container(&request.container)?;
        container
            .cgroup
            .update(&resources, &self.machine)
            .context(|| format!("update container {}", container.id))?;
        Ok(Empty {})
    }
}

fn decode<Q: Message + Default>(payload: &[u8]) -> Result<Q> {
    Q::decode(payload).map_err(|error| Error::invalid(format!("the request does not decode: {error}")))
}
