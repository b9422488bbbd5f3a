//! A root file system of EROFS files, one for each layer of an image, and a directory on the host for what is written: containerd's
//! erofs snapshotter gives such. The machine gets the layers as one disk, and another disk to write to.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{Attributes, Filesystem, Rootfs};
use bulkhead_runtime::monitor::{DiskConfig, MAX_LAYERS};
use bulkhead_runtime::scratch::{self, Kind};
use bulkhead_runtime::{Context, Layout, Result, Settings};
use rustix::fs::FlockOperation;
use serde::Deserialize;

use super::disk::{from_json, lock, mount};
use super::usage;

/// What `--root-disk` says of layers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootLayers {
    /// Files or block devices, the lowest first.
    layers: Vec<PathBuf>,
    /// The directory that would be written to on the host: the root has its owner and mode.
    upper: PathBuf,
    /// Where the disk to be written to is, and is made if it is not there: it is as old as the container's files.
    writable: PathBuf,
    /// How the host would mount all of it.
    otherwise: Otherwise,
}

/// A mount in containerd's words.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Otherwise {
    #[serde(rename = "type")]
    kind: String,
    source: PathBuf,
    options: Vec<String>,
}

impl RootLayers {
    /// Parses and checks it.
    ///
    /// # Errors
    /// It is malformed, or a layer is missing.
    pub fn parse(text: &str) -> Result<Self> {
        let root: Self = from_json(text)?;
        if root.layers.is_empty() || root.layers.len() > MAX_LAYERS {
            let most = MAX_LAYERS;
            return Err(usage(format!(
                "--root-disk: {} layers; 1 to {most} are possible",
                root.layers.len()
            )));
        }
        if let Some(path) = root.layers.iter().chain([&root.writable]).find(|path| !path.is_absolute()) {
            return Err(usage(format!("--root-disk {}: it is no absolute path", path.display())));
        }
        for layer in &root.layers {
            layer.metadata().context(|| format!("cannot use the layer {}", layer.display()))?;
        }
        Ok(root)
    }

    /// Makes the disk to be written to, if that is to be one.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn prepare(&self, settings: &Settings) -> Result<()> {
        if settings.run.storage.0 == 0 || self.writable.exists() {
            return Ok(());
        }
        let layout = Layout::new(None, &settings.paths)?;
        scratch::create(&layout, &self.writable, settings.run.storage.0, Kind::Kept)
    }

    /// For the monitor.
    pub fn configs(&self) -> Vec<DiskConfig> {
        let layers = DiskConfig {
            id: "layers".into(),
            read_only: true,
            layers: self.layers.clone(),
            ..DiskConfig::default()
        };
        let writable = self.writable.exists().then(|| DiskConfig {
            id: "writable".into(),
            path: Some(self.writable.clone()),
            ..DiskConfig::default()
        });
        [layers].into_iter().chain(writable).collect()
    }

    /// For the agent; `devices` are the guest's names of the disks.
    pub fn in_guest(&self, devices: &[String]) -> Rootfs {
        let layers = devices.first().map(String::as_str).unwrap_or_default();
        let layer = |number: usize| Filesystem {
            fstype: "erofs".into(),
            source: format!("{layers}{number}"),
            options: vec!["ro".into()],
        };
        let writable = match devices.get(1) {
            Some(disk) => Filesystem { fstype: "ext4".into(), source: disk.clone(), options: Vec::new() },
            None => Filesystem { fstype: "tmpfs".into(), source: "tmpfs".into(), options: Vec::new() },
        };
        let attributes = self.upper.metadata().ok();
        let attributes =
            attributes.map(|about| Attributes { mode: about.mode(), uid: about.uid(), gid: about.gid() });
        Rootfs {
            attributes,
            layers: (1..=self.layers.len()).map(layer).collect(),
            writable: Some(writable),
            ..Rootfs::default()
        }
    }

    /// Takes the disk that is written to for the machine alone.
    ///
    /// # Errors
    /// Another machine has it.
    pub fn hold(&self) -> Result<File> {
        // What is not there is in the guest's memory; something has to be held.
        let path = if self.writable.exists() { Some(&self.writable) } else { self.layers.first() };
        let path = path.ok_or_else(|| usage("--root-disk: no layers"))?;
        let file = File::open(path).context(|| format!("cannot open the disk {}", path.display()))?;
        let how = if *path == self.writable {
            FlockOperation::NonBlockingLockExclusive
        } else {
            FlockOperation::NonBlockingLockShared
        };
        lock(&file, path, how)?;
        Ok(file)
    }

    /// Mounts it on the host.
    ///
    /// # Errors
    /// mount(8)'s.
    pub fn mount(&self, target: &Path) -> Result<()> {
        mount(&self.otherwise.kind, &self.otherwise.source, &self.otherwise.options, target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_runtime::settings::Size;

    fn text(dir: &Path, layers: &[&str]) -> String {
        let layers: Vec<_> = layers.iter().map(|name| dir.join(name)).collect();
        let otherwise = serde_json::json!({"type": "overlay", "source": "overlay", "options": []});
        let (upper, writable) = (dir.join("u"), dir.join("w"));
        serde_json::json!({"layers": layers, "upper": upper, "writable": writable, "otherwise": otherwise})
            .to_string()
    }

    #[test]
    fn layers_are_one_disk_and_what_is_written_another() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let root = RootLayers::parse(&text(dir.path(), &["a", "b"])).unwrap();
        let mut settings = Settings::default();
        settings.paths.data = dir.path().join("data");
        // In the guest's memory: one disk.
        settings.run.storage = Size(0);
        root.prepare(&settings).unwrap();
        assert_eq!(root.configs().len(), 1);
        let guest = root.in_guest(&["/dev/vdc".into()]);
        let sources: Vec<_> = guest.layers.iter().map(|layer| layer.source.as_str()).collect();
        assert_eq!(sources, ["/dev/vdc1", "/dev/vdc2"]);
        assert_eq!(guest.writable.unwrap().fstype, "tmpfs");
        // Nobody writes to the layers: any number of machines has them.
        let _both = [root.hold().unwrap(), root.hold().unwrap()];

        settings.run.storage = Size(64 << 20);
        root.prepare(&settings).unwrap();
        assert_eq!(std::fs::metadata(dir.path().join("w")).unwrap().len(), 64 << 20);
        // It is made once, and stays with the container's files.
        File::options().write(true).open(dir.path().join("w")).unwrap().set_len(1 << 20).unwrap();
        root.prepare(&settings).unwrap();
        assert_eq!(std::fs::metadata(dir.path().join("w")).unwrap().len(), 1 << 20);
        assert_eq!(root.configs()[1].path, Some(dir.path().join("w")));
        let guest = root.in_guest(&["/dev/vdc".into(), "/dev/vdf".into()]);
        assert_eq!(guest.writable.unwrap().source, "/dev/vdf");
        assert_eq!(guest.attributes, None);
        std::fs::create_dir(dir.path().join("u")).unwrap();
        assert_eq!(root.in_guest(&[]).attributes.unwrap().mode & 0o170_000, 0o40_000);
        let _held = root.hold().unwrap();
        assert!(root.hold().unwrap_err().chain().contains("in use"));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (text, word) in [
            (text(dir.path(), &[]), "0 layers"),
            (text(dir.path(), &["missing"]), "missing"),
            (text(Path::new("relative"), &["a"]), "absolute"),
            ("{\"layers\":[]}".to_owned(), "missing field"),
        ] {
            let error = RootLayers::parse(&text).unwrap_err().chain();
            assert!(error.contains(word), "{word}: {error}");
        }
    }
}
