//! cgroup v1: a hierarchy for each controller, or for a few together.

use std::fs;
use std::path::Path;

use bulkhead_runtime::{Context, Result};

use super::limits::{Limits, Rate};

/// Makes the group `dir` below `mount`.
///
/// # Errors
/// The hierarchy cannot be written.
pub fn make(mount: &Path, dir: &Path, cpuset: bool) -> Result<()> {
    fs::create_dir_all(dir).context(|| format!("cannot make the cgroup {}", dir.display()))?;
    if !cpuset {
        return Ok(());
    }
    // A new group of this controller has no processors and no memory, and then takes no process.
    let mut chain: Vec<_> = dir.ancestors().take_while(|dir| dir.starts_with(mount)).collect();
    chain.reverse();
    for pair in chain.windows(2) {
        let [parent, child] = pair else { continue };
        for file in ["cpuset.cpus", "cpuset.mems"] {
            inherit(parent, child, file)?;
        }
    }
    Ok(())
}

fn inherit(parent: &Path, child: &Path, file: &str) -> Result<()> {
    let read = |dir: &Path| {
        let path = dir.join(file);
        fs::read_to_string(&path).context(|| format!("cannot read {}", path.display()))
    };
    if read(child)?.trim().is_empty() {
        let path = child.join(file);
        fs::write(&path, read(parent)?)
            .context(|| format!("cannot write the parent's processors to {}", path.display()))?;
    }
    Ok(())
}

/// The files that take the limits, in the order in which they can be written.
pub fn files(limits: &Limits) -> Vec<(&'static str, String)> {
    let mut files = Vec::new();
    let mut set = |file, value: Option<String>| files.extend(value.map(|value| (file, value)));
    set("memory.limit_in_bytes", limits.memory.map(|bytes| bytes.to_string()));
    // Memory and swap together here.
    let both = limits.memory.zip(limits.swap).map(|(memory, swap)| memory.saturating_add(swap));
    set("memory.memsw.limit_in_bytes", both.map(|bytes| bytes.to_string()));
    set("cpu.cfs_period_us", limits.period.map(|period| period.to_string()));
    set("cpu.cfs_quota_us", limits.quota.map(|quota| quota.to_string()));
    set("cpu.shares", limits.shares.map(|shares| shares.to_string()));
    set("cpuset.cpus", limits.cpus.clone());
    set("cpuset.mems", limits.mems.clone());
    set("blkio.weight", limits.weight.map(|weight| weight.to_string()));
    for throttle in &limits.throttles {
        let file = match throttle.kind {
            Rate::ReadBytes => "blkio.throttle.read_bps_device",
            Rate::WriteBytes => "blkio.throttle.write_bps_device",
            Rate::Reads => "blkio.throttle.read_iops_device",
            Rate::Writes => "blkio.throttle.write_iops_device",
        };
        set(file, Some(format!("{} {}", throttle.device, throttle.rate)));
    }
    files
}

/// The name that this kernel has for a file: weights of disks belong to their scheduler, which is BFQ since Linux 5.0.
pub fn name<'a>(dir: &Path, file: &'a str) -> &'a str {
    const OF_BFQ: &str = "blkio.bfq.weight";
    if file == "blkio.weight" && !dir.join(file).exists() && dir.join(OF_BFQ).exists() {
        OF_BFQ
    } else {
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::limits::tests::example;

    #[test]
    fn limits_as_files_take_them() {
        let expected = [
            ("memory.limit_in_bytes", (240u64 << 20).to_string()),
            ("memory.memsw.limit_in_bytes", (304u64 << 20).to_string()),
            ("cpu.cfs_period_us", "100000".into()),
            ("cpu.cfs_quota_us", "50000".into()),
            ("cpu.shares", "1024".into()),
            ("cpuset.cpus", "0-1".into()),
            ("cpuset.mems", "0".into()),
            ("blkio.weight", "500".into()),
            ("blkio.throttle.write_bps_device", "8:0 1000".into()),
        ];
        assert_eq!(files(&example()), expected);
    }

    #[test]
    fn empty_cpusets_take_their_parents() {
        let root = tempfile::tempdir().unwrap();
        let mount = root.path();
        let child = mount.join("a/b");
        fs::create_dir_all(&child).unwrap();
        for (dir, cpus) in [(mount, "0-3\n"), (&mount.join("a"), "1\n"), (&child, "\n")] {
            fs::write(dir.join("cpuset.cpus"), cpus).unwrap();
            fs::write(dir.join("cpuset.mems"), "0\n").unwrap();
        }
        make(mount, &child, true).unwrap();
        assert_eq!(fs::read_to_string(child.join("cpuset.cpus")).unwrap(), "1\n");
        assert_eq!(fs::read_to_string(mount.join("a/cpuset.cpus")).unwrap(), "1\n");
    }
}
