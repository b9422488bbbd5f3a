//! Answers on the control socket, in the event loop.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde_json::{Value, json};

use super::{Answer, Method, Request, Status};
use crate::error::{Error, Result};
use crate::event_loop::watch;
use crate::exit::Outcome;
use crate::listen::Listener;
use crate::machine::Running;
use crate::timeline::now_ns;

/// Most clients at a time.
const MAX_CLIENTS: usize = 32;
/// Longest request: an id and a method.
const MAX_REQUEST: usize = 4096;
/// Bytes of console output in a status.
const STATUS_TAIL: usize = 4096;

/// A control socket on which nobody answers yet.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
}

impl Server {
    /// Listens on `path`.
    ///
    /// # Errors
    /// When that is impossible: the path exists, or its directory does not.
    pub fn bind(path: &Path) -> Result<Self> {
        let listener =
            Listener::bind(path).map_err(|source| Error::Listen { path: path.to_owned(), source })?;
        Ok(Self { listener })
    }

    /// Answers for `machine`.
    pub fn serve(self, machine: Running) -> Service {
        Service { server: self, machine, clients: BTreeMap::new() }
    }
}

/// The control socket of a running machine.
pub struct Service {
    server: Server,
    machine: Running,
    clients: BTreeMap<RawFd, Client>,
}

struct Client {
    stream: UnixStream,
    /// A request that is not complete yet.
    partial: Vec<u8>,
}

impl MutEventSubscriber for Service {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, Events::new(&self.server.listener, EventSet::IN));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.server.listener.as_raw_fd() {
            self.accept(ops);
            return;
        }
        let Some(mut client) = self.clients.remove(&fd) else { return };
        if self.talk(&mut client) {
            self.clients.insert(fd, client);
        } else {
            // Before it is closed, or the loop would meet a descriptor it does not know.
            let _ = ops.remove(Events::empty(&client.stream));
        }
    }
}

impl Service {
    fn accept(&mut self, ops: &mut EventOps) {
        while let Ok(stream) = self.server.listener.accept() {
            if self.clients.len() < MAX_CLIENTS && stream.set_nonblocking(true).is_ok() {
                watch(ops, Events::new(&stream, EventSet::IN));
                self.clients.insert(stream.as_raw_fd(), Client { stream, partial: Vec::new() });
            }
        }
    }

    /// Answers what a client asks. False when it is gone, or does not behave.
    fn talk(&self, client: &mut Client) -> bool {
        let mut chunk = [0; MAX_REQUEST];
        match client.stream.read(&mut chunk) {
            Ok(0) => return false,
            Ok(length) => client.partial.extend(chunk.get(..length).unwrap_or_default()),
            Err(error) => return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
        while let Some(end) = client.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = client.partial.drain(..=end).collect();
            let Ok(mut answer) = serde_json::to_vec(&self.answer(&line)) else { return false };
            answer.push(b'\n');
            // An answer fits the socket's buffer of a client that reads what it asked for.
            if client.stream.write_all(&answer).is_err() {
                return false;
            }
        }
        client.partial.len() < MAX_REQUEST
    }

    fn answer(&self, line: &[u8]) -> Answer {
        match serde_json::from_slice::<Request>(line) {
            Ok(request) => match self.perform(request.method) {
                Ok(result) => Answer { id: request.id, result: Some(result), error: None },
                Err(error) => Answer { id: request.id, result: None, error: Some(error) },
            },
            Err(error) => {
                let id = serde_json::from_slice::<Value>(line)
                    .ok()
                    .and_then(|value| value["id"].as_u64())
                    .unwrap_or(0);
                Answer { id, result: None, error: Some(format!("the request is not understood: {error}")) }
            }
        }
    }

    fn perform(&self, method: Method) -> std::result::Result<Value, String> {
        let Running { devices, vcpus, exit, timeline, .. } = &self.machine;
        match method {
            Method::Status => serde_json::to_value(self.status()).map_err(|error| error.to_string()),
            Method::Metrics => Ok(json!({ "devices": devices.metrics(), "timeline": timeline.events() })),
            Method::Pause if vcpus.pause() => Ok(json!({})),
            Method::Pause => Err("a vCPU does not stop".to_owned()),
            Method::Resume => {
                vcpus.resume();
                Ok(json!({}))
            }
            Method::Snapshot(wish) => match self.machine.save(&wish.directory, wish.durable) {
                Ok(taken) => serde_json::to_value(taken).map_err(|error| error.to_string()),
                Err(error) => Err(chain(&error)),
            },
            Method::WorkingSet => {
                let bytes = self.machine.record_working_set().map_err(|error| chain(&error))?;
                Ok(json!({ "bytes": bytes }))
            }
            Method::Quit => {
                exit.request(Outcome::Quit);
                Ok(json!({}))
            }
        }
    }

    fn status(&self) -> Status {
        let Running { config, devices, vcpus, timeline, .. } = &self.machine;
        let started = timeline.events().iter().find(|event| event.event == "first-run").map(|event| event.ns);
        Status {
            state: if vcpus.paused() { "paused" } else { "running" }.to_owned(),
            pid: std::process::id(),
            uptime_ns: started.map_or(0, |started| now_ns().saturating_sub(started)),
            vcpus: vcpus.samples(),
            console_tail: devices.console().tail(STATUS_TAIL),
            machine: config.machine.clone(),
            disks: config.disks.iter().map(|disk| disk.id.clone()).collect(),
        }
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
