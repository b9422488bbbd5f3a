//! The recipe: how a microVM is made, runs and ends. Read [`Machine::build`] top to bottom.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::panic::resume_unwind;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;

use kvm_bindings::{CpuId, KVM_API_VERSION};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use linux_loader::loader::Cmdline;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::{boot, cpuid, layout, regs};
use crate::bus::{Bus, BusDevice};
use crate::config::{Config, DiskConfig, NetworkConfig};
use crate::control::server::Server;
use crate::devices::console_output::{ConsoleOutput, Outlet};
use crate::devices::legacy::{
    EXIT_PORT, ExitPort, KeyboardController, MARK_PORT, MarkPort, RTC_PORT, RealTimeClock, SERIAL_PORT,
    SerialPort,
};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::block::disk::Disk;
use crate::devices::virtio::console::Console;
use crate::devices::virtio::fs::Fs;
use crate::devices::virtio::mmio::{self, MmioTransport};
use crate::devices::virtio::net::{Backend, Net, Stream, Tap};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;
use crate::error::{Error, Result};
use crate::event_loop::EventLoop;
use crate::exit::{ExitRequest, Outcome};
use crate::memory::{self, Backing, GuestMemory};
use crate::report::{CRASH_TAIL, Report};
use crate::timeline::Timeline;
use crate::vcpu::{Vcpu, Vcpus};

/// A microVM, complete but not running.
pub struct Machine {
    config: Config,
    vcpus: Vec<Vcpu>,
    devices: Devices,
    exit: ExitRequest,
    timeline: Arc<Timeline>,
    /// Last, so that it outlives what was made of it.
    vm: VmFd,
}

/// All devices, and the buses on which the guest finds them.
pub struct Devices {
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    virtio: Vec<Arc<MmioTransport>>,
    console: ConsoleOutput,
}

impl Machine {
    /// Builds the machine that `config` describes.
    ///
    /// # Errors
    /// When the configuration, a file it names, KVM or the host does not allow it.
    pub fn build(config: Config, timeline: Arc<Timeline>) -> Result<Self> {
        let kvm = open_kvm(config.machine.kvm_fd)?;
        let bytes = u64::from(config.machine.memory_mib) << 20;
        let memory = Arc::new(memory::create(bytes, backing(&config))?);
        // KVM waits some milliseconds for the host's RCU before there is a virtual machine: meanwhile another thread does
        // all that needs none. In the emulated host, with its one processor, that is 7 ms less.
        thread::scope(|scope| {
            let loader = thread::Builder::new().name("loader".into());
            let prepared = loader
                .spawn_scoped(scope, || {
                    Ok((cpuid::supported(&kvm)?, boot::load(&memory, bytes, &config.boot)?))
                })
                .map_err(Error::os("start a thread"))?;
            let vm = kvm.create_vm().map_err(Error::kvm("create a virtual machine"))?;
            memory::register(&vm, &memory)?;
            create_interrupt_controller(&vm)?;
            timeline.mark("memory");
            let (features, files) = prepared.join().unwrap_or_else(|panic| resume_unwind(panic))?;
            timeline.mark("kernel-loaded");
            Ok((vm, features, files))
        })
        .and_then(|(vm, features, files)| {
            Self::assemble(config, timeline, &kvm, vm, memory, &features, files)
        })
    }

