//! A task's use of resources, in the form that containerd's clients know: the figures of cgroup v2.

use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use serde_json::Value;

/// The name that clients know the message by, which is not its own.
const NAME: &str = "io.containerd.cgroups.v2.Metrics";

/// From what `bulkhead-oci events --stats` prints.
pub fn metrics(event: &Value) -> Option<Any> {
    let number = |pointer: &str| event.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    let micros = |pointer: &str| number(pointer) / 1000;
    let cpu = CPUStat {
        usage_usec: micros("/data/cpu/usage/total"),
        user_usec: micros("/data/cpu/usage/user"),
        system_usec: micros("/data/cpu/usage/kernel"),
        throttled_usec: micros("/data/cpu/throttling/throttledTime"),
        ..CPUStat::default()
    };
    let memory = MemoryStat {
        usage: number("/data/memory/usage/usage"),
        usage_limit: number("/data/memory/usage/limit"),
        ..MemoryStat::default()
    };
    let pids = PidsStat {
        current: number("/data/pids/current"),
        limit: number("/data/pids/limit"),
        ..PidsStat::default()
    };
    let events = MemoryEvents { oom_kill: number("/data/memory/oom_kills"), ..MemoryEvents::default() };
    let metrics = Metrics {
        cpu: MessageField::some(cpu),
        memory: MessageField::some(memory),
        pids: MessageField::some(pids),
        memory_events: MessageField::some(events),
        ..Metrics::default()
    };
    let mut any = Any::new();
    any.type_url = NAME.to_owned();
    any.value = metrics.write_to_bytes().ok()?;
    Some(any)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_passed_on() {
        let event = serde_json::json!({"data": {"cpu": {"usage": {"total": 5000}}, "pids": {"current": 3},
            "memory": {"usage": {"usage": 7, "limit": 9}, "oom_kills": 1}}});
        let any = metrics(&event).unwrap();
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.memory.usage, metrics.memory.usage_limit), (5, 7, 9));
        assert_eq!((metrics.pids.current, metrics.memory_events.oom_kill), (3, 1));
    }
}
