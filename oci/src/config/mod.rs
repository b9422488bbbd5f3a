//! config.json: what is asked of the host is taken out and done here, the rest goes to the agent, which is strict too.

mod check;
mod disk;
mod layers;
mod root;
mod take;
mod vm;
mod volume;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{self, Rootfs};
use bulkhead_runtime::monitor::DiskConfig;
use bulkhead_runtime::network::{NamespaceRef, names};
use bulkhead_runtime::shares::Access;
use bulkhead_runtime::{Context, Error, Result};
use serde_json::{Value, json};

pub use self::root::Root;
use self::take::{drop_labels, keep_shared_memory_inside, take_devices, take_namespaces, take_resources};
pub use self::take::{is_tmpfs, leave_hosts_out};
pub use self::vm::Vm;
pub use self::volume::Volume;
use crate::log::Log;
use crate::pod::{Joined, Partner};
use crate::sandbox::View;
use crate::store::Hooks;

/// Engines write some ten KiB.
const MAX_BYTES: u64 = 8 << 20;
/// Annotations by which containerd's CRI and CRI-O say what a container is: `sandbox` holds a pod together.
const POD_HOLDERS: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
/// Annotations by which they say what its image is called.
const IMAGE_NAMES: [&str; 2] = ["io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName"];
/// Of this much the servers are read.
const MAX_RESOLV_CONF: u64 = 64 << 10;
/// A bundle, read and understood.
#[derive(Debug)]
pub struct Bundle {
    /// Absolute, without links.
    pub dir: PathBuf,
    /// Absolute, without links.
    pub rootfs: PathBuf,
    /// What is the root instead, when the machine is the container's own.
    pub root_disk: Option<Root>,
    /// Block devices that the container has.
    pub volumes: Vec<Volume>,
    /// Run by the host.
    pub hooks: Hooks,
    /// Passed through.
    pub annotations: BTreeMap<String, String>,
    /// The process of the container.
    pub process: Value,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// The network it is to have.
    pub network: Wanted,
    /// Namespaces of another container's.
    pub joined: Vec<Joined>,
    /// Name of the guest.
    pub hostname: String,
    /// `linux.cgroupsPath`.
    pub cgroups_path: String,
    /// What `vm` asks for.
    pub vm: Vm,
    /// It may use any device.
    pub privileged: bool,
    /// `linux.seccomp`, compiled.
    pub seccomp: Option<agent::Seccomp>,
    /// `linux.resources`, for the host's cgroup.
    pub resources: Value,
    spec: Value,
    binds: Vec<usize>,
}

/// What config.json says about the network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// One that exists.
    Existing(NamespaceRef),
    /// A new one, which an engine may furnish until `start`.
    New,
}

fn usage(text: impl Into<String>) -> Error {
    Error::Usage(text.into())
}