    /// The rest: devices, boot tables, vCPUs.
    fn assemble(
        config: Config,
        timeline: Arc<Timeline>,
        kvm: &Kvm,
        vm: VmFd,
        memory: Arc<GuestMemory>,
        features: &CpuId,
        files: boot::Loaded,
    ) -> Result<Self> {
        let exit = ExitRequest::new().map_err(Error::os("make an eventfd"))?;
        let mut cmdline = kernel_cmdline(&config)?;
        let devices = Devices::build(&config, &vm, &memory, &exit, &timeline, &mut cmdline)?;
        timeline.mark("devices");

        let (bytes, count) = (u64::from(config.machine.memory_mib) << 20, config.machine.vcpus);
        let entry = files.finish(&memory, bytes, count, &cmdline)?;

        let vcpus = create_vcpus(kvm, &vm, features, count, entry)?
            .into_iter()
            .zip(0..)
            .map(|(fd, id)| Vcpu {
                id,
                fd,
                ports: Arc::clone(&devices.ports),
                mmio: Arc::clone(&devices.mmio),
                memory: Arc::clone(&memory),
                exit: exit.clone(),
                timeline: Arc::clone(&timeline),
            })
            .collect();
        timeline.mark("vcpus");
        Ok(Self { config, vcpus, devices, exit, timeline, vm })
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
        let Self { config, vcpus, devices, exit, timeline, vm: _vm } = self;
        let devices = Arc::new(devices);
        let mut events = EventLoop::new()?;
        for device in &devices.virtio {
            events.add_device(Arc::clone(device));
        }
        let control = config.control.as_deref().map(Server::bind).transpose()?;

        let vcpus = Rc::new(Vcpus::start(vcpus)?);
        if let Some(control) = control {
            let machine = Running {
                config,
                devices: Arc::clone(&devices),
                vcpus: Rc::clone(&vcpus),
                exit: exit.clone(),
                timeline: Arc::clone(&timeline),
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

/// Checks everything about `config` that can be checked without running it: files, kernel, sizes, KVM.
///
/// # Errors
/// As [`Machine::build`].
pub fn check(config: &Config) -> Result<()> {
    open_kvm(config.machine.kvm_fd)?;
    let bytes = u64::from(config.machine.memory_mib) << 20;
    for disk in &config.disks {
        open_disk(disk)?;
    }
    let memory = memory::create(bytes, backing(config))?;
    let cmdline = kernel_cmdline(config)?;
    boot::load(&memory, bytes, &config.boot)?.finish(&memory, bytes, config.machine.vcpus, &cmdline).map(drop)
}

/// Memory is shared only where somebody shares it: huge pages are had for anonymous memory on every host, for memory
/// files on few.
fn backing(config: &Config) -> Backing {
    if config.filesystems.is_empty() { Backing::Private } else { Backing::Shared }
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

fn create_vcpus(kvm: &Kvm, vm: &VmFd, features: &CpuId, count: u8, entry: u64) -> Result<Vec<VcpuFd>> {
    (0..count)
        .map(|id| {
            let vcpu = vm.create_vcpu(u64::from(id)).map_err(Error::kvm("create a vCPU"))?;
            cpuid::set(kvm, &vcpu, features, id, count)?;
            regs::set_msrs(&vcpu)?;
            regs::set_xcr0(&vcpu, cpuid::extended_states(features));
            // The others wait until the guest starts them.
            if id == 0 {
                regs::set_boot_registers(&vcpu, entry)?;
            }
            Ok(vcpu)
        })
        .collect()
}

fn kernel_cmdline(config: &Config) -> Result<Cmdline> {
    let too_long =
        |_| Error::CmdlineTooLong { length: config.boot.cmdline.len(), limit: layout::CMDLINE_MAX - 1 };
    let mut cmdline = Cmdline::new(layout::CMDLINE_MAX).map_err(too_long)?;
    cmdline.insert_str(&config.boot.cmdline).map_err(too_long)?;
    Ok(cmdline)
}

impl Devices {
    fn build(
        config: &Config,
        vm: &VmFd,
        memory: &Arc<GuestMemory>,
        exit: &ExitRequest,
        timeline: &Arc<Timeline>,
        cmdline: &mut Cmdline,
    ) -> Result<Self> {
        let console = ConsoleOutput::new(config.console.ring_kib as usize * 1024);
        let mut ports = Bus::default();
        ports.insert(SERIAL_PORT, 8, Arc::new(serial_port(config, vm, &console)?));
        ports.insert(
            KeyboardController::PORT,
            KeyboardController::PORTS,
            Arc::new(KeyboardController::new(exit.clone())),
        );
        ports.insert(RTC_PORT, 2, Arc::new(RealTimeClock));
        ports.insert(MARK_PORT, 1, Arc::new(MarkPort::new(Arc::clone(timeline))));
        ports.insert(EXIT_PORT, 4, Arc::new(ExitPort::new(exit.clone())));

        let mut slots = Slots { vm, memory, cmdline, mmio: Bus::default(), virtio: Vec::new() };
        for disk in &config.disks {
            slots.attach(Box::new(Block::new(&disk.id, open_disk(disk)?)))?;
        }
        for filesystem in &config.filesystems {
            slots.attach(Box::new(Fs::new(filesystem, exit.clone())?))?;
        }
        for (network, number) in config.networks.iter().zip(0..) {
            slots.attach(Box::new(open_network(network, number)?))?;
        }
        if let Some(vsock) = &config.vsock {
            slots.attach(Box::new(Vsock::new(vsock.cid, &vsock.socket)?))?;
        }
        if config.rng {
            slots.attach(Box::new(Rng::default()))?;
        }
        let outlet = Outlet::open(&console, &config.console.output)?;
        slots.attach(Box::new(Console::new(outlet, config.console.input, exit.clone())))?;
        let Slots { mmio, virtio, .. } = slots;
        Ok(Self { ports: Arc::new(ports), mmio: Arc::new(mmio), virtio, console })
    }

    /// What all devices counted, by name.
    pub fn metrics(&self) -> serde_json::Value {
        self.virtio.iter().map(|device| device.metrics()).collect::<serde_json::Map<_, _>>().into()
    }

    /// What the guest printed.
    pub fn console(&self) -> &ConsoleOutput {
        &self.console
    }

    /// The final outcome, and the report on everything.
    fn conclude(&self, exit: &ExitRequest, timeline: &Timeline) -> (Outcome, Report) {
        let crash = exit.take_crash();
        let mut outcome = exit.outcome().unwrap_or(Outcome::Quit);
        // A kernel that panics reboots (panic=-1), by keyboard controller or triple fault.
        if matches!(outcome, Outcome::Reboot | Outcome::Crash) && self.console.panicked() {
            outcome = Outcome::Panic;
        }
        let report = Report {
            outcome: outcome.name(),
            exit_status: outcome.exit_status(),
            timeline: timeline.events(),
            metrics: self.metrics(),
            crash,
            console_tail: self.console.tail(CRASH_TAIL),
        };
        (outcome, report)
    }
}

/// Gives virtio devices their windows and interrupt lines, and tells the kernel of them.
struct Slots<'a> {
    vm: &'a VmFd,
    memory: &'a Arc<GuestMemory>,
    cmdline: &'a mut Cmdline,
    mmio: Bus,
    virtio: Vec<Arc<MmioTransport>>,
}

impl Slots<'_> {
    fn attach(&mut self, device: Box<dyn VirtioDevice>) -> Result<()> {
        let slot = self.virtio.len() as u64;
        let address = layout::MMIO_START + slot * layout::MMIO_SIZE;
        // `Config::check` limits the number of disks and networks so that the lines suffice.
        let irq = layout::FIRST_IRQ + slot as u32;

        let line = irqfd(self.vm, irq)?;
        let transport = MmioTransport::new(device, Arc::clone(self.memory), line)
            .map_err(Error::os("make an eventfd"))?;
        for (kick, queue) in transport.kicks().iter().zip(0_u32..) {
            let notify = IoEventAddress::Mmio(address + mmio::QUEUE_NOTIFY);
            self.vm
                .register_ioevent(kick, &notify, queue)
                .map_err(Error::kvm("watch a queue's notifications"))?;
        }
        let too_long =
            |_| Error::CmdlineTooLong { length: layout::CMDLINE_MAX, limit: layout::CMDLINE_MAX - 1 };
        self.cmdline
            .insert_str(format!("virtio_mmio.device={}K@{address:#x}:{irq}", layout::MMIO_SIZE / 1024))
            .map_err(too_long)?;
        let transport = Arc::new(transport);
        self.mmio.insert(address, layout::MMIO_SIZE, Arc::clone(&transport) as Arc<dyn BusDevice>);
        self.virtio.push(transport);
        Ok(())
    }
}

/// An eventfd that raises interrupt line `irq` when it is written.
fn irqfd(vm: &VmFd, irq: u32) -> Result<EventFd> {
    let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::os("make an eventfd"))?;
    vm.register_irqfd(&line, irq).map_err(Error::kvm("connect an interrupt line"))?;
    Ok(line)
}

/// ttyS0, with an interrupt where somebody means to use it as more than a place for early messages.
fn serial_port(config: &Config, vm: &VmFd, console: &ConsoleOutput) -> Result<SerialPort> {
    let output = config.serial.as_ref().map_or(crate::config::Output::None, |serial| serial.output.clone());
    let used = config.serial.is_some() || config.boot.cmdline.contains("ttyS");
    let interrupt = used.then(|| irqfd(vm, layout::SERIAL_IRQ)).transpose()?;
    Ok(SerialPort::new(Outlet::open(console, &output)?, interrupt))
}

fn open_disk(disk: &DiskConfig) -> Result<Disk> {
    let input = |(path, source)| Error::Input { what: "disk", path, source };
    match &disk.path {
        Some(path) => Disk::raw(path, disk.read_only).map_err(|source| input((path.clone(), source))),
        None => Disk::composite(&disk.id, &disk.layers).map_err(input),
    }
}

/// Opens what interface `number` is connected to.
fn open_network(network: &NetworkConfig, number: usize) -> Result<Net> {
    let (what, backend): (_, std::io::Result<Box<dyn Backend>>) = match network {
        NetworkConfig { tap: Some(name), .. } => {
            (format!("tap {name:?}"), Tap::open(name).map(|tap| Box::new(tap) as _))
        }
        NetworkConfig { socket: Some(path), .. } => {
            (format!("socket {path:?}"), Stream::connect(path).map(|stream| Box::new(stream) as _))
        }
        NetworkConfig { fd, .. } => {
            let fd = fd.unwrap_or(-1);
            (format!("descriptor {fd}"), inherited(fd).and_then(backend_of))
        }
    };
    let backend = backend.map_err(|source| Error::Network { what, source })?;
    let mac = network.mac().map_err(Error::Config)?;
    Ok(Net::new(&format!("net{number}"), backend, mac, network.mtu))
}

/// A socket carries frames, as passt's does; everything else must be a tap.
fn backend_of(fd: OwnedFd) -> std::io::Result<Box<dyn Backend>> {
    let file = std::fs::File::from(fd);
    let is_socket = file.metadata()?.file_type().is_socket();
    let fd = OwnedFd::from(file);
    Ok(if is_socket { Box::new(Stream::new(UnixStream::from(fd))?) } else { Box::new(Tap::from_fd(fd)?) })
}

/// Takes over descriptor `fd`, which the configuration says was handed down for this. `Config::check` has seen to it
/// that no two networks name the same.
fn inherited(fd: i32) -> std::io::Result<OwnedFd> {
    // SAFETY: F_GETFD reads no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // All of the monitor's own descriptors close on exec; one that does not was inherited.
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(std::io::Error::other("the monitor did not inherit it"));
    }
    // SAFETY: it is open and, having been inherited, belongs to nothing else in this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
