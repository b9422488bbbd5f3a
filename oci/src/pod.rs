//! Containers that share a microVM: one whose network namespace is that of a container with a microVM joins it there.
//! `podman pod`, `docker run --network container:NAME` and Kubernetes' pods are all of this form.
//!
//! The machine is the first container's and ends with it. The others have a root, files, a cgroup and streams of their
//! own. Which of the first one's namespaces they are in besides the network is as their configuration says.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_protocol::agent::{
    ContainerRequest, Empty, ProcessRequest, SignalProcessRequest, WaitProcessResponse,
};
use bulkhead_runtime::drives;
use bulkhead_runtime::guest::{Agent, Guest};
use bulkhead_runtime::shares::Living;
use bulkhead_runtime::{Context, Error, Result};
use rustix::thread::LinkNameSpaceType;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::{Bundle, Wanted};
use crate::store::{Container, ProcessId, Root};

/// How long the guest may take for each step of removing a container.
const PATIENCE: Duration = Duration::from_secs(10);

/// A kind of namespace that containers of one guest can share, besides the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// System V IPC, POSIX message queues.
    Ipc,
    /// Host name.
    Uts,
    /// Process ids.
    Pid,
}

/// A namespace of the host's that the configuration names: it stands for one in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    /// Its kind.
    pub kind: Kind,
    /// `/proc/PID/ns/…`, or where that is mounted.
    pub path: PathBuf,
}

/// Who has the machine that a container runs in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// The container whose machine it is.
    pub owner: String,
    /// Its sandbox: the machine ends with it.
    pub sandbox: ProcessId,
    /// Its directory of sockets.
    pub run: PathBuf,
    /// The file server of the machine, if it has one.
    pub server: Option<ProcessId>,
}

/// A namespace of another container in the guest.
#[derive(Clone, Debug)]
pub struct Partner {
    joined: Joined,
    container: String,
}

/// The machine that a container is to join, and how.
#[derive(Debug)]
pub struct Shared {
    /// Whose it is.
    pub pod: Pod,
    /// Its memory.
    pub machine_mib: u32,
    /// Namespaces of its containers.
    pub partners: Vec<Partner>,
}

impl Kind {
    /// The kind with this name in config.json.
    pub fn of(name: &str) -> Option<Self> {
        [Self::Ipc, Self::Uts, Self::Pid].into_iter().find(|kind| kind.name() == name)
    }

    /// Its name, in config.json and below `/proc/PID/ns`.
    fn name(self) -> &'static str {
        match self {
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Pid => "pid",
        }
    }

    /// For `setns(2)`.
    fn link_type(self) -> LinkNameSpaceType {
        match self {
            Self::Ipc => LinkNameSpaceType::InterProcessCommunication,
            Self::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            Self::Pid => LinkNameSpaceType::ProcessID,
        }
    }
}

impl Partner {
    /// The entry of `linux.namespaces` for the agent.
    pub fn namespace(&self) -> Value {
        json!({"type": self.joined.kind.name(), "path": format!("container:{}", self.container)})
    }

    /// Opens the host's namespace that stands for it, for the container's stand-in to be in.
    ///
    /// # Errors
    /// It has gone.
    pub fn open(&self) -> Result<(LinkNameSpaceType, fs::File)> {
        let path = &self.joined.path;
        let file =
            fs::File::open(path).context(|| format!("cannot open the namespace {}", path.display()))?;
        Ok((self.joined.kind.link_type(), file))
    }
}

impl Pod {
    /// The file server.
    ///
    /// # Errors
    /// It has ended, and the machine with it; or there never was one.
    pub fn shares(&self) -> Result<Living> {
        let server = self.server.ok_or_else(|| {
            Error::Usage(format!(
                "the microVM of container {}, which is joined, has no file server for others: its own has all of its files \
                 on disks",
                self.owner
            ))
        })?;
        let living = Living::find(server.pid, &self.run)?;
        if server.lives() { Ok(living) } else { Err(self.ended()) }
    }

    /// What to say when the machine has gone.
    pub fn ended(&self) -> Error {
        Error::Monitor(format!("the microVM of container {} has ended", self.owner))
    }
}

