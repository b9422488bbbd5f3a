//! Events for containerd, in the order in which they happened. It may be away for a while: then they wait.

use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::events::task::{
    TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM,
    TaskPaused, TaskResumed, TaskStart,
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

/// Events that wait for containerd, at most. When there are more, tasks wait too, though never for long: nothing waits
/// longer than its patience, so the queue is empty soon.
const ROOM: usize = 1024;
/// How old an event becomes before it is given up, when containerd has not taken it.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(200);
/// How long containerd may take to say that it has one.
const ANSWER: Duration = Duration::from_secs(5);

/// The way to containerd.
#[derive(Clone, Debug)]
pub struct Publisher {
    queue: SyncSender<Happened>,
}

impl Publisher {
    /// Sends to containerd's socket `address`, in a thread of its own.
    pub fn start(address: String, namespace: String) -> Self {
        Self::patient(address, namespace, PATIENCE)
    }

    fn patient(address: String, namespace: String, patience: Duration) -> Self {
        let (queue, events) = sync_channel(ROOM);
        std::thread::spawn(move || Connection { address, namespace, patience, client: None }.run(&events));
        Self { queue }
    }

    /// Takes an event, to be sent after those before it.
    pub fn publish(&self, event: Event) {
        let _ = self.queue.send(Happened { at: SystemTime::now(), since: Instant::now(), event });
    }
}

/// An event, and when it happened.
#[derive(Debug)]
struct Happened {
    /// For containerd.
    at: SystemTime,
    /// For us: the other clock may be set.
    since: Instant,
    event: Event,
}

struct Connection {
    address: String,
    namespace: String,
    patience: Duration,
    client: Option<EventsClient>,
}

impl Connection {
    fn run(mut self, events: &Receiver<Happened>) {
        let mut lost = 0_u64;
        for Happened { at, since, event } in events {
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
            loop {
                let Err(error) = self.send(&request) else {
                    if lost > 0 {
                        log(&format!("containerd is back; {lost} events were lost"));
                        lost = 0;
                    }
                    break;
                };
                self.client = None;
                if since.elapsed() > self.patience {
                    // Once, not for each.
                    if lost == 0 {
                        log(&format!("the event {topic} is lost, containerd does not take it: {error}"));
                    }
                    lost += 1;
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
        Event::Checkpointed { path, .. } => {
            let checkpoint = path.display().to_string();
            let done = TaskCheckpointed { container_id, checkpoint, ..TaskCheckpointed::default() };
            (topics::TASK_CHECKPOINTED_EVENT_TOPIC, any(&done)?)
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
    use std::sync::mpsc::{Sender, channel};
    use std::sync::{Arc, Mutex};

    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_sync::{Events, create_events};
    use containerd_shim_protos::ttrpc::{Result as RpcResult, Server, TtrpcContext};

    use super::*;

    /// containerd, as far as events go.
    struct Containerd(Mutex<Sender<String>>);

    impl Events for Containerd {
        fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> RpcResult<Empty> {
            let event = request.envelope.event.clone().unwrap_or_default();
            let task = containerd_shim_protos::protobuf::Message::parse_from_bytes(&event.value);
            let task: TaskOOM = task.unwrap_or_default();
            let _ = self.0.lock().unwrap().send(task.container_id);
            Ok(Empty::default())
        }
    }

    fn serve(socket: &str) -> (Server, Receiver<String>) {
        let (sender, told) = channel();
        let _ = std::fs::remove_file(socket);
        let address = format!("unix://{socket}");
        let mut server = Server::new().bind(&address).unwrap();
        server = server.register_service(create_events(Arc::new(Containerd(Mutex::new(sender)))));
        server.start().unwrap();
        (server, told)
    }

    #[test]
    fn events_wait_for_a_containerd_that_is_away_but_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("ttrpc").display().to_string();
        let oom = |id: usize| Event::Oom { id: id.to_string() };
        let long = Duration::from_secs(30);

        // Away for a while: all of them come, in order, once each.
        let publisher = Publisher::patient(socket.clone(), "n".into(), long);
        (0..ROOM).for_each(|id| publisher.publish(oom(id)));
        let (server, told) = serve(&socket);
        assert!((0..ROOM).all(|id| told.recv_timeout(long).unwrap() == id.to_string()));
        // Gone and back, while something happens.
        server.shutdown();
        publisher.publish(oom(7));
        let (server, told) = serve(&socket);
        assert_eq!(told.recv_timeout(long).unwrap(), "7");
        server.shutdown();
        std::fs::remove_file(&socket).unwrap();

        // Away for longer than anybody waits: many more than there is room for are all taken here, and given up; what
        // happens when it is back is told.
        let publisher = Publisher::patient(socket.clone(), "n".into(), Duration::ZERO);
        (0..5 * ROOM).for_each(|_| publisher.publish(oom(0)));
        let (server, told) = serve(&socket);
        publisher.publish(oom(5));
        let last = std::iter::repeat_with(|| told.recv_timeout(long).unwrap()).find(|id| id == "5");
        assert!(last.is_some());
        server.shutdown();
    }

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
