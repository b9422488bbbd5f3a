//! The container's root, put together in the agent's mount namespace: layers, a writable layer, an overlay of them; or a
//! directory that the host shares.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::{SHARES, agent};
use rustix::mount::{MountFlags, UnmountFlags};

use super::mounts::{Options, put_tree, take_tree};
use crate::disk;
use crate::error::{Context, Error, Result};

/// Where everything of a container is kept in the guest.
const CONTAINERS: &str = "/run/containers";
/// Where image layers are mounted, once each.
const LAYERS: &str = "/run/layers";
/// The kernel takes one page of mount options; overlayfs itself stops at 500 layers.
const MAX_LAYERS: usize = 200;

/// Image layers that are mounted, by source; several containers share one mount.
#[derive(Debug, Default)]
pub struct Layers {
    mounted: BTreeMap<(String, String), Layer>,
    next: u32,
}

#[derive(Debug)]
struct Layer {
    path: PathBuf,
    users: u32,
}

/// A mounted root. [`Rootfs::unmount`] is the only way to end it well.
#[derive(Debug)]
pub struct Rootfs {
    /// The root directory, in the agent's mount namespace.
    pub path: PathBuf,
    directory: PathBuf,
    layers: Vec<(String, String)>,
    mounts: Vec<PathBuf>,
}

impl Rootfs {
    /// Mounts what the host asks for; nothing stays behind when it fails.
    ///
    /// # Errors
    /// The device is missing or damaged, or the request makes no sense.
    pub fn mount(id: &str, request: &agent::Rootfs, layers: &mut Layers) -> Result<Self> {
        let made = !request.layers.is_empty() || request.writable.is_some();
        if !made && request.shared.is_empty() && request.root.is_none() {
            return Err(Error::invalid("the rootfs has neither a layer nor a writable file system"));
        }
        if request.root.is_some() && (made || !request.shared.is_empty()) {
            return Err(Error::invalid("the rootfs is one file system, and something else besides"));
        }
        if !request.shared.is_empty() && (made || !is_shared(Path::new(&request.shared))) {
            return Err(Error::invalid(format!(
                "the rootfs {:?} is no path below {SHARES} alone",
                request.shared
            )));
        }
        if request.layers.len() > MAX_LAYERS {
            let count = request.layers.len();
            return Err(Error::invalid(format!(
                "the rootfs has {count} layers, over the limit of {MAX_LAYERS}"
            )));
        }
        let directory = Path::new(CONTAINERS).join(id);
        let path = directory.join("rootfs");
        let mut rootfs = Self { path, directory, layers: Vec::new(), mounts: Vec::new() };
        match rootfs.assemble(request, layers) {
            Ok(()) => Ok(rootfs),
            Err(error) => {
                let _ = rootfs.unmount(layers);
                Err(error).context(|| "mount the container's rootfs")
            }
        }
    }

    fn assemble(&mut self, request: &agent::Rootfs, layers: &mut Layers) -> Result<()> {
        let mut lower = Vec::new();
        for layer in &request.layers {
            let (key, path) = layers.acquire(layer)?;
            self.layers.push(key);
            lower.push(path);
        }
        fs::create_dir_all(&self.path).context(|| format!("create {}", self.path.display()))?;
        if !request.shared.is_empty() {
            put_tree(take_tree(Path::new(&request.shared), true)?, &self.path)?;
            self.mounts.push(self.path.clone());
            return Ok(());
        }
        if let Some(root) = &request.root {
            mount(root, &self.path, MountFlags::empty())?;
            self.mounts.push(self.path.clone());
            return Ok(());
        }
        match (&request.writable, lower.as_slice()) {
            (None, [only]) => {
                rustix::mount::mount_bind(only.as_path(), self.path.as_path())
                    .context(|| format!("bind {}", only.display()))?;
            }
            (None, _) => self.overlay(&lower, None)?,
            (Some(writable), _) => {
                let scratch = self.directory.join("writable");
                fs::create_dir_all(&scratch).context(|| format!("create {}", scratch.display()))?;
                mount(writable, &scratch, MountFlags::empty())?;
                self.mounts.push(scratch.clone());
                let upper = scratch.join("upper");
                make_upper(&upper, lower.last(), request.attributes)
                    .context(|| format!("create {}", upper.display()))?;
                if lower.is_empty() {
                    rustix::mount::mount_bind(upper.as_path(), self.path.as_path())
                        .context(|| format!("bind {}", upper.display()))?;
                } else {
                    let work = scratch.join("work");
                    fs::create_dir_all(&work).context(|| format!("create {}", work.display()))?;
                    self.overlay(&lower, Some((&upper, &work)))?;
                }
            }
        }
        self.mounts.push(self.path.clone());
        Ok(())
    }

