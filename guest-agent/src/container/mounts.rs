//! The mounts of a container, made by its init after it has entered its new root: every path is resolved by the
//! kernel inside that root, whatever links the image has. Sources of bind mounts are taken before, as detached trees.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::rootfs::c_string;
use super::spec::Mount;
use crate::error::{Context, Error, Result};

/// Mount options as mount(8) spells them, sorted by what mount(2) does with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Flags to set.
    pub set: MountFlags,
    /// Changes of propagation, made after the mount.
    pub propagation: Vec<MountPropagationFlags>,
    /// `bind` (false) or `rbind` (true).
    pub bind: Option<bool>,
    /// A tmpfs starts with what the image has at its place.
    pub copy_up: bool,
    /// What only the file system understands.
    pub data: String,
}

impl Default for Options {
    fn default() -> Self {
        let set = MountFlags::empty();
        Self { set, propagation: Vec::new(), bind: None, copy_up: false, data: String::new() }
    }
}

impl Options {
    /// Sorts options; the last of opposites wins.
    ///
    /// # Errors
    /// An option that is known and cannot be honoured.
    pub fn parse(options: &[String]) -> Result<Self> {
        let mut parsed = Self::default();
        let mut data = Vec::new();
        for option in options {
            match option.as_str() {
                "bind" => parsed.bind = Some(false),
                "rbind" => parsed.bind = Some(true),
                "tmpcopyup" => parsed.copy_up = true,
                "notmpcopyup" => parsed.copy_up = false,
                "defaults" | "" => {}
                "idmap" | "ridmap" => {
                    return Err(Error::invalid(format!("not supported: mount option {option}")));
                }
                other => {
                    if let Some((flag, on)) = flag(other) {
                        parsed.set.set(flag, on);
                    } else if let Some(propagation) = propagation(other) {
                        parsed.propagation.push(propagation);
                    } else {
                        data.push(other);
                    }
                }
            }
        }
        parsed.data = data.join(",");
        Ok(parsed)
    }
}

fn flag(option: &str) -> Option<(MountFlags, bool)> {
    Some(match option {
        "ro" => (MountFlags::RDONLY, true),
        "rw" => (MountFlags::RDONLY, false),
        "nosuid" => (MountFlags::NOSUID, true),
        "suid" => (MountFlags::NOSUID, false),
        "nodev" => (MountFlags::NODEV, true),
        "dev" => (MountFlags::NODEV, false),
        "noexec" => (MountFlags::NOEXEC, true),
        "exec" => (MountFlags::NOEXEC, false),
        "sync" => (MountFlags::SYNCHRONOUS, true),
        "async" => (MountFlags::SYNCHRONOUS, false),
        "dirsync" => (MountFlags::DIRSYNC, true),
        "noatime" => (MountFlags::NOATIME, true),
        "atime" => (MountFlags::NOATIME, false),
        "nodiratime" => (MountFlags::NODIRATIME, true),
        "diratime" => (MountFlags::NODIRATIME, false),
        "relatime" => (MountFlags::RELATIME, true),
        "norelatime" => (MountFlags::RELATIME, false),
        "strictatime" => (MountFlags::STRICTATIME, true),
        "nostrictatime" => (MountFlags::STRICTATIME, false),
        "lazytime" => (MountFlags::LAZYTIME, true),
        "nolazytime" => (MountFlags::LAZYTIME, false),
        "nosymfollow" => (MountFlags::NOSYMFOLLOW, true),
        "symfollow" => (MountFlags::NOSYMFOLLOW, false),
        "silent" => (MountFlags::SILENT, true),
        "loud" => (MountFlags::SILENT, false),
        _ => return None,
    })
}

/// `shared`, `rslave` and their like.
pub fn propagation(option: &str) -> Option<MountPropagationFlags> {
    let (kind, recursive) = match option.strip_prefix('r') {
        Some(kind) => (kind, MountPropagationFlags::REC),
        None => (option, MountPropagationFlags::empty()),
    };
    let kind = match kind {
        "private" => MountPropagationFlags::PRIVATE,
        "shared" => MountPropagationFlags::SHARED,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        _ => return None,
    };
    Some(kind | recursive)
}

/// A mount ready to be made in the new root.
#[derive(Debug)]
pub struct Prepared<'a> {
    mount: &'a Mount,
    options: Options,
    source: Option<OwnedFd>,
}

