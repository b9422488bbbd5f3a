//! Containers by `bulkhead-oci`, one call of it for each step.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as Stream};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use bulkhead_runtime::Settings;

use crate::layers;
use crate::mounts::{self, Mount};
use crate::reap::Reaper;
use crate::stdio::{Names, Open, Prepared};
use crate::tasks::{Backend, Checkpoint, Create, Made, Stdio};

/// Names the program outright.
const VARIABLE: &str = "BULKHEAD_OCI";
/// In a bundle: what `bulkhead-oci` logs.
const LOG: &str = "log.json";
/// The most that is read of what a call prints or logs.
const MAX_WORDS: u64 = 1 << 20;

/// What a task of this backend is made with.
#[derive(Clone, Debug, Default)]
pub struct More {
    /// Its root file system.
    pub rootfs: Vec<Mount>,
    /// `systemd_cgroup` of the runtime's options.
    pub systemd_cgroup: bool,
    /// The checkpoint that it goes on from.
    pub checkpoint: Option<String>,
}

/// `bulkhead-oci`, for one of containerd's namespaces.
#[derive(Debug)]
pub struct Oci {
    program: PathBuf,
    namespace: String,
    /// States of containers.
    root: PathBuf,
    /// Sockets for terminals: their paths must be short.
    consoles: PathBuf,
    /// Layers that are EROFS files become disks.
    erofs_disks: bool,
    reaper: Arc<Reaper>,
    bundles: Mutex<HashMap<String, Known>>,
}

/// What is kept of a task.
#[derive(Clone, Debug)]
struct Known {
    bundle: PathBuf,
    systemd_cgroup: bool,
    /// The host's account of OOM kills in the container's cgroup.
    kills: Option<PathBuf>,
}

impl Oci {
    /// The program: as the settings say, beside this one, or in PATH.
    ///
    /// # Errors
    /// The directories of states cannot be made.
    pub fn new(namespace: &str, reaper: Arc<Reaper>) -> Result<Self> {
        let beside = std::env::current_exe().ok().map(|program| program.with_file_name("bulkhead-oci"));
        let named = std::env::var_os(VARIABLE).map(PathBuf::from);
        // What is wrong with them `bulkhead-oci` says when it is to make a machine; until then nothing else may fail for it.
        let (settings, _) = Settings::load_what_makes_sense();
        let set = Some(settings.programs.oci).filter(|path| !path.as_os_str().is_empty());
        let found = named.or(set).or(beside.filter(|path| path.exists()));
        let program = found.unwrap_or_else(|| "bulkhead-oci".into());
        let kept = settings.paths.containerd;
        let (root, consoles) = (kept.join("states").join(namespace), kept.join("s"));
        for dir in [&root, &consoles] {
            let mut builder = fs::DirBuilder::new();
            builder
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .with_context(|| format!("create {}", dir.display()))?;
        }
        let namespace = namespace.to_owned();
        let erofs_disks = settings.machine.erofs_disks;
        Ok(Self { program, namespace, root, consoles, erofs_disks, reaper, bundles: Mutex::default() })
    }

    fn known(&self, id: &str) -> Result<Known> {
        let known = self.bundles.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
        known.ok_or_else(|| anyhow!("task {id} has no bundle"))
    }

