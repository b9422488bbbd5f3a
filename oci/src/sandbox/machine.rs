//! The microVM of a sandbox: one of its own, or that of the container whose pod it is in.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_protocol::agent::{ConfigureRequest, Rootfs, ShutdownRequest};
use bulkhead_runtime::drives::{self, Drive};
use bulkhead_runtime::guest::{self, Agent, Guest};
use bulkhead_runtime::monitor::{Links, Monitor, Origin};
use bulkhead_runtime::network::{self, Network};
use bulkhead_runtime::shares::{self, Lifetime, More, Server, Shares};
use bulkhead_runtime::template::{self, Wanted};
use bulkhead_runtime::terminal::Signals;
use bulkhead_runtime::{Context, Error, Layout, Result, trace};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;

use super::{Plan, is_fatal, tag};
use crate::checkpoint::Fittings;
use crate::config::{Bundle, Root};
use crate::pod::{self, Pod};
use crate::store::{Container, ProcessId};

/// A machine with its agent up and the container's files in it.
pub(super) enum Machine {
    /// It ends with this sandbox.
    Own {
        /// Runs it.
        monitor: Monitor,
        /// Serves the files; ends with us. None, when there are none of the host's.
        server: Option<Server>,
        /// Holds the disk of the root, so that the host does not mount it.
        disk: Option<File>,
    },
    /// It ends with another.
    Joined {
        /// Readable when that has ended.
        owner: OwnedFd,
        /// What to say then.
        pod: Pod,
        /// As above.
        disk: Option<File>,
    },
}

/// A machine, and what is in it.
pub(super) struct Made {
    pub machine: Machine,
    /// The root file system in the guest's words.
    pub root: Rootfs,
    /// The configuration for the agent.
    pub spec: Value,
    /// What it was made with, when it is one's own.
    pub fittings: Option<Fittings>,
}

impl Machine {
    /// From nothing, or from a checkpoint, to a guest whose agent has been told who it is.
    pub(super) fn make(plan: &Plan, guest: &Guest, signals: &Signals) -> Result<Made> {
        let Plan { files, bundle, container, artefacts, checkpoint, .. } = plan;
        let checkpoint = checkpoint.as_ref();
        let mut shares = Shares::new(&files.run, &artefacts.settings)?;
        let mut disks = bundle.disks();
        let devices = (0..disks.len()).map(drives::device).collect::<Result<Vec<_>>>()?;
        let (root, spec) = bundle.share(|path, access| shares.add(path, access), &[], &devices)?;
        let mut links = Links::default();
        if let Some(namespace) = &container.network {
            let attachment = network::attach(namespace, &tag(files))?;
            (links.network, links.fds) = (attachment.network, attachment.taps);
            if let Some(checkpoint) = checkpoint {
                links.network.can_follow(&checkpoint.saved.fittings.network, namespace)?;
            }
        }
        let machine = &artefacts.settings.machine;
        let shape = match checkpoint {
            Some(checkpoint) => checkpoint.saved.shape(),
            None => bundle.shape(machine)?,
        };
        let disk = bundle.root_disk.as_ref().map(Root::hold).transpose()?;
        let needs_shares = bundle.needs_shares();
        let wished = match checkpoint {
            Some(checkpoint) => checkpoint.saved.fittings.drives,
            None if bundle.may_be_joined() => machine.spare_drives,
            None => 0,
        };
        let spare = drives::spare(wished, disks.len(), links.fds.len() + usize::from(needs_shares));
        let name_server = container.network.as_ref().zip(bundle.name_server());
        let fittings = Fittings {
            shares: bundle.shares(),
            network: links.network.clone(),
            name_server: name_server.is_some(),
            drives: u8::try_from(spare.len()).unwrap_or(0),
        };
        disks.extend(spare);
        // Before this process is in the container's cgroup: making one is not the container's affair.
        let wanted = Wanted { shape: &shape, disks: &disks, shares: needs_shares, networks: links.kinds() };
        let layout = Layout::new(None, &artefacts.settings.paths)?;
        let given_up = || std::iter::from_fn(|| signals.next()).any(is_fatal);
        let origin = match checkpoint {
            Some(checkpoint) => Some(Origin::Snapshot(checkpoint.machine())),
            None => template::get(&layout, artefacts, &wanted, signals, given_up)?.map(Origin::Template),
        };
        if let Some(group) = &container.cgroup {
            // Engines forget to allow the devices that a machine is made of, and nothing in the group may open them then:
            // /dev/net/tun has been opened above. If this one does not open, the monitor says why.
            links.kvm = File::options().read(true).write(true).open("/dev/kvm").ok().map(OwnedFd::from);
            group.add(container.sandbox)?;
            trace::mark("cgroup joined");
        }
        if let Some((namespace, server)) = name_server {
            network::names::serve(namespace, server, &files.names())?;
        }
        let path = files.shares_log();
        let log = File::create(&path).context(|| format!("cannot create {}", path.display()))?;
        let mut server = needs_shares.then(|| shares.start(Lifetime::Parent, &log)).transpose()?;
        trace::mark("virtiofsd spawned");
        let mut monitor =
            Monitor::start(artefacts, files, &shape, disks, server.as_mut(), &links, origin.as_ref())?;
        (links.fds, links.kvm) = (Vec::new(), None);
        trace::mark("monitor spawned");
        monitor.wait_ready(signals, given_up)?;
        trace::mark("agent up");
        let mut agent = guest.agent()?;
        let name_server = name_server.map(|(_, server)| server);
        match checkpoint {
            None => {
                let tags = server.iter().map(|_| shares::TAG.to_owned()).collect();
                configure(&mut agent, bundle, tags, &links.network, name_server)?;
            }
            Some(checkpoint) => {
                let before = &checkpoint.saved.fittings;
                // One that stands for a name server does so still.
                let new = name_server.filter(|_| !before.name_server);
                guest::reconfigure(&mut agent, &before.network, &links.network, octets(new))?;
            }
        }
        Ok(Made { machine: Self::Own { monitor, server, disk }, root, spec, fittings: Some(fittings) })
    }