/// Reads the options of all mounts and takes the sources of bind mounts, while the agent's own root is still in view.
/// A `cgroup` mount without a namespace of its own is a bind of the container's group at `cgroup`.
///
/// # Errors
/// Unknown options, a source that does not exist.
pub fn prepare<'a>(mounts: &'a [Mount], cgroup: Option<&Path>) -> Result<Vec<Prepared<'a>>> {
    let one = |mount: &'a Mount| {
        let mut options = Options::parse(&mount.options)?;
        if !mount.destination.starts_with('/') {
            return Err(Error::invalid("the destination is not an absolute path"));
        }
        if mount.fstype == "bind" && options.bind.is_none() {
            options.bind = Some(false);
        }
        let source = match (options.bind, cgroup) {
            (Some(recursive), _) => Some(take_tree(Path::new(&mount.source), recursive)?),
            (None, Some(cgroup)) if is_cgroup(mount) => Some(take_tree(cgroup, false)?),
            _ => None,
        };
        Ok(Prepared { mount, options, source })
    };
    mounts.iter().map(|mount| one(mount).context(|| format!("mount on {}", mount.destination))).collect()
}

fn is_cgroup(mount: &Mount) -> bool {
    matches!(mount.fstype.as_str(), "cgroup" | "cgroup2")
}

/// A detached copy of the mount at `path`.
pub fn take_tree(path: &Path, recursive: bool) -> Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    rustix::mount::open_tree(CWD, path, flags).context(|| format!("bind source {}", path.display()))
}

/// Puts a detached tree at `target`, which is made if it does not exist.
pub fn put_tree(tree: impl AsFd, target: &Path) -> Result<()> {
    let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&tree)?.st_mode);
    if kind.is_dir() {
        fs::create_dir_all(target).context(|| format!("create {}", target.display()))?;
    } else if !target.exists() {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).context(|| format!("create {}", parent.display()))?;
        }
        fs::File::create(target).context(|| format!("create {}", target.display()))?;
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    rustix::mount::move_mount(tree.as_fd(), "", CWD, target, flags)
        .context(|| format!("bind on {}", target.display()))
}

impl Prepared<'_> {
    /// Makes the mount in the current root.
    ///
    /// # Errors
    /// What the kernel says, with what was asked.
    pub fn make(&self) -> Result<()> {
        let Mount { destination, fstype, source, .. } = self.mount;
        self.make_at(Path::new(destination)).context(|| {
            format!("mount {fstype} {source} on {destination} with options {:?}", self.mount.options)
        })
    }

    fn make_at(&self, target: &Path) -> Result<()> {
        if let Some(tree) = &self.source {
            put_tree(tree, target)?;
            if !self.options.set.is_empty() {
                rustix::mount::mount_remount(target, MountFlags::BIND | self.options.set, "")
                    .context(|| "set the flags of the bind mount")?;
            }
        } else {
            fs::create_dir_all(target).context(|| "create the mount point")?;
            self.make_new(target)?;
        }
        for &change in &self.options.propagation {
            rustix::mount::mount_change(target, change).context(|| "change propagation")?;
        }
        Ok(())
    }

    fn make_new(&self, target: &Path) -> Result<()> {
        let fstype = if is_cgroup(self.mount) { "cgroup2" } else { self.mount.fstype.as_str() };
        let mut flags = self.options.set;
        // /dev gets its nodes before it becomes read-only, a copied-up tmpfs its files.
        if target == Path::new("/dev") || self.options.copy_up {
            flags.remove(MountFlags::RDONLY);
        }
        let before =
            (self.options.copy_up && fstype == "tmpfs").then(|| open_directory(target)).transpose()?;
        let data = c_string(&self.options.data)?;
        let data = (!self.options.data.is_empty()).then_some(data.as_c_str());
        rustix::mount::mount(self.mount.source.as_str(), target, fstype, flags, data)?;
        if let Some(before) = before {
            super::copy_up::copy(&before, &open_directory(target)?)
                .context(|| "copy the image's files up")?;
            if self.options.set.contains(MountFlags::RDONLY) {
                rustix::mount::mount_remount(target, MountFlags::BIND | self.options.set, "")?;
            }
        }
        Ok(())
    }

    /// Makes a read-only `/dev` so, now that its nodes are there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn finish(&self) -> Result<()> {
        let late = self.mount.destination == "/dev" && self.source.is_none();
        if late && self.options.set.contains(MountFlags::RDONLY) {
            rustix::mount::mount_remount("/dev", MountFlags::BIND | self.options.set, "")
                .context(|| "make /dev read-only")?;
        }
        Ok(())
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
    rustix::fs::open(path, flags, Mode::empty()).context(|| format!("open {}", path.display()))
}

