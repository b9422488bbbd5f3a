//! What is made before a container runs: disks, shares and network, the microVM, and the container in it.

use std::fs::File;
use std::num::NonZeroU64;
use std::path::PathBuf;

use bulkhead_protocol::agent::{
    ConfigureRequest, ContainerRequest, CreateContainerRequest, CreateContainerResponse, Empty, Filesystem,
    Rootfs, Stdio,
};
use vmm::config::{DiskConfig, LimitConfig};

use super::{Ask, Plan, Supervisor, cannot_start, ends_a_program};
use crate::guest::{self, Agent};
use crate::monitor::{Links, Monitor, Origin, Shape};
use crate::network::{self, Network, NetworkWish, Passt};
use crate::options::{RunOptions, StorageLimit};
use crate::relay::{Ends, Relay, Streams};
use crate::shares::Lifetime;
use crate::state::Record;
use crate::template::{self, Wanted};
use crate::{Context, Result, Settings, logs, scratch, shares, trace};

impl Supervisor {
    pub(super) fn boot(&mut self) -> Result<Monitor> {
        let shares = self.plan.shares.take();
        let Plan { layout, files, record, .. } = &self.plan;
        let copy = self.plan.copy.as_ref();
        let storage = record.options.storage.unwrap_or(self.plan.artefacts.settings.run.storage.0);
        let has_scratch = match copy {
            Some(copy) => copy.scratch(&files.scratch())?,
            None if storage > 0 => {
                scratch::create(layout, &files.scratch(), storage, scratch::Kind::Once)?;
                true
            }
            None => false,
        };
        if has_scratch {
            trace::mark("scratch disk made");
        }
        let mut disks = disks(&self.plan.layers, has_scratch.then(|| files.scratch()));
        limit(&mut disks, record.options.storage_limit);
        if let Some(shares) = shares {
            let path = files.shares_log();
            let log = File::create(&path).context(|| format!("cannot create {}", path.display()))?;
            self.server = Some(shares.start(Lifetime::Parent, &log)?);
            trace::mark("virtiofsd spawned");
        }
        let settings = &self.plan.artefacts.settings;
        let shape = copy.map_or_else(
            || Shape::new(record.options.memory, record.options.milli_cpus, &settings.machine),
            |copy| copy.saved.shape.clone(),
        );
        let links = links(record, settings)?;
        if let (Some(copy), NetworkWish::Namespace(namespace)) = (copy, &record.options.network) {
            links.network.can_follow(&copy.saved.record.given, namespace)?;
        }
        if record.options.network.is_some() {
            trace::mark("network joined");
        }
        let wanted =
            Wanted { shape: &shape, disks: &disks, shares: self.server.is_some(), networks: links.kinds() };
        let caller = &self.plan.caller;
        let mut attended = true;
        let mut given_up = || match caller.receive::<Ask>() {
            Some(Ask::Signal(signal)) => ends_a_program(signal),
            Some(Ask::Resize { .. }) => false,
            // A caller that is gone before the container runs takes it along, as with docker.
            None => {
                attended = false;
                true
            }
        };
        let origin = match copy {
            Some(copy) => Some(Origin::Snapshot(copy.machine())),
            None if record.options.no_template => None,
            None => template::get(layout, &self.plan.artefacts, &wanted, &caller.0, &mut given_up)?
                .map(Origin::Template),
        };
        let mut monitor = Monitor::start(
            &self.plan.artefacts,
            files,
            &shape,
            disks,
            self.server.as_mut(),
            &links,
            origin.as_ref(),
        )?;
        // The monitor has the descriptors now, and the taps are to end with it alone.
        drop(links.fds);
        self.network = links.network;
        self.plan.record.given.clone_from(&self.network);
        trace::mark("monitor spawned");
        self.plan.record.monitor_pid = monitor.pid();
        if !self.waits {
            self.plan.record.save(&self.plan.files)?;
        }
        monitor.wait_ready(&caller.0, &mut given_up)?;
        self.attended = attended;
        Ok(monitor)
    }

    pub(super) fn configure(&mut self, agent: &mut Agent) -> Result<()> {
        let request = ConfigureRequest {
            hostname: self.plan.hostname.clone(),
            shares: self.server.iter().map(|_| shares::TAG.to_owned()).collect(),
            network: self.plan.record.options.network.is_some().then(|| self.network.to_message()),
            ..ConfigureRequest::default()
        };
        let info = guest::configure(agent, request)?;
        self.plan.record.kernel = info.kernel_release.chars().filter(|c| !c.is_control()).take(64).collect();
        Ok(())
    }

