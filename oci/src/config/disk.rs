//! A root file system on a disk of the host's, or in the image of one: snapshotters of containerd's give such. The machine
//! gets the disk itself, so no file server is involved, and the host mounts nothing.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_protocol::agent::Filesystem;
use bulkhead_runtime::monitor::DiskConfig;
use bulkhead_runtime::{Context, Error, Result};
use rustix::fs::FlockOperation;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::usage;

/// File systems that the guest's kernel has.
const KINDS: [&str; 2] = ["ext4", "erofs"];

/// What `--root-disk` says, if it is of this form.
///
/// # Errors
/// It is not.
pub(super) fn from_json<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|why| usage(format!("--root-disk {text}: {why}")))
}

/// What `--root-disk` says of one disk, in containerd's words for a mount.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootDisk {
    #[serde(rename = "type")]
    kind: String,
    source: PathBuf,
    #[serde(default)]
    options: Vec<String>,
}

impl RootDisk {
    /// Parses and checks it.
    ///
    /// # Errors
    /// It is malformed, of a file system that guests do not have, or there is no such disk.
    pub fn parse(text: &str) -> Result<Self> {
        let disk: Self = from_json(text)?;
        let wrong = |why: &str| usage(format!("--root-disk {}: {why}", disk.source.display()));
        if !KINDS.contains(&disk.kind.as_str()) {
            return Err(wrong(&format!(
                "the guest's kernel has no {}, but {}",
                disk.kind,
                KINDS.join(" and ")
            )));
        }
        if !disk.source.is_absolute() {
            return Err(wrong("it is no absolute path"));
        }
        let about =
            disk.source.metadata().context(|| format!("cannot use {} as root", disk.source.display()))?;
        if !(about.is_file() || about.file_type().is_block_device()) {
            return Err(wrong("it is neither a block device nor a file"));
        }
        Ok(disk)
    }

    fn read_only(&self) -> bool {
        self.kind == "erofs" || self.options.iter().any(|option| option == "ro")
    }

    /// For the monitor.
    pub fn config(&self) -> DiskConfig {
        DiskConfig {
            id: "root".into(),
            read_only: self.read_only(),
            path: Some(self.source.clone()),
            ..DiskConfig::default()
        }
    }

    /// For the agent; `device` is the disk's name in the guest.
    pub fn in_guest(&self, device: &str) -> Filesystem {
        // How the host comes by a device is nothing to the guest.
        let options = self.options.iter().filter(|option| !matches!(option.as_str(), "loop" | "rw" | "ro"));
        let mut options: Vec<_> = options.cloned().collect();
        options.extend(self.read_only().then(|| "ro".to_owned()));
        Filesystem { fstype: self.kind.clone(), source: device.into(), options }
    }

    /// Takes the disk for the machine alone: two kernels that write to one file system destroy it. The host's kernel refuses
    /// to mount a device that is held so.
    ///
    /// # Errors
    /// The host has it mounted already, or another machine has it.
    pub fn hold(&self) -> Result<File> {
        let what = || format!("cannot open the disk {}", self.source.display());
        let mut options = File::options();
        options.read(true).write(!self.read_only());
        if self.source.metadata().context(what)?.file_type().is_block_device() && !self.read_only() {
            options.custom_flags(libc::O_EXCL);
        }
        let file = options.open(&self.source).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => usage(format!(
                "the disk {} is in use: this host has it mounted, or another microVM writes to it",
                self.source.display()
            )),
            _ => Error::Io { what: what(), source: error },
        })?;
        // Files have no such owner; what else of ours uses it is told by this.
        let how = if self.read_only() {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        lock(&file, &self.source, how)?;
        Ok(file)
    }

    /// Mounts it on the host.
    ///
    /// # Errors
    /// mount(8)'s.
    pub fn mount(&self, target: &Path) -> Result<()> {
        let mut options = self.options.clone();
        if self.source.is_file() && !options.iter().any(|option| option == "loop") {
            options.push("loop".into());
        }
        mount(&self.kind, &self.source, &options, target)
    }
}

/// Tells other microVMs that the disk is in use.
///
/// # Errors
/// One of them has it.
pub(super) fn lock(file: &File, path: &Path, how: FlockOperation) -> Result<()> {
    rustix::fs::flock(file, how)
        .map_err(|_| usage(format!("the disk {} is in use by another microVM", path.display())))
}

/// mount(8)
///
/// # Errors
/// What it says.
pub(super) fn mount(kind: &str, source: &Path, options: &[String], target: &Path) -> Result<()> {
    let what = || format!("cannot mount {} on {}", source.display(), target.display());
    let mut command = Command::new("mount");
    command.args(["-t", kind]);
    if !options.is_empty() {
        command.arg("-o").arg(options.join(","));
    }
    let output = command.arg("--").arg(source).arg(target).output().context(what)?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(usage(format!("{}: {}", what(), words.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_told_to_monitor_and_agent() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, "").unwrap();
        let path = image.display().to_string();
        let parse = |kind: &str, source: &str, options: &str| {
            RootDisk::parse(&format!(r#"{{"type":"{kind}","source":"{source}","options":[{options}]}}"#))
        };
        let disk = parse("ext4", &path, r#""rw","loop","discard""#).unwrap();
        assert_eq!((disk.config().read_only, disk.config().path), (false, Some(image.clone())));
        assert_eq!(disk.in_guest("/dev/vdb").options, ["discard"]);
        assert_eq!(disk.in_guest("/dev/vdb").source, "/dev/vdb");
        let layer = parse("erofs", &path, "").unwrap();
        assert!(layer.config().read_only && layer.in_guest("/dev/vda").options == ["ro"]);
        for (bad, word) in [
            (parse("xfs", &path, ""), "xfs"),
            (parse("ext4", "image", ""), "absolute"),
            (parse("ext4", "/no/such", ""), "/no/such"),
            (parse("ext4", "/dev/null", ""), "neither"),
            (RootDisk::parse("{"), "--root-disk"),
        ] {
            let error = bad.unwrap_err().chain();
            assert!(error.contains(word), "{error}");
        }
        // One writer, or many readers.
        let held = disk.hold().unwrap();
        assert!(disk.hold().unwrap_err().chain().contains("in use"));
        assert!(layer.hold().is_err());
        drop(held);
        let _readers = [layer.hold().unwrap(), layer.hold().unwrap()];
        assert!(disk.hold().is_err());
    }
}
