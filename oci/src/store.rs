//! What is on disk about each container: `<root>/<id>/state.json`, as runtime-spec's state and some more.
//!
//! The container's process, as engines see it, is its stand-in ([`crate::sandbox`]), which ends with its status. Whether it
//! lives is asked of the kernel, not of the file.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bulkhead_runtime::drives::Drive;
use bulkhead_runtime::network::NamespaceRef;
use bulkhead_runtime::settings::Paths;
use bulkhead_runtime::state::Files;
use bulkhead_runtime::{Context, Error, Result};
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::checkpoint::Fittings;
use crate::pod::Pod;

/// Version of runtime-spec that the state follows.
pub const SPEC_VERSION: &str = "1.3.0";
/// The engines' ids have 64 characters; a file name has at most 255 bytes.
const MAX_ID: usize = 200;

/// `status` of runtime-spec's state, and `paused`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// `create` is under way.
    Creating,
    /// Its process waits for `start`.
    Created,
    /// Its process runs.
    Running,
    /// Suspended by `pause`.
    Paused,
    /// Its process has ended.
    Stopped,
}

impl Status {
    /// The word of the state.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// One hook of config.json, `posix-platform hooks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Absolute path of the program.
    pub path: PathBuf,
    /// Its arguments, the name first.
    #[serde(default)]
    pub args: Vec<String>,
    /// Its whole environment.
    #[serde(default)]
    pub env: Vec<String>,
    /// Seconds after which it is killed and has failed.
    #[serde(default)]
    pub timeout: Option<i64>,
}

/// All hooks of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hooks {
    /// Runtime namespaces, after the container's exist. Deprecated, still used.
    pub prestart: Vec<Hook>,
    /// The same.
    pub create_runtime: Vec<Hook>,
    /// Container namespaces (of the host's side).
    pub create_container: Vec<Hook>,
    /// The same, at `start`.
    pub start_container: Vec<Hook>,
    /// Runtime namespaces, after the process runs.
    pub poststart: Vec<Hook>,
    /// Runtime namespaces, after `delete`.
    pub poststop: Vec<Hook>,
}

/// A container.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    /// Its id.
    pub id: String,
    /// As last written; see [`Container::status`].
    pub status: Status,
    /// The process that stands for the container's on the host.
    pub pid: i32,
    /// When that process started, in clock ticks after boot: pids are used again.
    pub pid_start: u64,
    /// The sandbox's process, which works for it.
    #[serde(default)]
    pub sandbox: i32,
    /// When that one started.
    #[serde(default)]
    pub sandbox_start: u64,
    /// Absolute path.
    pub bundle: PathBuf,
    /// Absolute path.
    pub rootfs: PathBuf,
    /// When it was created, RFC 3339.
    pub created: String,
    /// Of config.json.
    pub annotations: BTreeMap<String, String>,
    /// Of config.json.
    pub hooks: Hooks,
    /// Process of config.json, for `exec` to start from.
    pub process: serde_json::Value,
    /// Whose network namespace the guest is joined to, if any.
    pub network: Option<NamespaceRef>,
    /// Sockets of the sandbox.
    pub run: PathBuf,
    /// The group of all its processes.
    #[serde(default)]
    pub cgroup: Option<Cgroup>,
    /// Memory of its machine, MiB.
    #[serde(default)]
    pub machine_mib: u32,
    /// The file server of its machine, once there is one.
    #[serde(default)]
    pub server: Option<ProcessId>,
    /// Its machine is up: others can join it.
    #[serde(default)]
    pub up: bool,
    /// What its machine was made with, once it is up.
    #[serde(default)]
    pub fittings: Option<Fittings>,
    /// The agent's name for it, where that does not follow from its id: in a machine that goes on from a checkpoint, that of the
    /// container that was saved.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub guest_id: String,
    /// Disks of its own in drives of a machine that it has joined.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// The container whose machine it runs in, if that is not its own.
    #[serde(default)]
    pub pod: Option<Pod>,
    /// Who called `create`.
    pub owner: u32,
}

/// A process, for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid.
    pub pid: i32,
    /// When it started, in clock ticks after boot: pids are used again.
    pub start: u64,
}

impl ProcessId {
    /// The process that has this pid now.
    pub fn of(pid: i32) -> Option<Self> {
        Some(Self { pid, start: start_of(pid)? })
    }

    /// Whether it lives.
    pub fn lives(self) -> bool {
        start_of(self.pid) == Some(self.start)
    }
}

/// A root directory of containers.
#[derive(Clone, Debug)]
pub struct Root {
    dir: PathBuf,
    /// Where sockets are.
    run: PathBuf,
}

impl Root {
    /// The directory that was asked for, or the default.
    ///
    /// # Errors
    /// A path that cannot be made absolute.
    pub fn new(asked: Option<&Path>, paths: &Paths) -> Result<Self> {
        let dir = asked.unwrap_or(&paths.oci);
        let dir = std::path::absolute(dir).context(|| format!("cannot use {} as root", dir.display()))?;
        Ok(Self { dir, run: paths.run.clone() })
    }

