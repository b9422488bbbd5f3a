//! `bulkhead-vmm`: runs one microVM, or talks to one that runs.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};
use vmm::config::{
    BootConfig, Config, ConsoleConfig, DEFAULT_CMDLINE, DiskConfig, Input, JailConfig, MachineConfig,
    NetworkConfig, Output, SerialConfig, VsockConfig,
};
use vmm::control::{Client, ClientError, Method, SnapshotRequest};
use vmm::error::{STATUS_KVM_UNUSABLE, STATUS_OS, STATUS_USAGE};
use vmm::exit::Outcome;
use vmm::machine::Machine;
use vmm::report::Report;
use vmm::signals;
use vmm::timeline::Timeline;

const EXAMPLES: &str = "\
Examples:
  A kernel with an initramfs, its console on this terminal (Ctrl-A x leaves):
    bulkhead-vmm --kernel vmlinux --initramfs rootfs.cpio --console

  Two processors, 1 GiB, a disk to write and one to read:
    bulkhead-vmm --kernel vmlinux --vcpus 2 --memory 1024 --disk data.img --disk root.erofs,ro \\
        --cmdline 'console=hvc0 root=/dev/vdb rootfstype=erofs panic=-1 reboot=k' --console

  The same from a file, which can say more (see `--print-config`):
    bulkhead-vmm --config machine.json

  What is it doing?
    bulkhead-vmm --config machine.json --control /tmp/vm.sock &
    bulkhead-vmm --ctl /tmp/vm.sock status

  Save it as it is, and go on from there as often as you like:
    bulkhead-vmm --ctl /tmp/vm.sock snapshot /tmp/saved
    bulkhead-vmm --restore /tmp/saved

  Later, only what has changed since, compressed:
    bulkhead-vmm --ctl /tmp/vm.sock snapshot /tmp/later --base /tmp/saved --compress

How it ends: when the guest reboots, status 0 (let its command line say panic=-1 reboot=k); when the guest writes 32 bits to
I/O port 0xb44, their low 8 bits. 70: the guest crashed, and the reason is on stderr. 64: bad usage or configuration.
66: a file is missing or wrong. 69: KVM cannot be used. 71: the operating system refused something.";

/// Runs one KVM microVM: a kernel, disks, a console, and sockets between host and guest.
#[derive(Debug, Parser)]
#[command(name = "bulkhead-vmm", version, after_help = EXAMPLES, max_term_width = 120)]
struct Arguments {
    /// Configuration file (JSON); the options below change what it says
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Kernel to boot: ELF vmlinux or bzImage
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// Archive that becomes the kernel's first root file system
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,

    /// Kernel command line [default: "console=hvc0 panic=-1 reboot=k quiet"]
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,

    /// Memory in MiB [default: 256]
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,

    /// Number of processors, 1 to 32 [default: 1]
    #[arg(long, value_name = "N")]
    vcpus: Option<u8>,

    /// Raw disk image or block device, `,ro` for read-only; may be repeated: vda, vdb, …
    #[arg(long = "disk", value_name = "FILE[,ro]")]
    disks: Vec<String>,

    /// Network interface on this tap, which is made if it does not exist; may be repeated
    #[arg(long = "tap", value_name = "NAME")]
    taps: Vec<String>,

    /// Unix socket for sockets between host and guest: `CONNECT <port>` on it reaches the guest
    #[arg(long, value_name = "SOCKET")]
    vsock: Option<PathBuf>,

    /// Connect the guest's console hvc0 to this terminal
    #[arg(long)]
    console: bool,

    /// Print what the guest writes to its serial port ttyS0, too
    #[arg(long)]
    serial: bool,

    /// Listen for control requests on this unix socket
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,

    /// Write a JSON report to this file when the machine ends
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,

    /// Before the guest runs, enter the jail: namespaces and an empty root of its own, no capabilities, limits, landlock
    #[arg(long)]
    jail: bool,

    /// Give up nothing, whatever the configuration file says
    #[arg(long, conflicts_with = "jail")]
    no_jail: bool,

