//! The monitor's process: its configuration, its start, and what it has to say when it does not go well.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmm::config::{
    BootConfig, Config, ConsoleConfig, EmptyNetwork, JailConfig, MachineConfig, NetworkConfig, VsockConfig,
};
pub use vmm::config::{DiskConfig, MAX_LAYERS};
use vmm::control::Method;
use vmm::error::{STATUS_IO, STATUS_OS};
use vmm::snapshot::working_set::WORKING_SET;

use crate::jail::{Cell, Process, Spawn};
use crate::network::Network;
use crate::settings;
use crate::shares::Server;
use crate::state::Files;
use crate::template::Template;
use crate::{Artefacts, Context, Error, Result, null, trace};

/// What the guest's kernel and agent need beside the container, in MiB.
const OVERHEAD_MIB: u64 = 64;
/// Open files that a monitor has at most while its guest uses no streams, and some more.
const DESCRIPTORS: u64 = 96;
/// How long a monitor may take to end once told to.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// How much of a monitor's words is shown, in bytes.
const SHOWN: usize = 8 << 10;

/// The guest's kernel command line; kernel-config/README.md says what each word is worth. Of the initcalls it finds
/// costly, only `/sys/kernel/slab` is left out: somebody may want `/sys/module/*/parameters`.
/// The driver of dummy interfaces would make one in the network that containers see.
const CMDLINE: &str = "console=hvc0 quiet panic=-1 reboot=k noreplace-smp initcall_blacklist=slab_late_init \
    dummy.numdummies=0";

/// Sizes of the kernel's tables of names and inodes, an eighth of what it would make them: each new name goes to another page of
/// them, and the first touches of 128 pages are 3 ms of a container's start in the emulated host. With 20,000 names in
/// use and 512 MiB, a place in the table has two or three.
fn hash_tables(memory_mib: u32) -> String {
    let names = (u64::from(memory_mib) * 16).next_power_of_two();
    format!("dhash_entries={names} ihash_entries={}", names / 2)
}

/// The shape of a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shape {
    /// Virtual processors, 1 to 32.
    pub vcpus: u8,
    /// MiB.
    pub memory_mib: u32,
}

impl Shape {
    /// Room for a container with these limits; what the settings say where it has none.
    pub fn new(memory: Option<u64>, milli_cpus: Option<u64>, default: &settings::Machine) -> Self {
        let memory = memory.map_or(default.memory.0 >> 20, |bytes| {
            // The kernel's own tables grow with memory: 64 bytes for each page, and some.
            let mib = bytes.div_ceil(1 << 20);
            mib + OVERHEAD_MIB + mib / 32
        });
        Self {
            vcpus: u8::try_from(milli_cpus.map_or(default.vcpus.into(), |cpus| cpus.div_ceil(1000)))
                .unwrap_or(u8::MAX)
                .max(1),
            memory_mib: u32::try_from(memory).unwrap_or(u32::MAX),
        }
    }
}

/// The guest's network, and what the monitor connects its interfaces to: one descriptor each, in order.
#[derive(Default)]
pub struct Links {
    /// For the agent.
    pub network: Network,
    /// For the monitor.
    pub fds: Vec<OwnedFd>,
    /// `/dev/kvm`, for a monitor that may not open it.
    pub kvm: Option<OwnedFd>,
}

impl Links {
    fn configs(&self) -> Vec<NetworkConfig> {
        let both = self.network.interfaces.iter().zip(&self.fds);
        both.map(|(interface, fd)| NetworkConfig {
            tap: None,
            fd: Some(fd.as_raw_fd()),
            socket: None,
            empty: None,
            mac: Some(interface.mac.clone()),
            mtu: u16::try_from(interface.mtu).unwrap_or(u16::MAX),
        })
        .collect()
    }

    /// What the interfaces are connected to: passt's socket, or taps.
    pub fn kinds(&self) -> Vec<EmptyNetwork> {
        let is_socket = |fd: &OwnedFd| {
            rustix::fs::fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket)
        };
        self.fds
            .iter()
            .map(|fd| if is_socket(fd) { EmptyNetwork::Stream } else { EmptyNetwork::Tap })
            .collect()
    }
}