/// The root that was left: out of every path's reach, but still there.
#[derive(Debug)]
pub struct OldRoot(OwnedFd);

/// Makes `root` the root of this process and its mount namespace.
///
/// # Errors
/// `root` is not a mount.
pub fn enter_root(root: &Path, locked: bool) -> Result<OldRoot> {
    let what = || format!("enter the container's root {}", root.display());
    let old = open_directory(Path::new("/"))?;
    if locked {
        // Mounts that came along into a lesser user namespace are locked in their place; a fresh bind is not.
        rustix::mount::mount_bind_recursive(root, root).context(what)?;
    }
    rustix::process::chdir(root).context(what)?;
    // The old root ends up stacked on the new one, with no directory needed for it.
    rustix::process::pivot_root(".", ".").context(what)?;
    rustix::process::chdir("/").context(what)?;
    Ok(OldRoot(old))
}

impl OldRoot {
    /// Drops it. Until then a user namespace may mount proc and sysfs: only what its namespace shows already.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn leave(self) -> Result<()> {
        let what = || "leave the guest's root";
        rustix::process::fchdir(&self.0).context(what)?;
        rustix::mount::unmount(".", UnmountFlags::DETACH).context(what)?;
        rustix::process::chdir("/").context(what)
    }
}

/// Hides `path`: a file behind /dev/null, a directory behind an empty read-only one.
///
/// # Errors
/// What the kernel says; a path that does not exist needs no hiding.
pub fn mask(path: &str) -> Result<()> {
    let what = || format!("mask {path}");
    let Ok(stat) = rustix::fs::statat(CWD, path, AtFlags::empty()) else { return Ok(()) };
    if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() {
        rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::RDONLY, None).context(what)
    } else {
        rustix::mount::mount_bind("/dev/null", path).context(what)
    }
}

/// Makes `path` read-only for the container.
///
/// # Errors
/// What the kernel says; a path that does not exist is skipped.
pub fn make_readonly(path: &str) -> Result<()> {
    let what = || format!("make {path} read-only");
    match rustix::mount::mount_bind_recursive(path, path) {
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        result => result.context(what)?,
    }
    let inherited = inherited_flags(path)?;
    rustix::mount::mount_remount(path, MountFlags::BIND | MountFlags::RDONLY | inherited, "").context(what)
}

/// The flags that a remount must repeat, or it would clear them.
pub fn inherited_flags(path: &str) -> Result<MountFlags> {
    use rustix::fs::StatVfsMountFlags as Has;
    let has = rustix::fs::statvfs(path).context(|| format!("statvfs {path}"))?.f_flag;
    let pairs = [
        (Has::NOSUID, MountFlags::NOSUID),
        (Has::NODEV, MountFlags::NODEV),
        (Has::NOEXEC, MountFlags::NOEXEC),
        (Has::NOATIME, MountFlags::NOATIME),
        (Has::NODIRATIME, MountFlags::NODIRATIME),
        (Has::RELATIME, MountFlags::RELATIME),
    ];
    Ok(pairs.iter().filter(|(h, _)| has.contains(*h)).fold(MountFlags::empty(), |all, (_, m)| all | *m))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(options: &[&str]) -> Options {
        Options::parse(&options.iter().map(|&o| o.to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn sorts_options_by_what_the_kernel_does_with_them() {
        let options = parse(&["nosuid", "ro", "rw", "mode=755", "size=65536k", "rslave"]);
        assert_eq!(options.set, MountFlags::NOSUID);
        assert_eq!(options.data, "mode=755,size=65536k");
        assert_eq!(options.propagation, [MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC]);
        assert_eq!(parse(&["rbind", "ro"]).bind, Some(true));
        assert!(Options::parse(&["idmap".to_owned()]).is_err());
    }

    proptest! {
        #[test]
        fn any_option_is_sorted_somewhere(options in prop::collection::vec("[a-z=,]{0,12}", 0..6)) {
            let _ = Options::parse(&options);
        }
    }
}