    /// Let all system calls pass, to look for an error: by default each thread may only make those that it needs
    #[arg(long)]
    no_seccomp: bool,

    /// End when the process that started this one ends
    #[arg(long)]
    die_with_parent: bool,

    /// Only check configuration, kernel, disks and memory size, without running anything
    #[arg(long)]
    check: bool,

    /// Print the configuration that these options make, as a file for --config
    #[arg(long)]
    print_config: bool,

    /// Find out whether this host's KVM can run Linux, and what to do if not
    #[arg(long)]
    self_test: bool,

    /// Go on from the snapshot in this directory instead of booting. Without --config, processors, memory and devices are the
    /// snapshot's, and so is what they are connected to
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kernel", "initramfs", "cmdline", "memory", "vcpus"])]
    restore: Option<PathBuf>,

    /// Send METHOD to the monitor that listens on this control socket, and print the answer
    #[arg(long, value_name = "SOCKET", requires = "method", conflicts_with_all = ["config", "kernel"])]
    ctl: Option<PathBuf>,

    /// With --ctl: what to ask
    #[arg(value_enum, value_name = "METHOD", requires = "ctl")]
    method: Option<CtlMethod>,

    /// With --ctl SOCKET snapshot: the directory to make; with working-set: the snapshot's
    #[arg(value_name = "DIR", requires = "method")]
    directory: Option<PathBuf>,

    /// With --ctl SOCKET snapshot: compress it
    #[arg(long, requires = "directory")]
    compress: bool,

