//! The machine that a container asks for: by its limits, by `vm` of runtime-spec 1.3, by annotations.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bulkhead_runtime::Result as Outcome;
use bulkhead_runtime::monitor::Shape;
use bulkhead_runtime::settings::Machine;
use serde_json::Value;

use super::{Bundle, check, usage};
use crate::log::Log;

/// What all annotations of ours begin with.
const PREFIX: &str = "dev.bulkhead.";
/// MiB of the machine.
const MEMORY: &str = "dev.bulkhead.memory";
/// Its processors.
const VCPUS: &str = "dev.bulkhead.vcpus";
/// Path of its kernel.
const KERNEL: &str = "dev.bulkhead.kernel";
/// `true`: the container does nothing, and needs no files for it. What containerd's sandbox API makes of a pod.
const PAUSE: &str = "dev.bulkhead.pause";
/// What containerd's CRI says at a pod's first container about all of them: bytes, microseconds, 0 for no limit.
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const POD_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// What of `vm` (runtime-spec 1.3) is honoured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vm {
    /// The guest's kernel instead of our own.
    pub kernel: Option<PathBuf>,
    /// Its processors.
    pub vcpus: Option<u64>,
    /// Its memory, bytes.
    pub memory: Option<u64>,
    /// Its first container is nothing but a holder of namespaces, whatever its process says.
    pub pause: bool,
}

impl Vm {
    /// Reads `vm` of a config.json, and the annotations, which come before it.
    ///
    /// # Errors
    /// They ask for what cannot be had: another hypervisor than this one, say.
    pub(super) fn read(spec: &Value, annotations: &BTreeMap<String, String>) -> Result<Self, String> {
        let mut read = match spec.get("vm").filter(|vm| !vm.is_null()) {
            Some(vm) => Self::of_object(vm)?,
            None => Self::default(),
        };
        for (key, value) in annotations.iter().filter(|(key, _)| key.starts_with(PREFIX)) {
            let number =
                || value.parse::<u64>().map_err(|_| format!("annotation {key}: {value:?} is no number"));
            match key.as_str() {
                MEMORY if number()? > u32::MAX.into() => {
                    return Err(format!("annotation {key}: {value} MiB"));
                }
                MEMORY => read.memory = Some(number()? << 20),
                VCPUS if number()? > u8::MAX.into() => return Err(format!("annotation {key}: {value}")),
                VCPUS => read.vcpus = Some(number()?),
                KERNEL if value.starts_with('/') => read.kernel = Some(value.into()),
                KERNEL => return Err(format!("annotation {key}: {value:?} is no absolute path")),
                PAUSE if matches!(value.as_str(), "true" | "false") => read.pause = value == "true",
                PAUSE => return Err(format!("annotation {key}: {value:?} is neither true nor false")),
                _ => {
                    return Err(format!(
                        "annotation {key} is not known: {MEMORY}, {VCPUS}, {KERNEL} and {PAUSE} are"
                    ));
                }
            }
        }
        Ok(read)
    }

    fn of_object(vm: &Value) -> Result<Self, String> {
        let mut read = Self::default();
        for (part, value) in vm.as_object().ok_or("vm is no object")? {
            for (name, value) in value.as_object().ok_or_else(|| format!("vm.{part} is no object"))? {
                let wrong = || format!("vm.{part}.{name}: {value} is not what is expected there");
                match (part.as_str(), name.as_str()) {
                    ("kernel", "path") => {
                        let path = PathBuf::from(value.as_str().ok_or_else(wrong)?);
                        read.kernel = Some(path).filter(|path| path.is_absolute());
                        read.kernel.as_ref().ok_or_else(wrong)?;
                    }
                    ("hwConfig", "vcpus") => read.vcpus = Some(value.as_u64().ok_or_else(wrong)?),
                    ("hwConfig", "memory") => read.memory = Some(value.as_u64().ok_or_else(wrong)?),
                    _ if matches!(value.as_array().map(Vec::as_slice), Some([])) => {}
                    _ => {
                        return Err(format!(
                            "vm.{part}.{name} is not supported: vm.kernel.path, vm.hwConfig.vcpus and vm.hwConfig.memory are"
                        ));
                    }
                }
            }
        }
        Ok(read)
    }
}

