//! The control socket: one JSON object per line, in both directions.
//!
//! ```text
//! {"id":1,"method":"status"}
//! {"id":1,"result":{…}}
//! {"id":2,"method":"fly"}
//! {"id":2,"error":"unknown method \"fly\"; …"}
//! ```
//!
//! Of files that the monitor is to use, the client sends descriptors with the request (SCM_RIGHTS), as the monitor may have no way to
//! open anything; `files` names them in their order. [`Client`] does all that.
//!
//! | method | result |
//! |---|---|
//! | `status` | [`Status`] |
//! | `metrics` | what each device counted, and the timeline |
//! | `pause`, `resume` | `{}`: all vCPUs stand still, or run |
//! | `{"snapshot":{"directory":DIR,…}}`, with files that are empty: `memory`, `state`, and `disk-ID` for each disk | [`Taken`]: the machine was saved in them, as [`SnapshotRequest`] says; before that, an answer with [`Progress`] when the guest goes on. A client that goes away gives it up |
//! | `{"insert-disk":{"path":FILE}}`, with that file | [`Inserted`]: a removable drive that was empty has the disk FILE now; `"read_only":true`, and `"layers":[…]` instead of a path, as in the configuration |
//! | `{"eject-disk":{"drive":ID}}` | `{}`: the drive is empty again, requests that wait have failed; with `"retire":true` it stays so for good |
//! | `working-set`, with a file that is empty | bytes of memory the machine has written to since it went on from its snapshot, which are noted in it |
//! | `quit` | `{}`; then the monitor ends |

mod client;
mod files;
pub mod server;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::MachineConfig;
use crate::jail::Confinement;
use crate::vcpu::Sample;

pub use crate::machine::{Inserted, SavedDisk, SnapshotRequest, Taken};
pub use client::{Client, ClientError};
pub use files::Files;

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
    /// What the descriptors are that come with it, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
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
    /// Note in a file beside the snapshot from which the machine went on which memory it has written to: see
    /// [`Client::record_working_set`].
    #[serde(rename = "working-set")]
    WorkingSet,
    /// Save the machine.
    Snapshot(SnapshotRequest),
    /// Put a disk into an empty drive.
    #[serde(rename = "insert-disk")]
    InsertDisk(InsertRequest),
    /// Take one out.
    #[serde(rename = "eject-disk")]
    EjectDisk(EjectRequest),
    /// End.
    Quit,
}

/// What is to be put into a drive.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InsertRequest {
    /// Absolute path of a raw image or block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Instead: absolute paths of files to be shown as partitions 1, 2, … of a read-only disk.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<PathBuf>,
    /// Whether the guest's writes are refused. Always true for `layers`.
    #[serde(default)]
    pub read_only: bool,
}

/// What is to be taken out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EjectRequest {
    /// Name of the drive, as [`Inserted`] had it.
    pub drive: String,
    /// The disk's own number, as [`Inserted`] had it: nothing happens to another one. Absent: whatever is in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub insertion: Option<u64>,
    /// Whether the drive stays empty from now on: for one whose guest has not let go of the disk, and may still hold back
    /// writes to it, which the next disk must not get.
    #[serde(default)]
    pub retire: bool,
}

/// An answer: a result or an error. A snapshot has one before with neither, when the guest goes on.
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
    /// There will be more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
}

/// How far something is that takes long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The guest goes on after having stood still for so long, in nanoseconds.
    pub pause_ns: u64,
}

/// How the machine is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// `running` or `paused`.
    pub state: String,
    /// The monitor's process id, in its own namespace: 1 in a jail.
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
    /// How many drives wait for a disk.
    #[serde(default)]
    pub empty_drives: usize,
    /// What the monitor knows of its jail.
    #[serde(default)]
    pub jail: Confinement,
}
