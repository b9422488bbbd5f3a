//! containerd's task API: its messages to calls of [`Tasks`], and the answers back.

use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{EnumOrUnknown, Message, MessageField};
use containerd_shim_protos::shim::oci::{CheckpointOptions, Options, ProcessDetails};
use containerd_shim_protos::shim_sync::Task;
use containerd_shim_protos::ttrpc::{Code, Error as RpcError, Result as RpcResult, TtrpcContext, get_status};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use serde_json::Value;

use crate::events::{any, timestamp};
use crate::mounts::Mount;
use crate::oci::{More, Oci};
use crate::sandbox::Slot;
use crate::stats;
use crate::tasks::{Checkpoint, Create, Error, Phase, Result, Stdio, Streams as _, Tasks};

/// The API for one process's tasks.
pub struct Service {
    tasks: Arc<Tasks<Oci>>,
    /// The pod that they are of, if the sandbox API has made it.
    pod: Arc<Slot>,
    /// Told when the process is to end.
    done: Sender<()>,
}

impl Service {
    /// Serves `tasks`; `done` is told when there is nothing left to serve.
    pub fn new(tasks: Arc<Tasks<Oci>>, pod: Arc<Slot>, done: Sender<()>) -> Self {
        Self { tasks, pod, done }
    }
}

/// What containerd 2 asks for by `-info`.
///
/// # Errors
/// Nobody reads it.
pub fn print_info() -> anyhow::Result<()> {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..RuntimeVersion::default() };
    let (name, version) = (crate::RUNTIME.to_owned(), MessageField::some(version));
    let info = RuntimeInfo { name, version, ..RuntimeInfo::default() };
    Ok(std::io::stdout().write_all(&info.write_to_bytes()?)?)
}

/// An error in the form that containerd tells kinds apart by.
pub fn told<T>(result: Result<T>) -> RpcResult<T> {
    result.map_err(|error| {
        let (code, message) = match error {
            Error::NotFound(message) => (Code::NOT_FOUND, message),
            Error::AlreadyExists(message) => (Code::ALREADY_EXISTS, message),
            Error::Precondition(message) => (Code::FAILED_PRECONDITION, message),
            Error::Invalid(message) => (Code::INVALID_ARGUMENT, message),
            Error::Failed(error) => (Code::UNKNOWN, format!("{error:#}")),
        };
        RpcError::RpcStatus(get_status(code, message))
    })
}

/// JSON that containerd packs with the name of its type in Go.
fn json(what: &str, any: Option<&Any>) -> Result<Value> {
    let any = any.ok_or_else(|| Error::Invalid(format!("{what} is missing")))?;
    serde_json::from_slice(&any.value)
        .map_err(|error| Error::Invalid(format!("{what} is malformed: {error}")))
}

fn more(request: &CreateTaskRequest) -> Result<More> {
    let checkpoint = Some(request.checkpoint.clone()).filter(|path| !path.is_empty());
    let rootfs = request.rootfs.iter().map(|mount| Mount {
        kind: mount.type_.clone(),
        source: mount.source.clone(),
        options: mount.options.clone(),
    });
    let rootfs = rootfs.collect();
    let Some(options) = request.options.as_ref().filter(|any| any.type_url.ends_with("runc.v1.Options"))
    else {
        return Ok(More { rootfs, systemd_cgroup: false, checkpoint });
    };
    let options = Options::parse_from_bytes(&options.value)
        .map_err(|error| Error::Invalid(format!("the runtime's options are malformed: {error}")))?;
    Ok(More { rootfs, systemd_cgroup: options.systemd_cgroup, checkpoint })
}

/// What is asked for with runc's options, of which `exit` alone is about more than CRIU. containerd names the directory; a client that
/// wants it elsewhere names it twice.
fn checkpoint(request: &CheckpointTaskRequest) -> Result<Checkpoint> {
    let options = match request.options.as_ref().filter(|any| !any.type_url.is_empty()) {
        None => CheckpointOptions::default(),
        Some(any) if any.type_url.ends_with(".CheckpointOptions") => {
            CheckpointOptions::parse_from_bytes(&any.value).map_err(|error| {
                Error::Invalid(format!("the options of the checkpoint are malformed: {error}"))
            })?
        }
        Some(any) => {
            return Err(Error::Invalid(format!("options of a checkpoint are not of type {}", any.type_url)));
        }
    };
    let path = if request.path.is_empty() { options.image_path } else { request.path.clone() };
    if !path.starts_with('/') {
        return Err(Error::Invalid(format!("{path:?} is no absolute path for a checkpoint")));
    }
    Ok(Checkpoint { path: path.into(), exit: options.exit })
}

