//! Which cgroup hierarchies this host has: one (v2), one for each controller (v1), or both kinds (hybrid).

use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_runtime::{Context, Error, Result};
use procfs_core::process::MountInfo;
use procfs_core::{FromBufRead, ProcessCGroups};

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where.
    pub mount: PathBuf,
    /// Its controllers, or `name=systemd`; `None` for the unified one.
    pub controllers: Option<Vec<String>>,
    /// The group that this process is in, from `mount` on.
    pub own: PathBuf,
}

/// All that a container is put into, each once.
///
/// # Errors
/// /proc does not tell.
pub fn find() -> Result<Vec<Hierarchy>> {
    let read = |path: &str| fs::read(path).context(|| format!("cannot read {path} to find cgroups"));
    let mounts = read("/proc/self/mountinfo")?;
    let own = read("/proc/self/cgroup")?;
    parse(&String::from_utf8_lossy(&mounts), &String::from_utf8_lossy(&own))
}

fn parse(mounts: &str, own: &str) -> Result<Vec<Hierarchy>> {
    let wrong = |what: &str| {
        let what = what.to_owned();
        move |error: procfs_core::ProcError| Error::Other {
            what: format!("cannot understand {what}"),
            source: error.into(),
        }
    };
    let own = ProcessCGroups::from_buf_read(own.as_bytes()).map_err(wrong("/proc/self/cgroup"))?;
    let mut found: Vec<Hierarchy> = Vec::new();
    // Mounts of other kinds may have names that are no text.
    for line in mounts.lines().filter(|line| line.contains(" - cgroup")) {
        let mount = MountInfo::from_line(line).map_err(wrong("/proc/self/mountinfo"))?;
        let controllers = match mount.fs_type.as_str() {
            "cgroup2" => None,
            "cgroup" => Some(controllers(&mount)),
            _ => continue,
        };
        // Other named ones are of programs that keep their own books.
        let unknown = |all: &Vec<String>| all.is_empty();
        if controllers.as_ref().is_some_and(unknown) || found.iter().any(|one| one.controllers == controllers)
        {
            continue;
        }
        let of = own.0.iter().find(|group| match &controllers {
            None => group.hierarchy == 0 && group.controllers.is_empty(),
            Some(all) => group.controllers.iter().any(|one| all.contains(one)),
        });
        let own = of.map_or("/", |group| group.pathname.as_str());
        // A mount may show a part of the hierarchy only, and this process need not be in that.
        let own = Path::new(own).strip_prefix(&mount.root).unwrap_or(Path::new("")).to_owned();
        found.push(Hierarchy { mount: mount.mount_point, controllers, own });
    }
    Ok(found)
}

/// Of a v1 mount. Empty: none that a container is put into.
fn controllers(mount: &MountInfo) -> Vec<String> {
    const OPTIONS: &[&str] =
        &["rw", "ro", "xattr", "clone_children", "cpuset_v2_mode", "noprefix", "favordynmods", "none"];
    let mut names: Vec<_> = mount
        .super_options
        .iter()
        .filter_map(|(name, value)| match (name.as_str(), value) {
            ("name", Some(value)) if value == "systemd" => Some("name=systemd".to_owned()),
            (_, Some(_)) => None,
            (name, None) => (!OPTIONS.contains(&name)).then(|| name.to_owned()),
        })
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(mounts: &str, own: &str) -> Vec<String> {
        let text = |one: &Hierarchy| {
            let controllers = one.controllers.as_ref().map_or("unified".into(), |all| all.join("+"));
            format!("{} {controllers} {}", one.mount.display(), one.own.display())
        };
        parse(mounts, own).unwrap().iter().map(text).collect()
    }

    #[test]
    fn a_unified_host() {
        let mounts = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
            31 23 0:27 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            shown(mounts, "0::/user.slice/a b.scope\n"),
            ["/sys/fs/cgroup unified user.slice/a b.scope"]
        );
    }

    #[test]
    fn a_hybrid_host() {
        let mounts = "24 18 0:22 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755\n\
            25 24 0:23 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup rw,nsdelegate\n\
            26 24 0:24 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,name=systemd\n\
            29 24 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct\n\
            30 24 0:28 / /sys/fs/cgroup/cpuset rw shared:16 - cgroup cgroup rw,cpuset,clone_children\n\
            33 24 0:31 / /sys/fs/cgroup/openrc rw - cgroup openrc rw,release_agent=/lib/a,name=openrc\n\
            34 1 0:27 / /cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n";
        let own = "12:cpuset:/\n4:cpu,cpuacct:/system.slice/x\n1:name=systemd:/system.slice/x\n0::/system.slice/x\n";
        assert_eq!(
            shown(mounts, own),
            [
                "/sys/fs/cgroup/unified unified system.slice/x",
                "/sys/fs/cgroup/systemd name=systemd system.slice/x",
                "/sys/fs/cgroup/cpu,cpuacct cpu+cpuacct system.slice/x",
                "/sys/fs/cgroup/cpuset cpuset ",
            ]
        );
    }

    #[test]
    fn a_mount_of_a_part() {
        // A container's, without a cgroup namespace.
        let mount =
            |root: &str| format!("30 24 0:28 {root} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n");
        let own = "5:memory:/docker/abc/inner\n";
        assert_eq!(shown(&mount("/docker/abc"), own), ["/sys/fs/cgroup/memory memory inner"]);
        assert_eq!(shown(&mount("/docker/other"), own), ["/sys/fs/cgroup/memory memory "]);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        assert!(parse("1 2 3 - cgroup\n", "").is_err());
        assert!(parse("", "nonsense\n").is_err());
    }
}