/// The machine that a container is to join, if its configuration names a namespace of a container that has one.
///
/// # Errors
/// It names namespaces of containers in two machines, or of nobody's, or the machine is not made yet.
pub fn find(root: &Root, bundle: &Bundle) -> Result<Option<Shared>> {
    let Wanted::Existing(network) = &bundle.network else {
        return match bundle.joined.first() {
            Some(joined) => Err(alone(joined)),
            None => Ok(None),
        };
    };
    let living = living(root)?;
    let Some(network) = find_in(&living, &network.path(), "net") else {
        return match bundle.joined.first() {
            Some(joined) => Err(alone(joined)),
            None => Ok(None),
        };
    };
    let owner_id = network.pod.as_ref().map_or(&network.id, |pod| &pod.owner);
    let owner = living.iter().find(|container| container.id == *owner_id);
    let owner = owner.filter(|owner| owner.up).ok_or_else(|| {
        Error::Usage(format!(
            "the network is that of container {}, which has no microVM to join {}",
            network.id,
            if owner.is_some() { "before it is started" } else { "any more" }
        ))
    })?;
    let mut partners = Vec::new();
    for joined in &bundle.joined {
        let container = find_in(&living, &joined.path, joined.kind.name());
        let container = container
            .filter(|container| container.pod.as_ref().map_or(&container.id, |pod| &pod.owner) == owner_id);
        let container = container.ok_or_else(|| alone(joined))?;
        partners.push(Partner { joined: joined.clone(), container: container.in_guest() });
    }
    let sandbox = ProcessId { pid: owner.sandbox, start: owner.sandbox_start };
    let pod = Pod { owner: owner.id.clone(), sandbox, run: owner.run.clone(), server: owner.server };
    Ok(Some(Shared { pod, machine_mib: owner.machine_mib, partners }))
}

fn alone(joined: &Joined) -> Error {
    Error::Usage(format!(
        "linux.namespaces: the {} namespace {} cannot be joined: it belongs to another kernel, unless it is that of a \
         container in a microVM whose network is joined, too (`--network container:NAME`)",
        joined.kind.name(),
        joined.path.display()
    ))
}

fn living(root: &Root) -> Result<Vec<Container>> {
    let all = root.ids()?.into_iter().filter_map(|id| root.load(&id).ok());
    Ok(all.filter(Container::lives).collect())
}

/// The containers that run in the machine of the container `owner`, besides that.
///
/// # Errors
/// The states cannot be read.
pub fn guests_of(root: &Root, owner: &str) -> Result<Vec<String>> {
    let is_guest = |container: &Container| container.pod.as_ref().is_some_and(|pod| pod.owner == owner);
    Ok(living(root)?.into_iter().filter(is_guest).map(|container| container.id).collect())
}

/// The container whose namespace `path` is. Of several the first, which the others have joined.
fn find_in<'a>(living: &'a [Container], path: &Path, kind: &str) -> Option<&'a Container> {
    let identity = |path: &Path| fs::metadata(path).map(|about| (about.dev(), about.ino())).ok();
    let wanted = identity(path)?;
    let has = |container: &&Container| {
        identity(Path::new(&format!("/proc/{}/ns/{kind}", container.pid))) == Some(wanted)
    };
    let mut found: Vec<_> = living.iter().filter(has).collect();
    found.sort_by_key(|container| container.pod.is_some());
    found.first().copied()
}

/// Takes a container out of a machine that it shares, however far it has come. Nothing happens to one that has none
/// to share.
pub fn leave(container: &Container) {
    let Some(pod) = container.pod.as_ref().filter(|pod| pod.sandbox.lives()) else { return };
    // First on the host: the guest then finds nothing when it asks again, and lets go of what it remembers.
    if let Ok(shares) = pod.shares() {
        let _ = shares.part(&prefix(container));
    }
    let mut agent = Guest::new(&container.vsock()).agent().ok();
    if let Some(agent) = &mut agent {
        remove(agent, container);
    }
    let deadline = Instant::now() + drives::PATIENCE;
    for drive in &container.drives {
        let released = agent.as_mut().is_some_and(|agent| drive.release(agent, deadline));
        // The machine may have ended meanwhile, and its drives with it.
        let _ = drive.eject(&container.control(), released);
    }
}

/// Ends the container in the guest, and takes its files away there.
fn remove(agent: &mut Agent, container: &Container) {
    let id = container.in_guest();
    let target = ProcessRequest { container: id.clone(), exec: String::new(), bound: false };
    // A guest may say nothing, and nobody has to wait for it.
    let _ = agent.stream().set_read_timeout(Some(PATIENCE));
    let signal = libc::SIGKILL.unsigned_abs();
    let kill = SignalProcessRequest { container: id.clone(), exec: String::new(), signal, all: true };
    // A container that has gone already answers each of them with an error.
    if agent.call::<Empty>("SignalProcess", &kill).is_ok() {
        let _ = agent.call::<WaitProcessResponse>("WaitProcess", &target);
        let _ = agent.call::<Empty>("DeleteContainer", &ContainerRequest { container: id });
    }
}

/// What the names of a container's shares begin with.
pub fn prefix(container: &Container) -> String {
    container.run.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
