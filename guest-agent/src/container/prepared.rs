//! The root of a container that is not known yet: mounted, and its program in memory, before anybody wants it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use bulkhead_protocol::agent;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::check_id;
use super::rootfs::Rootfs;
use crate::agent::Agent;
use crate::error::{Context, Error, Result};

/// Most bytes of one file that are read ahead.
const MAX_FILE: u64 = 16 << 20;
/// Most files.
const MAX_FILES: usize = 64;

/// A root that waits for its container.
#[derive(Debug)]
pub struct Prepared {
    id: String,
    request: agent::Rootfs,
    rootfs: Rootfs,
}

impl Agent {
    /// Mounts the root of a container that will be called `id`. There is one at a time.
    ///
    /// # Errors
    /// There is one already, the request makes no sense, or what mounting says.
    pub fn prepare_rootfs(&mut self, request: agent::PrepareRootfsRequest) -> Result<()> {
        let agent::PrepareRootfsRequest { id, rootfs, read } = request;
        check_id("container id", &id)?;
        if self.prepared.is_some() || self.containers.contains_key(&id) {
            return Err(Error::precondition(format!("the root of {id}: one is prepared already, or in use")));
        }
        let request = rootfs.unwrap_or_default();
        let rootfs = Rootfs::mount(&id, &request, &mut self.layers)?;
        for path in read.iter().take(MAX_FILES) {
            read_ahead(&rootfs.path, path);
        }
        self.prepared = Some(Prepared { id, request, rootfs });
        Ok(())
    }

    /// The root for a container: the one that was prepared for it, or one that is mounted now.
    ///
    /// # Errors
    /// What mounting says.
    pub(super) fn root_of(&mut self, id: &str, request: &agent::Rootfs) -> Result<Rootfs> {
        match self.prepared.take_if(|prepared| prepared.id == id) {
            Some(prepared) if prepared.request == *request => return Ok(prepared.rootfs),
            Some(mut other) => {
                other.rootfs.unmount(&mut self.layers).context(|| format!("unmount another root of {id}"))?;
            }
            None => {}
        }
        Rootfs::mount(id, request, &mut self.layers)
    }
}

/// Has the kernel read a file of the root, by whatever links the image has, without leaving it.
fn read_ahead(root: &Path, path: &str) {
    let open = || {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
    };
    let Ok(file) = open().map(File::from) else { return };
    if file.metadata().is_ok_and(|about| about.is_file()) {
        // What cannot be read now is read when it is wanted, and said then.
        let _ = std::io::copy(&mut file.take(MAX_FILE), &mut std::io::sink());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn no_link_and_no_odd_file_is_in_the_way() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "content").unwrap();
        symlink("/file", root.path().join("link")).unwrap();
        symlink("loop", root.path().join("loop")).unwrap();
        rustix::fs::mknodat(CWD, root.path().join("fifo"), rustix::fs::FileType::Fifo, Mode::RUSR, 0)
            .unwrap();
        for path in ["/file", "/link", "/loop", "/fifo", "/../../etc/passwd", "/nothing", "", "/", "a\0b"] {
            read_ahead(root.path(), path);
        }
    }
}
