//! The emulated KVM host: QEMU emulates an AMD machine with SVM, whose Linux offers a standard /dev/kvm.
//!
//! It boots once (about ten seconds) and its state is saved. Every use resumes a copy of that state: guest memory is a
//! file mapped privately, so that resuming reads almost nothing however much the host holds, and nothing that happens
//! in one copy is seen by another. Time in it counts instructions, 2 ns each, and skips while it is idle: it is the
//! same in every run, whatever else this machine does.

mod markers;
mod qemu;

use std::fs::{self, File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::markers::{Event, Splitter};
pub use self::qemu::Clock;
use self::qemu::Qemu;
use crate::workspace;

/// So many emulated hosts run at once on this machine, over all processes: one per core of the build machines.
const AT_ONCE: usize = 2;

/// What a saved state is made of; see [`State::booted`] and [`State::staged`].
#[derive(Debug, Clone)]
pub struct State {
    dir: PathBuf,
}

impl State {
    /// The host right after its boot. Builds the host's image and boots it when that was not done yet.
    pub fn booted() -> Result<Self> {
        Self::booted_with("")
    }

    /// The same host without any cgroup hierarchy, to mount others than the unified one in it.
    pub fn booted_without_cgroups() -> Result<Self> {
        Self::booted_with("cgroups=none")
    }

    fn booted_with(more: &str) -> Result<Self> {
        let image = workspace::path_from_script(&workspace::root().join("tests/host/build"))?;
        let name =
            format!("booted-{}", workspace::key([&*image.to_string_lossy(), &qemu::identity()?, more]));
        let dir = workspace::cached_dir(&workspace::host_cache(), &name, |dir| {
            let mut host = Running::start(Qemu::boot(&image, dir, more)?)?;
            host.wait_ready(Duration::from_secs(180)).context("boot the emulated host")?;
            host.qemu.save(dir)
        })?;
        forget_old("booted-", &dir, 4)?;
        Ok(Self { dir })
    }

    /// This host with podman, dockerd and containerd installed.
    pub fn with_engines(&self) -> Result<Self> {
        let engines = workspace::path_from_script(&workspace::root().join("tests/engines/build"))?;
        let archive = engines.join("engines.tar");
        let place = |dir: &Path| {
            let to = dir.join("engines.tar");
            fs::hard_link(&archive, &to).or_else(|_| fs::copy(&archive, &to).map(drop))?;
            Ok(())
        };
        self.staged(&engines.to_string_lossy(), place, "tar -xf /host/engines.tar -C /")
    }

    /// The host after `command` ran in it with what `prepare` wrote on /host: the way to put files into it once for
    /// many uses. `key` names the result; the same key again answers the state saved before.
    pub fn staged(
        &self,
        key: &str,
        prepare: impl FnOnce(&Path) -> Result<()>,
        command: &str,
    ) -> Result<Self> {
        let name = format!("staged-{}", workspace::key([&*self.dir.to_string_lossy(), command, key]));
        let dir = workspace::cached_dir(&workspace::host_cache(), &name, |dir| {
            let folder = tempfile::Builder::new().prefix("emulated-host-").tempdir()?;
            prepare(folder.path())?;
            let mut host =
                Running::start(Qemu::resume(&self.dir, Clock::Leaping, Some(folder.path()), Some(dir))?)?;
            host.wake()?;
            let mut output = Vec::new();
            let status = host.command(&with_share(command), &mut output, Duration::from_secs(300))?;
            if status != 0 {
                let output = String::from_utf8_lossy(&output).into_owned();
                bail!(
                    "staging in the emulated host failed with status {status}:\n{output}\n{}",
                    host.console()
                );
            }
            host.wait_ready(Duration::from_secs(30))?;
            host.qemu.save(dir)
        })?;
        // Their memory is some hundred megabytes each; a copy still in use stays alive without its name.
        forget_old("staged-", &dir, 11)?;
        Ok(Self { dir })
    }
}

/// How to run one command; see [`run`].
#[derive(Debug)]
pub struct Options<'a> {
    /// The host's clock.
    pub clock: Clock,
    /// A folder of this machine to mount on /host, writable.
    pub share: Option<&'a Path>,
    /// Real time after which the host is ended.
    pub backstop: Duration,
}

/// What came of a command.
#[derive(Debug)]
pub struct Outcome {
    /// The command's exit status as a shell tells it.
    pub status: i32,
    /// The host kernel's messages from resuming on.
    pub console: String,
}

