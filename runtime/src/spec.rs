//! From wishes and image to the runtime-spec that the agent runs, with docker's defaults.

use bulkhead_image::Image;
use serde_json::{Value, json};

use crate::options::RunOptions;
use crate::{Error, Result};

/// What docker leaves a container's root: enough for ordinary programs, not for touching the kernel.
pub(crate) const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Every capability of the guest kernel, `capabilities(7)`.
pub(crate) const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Devices every container may use: `major`, `minor`; everything else is denied. mknod is allowed throughout, as
/// in docker: a node that may not be opened harms nobody.
const DEVICES: [(&str, i64, i64); 8] = [
    ("c", 1, 3),
    ("c", 1, 5),
    ("c", 1, 7),
    ("c", 1, 8),
    ("c", 1, 9),
    ("c", 5, 0),
    ("c", 5, 2),
    ("c", 136, -1),
];

/// What a privileged container finds in `/dev` besides, of those devices that every guest has: for containers, tunnels, file systems and images
/// within it.
const NODES: [(&str, i64, i64); 4] =
    [("/dev/fuse", 10, 229), ("/dev/kmsg", 1, 11), ("/dev/loop-control", 10, 237), ("/dev/net/tun", 10, 200)];

/// The command line: the image's entrypoint and command under the person's wishes, as docker combines them.
///
/// # Errors
/// There is nothing to run.
pub(crate) fn command(options: &RunOptions, image: &Image) -> Result<Vec<String>> {
    let entrypoint = match &options.entrypoint {
        Some(text) if text.is_empty() => Vec::new(),
        Some(text) => vec![text.clone()],
        None => image.config.entrypoint.clone(),
    };
    let arguments = if !options.command.is_empty() {
        options.command.clone()
    } else if options.entrypoint.is_none() {
        image.config.cmd.clone()
    } else {
        Vec::new()
    };
    let command: Vec<_> = entrypoint.into_iter().chain(arguments).collect();
    if command.is_empty() {
        return Err(Error::Usage(
            "no command: the image has none, so write one after the image's name".into(),
        ));
    }
    Ok(command)
}

/// Capabilities after `--cap-add` and `--cap-drop`, which win in that order, `ALL` first; of a privileged one all.
pub(crate) fn capabilities(options: &RunOptions) -> Vec<&'static str> {
    if options.privileged {
        return ALL_CAPABILITIES.to_vec();
    }
    let has = |list: &[String], name: &str| list.iter().any(|entry| entry == name);
    ALL_CAPABILITIES
        .into_iter()
        .filter(|name| {
            let base = if has(&options.cap_add, "ALL") {
                true
            } else if has(&options.cap_drop, "ALL") {
                false
            } else {
                DEFAULT_CAPABILITIES.contains(name)
            };
            (base || has(&options.cap_add, name)) && !has(&options.cap_drop, name)
        })
        .collect()
}

/// The environment: defaults, the image's, the person's; a later value replaces an earlier one in its place.
pub(crate) fn environment(
    options: &RunOptions,
    image_env: &[String],
    hostname: &str,
    home: &str,
) -> Vec<String> {
    let mut env: Vec<String> = vec![DEFAULT_PATH.into(), format!("HOSTNAME={hostname}")];
    if options.tty {
        env.push("TERM=xterm".into());
    }
    for entry in image_env.iter().chain(&options.env) {
        merge_env(&mut env, entry);
    }
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(format!("HOME={home}"));
    }
    env
}

/// Adds `KEY=value` to an environment, in the place of an earlier value.
pub(crate) fn merge_env(env: &mut Vec<String>, entry: &str) {
    let key = entry.split_once('=').map_or(entry, |(key, _)| key);
    let same = |known: &&mut String| known.strip_prefix(key).is_some_and(|rest| rest.starts_with('='));
    match env.iter_mut().find(same) {
        Some(known) => entry.clone_into(known),
        None => env.push(entry.to_owned()),
    }
}

/// The identity and place of a process, resolved on the host.
#[derive(Debug)]
pub(crate) struct ProcessUser {
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
    pub home: String,
}

