//! The life of a pod, without any machine.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};

use anyhow::bail;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use prost::Message as _;

use super::*;
use crate::reap::Exit;
use crate::tasks::{Checkpoint, Made, Streams};

/// A pod that ends when it is told to.
#[derive(Default)]
struct Fake {
    end: Mutex<Option<Sender<Exit>>>,
    /// Only by SIGKILL.
    stubborn: bool,
}

struct NoStreams;

impl Streams for NoStreams {
    fn close_input(&mut self) {}

    fn resize(&self, _: u16, _: u16) -> anyhow::Result<()> {
        bail!("no terminal")
    }
}

impl Backend for Fake {
    type More = More;
    type Streams = NoStreams;
    type Stats = Value;

    fn create(&self, _: &Create<More>) -> anyhow::Result<Made<NoStreams>> {
        let (sender, ended) = channel();
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        Ok(Made { pid: 7, ended, streams: NoStreams })
    }

    fn start(&self, _: &str) -> anyhow::Result<()> {
        Ok(())
    }

    fn exec(&self, _: &str, _: &str, _: &Value, _: &Stdio) -> anyhow::Result<Made<NoStreams>> {
        bail!("nobody asks a pod for this")
    }

    fn kill(&self, _: &str, signal: u32, _: bool) -> anyhow::Result<()> {
        if self.stubborn && signal != 9 {
            return Ok(());
        }
        if let Some(end) = self.end.lock().unwrap_or_else(PoisonError::into_inner).take() {
            end.send(Exit::now(128 + signal))?;
        }
        Ok(())
    }

    fn kill_exec(&self, _: u32, _: u32) -> anyhow::Result<()> {
        bail!("nobody asks a pod for this")
    }

    fn pause(&self, _: &str) -> anyhow::Result<()> {
        bail!("nobody asks a pod for this")
    }

    fn resume(&self, _: &str) -> anyhow::Result<()> {
        bail!("nobody asks a pod for this")
    }

    fn checkpoint(&self, _: &str, _: &Checkpoint) -> anyhow::Result<()> {
        bail!("nobody asks a pod for this")
    }

    fn update(&self, _: &str, _: &Value) -> anyhow::Result<()> {
        bail!("nobody asks a pod for this")
    }

    fn stats(&self, _: &str) -> anyhow::Result<Value> {
        Ok(Value::Null)
    }

    fn was_oom(&self, _: &str) -> bool {
        false
    }

    fn delete(&self, id: &str) -> anyhow::Result<()> {
        self.kill(id, 9, true)
    }
}

struct Rig {
    service: Service<Fake>,
    done: Receiver<()>,
    bundle: tempfile::TempDir,
}

impl Rig {
    fn new(stubborn: bool) -> Self {
        let (sender, done) = channel();
        let tasks = Tasks::new(Fake { stubborn, ..Fake::default() }, |_| {});
        let service = Service::new(Arc::new(Slot::default()), tasks, sender);
        Self { service, done, bundle: tempfile::tempdir().unwrap() }
    }

    fn create(&self, id: &str) -> Result<()> {
        let mut any = Any::new();
        any.type_url = "runtime.v1.PodSandboxConfig".into();
        any.value = Pod::default().encode_to_vec();
        self.service.create(CreateSandboxRequest {
            sandbox_id: id.into(),
            bundle_path: self.bundle.path().display().to_string(),
            netns_path: "/run/netns/n".into(),
            options: MessageField::some(any),
            ..CreateSandboxRequest::default()
        })
    }

    fn state(&self) -> String {
        self.service.status("pod".into()).unwrap().state
    }
}

#[test]
fn a_pod_is_ready_from_its_start_to_its_end() {
    let rig = Rig::new(false);
    assert!(matches!(rig.service.status("pod".into()), Err(Error::NotFound(_))));
    rig.create("pod").unwrap();
    assert_eq!(rig.state(), "SANDBOX_NOTREADY");
    assert_eq!(rig.service.tasks.start("pod", "").unwrap(), 7);
    assert_eq!(rig.state(), "SANDBOX_READY");
    assert!(rig.service.slot.is("pod") && rig.bundle.path().join("config.json").exists());
    rig.service.stop("pod", PATIENCE).unwrap();
    assert_eq!(rig.service.tasks.wait("pod", "").unwrap().status, 143);
    let status = rig.service.status("pod".into()).unwrap();
    assert!(status.state == "SANDBOX_NOTREADY" && status.exited_at.is_some());
    // Once more is no mistake.
    rig.service.stop("pod", PATIENCE).unwrap();
    rig.service.shut_down("pod").unwrap();
    assert!(rig.done.try_recv().is_ok() && rig.service.tasks.is_empty());
}

#[test]
fn one_that_does_not_end_is_killed() {
    let rig = Rig::new(true);
    rig.create("pod").unwrap();
    rig.service.tasks.start("pod", "").unwrap();
    rig.service.stop("pod", Duration::from_millis(20)).unwrap();
    assert_eq!(rig.service.tasks.wait("pod", "").unwrap().status, 137);
}

#[test]
fn a_shim_has_one_pod_and_ends_with_no_other() {
    let rig = Rig::new(false);
    rig.create("pod").unwrap();
    assert!(matches!(rig.create("pod"), Err(Error::AlreadyExists(_))));
    assert!(matches!(rig.create("other"), Err(Error::AlreadyExists(_))));
    assert!(matches!(rig.service.stop("other", PATIENCE), Err(Error::NotFound(_))));
    assert!(matches!(rig.service.shut_down("other"), Err(Error::NotFound(_))));
    assert!(rig.done.try_recv().is_err());
    // One that could not be made leaves nothing to serve.
    let empty = Rig::new(false);
    empty.service.shut_down("pod").unwrap();
    assert!(empty.done.try_recv().is_ok());
}
