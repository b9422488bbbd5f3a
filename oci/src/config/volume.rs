//! Block devices of the host that a container has: disks of its machine.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use bulkhead_runtime::monitor::DiskConfig;
use serde_json::{Value, json};

use super::text;

/// The machine has room for more devices than these, and the root may be one of them.
const MAX: usize = 8;

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its node on the host.
    pub host: PathBuf,
    /// Where the container has it.
    pub path: String,
    /// The container may not write to it.
    pub read_only: bool,
}

impl Volume {
    /// For the monitor; `number` counts them.
    pub fn config(&self, number: usize) -> DiskConfig {
        DiskConfig {
            id: format!("volume{number}"),
            read_only: self.read_only,
            path: Some(self.host.clone()),
            ..DiskConfig::default()
        }
    }
}

/// The block devices among `linux.devices`, looked up on the host.
pub(super) fn find(spec: &Value) -> Result<Vec<Volume>, String> {
    let devices = spec.pointer("/linux/devices").and_then(Value::as_array).into_iter().flatten();
    let volumes: Vec<_> = devices
        .filter(|device| text(device, "/type") == "b")
        .map(|device| {
            let path = text(device, "/path").to_owned();
            let wrong = |why: String| format!("linux.devices: {path}: {why}");
            let number =
                |key: &str| device.get(key).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
            let (major, minor) =
                number("major").zip(number("minor")).ok_or_else(|| wrong("it has no number".into()))?;
            let host = node(Path::new("/"), major, minor).map_err(wrong)?;
            let read_only = !may_write(spec, major, minor);
            Ok(Volume { host, path, read_only })
        })
        .collect::<Result<_, String>>()?;
    match volumes.len() {
        count if count > MAX => Err(format!("linux.devices has {count} block devices, {MAX} are possible")),
        _ => Ok(volumes),
    }
}

/// The host's node of a block device, by what its kernel calls it.
fn node(root: &Path, major: u32, minor: u32) -> Result<PathBuf, String> {
    let about = root.join(format!("sys/dev/block/{major}:{minor}/uevent"));
    let about = fs::read_to_string(about).map_err(|why| format!("block device {major}:{minor}: {why}"))?;
    let name = about.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.filter(|name| !name.split('/').any(|part| matches!(part, "" | "." | "..")));
    let node =
        root.join("dev").join(name.ok_or_else(|| format!("block device {major}:{minor} has no name"))?);
    let found = fs::metadata(&node).map_err(|why| format!("{}: {why}", node.display()))?;
    if found.file_type().is_block_device() && found.rdev() == rustix::fs::makedev(major, minor) {
        return Ok(node);
    }
    Err(format!("{} is not the block device {major}:{minor}", node.display()))
}

/// Whether the last rule about a device that says something of writing allows it. Without any, everything is allowed.
fn may_write(spec: &Value, major: u32, minor: u32) -> bool {
    let rules = spec.pointer("/linux/resources/devices").and_then(Value::as_array).into_iter().flatten();
    let mut meant = rules.filter(|rule| {
        let is = |key: &str, number: u32| {
            rule.get(key).and_then(Value::as_i64).is_none_or(|n| n == -1 || n == i64::from(number))
        };
        let access = text(rule, "/access");
        matches!(text(rule, "/type"), "" | "a" | "b")
            && is("major", major)
            && is("minor", minor)
            && (access.is_empty() || access.contains('w'))
    });
    meant.next_back().is_none_or(|rule| rule.get("allow") == Some(&json!(true)))
}

/// Tells the agent which disks of the machine the container's devices are, in their order.
pub(super) fn name_disks<'a>(spec: &mut Value, disks: impl Iterator<Item = &'a String>) {
    let devices = spec.pointer_mut("/linux/devices").and_then(Value::as_array_mut).into_iter().flatten();
    for (device, disk) in devices.filter(|device| text(device, "/type") == "b").zip(disks) {
        if let Some(fields) = device.as_object_mut() {
            fields.insert("disk".into(), disk.as_str().into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let about = dir.path().join("sys/dev/block/7:0");
        fs::create_dir_all(&about).unwrap();
        fs::create_dir_all(dir.path().join("dev")).unwrap();
        assert!(node(dir.path(), 7, 1).unwrap_err().contains("7:1"));
        fs::write(about.join("uevent"), "MAJOR=7\nDEVNAME=../etc/passwd\n").unwrap();
        assert!(node(dir.path(), 7, 0).unwrap_err().contains("no name"));
        fs::write(about.join("uevent"), "MAJOR=7\nDEVNAME=loop0\n").unwrap();
        fs::write(dir.path().join("dev/loop0"), "").unwrap();
        assert!(node(dir.path(), 7, 0).unwrap_err().contains("is not the block device"));
    }

    #[test]
    fn rules_say_whether_it_is_written_to() {
        let with = |rules: Value| may_write(&json!({"linux": {"resources": {"devices": rules}}}), 7, 0);
        let none = json!({"allow": false, "access": "rwm"});
        let one =
            |access: &str| json!({"allow": true, "type": "b", "major": 7, "minor": 0, "access": access});
        assert!(with(json!([])) && with(json!([none, one("rwm")])));
        assert!(!with(json!([none])) && !with(json!([none, one("r")])));
        assert!(!with(json!([none, {"allow": true, "type": "b", "major": 7, "minor": 1, "access": "rw"}])));
    }

    #[test]
    fn disks_are_named_in_their_order() {
        let mut spec = json!({"linux": {"devices": [{"type": "c"}, {"type": "b"}, {"type": "b"}]}});
        name_disks(&mut spec, ["/dev/vdb".to_owned(), "/dev/vdf".to_owned()].iter());
        let disks: Vec<_> =
            spec["linux"]["devices"].as_array().unwrap().iter().map(|d| d["disk"].clone()).collect();
        assert_eq!(disks, [Value::Null, "/dev/vdb".into(), "/dev/vdf".into()]);
    }
}