/// The runtime-spec process for the container's init or an exec.
pub(crate) fn process(
    user: &ProcessUser,
    command: &[String],
    env: &[String],
    cwd: &str,
    terminal: Option<(u16, u16)>,
    capabilities: &[&str],
    options: &RunOptions,
) -> Value {
    let rlimits: Vec<_> = options
        .ulimits
        .iter()
        .map(|limit| json!({"type": limit.name, "soft": limit.soft, "hard": limit.hard}))
        .collect();
    // As runc: a process of another user than root has them in its bounding set alone.
    let held: &[&str] = if user.uid == 0 { capabilities } else { &[] };
    let mut process = json!({
        "terminal": terminal.is_some(),
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.additional_gids},
        "args": command,
        "env": env,
        "cwd": cwd,
        "capabilities": {
            "bounding": capabilities, "effective": held, "permitted": held, "inheritable": [], "ambient": [],
        },
        "rlimits": rlimits,
        "noNewPrivileges": options.security.no_new_privileges,
        "oomScoreAdj": 0,
    });
    if let (Some((rows, columns)), Some(fields)) = (terminal, process.as_object_mut()) {
        fields.insert("consoleSize".into(), json!({"height": rows, "width": columns}));
    }
    process
}

/// The whole spec. `shared` are the guest's paths of `options.binds`, in order.
pub(crate) fn container(
    options: &RunOptions,
    process: Value,
    hostname: &str,
    id: &str,
    shared: &[String],
) -> Value {
    let mut resources = json!({"devices": device_rules(options.privileged)});
    if let Some(fields) = resources.as_object_mut() {
        if let Some(limit) = options.memory {
            fields.insert("memory".into(), json!({"limit": limit, "swap": limit}));
        }
        if let Some(milli) = options.milli_cpus {
            fields.insert("cpu".into(), json!({"period": 100_000, "quota": milli * 100}));
        }
        if let Some(limit) = options.pids_limit {
            fields.insert("pids".into(), json!({"limit": limit}));
        }
    }
    let sysctl: serde_json::Map<_, _> =
        options.sysctls.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    let shown = options.privileged || options.security.system_paths;
    let (masked, read_only): (&[&str], &[&str]) = if shown { (&[], &[]) } else { (&MASKED, &READ_ONLY) };
    let nodes: &[(&str, i64, i64)] = if options.privileged { &NODES } else { &[] };
    let nodes: Vec<_> = nodes
        .iter()
        .map(|(path, major, minor)| json!({"type": "c", "path": path, "major": major, "minor": minor, "fileMode": 0o600}))
        .collect();
    json!({
        "ociVersion": "1.2.0",
        "process": process,
        "root": {"path": "rootfs", "readonly": options.read_only},
        "hostname": hostname,
        "mounts": mounts(options, shared),
        "linux": {
            // No network namespace: the guest's own is nobody else's.
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"},
            ],
            "cgroupsPath": format!("/{id}"),
            "devices": nodes,
            "resources": resources,
            "sysctl": sysctl,
            "maskedPaths": masked,
            "readonlyPaths": read_only,
        },
    })
}

fn device_rules(privileged: bool) -> Vec<Value> {
    if privileged {
        return vec![json!({"allow": true, "access": "rwm"})];
    }
    let known = DEVICES.iter().map(|&(kind, major, minor)| {
        let mut rule = json!({"allow": true, "type": kind, "major": major, "access": "rwm"});
        if let (true, Some(fields)) = (minor >= 0, rule.as_object_mut()) {
            fields.insert("minor".into(), json!(minor));
        }
        rule
    });
    let nodes = ["c", "b"].map(|kind| json!({"allow": true, "type": kind, "access": "m"}));
    std::iter::once(json!({"allow": false, "access": "rwm"})).chain(nodes).chain(known).collect()
}