impl Bundle {
    /// Reads and checks the bundle in `dir`.
    ///
    /// # Errors
    /// A file is missing or malformed, or asks for what a container in a microVM cannot have.
    pub fn read(dir: &Path, log: &Log) -> Result<Self> {
        let dir = fs::canonicalize(dir).context(|| format!("cannot use the bundle {}", dir.display()))?;
        let path = dir.join("config.json");
        let mut spec = parse(&path, open_config(&path)?)?;
        let in_file = |why: String| usage(format!("{}: {why}", path.display()));
        check::head(&spec).map_err(in_file)?;
        let process = spec.get("process").cloned().ok_or_else(|| in_file("it has no process".into()))?;
        check::process(&process).map_err(in_file)?;
        let rootfs = find_root(&dir, &spec).map_err(|error| match error {
            Error::Usage(why) => in_file(why),
            error => error,
        })?;
        let from = |value: Option<&Value>, what: &str| {
            value.cloned().map_or(Ok(json!({})), |value| {
                if value.is_null() {
                    Ok(json!({}))
                } else if value.is_object() {
                    Ok(value)
                } else {
                    Err(in_file(format!("{what} is no object")))
                }
            })
        };
        let hooks: Hooks = serde_json::from_value(from(spec.get("hooks"), "hooks")?)
            .context(|| format!("{}: hooks", path.display()))?;
        hooks.check()?;
        let annotations: BTreeMap<String, String> =
            serde_json::from_value(from(spec.get("annotations"), "annotations")?)
                .context(|| format!("{}: annotations", path.display()))?;
        let vm = Vm::read(&spec, &annotations).map_err(in_file)?;
        let (network, joined) = take_namespaces(&mut spec).map_err(in_file)?;
        let privileged = take::is_privileged(&spec);
        take_devices(&mut spec, log).map_err(in_file)?;
        let volumes = volume::find(&spec).map_err(in_file)?;
        drop_labels(&mut spec, log);
        keep_shared_memory_inside(&mut spec);
        let binds = find_binds(&spec).map_err(in_file)?;
        if let Some(fields) = spec.as_object_mut() {
            for host in ["hooks", "annotations", "vm", "solaris", "windows"] {
                fields.remove(host);
            }
        }
        check::of_host(&spec).map_err(in_file)?;
        let cgroups_path = text(&spec, "/linux/cgroupsPath").to_owned();
        let resources = take_resources(&mut spec);
        let seccomp = bulkhead_runtime::seccomp::take(&mut spec).map_err(in_file)?;
        let terminal = process.get("terminal").and_then(Value::as_bool).unwrap_or(false);
        let hostname = text(&spec, "/hostname").to_owned();
        Ok(Self {
            dir,
            rootfs,
            root_disk: None,
            volumes,
            hooks,
            annotations,
            process,
            terminal,
            network,
            joined,
            hostname,
            cgroups_path,
            vm,
            privileged,
            seccomp,
            resources,
            spec,
            binds,
        })
    }

    /// The name server of dockerd's that the container is to ask, if it is.
    pub fn name_server(&self) -> Option<Ipv4Addr> {
        let mut mounts = self.binds.iter().filter_map(|index| self.spec.pointer(&format!("/mounts/{index}")));
        let file = mounts.rfind(|mount| text(mount, "/destination") == "/etc/resolv.conf")?;
        // One that is missing is told of when it is shared.
        let mut lines = String::new();
        let file = open_config(&self.dir.join(text(file, "/source"))).ok()?;
        file.take(MAX_RESOLV_CONF).read_to_string(&mut lines).ok()?;
        names::server_in(&lines)
    }

    /// Whether it has any of the host's files by a file server.
    pub fn needs_shares(&self) -> bool {
        self.root_disk.is_none() || !self.binds.is_empty()
    }

    /// Whether others are likely to join its machine and bring disks: those of a pod, and those whose images are on disks, too.
    pub fn may_be_joined(&self) -> bool {
        self.vm.pause || self.root_disk.is_some() || self.holds_pod()
    }

    /// Whether it is there for other containers' sake; its image's program is not run.
    pub fn holds_pod(&self) -> bool {
        POD_HOLDERS.iter().any(|key| self.annotations.get(*key).is_some_and(|kind| kind == "sandbox"))
    }

    /// What its engine calls the image it is of, as far as it says that.
    pub fn image_name(&self) -> Option<&str> {
        IMAGE_NAMES.iter().find_map(|key| self.annotations.get(*key)).map(String::as_str)
    }

    /// What a disk of [`Self::disks`] is, for people.
    pub fn name_of_disk(&self, number: usize) -> String {
        match number.checked_sub(self.root_disks().len()) {
            None => "its root file system".to_owned(),
            Some(volume) => {
                self.volumes.get(volume).map(|volume| volume.host.display().to_string()).unwrap_or_default()
            }
        }
    }

    /// The disks that it is to have: its root, if that is one, and its volumes.
    pub fn disks(&self) -> Vec<DiskConfig> {
        let volumes = self.volumes.iter().enumerate().map(|(number, volume)| volume.config(number));
        self.root_disks().into_iter().chain(volumes).collect()
    }

    fn root_disks(&self) -> Vec<DiskConfig> {
        self.root_disk.as_ref().map(Root::configs).unwrap_or_default()
    }

