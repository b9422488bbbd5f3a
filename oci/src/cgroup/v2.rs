//! cgroup v2: one hierarchy of all controllers.

use std::fs;
use std::path::Path;

use bulkhead_runtime::{Context, Result};

use super::limits::{Limits, Rate};

/// Makes the group `dir` below `mount`, with the controllers that there are.
///
/// # Errors
/// The hierarchy cannot be written.
pub fn make(mount: &Path, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).context(|| format!("cannot make the cgroup {}", dir.display()))?;
    let ancestors: Vec<_> = dir.ancestors().skip(1).take_while(|dir| dir.starts_with(mount)).collect();
    for ancestor in ancestors.into_iter().rev() {
        for controller in ["memory", "cpu", "cpuset", "io", "pids"] {
            // Those that the host has; and one that cannot be handed down is missed when a limit is set.
            let _ = fs::write(ancestor.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    Ok(())
}

/// The files that take the limits.
pub fn files(limits: &Limits) -> Vec<(&'static str, String)> {
    let mut files = Vec::new();
    let mut set = |file, value: Option<String>| files.extend(value.map(|value| (file, value)));
    set("memory.max", limits.memory.map(|bytes| bytes.to_string()));
    set("memory.swap.max", limits.swap.map(|bytes| bytes.to_string()));
    set("cpu.max", limits.quota.map(|quota| format!("{quota} {}", limits.period.unwrap_or(100_000))));
    set("cpu.weight", limits.shares.map(|shares| cpu_weight(shares).to_string()));
    set("cpuset.cpus", limits.cpus.clone());
    set("cpuset.mems", limits.mems.clone());
    set("io.weight", limits.weight.map(|weight| io_weight(weight).to_string()));
    for throttle in &limits.throttles {
        let key = match throttle.kind {
            Rate::ReadBytes => "rbps",
            Rate::WriteBytes => "wbps",
            Rate::Reads => "riops",
            Rate::Writes => "wiops",
        };
        set("io.max", Some(format!("{} {key}={}", throttle.device, throttle.rate)));
    }
    files
}

/// As runc: 2..262144 becomes 1..10000.
pub fn cpu_weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// As runc: 10..1000 becomes 1..10000.
pub fn io_weight(weight: u64) -> u64 {
    1 + (weight.clamp(10, 1000) - 10) * 9999 / 990
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::limits::tests::example;

    #[test]
    fn limits_as_files_take_them() {
        let expected = [
            ("memory.max", (240u64 << 20).to_string()),
            ("memory.swap.max", "67108864".into()),
            ("cpu.max", "50000 100000".into()),
            ("cpu.weight", "39".into()),
            ("cpuset.cpus", "0-1".into()),
            ("cpuset.mems", "0".into()),
            ("io.weight", "4950".into()),
            ("io.max", "8:0 wbps=1000".into()),
        ];
        assert_eq!(files(&example()), expected);
    }
}
