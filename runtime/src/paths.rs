//! Where things are on the host.

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::policy::{self, Policy};
use crate::settings::{self, Settings};
use crate::state::RUN_ID;
use crate::verify::{self, Part, Stamps};
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
    /// Those of the settings, or everything under `root`.
    ///
    /// # Errors
    /// A root that is relative or too long for the sockets below it.
    pub fn new(root: Option<&Path>, paths: &settings::Paths) -> Result<Self> {
        let Some(root) = root else {
            return Ok(Self { data: paths.data.clone(), run: paths.run.clone() });
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

    /// Pools of machines that wait, each a directory.
    #[must_use]
    pub fn pools(&self) -> PathBuf {
        self.data.join("pools")
    }

    /// Machines that wait, each a file.
    #[must_use]
    pub fn warm(&self) -> PathBuf {
        self.data.join("warm")
    }

    /// Formatted, empty scratch disks to copy from.
    #[must_use]
    pub fn scratch_templates(&self) -> PathBuf {
        self.data.join("scratch")
    }
}

/// The files a sandbox is made from, and what the administrator says of it.
#[derive(Clone, Debug)]
pub struct Artefacts {
    /// The monitor's program.
    pub monitor: PathBuf,
    /// The guest kernel, ELF or bzImage.
    pub kernel: PathBuf,
    /// The guest agent in a cpio archive.
    pub initramfs: PathBuf,
    /// What goes with them.
    pub settings: Settings,
}

impl Artefacts {
    /// Looks beside the running program, in `../share/bulkhead` and, for a build tree, in `.cache` of the checkout.
    /// `BULKHEAD_VMM`, `BULKHEAD_KERNEL` and `BULKHEAD_INITRAMFS` name them outright, then the settings.
    ///
    /// # Errors
    /// One is missing; the error says where it was looked for.
    pub fn find(settings: &Settings) -> Result<Self> {
        let program = env::current_exe()
            .map_err(|source| Error::Io { what: "cannot tell where bulkhead is installed".into(), source })?;
        let bin = program.parent().unwrap_or(Path::new("/"));
        let share = bin.join("../share/bulkhead");
        let policy = policy::in_force()?;
        // target/<triple>/<profile>/bulkhead of a checkout.
        let cache = bin.join("../../../.cache");
        let found = Self {
            monitor: pick(
                "BULKHEAD_VMM",
                ("monitor", "programs.monitor", &settings.programs.monitor),
                [bin.join("bulkhead-vmm"), share.join("bulkhead-vmm")],
            )?,
            kernel: pick(
                "BULKHEAD_KERNEL",
                ("guest kernel", "machine.kernel", &settings.machine.kernel),
                [share.join("vmlinux"), bin.join("vmlinux"), cache.join("kernel/current/vmlinux")],
            )?,
            initramfs: pick(
                "BULKHEAD_INITRAMFS",
                ("guest initramfs", "machine.initramfs", &settings.machine.initramfs),
                [share.join("initramfs.cpio"), bin.join("initramfs.cpio"), cache.join("initramfs.cpio")],
            )?,
            settings: settings.clone(),
        };
        found.verify(&share, policy)?;
        Ok(found)
    }

    /// They are what was installed, as far as `make install` has written that down, and what the policy allows.
    fn verify(&self, share: &Path, policy: &Policy) -> Result<()> {
        let stamps = Stamps::new(&self.settings);
        let remedy = || "install Bulkhead again (`make install`)".to_owned();
        // Beside the programs, as `sha256sum -c` finds it from the manifest's directory.
        let monitor = share.join("../../bin/bulkhead-vmm");
        let same = |path: &Path| fs::canonicalize(path).ok() == fs::canonicalize(&self.monitor).ok();
        let mut parts = Vec::new();
        for (what, path, place, name) in [
            ("guest kernel", &self.kernel, self.kernel.parent(), "vmlinux"),
            ("guest initramfs", &self.initramfs, self.initramfs.parent(), "initramfs.cpio"),
            ("monitor", &self.monitor, same(&monitor).then_some(share), "../../bin/bulkhead-vmm"),
        ] {
            let is_it = what == "monitor" || path.file_name().is_some_and(|file| file == name);
            let Some(place) = place.filter(|_| is_it) else { continue };
            if let Some(digest) = verify::in_manifest(place, name)? {
                parts.push(Part { what, path: path.clone(), digest, verity: None, remedy: remedy() });
            }
        }
        stamps.check(&parts)?;
        if policy.lists_kernels() {
            for path in [&self.kernel, &self.initramfs] {
                let known = parts.iter().find(|part| part.path == *path).map(|part| Ok(part.digest));
                policy.kernel(path, &known.unwrap_or_else(|| verify::digest(path))?.to_string())?;
            }
        }
        Ok(())
    }
}

/// `what`: its name for people, the key of the settings, and what that says.
fn pick<const N: usize>(variable: &str, what: (&str, &str, &Path), places: [PathBuf; N]) -> Result<PathBuf> {
    let (what, key, set) = what;
    let named = match env::var_os(variable) {
        Some(path) => Some((variable.to_owned(), PathBuf::from(path))),
        None if set.as_os_str().is_empty() => None,
        None => Some((format!("{key} in {}", settings::source()), set.to_owned())),
    };
    if let Some((by, path)) = named {
        return if path.exists() {
            Ok(path)
        } else {
            Err(Error::Usage(format!("{by} names {}, which does not exist", path.display())))
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
        let paths = settings::Paths::default();
        let root = PathBuf::from(format!("/{}", "x".repeat(80)));
        assert!(Layout::new(Some(&root), &paths).is_err());
        assert!(Layout::new(Some(Path::new("/tmp/b")), &paths).is_ok());
    }
}
