//! The QEMU process: its command line, its monitor (QMP), saving and resuming.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

const PROGRAM: &str = "qemu-system-x86_64";
/// Memory of the host. The file behind it is sparse, what nobody wrote costs nothing.
const MEMORY: &str = "4096M";
/// The machine. Saved states are bound to it: see [`identity`].
const MACHINE: &[&str] = &[
    "-accel",
    "tcg,thread=single",
    "-cpu",
    "EPYC,+svm",
    "-smp",
    "1",
    "-m",
    MEMORY,
    "-machine",
    "q35,memory-backend=ram",
    "-display",
    "none",
    "-vga",
    "none",
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
];
/// `no_timer_check` and the rest spare instructions; the log goes to the second serial port.
const KERNEL_COMMAND_LINE: &str = "console=ttyS1 panic=-1 mitigations=off no_timer_check nowatchdog quiet";

/// How the host's clock moves while it is idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// Idle time is skipped: sleeping costs nothing and figures are the same every time. Waiting for something
    /// outside the host (the shared folder) makes it leap.
    Leaping,
    /// Idle time passes as on a real machine. For programs with timeouts that wait for something outside.
    Steady,
}

/// What a saved state depends on besides the host's image.
pub fn identity() -> Result<String> {
    let version = Command::new(PROGRAM)
        .arg("--version")
        .output()
        .with_context(|| format!("run {PROGRAM}; is it installed? (apt-get install qemu-system-x86)"))?;
    Ok(format!("{} {MACHINE:?} {KERNEL_COMMAND_LINE}", String::from_utf8_lossy(&version.stdout)))
}

/// A QEMU process. Dropping it ends it.
pub struct Qemu {
    process: Child,
    monitor: Monitor,
    /// Sockets and logs of this process.
    work: tempfile::TempDir,
    /// Set when it starts from a saved state: the file with the state of its devices.
    saved: Option<PathBuf>,
}

impl Qemu {
    /// A host that boots from `image` with `more` on its kernel's command line, its memory in `dir`, ready to be saved
    /// there.
    pub fn boot(image: &Path, dir: &Path, more: &str) -> Result<Self> {
        let file = |name: &str| image.join(name).into_os_string();
        let mut command = Command::new(PROGRAM);
        command.arg("-kernel").arg(file("vmlinuz")).arg("-initrd").arg(file("initramfs.cpio"));
        command.args(["-append", &format!("{KERNEL_COMMAND_LINE} {more}")]);
        Self::spawn(command, &ram(&dir.join("memory"), true), Clock::Leaping, None, None)
    }

    /// A copy of the host saved in `dir`, with `share` as the folder it may mount. With `save_to` it can be saved
    /// again there.
    pub fn resume(dir: &Path, clock: Clock, share: Option<&Path>, save_to: Option<&Path>) -> Result<Self> {
        let mut memory = ram(&dir.join("memory"), false);
        if let Some(target) = save_to {
            let copied =
                Command::new("cp").arg("--sparse=always").arg(dir.join("memory")).arg(target).status()?;
            if !copied.success() {
                bail!("cannot copy the memory of the saved host to {}: is the disk full?", target.display());
            }
            memory = ram(&target.join("memory"), true);
        }
        let mut command = Command::new(PROGRAM);
        command.args(["-incoming", "defer"]);
        Self::spawn(command, &memory, clock, share, Some(dir.join("devices")))
    }

