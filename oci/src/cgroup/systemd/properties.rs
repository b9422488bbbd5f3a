//! What systemd is told about a scope: org.freedesktop.systemd1(5), systemd.resource-control(5). The same as runc tells.

use super::Legacy;
use crate::cgroup::limits::Limits;
use crate::cgroup::v2::{cpu_weight, io_weight};

/// A property's value: a variant on the bus.
#[derive(Clone, Debug, PartialEq, Eq, rustbus::Marshal, rustbus::Signature)]
pub enum Property {
    /// s
    Text(String),
    /// b
    Flag(bool),
    /// t
    Number(u64),
    /// au
    Pids(Vec<u32>),
    /// ay
    Mask(Vec<u8>),
}

/// With its name.
pub type Named = (String, Property);

/// systemd that has CPUQuotaPeriodUSec.
const HAS_PERIOD: u32 = 242;
/// systemd that has AllowedCPUs and AllowedMemoryNodes.
const HAS_CPUSET: u32 = 244;
/// A list of processors names none above.
const MOST_CPUS: usize = 8192;

/// Of any scope.
pub fn of_scope(slice: &str, name: &str, pid: u32) -> Vec<Named> {
    let flag = |name: &str, value| (name.to_owned(), Property::Flag(value));
    vec![
        ("Description".into(), Property::Text(format!("bulkhead-oci container {name}"))),
        ("Slice".into(), Property::Text(slice.to_owned())),
        ("PIDs".into(), Property::Pids(vec![pid])),
        flag("Delegate", true),
        flag("DefaultDependencies", false),
        flag("MemoryAccounting", true),
        flag("CPUAccounting", true),
        flag("IOAccounting", true),
        flag("TasksAccounting", true),
    ]
}

/// Whether systemd's version has to be known to say these.
pub fn depends_on_version(limits: &Limits) -> bool {
    limits.period.is_some() || limits.cpus.is_some() || limits.mems.is_some()
}

/// Limits, as far as this systemd has words for them; the others are in the group's files alone.
pub fn of_limits(limits: &Limits, legacy: Legacy, version: u32) -> Vec<Named> {
    let mut all: Vec<Named> = Vec::new();
    let mut number = |name: &str, value: Option<u64>| {
        all.extend(value.map(|value| (name.to_owned(), Property::Number(value))));
    };
    number("MemoryMax", limits.memory);
    number("MemorySwapMax", limits.swap);
    let period = limits.period.unwrap_or(100_000);
    // systemd counts in steps of 10 ms a second, and rounds down.
    let per_second = |quota: u64| quota.saturating_mul(1_000_000).div_ceil(period).div_ceil(10_000) * 10_000;
    number("CPUQuotaPerSecUSec", limits.quota.map(per_second));
    if version >= HAS_PERIOD {
        number("CPUQuotaPeriodUSec", limits.period);
    }
    if legacy.cpu {
        number("CPUShares", limits.shares);
    } else {
        number("CPUWeight", limits.shares.map(cpu_weight));
    }
    if legacy.disks {
        number("BlockIOWeight", limits.weight);
    } else {
        number("IOWeight", limits.weight.map(io_weight));
    }
    if version >= HAS_CPUSET && !legacy.cpuset {
        for (name, list) in [("AllowedCPUs", &limits.cpus), ("AllowedMemoryNodes", &limits.mems)] {
            let mask = list.as_deref().and_then(mask);
            all.extend(mask.map(|mask| (name.to_owned(), Property::Mask(mask))));
        }
    }
    all
}

/// `0-2,5` as bits, the lowest first. `None`: it is no list; the group's file will say so.
fn mask(list: &str) -> Option<Vec<u8>> {
    let mut mask = Vec::new();
    for range in list.split(',') {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        let (from, to): (usize, usize) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        if to >= MOST_CPUS {
            return None;
        }
        for bit in from..=to {
            if mask.len() <= bit / 8 {
                mask.resize(bit / 8 + 1, 0);
            }
            *mask.get_mut(bit / 8)? |= 1 << (bit % 8);
        }
    }
    Some(mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::limits::tests::example;

    fn number(all: &[Named], name: &str) -> Option<u64> {
        all.iter().find_map(|(known, value)| match value {
            Property::Number(value) if known == name => Some(*value),
            _ => None,
        })
    }

    #[test]
    fn limits_as_systemd_takes_them() {
        let all = of_limits(&example(), Legacy::default(), 252);
        let expected = [
            ("MemoryMax", 240 << 20),
            ("MemorySwapMax", 64 << 20),
            ("CPUQuotaPerSecUSec", 500_000),
            ("CPUQuotaPeriodUSec", 100_000),
            ("CPUWeight", 39),
            ("IOWeight", 4950),
        ];
        for (name, value) in expected {
            assert_eq!(number(&all, name), Some(value), "{name}");
        }
        assert!(all.contains(&("AllowedCPUs".into(), Property::Mask(vec![3]))), "{all:?}");
    }

    #[test]
    fn an_old_systemd_and_v1_have_other_words() {
        let all = of_limits(&example(), Legacy { cpu: true, disks: true, cpuset: true }, 239);
        assert_eq!(number(&all, "CPUShares"), Some(1024));
        assert_eq!(number(&all, "BlockIOWeight"), Some(500));
        let newer = ["CPUWeight", "IOWeight", "CPUQuotaPeriodUSec", "AllowedCPUs", "AllowedMemoryNodes"];
        assert!(all.iter().all(|(name, _)| !newer.contains(&name.as_str())), "{all:?}");
    }

    #[test]
    fn quotas_are_not_rounded_down() {
        let per_second = |quota, period| {
            let limits = Limits { quota: Some(quota), period: Some(period), ..Limits::default() };
            number(&of_limits(&limits, Legacy::default(), 252), "CPUQuotaPerSecUSec")
        };
        assert_eq!(per_second(1001, 100_000), Some(20_000));
        assert_eq!(per_second(150_000, 50_000), Some(3_000_000));
    }

    #[test]
    fn lists_of_processors() {
        assert_eq!(mask("0-2,9"), Some(vec![0b111, 0b10]));
        for bad in ["", "a", "1-", "0-99999999", "-1"] {
            assert_eq!(mask(bad), None, "{bad}");
        }
    }
}