    fn overlay(&self, lower: &[PathBuf], writable: Option<(&Path, &Path)>) -> Result<()> {
        let options = overlay_options(lower, writable);
        let options = c_string(&options)?;
        rustix::mount::mount("overlay", &self.path, "overlay", MountFlags::empty(), Some(options.as_c_str()))
            .context(|| format!("overlay {} layers", lower.len()))
    }

    /// Whether a tar can still be unpacked here after the container has stopped.
    pub fn is_mounted(&self) -> bool {
        !self.mounts.is_empty()
    }

    /// Takes everything down again, in reverse. A file system still in use goes when its last user does.
    ///
    /// # Errors
    /// The first failure; the rest is done all the same.
    pub fn unmount(&mut self, layers: &mut Layers) -> Result<()> {
        let mut result = Ok(());
        while let Some(path) = self.mounts.pop() {
            let done = rustix::mount::unmount(&path, UnmountFlags::DETACH)
                .context(|| format!("unmount {}", path.display()));
            result = result.and(done);
        }
        for key in self.layers.drain(..) {
            result = result.and(layers.release(&key));
        }
        // Only empty directories are left: remove_dir_all could reach into a mount that did not go.
        let _ = fs::remove_dir(&self.path);
        let _ = fs::remove_dir(self.directory.join("writable"));
        let _ = fs::remove_dir(&self.directory);
        result
    }
}

impl Layers {
    fn acquire(&mut self, layer: &agent::Filesystem) -> Result<((String, String), PathBuf)> {
        let key = (layer.source.clone(), layer.options.join(","));
        if let Some(known) = self.mounted.get_mut(&key) {
            known.users += 1;
            return Ok((key, known.path.clone()));
        }
        let path = Path::new(LAYERS).join(self.next.to_string());
        fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
        mount(layer, &path, MountFlags::RDONLY)?;
        self.next = self.next.wrapping_add(1);
        self.mounted.insert(key.clone(), Layer { path: path.clone(), users: 1 });
        Ok((key, path))
    }

    fn release(&mut self, key: &(String, String)) -> Result<()> {
        let Some(layer) = self.mounted.get_mut(key) else { return Ok(()) };
        layer.users = layer.users.saturating_sub(1);
        if layer.users > 0 {
            return Ok(());
        }
        let path = layer.path.clone();
        self.mounted.remove(key);
        rustix::mount::unmount(&path, UnmountFlags::DETACH)
            .context(|| format!("unmount {}", path.display()))?;
        let _ = fs::remove_dir(&path);
        Ok(())
    }
}

/// Makes the directory that becomes the root, with owner and mode as asked for, or else the image's: those of the topmost layer.
/// One that is there stays as it is.
fn make_upper(upper: &Path, topmost: Option<&PathBuf>, asked: Option<agent::Attributes>) -> Result<()> {
    if upper.exists() {
        return Ok(());
    }
    fs::create_dir(upper)?;
    let attributes = match (asked, topmost) {
        (Some(asked), _) => asked,
        (None, Some(layer)) => {
            let about = fs::metadata(layer)?;
            agent::Attributes { mode: about.mode(), uid: about.uid(), gid: about.gid() }
        }
        (None, None) => agent::Attributes { mode: 0o755, uid: 0, gid: 0 },
    };
    std::os::unix::fs::chown(upper, Some(attributes.uid), Some(attributes.gid))?;
    fs::set_permissions(upper, fs::Permissions::from_mode(attributes.mode & 0o7777))?;
    Ok(())
}

