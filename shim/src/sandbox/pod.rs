//! A pod as containerd's CRI plugin describes it to a sandbox: what of it is a container's configuration, and what files its
//! containers find in `/etc`.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use prost::Message;
use serde_json::{Value, json};

/// The name that the message goes by.
const NAME: &str = "runtime.v1.PodSandboxConfig";
/// `NamespaceMode` of CRI: that of the node.
const NODE: i32 = 2;
/// containerd's size of a pod's `/dev/shm`.
const SHM_KIB: u32 = 64 << 10;
/// Engines write some ten KiB.
const MAX_CONFIG: u64 = 8 << 20;
/// In the bundle: the root of the container that holds the pod together. Nothing is in it.
const ROOT: &str = "pause";
/// What a pod may say of its machine. Which kernel boots is the administrator's to say, in the configuration file: that
/// containerd filters a pod's annotations (`pod_annotations`), a sandbox is not told.
const ANNOTATIONS: [&str; 2] = ["dev.bulkhead.memory", "dev.bulkhead.vcpus"];
/// Files that containerd leaves to the sandbox.
const FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// `PodSandboxConfig` of CRI, as far as it concerns us; the numbers are those of `api.proto`.
#[derive(Clone, PartialEq, Message)]
pub struct Pod {
    #[prost(string, tag = "2")]
    hostname: String,
    #[prost(message, optional, tag = "4")]
    dns: Option<Dns>,
    #[prost(map = "string, string", tag = "7")]
    annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<Linux>,
}

/// `DNSConfig`
#[derive(Clone, PartialEq, Message)]
struct Dns {
    #[prost(string, repeated, tag = "1")]
    servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    searches: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    options: Vec<String>,
}

/// `LinuxPodSandboxConfig`
#[derive(Clone, PartialEq, Message)]
struct Linux {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security: Option<Security>,
    #[prost(map = "string, string", tag = "3")]
    sysctls: HashMap<String, String>,
    #[prost(message, optional, tag = "5")]
    resources: Option<Resources>,
}

/// `LinuxSandboxSecurityContext`
#[derive(Clone, PartialEq, Message)]
struct Security {
    #[prost(message, optional, tag = "1")]
    namespaces: Option<Namespaces>,
}

/// `NamespaceOption`
#[derive(Clone, PartialEq, Message)]
struct Namespaces {
    #[prost(int32, tag = "1")]
    network: i32,
    #[prost(int32, tag = "2")]
    pid: i32,
    #[prost(int32, tag = "3")]
    ipc: i32,
    #[prost(message, optional, tag = "5")]
    user: Option<UserNamespace>,
}

/// `UserNamespace`
#[derive(Clone, PartialEq, Message)]
struct UserNamespace {
    #[prost(int32, tag = "1")]
    mode: i32,
}

/// `LinuxContainerResources`
#[derive(Clone, PartialEq, Message)]
struct Resources {
    #[prost(int64, tag = "1")]
    cpu_period: i64,
    #[prost(int64, tag = "2")]
    cpu_quota: i64,
    #[prost(int64, tag = "4")]
    memory: i64,
}

impl Pod {
    /// From the options of `CreateSandbox`.
    ///
    /// # Errors
    /// They are something else, or malformed.
    pub fn decode(name: &str, bytes: &[u8]) -> Result<Self> {
        ensure!(name.ends_with(NAME), "the sandbox is described by {name:?}; {NAME} of CRI is known");
        Self::decode_message(bytes).context("the pod's description is malformed")
    }

    fn decode_message(bytes: &[u8]) -> Result<Self, prost::DecodeError> {
        <Self as Message>::decode(bytes)
    }

    fn linux(&self) -> Linux {
        self.linux.clone().unwrap_or_default()
    }

    /// Whether the path of its cgroup is systemd's: so are those of a kubelet with that driver.
    pub fn systemd_cgroup(&self) -> bool {
        self.linux().cgroup_parent.ends_with(".slice")
    }

    /// Writes the bundle of the container that holds the pod together.
    ///
    /// # Errors
    /// The pod wants what a microVM cannot have, or the bundle cannot be written.
    pub fn write_bundle(&self, id: &str, bundle: &Path, network: &str) -> Result<()> {
        let config = self.config(id, network)?;
        let what = || format!("write the bundle {}", bundle.display());
        fs::create_dir_all(bundle.join(ROOT)).with_context(what)?;
        fs::write(bundle.join("config.json"), config.to_string()).with_context(what)?;
        for (file, text) in FILES.into_iter().zip(self.files()) {
            fs::write(bundle.join(file), text).with_context(what)?;
        }
        Ok(())
    }