/// A machine of this shape, whose devices are still to be added.
pub(crate) fn outline(artefacts: &Artefacts, files: &Files, shape: &Shape) -> Config {
    Config {
        machine: MachineConfig { vcpus: shape.vcpus, memory_mib: shape.memory_mib, kvm_fd: None },
        boot: Some(BootConfig {
            kernel: artefacts.kernel.clone(),
            initramfs: Some(artefacts.initramfs.clone()),
            cmdline: format!(
                "{CMDLINE} {} {}",
                hash_tables(shape.memory_mib),
                artefacts.settings.machine.kernel_parameters
            )
            .trim_end()
            .to_owned(),
        }),
        restore: None,
        disks: Vec::new(),
        filesystems: Vec::new(),
        networks: Vec::new(),
        vsock: Some(VsockConfig { cid: 3, socket: files.vsock() }),
        rng: true,
        console: ConsoleConfig::default(),
        serial: None,
        control: Some(files.control()),
        ready: None,
        report: Some(files.report()),
        jail: JailConfig::default(),
    }
}

/// What a machine goes on from instead of booting.
#[derive(Debug, Clone)]
pub enum Origin {
    /// One that had just booted.
    Template(Template),
    /// Somebody's snapshot, in this directory.
    Snapshot(PathBuf),
}

impl Origin {
    fn directory(&self) -> &Path {
        match self {
            Self::Template(template) => &template.directory,
            Self::Snapshot(directory) => directory,
        }
    }
}

/// A monitor under way.
pub struct Monitor {
    child: Process,
    /// What it has been given of its jail. Its user is another's only when it has ended.
    _cell: Cell,
    files: Files,
    /// What it goes on from.
    origin: Option<Origin>,
    /// Where the agent calls when it is up.
    pub ready: UnixListener,
    /// How long the guest may take to boot.
    patience: Duration,
    /// It did not end by itself.
    given_up: bool,
    discarded: bool,
}

/// A monitor inherits the limit of open files. One that is too low would show when nobody can connect to it any more.
fn enough_descriptors() -> Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= DESCRIPTORS) {
        return Ok(());
    }
    if maximum.is_none_or(|maximum| maximum >= DESCRIPTORS) {
        let wanted = Rlimit { current: Some(DESCRIPTORS), maximum };
        return setrlimit(Resource::Nofile, wanted).context(|| "cannot raise the limit of open files".into());
    }
    let most = maximum.unwrap_or_default();
    Err(Error::Usage(format!(
        "a process may have {most} open files here, and the monitor of a microVM takes up to {DESCRIPTORS}: raise the limit \
         (`ulimit -n 1024`)"
    )))
}

impl Monitor {
    /// Starts the monitor of a sandbox; the guest boots while the caller does other things. With an origin, which must be
    /// a machine of the same shape and devices, it goes on from there instead.
    pub fn start(
        artefacts: &Artefacts,
        files: &Files,
        shape: &Shape,
        disks: Vec<DiskConfig>,
        shares: Option<&mut Server>,
        links: &Links,
        origin: Option<&Origin>,
    ) -> Result<Self> {
        enough_descriptors()?;
        let mut config = outline(artefacts, files, shape);
        config.machine.kvm_fd = links.kvm.as_ref().map(AsRawFd::as_raw_fd);
        config.disks = disks;
        config.filesystems = shares.iter().filter_map(|server| server.filesystem()).collect();
        config.networks = links.configs();
        if let Some(origin) = origin {
            config.boot = None;
            config.restore = Some(origin.directory().to_owned());
            config.ready = Some(files.ready());
        }
        let connection = shares.iter().filter_map(|server| server.connection());
        let inherited =
            links.fds.iter().chain(&links.kvm).map(AsRawFd::as_raw_fd).chain(connection).collect();
        let mut monitor = Self::spawn(artefacts, files, config, inherited)?;
        if let Some(server) = shares {
            server.handed_over();
        }
        monitor.origin = origin.cloned();
        Ok(monitor)
    }

