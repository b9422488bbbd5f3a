//! containerd's sandbox API: a pod without a pause container. The pod is a task of [`Tasks`] that containerd does not know as
//! one, made of nothing ([`pod`]); its end is the pod's.

mod pod;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_sync::Sandbox as Api;
use containerd_shim_protos::ttrpc::{Result as RpcResult, TtrpcContext};
use containerd_shim_protos::types::platform::Platform;
use serde_json::Value;

use self::pod::Pod;
use crate::events::timestamp;
use crate::oci::More;
use crate::service::told;
use crate::stats;
use crate::tasks::{Backend, Create, Error, Phase, Result, Stdio, Tasks};

/// How long a pod may take to end by itself, when containerd says nothing of it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take once it is killed.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// The pod of this process, if containerd has made it by the sandbox API.
#[derive(Debug, Default)]
pub struct Slot(OnceLock<Known>);

#[derive(Debug)]
struct Known {
    id: String,
    bundle: PathBuf,
    created: SystemTime,
}

impl Slot {
    /// Whether a task is the pod itself, of which no events are told: containerd makes those of sandboxes by itself.
    pub fn is(&self, id: &str) -> bool {
        self.0.get().is_some_and(|known| known.id == id)
    }

    /// Adds what the pod has for a container to that one's bundle.
    ///
    /// # Errors
    /// The bundle has no configuration.
    pub fn furnish(&self, create: &Create<More>) -> Result<()> {
        match self.0.get() {
            Some(known) => Ok(pod::furnish(&create.bundle, &known.id, &known.bundle)?),
            None => Ok(()),
        }
    }
}

/// The API for the pod of one process.
pub struct Service<B: Backend> {
    slot: Arc<Slot>,
    tasks: Arc<Tasks<B>>,
    done: Sender<()>,
}

impl<B: Backend<More = More, Stats = Value>> Service<B> {
    /// Serves the pod in `slot`; `done` is told when there is nothing left to serve.
    pub fn new(slot: Arc<Slot>, tasks: Arc<Tasks<B>>, done: Sender<()>) -> Self {
        Self { slot, tasks, done }
    }

    fn known(&self, id: &str) -> Result<&Known> {
        let known = self.slot.0.get().filter(|known| known.id == id);
        known.ok_or_else(|| Error::NotFound(format!("sandbox {id} does not exist")))
    }

    fn create(&self, request: CreateSandboxRequest) -> Result<()> {
        let CreateSandboxRequest { sandbox_id: id, bundle_path, netns_path, .. } = request;
        let taken = self.slot.0.get().is_some_and(|known| known.id != id);
        if taken || self.tasks.state(&id, "").is_ok() {
            return Err(Error::AlreadyExists(format!("sandbox {id}: this shim has one already")));
        }
        let options = request.options.into_option().unwrap_or_default();
        let pod = Pod::decode(&options.type_url, &options.value)?;
        let bundle = PathBuf::from(bundle_path);
        pod.write_bundle(&id, &bundle, &netns_path)?;
        let known = Known { id: id.clone(), bundle: bundle.clone(), created: SystemTime::now() };
        if self.slot.0.set(known).is_err() && !self.slot.is(&id) {
            return Err(Error::AlreadyExists("this shim has another sandbox".into()));
        }
        let systemd_cgroup = pod.systemd_cgroup();
        let more = More { systemd_cgroup, ..More::default() };
        self.tasks.create(&Create { id, bundle, stdio: Stdio::default(), more }).map(drop)
    }

    /// Ends the pod: first it is asked to.
    fn stop(&self, id: &str, patience: Duration) -> Result<()> {
        self.known(id)?;
        for (signal, patience) in [(libc::SIGTERM, patience), (libc::SIGKILL, KILL_PATIENCE)] {
            match self.tasks.kill(id, "", signal.unsigned_abs(), false) {
                // It has ended, or was never there.
                Err(Error::NotFound(_)) => return Ok(()),
                result => result?,
            }
            if self.tasks.wait_for(id, patience)?.is_some() {
                return Ok(());
            }
        }
        Err(Error::Failed(anyhow::anyhow!("sandbox {id} does not end")))
    }

