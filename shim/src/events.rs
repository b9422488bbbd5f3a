//! Events for containerd, in the order in which they happened. It may be away for a while: then they wait.

use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{MessageField, MessageFull};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_sync::{Client, EventsClient};
use containerd_shim_protos::topics;
use containerd_shim_protos::ttrpc::context;

use crate::log;
use crate::reap::Exit;
use crate::tasks::{Event, Stdio};

/// Events that wait for containerd, at most. When there are more, tasks wait too.
const ROOM: usize = 1024;
/// How long one event is tried for before it is given up.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(200);
/// How long containerd may take to say that it has one.
const ANSWER: Duration = Duration::from_secs(5);

/// The way to containerd.
#[derive(Clone, Debug)]
pub struct Publisher {
    queue: SyncSender<(SystemTime, Event)>,
}

impl Publisher {
    /// Sends to containerd's socket `address`, in a thread of its own.
    pub fn start(address: String, namespace: String) -> Self {
        let (queue, events) = sync_channel(ROOM);
        std::thread::spawn(move || Connection { address, namespace, client: None }.run(&events));
        Self { queue }
    }

    /// Takes an event, to be sent after those before it.
    pub fn publish(&self, event: Event) {
        let _ = self.queue.send((SystemTime::now(), event));
    }
}

struct Connection {
    address: String,
    namespace: String,
    client: Option<EventsClient>,
}

impl Connection {
    fn run(mut self, events: &Receiver<(SystemTime, Event)>) {
        for (at, event) in events {
            let Some((topic, any)) = message(&event) else { continue };
            let envelope = Envelope {
                timestamp: MessageField::some(timestamp(at)),
                namespace: self.namespace.clone(),
                topic: topic.to_owned(),
                event: MessageField::some(any),
                ..Envelope::default()
            };
            let request =
                ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
            let until = SystemTime::now() + PATIENCE;
            while let Err(error) = self.send(&request) {
                self.client = None;
                if SystemTime::now() > until {
                    log(&format!("the event {topic} is lost, containerd does not take it: {error}"));
                    break;
                }
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn send(&mut self, request: &ForwardRequest) -> Result<(), String> {
        let client = match &self.client {
            Some(client) => client,
            None => {
                let path = self.address.strip_prefix("unix://").unwrap_or(&self.address);
                let socket = UnixStream::connect(path).map_err(|error| format!("{path}: {error}"))?;
                let client = Client::new(socket.into_raw_fd()).map_err(|error| error.to_string())?;
                self.client.insert(EventsClient::new(client))
            }
        };
        client.forward(context::with_duration(ANSWER), request).map(drop).map_err(|error| error.to_string())
    }
}

/// Seconds and nanoseconds since the epoch.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut stamp = Timestamp::new();
    stamp.seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    stamp.nanos = since.subsec_nanos().cast_signed();
    stamp
}

/// An event in containerd's words: its topic and the message.
fn message(event: &Event) -> Option<(&'static str, Any)> {
    let (container_id, mut exit) = (event.id().to_owned(), Exit::now(0));
    if let Event::Exit { exit: known, .. } | Event::Delete { exit: known, .. } = event {
        exit = *known;
    }
    let (exit_status, exited_at) = (exit.status, MessageField::some(timestamp(exit.at)));
    Some(match event {
        Event::Create { bundle, stdio, pid, .. } => {
            let (bundle, io) = (bundle.display().to_string(), MessageField::some(task_io(stdio)));
            let create = TaskCreate { container_id, bundle, io, pid: *pid, ..TaskCreate::default() };
            (topics::TASK_CREATE_EVENT_TOPIC, any(&create)?)
        }
        Event::Start { pid, .. } => {
            let start = TaskStart { container_id, pid: *pid, ..TaskStart::default() };
            (topics::TASK_START_EVENT_TOPIC, any(&start)?)
        }
        Event::ExecAdded { exec, .. } => {
            let added = TaskExecAdded { container_id, exec_id: exec.clone(), ..TaskExecAdded::default() };
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, any(&added)?)
        }
        Event::ExecStarted { exec, pid, .. } => {
            let exec_id = exec.clone();
            let started = TaskExecStarted { container_id, exec_id, pid: *pid, ..TaskExecStarted::default() };
            (topics::TASK_EXEC_STARTED_EVENT_TOPIC, any(&started)?)
        }
        Event::Oom { .. } => {
            (topics::TASK_OOM_EVENT_TOPIC, any(&TaskOOM { container_id, ..TaskOOM::default() })?)
        }
        Event::Paused { .. } => {
            (topics::TASK_PAUSED_EVENT_TOPIC, any(&TaskPaused { container_id, ..TaskPaused::default() })?)
        }
        Event::Resumed { .. } => {
            (topics::TASK_RESUMED_EVENT_TOPIC, any(&TaskResumed { container_id, ..TaskResumed::default() })?)
        }
        Event::Exit { process, pid, .. } => {
            let (id, pid) = (process.clone(), *pid);
            let exit = TaskExit { container_id, id, pid, exit_status, exited_at, ..TaskExit::default() };
            (topics::TASK_EXIT_EVENT_TOPIC, any(&exit)?)
        }
        Event::Delete { process, pid, .. } => {
            let (id, pid) = (process.clone(), *pid);
            let delete =
                TaskDelete { container_id, id, pid, exit_status, exited_at, ..TaskDelete::default() };
            (topics::TASK_DELETE_EVENT_TOPIC, any(&delete)?)
        }
    })
}

fn task_io(stdio: &Stdio) -> TaskIO {
    TaskIO {
        stdin: stdio.stdin.clone(),
        stdout: stdio.stdout.clone(),
        stderr: stdio.stderr.clone(),
        terminal: stdio.terminal,
        ..TaskIO::default()
    }
}

/// A message with its name, as containerd's typeurl has it.
pub fn any<M: MessageFull>(message: &M) -> Option<Any> {
    let mut any = Any::new();
    any.type_url = M::descriptor().full_name().to_owned();
    any.value = message.write_to_bytes().ok()?;
    Some(any)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_has_its_topic() {
        let (id, exit) = ("c".to_owned(), Exit::now(3));
        let exit = Event::Exit { id: id.clone(), process: "e".into(), pid: 5, exit };
        let (topic, any) = message(&exit).unwrap();
        assert_eq!((topic, any.type_url.as_str()), ("/tasks/exit", "containerd.events.TaskExit"));
        let (topic, any) = message(&Event::Oom { id }).unwrap();
        assert_eq!((topic, any.type_url.as_str()), ("/tasks/oom", "containerd.events.TaskOOM"));
    }
}