    /// What the container's root is made of.
    pub(super) fn rootfs(&self) -> Rootfs {
        let Plan { record, layers, artefacts, .. } = &self.plan;
        let storage = record.options.storage.unwrap_or(artefacts.settings.run.storage.0);
        let writable = if storage > 0 {
            Filesystem { fstype: "ext4".into(), source: "/dev/vdb".into(), options: Vec::new() }
        } else {
            Filesystem { fstype: "tmpfs".into(), source: "tmpfs".into(), options: Vec::new() }
        };
        let erofs = |number| Filesystem {
            fstype: "erofs".into(),
            source: format!("/dev/vda{number}"),
            options: vec!["ro".into()],
        };
        Rootfs {
            layers: (1..=layers.len()).map(erofs).collect(),
            writable: Some(writable),
            ..Rootfs::default()
        }
    }

    pub(super) fn start_container(&mut self, agent: &mut Agent) -> Result<Relay> {
        let rootfs = self.rootfs();
        let Plan { record, spec, seccomp, files, ends, hostname, .. } = &mut self.plan;
        let options = &record.options;
        let stdio = Stdio { stdin: options.interactive, stdout: true, stderr: !options.tty };
        let request = CreateContainerRequest {
            id: record.id.clone(),
            spec: spec.to_string(),
            rootfs: Some(rootfs),
            stdio: Some(stdio),
            files: etc(hostname, options, &self.network)
                .into_iter()
                .filter(|file| !options.covers(&file.path))
                .collect(),
            pause: false,
            disks: Vec::new(),
            seccomp: seccomp.take(),
        };
        let _: CreateContainerResponse = agent.call("CreateContainer", &request).map_err(cannot_start)?;
        trace::mark("container created");
        let streams = Streams::connect(&self.guest, &record.id, "", &stdio, options.tty)?;
        trace::mark("streams connected");
        let ends = Ends { log: Some(logs::Writer::create(&files.log())?), ..std::mem::take(ends) };
        let start = ContainerRequest { container: record.id.clone() };
        let relay = Relay::start(streams, ends)?;
        let _: Empty = agent.call("StartContainer", &start).map_err(cannot_start)?;
        Ok(relay)
    }
}

/// The disks of a machine: the image's layers as one, and what the container writes to.
pub(crate) fn disks(layers: &[PathBuf], scratch: Option<PathBuf>) -> Vec<DiskConfig> {
    let layers =
        DiskConfig { id: "layers".into(), read_only: true, layers: layers.to_vec(), ..DiskConfig::default() };
    let scratch = scratch.map(|path| DiskConfig {
        id: "scratch".into(),
        read_only: false,
        path: Some(path),
        ..DiskConfig::default()
    });
    [layers].into_iter().chain(scratch).collect()
}

/// Limits what the guest may have them do.
fn limit(disks: &mut [DiskConfig], limit: StorageLimit) {
    let (bytes_per_second, requests_per_second) =
        (NonZeroU64::new(limit.bytes), NonZeroU64::new(limit.requests));
    let limit = LimitConfig { bytes_per_second, requests_per_second };
    if limit != LimitConfig::default() {
        disks.iter_mut().for_each(|disk| disk.limit = Some(limit));
    }
}

/// Joins the network that was wished for.
fn links(record: &Record, settings: &Settings) -> Result<Links> {
    match &record.options.network {
        NetworkWish::None => Ok(Links::default()),
        NetworkWish::Namespace(namespace) => {
            let attachment = network::attach(namespace, &record.id)?;
            Ok(Links { network: attachment.network, fds: attachment.taps, ..Links::default() })
        }
        NetworkWish::Passt => {
            let passt = Passt::start(&record.options.publish, &settings.programs.passt)?;
            Ok(Links { network: passt.network, fds: vec![passt.socket], ..Links::default() })
        }
    }
}

/// The files in `/etc` that every container gets; a name server only where there is a network to ask it by.
fn etc(hostname: &str, options: &RunOptions, network: &Network) -> Vec<bulkhead_protocol::agent::File> {
    let file = |path: &str, content: String| bulkhead_protocol::agent::File {
        path: path.into(),
        mode: 0o644,
        content: content.into_bytes(),
    };
    let mut files = vec![
        file("/etc/hostname", format!("{hostname}\n")),
        file("/etc/hosts", network::hosts(hostname, network)),
    ];
    let servers = match options.network {
        NetworkWish::Passt if options.dns.is_empty() => Passt::name_servers(),
        _ => options.dns.clone(),
    };
    let namespace = match &options.network {
        NetworkWish::Namespace(namespace) => Some(namespace),
        _ => None,
    };
    if options.network.is_some() || !servers.is_empty() {
        files.push(file("/etc/resolv.conf", network::resolv_conf(&servers, namespace)));
    }
    files
}