    fn remember(&self, id: &str, known: Known) {
        self.bundles.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned(), known);
    }

    fn command(&self, known: &Known) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.root).arg("--log").arg(known.bundle.join(LOG));
        command.args(["--log-format", "json"]).current_dir(&known.bundle);
        if known.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command
    }

    /// Runs a prepared call. Its error is what it has logged.
    fn run(&self, known: &Known, command: &mut Command) -> Result<()> {
        let log = known.bundle.join(LOG);
        let before = fs::metadata(&log).map_or(0, |about| about.len());
        let exit = self.reaper.run(command).with_context(|| format!("start {}", self.program.display()))?;
        if exit.status == 0 {
            return Ok(());
        }
        Err(anyhow!(last_error(&log, before).unwrap_or_else(|| {
            format!("{} ended with status {} and without a word", self.program.display(), exit.status)
        })))
    }

    /// A call whose streams are of no interest.
    fn call(&self, id: &str, words: &[&str]) -> Result<()> {
        let known = self.known(id)?;
        let mut command = self.command(&known);
        command.args(words).arg(id).stdout(Stream::null()).stderr(Stream::null());
        self.run(&known, &mut command)
    }

    /// Makes a process by a call that leaves it behind.
    fn make(&self, id: &str, known: &Known, name: &str, stdio: &Stdio, words: &[&str]) -> Result<Made<Open>> {
        let names = Names { namespace: &self.namespace, id };
        let pid_file = known.bundle.join(format!("{name}.pid"));
        let mut command = self.command(known);
        let (verb, rest) = words.split_first().context("no verb")?;
        command.arg(verb).arg("--pid-file").arg(&pid_file).args(rest);
        let prepared = Prepared::new(stdio, &self.consoles, &names, &self.reaper, &mut command)?;
        command.arg(id);
        let done = self.run_with_streams(known, &mut command);
        // The fifos are the process's now.
        drop(command);
        done?;
        let text = fs::read_to_string(&pid_file).with_context(|| format!("read {}", pid_file.display()))?;
        let _ = fs::remove_file(&pid_file);
        let pid: u32 = text.trim().parse().with_context(|| format!("{}: {text:?}", pid_file.display()))?;
        let ended = self.reaper.watch(pid.cast_signed());
        Ok(Made { pid, ended, streams: prepared.finish(&names, &self.reaper)? })
    }

    fn run_with_streams(&self, known: &Known, command: &mut Command) -> Result<()> {
        let log = known.bundle.join(LOG);
        let before = fs::metadata(&log).map_or(0, |about| about.len());
        let ended =
            self.reaper.spawn(command).with_context(|| format!("start {}", self.program.display()))?;
        match ended.recv().context("its end went unnoticed")?.status {
            0 => Ok(()),
            status => Err(anyhow!(last_error(&log, before).unwrap_or_else(|| {
                format!("{} ended with status {status} and without a word", self.program.display())
            }))),
        }
    }

    /// Removes what a bundle has left behind, with no process of ours that knows it.
    ///
    /// # Errors
    /// Something of it is left.
    pub fn clean_up(&self, id: &str, bundle: &Path) -> Result<()> {
        self.remember(id, Known { bundle: bundle.to_owned(), systemd_cgroup: false, kills: None });
        self.delete(id)
    }
}

/// The last error in a log, of those after `start`.
fn last_error(log: &Path, start: u64) -> Option<String> {
    use std::io::Seek as _;
    let mut file = fs::File::open(log).ok()?;
    file.seek(std::io::SeekFrom::Start(start)).ok()?;
    let mut text = String::new();
    file.take(MAX_WORDS).read_to_string(&mut text).ok()?;
    text.lines().rev().find_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        (line.get("level")? == "error").then(|| line.get("msg")?.as_str().map(str::to_owned))?
    })
}

impl Backend for Oci {
    type More = More;
    type Streams = Open;
    type Stats = Value;

    fn create(&self, create: &Create<More>) -> Result<Made<Open>> {
        let systemd_cgroup = create.more.systemd_cgroup;
        let mut known = Known { bundle: create.bundle.clone(), systemd_cgroup, kills: None };
        let rootfs = create.bundle.join("rootfs");
        let bundle = create.bundle.display().to_string();
        let mut words = vec!["create", "--bundle", &bundle];
        if let Some(checkpoint) = &create.more.checkpoint {
            words.extend(["--image-path", checkpoint]);
        }
        let disk = mounts::as_disk(&create.more.rootfs);
        let disk = disk.or_else(|| self.erofs_disks.then(|| layers::as_disk(&create.more.rootfs)).flatten());
        match &disk {
            Some(disk) => {
                fs::create_dir_all(&rootfs).with_context(|| format!("create {}", rootfs.display()))?;
                words.extend(["--root-disk", disk]);
            }
            None => mounts::make(&create.more.rootfs, &rootfs)?,
        }
        let made = self.make(&create.id, &known, "init", &create.stdio, &words);
        match made {
            Ok(made) => {
                known.kills = account_of(made.pid);
                self.remember(&create.id, known);
                Ok(made)
            }
            Err(error) => {
                self.remember(&create.id, known);
                // Of one whose terminal did not come; else it is gone already.
                let _ = self.delete(&create.id);
                Err(error)
            }
        }
    }

