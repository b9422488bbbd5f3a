//! What containers of one guest have in common: file systems in memory, and the host's files.

use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_protocol::{SHARES, agent};
use rustix::fs::Mode;
use rustix::mount::{MountFlags, UnmountFlags};

use super::mounts::Options;
use super::rootfs::c_string;
use super::spec::Mount;
use crate::error::{Context, Error, Result};

/// Source of a tmpfs that is one of the guest's: containers that give the same name have the same files.
const PREFIX: &str = "guest:";
/// Where those are mounted, by name. They stay until the machine ends.
const PLACE: &str = "/run/tmpfs";

/// Makes binds of the mounts that mean a file system of the guest's, which is made when it is first asked for.
///
/// # Errors
/// A name that is no file name, an option that the kernel refuses.
pub fn take(mounts: &mut [Mount]) -> Result<()> {
    for mount in mounts.iter_mut().filter(|mount| mount.fstype == "tmpfs") {
        let Some(name) = mount.source.strip_prefix(PREFIX) else { continue };
        super::check_id("name of a tmpfs", name)?;
        let place = Path::new(PLACE).join(name);
        let options = Options::parse(&mount.options)?;
        if !place.exists() {
            make(&place, &options).context(|| format!("mount a tmpfs for {}", mount.destination))?;
        }
        // What is left of the options is this container's own.
        mount.options.retain(|option| {
            Options::parse(std::slice::from_ref(option)).is_ok_and(|one| one.data.is_empty())
        });
        mount.options.push("bind".into());
        mount.source = place.display().to_string();
    }
    Ok(())
}

fn make(place: &Path, options: &Options) -> Result<()> {
    fs::create_dir_all(place).context(|| format!("create {}", place.display()))?;
    let data = c_string(&options.data)?;
    let flags = options.set & !MountFlags::RDONLY;
    rustix::mount::mount("tmpfs", place, "tmpfs", flags, Some(data.as_c_str())).map_err(|errno| {
        // Else the next one would take the directory for it.
        let _ = fs::remove_dir(place);
        Error::from(errno)
    })
}

/// The sources of a container that are the host's.
pub fn below_shares(request: &agent::CreateContainerRequest, mounts: &[Mount]) -> Vec<PathBuf> {
    let root = request.rootfs.iter().map(|rootfs| rootfs.shared.as_str());
    let sources = root.chain(mounts.iter().map(|mount| mount.source.as_str()));
    sources.map(PathBuf::from).filter(|path| path.starts_with(SHARES)).collect()
}

/// Lets go of the host's files, which the host has ceased to share: the file server holds what a guest remembers.
pub fn forget(shares: &[PathBuf]) {
    for path in shares {
        // A directory is a mount of its own, made when it was first looked at; a file is none.
        let _ = rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        // To make something where the host has nothing any more is impossible, but has the kernel ask first.
        let _ = rustix::fs::mkdir(path, Mode::empty());
    }
}