    /// With --ctl SOCKET snapshot: save only what differs from this snapshot; both are needed to go on
    #[arg(long, value_name = "DIR", requires = "directory")]
    base: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CtlMethod {
    /// What the machine and each processor do, and what the guest printed last
    Status,
    /// What devices counted, and when things happened
    Metrics,
    /// Make all processors stand still
    Pause,
    /// Let them run again
    Resume,
    /// Save the machine to a directory that does not exist yet
    Snapshot,
    /// Note in the snapshot it went on from which memory it has written to: later ones start faster
    WorkingSet,
    /// End the machine
    Quit,
}

fn method_of(method: CtlMethod, arguments: &Arguments) -> vmm::Result<Method> {
    let usage = |what: &str| Err(vmm::Error::Config(what.to_owned()));
    match (method, arguments.directory.as_deref()) {
        (CtlMethod::Snapshot, None) => {
            usage("--ctl SOCKET snapshot DIR: the directory to be made is missing")
        }
        (CtlMethod::Snapshot, Some(directory)) => Ok(Method::Snapshot(SnapshotRequest {
            compress: arguments.compress,
            base: arguments.base.as_deref().map(absolute).transpose()?,
            ..SnapshotRequest::new(absolute(directory)?, true)
        })),
        (_, Some(_)) => usage("only snapshot and working-set take a directory"),
        (CtlMethod::Status, None) => Ok(Method::Status),
        (CtlMethod::Metrics, None) => Ok(Method::Metrics),
        (CtlMethod::Pause, None) => Ok(Method::Pause),
        (CtlMethod::Resume, None) => Ok(Method::Resume),
        (CtlMethod::WorkingSet, _) => {
            usage("--ctl SOCKET working-set DIR: the snapshot's directory is missing")
        }
        (CtlMethod::Quit, None) => Ok(Method::Quit),
    }
}

/// The monitor's working directory is not this process's.
fn absolute(directory: &Path) -> vmm::Result<PathBuf> {
    std::path::absolute(directory)
        .map_err(|error| vmm::Error::Config(format!("the directory {directory:?}: {error}")))
}

fn main() -> ExitCode {
    one_heap();
    let timeline = Arc::new(Timeline::new());
    timeline.mark("main");
    let status = match plain_config() {
        // By far the most frequent use; the parser for all others takes longer than building the machine.
        Some((path, false)) => run(Config::read(&path), &timeline),
        Some((path, true)) => match signals::die_with_parent() {
            Ok(()) => run(Config::read(&path), &timeline),
            Err(error) => fail(&error, STATUS_OS),
        },
        None => with_arguments(&parse(), &timeline),
    };
    ExitCode::from(status)
}

/// Lets all threads share one heap. glibc would make one for each thread, of six system calls and pages of its own, so that they do not
/// wait for each other; ours allocate little.
fn one_heap() {
    // SAFETY: plain numbers; there are no other threads yet. Where it is refused, all works as well.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// The file, when the arguments are just `--config FILE`, perhaps with `--die-with-parent` (true) after them.
fn plain_config() -> Option<(PathBuf, bool)> {
    let mut arguments = std::env::args_os().skip(1);
    let (flag, path) = (arguments.next()?, arguments.next()?);
    let (last, end) = (arguments.next(), arguments.next());
    let bound = last.as_ref().is_some_and(|last| last == "--die-with-parent");
    (flag == "--config" && end.is_none() && bound == last.is_some()).then(|| (path.into(), bound))
}

fn parse() -> Arguments {
    let parsed =
        Arguments::command().try_get_matches().and_then(|matches| Arguments::from_arg_matches(&matches));
    parsed.unwrap_or_else(|error| {
        // A closed stderr or stdout is no reason for another status.
        let _ = error.print();
        std::process::exit(if error.use_stderr() { i32::from(STATUS_USAGE) } else { 0 })
    })
}

fn with_arguments(arguments: &Arguments, timeline: &Arc<Timeline>) -> u8 {
    if let (Some(socket), Some(method)) = (&arguments.ctl, arguments.method) {
        if let (CtlMethod::WorkingSet, Some(directory)) = (method, &arguments.directory) {
            return ctl(socket, |client| {
                client.record_working_set(directory).map(|bytes| serde_json::json!({ "bytes": bytes }))
            });
        }
        return match method_of(method, arguments) {
            Ok(method) => ctl(socket, |client| client.call(method)),
            Err(error) => fail(&error, STATUS_USAGE),
        };
    }
    if arguments.self_test {
        return self_test();
    }
    if arguments.die_with_parent
        && let Err(error) = signals::die_with_parent()
    {
        return fail(&error, STATUS_OS);
    }
    let config = config_of(arguments);
    match config {
        Ok(config) if arguments.print_config => print_json(&config),
        Ok(config) if arguments.check => check(&config),
        config => run(config, timeline),
    }
}

/// The file's configuration, if there is one, changed by the other options.
fn config_of(arguments: &Arguments) -> vmm::Result<Config> {
    let mut config = match (&arguments.config, &arguments.kernel, &arguments.restore) {
        (Some(path), _, _) => Config::read(path)?,
        (None, Some(kernel), _) => from_kernel(kernel.clone()),
        (None, None, Some(directory)) => Config::of_snapshot(directory)?,
        (None, None, None) => {
            let what =
                "nothing to boot: give --kernel FILE, --config FILE or --restore DIR; --help shows examples";
            return Err(vmm::Error::Config(what.to_owned()));
        }
    };
    if let Some(directory) = &arguments.restore {
        (config.boot, config.restore) = (None, Some(directory.clone()));
    }
    if let Some(boot) = &mut config.boot {
        set(&mut boot.kernel, arguments.kernel.as_ref());
        set(&mut boot.cmdline, arguments.cmdline.as_ref());
        set_some(&mut boot.initramfs, arguments.initramfs.as_ref());
    }
    set(&mut config.machine.memory_mib, arguments.memory.as_ref());
    set(&mut config.machine.vcpus, arguments.vcpus.as_ref());
    set_some(&mut config.control, arguments.control.as_ref());
    set_some(&mut config.report, arguments.report.as_ref());
    config.jail.confine |= arguments.jail;
    config.jail.seccomp &= !arguments.no_seccomp;
    if arguments.no_jail {
        config.jail = JailConfig { seccomp: false, ..JailConfig::default() };
    }
    if let Some(socket) = &arguments.vsock {
        config.vsock = Some(VsockConfig { cid: 3, socket: socket.clone() });
    }
    for disk in &arguments.disks {
        let (path, read_only) = disk.strip_suffix(",ro").map_or((disk.as_str(), false), |path| (path, true));
        let id = format!("disk{}", config.disks.len());
        config.disks.push(DiskConfig { id, read_only, path: Some(path.into()), ..DiskConfig::default() });
    }
    for tap in &arguments.taps {
        let tap = Some(tap.clone());
        config.networks.push(NetworkConfig {
            tap,
            fd: None,
            socket: None,
            empty: None,
            mac: None,
            mtu: 1500,
        });
    }
    if arguments.console {
        config.console.output = Output::Stdout;
        config.console.input = Input::Stdin;
    }
    if arguments.serial {
        config.serial = Some(SerialConfig { output: Output::Stdout });
    }
    config.check()?;
    Ok(config)
}

fn from_kernel(kernel: PathBuf) -> Config {
    Config {
        machine: MachineConfig::default(),
        boot: Some(BootConfig { kernel, initramfs: None, cmdline: DEFAULT_CMDLINE.to_owned() }),
        restore: None,
        disks: Vec::new(),
        filesystems: Vec::new(),
        networks: Vec::new(),
        vsock: None,
        rng: true,
        console: ConsoleConfig::default(),
        serial: None,
        control: None,
        ready: None,
        report: None,
        jail: JailConfig::default(),
    }
}

fn set<T: Clone>(to: &mut T, from: Option<&T>) {
    if let Some(value) = from {
        to.clone_from(value);
    }
}

fn set_some<T: Clone>(to: &mut Option<T>, from: Option<&T>) {
    if from.is_some() {
        *to = from.cloned();
    }
}

fn check(config: &Config) -> u8 {
    match vmm::machine::check(config) {
        Ok(()) => {
            println!("the configuration is good");
            0
        }
        Err(error) => fail(&error, error.exit_status()),
    }
}

fn run(config: vmm::Result<Config>, timeline: &Arc<Timeline>) -> u8 {
    let result = config.and_then(|config| {
        timeline.mark("config-read");
        let report = config.report.clone().map(|path| {
            let file = Report::create(&path);
            let file =
                file.map_err(|source| vmm::Error::Input { what: "report", path: path.clone(), source })?;
            Ok::<_, vmm::Error>((path, file))
        });
        let report = report.transpose()?;
        let machine = Machine::build(config, Arc::clone(timeline))?;
        signals::end_on_signals(&machine.exit_request())?;
        machine.run().map(|(outcome, result)| (outcome, result, report))
    });
    let (outcome, report, file) = match result {
        Ok(ended) => ended,
        Err(error) => return fail(&error, error.exit_status()),
    };
    if let Some(complaint) = report.complaint(&outcome) {
        eprint!("bulkhead-vmm: {complaint}");
    }
    let mut status = outcome.exit_status();
    if let Some((path, file)) = file
        && let Err(error) = report.write(&file)
    {
        eprintln!("bulkhead-vmm: cannot write the report {path:?}: {error}");
        status = if status == 0 { STATUS_OS } else { status };
    }
    if let Outcome::Signal(signal) = outcome {
        // As if it had not been handled: whoever waits for this process sees the signal.
        signals::die_by(signal);
    }
    status
}

fn self_test() -> u8 {
    let verdict = vmm::selftest::run();
    println!("{verdict}");
    if verdict.is_usable() { 0 } else { STATUS_KVM_UNUSABLE }
}

fn ctl(socket: &Path, ask: impl FnOnce(&mut Client) -> Result<serde_json::Value, ClientError>) -> u8 {
    match Client::connect(socket).and_then(|mut client| ask(&mut client)) {
        Ok(answer) => print_json(&answer),
        Err(error) => fail(&error, 1),
    }
}

fn print_json(value: &impl serde::Serialize) -> u8 {
    match serde_json::to_writer_pretty(io::stdout().lock(), value) {
        Ok(()) => {
            println!();
            0
        }
        Err(error) => fail(&error, STATUS_OS),
    }
}

/// Prints the error with all its causes.
fn fail(error: &dyn std::error::Error, status: u8) -> u8 {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    eprintln!("bulkhead-vmm: {text}");
    status
}
