//! The host's cgroup of a container: all that works for it is in there, so that the host's accounts and limits hold
//! for monitor, file server and guest together, and engines find their figures. On a host with several hierarchies
//! (cgroup v1, or v1 and v2: hybrid) it is a group in each.
//!
//! The container's own limits are the guest's to enforce, exactly. Here they are enforced once more, with room for what
//! a machine costs besides the container, so that a container within its limits is never killed by the host.

mod hierarchies;
mod limits;
mod members;
mod oom;
mod systemd;
mod v1;
mod v2;

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_runtime::{Context, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::limits::Limits;
use self::systemd::{Legacy, Scope};

/// How long processes that were killed may take to leave.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long those who listen for an out-of-memory kill have to look at it.
const LISTENERS: Duration = Duration::from_millis(100);

/// A container's group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored")]
pub struct Cgroup {
    groups: Vec<Group>,
    /// What systemd has made it for.
    scope: Option<Scope>,
}

/// Its part in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Group {
    dir: PathBuf,
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    /// Of v1: its controllers. `None`: it is the unified one.
    controllers: Option<Vec<String>>,
}

/// What a container's state may hold.
#[derive(Deserialize)]
#[serde(untagged)]
enum Stored {
    /// The directory, on v2: of containers made before there was more.
    Unified(PathBuf),
    Groups {
        groups: Vec<Group>,
        scope: Option<Scope>,
    },
}

impl From<Stored> for Cgroup {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::Unified(dir) => {
                let group = Group { dir, mount: "/sys/fs/cgroup".into(), controllers: None };
                Self { groups: vec![group], scope: None }
            }
            Stored::Groups { groups, scope } => Self { groups, scope },
        }
    }
}

impl Cgroup {
    /// Where `linux.cgroupsPath` leads, `None` on a host without any hierarchy.
    ///
    /// # Errors
    /// The path is none, the host's hierarchies cannot be found, or systemd is to be asked and does not run.
    pub fn locate(path: &str, systemd: bool, id: &str) -> Result<Option<Self>> {
        let scope = if systemd { Some(Scope::new(path, id)?) } else { None };
        let relative = match (&scope, path) {
            (Some(scope), _) => scope.dir(),
            (None, "") => PathBuf::from(id),
            (None, path) => PathBuf::from(path.trim_start_matches('/')),
        };
        if !is_plain(&relative) || relative.as_os_str().is_empty() {
            return Err(Error::Usage(format!("linux.cgroupsPath {path:?} is no path of a cgroup")));
        }
        let from_root = systemd || path.starts_with('/');
        let groups = hierarchies::find()?.into_iter().map(|hierarchy| {
            // As runc: on v1 a path without `/` begins where the runtime is. On v2 there are processes, and then no groups.
            let below = hierarchy.controllers.is_some() && !from_root && is_plain(&hierarchy.own);
            let base = if below { hierarchy.mount.join(&hierarchy.own) } else { hierarchy.mount.clone() };
            Group { dir: base.join(&relative), mount: hierarchy.mount, controllers: hierarchy.controllers }
        });
        let groups: Vec<_> = groups.collect();
        Ok((!groups.is_empty()).then_some(Self { groups, scope }))
    }

    /// Makes it with these limits (runtime-spec's `linux.resources`) and this process in it.
    ///
    /// # Errors
    /// A hierarchy cannot be written, or the kernel refuses a limit.
    pub fn make(&self, pid: i32, resources: &Value, machine_mib: u32) -> Result<()> {
        let limits = Limits::of(resources, machine_mib);
        if let Some(scope) = &self.scope {
            scope.start(pid, &limits, self.legacy())?;
        }
        for group in &self.groups {
            match &group.controllers {
                // Also where systemd is asked: it has no words for some of them.
                Some(all) => v1::make(&group.mount, &group.dir, all.iter().any(|one| one == "cpuset"))?,
                None if self.scope.is_some() => {}
                None => v2::make(&group.mount, &group.dir)?,
            }
        }
        self.write(&limits)?;
        self.add(pid)
    }

    /// Moves a process into it.
    ///
    /// # Errors
    /// It ended, or a hierarchy cannot be written.
    pub fn add(&self, pid: i32) -> Result<()> {
        self.groups.iter().try_for_each(|group| group.set("cgroup.procs", &pid.to_string()))
    }

    /// Sets limits, each as far as `resources` (runtime-spec's `linux.resources`) has it.
    ///
    /// # Errors
    /// The host's kernel refuses one, or has no controller for it.
    pub fn limit(&self, resources: &Value, machine_mib: u32) -> Result<()> {
        let limits = Limits::of(resources, machine_mib);
        if let Some(scope) = &self.scope {
            scope.limit(&limits, self.legacy())?;
        }
        self.write(&limits)
    }

    fn write(&self, limits: &Limits) -> Result<()> {
        for (file, value) in v1::files(limits) {
            if let Some(group) = self.of(file).filter(|group| group.controllers.is_some()) {
                group.set(v1::name(&group.dir, file), &value)?;
            }
        }
        for (file, value) in v2::files(limits) {
            match self.of(file) {
                Some(group) if group.controllers.is_none() => group.set(file, &value)?,
                Some(_) => {}
                None => {
                    return Err(Error::Usage(format!(
                        "cannot limit {}: this host has no cgroup hierarchy with the controller; mount one, or ask for no limit",
                        controller(file)
                    )));
                }
            }
        }
        Ok(())
    }