    fn start(&self, id: &str) -> Result<()> {
        self.call(id, &["start"])
    }

    fn exec(&self, id: &str, exec: &str, spec: &Value, stdio: &Stdio) -> Result<Made<Open>> {
        let known = self.known(id)?;
        if exec.contains('/') || exec.starts_with('.') {
            bail!("{exec:?} is no id of a process");
        }
        let file = known.bundle.join(format!("{exec}.process.json"));
        let write =
            || -> std::io::Result<()> { fs::File::create(&file)?.write_all(spec.to_string().as_bytes()) };
        write().with_context(|| format!("write {}", file.display()))?;
        let path = file.display().to_string();
        let made = self.make(id, &known, exec, stdio, &["exec", "--detach", "--process", &path]);
        let _ = fs::remove_file(&file);
        made
    }

    fn kill(&self, id: &str, signal: u32, all: bool) -> Result<()> {
        let known = self.known(id)?;
        let mut command = self.command(&known);
        command.arg("kill").args(all.then_some("--all")).args([id, &signal.to_string()]);
        command.stdout(Stream::null()).stderr(Stream::null());
        self.run(&known, &mut command)
    }

    fn kill_exec(&self, pid: u32, signal: u32) -> Result<()> {
        // SAFETY: kill takes integers. The process is our child and not known to have ended, so the pid is its own.
        match unsafe { libc::kill(pid.cast_signed(), signal.cast_signed()) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()).with_context(|| format!("signal process {pid}")),
        }
    }

    fn pause(&self, id: &str) -> Result<()> {
        self.call(id, &["pause"])
    }

    fn resume(&self, id: &str) -> Result<()> {
        self.call(id, &["resume"])
    }

    fn update(&self, id: &str, resources: &Value) -> Result<()> {
        let known = self.known(id)?;
        let file = known.bundle.join("resources.json");
        fs::write(&file, resources.to_string()).with_context(|| format!("write {}", file.display()))?;
        let done = self.call(id, &["update", "--resources", &file.display().to_string()]);
        let _ = fs::remove_file(&file);
        done
    }

    fn checkpoint(&self, id: &str, checkpoint: &Checkpoint) -> Result<()> {
        let path = checkpoint.path.display().to_string();
        let mut words = vec!["checkpoint", "--image-path", &path];
        if !checkpoint.exit {
            words.push("--leave-running");
        }
        self.call(id, &words)
    }

    fn stats(&self, id: &str) -> Result<Value> {
        let known = self.known(id)?;
        let (reader, writer) = std::io::pipe().context("make a pipe")?;
        let mut command = self.command(&known);
        command.args(["events", "--stats", id]).stdout(writer).stderr(Stream::null());
        let done = self.run(&known, &mut command);
        drop(command);
        done?;
        let mut text = String::new();
        reader.take(MAX_WORDS).read_to_string(&mut text).context("read the figures")?;
        serde_json::from_str(&text).context("the figures are malformed")
    }

    fn was_oom(&self, id: &str) -> bool {
        let file = self.known(id).ok().and_then(|known| known.kills);
        let account = file.and_then(|file| fs::read_to_string(file).ok());
        let mut lines = account.iter().flat_map(|text| text.lines());
        let kills = lines.find_map(|line| line.strip_prefix("oom_kill "));
        kills.is_some_and(|kills| kills.trim() != "0")
    }

    fn delete(&self, id: &str) -> Result<()> {
        let known = self.known(id)?;
        self.call(id, &["delete", "--force"])?;
        mounts::unmake(&known.bundle.join("rootfs"));
        self.bundles.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        Ok(())
    }
}

/// Where the host's kernel counts the OOM kills in a process's cgroup: in the same words with cgroup v1 and v2.
fn account_of(pid: u32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let group = |wanted: &str| {
        text.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(":/")?;
            controllers.split(',').any(|controller| controller == wanted).then(|| path.to_owned())
        })
    };
    let root = Path::new("/sys/fs/cgroup");
    match group("memory") {
        Some(path) => Some(root.join("memory").join(path).join("memory.oom_control")),
        None => Some(root.join(group("")?).join("memory.events")),
    }
}