    /// What the pause container would be told, beside what it has no need of.
    fn config(&self, id: &str, network: &str) -> Result<Value> {
        let linux = self.linux();
        let namespaces = linux.security.and_then(|security| security.namespaces).unwrap_or_default();
        for (mode, name) in
            [(namespaces.network, "hostNetwork"), (namespaces.pid, "hostPID"), (namespaces.ipc, "hostIPC")]
        {
            if mode == NODE {
                bail!("{name}: the host's namespaces cannot be a guest's");
            }
        }
        if namespaces.user.is_some_and(|user| user.mode != NODE) {
            bail!("hostUsers: false is not supported with the sandbox API; with the pause container it is");
        }
        ensure!(!network.is_empty(), "the pod has no network namespace, and the host's cannot be a guest's");
        let mut annotations: BTreeMap<_, _> = ANNOTATIONS
            .iter()
            .filter_map(|&key| Some((key.to_owned(), self.annotations.get(key)?.clone())))
            .collect();
        let mut say = |key: &str, value: String| drop(annotations.insert(key.to_owned(), value));
        say("io.kubernetes.cri.container-type", "sandbox".into());
        say("io.kubernetes.cri.sandbox-id", id.to_owned());
        say("dev.bulkhead.pause", "true".into());
        if let Some(resources) = linux.resources {
            say("io.kubernetes.cri.sandbox-memory", resources.memory.max(0).to_string());
            say("io.kubernetes.cri.sandbox-cpu-quota", resources.cpu_quota.max(0).to_string());
            say("io.kubernetes.cri.sandbox-cpu-period", resources.cpu_period.max(0).to_string());
        }
        // What containerd sets for pods by default, unless they say otherwise.
        let mut sysctls: BTreeMap<_, _> =
            [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into();
        sysctls.extend(linux.sysctls);
        let cgroup = match linux.cgroup_parent {
            parent if parent.is_empty() => String::new(),
            parent if parent.ends_with(".slice") => {
                let slice = parent.rsplit('/').next().unwrap_or_default();
                format!("{slice}:cri-containerd:{id}")
            }
            parent => format!("{}/{id}", parent.trim_end_matches('/')),
        };
        let own = |kind: &str| json!({"type": kind});
        let mount = |kind: &str, at: &str, options: &[&str]| json!({"destination": at, "type": kind, "source": kind, "options": options});
        Ok(json!({
            "ociVersion": "1.0.2",
            "process": {
                "args": ["pause"], "cwd": "/", "noNewPrivileges": true, "oomScoreAdj": -998,
                "user": {"uid": 65535, "gid": 65535}, "env": [],
            },
            "root": {"path": ROOT},
            "hostname": self.hostname,
            "mounts": [
                mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
                mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                shared_memory(id),
            ],
            "annotations": annotations,
            "linux": {
                "cgroupsPath": cgroup,
                "sysctl": sysctls,
                "namespaces": [
                    own("pid"), own("ipc"), own("uts"), own("mount"), {"type": "network", "path": network},
                ],
            },
        }))
    }

    /// In the order of [`FILES`], as containerd writes them for a pause container.
    fn files(&self) -> [String; 3] {
        let host = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let resolver = self.dns.as_ref().map_or_else(
            || host("/etc/resolv.conf"),
            |dns| {
                let line = |name: &str, words: &[String]| {
                    if words.is_empty() { String::new() } else { format!("{name} {}\n", words.join(" ")) }
                };
                let servers = dns.servers.iter().map(|server| format!("nameserver {server}\n"));
                [line("search", &dns.searches), servers.collect(), line("options", &dns.options)].concat()
            },
        );
        [format!("{}\n", self.hostname), host("/etc/hosts"), resolver]
    }
}

/// One for all containers of the pod, in the guest's memory.
fn shared_memory(id: &str) -> Value {
    let name: String = id.chars().filter(char::is_ascii_alphanumeric).take(48).collect();
    let size = format!("size={SHM_KIB}k");
    json!({"destination": "/dev/shm", "type": "tmpfs", "source": format!("guest:pod-{name}"),
        "options": ["nosuid", "nodev", "noexec", "mode=1777", size]})
}

/// Adds what containerd leaves to the sandbox to the configuration of one of its containers: the pod's files in `/etc`, which
/// are in the sandbox's `bundle`, and its `/dev/shm`. What the container has there already stays.
///
/// # Errors
/// There is no such configuration, or it cannot be written.
pub fn furnish(container: &Path, id: &str, bundle: &Path) -> Result<()> {
    let path = container.join("config.json");
    let what = || format!("furnish {}", path.display());
    ensure!(
        fs::metadata(&path).with_context(what)?.len() <= MAX_CONFIG,
        "{}: it is too large",
        path.display()
    );
    let mut config: Value =
        serde_json::from_slice(&fs::read(&path).with_context(what)?).with_context(what)?;
    let read_only = config.pointer("/root/readonly") == Some(&Value::Bool(true));
    let spec = config.as_object_mut().with_context(what)?;
    let mounts = spec.entry("mounts").or_insert_with(|| json!([])).as_array_mut().with_context(what)?;
    // The one that every container of containerd's has by default is its own.
    mounts.retain(|mount| {
        let is = |key: &str, value: &str| mount.get(key).and_then(Value::as_str) == Some(value);
        !(is("destination", "/dev/shm") && is("type", "tmpfs"))
    });
    let mut add = |mount: Value| {
        let at = mount.get("destination").cloned();
        if !mounts.iter().any(|mount| mount.get("destination") == at.as_ref()) {
            mounts.push(mount);
        }
    };
    for file in FILES {
        let mode = if read_only { "ro" } else { "rw" };
        add(json!({"destination": format!("/etc/{file}"), "type": "bind", "source": bundle.join(file),
            "options": ["rbind", "rprivate", mode]}));
    }
    add(shared_memory(id));
    fs::write(&path, config.to_string()).with_context(what)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pod() -> Pod {
        let resources = Resources { cpu_period: 100_000, cpu_quota: 200_000, memory: 300 << 20 };
        let linux = Linux {
            cgroup_parent: "/kubepods/besteffort/pod1".into(),
            security: None,
            sysctls: [("kernel.shm_rmid_forced".to_owned(), "1".to_owned())].into(),
            resources: Some(resources),
        };
        let annotations = [("dev.bulkhead.memory", "256"), ("dev.bulkhead.kernel", "/evil"), ("a", "b")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()));
        let dns = Dns {
            servers: vec!["10.0.0.1".into(), "10.0.0.2".into()],
            searches: vec!["a.b".into()],
            options: vec![],
        };
        Pod { hostname: "web".into(), dns: Some(dns), annotations: annotations.into(), linux: Some(linux) }
    }