impl Bundle {
    fn limit(&self, path: &str) -> Option<u64> {
        let limit = self.spec.pointer(path).and_then(Value::as_i64).filter(|&limit| limit > 0);
        limit.and_then(|limit| u64::try_from(limit).ok())
    }

    fn told(&self, key: &str) -> Outcome<Option<u64>> {
        let number =
            |text: &String| text.parse::<u64>().map_err(|_| usage(format!("annotation {key}: {text:?}")));
        Ok(self.annotations.get(key).map(number).transpose()?.filter(|&number| number > 0))
    }

    /// Its own, or that of its pod.
    fn memory_limit(&self) -> Outcome<Option<u64>> {
        Ok(self.limit("/linux/resources/memory/limit").or(self.told(POD_MEMORY)?))
    }

    /// A limit above what the host has is none: engines take it, and so do we. The machine gets what there is.
    ///
    /// # Errors
    /// A number that is none.
    pub fn warn_of_limits_above_the_host(&self, log: &Log) -> Outcome<()> {
        let most = check::host().0;
        if let Some(bytes) = self.memory_limit()?.filter(|&bytes| bytes > most && self.vm.memory.is_none()) {
            log.warn(&format!(
                "the memory limit of the container or its pod, {} MiB, is above the {} MiB of this host: its microVM has \
                 as much as the host",
                bytes >> 20,
                most >> 20
            ));
        }
        Ok(())
    }

    /// The machine that the container needs: its memory limit and CPUs, or what it asks for outright.
    ///
    /// # Errors
    /// A number that no machine has.
    pub fn shape(&self, default: &Machine) -> Outcome<Shape> {
        let told = |key| self.told(key);
        let memory = self.memory_limit()?;
        let (quota, period) = match self.limit("/linux/resources/cpu/quota") {
            Some(quota) => (Some(quota), self.limit("/linux/resources/cpu/period")),
            None => (told(POD_QUOTA)?, told(POD_PERIOD)?),
        };
        let milli_cpus = quota.map(|quota| quota.saturating_mul(1000) / period.unwrap_or(100_000));
        // A limit may be above what the host has. A machine cannot.
        let (most_memory, most_cpus) = check::host();
        let memory = memory.map(|bytes| bytes.min(most_memory));
        let milli_cpus = milli_cpus.map(|cpus| cpus.clamp(1, most_cpus.saturating_mul(1000)));
        let mut shape = Shape::new(memory, milli_cpus, default);
        // What is asked for outright, and cannot be, is a mistake.
        if let Some(bytes) = self.vm.memory {
            let mib = u32::try_from(bytes >> 20).ok().filter(|_| bytes <= most_memory);
            shape.memory_mib = mib.ok_or_else(|| {
                let (asked, most) = (bytes >> 20, most_memory >> 20);
                usage(format!(
                    "{MEMORY} or vm.hwConfig.memory: {asked} MiB are more than the {most} MiB of this host"
                ))
            })?;
        }
        if let Some(vcpus) = self.vm.vcpus {
            let count = u8::try_from(vcpus).ok().filter(|count| (1..=32).contains(count));
            shape.vcpus = count
                .ok_or_else(|| usage(format!("{VCPUS} or vm.hwConfig.vcpus: {vcpus} is not from 1 to 32")))?;
        }
        Ok(shape)
    }

