//! The recipe: how a microVM is made, runs and ends. Read [`Machine::build`] top to bottom.

mod devices;
mod drives;
mod save;

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, IntoRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread;

use kvm_bindings::{CpuId, KVM_API_VERSION, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use linux_loader::loader::Cmdline;

use crate::arch::state::VcpuState;
use crate::arch::{boot, cpuid, layout, regs};
use crate::config::{BootConfig, Config};
use crate::control::server::Server;
use crate::error::{Error, Result};
use crate::event_loop::EventLoop;
use crate::exit::{ExitRequest, Outcome};
use crate::jail::{self, Kind};
use crate::memory::{self, GuestMemory};
use crate::report::Report;
use crate::snapshot::{Extent, Identity, Opened, pages, working_set};
use crate::timeline::Timeline;
use crate::vcpu::{Vcpu, Vcpus};
pub use devices::Devices;
use devices::{inherited, open_disk};
pub use drives::Inserted;
pub use save::{SavedDisk, Saving, SnapshotRequest, Taken};

/// Most descriptors of a monitor in its jail: streams of vsock, clients with the files that they send, layers of disks.
const MAX_DESCRIPTORS: u64 = 4096;
/// A vCPU, and what it was told that it is.
type Identified = (VcpuFd, Vec<kvm_cpuid_entry2>);

/// A microVM, complete but not running.
pub struct Machine {
    config: Config,
    vcpus: Vec<Vcpu>,
    devices: Devices,
    exit: ExitRequest,
    timeline: Arc<Timeline>,
    memory: Arc<GuestMemory>,
    /// What of memory was mapped from a snapshot.
    mapped: Vec<Extent>,
    /// Which that was.
    origin: Option<Identity>,
    kvm: Kvm,
    /// Last, so that it outlives what was made of it.
    vm: VmFd,
}

impl Machine {
    /// Builds the machine that `config` describes: one that boots, or one that goes on from a snapshot.
    ///
    /// # Errors
    /// When the configuration, a file it names, KVM or the host does not allow it.
    pub fn build(config: Config, timeline: Arc<Timeline>) -> Result<Self> {
        let kvm = open_kvm(config.machine.kvm_fd)?;
        match (&config.boot, &config.restore) {
            (Some(boot), _) => {
                let boot = boot.clone();
                Self::boot(config, &boot, timeline, kvm)
            }
            (None, Some(directory)) => {
                let opened = Opened::open(directory)?;
                timeline.mark("snapshot-read");
                Self::restore(config, opened, timeline, kvm)
            }
            (None, None) => Err(Error::Config("nothing to boot and nothing to restore".to_owned())),
        }
    }

    /// A machine that boots.
    fn boot(config: Config, boot: &BootConfig, timeline: Arc<Timeline>, kvm: Kvm) -> Result<Self> {
        let bytes = config.machine.memory_bytes();
        let memory = Arc::new(memory::create(bytes)?);
        // KVM waits some milliseconds for the host's RCU before there is a virtual machine: meanwhile another thread does
        // all that needs none. In the emulated host, with its one processor, that is 7 ms less. Where the host is itself a
        // virtual machine, each leaf of the processor's features is an exit, 0.65 ms in all: nobody waits for them before
        // the vCPUs are told.
        let (vm, exit, devices, fds) = thread::scope(|scope| {
            let loader = thread::Builder::new().name("loader".into());
            let prepared = loader
                .spawn_scoped(scope, || Ok((cpuid::supported(&kvm)?, boot::load(&memory, bytes, boot)?)))
                .map_err(Error::os("start a thread"))?;
            let vm = kvm.create_vm().map_err(Error::kvm("create a virtual machine"))?;
            memory::register(&vm, &memory)?;
            create_interrupt_controller(&vm)?;
            timeline.mark("memory");
            let exit = ExitRequest::new().map_err(Error::os("make an eventfd"))?;
            let mut cmdline = kernel_cmdline(boot)?;
            let devices = Devices::build(&config, &vm, &memory, &exit, &timeline, &mut cmdline)?;
            timeline.mark("devices");
            let fds = create_vcpus(&vm, config.machine.vcpus)?;
            let (features, files) = prepared.join().unwrap_or_else(|panic| resume_unwind(panic))?;
            timeline.mark("kernel-loaded");
            let entry = files.finish(&memory, bytes, config.machine.vcpus, &cmdline)?;
            Ok::<_, Error>((vm, exit, devices, identify(&kvm, fds, &features, entry)?))
        })?;
        let (vcpus, mapped) = (Vec::new(), Vec::new());
        let machine = Self { config, vcpus, devices, exit, timeline, memory, mapped, origin: None, kvm, vm };
        Ok(machine.with_vcpus(fds))
    }

    /// A machine that goes on from a snapshot: the same steps, with less to do in each.
    fn restore(config: Config, opened: Opened, timeline: Arc<Timeline>, kvm: Kvm) -> Result<Self> {
        let Opened { snapshot, .. } = &opened;
        opened.fits_shape(&config.machine)?;
        let soon = &working_set::read(&opened.directory, snapshot);
        let memory = Arc::new(memory::create(snapshot.memory_bytes)?);
        let (vm, exit, devices, fds) = thread::scope(|scope| {
            let (done, mapped) = mpsc::channel();
            let (made, vm_is_made) = mpsc::channel();
            let mapper = thread::Builder::new().name("mapper".into());
            let (memory, kvm, marks, opened) = (&memory, &kvm, &timeline, &opened);
            let features = mapper
                .spawn_scoped(scope, move || {
                    // Nobody receives it when this machine has failed otherwise.
                    let _ = done.send(opened.fill(memory));
                    let features = cpuid::supported(kvm);
                    // Not earlier: a processor that is busy in the kernel keeps the host's RCU waiting.
                    if !soon.is_empty() && vm_is_made.recv().is_ok() {
                        working_set::populate(memory, soon);
                        marks.mark("populated");
                    }
                    features
                })
                .map_err(Error::os("start a thread"))?;
            let vm = kvm.create_vm().map_err(Error::kvm("create a virtual machine"))?;
            let _ = made.send(());
            // The sender goes without a word only when its thread panics, which joining it tells.
            mapped.recv().unwrap_or(Ok(()))?;
            memory::register(&vm, memory)?;
            create_interrupt_controller(&vm)?;
            timeline.mark("memory");
            let exit = ExitRequest::new().map_err(Error::os("make an eventfd"))?;
            // Nobody reads it: the guest found its devices long ago.
            let mut unread = kernel_cmdline(&BootConfig::default())?;
            let devices = Devices::build(&config, &vm, memory, &exit, &timeline, &mut unread)?;
            devices.restore(opened)?;
            timeline.mark("devices");

            snapshot.vm.restore(&vm)?;
            let fds = restore_vcpus(&vm, &snapshot.vcpus);
            // A processor that lacks something is the better reason, where it is why KVM refused a state.
            opened.fits_features(&features.join().unwrap_or_else(|panic| resume_unwind(panic))?)?;
            Ok::<_, Error>((vm, exit, devices, fds?))
        })?;
        devices.wake();
        let (mapped, origin) = (opened.extents(), Some(opened.snapshot.identity));
        let vcpus = Vec::new();
        let machine = Self { config, vcpus, devices, exit, timeline, memory, mapped, origin, kvm, vm };
        Ok(machine.with_vcpus(fds))
    }

    /// Gives each vCPU what its exits need.
    fn with_vcpus(mut self, vcpus: Vec<Identified>) -> Self {
        self.vcpus = vcpus
            .into_iter()
            .zip(0..)
            .map(|((fd, cpuid), id)| Vcpu {
                id,
                fd,
                cpuid,
                ports: Arc::clone(&self.devices.ports),
                mmio: Arc::clone(&self.devices.mmio),
                memory: Arc::clone(&self.memory),
                exit: self.exit.clone(),
                timeline: Arc::clone(&self.timeline),
            })
            .collect();
        self.timeline.mark("vcpus");
        self
    }

    /// Lets others end the machine.
    pub fn exit_request(&self) -> ExitRequest {
        self.exit.clone()
    }

    /// Runs the machine until it ends, and tells how it did.
    ///
    /// # Errors
    /// When threads or sockets cannot be had.
    pub fn run(self) -> Result<(Outcome, Report)> {
        let Self { config, vcpus, devices, exit, timeline, memory, mapped, origin, kvm, vm } = self;
        let devices = Arc::new(devices);
        let mut events = EventLoop::new()?;
        for device in &devices.virtio {
            events.add_device(Arc::clone(device));
        }
        let control = config.control.as_deref().map(Server::bind).transpose()?;
        if control.is_some() {
            // For snapshots. There is none where it cannot be opened, and the machine does without.
            let _ = pages::pagemap();
        }
        confine(&config, &devices)?;
        timeline.mark("jail");

        let vcpus = Rc::new(Vcpus::start(vcpus)?);
        jail::confine(Kind::Main).map_err(Error::os("restrict the event loop's system calls"))?;
        if let Some(path) = &config.ready {
            UnixStream::connect(path).map_err(|source| Error::Input {
                what: "socket to tell that the machine runs",
                path: path.clone(),
                source,
            })?;
        }
        if let Some(control) = control {
            let machine = Running {
                config,
                devices: Arc::clone(&devices),
                vcpus: Rc::clone(&vcpus),
                exit: exit.clone(),
                timeline: Arc::clone(&timeline),
                memory,
                mapped,
                origin,
                insertions: BTreeMap::new(),
                kvm,
                vm,
            };
            events.add(Box::new(control.serve(machine)));
        }
        events.run(&exit)?;

        for device in &devices.virtio {
            device.finish();
        }
        timeline.mark("exit");
        Ok(devices.conclude(&exit, &timeline))
    }
}

/// Enters the jail: all is open.
fn confine(config: &Config, devices: &Devices) -> Result<()> {
    let absolute = |path: &PathBuf| {
        let path = std::path::absolute(path).map_err(Error::os("tell the working directory"))?;
        Ok::<_, Error>(path.parent().map_or_else(|| PathBuf::from("/"), Path::to_owned))
    };
    let sockets = config.vsock.iter().map(|vsock| &vsock.socket).chain(&config.ready);
    let mut reach = sockets.map(absolute).collect::<Result<Vec<_>>>()?;
    reach.sort();
    reach.dedup();
    let reach: Vec<&Path> = reach.iter().map(PathBuf::as_path).collect();
    let limits = jail::Limits { descriptors: MAX_DESCRIPTORS, file_bytes: devices.longest_file(config) };
    jail::enter(&config.jail, &reach, &limits)
}

/// Checks everything about `config` that can be checked without running it: files, kernel, sizes, KVM.
///
/// # Errors
/// As [`Machine::build`].
pub fn check(config: &Config) -> Result<()> {
    let kvm = open_kvm(config.machine.kvm_fd)?;
    for disk in config.disks.iter().filter(|disk| !disk.empty) {
        open_disk(disk)?;
    }
    let Some(boot) = &config.boot else {
        let directory = config.restore.clone().unwrap_or_default();
        let opened = Opened::open(&directory)?;
        opened.fits_shape(&config.machine)?;
        return opened.fits_features(&cpuid::supported(&kvm)?);
    };
    let bytes = config.machine.memory_bytes();
    let memory = memory::create(bytes)?;
    let cmdline = kernel_cmdline(boot)?;
    boot::load(&memory, bytes, boot)?.finish(&memory, bytes, config.machine.vcpus, &cmdline).map(drop)
}

/// What the control socket can see and do.
pub struct Running {
    /// As built.
    pub config: Config,
    /// For metrics and console.
    pub devices: Arc<Devices>,
    /// For their state, pause and resume.
    pub vcpus: Rc<Vcpus>,
    /// For quit.
    pub exit: ExitRequest,
    /// For uptime.
    pub timeline: Arc<Timeline>,
    /// For snapshots, as the rest.
    pub memory: Arc<GuestMemory>,
    /// What of it was mapped from a snapshot.
    pub mapped: Vec<Extent>,
    /// Which that was.
    origin: Option<Identity>,
    /// The disks that were put into drives, by the drive's number.
    insertions: BTreeMap<usize, u64>,
    kvm: Kvm,
    vm: VmFd,
}

/// Opens /dev/kvm, or takes over the descriptor of it that was inherited, and checks what the monitor cannot do without.
pub(crate) fn open_kvm(handed_down: Option<RawFd>) -> Result<Kvm> {
    let fd = match handed_down {
        Some(fd) => inherited(fd).map_err(Error::os("take over the descriptor of /dev/kvm"))?.into_raw_fd(),
        None => Kvm::open_with_cloexec(true)
            .map_err(|source| Error::KvmOpen { reason: open_reason(&source), source })?,
    };
    // SAFETY: a descriptor just opened, owned by nobody else; or one that whoever started the monitor says is for this, and
    // which the version tells from any other.
    let kvm = unsafe { Kvm::from_raw_fd(fd) };
    if kvm.get_api_version().unsigned_abs() != KVM_API_VERSION {
        return Err(Error::KvmLacks("version 12 of its interface: is that descriptor one of /dev/kvm?"));
    }
    let needed = [
        (Cap::Irqchip, "an interrupt controller (KVM_CAP_IRQCHIP)"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    ];
    match needed.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(Error::KvmLacks(name)),
        None => Ok(kvm),
    }
}

/// Why /dev/kvm could not be opened, and what to do about it.
fn open_reason(error: &kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        libc::ENOENT => {
            "it does not exist. Load the module kvm_intel or kvm_amd, and enable virtualisation in the firmware \
             (or nested virtualisation, if this is itself a virtual machine)"
        }
        libc::EACCES | libc::EPERM => {
            "you are not permitted to. Join the group kvm (sudo usermod -aG kvm $USER, then log in again)"
        }
        libc::ENODEV | libc::ENXIO => {
            "the processor offers no virtualisation. Enable it in the firmware, or nested virtualisation if this is \
             itself a virtual machine"
        }
        _ => "it exists, but does not open",
    }
}

