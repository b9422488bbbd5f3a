//! What `linux.resources` asks of the host, before it is known which files take it.

use serde_json::Value;

/// Memory besides the guest's own: monitor, file server, page tables, what the kernel keeps for them. MiB.
pub const OVERHEAD_MIB: u64 = 128;

/// A limit of a disk's traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Throttle {
    /// Of what.
    pub kind: Rate,
    /// `major:minor` of the disk.
    pub device: String,
    /// Bytes or operations a second.
    pub rate: u64,
}

/// What of a disk's traffic is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// Bytes read.
    ReadBytes,
    /// Bytes written.
    WriteBytes,
    /// Reads.
    Reads,
    /// Writes.
    Writes,
}

/// Limits of a group, each as far as it is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory: the machine's and what serves it.
    pub memory: Option<u64>,
    /// Bytes of swap besides.
    pub swap: Option<u64>,
    /// Microseconds of processor time in each period.
    pub quota: Option<u64>,
    /// Microseconds.
    pub period: Option<u64>,
    /// 2 to 262144, 1024 is usual.
    pub shares: Option<u64>,
    /// Processors, as a list.
    pub cpus: Option<String>,
    /// NUMA nodes, as a list.
    pub mems: Option<String>,
    /// 10 to 1000.
    pub weight: Option<u64>,
    /// Of disks.
    pub throttles: Vec<Throttle>,
}

impl Limits {
    /// What `resources` (runtime-spec's `linux.resources`) has, for a machine of this size. The container's exact limit of
    /// memory is the guest's to enforce.
    pub fn of(resources: &Value, machine_mib: u32) -> Self {
        let positive = |pointer: &str| {
            let number = resources.pointer(pointer).and_then(Value::as_i64);
            number.and_then(|number| u64::try_from(number).ok()).filter(|&number| number > 0)
        };
        let list = |pointer: &str| {
            let text = resources.pointer(pointer).and_then(Value::as_str);
            text.filter(|text| !text.is_empty()).map(str::to_owned)
        };
        let memory = positive("/memory/limit");
        let swap = memory.zip(positive("/memory/swap"));
        Self {
            memory: memory.map(|_| (u64::from(machine_mib) + OVERHEAD_MIB) << 20),
            swap: swap.map(|(memory, both)| both.saturating_sub(memory)),
            quota: positive("/cpu/quota"),
            period: positive("/cpu/period"),
            shares: positive("/cpu/shares").filter(|&shares| shares >= 2).map(|shares| shares.min(262_144)),
            cpus: list("/cpu/cpus"),
            mems: list("/cpu/mems"),
            weight: positive("/blockIO/weight").filter(|&weight| weight >= 10).map(|weight| weight.min(1000)),
            throttles: throttles(resources),
        }
    }
}

fn throttles(resources: &Value) -> Vec<Throttle> {
    let mut throttles = Vec::new();
    for (list, kind) in [
        ("throttleReadBpsDevice", Rate::ReadBytes),
        ("throttleWriteBpsDevice", Rate::WriteBytes),
        ("throttleReadIOPSDevice", Rate::Reads),
        ("throttleWriteIOPSDevice", Rate::Writes),
    ] {
        let entries = resources.pointer(&format!("/blockIO/{list}")).and_then(Value::as_array);
        for entry in entries.into_iter().flatten() {
            let number = |key: &str| entry.get(key).and_then(Value::as_u64);
            if let (Some(major), Some(minor), Some(rate)) = (number("major"), number("minor"), number("rate"))
            {
                throttles.push(Throttle { kind, device: format!("{major}:{minor}"), rate });
            }
        }
    }
    throttles
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    /// One of each.
    pub fn example() -> Limits {
        let resources = json!({
            "memory": {"limit": 67_108_864, "swap": 134_217_728},
            "cpu": {"quota": 50_000, "period": 100_000, "shares": 1024, "cpus": "0-1", "mems": "0"},
            "blockIO": {"weight": 500, "throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}]},
        });
        Limits::of(&resources, 112)
    }

    #[test]
    fn memory_has_room_for_the_machine() {
        assert_eq!(example().memory, Some(240 << 20));
        assert_eq!(example().swap, Some(64 << 20));
    }

    #[test]
    fn what_is_not_limited_is_left_alone() {
        let resources = json!({"memory": {"limit": -1, "swap": 5}, "cpu": {"quota": -1, "cpus": ""}});
        assert_eq!(Limits::of(&resources, 112), Limits::default());
    }
}
