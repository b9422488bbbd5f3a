//! `linux.resources` in the words of cgroup v2.

use crate::container::spec::{BlockIo, Cpu, Memory, Resources, ThrottleDevice};
use crate::error::{Error, Result};

/// One file to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its name in the group.
    pub file: String,
    /// What to write.
    pub value: String,
    /// Without the file there is nothing to limit.
    pub optional: bool,
}

/// What the guest has, and so what containers may take without starving the agent.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of it that nothing used when the agent started: not the kernel's, not the agent's.
    pub free: u64,
}

impl Machine {
    /// Asks the kernel.
    pub fn this() -> Self {
        let info = rustix::system::sysinfo();
        let bytes = |units: u64| units.saturating_mul(u64::from(info.mem_unit));
        Self { memory: bytes(info.totalram), free: bytes(info.freeram) }
    }

    /// All but what the kernel and the agent need to stay alive.
    fn memory_for_containers(self) -> u64 {
        const LEAST: u64 = 8 << 20;
        self.free.saturating_sub(LEAST.max(self.memory / 32))
    }

    /// Below the kernel's own limit of threads, which is one for every 128 KiB of memory.
    fn pids_for_containers(self) -> u64 {
        (self.memory / (128 << 10) * 7 / 8).clamp(64, 4 << 20)
    }
}

/// Translates. The limits that protect the agent are set at creation, and no later limit is above them.
///
/// # Errors
/// `INVALID_ARGUMENT` for what cgroup v2 does not have.
pub fn settings(resources: &Resources, machine: &Machine, creation: bool) -> Result<Vec<Setting>> {
    let mut settings = Vec::new();
    memory(&resources.memory, machine, creation, &mut settings)?;
    cpu(&resources.cpu, &mut settings)?;
    let most = machine.pids_for_containers();
    let pids = match resources.pids.limit {
        Some(limit @ 1..) => Some(limit.unsigned_abs().min(most)),
        Some(i64::MIN..=-1) => Some(most),
        None | Some(0) => creation.then_some(most),
    };
    settings.extend(pids.map(|limit| set("pids.max", limit)));
    block_io(&resources.block_io, &mut settings)?;
    for limit in &resources.hugepage_limits {
        plain_name(&limit.page_size)?;
        settings.push(set(&format!("hugetlb.{}.max", limit.page_size), limit.limit));
    }
    for (file, value) in &resources.unified {
        plain_name(file)?;
        settings.push(set(file, value));
    }
    Ok(settings)
}

fn memory(memory: &Memory, machine: &Machine, creation: bool, settings: &mut Vec<Setting>) -> Result<()> {
    if memory.disable_oom_killer {
        return Err(Error::invalid("not supported by cgroup v2: memory.disableOOMKiller"));
    }
    let most = machine.memory_for_containers();
    let asked = memory.limit.filter(|&limit| limit != 0);
    let limit = match asked {
        Some(asked) => Some(u64::try_from(asked).map_or(most, |asked| asked.min(most))),
        None => creation.then_some(most),
    };
    settings.extend(limit.map(|limit| set("memory.max", limit)));
    // The specification's swap is memory and swap together. Without swap in the kernel the file is absent.
    let swap = match (memory.swap, asked) {
        (None | Some(0), _) => None,
        (Some(i64::MIN..=-1), _) => Some("max".to_owned()),
        (Some(both), Some(limit @ 1..)) => match both.checked_sub(limit) {
            Some(swap @ 0..) => Some(swap.to_string()),
            _ => {
                return Err(Error::invalid(
                    "memory.swap is the sum of memory and swap: it is below memory.limit",
                ));
            }
        },
        (Some(_), _) => return Err(Error::invalid("memory.swap needs memory.limit")),
    };
    settings.extend(swap.map(|swap| Setting { optional: true, ..set("memory.swap.max", swap) }));
    settings.extend(memory.reservation.filter(|&low| low > 0).map(|low| set("memory.low", low)));
    Ok(())
}

fn cpu(cpu: &Cpu, settings: &mut Vec<Setting>) -> Result<()> {
    if cpu.realtime_period.is_some_and(|n| n != 0) || cpu.realtime_runtime.is_some_and(|n| n != 0) {
        return Err(Error::invalid("not supported by cgroup v2: cpu.realtimePeriod and realtimeRuntime"));
    }
    if let Some(shares @ 1..) = cpu.shares {
        // 2..262144 onto 1..10000, as every runtime does it.
        let shares = shares.clamp(2, 262_144);
        settings.push(set("cpu.weight", 1 + (shares - 2) * 9999 / 262_142));
    }
    let period = cpu.period.filter(|&period| period > 0);
    if cpu.quota.is_some_and(|quota| quota != 0) || period.is_some() {
        let quota = cpu.quota.filter(|&quota| quota > 0).map_or("max".to_owned(), |quota| quota.to_string());
        settings.push(set("cpu.max", format!("{quota} {}", period.unwrap_or(100_000))));
    }
    settings.extend(cpu.burst.map(|burst| set("cpu.max.burst", burst)));
    settings.extend(cpu.idle.map(|idle| set("cpu.idle", idle)));
    for (file, list) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
        if !list.is_empty() {
            settings.push(set(file, list));
        }
    }
    Ok(())
}

