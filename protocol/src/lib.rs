//! The words host and guest exchange: messages, ttrpc framing, stdio streams.
//!
//! | vsock port | who listens | what |
//! |---|---|---|
//! | 1024 on the host | runtime | the agent connects once when it is ready, and closes |
//! | 1024 in the guest | agent | ttrpc, service `bulkhead.agent.v1.Agent` |
//! | 1025 in the guest | agent | streams: [`agent::StreamHello`], [`agent::StreamReply`], then raw bytes |
//! | 1026 on the host | runtime | one question to a name server and its answer: [`names`] |

pub mod client;
pub mod names;
pub mod stream;
pub mod wire;

/// Messages of `proto/agent.proto`.
#[allow(missing_docs)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/bulkhead.agent.v1.rs"));
}

/// Raised when host and agent could no longer understand each other.
pub const PROTOCOL_VERSION: u32 = 1;
/// Directory of the guest below which the host's directories are mounted, each under the tag of its virtio-fs device.
pub const SHARES: &str = "/run/shares";
/// ttrpc service name of the agent.
pub const AGENT_SERVICE: &str = "bulkhead.agent.v1.Agent";
/// vsock port of the agent's ttrpc service in the guest, and of the host's ready listener.
pub const AGENT_PORT: u32 = 1024;
/// vsock port of the agent's stream service in the guest.
pub const STREAM_PORT: u32 = 1025;
/// vsock port on the host of the way to a name server that only the container's network namespace can reach.
pub const NAMES_PORT: u32 = 1026;
/// I/O port of the monitor's timeline device: the guest writes one byte, a [`mark`], the monitor notes the time.
pub const MARK_IO_PORT: u16 = 0xb40;
/// I/O port of the monitor's exit device: the guest writes 32 bits, the monitor ends at once with that status.
pub const EXIT_IO_PORT: u16 = 0xb44;

/// Values the guest writes to [`MARK_IO_PORT`].
pub mod mark {
    /// The agent's first instructions as PID 1.
    pub const AGENT_STARTED: u8 = 1;
    /// The agent listens on its vsock ports.
    pub const AGENT_READY: u8 = 2;
    /// The container's init is about to execve.
    pub const CONTAINER_STARTED: u8 = 3;
    /// The container's init has ended.
    pub const CONTAINER_EXITED: u8 = 4;
}
