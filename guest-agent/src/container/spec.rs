//! The parts of the OCI runtime-spec's config.json that the agent acts on, under the specification's own names.
//!
//! Own types because the `oci-spec` crate brings derived builders and a regex engine: 1.5 MB more to load at every
//! boot. What is not listed is either the host's care (hooks on the host, annotations) or refused by
//! [`Spec::check_supported`]: nothing that changes what a container may do is passed over in silence.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// `config.json`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    pub process: Option<Process>,
    pub root: Option<Root>,
    pub hostname: String,
    pub domainname: String,
    pub mounts: Vec<Mount>,
    pub hooks: BTreeMap<String, Value>,
    pub linux: Linux,
}

/// `root`; its path is not used.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Root {
    pub readonly: bool,
}

/// `process`, also of an exec.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    pub terminal: bool,
    pub console_size: Option<ConsoleSize>,
    pub user: User,
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    pub capabilities: Option<Capabilities>,
    pub rlimits: Vec<Rlimit>,
    pub no_new_privileges: bool,
    pub apparmor_profile: String,
    pub oom_score_adj: Option<i32>,
    pub selinux_label: String,
    pub scheduler: Option<Value>,
    pub io_priority: Option<Value>,
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<Value>,
    /// Not of the specification: no program is executed, see [`super::pause`].
    #[serde(skip)]
    pub pause: bool,
}

/// `process.consoleSize`, in characters.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ConsoleSize {
    pub height: u16,
    pub width: u16,
}

/// `process.user`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub umask: Option<u32>,
    pub additional_gids: Vec<u32>,
    /// Docker's `user[:group]`, looked up in the container's own /etc/passwd and /etc/group. The specification has it
    /// for Windows only; when set it wins over the numbers.
    pub username: String,
}

/// `process.capabilities`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    pub bounding: Vec<String>,
    pub effective: Vec<String>,
    pub inheritable: Vec<String>,
    pub permitted: Vec<String>,
    pub ambient: Vec<String>,
}

/// One of `process.rlimits`.
#[derive(Clone, Debug, Deserialize)]
pub struct Rlimit {
    #[serde(rename = "type")]
    pub kind: String,
    pub soft: u64,
    pub hard: u64,
}

/// One of `mounts`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Mount {
    pub destination: String,
    #[serde(rename = "type")]
    pub fstype: String,
    pub source: String,
    pub options: Vec<String>,
    pub uid_mappings: Vec<IdMapping>,
    pub gid_mappings: Vec<IdMapping>,
}

/// `linux`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    pub namespaces: Vec<Namespace>,
    pub uid_mappings: Vec<IdMapping>,
    pub gid_mappings: Vec<IdMapping>,
    pub devices: Vec<Device>,
    pub resources: Resources,
    pub rootfs_propagation: String,
    pub seccomp: Option<Value>,
    pub sysctl: BTreeMap<String, String>,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    pub mount_label: String,
    pub intel_rdt: Option<Value>,
    pub personality: Option<Value>,
    pub time_offsets: BTreeMap<String, Value>,
}

/// One of `linux.namespaces`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Namespace {
    #[serde(rename = "type")]
    pub kind: String,
    pub path: String,
}

/// One line of `linux.uidMappings` and `linux.gidMappings`.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct IdMapping {
    #[serde(rename = "containerID")]
    pub container_id: u32,
    #[serde(rename = "hostID")]
    pub host_id: u32,
    pub size: u32,
}

/// One of `linux.devices`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Device {
    #[serde(rename = "type")]
    pub kind: String,
    pub path: String,
    pub major: u32,
    pub minor: u32,
    pub file_mode: Option<u32>,
    pub uid: u32,
    pub gid: u32,
    /// Not of the specification: it is this disk of the machine, with other numbers.
    pub disk: Option<String>,
}

/// `linux.resources`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    pub devices: Option<Vec<DeviceRule>>,
    pub memory: Memory,
    pub cpu: Cpu,
    pub pids: Pids,
    #[serde(rename = "blockIO")]
    pub block_io: BlockIo,
    pub hugepage_limits: Vec<HugepageLimit>,
    pub unified: BTreeMap<String, String>,
    pub network: Option<Value>,
    pub rdma: BTreeMap<String, Value>,
}

/// One of `linux.resources.devices`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct DeviceRule {
    pub allow: bool,
    #[serde(rename = "type")]
    pub kind: String,
    pub major: Option<i64>,
    pub minor: Option<i64>,
    pub access: String,
}

/// `linux.resources.memory`, in bytes.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Memory {
    pub limit: Option<i64>,
    pub reservation: Option<i64>,
    pub swap: Option<i64>,
    #[serde(rename = "disableOOMKiller")]
    pub disable_oom_killer: bool,
}

/// `linux.resources.cpu`; quota and period in microseconds.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Cpu {
    pub shares: Option<u64>,
    pub quota: Option<i64>,
    pub burst: Option<u64>,
    pub period: Option<u64>,
    pub realtime_runtime: Option<i64>,
    pub realtime_period: Option<u64>,
    pub cpus: String,
    pub mems: String,
    pub idle: Option<i64>,
}

/// `linux.resources.pids`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Pids {
    pub limit: Option<i64>,
}

/// `linux.resources.blockIO`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BlockIo {
    pub weight: Option<u64>,
    pub weight_device: Vec<WeightDevice>,
    pub throttle_read_bps_device: Vec<ThrottleDevice>,
    pub throttle_write_bps_device: Vec<ThrottleDevice>,
    #[serde(rename = "throttleReadIOPSDevice")]
    pub throttle_read_iops_device: Vec<ThrottleDevice>,
    #[serde(rename = "throttleWriteIOPSDevice")]
    pub throttle_write_iops_device: Vec<ThrottleDevice>,
}

