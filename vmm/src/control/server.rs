//! Answers on the control socket, in the event loop.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde_json::{Value, json};

use super::files::{self, Files, MAX_FILES};
use super::{Answer, Method, Progress, Request, Status};
use crate::error::{Error, Result};
use crate::event_loop::watch;
use crate::exit::Outcome;
use crate::jail;
use crate::listen::Listener;
use crate::machine::{Running, Saving, SnapshotRequest};
use crate::timeline::now_ns;

/// Most clients at a time.
const MAX_CLIENTS: usize = 32;
/// Longest request: a disk of 128 layers with long paths. It is read in pieces.
const MAX_REQUEST: usize = 128 << 10;
const PIECE: usize = 4096;
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
        Service { server: self, machine, clients: BTreeMap::new(), job: None }
    }
}

/// The control socket of a running machine.
pub struct Service {
    server: Server,
    machine: Running,
    clients: BTreeMap<RawFd, Client>,
    /// The snapshot that is being written.
    job: Option<Job>,
}

/// A snapshot, and who waits for it.
struct Job {
    saving: Saving,
    client: RawFd,
    id: u64,
}

struct Client {
    stream: UnixStream,
    /// A request that is not complete yet.
    partial: Vec<u8>,
    /// Descriptors that came with it.
    files: Vec<OwnedFd>,
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
        if self.job.as_ref().is_some_and(|job| job.saving.fds().contains(&fd)) {
            self.go_on_with_job(fd, ops);
            return;
        }
        let Some(mut client) = self.clients.remove(&fd) else { return };
        if self.talk(&mut client, ops) {
            self.clients.insert(fd, client);
        } else {
            if self.job.as_ref().is_some_and(|job| job.client == fd) {
                self.end_job(ops);
            }
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
                self.clients
                    .insert(stream.as_raw_fd(), Client { stream, partial: Vec::new(), files: Vec::new() });
            }
        }
    }

    /// Answers what a client asks. False when it is gone, or does not behave.
    fn talk(&mut self, client: &mut Client, ops: &mut EventOps) -> bool {
        let mut chunk = [0; PIECE];
        match files::receive(&client.stream, &mut chunk, &mut client.files) {
            Ok(0) => return false,
            Ok(length) => client.partial.extend(chunk.get(..length).unwrap_or_default()),
            Err(error) => return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
        while let Some(end) = client.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = client.partial.drain(..=end).collect();
            let files = std::mem::take(&mut client.files);
            let answer = self.answer(&line, files, client.stream.as_raw_fd(), ops);
            if !client.send(&answer) {
                return false;
            }
        }
        client.partial.len() < MAX_REQUEST && client.files.len() <= MAX_FILES
    }

    fn answer(&mut self, line: &[u8], files: Vec<OwnedFd>, client: RawFd, ops: &mut EventOps) -> Answer {
        match serde_json::from_slice::<Request>(line) {
            Ok(Request { id, method, files: names }) => match (Files::new(names, files), method) {
                (Ok(files), Method::Snapshot(wish)) => self.begin_job(id, client, &wish, files, ops),
                (Ok(files), method) => Answer::of(id, self.perform(method, files)),
                (Err(error), _) => Answer::of(id, Err(error)),
            },
            Err(error) => {
                let id = serde_json::from_slice::<Value>(line)
                    .ok()
                    .and_then(|value| value["id"].as_u64())
                    .unwrap_or(0);
                Answer::of(id, Err(format!("the request is not understood: {error}")))
            }
        }
    }

    /// Begins a snapshot; its end is told when it is there, unless it is at once.
    fn begin_job(
        &mut self,
        id: u64,
        client: RawFd,
        wish: &SnapshotRequest,
        files: Files,
        ops: &mut EventOps,
    ) -> Answer {
        if self.job.is_some() {
            return Answer::of(id, Err("a snapshot is being written already: wait for its end".to_owned()));
        }
        let saving = match self.machine.save(wish, files) {
            Ok(saving) => saving,
            Err(error) => return Answer::of(id, Err(error.chain())),
        };
        let (fds, pause_ns) = (saving.fds(), saving.pause_ns());
        if fds.is_empty() {
            return Answer::of(id, finish(saving));
        }
        for fd in fds {
            watch(ops, Events::new_raw(fd, EventSet::IN));
        }
        self.job = Some(Job { saving, client, id });
        Answer { progress: Some(Progress { pause_ns }), ..Answer::empty(id) }
    }

    /// Takes what is behind `fd`, and tells the end when it was the last.
    fn go_on_with_job(&mut self, fd: RawFd, ops: &mut EventOps) {
        let Some(job) = &mut self.job else { return };
        let _ = ops.remove(Events::new_raw(fd, EventSet::IN));
        let result = match job.saving.collect(fd) {
            Ok(false) => return,
            Ok(true) => Ok(()),
            Err(error) => Err(error.chain()),
        };
        let Some(Job { saving, client, id }) = self.end_job(ops) else { return };
        let answer = Answer::of(id, result.and_then(|()| finish(saving)));
        let Some(asking) = self.clients.get_mut(&client) else { return };
        if !asking.send(&answer)
            && let Some(client) = self.clients.remove(&client)
        {
            let _ = ops.remove(Events::empty(&client.stream));
        }
    }

    /// The snapshot is finished, or nobody waits for it any more.
    fn end_job(&mut self, ops: &mut EventOps) -> Option<Job> {
        let job = self.job.take()?;
        for fd in job.saving.fds() {
            let _ = ops.remove(Events::new_raw(fd, EventSet::IN));
        }
        Some(job)
    }

    fn perform(&mut self, method: Method, mut files: Files) -> std::result::Result<Value, String> {
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
            // See `begin_job`.
            Method::Snapshot(_) => Err("a snapshot is not taken at once".to_owned()),
            Method::InsertDisk(wish) => match self.machine.insert_disk(wish, &mut files) {
                Ok(inserted) => serde_json::to_value(inserted).map_err(|error| error.to_string()),
                Err(error) => Err(error.chain()),
            },
            Method::EjectDisk(wish) => {
                self.machine.eject_disk(&wish).map(|()| json!({})).map_err(|error| error.chain())
            }
            Method::WorkingSet => {
                let bytes = self.machine.record_working_set(&mut files).map_err(|error| error.chain())?;
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
            jail: jail::confinement(),
            empty_drives: config.disks.iter().filter(|disk| disk.removable && disk.empty).count(),
        }
    }
}

impl Client {
    /// Sends an answer. False when it is gone, or does not read: an answer fits the socket's buffer of a client that reads what
    /// it asked for.
    fn send(&mut self, answer: &Answer) -> bool {
        let Ok(mut text) = serde_json::to_vec(answer) else { return false };
        text.push(b'\n');
        self.stream.write_all(&text).is_ok()
    }
}

impl Answer {
    fn empty(id: u64) -> Self {
        Self { id, result: None, error: None, progress: None }
    }

    fn of(id: u64, result: std::result::Result<Value, String>) -> Self {
        match result {
            Ok(result) => Self { result: Some(result), ..Self::empty(id) },
            Err(error) => Self { error: Some(error), ..Self::empty(id) },
        }
    }
}

fn finish(saving: Saving) -> std::result::Result<Value, String> {
    let taken = saving.finish().map_err(|error| error.chain())?;
    serde_json::to_value(taken).map_err(|error| error.to_string())
}