    /// Into the machine of another container.
    pub(super) fn join(plan: &mut Plan, pod: Pod) -> Result<Made> {
        let what = || pod.ended();
        let owner = Pid::from_raw(pod.sandbox.pid)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
            .filter(|_| pod.sandbox.lives())
            .ok_or_else(what)?;
        let (disk, devices) = insert_disks(plan, &pod)?;
        let Plan { bundle, container, .. } = plan;
        let mut more = More::new(&pod::prefix(container));
        let (root, spec) = bundle.share(|path, access| more.add(path, access), &plan.partners, &devices)?;
        if let Some(group) = &container.cgroup {
            group.add(container.sandbox)?;
        }
        if bundle.needs_shares() {
            more.join(&pod.shares()?)?;
        }
        Ok(Made { machine: Self::Joined { owner, pod, disk }, root, spec, fittings: None })
    }

    /// Readable when the machine has ended.
    pub(super) fn end(&self) -> BorrowedFd<'_> {
        match self {
            Self::Own { monitor, .. } => monitor.ended(),
            Self::Joined { owner, .. } => owner.as_fd(),
        }
    }

    /// The file server of one's own machine.
    pub(super) fn server(&self) -> Option<ProcessId> {
        match self {
            Self::Own { server, .. } => ProcessId::of(server.as_ref()?.pid().cast_signed()),
            Self::Joined { .. } => None,
        }
    }

    /// Why it has ended.
    pub(super) fn last_words(&mut self, what: &str) -> String {
        match self {
            Self::Own { monitor, .. } => monitor.last_words(what),
            Self::Joined { pod, .. } => {
                format!("{what}: it was that of container {}, which has ended", pod.owner)
            }
        }
    }

    /// See [`Monitor::teach_template`]; a machine of another's is taught by its owner.
    pub(super) fn teach_template(&self) {
        if let Self::Own { monitor, .. } = self {
            monitor.teach_template();
        }
    }

    /// Ends one's own machine with its writes on the host's disk, or leaves that of another. Answers the monitor's
    /// timeline, if one was asked for.
    pub(super) fn put_away(self, guest: &Guest, container: &Container) -> Option<Value> {
        let (mut monitor, server, disk) = match self {
            Self::Own { monitor, server, disk } => (monitor, server, disk),
            Self::Joined { disk, .. } => {
                pod::leave(container);
                drop(disk);
                return None;
            }
        };
        let timeline = trace::enabled().then(|| monitor.timeline()).flatten();
        if let Ok(mut agent) = guest.agent() {
            // Pages that were written through shared mappings are still in the guest's memory.
            let _ = agent.send("Shutdown", &ShutdownRequest { status: 0, sync: true });
            monitor.end();
        }
        trace::mark("monitor ended");
        drop((monitor, server, disk));
        trace::mark("virtiofsd ended");
        timeline
    }
}

/// Puts the container's disks into drives of the machine that it joins. Answers the guest's names for them, and what holds the
/// root's. A root for which there are not enough drives becomes a directory.
fn insert_disks(plan: &mut Plan, pod: &Pod) -> Result<(Option<File>, Vec<String>)> {
    let held = plan.bundle.root_disk.as_ref().map(Root::hold).transpose()?;
    let Some(missed) = insert_all(plan)? else {
        let devices = plan.container.drives.iter().map(Drive::device).collect::<Result<_>>()?;
        return Ok((held, devices));
    };
    let Plan { bundle, log, .. } = plan;
    let none = format!(
        "the microVM of container {}, which is joined, has no drive left (machine.spare_drives in the configuration)",
        pod.owner
    );
    let missed = bundle.name_of_disk(missed);
    let Some(root) = bundle.root_disk.take_if(|_| pod.server.is_some()) else {
        return Err(Error::Usage(format!("{none} for {missed}")));
    };
    log.warn(&format!("{none}: the root file system is mounted here and shared with it"));
    // Who holds it is in the way of who mounts it.
    drop(held);
    root.mount(&bundle.rootfs)?;
    insert_disks(plan, pod)
}

/// Answers the number of the disk for which there was no drive; none is in one then.
fn insert_all(plan: &mut Plan) -> Result<Option<usize>> {
    let Plan { root, bundle, container, .. } = plan;
    let control = container.control();
    for (number, disk) in bundle.disks().into_iter().enumerate() {
        match drives::insert(&control, disk)? {
            Some(drive) => container.drives.push(drive),
            None => {
                // The guest knows nothing of them yet.
                container.drives.drain(..).try_for_each(|drive| drive.eject(&control, true))?;
                return Ok(Some(number));
            }
        }
        // Whoever removes the container has to know.
        root.save(container)?;
    }
    Ok(None)
}

fn configure(
    agent: &mut Agent,
    bundle: &Bundle,
    shares: Vec<String>,
    network: &Network,
    name_server: Option<Ipv4Addr>,
) -> Result<()> {
    let request = ConfigureRequest {
        hostname: bundle.hostname.clone(),
        shares,
        network: Some(network.to_message()),
        name_server: octets(name_server),
        ..ConfigureRequest::default()
    };
    guest::configure(agent, request).map(drop)
}

/// The agent's form of an address.
fn octets(address: Option<Ipv4Addr>) -> Vec<u8> {
    address.map_or_else(Vec::new, |address| address.octets().to_vec())
}