    #[test]
    fn a_pod_becomes_a_container_that_holds_it_together() {
        let dir = tempfile::tempdir().unwrap();
        let pod = Pod::decode("runtime.v1.PodSandboxConfig", &pod().encode_to_vec()).unwrap();
        pod.write_bundle("id", dir.path(), "/run/netns/n").unwrap();
        let text = fs::read(dir.path().join("config.json")).unwrap();
        let config: Value = serde_json::from_slice(&text).unwrap();
        let at = |pointer: &str| config.pointer(pointer).cloned().unwrap_or_default();
        assert_eq!(at("/annotations/dev.bulkhead.memory"), "256");
        assert_eq!(at("/annotations/dev.bulkhead.kernel"), Value::Null);
        assert_eq!(at("/annotations/io.kubernetes.cri.sandbox-memory"), (300 << 20).to_string());
        assert_eq!(at("/linux/cgroupsPath"), "/kubepods/besteffort/pod1/id");
        assert_eq!(at("/linux/sysctl/kernel.shm_rmid_forced"), "1");
        assert_eq!(at("/linux/sysctl/net.ipv4.ip_unprivileged_port_start"), "0");
        assert_eq!(at("/linux/namespaces/4/path"), "/run/netns/n");
        let file = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(file("hostname"), "web\n");
        assert_eq!(file("resolv.conf"), "search a.b\nnameserver 10.0.0.1\nnameserver 10.0.0.2\n");
        assert!(!pod.systemd_cgroup() && dir.path().join(ROOT).is_dir());
    }

    #[test]
    fn a_pod_that_wants_the_hosts_namespaces_is_told_so() {
        let with = |namespaces: Namespaces| {
            let security = Some(Security { namespaces: Some(namespaces) });
            Pod { linux: Some(Linux { security, ..Linux::default() }), ..pod() }.config("id", "/n")
        };
        let hosts = |network, pid, ipc| with(Namespaces { network, pid, ipc, user: None });
        assert!(hosts(0, 1, 0).is_ok());
        assert!(hosts(2, 0, 0).unwrap_err().to_string().contains("hostNetwork"));
        assert!(hosts(0, 2, 0).unwrap_err().to_string().contains("hostPID"));
        assert!(hosts(0, 0, 2).unwrap_err().to_string().contains("hostIPC"));
        let user = Some(UserNamespace { mode: 0 });
        assert!(with(Namespaces { user, ..Namespaces::default() }).is_err());
        assert!(pod().config("id", "").is_err());
        assert!(Pod::decode("something.Else", &[]).is_err());
    }

    #[test]
    fn systemds_slices_are_known() {
        let linux = Linux { cgroup_parent: "/kubepods.slice/kubepods-pod1.slice".into(), ..Linux::default() };
        let pod = Pod { linux: Some(linux), ..pod() };
        assert!(pod.systemd_cgroup());
        let config = pod.config("id", "/n").unwrap();
        assert_eq!(config.pointer("/linux/cgroupsPath").unwrap(), "kubepods-pod1.slice:cri-containerd:id");
    }

    #[test]
    fn containers_get_the_pods_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let given = json!({"mounts": [{"destination": "/etc/hosts", "type": "bind", "source": "/kubelets"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}]});
        fs::write(&path, given.to_string()).unwrap();
        furnish(dir.path(), "id", Path::new("/bundle")).unwrap();
        let config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let sources: Vec<_> =
            config["mounts"].as_array().unwrap().iter().map(|mount| mount["source"].clone()).collect();
        assert_eq!(sources, ["/kubelets", "/bundle/hostname", "/bundle/resolv.conf", "guest:pod-id"]);
        assert!(furnish(Path::new("/nowhere"), "id", Path::new("/bundle")).is_err());
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(pod) = Pod::decode(NAME, &bytes) {
                let _ = pod.config("id", "/n");
            }
        }
    }
}