    /// A machine that others share is of its first container's making.
    pub fn warn_of_what_the_pod_decides(&self, log: &Log, machine_mib: u32) {
        let number = |pointer: &str| self.resources.pointer(pointer).and_then(Value::as_u64);
        if let Some(limit) = number("/memory/limit").filter(|limit| *limit >> 20 > u64::from(machine_mib)) {
            log.warn(&format!(
                "linux.resources.memory.limit {limit}: the microVM that the container joins has {machine_mib} MiB \
                 (annotation {MEMORY} of the pod's first container sets them)"
            ));
        }
        for (pointer, name) in [("/cpu/cpus", "cpu.cpus"), ("/cpu/mems", "cpu.mems"), ("/blockIO", "blockIO")]
        {
            let value = self.resources.pointer(pointer);
            if value.is_some_and(|value| value.as_str() != Some("") && !value.is_null()) {
                log.warn(&format!(
                    "linux.resources.{name}: it names processors and disks of the host, which those of the microVM that \
                     the container joins have been chosen from by the pod's first container"
                ));
            }
        }
        if (Vm { pause: false, ..self.vm.clone() }) != Vm::default() {
            log.warn(
                "the size and the kernel of the microVM that the container joins are the first container's",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::tests::{GOOD, bundle};
    use super::*;

    #[test]
    fn a_pods_limits_size_its_machine() {
        let limits = r#""annotations":{"io.kubernetes.cri.sandbox-memory":"1073741824",
            "io.kubernetes.cri.sandbox-cpu-quota":"250000","io.kubernetes.cri.sandbox-cpu-period":"100000"}"#;
        let pod = GOOD.replace(r#""annotations":{"a":"b"}"#, limits);
        let first =
            pod.replace(r#""memory":{"limit":134217728}"#, r#""memory":{}"#).replace("\"quota\":150000,", "");
        let shape = bundle(&first).unwrap().shape(&Machine::default()).unwrap();
        let most = check::host().1.min(3);
        assert!(u64::from(shape.vcpus) == most && shape.memory_mib > 1024, "{shape:?}");
        // Its own limits come first.
        let shape = bundle(&pod).unwrap().shape(&Machine::default()).unwrap();
        assert!(shape.vcpus <= 2 && shape.memory_mib < 512, "{shape:?}");
    }

    #[test]
    fn annotations_come_first_and_are_known() {
        let with = |more: &str| bundle(&GOOD.replace(r#""a":"b""#, more));
        let good = with(r#""dev.bulkhead.memory":"256","dev.bulkhead.vcpus":"1","dev.bulkhead.kernel":"/k""#)
            .unwrap();
        let shape = good.shape(&Machine::default()).unwrap();
        assert_eq!((shape.memory_mib, shape.vcpus), (256, 1));
        assert_eq!(good.vm.kernel.as_deref(), Some(Path::new("/k")));
        for (bad, word) in [
            (r#""dev.bulkhead.memory":"many""#, "no number"),
            (r#""dev.bulkhead.kernel":"k""#, "absolute"),
            (r#""dev.bulkhead.cpus":"1""#, "not known"),
        ] {
            let error = with(bad).unwrap_err().chain();
            assert!(error.contains(word), "{bad}: {error}");
        }
        // What no machine here can have is told with what there is.
        let host = check::host().0 >> 20;
        for (bad, words) in [
            (
                format!(r#""dev.bulkhead.memory":"{}""#, host + 1),
                [MEMORY, &format!("{host} MiB of this host")],
            ),
            (r#""dev.bulkhead.vcpus":"33""#.to_owned(), [VCPUS, "1 to 32"]),
            (r#""dev.bulkhead.vcpus":"0""#.to_owned(), [VCPUS, "1 to 32"]),
        ] {
            let error = with(&bad).unwrap().shape(&Machine::default()).unwrap_err().chain();
            assert!(words.iter().all(|word| error.contains(word)), "{bad}: {error}");
        }
    }

    #[test]
    fn vm_is_honoured_or_refused() {
        let with = |vm: &str| bundle(&GOOD.replace("\"annotations\":{\"a\":\"b\"}", &format!("\"vm\":{vm}")));
        let good = r#"{"kernel":{"path":"/k","parameters":[]},"hwConfig":{"vcpus":3,"memory":1073741824}}"#;
        let good = with(good).unwrap();
        let shape = good.shape(&Machine::default()).unwrap();
        assert_eq!(
            (good.vm.kernel.as_deref(), shape.vcpus, shape.memory_mib),
            (Some(Path::new("/k")), 3, 1024)
        );
        for (bad, word) in [
            (r#"{"hypervisor":{"path":"/usr/bin/other"}}"#, "vm.hypervisor.path"),
            (r#"{"kernel":{"path":"k"}}"#, "vm.kernel.path"),
            (r#"{"hwConfig":{"vcpus":-1}}"#, "vm.hwConfig.vcpus"),
            ("[]", "vm is no object"),
        ] {
            let error = with(bad).unwrap_err().chain();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }
}
