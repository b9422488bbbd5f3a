//! Where things are on the host.

use std::env;
use std::path::{Path, PathBuf};

use crate::state::RUN_ID;
use crate::{Error, Result};

/// The path of a unix socket has at most 107 bytes (`unix(7)`), of which a sandbox's own part takes some.
const MAX_RUN_DIR: usize = 107 - "/".len() - RUN_ID - "/vsock_1024".len();

/// The directories of one installation.
#[derive(Clone, Debug)]
pub struct Layout {
    /// What outlives a reboot: images, container records, logs, scratch disks.
    pub data: PathBuf,
    /// What does not: sockets of living sandboxes.
    pub run: PathBuf,
}

impl Layout {
    /// `/var/lib/bulkhead` and `/run/bulkhead`, or everything under `root`.
    ///
    /// # Errors
    /// A root that is relative or too long for the sockets below it.
    pub fn new(root: Option<&Path>) -> Result<Self> {
        let Some(root) = root else {
            return Ok(Self { data: "/var/lib/bulkhead".into(), run: "/run/bulkhead".into() });
        };
        let root = std::path::absolute(root)
            .map_err(|source| Error::Io { what: format!("cannot use {} as root", root.display()), source })?;
        let run = root.join("run");
        if run.as_os_str().len() > MAX_RUN_DIR {
            return Err(Error::Usage(format!(
                "{} is too long a root: unix sockets below it would pass the kernel's limit of 107 bytes",
                root.display()
            )));
        }
        Ok(Self { data: root, run })
    }

    /// Records, logs and scratch disks, a directory for each container.
    #[must_use]
    pub fn containers(&self) -> PathBuf {
        self.data.join("containers")
    }

    /// Container names, each a file that holds an id.
    #[must_use]
    pub fn names(&self) -> PathBuf {
        self.data.join("names")
    }

    /// Machines that have booted, to start from.
    #[must_use]
    pub fn templates(&self) -> PathBuf {
        self.data.join("templates")
    }

    /// Formatted, empty scratch disks to copy from.
    #[must_use]
    pub fn scratch_templates(&self) -> PathBuf {
        self.data.join("scratch")
    }
}

/// The files a sandbox is made from.
#[derive(Clone, Debug)]
pub struct Artefacts {
    /// The monitor's program.
    pub monitor: PathBuf,
    /// The guest kernel, ELF or bzImage.
    pub kernel: PathBuf,
    /// The guest agent in a cpio archive.
    pub initramfs: PathBuf,
}

impl Artefacts {
    /// Looks beside the running program, in `../share/bulkhead` and, for a build tree, in `.cache` of the checkout.
    /// `BULKHEAD_VMM`, `BULKHEAD_KERNEL` and `BULKHEAD_INITRAMFS` name them outright.
    ///
    /// # Errors
    /// One is missing; the error says where it was looked for.
    pub fn find() -> Result<Self> {
        let program = env::current_exe()
            .map_err(|source| Error::Io { what: "cannot tell where bulkhead is installed".into(), source })?;
        let bin = program.parent().unwrap_or(Path::new("/"));
        let share = bin.join("../share/bulkhead");
        // target/<triple>/<profile>/bulkhead of a checkout.
        let cache = bin.join("../../../.cache");
        Ok(Self {
            monitor: pick("BULKHEAD_VMM", "monitor", [bin.join("bulkhead-vmm"), share.join("bulkhead-vmm")])?,
            kernel: pick(
                "BULKHEAD_KERNEL",
                "guest kernel",
                [share.join("vmlinux"), bin.join("vmlinux"), cache.join("kernel/current/vmlinux")],
            )?,
            initramfs: pick(
                "BULKHEAD_INITRAMFS",
                "guest initramfs",
                [share.join("initramfs.cpio"), bin.join("initramfs.cpio"), cache.join("initramfs.cpio")],
            )?,
        })
    }
}

fn pick<const N: usize>(variable: &str, what: &str, places: [PathBuf; N]) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        let path = PathBuf::from(path);
        return if path.exists() {
            Ok(path)
        } else {
            Err(Error::Usage(format!("{variable} names {}, which does not exist", path.display())))
        };
    }
    places.iter().find(|path| path.exists()).cloned().ok_or_else(|| {
        let looked: Vec<_> = places.iter().map(|path| path.display().to_string()).collect();
        Error::Usage(format!(
            "the {what} is missing: looked for {}; run `make` in a checkout, or set {variable}",
            looked.join(", ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_too_long_for_sockets_is_refused() {
        let root = PathBuf::from(format!("/{}", "x".repeat(80)));
        assert!(Layout::new(Some(&root)).is_err());
        assert!(Layout::new(Some(Path::new("/tmp/b"))).is_ok());
    }
}