    fn directory(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    /// The files of a sandbox: its own in the container's directory, its sockets where paths are short.
    pub fn files(&self, id: &str) -> Result<Files> {
        let mut hasher = DefaultHasher::new();
        self.directory(id).hash(&mut hasher);
        let run = self.run.join(format!("{:016x}", hasher.finish()));
        Ok(Files { dir: self.directory(id), run })
    }

    /// Makes a new container's directory.
    ///
    /// # Errors
    /// The id is none, or in use.
    pub fn reserve(&self, id: &str) -> Result<Files> {
        check_id(id)?;
        let what = || format!("cannot create {}", self.directory(id).display());
        DirBuilder::new().recursive(true).mode(0o711).create(&self.dir).context(what)?;
        match DirBuilder::new().mode(0o711).create(self.directory(id)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::Usage(format!(
                    "container with given ID already exists: {id} (`bulkhead-oci delete {id}` removes it)"
                )));
            }
            result => result.context(what)?,
        }
        let files = self.files(id)?;
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&files.run);
        made.inspect_err(|_| drop(fs::remove_dir(self.directory(id))))
            .context(|| format!("cannot create {}", files.run.display()))?;
        Ok(files)
    }

    /// Forgets a container.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.files(id)?.remove()
    }

    /// Reads a container's state.
    ///
    /// # Errors
    /// It does not exist, or its state does not parse.
    pub fn load(&self, id: &str) -> Result<Container> {
        check_id(id)?;
        let path = self.directory(id).join("state.json");
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.directory(id).exists() => {
                Err(Error::Usage(format!("container does not exist: {id}")))
            }
            Err(error) => Err(error).context(|| format!("cannot read {}", path.display())),
            Ok(text) => serde_json::from_slice(&text).context(|| {
                format!("{} is damaged: remove the container with `delete --force`", path.display())
            }),
        }
    }

    /// Whether there is anything of this id.
    pub fn exists(&self, id: &str) -> bool {
        check_id(id).is_ok() && self.directory(id).exists()
    }

    /// Writes a container's state so that readers see the old one or the new one.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn save(&self, container: &Container) -> Result<()> {
        let dir = self.directory(&container.id);
        let path = dir.join("state.json");
        let temporary = dir.join(format!(".state.{}", std::process::id()));
        let what = || format!("cannot write {}", path.display());
        let text = serde_json::to_vec(container).context(what)?;
        let write = || -> io::Result<()> {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?.write_all(&text)?;
            fs::rename(&temporary, &path)
        };
        write().inspect_err(|_| drop(fs::remove_file(&temporary))).context(what)
    }

    /// The ids of all containers, sorted.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn ids(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.context(|| format!("cannot read {}", self.dir.display()))?,
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut ids: Vec<_> = names.filter(|name| check_id(name).is_ok()).collect();
        ids.sort();
        Ok(ids)
    }
}

impl Container {
    /// The agent's name for it. An agent's ids have fewer characters than runc's.
    pub fn in_guest(&self) -> String {
        if !self.guest_id.is_empty() {
            return self.guest_id.clone();
        }
        self.id.chars().map(|c| if c == '+' { '_' } else { c }).take(64).collect()
    }

    /// Whether its process has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.process.get("terminal").and_then(serde_json::Value::as_bool).unwrap_or(false)
    }

    /// The monitor's socket to the guest.
    pub fn vsock(&self) -> PathBuf {
        self.pod.as_ref().map_or(&self.run, |pod| &pod.run).join("vsock")
    }

    /// The monitor's control socket.
    pub fn control(&self) -> PathBuf {
        let run = self.pod.as_ref().map_or(&self.run, |pod| &pod.run).clone();
        Files { dir: PathBuf::new(), run }.control()
    }

    /// Where it is in its life, as the kernel has it.
    pub fn status(&self) -> Status {
        if self.lives() { self.status } else { Status::Stopped }
    }

    /// Whether the container's process lives.
    pub fn lives(&self) -> bool {
        self.pid > 0 && start_of(self.pid) == Some(self.pid_start)
    }

    /// runtime-spec's state, as `state` prints it and hooks read it.
    pub fn state(&self, status: Status) -> serde_json::Value {
        let mut state = serde_json::json!({
            "ociVersion": SPEC_VERSION,
            "id": self.id,
            "status": status.name(),
            "bundle": self.bundle,
        });
        if let Some(fields) = state.as_object_mut() {
            // runc says 0 of a stopped one; the specification only asks for it before.
            fields.insert("pid".into(), if status == Status::Stopped { 0 } else { self.pid }.into());
            if !self.annotations.is_empty() {
                fields.insert("annotations".into(), serde_json::json!(self.annotations));
            }
        }
        state
    }
}

/// What runc takes as an id: letters, digits, `_`, `+`, `-`, `.`.
pub fn check_id(id: &str) -> Result<()> {
    let good = (1..=MAX_ID).contains(&id.len())
        && !matches!(id, "." | "..")
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte));
    if good {
        Ok(())
    } else {
        Err(Error::Usage(format!(
            "invalid container ID format: {id:?} (1 to {MAX_ID} letters, digits, `_`, `+`, `-` or `.`)"
        )))
    }
}

/// When a living process started, in clock ticks after boot: field 22 of `proc_pid_stat(5)`.
pub fn start_of(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_lead_elsewhere_are_refused() {
        for bad in ["", ".", "..", "a/b", "../x", "a b", "a\0b", "ä", &"x".repeat(300)] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "0123abc", "a_b+c-d.e"] {
            assert!(check_id(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_process_is_known_by_its_start() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = child.id() as i32;
        let start = start_of(pid);
        assert!(start.is_some());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_ne!(start_of(pid), start);
    }

    #[test]
    fn an_id_is_given_once() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root { dir: dir.path().join("root"), run: dir.path().join("run") };
        DirBuilder::new().recursive(true).create(root.directory("a")).unwrap();
        let error = root.reserve("a").unwrap_err().to_string();
        assert!(error.contains("already exists"), "{error}");
        assert_eq!(root.ids().unwrap(), ["a"]);
        let error = root.load("b").unwrap_err().to_string();
        assert!(error.contains("does not exist"), "{error}");
    }
}
