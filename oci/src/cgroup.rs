//! The host's cgroup (v2) of a container: all that works for it is in there, so that the host's accounts and limits hold
//! for monitor, file server and guest together, and engines find their figures.
//!
//! The container's own limits are the guest's to enforce, exactly. Here they are enforced once more, with room for what
//! a machine costs besides the container, so that a container within its limits is never killed by the host.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use bulkhead_runtime::{Context, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

const ROOT: &str = "/sys/fs/cgroup";
/// `statfs(2)`, CGROUP2_SUPER_MAGIC.
const CGROUP2: rustix::fs::FsWord = 0x6367_7270;
/// Memory besides the guest's own: monitor, file server, page tables, what the kernel keeps for them. MiB.
pub const OVERHEAD_MIB: u64 = 128;
/// What the victim of [`Cgroup::report_oom`] may take before it is one.
const ROOM_BYTES: usize = 16 << 20;
/// How long processes that were killed may take to leave.
const PATIENCE: Duration = Duration::from_secs(2);

/// A container's group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    /// Where `linux.cgroupsPath` leads, `None` on a host without a unified hierarchy.
    ///
    /// # Errors
    /// The path is none.
    pub fn locate(path: &str, systemd: bool, id: &str) -> Result<Option<Self>> {
        if rustix::fs::statfs(ROOT).map_or(true, |about| about.f_type != CGROUP2) {
            return Ok(None);
        }
        let relative = match path {
            "" => PathBuf::from(id),
            path if systemd => unit(path)?,
            path => PathBuf::from(path.trim_start_matches('/')),
        };
        let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
        if !plain || relative.as_os_str().is_empty() {
            return Err(Error::Usage(format!("linux.cgroupsPath {path:?} is no path of a cgroup")));
        }
        Ok(Some(Self { dir: Path::new(ROOT).join(relative) }))
    }

    /// Makes it, with no process in it.
    ///
    /// # Errors
    /// The hierarchy cannot be written.
    pub fn make(&self) -> Result<()> {
        let what = || format!("cannot make the cgroup {}", self.dir.display());
        fs::create_dir_all(&self.dir).context(what)?;
        let ancestors: Vec<_> =
            self.dir.ancestors().skip(1).take_while(|dir| dir.starts_with(ROOT)).collect();
        for ancestor in ancestors.into_iter().rev() {
            for controller in ["memory", "cpu", "cpuset", "io", "pids"] {
                // Those that the host has; and one that cannot be handed down is missed when a limit is set.
                let _ = fs::write(ancestor.join("cgroup.subtree_control"), format!("+{controller}"));
            }
        }
        Ok(())
    }

    /// Moves a process into it.
    ///
    /// # Errors
    /// It ended, or the hierarchy cannot be written.
    pub fn add(&self, pid: i32) -> Result<()> {
        self.set("cgroup.procs", &pid.to_string())
    }

    /// Sets limits, each as far as `resources` (runtime-spec's `linux.resources`) has it.
    ///
    /// # Errors
    /// The host's kernel refuses one.
    pub fn limit(&self, resources: &Value, machine_mib: u32) -> Result<()> {
        for (file, value) in limits(resources, machine_mib) {
            self.set(file, &value)?;
        }
        Ok(())
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.dir.join(file);
        fs::write(&path, value).context(|| format!("cannot write {value:?} to {}", path.display()))
    }

    /// Has the host's kernel count an out-of-memory kill in this group, which is where engines look for one: the guest's
    /// kernel has killed the container's process, but nobody outside sees that. A process made for it is the victim.
    pub fn report_oom(&self) {
        let number =
            |file: &str| -> Option<u64> { fs::read_to_string(self.dir.join(file)).ok()?.trim().parse().ok() };
        let Some(current) = number("memory.current") else { return };
        let (limit, swap) = (self.dir.join("memory.max"), self.dir.join("memory.swap.max"));
        let most = (current + ROOM_BYTES as u64).to_string();
        // SAFETY: the child only makes system calls and writes to memory it has just mapped: nothing in it waits for a lock
        // that another thread of the sandbox holds.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let _ = fs::write("/proc/self/oom_score_adj", "1000");
            let _ = fs::write(&swap, "0");
            if fs::write(&limit, &most).is_ok() {
                let (size, kind) =
                    (4 * ROOM_BYTES, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE);
                // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is in use.
                unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_WRITE, kind, -1, 0) };
            }
            // SAFETY: _exit has no preconditions.
            unsafe { libc::_exit(0) }
        }
        if let Some(child) = rustix::process::Pid::from_raw(child) {
            let _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
        }
    }

    /// Ends what is left in it and removes it.
    pub fn remove(&self) {
        // Never more than this one: its ancestors are the engine's.
        let start = std::time::Instant::now();
        while let Err(error) = fs::remove_dir(&self.dir) {
            if error.kind() != io::ErrorKind::ResourceBusy || start.elapsed() > PATIENCE {
                return;
            }
            let _ = fs::write(self.dir.join("cgroup.kill"), "1");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// `slice:prefix:name` as the directory that systemd has for that scope.
fn unit(path: &str) -> Result<PathBuf> {
    let parts: Vec<_> = path.split(':').collect();
    let [slice, prefix, name] = parts.as_slice() else {
        return Err(Error::Usage(format!("linux.cgroupsPath {path:?} is not slice:prefix:name")));
    };
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut dir = PathBuf::new();
    // a-b.slice is in a.slice; the root's slice is "-".
    let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    for end in ends.filter(|&end| end > 0 && stem != "-") {
        dir.push(format!("{}.slice", stem.get(..end).unwrap_or(stem)));
    }
    let name = if name.ends_with(".slice") { (*name).to_owned() } else { scope(prefix, name) };
    Ok(dir.join(name))
}

fn scope(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") }
}

fn limits(resources: &Value, machine_mib: u32) -> Vec<(&'static str, String)> {
    let number = |pointer: &str| resources.pointer(pointer).and_then(Value::as_i64);
    let text =
        |pointer: &str| resources.pointer(pointer).and_then(Value::as_str).filter(|text| !text.is_empty());
    let mut limits = Vec::new();
    let limit = number("/memory/limit").filter(|&limit| limit > 0);
    if limit.is_some() {
        let bytes = (u64::from(machine_mib) + OVERHEAD_MIB) << 20;
        limits.push(("memory.max", bytes.to_string()));
    }
    if let (Some(limit), Some(swap)) = (limit, number("/memory/swap").filter(|&swap| swap > 0)) {
        limits.push(("memory.swap.max", swap.saturating_sub(limit).max(0).to_string()));
    }
    if let Some(quota) = number("/cpu/quota").filter(|&quota| quota > 0) {
        limits.push(("cpu.max", format!("{quota} {}", number("/cpu/period").unwrap_or(100_000))));
    }
    if let Some(shares) = number("/cpu/shares").filter(|&shares| shares >= 2) {
        // As runc: 2..262144 becomes 1..10000.
        let weight = 1 + (shares.min(262_144) - 2) * 9999 / 262_142;
        limits.push(("cpu.weight", weight.to_string()));
    }
    for (pointer, file) in [("/cpu/cpus", "cpuset.cpus"), ("/cpu/mems", "cpuset.mems")] {
        limits.extend(text(pointer).map(|list| (file, list.to_owned())));
    }
    if let Some(weight) = number("/blockIO/weight").filter(|&weight| weight >= 10) {
        // As runc: 10..1000 becomes 1..10000.
        limits.push(("io.weight", (1 + (weight.min(1000) - 10) * 9999 / 990).to_string()));
    }
    for (list, key) in [
        ("throttleReadBpsDevice", "rbps"),
        ("throttleWriteBpsDevice", "wbps"),
        ("throttleReadIOPSDevice", "riops"),
        ("throttleWriteIOPSDevice", "wiops"),
    ] {
        let entries = resources.pointer(&format!("/blockIO/{list}")).and_then(Value::as_array);
        for entry in entries.into_iter().flatten() {
            let number = |key: &str| entry.get(key).and_then(Value::as_u64);
            if let (Some(major), Some(minor), Some(rate)) = (number("major"), number("minor"), number("rate"))
            {
                limits.push(("io.max", format!("{major}:{minor} {key}={rate}")));
            }
        }
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn systemds_names_are_its_directories() {
        let path = |text: &str| unit(text).map(|path| path.display().to_string());
        assert_eq!(path("machine.slice:libpod:abc").unwrap(), "machine.slice/libpod-abc.scope");
        assert_eq!(path("a-b.slice::x").unwrap(), "a.slice/a-b.slice/x.scope");
        assert_eq!(path(":docker:1").unwrap(), "system.slice/docker-1.scope");
        assert!(path("/docker/1").is_err());
    }

    #[test]
    fn a_path_stays_below_the_root() {
        for bad in ["/../x", "a/../../x", "/", "./x"] {
            assert!(Cgroup::locate(bad, false, "id").map_or(true, |group| group.is_none()), "{bad}");
        }
    }

    #[test]
    fn limits_leave_room_for_the_machine() {
        let resources = json!({
            "memory": {"limit": 67_108_864, "swap": 134_217_728},
            "cpu": {"quota": 50_000, "period": 100_000, "shares": 1024, "cpus": "0-1"},
            "blockIO": {"weight": 500, "throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}]},
        });
        let expected = [
            ("memory.max", (240u64 << 20).to_string()),
            ("memory.swap.max", "67108864".into()),
            ("cpu.max", "50000 100000".into()),
            ("cpu.weight", "39".into()),
            ("cpuset.cpus", "0-1".into()),
            ("io.weight", "4950".into()),
            ("io.max", "8:0 wbps=1000".into()),
        ];
        assert_eq!(limits(&resources, 112), expected);
        assert!(limits(&json!({"memory": {"limit": -1}, "cpu": {"quota": -1}}), 112).is_empty());
    }
}
