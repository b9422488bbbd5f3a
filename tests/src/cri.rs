//! A client of Kubernetes' container runtime interface (CRI v1), as far as the tests need it: what kubelet says to
//! containerd.

mod messages;
mod streaming;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use prost::Message;
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};

use self::messages::{
    Attach, Create, Empty, Exec, ExecAnswer, Id, IdAndNumber, PodStatusAnswer, PortForward, RunPod,
    StatsAnswer, StatusAnswer, StreamingExec, Url,
};
pub use self::messages::{
    Container, ContainerMetadata, Dns, Image, LinuxContainer, LinuxPod, Mount, NamespaceOptions, Pod,
    PodMetadata, Resources, Security, Status,
};
pub use self::streaming::Session;

/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a runtime.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    channel: Channel,
}

impl Cri {
    /// Connects to a runtime's socket.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?.timeout(PATIENCE);
        let channel = runtime
            .block_on(endpoint.connect())
            .with_context(|| format!("connect to {}", socket.display()))?;
        Ok(Self { runtime, channel })
    }

    fn call<Q, A>(&self, method: &str, request: Q) -> Result<A>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let path: PathAndQuery = format!("/runtime.v1.RuntimeService/{method}").parse()?;
        let mut client = Grpc::new(self.channel.clone());
        let answer = self.runtime.block_on(async {
            client.ready().await.context("wait for the connection")?;
            let codec = tonic_prost::ProstCodec::<Q, A>::default();
            let answer = client.unary(tonic::Request::new(request), path, codec).await;
            answer.map_err(|status| anyhow::anyhow!("{}: {}", status.code(), status.message()))
        });
        Ok(answer.with_context(|| method.to_owned())?.into_inner())
    }

    /// Makes a pod; answers its id.
    ///
    /// # Errors
    /// The runtime's.
    pub fn run_pod(&self, pod: &Pod, handler: &str) -> Result<String> {
        let request = RunPod { config: Some(pod.clone()), handler: handler.to_owned() };
        self.call("RunPodSandbox", request).map(|Id { id }| id)
    }

    /// Makes a container in a pod; answers its id.
    ///
    /// # Errors
    /// The runtime's.
    pub fn create(&self, id: &str, pod: &Pod, container: Container) -> Result<String> {
        let request = Create { pod: id.to_owned(), config: Some(container), pod_config: Some(pod.clone()) };
        self.call("CreateContainer", request).map(|Id { id }| id)
    }

    /// Calls a method whose request is an id (and a number), and whose answer is empty: `StartContainer`,
    /// `StopContainer` (seconds until it is killed), `RemoveContainer`, `StopPodSandbox`, `RemovePodSandbox`.
    ///
    /// # Errors
    /// The runtime's.
    pub fn on(&self, method: &str, id: &str, number: i64) -> Result<()> {
        self.call(method, IdAndNumber { id: id.to_owned(), number }).map(|Empty {}| ())
    }

    /// Runs a program in a container; answers output, errors and status.
    ///
    /// # Errors
    /// The runtime's.
    pub fn exec(&self, id: &str, command: &[&str]) -> Result<(String, String, i32)> {
        let command = command.iter().map(|&word| word.to_owned()).collect();
        let answer: ExecAnswer = self.call("ExecSync", Exec { id: id.to_owned(), command, timeout: 30 })?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((text(&answer.stdout), text(&answer.stderr), answer.status))
    }

    /// Runs a program in a container with streams of its own; a terminal, or input, output and errors.
    ///
    /// # Errors
    /// The runtime's.
    pub fn exec_streams(&self, id: &str, tty: bool, command: &[&str]) -> Result<Session> {
        let command = command.iter().map(|&word| word.to_owned()).collect();
        let request =
            StreamingExec { id: id.to_owned(), command, tty, stdin: true, stdout: true, stderr: !tty };
        let answer: Url = self.call("Exec", request)?;
        Session::open(&answer.url)
    }

    /// Connects to the streams of a container's first process.
    ///
    /// # Errors
    /// The runtime's.
    pub fn attach(&self, id: &str, tty: bool) -> Result<Session> {
        let request = Attach { id: id.to_owned(), stdin: true, tty, stdout: true, stderr: !tty };
        let answer: Url = self.call("Attach", request)?;
        Session::open(&answer.url)
    }

    /// Connects to a port on the loopback of a pod.
    ///
    /// # Errors
    /// The runtime's.
    pub fn forward(&self, pod: &str, port: u16) -> Result<Session> {
        let answer: Url =
            self.call("PortForward", PortForward { pod: pod.to_owned(), ports: vec![port.into()] })?;
        Session::open(&answer.url)
    }

    /// Where a container is in its life.
    ///
    /// # Errors
    /// The runtime's.
    pub fn status(&self, id: &str) -> Result<Status> {
        let answer: StatusAnswer = self.call("ContainerStatus", Id { id: id.to_owned() })?;
        answer.status.context("it says nothing")
    }

    /// The bytes of memory that a container uses.
    ///
    /// # Errors
    /// The runtime's.
    pub fn memory(&self, id: &str) -> Result<u64> {
        let answer: StatsAnswer = self.call("ContainerStats", Id { id: id.to_owned() })?;
        let memory = answer.stats.and_then(|stats| stats.memory).and_then(|memory| memory.working_set);
        memory.map(|number| number.value).context("it says nothing of memory")
    }

    /// Whether a pod is ready.
    ///
    /// # Errors
    /// The runtime's.
    pub fn is_ready(&self, id: &str) -> Result<bool> {
        let answer: PodStatusAnswer = self.call("PodSandboxStatus", Id { id: id.to_owned() })?;
        // SANDBOX_READY of `PodSandboxState`.
        Ok(answer.status.context("it says nothing")?.state == 0)
    }

    /// A pod's address.
    ///
    /// # Errors
    /// The runtime's, or it has none.
    pub fn address(&self, id: &str) -> Result<String> {
        let answer: PodStatusAnswer = self.call("PodSandboxStatus", Id { id: id.to_owned() })?;
        let network = answer.status.and_then(|status| status.network);
        network.map(|network| network.ip).filter(|ip| !ip.is_empty()).context("the pod has no address")
    }
}

/// `CONTAINER_EXITED` of `ContainerState`.
pub const EXITED: i32 = 2;
