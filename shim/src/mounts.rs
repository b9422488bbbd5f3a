//! A container's root file system, as a snapshotter of containerd's describes it: mounts to be made in the bundle.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

/// What mount(2) takes as data: a page, with its NUL.
const MAX_DATA: usize = 4095;

/// One mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// `overlay`, `bind`, `erofs`, `ext4`…
    pub kind: String,
    /// Device or directory.
    pub source: String,
    /// As mount(8) writes them.
    pub options: Vec<String>,
}

/// Options, sorted by what mount(2) does with them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sorted {
    flags: Option<MountFlags>,
    bind: bool,
    propagation: Option<MountPropagationFlags>,
    data: Vec<String>,
}

/// Makes the mounts of a container, one on the other. None is left when one fails.
///
/// # Errors
/// What the kernel says, and of which.
pub fn make(mounts: &[Mount], target: &Path) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(target).with_context(|| format!("create {}", target.display()))?;
    for mount in mounts {
        if let Err(error) = one(mount, target) {
            unmake(target);
            return Err(error.context(format!(
                "mount the {} {} on {}",
                mount.kind,
                mount.source,
                target.display()
            )));
        }
    }
    Ok(())
}

/// The mount as `bulkhead-oci` takes it (`--root-disk`), if a guest can have its device itself instead.
pub fn as_disk(mounts: &[Mount]) -> Option<String> {
    let [Mount { kind, source, options }] = mounts else { return None };
    let is_disk =
        fs::metadata(source).is_ok_and(|about| about.is_file() || about.file_type().is_block_device());
    (matches!(kind.as_str(), "ext4" | "erofs") && is_disk)
        .then(|| serde_json::json!({"type": kind, "source": source, "options": options}).to_string())
}

/// Takes away all that is mounted on `target`.
pub fn unmake(target: &Path) {
    while rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}

fn one(mount: &Mount, target: &Path) -> Result<()> {
    let sorted = sort(&mount.options)?;
    let flags = sorted.flags.unwrap_or(MountFlags::empty());
    if sorted.bind || matches!(mount.kind.as_str(), "bind" | "rbind") {
        rustix::mount::mount_bind_recursive(&mount.source, target)?;
        if !flags.is_empty() {
            rustix::mount::mount_remount(target, MountFlags::BIND | flags, "")?;
        }
    } else {
        let data = sorted.data.join(",");
        if data.len() > MAX_DATA && mount.kind == "overlay" {
            shortened(&sorted.data, |data| new(mount, target, flags, data))?;
        } else {
            new(mount, target, flags, &data)?;
        }
    }
    if let Some(propagation) = sorted.propagation {
        rustix::mount::mount_change(target, propagation)?;
    }
    Ok(())
}

fn new(mount: &Mount, target: &Path, flags: MountFlags, data: &str) -> Result<()> {
    ensure!(
        data.len() <= MAX_DATA,
        "its options have {} characters, over the kernel's limit of {MAX_DATA}",
        data.len()
    );
    let data = CString::new(data).context("its options have a NUL")?;
    Ok(rustix::mount::mount(&mount.source, target, &mount.kind, flags, data.as_c_str())?)
}

/// Does something with an overlay's options in which the directories are relative to one they have in common: images of many
/// layers would not fit otherwise. In a thread of its own, whose working directory that is.
fn shortened(options: &[String], work: impl FnOnce(&str) -> Result<()> + Send) -> Result<()> {
    let Some((common, options)) = relative(options) else { bail!("its layers have no directory in common") };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: only the working directory, root and umask become this thread's own.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
                .context("leave the working directory")?;
            rustix::process::chdir(&common).with_context(|| format!("change to {}", common.display()))?;
            work(&options)
        });
        thread.join().unwrap_or_else(|_| bail!("the thread that mounts has ended unexpectedly"))
    })
}

