//! What every container finds in `/dev`.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::fs::{CWD, FileType, Gid, Mode, Uid};

use super::mounts::{put_tree, take_tree};
use super::spec::Device;
use crate::error::{Context, Error, Result};

/// The runtime-spec's default devices: name, major, minor.
const DEFAULTS: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// The runtime-spec's links, and where they lead.
const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// In a user namespace nobody may make nodes: the agent's own are bound instead. Taken before its root is left.
#[derive(Debug)]
pub struct Nodes(Option<Vec<(String, OwnedFd)>>);

impl Nodes {
    /// Looks at what will be needed.
    ///
    /// # Errors
    /// A device that the guest does not have, for a container with a user namespace.
    pub fn prepare(devices: &[Device], user_namespace: bool) -> Result<Self> {
        if !user_namespace {
            return Ok(Self(None));
        }
        let defaults = DEFAULTS.iter().map(|(name, ..)| format!("/dev/{name}"));
        let paths = defaults.chain(devices.iter().map(|device| device.path.clone()));
        let trees = paths.map(|path| Ok((path.clone(), take_tree(Path::new(&path), false)?)));
        Ok(Self(Some(trees.collect::<Result<_>>()?)))
    }

    /// Fills `/dev` of the current root. One that comes with the image or from a bind mount is left as it is.
    ///
    /// # Errors
    /// What the kernel says, with the device's name.
    pub fn make(&self, devices: &[Device]) -> Result<()> {
        fs::create_dir_all("/dev").context(|| "create /dev")?;
        if let Some(trees) = &self.0 {
            for (path, tree) in trees {
                put_tree(tree, Path::new(path))?;
            }
        } else {
            for (name, major, minor) in DEFAULTS {
                let path = format!("/dev/{name}");
                node(&path, FileType::CharacterDevice, 0o666, major, minor)?;
            }
            for device in devices {
                custom(device).context(|| format!("linux.devices {}", device.path))?;
            }
        }
        for (link, target) in LINKS {
            match symlink(target, link) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(error).context(|| format!("link {link} to {target}"));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn custom(device: &Device) -> Result<()> {
    let kind = match device.kind.as_str() {
        "c" | "u" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        other => return Err(Error::invalid(format!("type {other:?} is none of c, u, b, p"))),
    };
    if !device.path.starts_with('/') {
        return Err(Error::invalid("the path is not absolute"));
    }
    if let Some(parent) = Path::new(&device.path).parent() {
        fs::create_dir_all(parent).context(|| format!("create {}", parent.display()))?;
    }
    node(&device.path, kind, device.file_mode.unwrap_or(0o666) & 0o7777, device.major, device.minor)?;
    if device.uid != 0 || device.gid != 0 {
        let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
        rustix::fs::chown(device.path.as_str(), Some(uid), Some(gid)).context(|| "change its owner")?;
    }
    Ok(())
}

fn node(path: &str, kind: FileType, mode: u32, major: u32, minor: u32) -> Result<()> {
    let device = rustix::fs::makedev(major, minor);
    match rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(mode), device) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::EXIST) => {
            let stat = rustix::fs::stat(path).context(|| format!("stat {path}"))?;
            if FileType::from_raw_mode(stat.st_mode) == kind && stat.st_rdev == device {
                return Ok(());
            }
            // The image's own idea of the name; a bind-mounted /dev is not ours to change.
            fs::remove_file(path).context(|| format!("replace {path}"))?;
            rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(mode), device)
                .context(|| format!("make device {path}"))
        }
        Err(errno) => Err(errno).context(|| format!("make device {path}")),
    }
}
