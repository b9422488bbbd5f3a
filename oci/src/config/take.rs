//! What is taken out of config.json, or made another thing, before the agent gets it.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use bulkhead_runtime::network::NamespaceRef;
use serde_json::{Value, json};

use super::{Wanted, text};
use crate::log::Log;
use crate::pod::{Joined, Kind};

/// `statfs(2)`, TMPFS_MAGIC.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
/// Major numbers of character devices that mean the same in every kernel: memory, terminals, miscellaneous.
const KNOWN_MAJORS: [i64; 4] = [1, 5, 10, 136];

/// What is said about the network, and the namespaces of others that are to be joined. Those that are left in the
/// configuration are the guest's to make.
pub(super) fn take_namespaces(spec: &mut Value) -> Result<(Wanted, Vec<Joined>), String> {
    let mut joined = Vec::new();
    let mut network = Wanted::Existing(NamespaceRef::Pid(1));
    let Some(list) = spec.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut) else {
        return Err(
            "linux.namespaces has no network namespace: the host's network cannot be a guest's".into()
        );
    };
    let mut kept = Vec::new();
    for namespace in list.drain(..) {
        let (kind, path) = (text(&namespace, "/type").to_owned(), text(&namespace, "/path").to_owned());
        match (kind.as_str(), path.as_str()) {
            ("network", "") => network = Wanted::New,
            ("network", path) => network = Wanted::Existing(NamespaceRef::Path(path.into())),
            (_, "") => kept.push(namespace),
            (kind, path) => match Kind::of(kind) {
                Some(kind) => joined.push(Joined { kind, path: path.into() }),
                None => {
                    return Err(format!(
                        "linux.namespaces: the {kind} namespace {path} cannot be joined, it belongs to another kernel"
                    ));
                }
            },
        }
    }
    *list = kept;
    if network == Wanted::Existing(NamespaceRef::Pid(1)) {
        return Err(
            "linux.namespaces has no network namespace: the host's network cannot be a guest's (podman, docker: use \
             another --network than host)"
                .into(),
        );
    }
    Ok((network, joined))
}

/// Whether the container may use any device.
pub(super) fn is_privileged(spec: &Value) -> bool {
    let rules = spec.pointer("/linux/resources/devices").and_then(Value::as_array).into_iter().flatten();
    rules.filter(|rule| rule.get("allow") == Some(&json!(true))).any(|rule| {
        let wild = |key: &str| rule.get(key).is_none_or(|number| number.is_null() || *number == json!(-1));
        matches!(text(rule, "/type"), "" | "a") && wild("major") && wild("minor")
    })
}

/// A device of the host's is refused, if it is no disk ([`super::volume`]), unless the container may use any device: then it is privileged, and its engine
/// has listed all that the host has. Such a container gets the devices of its guest, which are all its own.
pub(super) fn take_devices(spec: &mut Value, log: &Log) -> Result<(), String> {
    let privileged = is_privileged(spec);
    let Some(devices) = spec.pointer_mut("/linux/devices").and_then(Value::as_array_mut) else {
        return Ok(());
    };
    let is_known = |device: &Value| {
        let major = device.get("major").and_then(Value::as_i64).unwrap_or(-1);
        match text(device, "/type") {
            "p" => true,
            // The host's disks are not for the privileged, who would get all of them.
            "b" => !privileged,
            "c" | "u" => KNOWN_MAJORS.contains(&major),
            _ => false,
        }
    };
    if let Some(device) = devices.iter().find(|device| !is_known(device))
        && !privileged
    {
        let path = text(device, "/path");
        return Err(format!("linux.devices: {path} is a device of the host's, which a guest does not have"));
    }
    let all = devices.len();
    devices.retain(is_known);
    if devices.len() < all {
        log.debug(&format!("{} devices of the host are not the guest's and left out", all - devices.len()));
    }
    Ok(())
}

/// Engines make a tmpfs on the host for /dev/shm and bind it. Shared memory is shared by processes of one kernel, so the
/// guest gets a tmpfs of that size instead, which is memory rather than a file server. Containers of one guest that have
/// the same one of the host's have the same one there.
pub(super) fn keep_shared_memory_inside(spec: &mut Value) {
    let Some(mounts) = spec.get_mut("mounts").and_then(Value::as_array_mut) else { return };
    let of_engine = |mount: &&mut Value| {
        text(mount, "/destination") == "/dev/shm" && text(mount, "/source").starts_with('/')
    };
    for mount in mounts.iter_mut().filter(of_engine) {
        let source = PathBuf::from(text(mount, "/source"));
        let Ok(about) = rustix::fs::statfs(&source) else { continue };
        if about.f_type != TMPFS_MAGIC {
            continue;
        }
        let bytes = about.f_blocks.saturating_mul(u64::try_from(about.f_bsize).unwrap_or(4096));
        let mut options: Vec<String> = ["nosuid", "nodev", "noexec", "mode=1777"].map(str::to_owned).to_vec();
        options.push(format!("size={bytes}"));
        let given = mount.get("options").and_then(Value::as_array).into_iter().flatten();
        options.extend(given.filter_map(Value::as_str).filter(|option| *option == "ro").map(str::to_owned));
        let mut hasher = DefaultHasher::new();
        source.hash(&mut hasher);
        let name = format!("guest:shm-{:016x}", hasher.finish());
        *mount = json!({"destination": "/dev/shm", "type": "tmpfs", "source": name, "options": options});
    }
}

/// Whether what is written there stays in memory.
///
/// # Errors
/// There is nothing.
pub fn is_tmpfs(path: &Path) -> std::io::Result<bool> {
    Ok(rustix::fs::statfs(path)?.f_type == TMPFS_MAGIC)
}

/// All resources, for the host's cgroup. What names processors and disks of the host's is only for there.
pub(super) fn take_resources(spec: &mut Value) -> Value {
    let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) else { return json!({}) };
    linux.remove("cgroupsPath");
    let Some(resources) = linux.get_mut("resources") else { return json!({}) };
    let all = resources.clone();
    leave_hosts_out(resources);
    all
}

/// Takes out of `linux.resources` what only the host can do.
pub fn leave_hosts_out(resources: &mut Value) {
    if let Some(fields) = resources.as_object_mut() {
        fields.remove("blockIO");
    }
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        cpu.remove("cpus");
        cpu.remove("mems");
    }
}

/// Labels of security modules that the guest's kernel does not have; its own kernel is the stronger wall.
pub(super) fn drop_labels(spec: &mut Value, log: &Log) {
    let mut remove = |pointer: &str, key: &str| {
        let fields = spec.pointer_mut(pointer).and_then(Value::as_object_mut);
        if let Some(label) = fields.and_then(|fields| fields.remove(key))
            && label.as_str().is_some_and(|label| !label.is_empty())
        {
            log.debug(&format!(
                "{key} {label} has no effect: the guest's kernel has no such security module"
            ));
        }
    };
    remove("/process", "apparmorProfile");
    remove("/process", "selinuxLabel");
    remove("/linux", "mountLabel");
}
