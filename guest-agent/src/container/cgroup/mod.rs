//! A container's cgroup (v2): limits, freezing, killing, numbers.

mod devices;
mod limits;
mod stats;

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::spec::Resources;
use crate::error::{Context, Error, Result};

pub use limits::Machine;
pub use stats::{Reader, processes};

/// Where the agent has mounted the hierarchy; the agent itself stays in its root, where no limit applies.
const ROOT: &str = "/sys/fs/cgroup";

/// The directory of one container's group.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Makes the group `id` with its limits.
    ///
    /// # Errors
    /// A limit that the kernel refuses; the group is removed again.
    pub fn create(id: &str, resources: &Resources, machine: &Machine) -> Result<Self> {
        let root = Path::new(ROOT);
        enable_controllers(root)?;
        let path = root.join(id);
        fs::create_dir(&path).context(|| format!("create cgroup {}", path.display()))?;
        let open = || rustix::fs::open(&path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let made = open().context(|| format!("open cgroup {}", path.display())).and_then(|directory| {
            let cgroup = Self { path: path.clone(), directory };
            cgroup.apply(&limits::settings(resources, machine, true)?)?;
            if let Some(rules) = &resources.devices {
                devices::restrict(cgroup.directory.as_fd(), rules)?;
            }
            Ok(cgroup)
        });
        if made.is_err() {
            let _ = fs::remove_dir(&path);
        }
        made
    }

    /// The directory, for clone3.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets new limits; what `resources` does not name stays.
    ///
    /// # Errors
    /// A limit that the kernel refuses.
    pub fn update(&self, resources: &Resources, machine: &Machine) -> Result<()> {
        if resources.devices.is_some() {
            return Err(Error::invalid("not supported: changing resources.devices of a running container"));
        }
        self.apply(&limits::settings(resources, machine, false)?)
    }

    fn apply(&self, settings: &[limits::Setting]) -> Result<()> {
        for limits::Setting { file, value, optional } in settings {
            match self.write(file, value) {
                Err(_) if *optional && !self.path.join(file).exists() => {}
                result => result?,
            }
        }
        Ok(())
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let what = || format!("write {value:?} to {}", self.path.join(file).display());
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.directory, file, flags, Mode::empty()).context(what)?;
        rustix::io::write(fd, value.as_bytes()).context(what)?;
        Ok(())
    }

    /// A file's text; empty when the controller is not there.
    pub fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    /// Stops or continues every process of the group.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// Whether all processes of the group and below stand still.
    pub fn is_frozen(&self) -> bool {
        self.read("cgroup.events").lines().any(|line| line == "frozen 1")
    }

    /// Kills every process of the group, frozen or not.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Where a new process of the container goes: the group itself, or, when the container has groups of its own and
    /// so may have no process beside them, that of its init.
    ///
    /// # Errors
    /// The init has ended.
    pub fn for_exec(&self, init: i32) -> Result<OwnedFd> {
        let open = |path: &Path| rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        if self.read("cgroup.subtree_control").trim().is_empty() {
            return open(&self.path).context(|| format!("open cgroup {}", self.path.display()));
        }
        let listed =
            fs::read_to_string(format!("/proc/{init}/cgroup")).context(|| "find the init's cgroup")?;
        let path = listed.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let path = Path::new(ROOT).join(path);
        if !path.starts_with(&self.path) {
            return Err(Error::precondition("the container's init has left its cgroup"));
        }
        open(&path).context(|| format!("open cgroup {}", path.display()))
    }

    /// Whether any process is alive in the group or below.
    pub fn is_populated(&self) -> bool {
        self.read("cgroup.events").lines().any(|line| line == "populated 1")
    }

    /// A file that is ready whenever [`Self::is_populated`] has changed.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn events(&self) -> Result<fs::File> {
        fs::File::open(self.path.join("cgroup.events"))
            .context(|| format!("watch cgroup {}", self.path.display()))
    }

    /// How often the kernel has killed a process of the group for want of memory.
    pub fn oom_kills(&self) -> u64 {
        stats::keyed(&self.read("memory.events"), "oom_kill")
    }

    /// Pids of all processes in the group and below.
    pub fn pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        visit(&self.path, &mut |directory| {
            let procs = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            pids.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()));
        });
        pids
    }

    /// Removes the empty group and the ones that the container has made in it.
    ///
    /// # Errors
    /// A process is still alive.
    pub fn remove(&self) -> Result<()> {
        let mut directories = Vec::new();
        visit(&self.path, &mut |directory| directories.push(directory.to_owned()));
        for directory in directories.iter().rev() {
            fs::remove_dir(directory).context(|| format!("remove cgroup {}", directory.display()))?;
        }
        Ok(())
    }
}

/// Parents come before their children.
fn visit(directory: &Path, seen: &mut dyn FnMut(&Path)) {
    seen(directory);
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            visit(&entry.path(), seen);
        }
    }
}

/// Gives containers every controller that the guest kernel has, once, while there is no group to convert.
fn enable_controllers(root: &Path) -> Result<()> {
    let read = |file: &str| {
        fs::read_to_string(root.join(file)).context(|| format!("read {file} of the cgroup root"))
    };
    let available = read("cgroup.controllers")?;
    let enabled = read("cgroup.subtree_control")?;
    let missing =
        available.split_whitespace().filter(|name| !enabled.split_whitespace().any(|have| have == *name));
    let request: Vec<_> = missing.map(|name| format!("+{name}")).collect();
    if request.is_empty() {
        return Ok(());
    }
    let request = request.join(" ");
    fs::write(root.join("cgroup.subtree_control"), &request)
        .context(|| format!("enable cgroup controllers {request}"))
}