    fn shut_down(&self, id: &str) -> Result<()> {
        match self.known(id) {
            Ok(_) if self.tasks.state(id, "").is_ok() => {
                self.stop(id, Duration::ZERO)?;
                self.tasks.delete(id, "")?;
            }
            // It was never made, or is gone; but something else may be served.
            Err(error) if !self.tasks.is_empty() => return Err(error),
            _ => {}
        }
        let _ = self.done.send(());
        Ok(())
    }

    fn status(&self, id: String) -> Result<SandboxStatusResponse> {
        let known = self.known(&id)?;
        let state = self.tasks.state(&id, "")?;
        let (ready, exited) = match state.phase {
            Phase::Stopped(exit) => (false, Some(timestamp(exit.at))),
            Phase::Created => (false, None),
            Phase::Running | Phase::Paused => (true, None),
        };
        Ok(SandboxStatusResponse {
            sandbox_id: id,
            pid: state.pid,
            state: if ready { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" }.into(),
            created_at: MessageField::some(timestamp(known.created)),
            exited_at: MessageField::from_option(exited),
            ..SandboxStatusResponse::default()
        })
    }
}

/// This machine in Go's words.
fn platform() -> Platform {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    Platform { os: "linux".into(), architecture: architecture.into(), ..Platform::default() }
}

impl<B: Backend<More = More, Stats = Value>> Api for Service<B> {
    fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> RpcResult<CreateSandboxResponse> {
        told(self.create(request)).map(|()| CreateSandboxResponse::default())
    }

    fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> RpcResult<StartSandboxResponse> {
        let created = told(self.known(&request.sandbox_id))?.created;
        let pid = told(self.tasks.start(&request.sandbox_id, ""))?;
        let created_at = MessageField::some(timestamp(created));
        Ok(StartSandboxResponse { pid, created_at, ..StartSandboxResponse::default() })
    }

    fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> RpcResult<PlatformResponse> {
        told(self.known(&request.sandbox_id))?;
        let platform = MessageField::some(platform());
        Ok(PlatformResponse { platform, ..PlatformResponse::default() })
    }

    fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> RpcResult<StopSandboxResponse> {
        let seconds = Duration::from_secs(request.timeout_secs.into());
        let patience = if seconds.is_zero() { PATIENCE } else { seconds };
        told(self.stop(&request.sandbox_id, patience)).map(|()| StopSandboxResponse::default())
    }

    fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> RpcResult<WaitSandboxResponse> {
        let exit = told(self.tasks.wait(&request.sandbox_id, ""))?;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(WaitSandboxResponse { exit_status: exit.status, exited_at, ..WaitSandboxResponse::default() })
    }

    fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> RpcResult<SandboxStatusResponse> {
        let SandboxStatusRequest { sandbox_id, verbose, .. } = request;
        let mut status = told(self.status(sandbox_id))?;
        if verbose {
            // What crictl shows has one member, which is JSON.
            let info = serde_json::json!({"pid": status.pid, "sandboxer": "shim"});
            status.info = HashMap::from([("info".to_owned(), info.to_string())]);
        }
        Ok(status)
    }

    fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> RpcResult<PingResponse> {
        told(self.known(&request.sandbox_id)).map(|_| PingResponse::default())
    }

    fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> RpcResult<ShutdownSandboxResponse> {
        told(self.shut_down(&request.sandbox_id)).map(|()| ShutdownSandboxResponse::default())
    }

    fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> RpcResult<SandboxMetricsResponse> {
        let stats = told(self.tasks.stats(&request.sandbox_id))?;
        let mut response = SandboxMetricsResponse::default();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(timestamp(SystemTime::now()));
        metric.id = request.sandbox_id;
        metric.data = MessageField::from_option(stats::metrics(&stats));
        Ok(response)
    }
}