/// One of `blockIO.weightDevice`.
#[derive(Clone, Debug, Deserialize)]
pub struct WeightDevice {
    pub major: u32,
    pub minor: u32,
    #[serde(default)]
    pub weight: u64,
}

/// One of `blockIO.throttle…Device`: bytes or operations per second.
#[derive(Clone, Debug, Deserialize)]
pub struct ThrottleDevice {
    pub major: u32,
    pub minor: u32,
    pub rate: u64,
}

/// One of `linux.resources.hugepageLimits`, in bytes.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HugepageLimit {
    pub page_size: String,
    pub limit: u64,
}

/// Hooks that runtimes run on the host, in its namespaces: not ours to run.
const HOST_HOOKS: [&str; 4] = ["prestart", "createRuntime", "poststart", "poststop"];

impl Spec {
    /// Parses a config.json and refuses what the agent cannot do.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`, saying where.
    pub fn parse(json: &str) -> Result<Self> {
        let spec: Self =
            serde_json::from_str(json).map_err(|e| Error::invalid(format!("the container's spec: {e}")))?;
        spec.check_supported()?;
        Ok(spec)
    }

    fn check_supported(&self) -> Result<()> {
        let process =
            self.process.as_ref().ok_or_else(|| Error::invalid("the container's spec has no process"))?;
        process.check_supported()?;
        let linux = &self.linux;
        refuse(!linux.mount_label.is_empty(), "linux.mountLabel: the guest kernel has no SELinux")?;
        refuse(linux.intel_rdt.is_some(), "linux.intelRdt: the guest has no resctrl")?;
        refuse(linux.personality.is_some(), "linux.personality")?;
        refuse(linux.seccomp.is_some(), "linux.seccomp: the host compiles it")?;
        refuse(!linux.time_offsets.is_empty(), "linux.timeOffsets")?;
        refuse(linux.resources.network.is_some(), "linux.resources.network: cgroup v2 has no net_cls")?;
        refuse(!linux.resources.rdma.is_empty(), "linux.resources.rdma")?;
        for (name, hooks) in &self.hooks {
            let empty = hooks.as_array().is_some_and(Vec::is_empty) || hooks.is_null();
            refuse(!empty && !HOST_HOOKS.contains(&name.as_str()), &format!("hooks.{name}"))?;
        }
        for mount in &self.mounts {
            let mapped = !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty();
            refuse(mapped, &format!("id mappings of the mount on {}", mount.destination))?;
        }
        Ok(())
    }
}

impl Process {
    /// Parses the process of an exec and refuses what the agent cannot do.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`, saying where.
    pub fn parse(json: &str) -> Result<Self> {
        let process: Self =
            serde_json::from_str(json).map_err(|e| Error::invalid(format!("the exec's process: {e}")))?;
        process.check_supported()?;
        Ok(process)
    }

    fn check_supported(&self) -> Result<()> {
        refuse(
            !self.apparmor_profile.is_empty(),
            "process.apparmorProfile: the guest kernel has no AppArmor",
        )?;
        refuse(!self.selinux_label.is_empty(), "process.selinuxLabel: the guest kernel has no SELinux")?;
        refuse(self.scheduler.is_some(), "process.scheduler")?;
        refuse(self.io_priority.is_some(), "process.ioPriority")?;
        refuse(self.exec_cpu_affinity.is_some(), "process.execCPUAffinity")?;
        if self.args.first().is_none_or(String::is_empty) {
            return Err(Error::invalid("no command: process.args is empty"));
        }
        if !self.cwd.starts_with('/') {
            return Err(Error::invalid(format!("process.cwd {:?} is not an absolute path", self.cwd)));
        }
        let words = self.args.iter().chain(&self.env);
        if words.chain([&self.cwd]).any(|word| word.contains('\0')) {
            return Err(Error::invalid("process.args, env or cwd has a NUL byte"));
        }
        Ok(())
    }
}

fn refuse(present: bool, what: &str) -> Result<()> {
    if present {
        Err(Error::invalid(format!("not supported: {what}; take it out of the spec")))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(extra: &str) -> Result<Spec> {
        Spec::parse(&format!(r#"{{"process":{{"args":["a"],"cwd":"/"}}{extra}}}"#))
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        parse("").unwrap();
        parse(r#","hooks":{"prestart":[{"path":"/x"}],"createContainer":[]}"#).unwrap();
        for (json, word) in [
            (r#","hooks":{"createContainer":[{"path":"/x"}]}"#, "hooks.createContainer"),
            (r#","linux":{"mountLabel":"x"}"#, "mountLabel"),
            (r#","linux":{"timeOffsets":{"monotonic":{}}}"#, "timeOffsets"),
            (r#","linux":{"resources":{"network":{}}}"#, "network"),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.message.contains(word), "{error}");
        }
        for json in [
            r#"{"args":["a"],"cwd":"/","apparmorProfile":"docker-default"}"#,
            r#"{"args":[],"cwd":"/"}"#,
            r#"{"args":["a"],"cwd":"x"}"#,
            r#"{"args":["a\u0000"],"cwd":"/"}"#,
            "[]",
        ] {
            assert_eq!(Process::parse(json).unwrap_err().code, crate::error::Code::InvalidArgument, "{json}");
        }
    }

    proptest! {
        #[test]
        fn noise_never_panics(text in ".{0,200}") {
            let _ = Spec::parse(&text);
            let _ = Process::parse(&text);
        }
    }
}
