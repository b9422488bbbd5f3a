//! Messages of CRI v1, as far as they are needed. Numbers of fields are those of cri-api's `api.proto`; what is not said here
//! has its default.

use std::collections::HashMap;

use prost::Message;

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
    /// Files and directories of the host's.
    #[prost(message, repeated, tag = "7")]
    pub mounts: Vec<Mount>,
    /// Its file in the pod's directory of logs.
    #[prost(string, tag = "11")]
    pub log_path: String,
    /// It has standard input.
    #[prost(bool, tag = "12")]
    pub stdin: bool,
    /// It has a terminal.
    #[prost(bool, tag = "14")]
    pub tty: bool,
    /// What Linux has besides.
    #[prost(message, optional, tag = "15")]
    pub linux: Option<LinuxContainer>,
}

/// `Mount`.
#[derive(Clone, PartialEq, Message)]
pub struct Mount {
    /// Where it is in the container.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// Where it is on the host.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// The container may not write there.
    #[prost(bool, tag = "3")]
    pub readonly: bool,
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
    /// What it shares.
    #[prost(message, optional, tag = "2")]
    pub security: Option<Security>,
}

/// `LinuxContainerSecurityContext`.
#[derive(Clone, PartialEq, Message)]
pub struct Security {
    /// Its namespaces.
    #[prost(message, optional, tag = "3")]
    pub namespaces: Option<NamespaceOptions>,
}

/// `NamespaceOption`.
#[derive(Clone, PartialEq, Message)]
pub struct NamespaceOptions {
    /// `NamespaceMode` of its pids: 0 the pod's, 1 its own, 3 those of another container.
    #[prost(int32, tag = "2")]
    pub pid: i32,
    /// That container.
    #[prost(string, tag = "4")]
    pub target: String,
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
pub(super) struct Empty {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Id {
    #[prost(string, tag = "1")]
    pub(super) id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct IdAndNumber {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(int64, tag = "2")]
    pub(super) number: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RunPod {
    #[prost(message, optional, tag = "1")]
    pub(super) config: Option<Pod>,
    #[prost(string, tag = "2")]
    pub(super) handler: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Create {
    #[prost(string, tag = "1")]
    pub(super) pod: String,
    #[prost(message, optional, tag = "2")]
    pub(super) config: Option<Container>,
    #[prost(message, optional, tag = "3")]
    pub(super) pod_config: Option<Pod>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Exec {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, repeated, tag = "2")]
    pub(super) command: Vec<String>,
    #[prost(int64, tag = "3")]
    pub(super) timeout: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ExecAnswer {
    #[prost(bytes, tag = "1")]
    pub(super) stdout: Vec<u8>,
    #[prost(bytes, tag = "2")]
    pub(super) stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    pub(super) status: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StreamingExec {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, repeated, tag = "2")]
    pub(super) command: Vec<String>,
    #[prost(bool, tag = "3")]
    pub(super) tty: bool,
    #[prost(bool, tag = "4")]
    pub(super) stdin: bool,
    #[prost(bool, tag = "5")]
    pub(super) stdout: bool,
    #[prost(bool, tag = "6")]
    pub(super) stderr: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Attach {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(bool, tag = "2")]
    pub(super) stdin: bool,
    #[prost(bool, tag = "3")]
    pub(super) tty: bool,
    #[prost(bool, tag = "4")]
    pub(super) stdout: bool,
    #[prost(bool, tag = "5")]
    pub(super) stderr: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PortForward {
    #[prost(string, tag = "1")]
    pub(super) pod: String,
    #[prost(int32, repeated, tag = "2")]
    pub(super) ports: Vec<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Url {
    #[prost(string, tag = "1")]
    pub(super) url: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StatusAnswer {
    #[prost(message, optional, tag = "1")]
    pub(super) status: Option<Status>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StatsAnswer {
    #[prost(message, optional, tag = "1")]
    pub(super) stats: Option<Stats>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Stats {
    #[prost(message, optional, tag = "3")]
    pub(super) memory: Option<Memory>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Memory {
    #[prost(message, optional, tag = "2")]
    pub(super) working_set: Option<Number>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Number {
    #[prost(uint64, tag = "1")]
    pub(super) value: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodStatusAnswer {
    #[prost(message, optional, tag = "1")]
    pub(super) status: Option<PodStatus>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodStatus {
    #[prost(int32, tag = "3")]
    pub(super) state: i32,
    #[prost(message, optional, tag = "5")]
    pub(super) network: Option<PodNetwork>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodNetwork {
    #[prost(string, tag = "1")]
    pub(super) ip: String,
}