    /// Where in the container the host's files are, in the order in which they are shared.
    pub fn shares(&self) -> Vec<PathBuf> {
        let root = self.root_disk.is_none().then(|| PathBuf::from("/"));
        let binds = self.binds.iter().filter_map(|index| self.spec.pointer(&format!("/mounts/{index}")));
        root.into_iter().chain(binds.map(|mount| text(mount, "/destination").into())).collect()
    }

    /// The host's files that the container has.
    pub fn view(&self) -> View {
        let bind = |&index: &usize| {
            let mount = self.spec.pointer(&format!("/mounts/{index}"))?;
            Some((self.dir.join(text(mount, "/source")), PathBuf::from(text(mount, "/destination"))))
        };
        View { rootfs: self.rootfs.clone(), binds: self.binds.iter().filter_map(bind).collect() }
    }

    /// Shares the root file system, if it is not a disk, and all binds. `disks` are the guest's names of [`Self::disks`]. Answers
    /// what the root is to the guest, and the spec for the agent.
    ///
    /// # Errors
    /// A source does not exist.
    pub fn share(
        &self,
        mut add: impl FnMut(&Path, Access) -> Result<String>,
        partners: &[Partner],
        disks: &[String],
    ) -> Result<(Rootfs, Value)> {
        // Read-only is the guest's to enforce for the root: the mount points in it have to be made first.
        let (roots, volumes) = disks.split_at(self.root_disks().len().min(disks.len()));
        let root = match &self.root_disk {
            None => Rootfs { shared: add(&self.rootfs, Access::ReadWrite)?, ..Rootfs::default() },
            Some(root) => root.in_guest(roots),
        };
        let mut spec = self.spec.clone();
        for &index in &self.binds {
            let Some(mount) = spec.pointer_mut(&format!("/mounts/{index}")) else { continue };
            let source = self.dir.join(text(mount, "/source"));
            let options = mount.get("options").and_then(Value::as_array).cloned().unwrap_or_default();
            let read_only = options.iter().any(|option| matches!(option.as_str(), Some("ro" | "rro")));
            let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
            let guest = add(&source, access)?;
            if let Some(fields) = mount.as_object_mut() {
                fields.insert("source".into(), guest.into());
                fields.insert("type".into(), "bind".into());
            }
        }
        volume::name_disks(&mut spec, volumes.iter());
        if let Some(namespaces) = spec.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut) {
            namespaces.extend(partners.iter().map(Partner::namespace));
        }
        Ok((root, spec))
    }
}

impl Hooks {
    fn check(&self) -> Result<()> {
        let all = [
            &self.prestart,
            &self.create_runtime,
            &self.create_container,
            &self.start_container,
            &self.poststart,
            &self.poststop,
        ];
        for hook in all.into_iter().flatten() {
            if !hook.path.is_absolute() {
                return Err(usage(format!("hook {} is not an absolute path", hook.path.display())));
            }
            if hook.timeout.is_some_and(|seconds| seconds <= 0) {
                return Err(usage(format!("hook {}: its timeout is not above 0", hook.path.display())));
            }
            if let Some(entry) = hook.env.iter().find(|entry| !entry.contains('=')) {
                let path = hook.path.display();
                return Err(usage(format!("hook {path}: {entry:?} in its env is not KEY=value")));
            }
        }
        Ok(())
    }
}

/// Reads a JSON file of sensible size, which may be a pipe of the caller's.
///
/// # Errors
/// It is missing, too large, or no JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    parse(path, fs::File::open(path).context(|| format!("cannot read {}", path.display()))?)
}

/// A bundle's config.json, or another file that it names. It comes from others: one that is a fifo must not keep us waiting.
fn open_config(path: &Path) -> Result<fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    let what = || format!("cannot read {}", path.display());
    let mut options = fs::OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path).context(what)?;
    if file.metadata().context(what)?.is_file() {
        return Ok(file);
    }
    Err(usage(format!("{} is no regular file", path.display())))
}

fn parse(path: &Path, file: fs::File) -> Result<Value> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).context(|| format!("cannot read {}", path.display()))?;
    if bytes.len() as u64 > MAX_BYTES {
        let name = path.display();
        return Err(usage(format!("{name} is too large: more than the limit of {MAX_BYTES} bytes")));
    }
    // serde_json stops at 128 levels of nesting by itself.
    let mut value = serde_json::from_slice(&bytes).context(|| format!("{} is malformed", path.display()))?;
    check::drop_nulls(&mut value);
    Ok(value)
}

