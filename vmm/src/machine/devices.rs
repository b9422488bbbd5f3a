//! The machine's devices: made in a fixed order, from which their windows and interrupt lines follow.

use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use linux_loader::loader::Cmdline;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout;
use crate::bus::{Bus, BusDevice};
use crate::config::{Config, DiskConfig, NetworkConfig, Output};
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
use crate::devices::virtio::mmio::{self, MmioTransport, TransportState};
use crate::devices::virtio::net::{Backend, Net, Stream, Tap, Unplugged};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;
use crate::error::{Error, Result};
use crate::exit::{ExitRequest, Outcome};
use crate::memory::GuestMemory;
use crate::report::{CRASH_TAIL, Report};
use crate::snapshot::Opened;
use crate::timeline::Timeline;

/// What a snapshot's file is longer than the guest's memory at most.
const SNAPSHOT_ROOM: u64 = 64 << 20;

/// All devices, and the buses on which the guest finds them.
pub struct Devices {
    pub(super) ports: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pub(super) virtio: Vec<Arc<MmioTransport>>,
    console: ConsoleOutput,
}

impl Devices {
    pub(super) fn build(
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
            let content = if disk.empty { None } else { Some(open_disk(disk)?) };
            let block = match content {
                content if disk.removable => Block::removable(&disk.id, content),
                Some(content) => Block::new(&disk.id, content),
                None => Block::empty(&disk.id, disk.read_only),
            };
            let block = block.with_limit(disk.limit.as_ref()).map_err(Error::os("make a timer"))?;
            slots.attach(Box::new(block))?;
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

    /// Changes what is in drive `number`, counted from 0 in the order of the configuration's disks. Nothing happens to a
    /// machine that has fewer.
    pub(super) fn change_disk(&self, number: usize, disk: Option<Disk>) {
        // They come first of all devices.
        if let Some(drive) = self.virtio.get(number) {
            drive.change_disk(disk);
        }
    }

    /// The state of the virtio devices.
    ///
    /// # Errors
    /// When one cannot be saved as it is.
    pub fn save(&self) -> Result<Vec<TransportState>> {
        self.virtio.iter().map(|device| device.save().map_err(Error::Unsaveable)).collect()
    }

    /// After [`Self::save`], whatever that said, when memory is written.
    pub fn saved(&self) {
        for device in &self.virtio {
            device.saved();
        }
    }

    /// Gives new virtio devices the states of a snapshot's.
    pub(super) fn restore(&self, opened: &Opened) -> Result<()> {
        let bad = |why| Error::Snapshot { directory: opened.directory.clone(), why };
        let saved = &opened.snapshot.devices;
        if saved.len() != self.virtio.len() {
            return Err(bad(format!(
                "it has {} virtio devices, the configuration {}",
                saved.len(),
                self.virtio.len()
            )));
        }
        self.virtio.iter().zip(saved).try_for_each(|(device, state)| device.restore(state).map_err(bad))
    }

    /// See [`MmioTransport::wake`].
    pub(super) fn wake(&self) {
        for device in &self.virtio {
            device.wake();
        }
    }

    /// Length of the longest file that the machine can come to write, in bytes: a snapshot's memory, or a disk (of which copies are
    /// as long). `None`: nobody knows, since disks come later, or the guest's output goes into a file.
    pub(super) fn longest_file(&self, config: &Config) -> Option<u64> {
        let removable = config.disks.iter().any(|disk| disk.removable);
        let written = |output: &Output| matches!(output, Output::File(_) | Output::Stdout);
        let serial = config.serial.as_ref().is_some_and(|serial| written(&serial.output));
        if removable || serial || written(&config.console.output) {
            return None;
        }
        let disks = self.virtio.iter().filter_map(|device| device.drive()).map(|(_, disk)| disk.length());
        Some(disks.chain([config.machine.memory_bytes() + SNAPSHOT_ROOM]).max().unwrap_or(u64::MAX))
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
    pub(super) fn conclude(&self, exit: &ExitRequest, timeline: &Timeline) -> (Outcome, Report) {
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
    let output = config.serial.as_ref().map_or(Output::None, |serial| serial.output.clone());
    let named = config.boot.as_ref().is_some_and(|boot| boot.cmdline.contains("ttyS"));
    let used = config.serial.is_some() || named;
    let interrupt = used.then(|| irqfd(vm, layout::SERIAL_IRQ)).transpose()?;
    Ok(SerialPort::new(Outlet::open(console, &output)?, interrupt))
}

pub(super) fn open_disk(disk: &DiskConfig) -> Result<Disk> {
    let input = |(path, source)| Error::Input { what: "disk", path, source };
    match &disk.path {
        Some(path) => Disk::raw(path, disk.read_only).map_err(|source| input((path.clone(), source))),
        None => Disk::composite(&disk.id, &disk.layers).map_err(input),
    }
}

/// Opens what interface `number` is connected to.
fn open_network(network: &NetworkConfig, number: usize) -> Result<Net> {
    let name = format!("net{number}");
    if let Some(kind) = network.empty {
        let cable = Unplugged::new(kind).map_err(Error::os("make an eventfd"))?;
        return Ok(Net::unplugged(&name, cable));
    }
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
    Ok(Net::new(&name, backend, mac, network.mtu))
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
pub(super) fn inherited(fd: i32) -> std::io::Result<OwnedFd> {
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
