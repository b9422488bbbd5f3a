//! A container's scope, when the engine wants systemd to be asked for the cgroup (`--systemd-cgroup`). systemd makes the group
//! and takes it away; it is told of the limits too, since it writes what it knows again whenever it likes
//! (`systemctl daemon-reload`). With `Delegate` the group has all controllers, and what is below it is not systemd's.

mod manager;
mod properties;

use std::path::{Path, PathBuf};

use bulkhead_runtime::{Error, Result};
use serde::{Deserialize, Serialize};

use self::manager::Manager;
use super::limits::Limits;

/// There while systemd is the host's manager, sd_booted(3).
const RUNS: &str = "/run/systemd/system";

/// A scope of systemd's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    slice: String,
    name: String,
}

/// Which of its controllers systemd has in hierarchies of v1, where it takes other properties.
#[derive(Clone, Copy, Debug, Default)]
pub struct Legacy {
    /// Of processors.
    pub cpu: bool,
    /// Of disks.
    pub disks: bool,
    /// Of sets of processors.
    pub cpuset: bool,
}

impl Scope {
    /// What `slice:prefix:name` means, for a container of this id.
    ///
    /// # Errors
    /// It is none, or systemd does not run here.
    pub fn new(path: &str, id: &str) -> Result<Self> {
        let scope = Self::parse(path, id)?;
        if Path::new(RUNS).is_dir() {
            return Ok(scope);
        }
        Err(Error::Usage(format!(
            "systemd not running on this host, cannot use systemd cgroups manager for {path:?}: {RUNS} is missing; \
             have the engine use cgroupfs (podman --cgroup-manager cgroupfs, dockerd --exec-opt native.cgroupdriver=cgroupfs)"
        )))
    }

    pub(super) fn parse(path: &str, id: &str) -> Result<Self> {
        let parts = if path.is_empty() { vec!["", "bulkhead", id] } else { path.split(':').collect() };
        let [slice, prefix, name] = parts.as_slice() else {
            return Err(Error::Usage(format!("linux.cgroupsPath {path:?} is not slice:prefix:name")));
        };
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        let stem = slice.strip_suffix(".slice").unwrap_or("/");
        let is_slice = stem == "-" || stem.split('-').all(|part| !part.is_empty() && !part.contains('/'));
        if !is_slice {
            return Err(Error::Usage(format!(
                "linux.cgroupsPath {path:?}: {slice:?} is not the name of a slice, like machine.slice or a-b.slice"
            )));
        }
        if name.is_empty() || name.contains('/') || prefix.contains('/') || name.ends_with(".slice") {
            return Err(Error::Usage(format!(
                "linux.cgroupsPath {path:?}: {name:?} is no name for a container's scope"
            )));
        }
        let name = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
        Ok(Self { slice: slice.to_owned(), name })
    }

    /// The directory that systemd has for it, below the hierarchies' roots.
    pub fn dir(&self) -> PathBuf {
        let stem = self.slice.strip_suffix(".slice").unwrap_or(&self.slice);
        let mut dir = PathBuf::new();
        // a-b.slice is in a.slice; the root's slice is "-".
        let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
        for end in ends.filter(|_| stem != "-") {
            dir.push(format!("{}.slice", stem.get(..end).unwrap_or(stem)));
        }
        dir.join(&self.name)
    }

    /// Has systemd make it with this process in it.
    ///
    /// # Errors
    /// systemd cannot be reached, or refuses.
    pub fn start(&self, pid: i32, limits: &Limits, legacy: Legacy) -> Result<()> {
        let mut manager = Manager::connect()?;
        let mut properties = properties::of_scope(&self.slice, &self.name, pid.unsigned_abs());
        properties.extend(self.limits(&mut manager, limits, legacy)?);
        manager.start(&self.name, &properties)
    }

    /// Tells systemd of other limits.
    ///
    /// # Errors
    /// systemd cannot be reached, or refuses.
    pub fn limit(&self, limits: &Limits, legacy: Legacy) -> Result<()> {
        let mut manager = Manager::connect()?;
        let properties = self.limits(&mut manager, limits, legacy)?;
        if properties.is_empty() { Ok(()) } else { manager.set(&self.name, &properties) }
    }

    fn limits(
        &self,
        manager: &mut Manager,
        limits: &Limits,
        legacy: Legacy,
    ) -> Result<Vec<properties::Named>> {
        let version = if properties::depends_on_version(limits) { manager.version()? } else { 0 };
        Ok(properties::of_limits(limits, legacy, version))
    }

    /// Has systemd forget it. It may have done so already, when the last process left.
    pub fn stop(&self) {
        if let Ok(mut manager) = Manager::connect() {
            let _ = manager.stop(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_directory_is_systemds() {
        let dir = |text: &str| Scope::parse(text, "id").unwrap().dir().display().to_string();
        assert_eq!(dir("machine.slice:libpod:abc"), "machine.slice/libpod-abc.scope");
        assert_eq!(dir("a-b.slice::x"), "a.slice/a-b.slice/x.scope");
        assert_eq!(dir(":docker:1"), "system.slice/docker-1.scope");
        assert_eq!(dir("-.slice:docker:1"), "docker-1.scope");
        assert_eq!(dir(""), "system.slice/bulkhead-id.scope");
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for bad in [
            "/docker/1",
            "a:b",
            "a:b:c:d",
            "a:b:c",
            "../x.slice:b:c",
            "a--b.slice:b:c",
            "-a.slice:b:c",
            ".slice:b:c",
            "a.slice:b:",
            "a.slice:b:../c",
            "a.slice:../b:c",
            "a.slice::b.slice",
        ] {
            assert!(Scope::parse(bad, "id").is_err(), "{bad}");
        }
    }
}