    /// Starts a monitor with this configuration, in its jail. It inherits these descriptors.
    pub(crate) fn spawn(
        artefacts: &Artefacts,
        files: &Files,
        mut config: Config,
        mut inherited: Vec<RawFd>,
    ) -> Result<Self> {
        let settings = &artefacts.settings;
        let cell = Cell::new(&settings.isolation, &settings.paths.run, files)?;
        config.jail = cell.config();
        inherited.push(cell.fd());
        let path = files.monitor_config();
        let text = serde_json::to_vec_pretty(&config)
            .context(|| "cannot encode the monitor's configuration".into())?;
        fs::write(&path, text).context(|| format!("cannot write {}", path.display()))?;
        let ready = UnixListener::bind(files.ready())
            .context(|| format!("cannot listen on {}", files.ready().display()))?;
        cell.open(files, &[&files.ready(), &files.names()])?;
        let program = &artefacts.monitor;
        let what = || format!("cannot start the monitor {}", program.display());
        let log = File::create(files.monitor_log()).context(what)?;
        let null = null::file().context(what)?;
        let spawn = Spawn {
            program,
            arguments: vec!["--config".into(), path.into(), "--die-with-parent".into()],
            streams: [null.as_fd(), log.as_fd(), log.as_fd()],
            inherited,
            namespaces: cell.namespaces(),
            prepare: None,
        };
        let child = spawn.start().context(what)?;
        let patience = Duration::from_secs(settings.machine.boot_timeout.into());
        Ok(Self {
            child,
            _cell: cell,
            files: files.clone(),
            origin: None,
            ready,
            patience,
            given_up: false,
            discarded: false,
        })
    }

