//! The control socket: one JSON object per line, in both directions.
//!
//! ```text
//! {"id":1,"method":"status"}
//! {"id":1,"result":{…}}
//! {"id":2,"method":"fly"}
//! {"id":2,"error":"unknown method \"fly\"; …"}
//! ```
//!
//! | method | result |
//! |---|---|
//! | `status` | [`Status`] |
//! | `metrics` | what each device counted, and the timeline |
//! | `pause`, `resume` | `{}`: all vCPUs stand still, or run |
//! | `{"snapshot":{"directory":DIR}}` | [`Taken`]: the machine was saved to the directory DIR, which did not exist |
//! | `working-set` | bytes of memory the machine has written to since it went on from its snapshot, which are noted there |
//! | `quit` | `{}`; then the monitor ends |

mod client;
pub mod server;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::MachineConfig;
use crate::vcpu::Sample;

pub use crate::machine::Taken;
pub use client::{Client, ClientError};

/// Longest request or answer line.
pub const MAX_LINE: usize = 1 << 20;

/// A request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Comes back in the answer.
    pub id: u64,
    /// What is asked.
    pub method: Method,
}

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// How the machine is.
    Status,
    /// What was counted.
    Metrics,
    /// Stand still.
    Pause,
    /// Run again.
    Resume,
    /// Note beside the snapshot from which the machine went on which memory it has written to.
    #[serde(rename = "working-set")]
    WorkingSet,
    /// Save the machine.
    Snapshot(SnapshotRequest),
    /// End.
    Quit,
}

/// Where a machine is saved, and how well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Absolute path of a directory that does not exist.
    pub directory: PathBuf,
    /// Whether the snapshot is to survive a loss of power, for which the disk is waited for while the guest stands still.
    #[serde(default = "yes")]
    pub durable: bool,
}

fn yes() -> bool {
    true
}

/// An answer: a result or an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Of the request; 0 when it could not be read.
    pub id: u64,
    /// What was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
    /// Why it cannot be had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How the machine is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// `running` or `paused`.
    pub state: String,
    /// The monitor's process id.
    pub pid: u32,
    /// Since the first instruction of the guest, in nanoseconds.
    pub uptime_ns: u64,
    /// What each vCPU does.
    pub vcpus: Vec<Sample>,
    /// What the guest printed last.
    pub console_tail: String,
    /// Processors and memory.
    pub machine: MachineConfig,
    /// Names of the disks, in order.
    pub disks: Vec<String>,
}