impl Task for Service {
    fn state(&self, _: &TtrpcContext, request: StateRequest) -> RpcResult<StateResponse> {
        let state = told(self.tasks.state(&request.id, &request.exec_id))?;
        let (status, exit) = match state.phase {
            Phase::Created => (Status::CREATED, None),
            Phase::Running => (Status::RUNNING, None),
            Phase::Paused => (Status::PAUSED, None),
            Phase::Stopped(exit) => (Status::STOPPED, Some(exit)),
        };
        Ok(StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: state.bundle.display().to_string(),
            pid: state.pid,
            status: EnumOrUnknown::new(status),
            stdin: state.stdio.stdin,
            stdout: state.stdio.stdout,
            stderr: state.stdio.stderr,
            terminal: state.stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: MessageField::from_option(exit.map(|exit| timestamp(exit.at))),
            ..StateResponse::default()
        })
    }

    fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> RpcResult<CreateTaskResponse> {
        let more = told(more(&request))?;
        let CreateTaskRequest { id, bundle, terminal, stdin, stdout, stderr, .. } = request;
        let stdio = Stdio { stdin, stdout, stderr, terminal };
        let create = Create { id, bundle: bundle.into(), stdio, more };
        told(self.pod.furnish(&create))?;
        let pid = told(self.tasks.create(&create))?;
        Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
    }

    fn start(&self, _: &TtrpcContext, request: StartRequest) -> RpcResult<StartResponse> {
        let pid = told(self.tasks.start(&request.id, &request.exec_id))?;
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> RpcResult<DeleteResponse> {
        let (pid, exit) = told(self.tasks.delete(&request.id, &request.exec_id))?;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(DeleteResponse { pid, exit_status: exit.status, exited_at, ..DeleteResponse::default() })
    }

    fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> RpcResult<PidsResponse> {
        let pids = told(self.tasks.pids(&request.id))?.into_iter();
        let processes = pids.map(|(pid, exec_id)| {
            let details = ProcessDetails { exec_id: exec_id.clone(), ..ProcessDetails::default() };
            let info = if exec_id.is_empty() { None } else { any(&details) };
            ProcessInfo { pid, info: MessageField::from_option(info), ..ProcessInfo::default() }
        });
        Ok(PidsResponse { processes: processes.collect(), ..PidsResponse::default() })
    }

    fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> RpcResult<Empty> {
        told(self.tasks.suspend(&request.id, true)).map(|()| Empty::default())
    }

    fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> RpcResult<Empty> {
        told(self.tasks.suspend(&request.id, false)).map(|()| Empty::default())
    }

    fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> RpcResult<Empty> {
        let wish = told(checkpoint(&request))?;
        told(self.tasks.checkpoint(&request.id, &wish)).map(|()| Empty::default())
    }

    fn kill(&self, _: &TtrpcContext, request: KillRequest) -> RpcResult<Empty> {
        let done = self.tasks.kill(&request.id, &request.exec_id, request.signal, request.all);
        told(done).map(|()| Empty::default())
    }

    fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> RpcResult<Empty> {
        let spec = told(json("the process", request.spec.as_ref()))?;
        let ExecProcessRequest { id, exec_id, terminal, stdin, stdout, stderr, .. } = request;
        let stdio = Stdio { stdin, stdout, stderr, terminal };
        told(self.tasks.add_exec(&id, &exec_id, spec, stdio)).map(|()| Empty::default())
    }

    fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> RpcResult<Empty> {
        let size = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        let (rows, columns) = (size(request.height), size(request.width));
        told(self.tasks.streams(&request.id, &request.exec_id, |streams| streams.resize(rows, columns)))
            .map(|()| Empty::default())
    }

    fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> RpcResult<Empty> {
        let close = |streams: &mut crate::stdio::Open| {
            if request.stdin {
                streams.close_input();
            }
            Ok(())
        };
        told(self.tasks.streams(&request.id, &request.exec_id, close)).map(|()| Empty::default())
    }

    fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> RpcResult<Empty> {
        let resources = told(json("the resources", request.resources.as_ref()))?;
        told(self.tasks.update(&request.id, &resources)).map(|()| Empty::default())
    }

    fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> RpcResult<WaitResponse> {
        let exit = told(self.tasks.wait(&request.id, &request.exec_id))?;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(WaitResponse { exit_status: exit.status, exited_at, ..WaitResponse::default() })
    }

    fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> RpcResult<StatsResponse> {
        let stats = told(self.tasks.stats(&request.id))?;
        let stats = MessageField::from_option(stats::metrics(&stats));
        Ok(StatsResponse { stats, ..StatsResponse::default() })
    }

    fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> RpcResult<ConnectResponse> {
        let task_pid = self.tasks.state(&request.id, "").map_or(0, |state| state.pid);
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, ..ConnectResponse::default() })
    }

    fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> RpcResult<Empty> {
        // Another container of the pod may still be served.
        if request.now || self.tasks.is_empty() {
            let _ = self.done.send(());
        }
        Ok(Empty::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(path: &str, kind: &str, options: &CheckpointOptions) -> Result<Checkpoint> {
        let any = Any { type_url: kind.into(), value: options.write_to_bytes().unwrap(), ..Any::default() };
        let options = MessageField::some(any);
        checkpoint(&CheckpointTaskRequest { path: path.into(), options, ..CheckpointTaskRequest::default() })
    }

    #[test]
    fn options_of_a_checkpoint_are_those_of_runc() {
        let kind = "containerd.runc.v1.CheckpointOptions";
        let plain = CheckpointOptions::default();
        let exit = CheckpointOptions { exit: true, image_path: "/there".into(), ..plain.clone() };
        assert_eq!(wish("/here", kind, &plain).unwrap(), Checkpoint { path: "/here".into(), exit: false });
        assert_eq!(wish("/here", kind, &exit).unwrap(), Checkpoint { path: "/here".into(), exit: true });
        assert_eq!(wish("", kind, &exit).unwrap(), Checkpoint { path: "/there".into(), exit: true });
        assert_eq!(wish("/here", "", &exit).unwrap(), Checkpoint { path: "/here".into(), exit: false });
        assert!(matches!(wish("/here", "x.Options", &plain), Err(Error::Invalid(_))));
        assert!(matches!(wish("here", kind, &plain), Err(Error::Invalid(_))));
        assert!(matches!(wish("", kind, &plain), Err(Error::Invalid(_))));
    }
}