    /// Readable when it has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.child.as_fd()
    }

    /// Lets machines that start from the same template later have at once what this one has written to until now, if it is the
    /// first of them whose container runs.
    pub fn teach_template(&self) {
        let Some(Origin::Template(template)) = &self.origin else { return };
        if template.directory.join(WORKING_SET).exists() {
            return;
        }
        // They start without it, too.
        let _ = vmm::control::Client::connect(&self.files.control())
            .and_then(|mut client| client.record_working_set(&template.directory));
        trace::mark("template taught");
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the agent's call. `given_up` is asked whenever `interrupt` is readable.
    pub fn wait_ready(&mut self, interrupt: &impl AsFd, mut given_up: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Monitor(self.silence()));
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [
                PollFd::new(&self.ready, PollFlags::IN),
                PollFd::new(&self.child, PollFlags::IN),
                PollFd::new(interrupt, PollFlags::IN),
            ];
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno).context(|| "cannot wait for the guest".into()),
            }
            let [ready, ended, interrupted] = fds.map(|fd| !fd.revents().is_empty());
            if ready {
                self.ready.accept().context(|| "cannot hear the agent".into())?;
                // It calls once. Whoever in the guest calls later finds nobody, rather than connections that nobody accepts.
                let _ = fs::remove_file(self.files.ready());
                return Ok(());
            }
            if ended {
                let happened = match self.origin.take() {
                    None => "the microVM ended before its agent was up".to_owned(),
                    // They say nothing about the template.
                    Some(Origin::Template(_)) if self.was_killed() => {
                        "the microVM was killed before its agent was up".to_owned()
                    }
                    Some(Origin::Template(_)) if self.was_let_down() => {
                        "the microVM ended before its agent was up".to_owned()
                    }
                    Some(Origin::Template(template)) => {
                        // Whatever is wrong with it, the next one will be made anew.
                        template.discard();
                        "the microVM could not go on from its template, which is removed now: try again"
                            .to_owned()
                    }
                    Some(Origin::Snapshot(directory)) => {
                        format!("the microVM could not go on from the snapshot {}", directory.display())
                    }
                };
                return Err(Error::Monitor(self.last_words(&happened)));
            }
            if interrupted && given_up() {
                return Err(Error::Interrupted);
            }
        }
    }

    /// What is known of a guest whose agent does not call.
    fn silence(&self) -> String {
        let status = vmm::control::Client::connect(&self.files.control())
            .and_then(|mut client| client.status())
            .map_or_else(
                |error| format!("the monitor does not answer either: {error}"),
                |status| describe(&status),
            );
        format!("the guest's agent did not come up within {} seconds; {status}", self.patience.as_secs())
    }

    /// Why the monitor ended, in its own words. One that has only lost its agent is ended.
    pub fn last_words(&mut self, happened: &str) -> String {
        self.end();
        let status = self.child.wait().map_or_else(
            |error| error.to_string(),
            |status| match status.signal() {
                // It has no way to say so itself.
                Some(libc::SIGKILL) if !self.given_up => {
                    format!("{status}: somebody killed it, or the host's kernel did for want of memory, as `dmesg` tells then")
                }
                _ => status.to_string(),
            },
        );
        let log = fs::read(self.files.monitor_log()).unwrap_or_default();
        let tail = log.get(log.len().saturating_sub(SHOWN)..).unwrap_or_default();
        let words = printable(&String::from_utf8_lossy(tail));
        let said = if words.is_empty() { "it said nothing".to_owned() } else { format!("it said:\n{words}") };
        let served = fs::read(self.files.shares_log()).unwrap_or_default();
        let served = printable(&String::from_utf8_lossy(served.get(..SHOWN).unwrap_or(&served)));
        let served = if served.is_empty() { served } else { format!("\nvirtiofsd said:\n{served}") };
        format!("{happened} ({status}); {said}{served}")
    }

    /// Whether somebody has killed it, rather than that it came to an end of its own.
    fn was_killed(&mut self) -> bool {
        self.child.wait().is_ok_and(|status| status.signal() == Some(libc::SIGKILL))
    }

    /// Whether the host refused it something, as memory, or its file server ended.
    fn was_let_down(&mut self) -> bool {
        let hosts = [STATUS_OS, STATUS_IO].map(i32::from);
        self.child.wait().is_ok_and(|status| status.code().is_some_and(|code| hosts.contains(&code)))
    }

    /// Whether it has ended, or does so in a moment: a connection that it had breaks off just before.
    pub(crate) fn ends_soon(&self) -> bool {
        let moment = Timespec { tv_sec: 1, tv_nsec: 0 };
        matches!(poll(&mut [PollFd::new(&self.child, PollFlags::IN)], Some(&moment)), Ok(1..))
    }

    /// Waits for the monitor to end by itself, or ends it when it does not.
    pub fn end(&mut self) {
        let patience = Timespec { tv_sec: END_PATIENCE.as_secs().try_into().unwrap_or(10), tv_nsec: 0 };
        if !matches!(poll(&mut [PollFd::new(&self.child, PollFlags::IN)], Some(&patience)), Ok(1..)) {
            self.child.kill();
            self.given_up = true;
        }
        let _ = self.child.wait();
    }

    /// Ends the monitor, and the guest with it, at once, and leaves the taking apart to the host's kernel: that
    /// takes tens of milliseconds of waiting for grace periods, in which nothing of the guest runs any more.
    pub fn discard(mut self) {
        self.child.kill();
        self.discarded = true;
    }

    /// When the monitor and its guest did what.
    pub fn timeline(&self) -> Option<Value> {
        let mut client = vmm::control::Client::connect(&self.files.control()).ok()?;
        client.call(Method::Metrics).ok()?.get_mut("timeline").map(Value::take)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if !self.discarded {
            self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The vCPUs' states and the end of the console.
fn describe(status: &vmm::control::Status) -> String {
    let vcpus = serde_json::to_string(&status.vcpus).unwrap_or_default();
    format!("its vCPUs: {vcpus}; it last printed:\n{}", printable(&status.console_tail))
}

/// Guest output without what would act on the reader's terminal.
fn printable(text: &str) -> String {
    text.chars()
        .filter(|&c| c == '\n' || c == '\t' || !c.is_control())
        .collect::<String>()
        .trim_end()
        .to_owned()
}