/// Runs one line of shell in a fresh copy of `state`, its output going to `output` as it comes, and ends the copy.
pub fn run(state: &State, command: &str, options: &Options<'_>, output: &mut dyn Write) -> Result<Outcome> {
    let _slot = Slot::take()?;
    let mut host = Running::start(Qemu::resume(&state.dir, options.clock, options.share, None)?)?;
    host.wake()?;
    let command = if options.share.is_some() { with_share(command) } else { command.to_string() };
    let status = host.command(&command, output, options.backstop)?;
    Ok(Outcome { status, console: host.console() })
}

/// Mounts the shared folder around a command. A saved state must not have it mounted.
fn with_share(command: &str) -> String {
    let mount = "mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=loose host /host";
    format!("{mount} || exit 125; {{ {command}\n}}; status=$?; cd /; umount -l /host; exit $status")
        .replace('\n', " ;")
        .replace("; ;", ";")
        .replace("{ ;", "{ ")
}

/// A host that runs, and what it says on its command line.
struct Running {
    qemu: Qemu,
    events: Receiver<Event>,
}

impl Running {
    fn start(mut qemu: Qemu) -> Result<Self> {
        let mut stdout = qemu.take_stdout()?;
        let (sender, events) = channel();
        std::thread::spawn(move || {
            let mut splitter = Splitter::default();
            let mut buffer = vec![0; 65536];
            while let Ok(count @ 1..) = stdout.read(&mut buffer) {
                for event in splitter.push(&buffer[..count]) {
                    if sender.send(event).is_err() {
                        return;
                    }
                }
            }
        });
        let mut host = Self { qemu, events };
        host.qemu.go()?;
        Ok(host)
    }

    /// Waits until a resumed host takes a command. It said that it does before it was saved, so it is asked again.
    fn wake(&mut self) -> Result<()> {
        self.qemu.type_line(":")?;
        self.wait_ready(Duration::from_secs(30)).context("resume the emulated host")
    }

    /// Waits until the host says that it takes a command: once after its boot and after each command.
    fn wait_ready(&mut self, patience: Duration) -> Result<()> {
        self.until(patience, &mut std::io::sink(), |event| matches!(event, Event::Ready).then_some(()))
    }

    fn command(&mut self, line: &str, output: &mut dyn Write, patience: Duration) -> Result<i32> {
        self.qemu.type_line(line)?;
        self.until(patience, output, |event| match event {
            Event::Status(status) => Some(*status),
            _ => None,
        })
    }

    fn until<T>(
        &mut self,
        patience: Duration,
        output: &mut dyn Write,
        wanted: impl Fn(&Event) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + patience;
        loop {
            match self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Event::Output(bytes)) => {
                    output.write_all(&bytes)?;
                    output.flush()?;
                }
                Ok(event) => {
                    if let Some(found) = wanted(&event) {
                        return Ok(found);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!(
                        "the emulated host did not answer within {patience:?} of real time\n{}",
                        self.console()
                    )
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the emulated host went down\n{}", self.console())
                }
            }
        }
    }

    /// What the host's kernel printed, for a person.
    fn console(&self) -> String {
        self.qemu.console()
    }
}

/// The right to run one emulated host. Held by a file lock, so that it ends with its process.
struct Slot {
    _lock: File,
}

impl Slot {
    fn take() -> Result<Self> {
        let dir = workspace::host_cache();
        fs::create_dir_all(&dir)?;
        loop {
            for number in 0..AT_ONCE {
                let lock = File::create(dir.join(format!("slot-{number}")))?;
                match lock.try_lock() {
                    Ok(()) => return Ok(Self { _lock: lock }),
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(error)) => return Err(error).context("lock a slot"),
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Removes all but the newest `keep` directories of the host cache whose names start with `prefix`; never `but`.
fn forget_old(prefix: &str, but: &Path, keep: usize) -> Result<()> {
    let mut found = Vec::new();
    for entry in fs::read_dir(workspace::host_cache())?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) && entry.path() != but {
            let modified = entry.metadata().and_then(|about| about.modified());
            found.push((modified.unwrap_or(std::time::UNIX_EPOCH), entry.path()));
        }
    }
    found.sort();
    found.reverse();
    for (_, path) in found.iter().skip(keep.saturating_sub(1)) {
        // Another process may be removing it too.
        let _ = fs::remove_dir_all(path);
    }
    Ok(())
}