    fn spawn(
        mut command: Command,
        memory: &str,
        clock: Clock,
        share: Option<&Path>,
        saved: Option<PathBuf>,
    ) -> Result<Self> {
        let work = tempfile::Builder::new().prefix("emulated-host-").tempdir()?;
        let socket = work.path().join("monitor");
        let nothing = work.path().join("nothing");
        fs::create_dir(&nothing)?;
        let share = share.unwrap_or(&nothing).display().to_string();
        let sleep = if clock == Clock::Leaping { "off" } else { "on" };
        command.args(MACHINE).args(["-icount", &format!("shift=1,sleep={sleep}"), "-object", memory]);
        command.args(["-chardev", "stdio,id=commands,signal=off", "-serial", "chardev:commands"]);
        command.args(["-serial", &format!("file:{}", work.path().join("console").display())]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display()), "-S"]);
        // For a person who looks into a host that stands still: socat - unix-connect:/tmp/emulated-host-…/hmp
        command.args(["-monitor", &format!("unix:{},server=on,wait=off", work.path().join("hmp").display())]);
        // A comma in the path would end it.
        let share = share.replace(',', ",,");
        command.args(["-fsdev", &format!("local,id=host,path={share},security_model=none,multidevs=remap")]);
        command.args(["-device", "virtio-9p-pci,fsdev=host,mount_tag=host"]);
        let errors = fs::File::create(work.path().join("errors"))?;
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors).spawn().with_context(
                || format!("start {PROGRAM}; is it installed? (apt-get install qemu-system-x86)"),
            )?;
        let monitor = Monitor::connect(&socket, &mut process).inspect_err(|_| {
            let _ = process.kill();
        });
        let monitor = monitor.with_context(|| {
            let errors = fs::read_to_string(work.path().join("errors")).unwrap_or_default();
            format!("start {PROGRAM}: {}", errors.trim_end())
        })?;
        Ok(Self { process, monitor, work, saved })
    }

    /// Lets the machine run.
    pub fn go(&mut self) -> Result<()> {
        if let Some(devices) = self.saved.clone() {
            self.monitor.skip_memory_in_migration()?;
            self.monitor
                .ask("migrate-incoming", json!({"uri": format!("exec:cat '{}'", devices.display())}))?;
            let end = Instant::now() + Duration::from_secs(30);
            loop {
                let status = self.monitor.ask("query-status", json!({}))?;
                if status["status"] != "inmigrate" {
                    break;
                }
                if Instant::now() > end {
                    bail!("QEMU did not take the saved state {}", devices.display());
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        self.monitor.ask("cont", json!({})).map(drop)
    }

    /// Saves the machine's state beside its memory in `dir` and ends it.
    pub fn save(&mut self, dir: &Path) -> Result<()> {
        self.monitor.ask("stop", json!({}))?;
        self.monitor.skip_memory_in_migration()?;
        let devices = dir.join("devices");
        self.monitor.ask("migrate", json!({"uri": format!("exec:cat > '{}'", devices.display())}))?;
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            let migration = self.monitor.ask("query-migrate", json!({}))?;
            match migration["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => bail!("QEMU could not save the host: {migration}"),
                _ if Instant::now() > end => bail!("QEMU did not save the host in time: {migration}"),
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
        self.monitor.ask("quit", json!({}))?;
        self.process.wait().context("wait for QEMU's end")?;
        Ok(())
    }

    /// The host's command line, its end that we read.
    pub fn take_stdout(&mut self) -> Result<ChildStdout> {
        self.process.stdout.take().context("QEMU's output was taken before")
    }

    /// Sends one line to the host's command line.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let stdin = self.process.stdin.as_mut().context("QEMU has no input")?;
        stdin
            .write_all(line.as_bytes())
            .and_then(|()| stdin.write_all(b"\n"))
            .context("send a command to the host")
    }

    /// What the host's kernel and QEMU itself printed, for a person.
    pub fn console(&self) -> String {
        let read = |name: &str| fs::read(self.work.path().join(name)).unwrap_or_default();
        let kernel = String::from_utf8_lossy(&read("console")).into_owned();
        let errors = String::from_utf8_lossy(&read("errors")).into_owned();
        let lines: Vec<&str> = kernel.lines().chain(errors.lines()).collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Memory in a file: shared to be saved by just ending QEMU, private to start a copy.
fn ram(file: &Path, shared: bool) -> String {
    let share = if shared { "on" } else { "off" };
    let file = file.display().to_string().replace(',', ",,");
    format!("memory-backend-file,id=ram,size={MEMORY},mem-path={file},share={share},prealloc=off,dump=off")
}

/// QMP: one JSON object a line.
struct Monitor {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Monitor {
    fn connect(socket: &Path, process: &mut Child) -> Result<Self> {
        let end = Instant::now() + Duration::from_secs(20);
        let writer = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) if process.try_wait()?.is_some() => bail!("it ended at once"),
                Err(error) if Instant::now() > end => return Err(error).context("connect to its monitor"),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        writer.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut monitor = Self { reader: BufReader::new(writer.try_clone()?), writer };
        monitor.line()?; // its greeting
        monitor.ask("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).context("read from QEMU's monitor")? == 0 {
            bail!("QEMU ended");
        }
        serde_json::from_str(&line).with_context(|| format!("QEMU's monitor said '{}'", line.trim_end()))
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let question = json!({"execute": command, "arguments": arguments}).to_string();
        self.writer.write_all(question.as_bytes()).context("write to QEMU's monitor")?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                return Err(anyhow!("QEMU refused {command}: {}", error["desc"]));
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            // Anything else is an event.
        }
    }

    /// The memory file itself is the memory's saved state; only devices go through the migration stream.
    fn skip_memory_in_migration(&mut self) -> Result<()> {
        let capability = json!({"capability": "x-ignore-shared", "state": true});
        self.ask("migrate-set-capabilities", json!({"capabilities": [capability]})).map(drop)
    }
}