    /// Where a file's controller is: in a hierarchy of v1 that is mounted, otherwise in the unified one.
    fn of(&self, file: &str) -> Option<&Group> {
        let has = |group: &&Group| {
            group.controllers.as_ref().is_some_and(|all| all.iter().any(|one| one == controller(file)))
        };
        self.groups.iter().find(has).or_else(|| self.groups.iter().find(|group| group.controllers.is_none()))
    }

    fn legacy(&self) -> Legacy {
        let legacy = |file: &str| self.of(file).is_some_and(|group| group.controllers.is_some());
        Legacy { cpu: legacy("cpu.shares"), disks: legacy("blkio.weight"), cpuset: legacy("cpuset.cpus") }
    }

    /// Bytes of memory in use, and how many may be. `None`: there is no limit, or no controller of memory.
    pub fn memory(&self) -> Option<(u64, u64)> {
        let group = self.of("memory.max")?;
        let number = |file: &str| {
            let name = if group.controllers.is_some() { v1::name(&group.dir, file) } else { file };
            fs::read_to_string(group.dir.join(name)).ok()?.trim().parse().ok()
        };
        let used = if group.controllers.is_some() { "memory.usage_in_bytes" } else { "memory.current" };
        Some((number(used)?, number("memory.max")?))
    }

    /// Has the host's kernel count an out-of-memory kill in this group, which is where engines look for one: the guest's
    /// kernel has killed the container's process, but nobody outside sees that. A process made for it is the victim.
    pub fn report_oom(&self) {
        if let Some(group) = self.of("memory.max") {
            oom::report(&group.dir, group.controllers.is_some());
        }
    }

    /// Keeps it for those who look at an out-of-memory kill when the container has ended (conmon does): systemd takes the
    /// group away as soon as its last process, this one, has left.
    pub fn linger(&self) {
        if self.scope.is_some() {
            std::thread::sleep(LISTENERS);
        }
    }

    /// Ends what is left in it and removes it.
    pub fn remove(&self) {
        let start = Instant::now();
        if let Some(scope) = &self.scope {
            // systemd would ask them to end, and wait.
            self.groups.iter().for_each(|group| members::kill(&group.dir));
            scope.stop();
        }
        for group in &self.groups {
            // Never more than this one: its ancestors are the engine's.
            while let Err(error) = fs::remove_dir(&group.dir) {
                if error.kind() != io::ErrorKind::ResourceBusy || start.elapsed() > PATIENCE {
                    break;
                }
                members::kill(&group.dir);
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

impl Group {
    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.dir.join(file);
        fs::write(&path, value).context(|| format!("cannot write {value:?} to {}", path.display()))
    }
}

/// A file's controller, by v1's name.
fn controller(file: &str) -> &str {
    match file.split('.').next().unwrap_or(file) {
        "io" => "blkio",
        name => name,
    }
}

fn is_plain(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_path_stays_below_the_root() {
        for bad in ["/../x", "a/../../x", "/", "./x"] {
            assert!(Cgroup::locate(bad, false, "id").is_err(), "{bad}");
        }
    }

    fn group(dir: &Path, controllers: Option<&[&str]>) -> Group {
        let controllers = controllers.map(|all| all.iter().map(|&one| one.to_owned()).collect());
        Group { dir: dir.to_owned(), mount: dir.to_owned(), controllers }
    }

    #[test]
    fn states_of_both_kinds_are_read() {
        let old: Cgroup = serde_json::from_value(json!("/sys/fs/cgroup/engine/box")).unwrap();
        assert_eq!(
            old.groups.first().map(|group| group.dir.as_path()),
            Some(Path::new("/sys/fs/cgroup/engine/box"))
        );
        let new = Cgroup {
            groups: vec![group(Path::new("/a"), None), group(Path::new("/b"), Some(&["memory"]))],
            scope: Scope::parse("machine.slice:libpod:abc", "").ok(),
        };
        assert_eq!(serde_json::from_value::<Cgroup>(json!(new)).unwrap(), new);
    }

    #[test]
    fn each_limit_goes_where_its_controller_is() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| {
            let place = dir.path().join(name);
            fs::create_dir(&place).unwrap();
            place
        };
        let (memory, unified) = (place("memory"), place("unified"));
        let resources = json!({"memory": {"limit": 1 << 20}, "cpu": {"shares": 1024}});
        let hybrid =
            Cgroup { groups: vec![group(&unified, None), group(&memory, Some(&["memory"]))], scope: None };
        hybrid.limit(&resources, 72).unwrap();
        let value = |path: PathBuf| fs::read_to_string(path).ok();
        assert_eq!(value(memory.join("memory.limit_in_bytes")).unwrap(), (200 << 20).to_string());
        assert_eq!(value(unified.join("memory.max")), None);
        assert_eq!(value(unified.join("cpu.weight")).unwrap(), "39");
        let error =
            Cgroup { groups: vec![group(&memory, Some(&["memory"]))], scope: None }.limit(&resources, 72);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("cannot limit cpu"), "{error}");
    }
}