/// The directory that all layers are in, and the options with paths relative to it.
fn relative(options: &[String]) -> Option<(PathBuf, String)> {
    let lower = options.iter().find_map(|option| option.strip_prefix("lowerdir="))?;
    let mut layers = lower.split(':').map(Path::new);
    let mut common = layers.next()?.parent()?.to_owned();
    for layer in layers {
        while !layer.starts_with(&common) {
            common = common.parent()?.to_owned();
        }
    }
    if !common.is_absolute() || common.components().any(|part| matches!(part, Component::ParentDir)) {
        return None;
    }
    let short =
        |path: &str| Path::new(path).strip_prefix(&common).map(|path| path.display().to_string()).ok();
    let one = |option: &String| match option.strip_prefix("lowerdir=") {
        Some(layers) => {
            let layers: Option<Vec<_>> = layers.split(':').map(short).collect();
            Some(format!("lowerdir={}", layers?.join(":")))
        }
        None => Some(option.clone()),
    };
    let options: Option<Vec<_>> = options.iter().map(one).collect();
    Some((common, options?.join(",")))
}

fn sort(options: &[String]) -> Result<Sorted> {
    let mut sorted = Sorted::default();
    let mut flags = MountFlags::empty();
    for option in options {
        let (flag, on) = match option.as_str() {
            "bind" | "rbind" => {
                sorted.bind = true;
                continue;
            }
            "private" | "rprivate" => {
                sorted.propagation = Some(MountPropagationFlags::PRIVATE | MountPropagationFlags::REC);
                continue;
            }
            "slave" | "rslave" => {
                sorted.propagation = Some(MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC);
                continue;
            }
            "shared" | "rshared" => {
                sorted.propagation = Some(MountPropagationFlags::SHARED | MountPropagationFlags::REC);
                continue;
            }
            "loop" => bail!("the option loop: mount the image by a device of its own"),
            "defaults" | "" => continue,
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
            "noatime" => (MountFlags::NOATIME, true),
            "atime" => (MountFlags::NOATIME, false),
            "nodiratime" => (MountFlags::NODIRATIME, true),
            "diratime" => (MountFlags::NODIRATIME, false),
            "relatime" => (MountFlags::RELATIME, true),
            "norelatime" => (MountFlags::RELATIME, false),
            "strictatime" => (MountFlags::STRICTATIME, true),
            other => {
                sorted.data.push(other.to_owned());
                continue;
            }
        };
        flags.set(flag, on);
    }
    sorted.flags = (!flags.is_empty()).then_some(flags);
    Ok(sorted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn options_are_sorted() {
        let sorted = sort(&words(&["rbind", "ro", "rslave", "size=1m"])).unwrap();
        assert!(sorted.bind && sorted.flags == Some(MountFlags::RDONLY));
        assert_eq!(sorted.data, ["size=1m"]);
        assert!(sort(&words(&["loop"])).is_err());
    }

    #[test]
    fn a_disk_is_the_guests_to_mount() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::write(&image, "").unwrap();
        let mount = |kind: &str, source: &Path| Mount {
            kind: kind.into(),
            source: source.display().to_string(),
            options: words(&["rw", "loop"]),
        };
        let disk = as_disk(&[mount("ext4", &image)]).unwrap();
        assert!(disk.contains(r#""type":"ext4""#) && disk.contains(r#"["rw","loop"]"#), "{disk}");
        assert_eq!(as_disk(&[mount("xfs", &image)]), None);
        assert_eq!(as_disk(&[mount("ext4", dir.path())]), None);
        assert_eq!(as_disk(&[mount("ext4", &image), mount("ext4", &image)]), None);
        assert_eq!(as_disk(&[]), None);
    }

    #[test]
    fn many_layers_become_relative() {
        let options = words(&["index=off", "workdir=/v/s/9/work", "lowerdir=/v/s/1/fs:/v/s/22/fs:/v/s/3/fs"]);
        let (common, short) = relative(&options).unwrap();
        assert_eq!(common, Path::new("/v/s"));
        assert_eq!(short, "index=off,workdir=/v/s/9/work,lowerdir=1/fs:22/fs:3/fs");
        assert!(relative(&words(&["lowerdir=/v/../s/1:/v/../s/2"])).is_none());
        assert!(relative(&words(&["upperdir=/x"])).is_none());
    }

    proptest! {
        #[test]
        fn nothing_panics(options in prop::collection::vec("[a-z=/:.]{0,20}", 0..6)) {
            let _ = (sort(&options), relative(&options));
        }
    }
}