fn mounts(options: &RunOptions, shared: &[String]) -> Vec<Value> {
    let mount = |target: &str, kind: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": kind, "options": options});
    let access = if options.privileged { "rw" } else { "ro" };
    let mut mounts = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", access]),
        mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access]),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"]),
    ];
    let mut wanted = Vec::new();
    for tmpfs in &options.tmpfs {
        let mut all = vec!["nosuid", "nodev", "noexec"];
        all.extend(tmpfs.options.iter().map(String::as_str));
        wanted.push((tmpfs.path.as_str(), mount(&tmpfs.path, "tmpfs", &all)));
    }
    for (bind, source) in options.binds.iter().zip(shared) {
        let flags: &[&str] = if bind.read_only { &["rbind", "ro"] } else { &["rbind"] };
        let value = json!({"destination": bind.target, "type": "bind", "source": source, "options": flags});
        wanted.push((bind.target.as_str(), value));
    }
    // As docker: what lies deeper is mounted later, in whatever order it was asked for.
    wanted.sort_by_key(|(target, _)| target.split('/').filter(|part| !part.is_empty()).count());
    for (target, value) in wanted {
        // A mount of the person's replaces one of ours at the same place.
        mounts.retain(|known| known.get("destination").and_then(Value::as_str) != Some(target));
        mounts.push(value);
    }
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> ProcessUser {
        ProcessUser { uid: 1000, gid: 100, additional_gids: vec![5], home: "/home/u".into() }
    }

    #[test]
    fn the_spec_is_one_that_the_runtime_spec_knows() {
        let options = RunOptions {
            memory: Some(1 << 28),
            milli_cpus: Some(1500),
            pids_limit: Some(9),
            sysctls: vec![("net.core.somaxconn".into(), "9".into())],
            tmpfs: vec![crate::options::Tmpfs { path: "/dev/shm".into(), options: vec!["size=1m".into()] }],
            ulimits: vec![crate::options::Ulimit::parse("nofile=1:2").unwrap()],
            ..RunOptions::default()
        };
        let process = process(
            &user(),
            &["sh".into()],
            &["A=b".into()],
            "/",
            Some((24, 80)),
            &capabilities(&options),
            &options,
        );
        let spec = container(&options, process, "host", "id", &[]);
        let parsed: oci_spec::runtime::Spec = serde_json::from_value(spec).unwrap();
        let shm: Vec<_> = parsed
            .mounts()
            .as_ref()
            .unwrap()
            .iter()
            .filter(|mount| mount.destination() == std::path::Path::new("/dev/shm"))
            .collect();
        assert_eq!(shm.len(), 1, "the person's tmpfs replaces ours");
        assert!(shm[0].options().as_ref().unwrap().contains(&"size=1m".to_owned()));
        let linux = parsed.linux().as_ref().unwrap();
        assert_eq!(linux.resources().as_ref().unwrap().cpu().as_ref().unwrap().quota(), Some(150_000));
    }

    #[test]
    fn capabilities_follow_docker() {
        let with = |add: &[&str], drop: &[&str]| {
            capabilities(&RunOptions {
                cap_add: add.iter().map(|&name| name.into()).collect(),
                cap_drop: drop.iter().map(|&name| name.into()).collect(),
                ..RunOptions::default()
            })
        };
        assert_eq!(with(&[], &[]), DEFAULT_CAPABILITIES);
        assert_eq!(with(&[], &["ALL"]), [""; 0]);
        assert_eq!(with(&["CAP_CHOWN"], &["ALL"]), ["CAP_CHOWN"]);
        assert_eq!(with(&["ALL"], &["CAP_CHOWN"]).len(), ALL_CAPABILITIES.len() - 1);
        assert!(with(&["CAP_SYS_ADMIN"], &[]).contains(&"CAP_SYS_ADMIN"));
    }

    #[test]
    fn a_later_value_replaces_an_earlier_one() {
        let options = RunOptions { env: vec!["B=3".into(), "HOME=/x".into()], ..RunOptions::default() };
        let env = environment(&options, &["PATH=/bin".into(), "B=2".into()], "h", "/root");
        assert_eq!(env, ["PATH=/bin", "HOSTNAME=h", "B=3", "HOME=/x"]);
    }
}