/// The directory that `root.path` names. As with runc it has to be the directory itself: a bundle's link could lead
/// anywhere on the host.
fn find_root(dir: &Path, spec: &Value) -> Result<PathBuf> {
    let root = spec.pointer("/root/path").ok_or_else(|| usage("root.path is missing"))?;
    let root = root.as_str().filter(|root| !root.is_empty());
    let root = dir.join(root.ok_or_else(|| usage("root.path is no path"))?);
    let found = fs::canonicalize(&root).context(|| format!("cannot use the root file system {root:?}"))?;
    if !found.is_dir() {
        return Err(usage(format!("root.path {} is no directory", found.display())));
    }
    if check::without_dots(&root) != found {
        return Err(usage(format!(
            "root.path {} is or leads through a symbolic link, to {}: name the directory itself",
            root.display(),
            found.display()
        )));
    }
    Ok(found)
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// Which mounts are of the host's files.
fn find_binds(spec: &Value) -> Result<Vec<usize>, String> {
    let mut binds = Vec::new();
    let mounts = spec.get("mounts").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    for (index, mount) in mounts.iter().enumerate() {
        let destination = text(mount, "/destination");
        if !destination.starts_with('/') {
            return Err(format!("mounts[{index}].destination {destination:?} is not an absolute path"));
        }
        if let Some(path) = [destination, text(mount, "/source")].iter().find(|path| path.contains('\0')) {
            return Err(format!("mounts[{index}]: {path:?} has a NUL byte in it"));
        }
        let options = mount.get("options").and_then(Value::as_array).into_iter().flatten();
        let by_option = options.filter_map(Value::as_str).any(|option| matches!(option, "bind" | "rbind"));
        if by_option || text(mount, "/type") == "bind" {
            if text(mount, "/source").is_empty() {
                return Err(format!("mounts[{index}]: the bind on {destination} has no source"));
            }
            binds.push(index);
        }
    }
    Ok(binds)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn bundle(config: &str) -> Result<Bundle> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("link")).unwrap();
        let global = crate::args::Global {
            version: false,
            debug: false,
            log: None,
            log_format: crate::args::LogFormat::Text,
            root: None,
            systemd_cgroup: false,
            rootless: "auto".into(),
            criu: None,
        };
        Bundle::read(dir.path(), &Log::open(&global).unwrap())
    }

    pub const GOOD: &str = r#"{"ociVersion":"1.2.0","process":{"args":["a"],"cwd":"/"},"root":{"path":"rootfs"},
        "linux":{"namespaces":[{"type":"network"},{"type":"pid"}],"resources":{"memory":{"limit":134217728},
        "cpu":{"quota":150000,"period":100000}}},"annotations":{"a":"b"}}"#;

    #[test]
    fn what_is_the_hosts_is_taken_out() {
        let bundle = bundle(GOOD).unwrap();
        assert_eq!(bundle.network, Wanted::New);
        assert_eq!(bundle.spec.pointer("/linux/namespaces").unwrap(), &json!([{"type": "pid"}]));
        assert!(bundle.spec.get("annotations").is_none());
        let shape = bundle.shape(&bulkhead_runtime::settings::Machine::default()).unwrap();
        assert_eq!(shape.vcpus, 2);
        assert!(shape.memory_mib > 128);
    }

    #[test]
    fn devices_of_the_host_are_for_the_privileged_to_do_without() {
        let with = |rules: &str| {
            let linux = r#""linux":{"devices":[{"path":"/dev/tape","type":"c","major":9,"minor":0},
                {"path":"/dev/fuse","type":"c","major":10,"minor":229}],"#;
            let config = GOOD.replace("\"linux\":{", linux);
            bundle(&config.replace("\"resources\":{", &format!("\"resources\":{{\"devices\":{rules},")))
        };
        let error = with(r#"[{"allow":false,"access":"rwm"}]"#).unwrap_err().chain();
        assert!(error.contains("/dev/tape"), "{error}");
        assert!(with(r#"[{"allow":true,"type":"c","access":"rwm"}]"#).is_err());
        let bundle = with(r#"[{"allow":true,"access":"rwm"}]"#).unwrap();
        let devices = bundle.spec.pointer("/linux/devices").unwrap().as_array().unwrap();
        assert_eq!(devices.len(), 1);
        assert_eq!(text(&devices[0], "/path"), "/dev/fuse");
    }

    #[test]
    fn shared_memory_of_an_engine_becomes_the_guests() {
        let mount = |source: &str| {
            let mounts = format!(
                r#""mounts":[{{"destination":"/dev/shm","type":"bind","source":"{source}","options":["bind","ro"]}}]"#
            );
            bundle(&GOOD.replace("\"annotations\":{\"a\":\"b\"}", &mounts)).unwrap()
        };
        let shm = mount("/dev/shm");
        assert!(shm.binds.is_empty());
        assert_eq!(shm.spec.pointer("/mounts/0/type").unwrap(), "tmpfs");
        let options = shm.spec.pointer("/mounts/0/options").unwrap().to_string();
        assert!(options.contains("size=") && options.contains("\"ro\""), "{options}");
        assert_eq!(mount("/etc").binds, [0]);
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_name() {
        for (from, to, word) in [
            ("\"ociVersion\":\"1.2.0\"", "\"ociVersion\":\"2.0\"", "ociVersion"),
            ("\"path\":\"rootfs\"", "\"path\":\"nowhere\"", "nowhere"),
            ("{\"type\":\"network\"},", "", "network"),
            ("{\"type\":\"pid\"}", "{\"type\":\"user\",\"path\":\"/proc/1/ns/user\"}", "user namespace"),
            ("\"annotations\":{\"a\":\"b\"}", "\"hooks\":{\"prestart\":[{\"path\":\"rel\"}]}", "absolute"),
            (
                "\"annotations\":{\"a\":\"b\"}",
                "\"mounts\":[{\"destination\":\"/x\",\"type\":\"bind\"}]",
                "no source",
            ),
            ("\"annotations\":{\"a\":\"b\"}", "\"annotations\":[1]", "annotations"),
            ("\"process\":", "\"processs\":", "process"),
            ("\"path\":\"rootfs\"", "\"path\":\"link\"", "symbolic link"),
            ("\"path\":\"rootfs\"", "\"path\":\"rootfs/../link\"", "symbolic link"),
            ("\"path\":\"rootfs\"", "\"path\":\"a\\u0000b\"", "a\\0b"),
            ("\"path\":\"rootfs\"", "\"path\":\"config.json\"", "no directory"),
            ("\"path\":\"rootfs\"", "\"path\":\"\"", "root.path"),
            (
                "\"annotations\":{\"a\":\"b\"}",
                "\"hooks\":{\"poststop\":[{\"path\":\"/h\",\"env\":[\"A\"]}]}",
                "KEY=value",
            ),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let error = bundle(&GOOD.replace(from, to)).unwrap_err().chain();
            assert!(error.contains(word), "{to}: {error}");
        }
        assert!(bundle(&"[".repeat(100_000)).is_err());
        // With two of a name the last one counts, as with runc; null is nothing.
        let twice = GOOD.replace("\"cwd\":\"/\"", "\"cwd\":\"nowhere\",\"cwd\":\"/\",\"env\":null");
        assert_eq!(bundle(&twice).unwrap().process, json!({"args": ["a"], "cwd": "/"}));
        let huge =
            bundle(&GOOD.replace("134217728", "9223372036854775807").replace("150000", "9e15")).unwrap();
        assert!(
            u64::from(huge.shape(&bulkhead_runtime::settings::Machine::default()).unwrap().memory_mib)
                < (check::host().0 >> 20) * 2
        );
    }

    proptest! {
        #[test]
        fn no_damage_to_a_config_is_a_panic(cut in 0..GOOD.len(), byte in any::<u8>()) {
            let mut bytes = GOOD.as_bytes().to_vec();
            bytes[cut] = byte;
            let _ = bundle(&String::from_utf8_lossy(&bytes));
            let _ = bundle(&String::from_utf8_lossy(&bytes[..cut]));
        }
    }
}