/// PIC, IOAPIC and local APICs, in the kernel. After guest memory: see [`memory::register`].
fn create_interrupt_controller(vm: &VmFd) -> Result<()> {
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(Error::kvm("place its identity map"))?;
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(Error::kvm("place its task segment"))?;
    vm.create_irq_chip().map_err(Error::kvm("create an interrupt controller"))
}

fn create_vcpus(vm: &VmFd, count: u8) -> Result<Vec<VcpuFd>> {
    (0..count).map(|id| vm.create_vcpu(u64::from(id)).map_err(Error::kvm("create a vCPU"))).collect()
}

/// Tells new vCPUs what they are and where they start.
fn identify(kvm: &Kvm, vcpus: Vec<VcpuFd>, features: &CpuId, entry: u64) -> Result<Vec<Identified>> {
    let count = u8::try_from(vcpus.len()).map_err(|_| Error::KvmLacks("room for so many vCPUs"))?;
    (0..count)
        .zip(vcpus)
        .map(|(id, vcpu)| {
            let identity = cpuid::set(kvm, &vcpu, features, id, count)?;
            regs::set_msrs(&vcpu)?;
            regs::set_xcr0(&vcpu, cpuid::extended_states(features));
            // The others wait until the guest starts them.
            if id == 0 {
                regs::set_boot_registers(&vcpu, entry)?;
            }
            Ok((vcpu, identity))
        })
        .collect()
}

fn restore_vcpus(vm: &VmFd, states: &[VcpuState]) -> Result<Vec<Identified>> {
    (0_u64..)
        .zip(states)
        .map(|(id, state)| {
            let vcpu = vm.create_vcpu(id).map_err(Error::kvm("create a vCPU"))?;
            state.restore(&vcpu)?;
            Ok((vcpu, state.cpuid().to_vec()))
        })
        .collect()
}

fn kernel_cmdline(boot: &BootConfig) -> Result<Cmdline> {
    let too_long = |_| Error::CmdlineTooLong { length: boot.cmdline.len(), limit: layout::CMDLINE_MAX - 1 };
    let mut cmdline = Cmdline::new(layout::CMDLINE_MAX).map_err(too_long)?;
    cmdline.insert_str(&boot.cmdline).map_err(too_long)?;
    Ok(cmdline)
}