fn block_io(io: &BlockIo, settings: &mut Vec<Setting>) -> Result<()> {
    // 10..1000 onto 1..10000.
    let weight = |weight: u64| 1 + (weight.clamp(10, 1000) - 10) * 9999 / 990;
    if let Some(all @ 1..) = io.weight {
        settings.push(set("io.weight", format!("default {}", weight(all))));
    }
    for device in &io.weight_device {
        settings
            .push(set("io.weight", format!("{}:{} {}", device.major, device.minor, weight(device.weight))));
    }
    let throttles: [(&str, &[ThrottleDevice]); 4] = [
        ("rbps", &io.throttle_read_bps_device),
        ("wbps", &io.throttle_write_bps_device),
        ("riops", &io.throttle_read_iops_device),
        ("wiops", &io.throttle_write_iops_device),
    ];
    for (key, devices) in throttles {
        for ThrottleDevice { major, minor, rate } in devices {
            let rate = if *rate == 0 { "max".to_owned() } else { rate.to_string() };
            settings.push(set("io.max", format!("{major}:{minor} {key}={rate}")));
        }
    }
    Ok(())
}

fn set(file: &str, value: impl ToString) -> Setting {
    Setting { file: file.to_owned(), value: value.to_string(), optional: false }
}

/// A file of this group and no other.
fn plain_name(name: &str) -> Result<()> {
    if name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.') || name.starts_with("cgroup.") {
        return Err(Error::invalid(format!("{name:?} is not a limit of a cgroup")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine = Machine { memory: 512 << 20, free: 496 << 20 };

    fn of(json: &str, creation: bool) -> Result<Vec<String>> {
        let resources: Resources = serde_json::from_str(json).unwrap();
        let all = settings(&resources, &MACHINE, creation)?;
        Ok(all.iter().map(|s| format!("{}={}", s.file, s.value)).collect())
    }

    #[test]
    fn translates_dockers_limits() {
        let json = r#"{"memory":{"limit":104857600,"swap":209715200,"reservation":1048576},
            "cpu":{"shares":1024,"quota":50000,"period":100000,"cpus":"0-1"},"pids":{"limit":10},
            "blockIO":{"weight":500,"throttleReadBpsDevice":[{"major":254,"minor":0,"rate":7}]},
            "hugepageLimits":[{"pageSize":"2MB","limit":9}],"unified":{"memory.high":"5"}}"#;
        let expected = [
            "memory.max=104857600",
            "memory.swap.max=104857600",
            "memory.low=1048576",
            "cpu.weight=39",
            "cpu.max=50000 100000",
            "cpuset.cpus=0-1",
            "pids.max=10",
            "io.weight=default 4950",
            "io.max=254:0 rbps=7",
            "hugetlb.2MB.max=9",
            "memory.high=5",
        ];
        assert_eq!(of(json, false).unwrap(), expected);
    }

    #[test]
    fn a_container_never_gets_all_of_the_machine() {
        let safe = ["memory.max=503316480", "pids.max=3584"];
        for json in [
            r#"{"memory":{"limit":-1},"pids":{"limit":-1}}"#,
            r#"{"memory":{"limit":1099511627776},"pids":{"limit":9999999}}"#,
        ] {
            assert_eq!(of(json, true).unwrap(), safe, "{json}");
            assert_eq!(of(json, false).unwrap(), safe, "{json}");
        }
        assert_eq!(of("{}", true).unwrap(), safe);
        assert_eq!(of("{}", false).unwrap(), [""; 0]);
    }

    #[test]
    fn refuses_what_it_cannot_do() {
        for json in [
            r#"{"memory":{"disableOOMKiller":true}}"#,
            r#"{"memory":{"limit":10,"swap":5}}"#,
            r#"{"memory":{"swap":5}}"#,
            r#"{"cpu":{"realtimeRuntime":5}}"#,
            r#"{"unified":{"../x":"1"}}"#,
            r#"{"unified":{"cgroup.procs":"1"}}"#,
            r#"{"hugepageLimits":[{"pageSize":"../2MB","limit":9}]}"#,
        ] {
            assert!(of(json, false).is_err(), "{json}");
        }
    }
}
