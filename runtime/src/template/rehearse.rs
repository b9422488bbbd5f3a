//! The rehearsal: before a guest becomes a template, its agent sets up and takes down a container of nothing.
//!
//! What a kernel and an agent do for the first time costs more than ever after: slabs and per-processor memory are made,
//! pages of code that programs of its own are compiled into, hash chains, the agent's heap. All of it happens here once instead of in
//! every container that starts from the template. Nothing of the container is left: it has no program, no network, no
//! secret, and the name it has no container can have.

use std::thread;
use std::time::Duration;

use bulkhead_protocol::agent::{
    ContainerRequest, CreateContainerRequest, CreateContainerResponse, Empty, Filesystem, ProcessRequest,
    Rootfs, SignalProcessRequest, WaitProcessResponse,
};
use serde_json::Value;

use crate::guest::Guest;
use crate::options::RunOptions;
use crate::spec::{self, ProcessUser};
use crate::state::Files;
use crate::{Context, Result, seccomp};

/// How long the agent may take for one step.
const PATIENCE: Duration = Duration::from_secs(30);
/// What the guest's kernel puts off (namespaces and groups that have ended go away after its next grace periods) is done after
/// so long. If it is not, the machines that go on from the template do it.
const SETTLED: Duration = Duration::from_millis(100);
/// Longer than an id of `bulkhead run`, so that it is nobody's.
const ID: &str = "rehearsal";

/// What `bulkhead run` would ask for with an image of nothing.
fn wish(options: &RunOptions) -> Value {
    let root = ProcessUser { uid: 0, gid: 0, additional_gids: Vec::new(), home: "/".into() };
    let command = ["true".to_owned()];
    let process = spec::process(&root, &command, &[], "/", None, &spec::capabilities(options), options);
    spec::container(options, process, ID, ID, &[])
}

/// Lets the agent of the guest in `files` have its rehearsal. `lower`: layers that are below the container's tmpfs; of what is
/// in them nothing runs.
///
/// # Errors
/// The agent refuses a step or does not answer.
pub(crate) fn rehearse(files: &Files, lower: Vec<Filesystem>) -> Result<()> {
    let what = || "cannot rehearse a container before the template is saved".to_owned();
    let mut agent = Guest::new(&files.vsock()).agent()?;
    agent.stream().set_read_timeout(Some(PATIENCE)).context(what)?;
    let tmpfs = || Filesystem { fstype: "tmpfs".into(), source: "tmpfs".into(), options: Vec::new() };
    let layers = if lower.is_empty() { vec![tmpfs()] } else { lower };
    let options = RunOptions::default();
    let create = CreateContainerRequest {
        id: ID.into(),
        spec: wish(&options).to_string(),
        seccomp: seccomp::filter(&options)?,
        rootfs: Some(Rootfs { layers, writable: Some(tmpfs()), ..Rootfs::default() }),
        stdio: None,
        files: Vec::new(),
        disks: Vec::new(),
        pause: true,
    };
    let container = ContainerRequest { container: ID.into() };
    let process = ProcessRequest { container: ID.into(), exec: String::new(), bound: false };
    let end = SignalProcessRequest {
        container: ID.into(),
        signal: libc::SIGTERM.unsigned_abs(),
        ..SignalProcessRequest::default()
    };
    let _: CreateContainerResponse = agent.call("CreateContainer", &create).context(what)?;
    let _: Empty = agent.call("StartContainer", &container).context(what)?;
    let _: Empty = agent.call("SignalProcess", &end).context(what)?;
    let _: WaitProcessResponse = agent.call("WaitProcess", &process).context(what)?;
    let _: Empty = agent.call("DeleteContainer", &container).context(what)?;
    drop(agent);
    thread::sleep(SETTLED);
    Ok(())
}
