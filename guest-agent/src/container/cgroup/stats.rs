//! Numbers of a container.

use std::fs;

use bulkhead_protocol::agent::{ProcessInfo, StatsResponse};

use super::Cgroup;

/// Reads the files of one group.
pub struct Reader<'a>(pub &'a Cgroup);

impl Reader<'_> {
    /// Everything that the kernel counts; 0 where it does not.
    pub fn stats(&self) -> StatsResponse {
        let cpu = self.0.read("cpu.stat");
        let microseconds = |key| keyed(&cpu, key).saturating_mul(1000);
        let io = self.0.read("io.stat");
        StatsResponse {
            cpu_usage_ns: microseconds("usage_usec"),
            cpu_user_ns: microseconds("user_usec"),
            cpu_system_ns: microseconds("system_usec"),
            throttled_ns: microseconds("throttled_usec"),
            memory_usage_bytes: self.number("memory.current"),
            memory_limit_bytes: self.number("memory.max"),
            memory_peak_bytes: self.number("memory.peak"),
            oom_kills: self.0.oom_kills(),
            pids_current: self.number("pids.current"),
            pids_limit: self.number("pids.max"),
            read_bytes: io_sum(&io, "rbytes="),
            write_bytes: io_sum(&io, "wbytes="),
        }
    }

    /// "max" is 0: no limit.
    fn number(&self, file: &str) -> u64 {
        self.0.read(file).trim().parse().unwrap_or(0)
    }
}

/// The value after `key` in a "key value" file.
pub fn keyed(text: &str, key: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

fn io_sum(text: &str, key: &str) -> u64 {
    let words = text.split_whitespace();
    words.filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok()).fold(0, u64::saturating_add)
}

/// What `ps` shows of the container. A process that ends meanwhile is left out.
pub fn processes(cgroup: &Cgroup) -> Vec<ProcessInfo> {
    cgroup.pids().into_iter().filter_map(process).collect()
}

fn process(pid: i32) -> Option<ProcessInfo> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("");
    let first =
        |key| line(key).split_whitespace().next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    let mut command = String::from_utf8_lossy(&command).trim_end_matches('\0').replace('\0', " ");
    if command.is_empty() {
        command = format!("[{}]", line("Name:").trim());
    }
    Some(ProcessInfo {
        pid: pid as u32,
        container_pid: line("NSpid:")
            .split_whitespace()
            .last()
            .and_then(|word| word.parse().ok())
            .unwrap_or(0),
        ppid: first("PPid:") as u32,
        uid: first("Uid:") as u32,
        command,
        rss_bytes: first("VmRSS:").saturating_mul(1024),
        cpu_ns: cpu_time(&stat),
    })
}

/// User and system time from /proc/PID/stat, whose second field may have spaces and brackets of its own.
fn cpu_time(stat: &str) -> u64 {
    /// USER_HZ, the same on every x86 kernel.
    const TICK_NS: u64 = 10_000_000;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = after_name.split_whitespace().skip(11).take(2).filter_map(|word| word.parse::<u64>().ok());
    ticks.fold(0, u64::saturating_add).saturating_mul(TICK_NS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_formats() {
        assert_eq!(keyed("low 0\noom 3\noom_kill 2\n", "oom_kill"), 2);
        assert_eq!(keyed("oom_kill_disable 9\n", "oom_kill"), 0);
        assert_eq!(io_sum("254:0 rbytes=10 wbytes=1\n254:16 rbytes=5 wbytes=x\n", "rbytes="), 15);
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 12 30 0 0 20 0 1 0";
        assert_eq!(cpu_time(stat), 420_000_000);
        assert_eq!(cpu_time("garbage"), 0);
    }

    #[test]
    fn sees_this_very_process() {
        let me = process(std::process::id() as i32).unwrap();
        assert!(me.rss_bytes > 0 && me.ppid > 0 && !me.command.is_empty());
    }
}
