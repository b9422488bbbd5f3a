//! A client of Kubernetes' container runtime interface (CRI v1), as far as the tests need it: what kubelet says to
//! containerd. Numbers of fields are those of cri-api's `api.proto`; what is not said here has its default.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use prost::Message;
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};

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

/// `PodSandboxConfig`.
#[derive(Clone, PartialEq, Message)]
pub struct Pod {
    /// Its name and the like.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<PodMetadata>,
    /// Of all its containers.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// Where its containers' output is logged.
    #[prost(string, tag = "3")]
    pub log_directory: String,
    /// For its containers' resolv.conf.
    #[prost(message, optional, tag = "4")]
    pub dns: Option<Dns>,
    /// What Linux has besides.
    #[prost(message, optional, tag = "8")]
    pub linux: Option<LinuxPod>,
}

/// `DNSConfig`.
#[derive(Clone, PartialEq, Message)]
pub struct Dns {
    /// Addresses of name servers.
    #[prost(string, repeated, tag = "1")]
    pub servers: Vec<String>,
}

/// `PodSandboxMetadata`.
#[derive(Clone, PartialEq, Message)]
pub struct PodMetadata {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// What tells it from an earlier one of this name.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// Kubernetes' namespace.
    #[prost(string, tag = "3")]
    pub namespace: String,
}

/// `LinuxPodSandboxConfig`.
#[derive(Clone, PartialEq, Message)]
pub struct LinuxPod {
    /// The sum of its containers' limits.
    #[prost(message, optional, tag = "5")]
    pub resources: Option<Resources>,
}

/// `LinuxContainerResources`.
#[derive(Clone, PartialEq, Message)]
pub struct Resources {
    /// Bytes.
    #[prost(int64, tag = "4")]
    pub memory_limit: i64,
}

/// `ContainerConfig`.
#[derive(Clone, PartialEq, Message)]
pub struct Container {
    /// Its name.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<ContainerMetadata>,
    /// Its image.
    #[prost(message, optional, tag = "2")]
    pub image: Option<Image>,
    /// Program and arguments.
    #[prost(string, repeated, tag = "3")]
    pub command: Vec<String>,
    /// Its file in the pod's directory of logs.
    #[prost(string, tag = "11")]
    pub log_path: String,
    /// What Linux has besides.
    #[prost(message, optional, tag = "15")]
    pub linux: Option<LinuxContainer>,
}

/// `ContainerMetadata`.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerMetadata {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// How often it has been started again.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
}

/// `ImageSpec`.
#[derive(Clone, PartialEq, Message)]
pub struct Image {
    /// Its name.
    #[prost(string, tag = "1")]
    pub image: String,
    /// What is said of it.
    #[prost(map = "string, string", tag = "2")]
    pub annotations: HashMap<String, String>,
}

/// `LinuxContainerConfig`.
#[derive(Clone, PartialEq, Message)]
pub struct LinuxContainer {
    /// Its limits.
    #[prost(message, optional, tag = "1")]
    pub resources: Option<Resources>,
}

/// `ContainerStatus`.
#[derive(Clone, PartialEq, Message)]
pub struct Status {
    /// `ContainerState`.
    #[prost(int32, tag = "3")]
    pub state: i32,
    /// Once it has ended.
    #[prost(int32, tag = "7")]
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`.
    #[prost(string, tag = "10")]
    pub reason: String,
}

#[derive(Clone, PartialEq, Message)]
struct Empty {}

#[derive(Clone, PartialEq, Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct IdAndNumber {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(int64, tag = "2")]
    number: i64,
}

#[derive(Clone, PartialEq, Message)]
struct RunPod {
    #[prost(message, optional, tag = "1")]
    config: Option<Pod>,
    #[prost(string, tag = "2")]
    handler: String,
}

#[derive(Clone, PartialEq, Message)]
struct Create {
    #[prost(string, tag = "1")]
    pod: String,
    #[prost(message, optional, tag = "2")]
    config: Option<Container>,
    #[prost(message, optional, tag = "3")]
    pod_config: Option<Pod>,
}

#[derive(Clone, PartialEq, Message)]
struct Exec {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, repeated, tag = "2")]
    command: Vec<String>,
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ExecAnswer {
    #[prost(bytes, tag = "1")]
    stdout: Vec<u8>,
    #[prost(bytes, tag = "2")]
    stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    status: i32,
}

#[derive(Clone, PartialEq, Message)]
struct StatusAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
}

#[derive(Clone, PartialEq, Message)]
struct StatsAnswer {
    #[prost(message, optional, tag = "1")]
    stats: Option<Stats>,
}

#[derive(Clone, PartialEq, Message)]
struct Stats {
    #[prost(message, optional, tag = "3")]
    memory: Option<Memory>,
}

#[derive(Clone, PartialEq, Message)]
struct Memory {
    #[prost(message, optional, tag = "2")]
    working_set: Option<Number>,
}

#[derive(Clone, PartialEq, Message)]
struct Number {
    #[prost(uint64, tag = "1")]
    value: u64,
}

#[derive(Clone, PartialEq, Message)]
struct PodStatusAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<PodStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct PodStatus {
    #[prost(int32, tag = "3")]
    state: i32,
    #[prost(message, optional, tag = "5")]
    network: Option<PodNetwork>,
}

#[derive(Clone, PartialEq, Message)]
struct PodNetwork {
    #[prost(string, tag = "1")]
    ip: String,
}