/// Whether `path` names something below [`SHARES`].
fn is_shared(path: &Path) -> bool {
    let plain = |component| matches!(component, Component::Normal(_));
    path.strip_prefix(SHARES).is_ok_and(|rest| rest.components().count() > 0 && rest.components().all(plain))
}

fn mount(filesystem: &agent::Filesystem, target: &Path, flags: MountFlags) -> Result<()> {
    let options = Options::parse(&filesystem.options)?;
    let data = c_string(&options.data)?;
    let data = (!options.data.is_empty()).then_some(data.as_c_str());
    disk::wait_for(&filesystem.source)?;
    rustix::mount::mount(
        filesystem.source.as_str(),
        target,
        filesystem.fstype.as_str(),
        options.set | flags,
        data,
    )
    .context(|| format!("mount {} {} with options {:?}", filesystem.fstype, filesystem.source, options.data))
}

/// overlayfs wants the topmost layer first; the request has the lowest first.
fn overlay_options(lower: &[PathBuf], writable: Option<(&Path, &Path)>) -> String {
    let lower: Vec<_> = lower.iter().rev().map(|path| path.display().to_string()).collect();
    let mut options = format!("lowerdir={}", lower.join(":"));
    if let Some((upper, work)) = writable {
        options.push_str(&format!(",upperdir={},workdir={}", upper.display(), work.display()));
    }
    options
}

/// A string for the kernel.
///
/// # Errors
/// It has a NUL byte.
pub fn c_string(text: &str) -> Result<std::ffi::CString> {
    std::ffi::CString::new(text).map_err(|_| Error::invalid(format!("{text:?} has a NUL byte")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_root_lies_below_the_shares() {
        assert!(is_shared(Path::new("/run/shares/host/0")));
        for bad in
            ["", "/", "/run/shares", "/run/shares/../x", "/run/shares/a/../../..", "run/shares/a", "/etc"]
        {
            assert!(!is_shared(Path::new(bad)), "{bad}");
        }
    }

    #[test]
    fn the_root_is_as_the_images() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("layer");
        fs::create_dir(&layer).unwrap();
        fs::set_permissions(&layer, fs::Permissions::from_mode(0o1750)).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        let upper = dir.path().join("upper");
        make_upper(&upper, Some(&layer), None).unwrap();
        assert_eq!(mode(&upper), 0o1750);
        // What a container has made of it stays.
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o700)).unwrap();
        make_upper(&upper, Some(&layer), None).unwrap();
        assert_eq!(mode(&upper), 0o700);
        let alone = dir.path().join("alone");
        make_upper(&alone, None, None).unwrap();
        assert_eq!(mode(&alone), 0o755);
        let asked = dir.path().join("asked");
        let (uid, gid) = {
            let about = fs::metadata(&layer).unwrap();
            (about.uid(), about.gid())
        };
        make_upper(&asked, Some(&layer), Some(agent::Attributes { mode: 0o40711, uid, gid })).unwrap();
        assert_eq!(mode(&asked), 0o711);
    }

    #[test]
    fn the_topmost_layer_comes_first() {
        let lower = [PathBuf::from("/l/0"), PathBuf::from("/l/1")];
        assert_eq!(overlay_options(&lower, None), "lowerdir=/l/1:/l/0");
        let writable = (Path::new("/w/upper"), Path::new("/w/work"));
        assert_eq!(
            overlay_options(&lower, Some(writable)),
            "lowerdir=/l/1:/l/0,upperdir=/w/upper,workdir=/w/work"
        );
    }
}
