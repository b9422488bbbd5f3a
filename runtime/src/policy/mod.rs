//! `policy.toml`: what root allows on this host, whoever asks, by whichever program: images, kernels, the host's files,
//! privileges, sizes.
//!
//! It is not part of the settings, because nothing may come before it: no variable names another file, no flag and no annotation
//! says otherwise. A policy that cannot be read, or that others than root may write to, forbids every start.

mod rules;

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use self::rules::EngineImages;
pub use self::rules::Rules;
use crate::options::{RunOptions, Seccomp};
use crate::shares::Access;
use crate::{Error, Result, settings, spec};

/// The rules in force, and where they are from.
#[derive(Debug)]
pub struct Policy {
    file: PathBuf,
    rules: Rules,
}

/// The policy of this host, read once.
///
/// # Errors
/// The file cannot be read, is not root's alone, or says what makes no sense: nothing may be started then.
pub fn in_force() -> Result<&'static Policy> {
    static POLICY: OnceLock<Result<Policy, String>> = OnceLock::new();
    let read = || Policy::read(&Path::new(settings::DIRECTORY).join("bulkhead/policy.toml"));
    POLICY.get_or_init(read).as_ref().map_err(|why| Error::Usage(why.clone()))
}

impl Policy {
    /// Without a file everything is allowed.
    fn read(path: &Path) -> std::result::Result<Self, String> {
        let file = path.display();
        let closed = |why: String| {
            format!(
                "{file}: {why}; nothing is started until the policy can be followed: mend or remove the file"
            )
        };
        let rules = match text_of(path) {
            Ok(None) => Rules::default(),
            Ok(Some(text)) => settings::parse_toml(&text)
                .map_err(|why| format!("{file}:{why}; nothing is started until it is mended"))?,
            Err(error) => return Err(closed(error.to_string())),
        };
        Ok(Self { file: path.to_owned(), rules })
    }

    fn refuse<T>(&self, rule: &str, what: &str) -> Result<T> {
        Err(Error::Usage(format!("{what}: {rule} in {} forbids it", self.file.display())))
    }

    /// Whether containers of an image may run. `known_as` are its names, id and manifest's digest.
    ///
    /// # Errors
    /// The rule that forbids it.
    pub fn image(&self, known_as: &[String]) -> Result<()> {
        let images = &self.rules.images;
        let listed = |patterns: &[String]| {
            patterns.iter().find(|pattern| known_as.iter().any(|name| rules::matches(pattern, name))).cloned()
        };
        let what = format!("image {}", known_as.first().map_or("without a name", String::as_str));
        if let Some(pattern) = listed(&images.deny) {
            return self.refuse(&format!("images.deny = {pattern:?}"), &what);
        }
        match &images.allow {
            Some(allowed) if listed(allowed).is_none() => self.refuse("images.allow", &what),
            _ => Ok(()),
        }
    }

    /// Whether a container of an engine's may run, which says the image's name or does not.
    ///
    /// # Errors
    /// The rule that forbids it.
    pub fn engines_image(&self, name: Option<&str>) -> Result<()> {
        match (self.rules.images.engines, name) {
            (EngineImages::None, _) => self.refuse("images.engines = \"none\"", "a container of an engine's"),
            (EngineImages::Named, None) => {
                self.refuse("images.engines = \"named\"", "a container whose engine does not say its image")
            }
            (EngineImages::Any, None) => Ok(()),
            (_, Some(name)) => self.image(&[name.to_owned()]),
        }
    }

    /// Whether files have to have one of the digests that are listed.
    #[must_use]
    pub fn lists_kernels(&self) -> bool {
        self.rules.kernels.allow.is_some()
    }

    /// Whether a kernel or initramfs of this digest (`sha256:…`) may boot.
    ///
    /// # Errors
    /// The rule that forbids it.
    pub fn kernel(&self, path: &Path, digest: &str) -> Result<()> {
        match &self.rules.kernels.allow {
            Some(allowed) if !allowed.iter().any(|known| known == digest) => {
                self.refuse("kernels.allow", &format!("{} has the digest {digest}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Whether a container may have this directory, file or disk of the host's. `path` has no links in it any more.
    ///
    /// # Errors
    /// The rule that forbids it.
    pub fn host_path(&self, path: &Path, access: Access) -> Result<()> {
        let mounts = &self.rules.mounts;
        let what = format!("{} of the host", path.display());
        // Who has a directory has what lies below it.
        if let Some(denied) =
            mounts.deny.iter().find(|denied| path.starts_with(denied) || denied.starts_with(path))
        {
            return self.refuse(&format!("mounts.deny = \"{}\"", denied.display()), &what);
        }
        if let Some(allowed) = &mounts.allow
            && !allowed.iter().any(|allowed| path.starts_with(allowed))
        {
            return self.refuse("mounts.allow", &what);
        }
        let read = mounts.read_only.iter().find(|read| path.starts_with(read) || read.starts_with(path));
        match read {
            Some(read) if access == Access::ReadWrite => {
                let rule = format!("mounts.read_only = \"{}\"", read.display());
                self.refuse(&rule, &format!("{what}, to be written to"))
            }
            _ => Ok(()),
        }
    }

    /// Whether a process may have these capabilities, and be privileged.
    ///
    /// # Errors
    /// The rule that forbids it.
    pub fn privileges(&self, privileged: bool, capabilities: &[impl AsRef<str>]) -> Result<()> {
        let containers = &self.rules.containers;
        if privileged && !containers.privileged {
            return self.refuse("containers.privileged = false", "a privileged container or process");
        }
        let Some(allowed) = &containers.cap_add else { return Ok(()) };
        let known = |name: &str| {
            spec::DEFAULT_CAPABILITIES.contains(&name)
                || allowed.iter().any(|cap| cap == name || cap == "ALL")
        };
        match capabilities.iter().map(AsRef::as_ref).find(|name| !known(name)) {
            Some(name) if !privileged => self.refuse("containers.cap_add", &format!("the capability {name}")),
            _ => Ok(()),
        }
    }

    /// Whether a container may be without a filter of system calls.
    ///
    /// # Errors
    /// The rule that forbids it.
    pub fn unconfined(&self) -> Result<()> {
        if self.rules.containers.seccomp_unconfined {
            return Ok(());
        }
        self.refuse("containers.seccomp_unconfined = false", "a container without a seccomp filter")
    }

    /// Whether a machine may be so large.
    ///
    /// # Errors
    /// The rule that forbids it.
    pub fn machine(&self, memory_mib: u32, vcpus: u8) -> Result<()> {
        let limits = &self.rules.limits;
        let rule = |name: &str, value: &str| format!("limits.{name} = {value}");
        if let Some(most) = limits.memory.filter(|most| u64::from(memory_mib) << 20 > most.0) {
            return self.refuse(
                &rule("memory", &format!("\"{}m\"", most.0 >> 20)),
                &format!("a machine with {memory_mib} MiB"),
            );
        }
        match limits.vcpus.filter(|most| vcpus > *most) {
            Some(most) => {
                self.refuse(&rule("vcpus", &most.to_string()), &format!("a machine with {vcpus} processors"))
            }
            None => Ok(()),
        }
    }

    /// Whether a writable layer may be so large.
    ///
    /// # Errors
    /// The rule that forbids it.
    pub fn storage(&self, bytes: u64) -> Result<()> {
        match self.rules.limits.storage.filter(|most| bytes > most.0) {
            Some(most) => self.refuse(
                &format!("limits.storage = \"{}m\"", most.0 >> 20),
                &format!("a writable layer of {} MiB", bytes >> 20),
            ),
            None => Ok(()),
        }
    }

    /// All of `run`'s wishes but the host's files, which are looked at when they are opened.
    pub(crate) fn wishes(&self, options: &RunOptions, storage: u64) -> Result<()> {
        self.privileges(options.privileged, &spec::capabilities(options))?;
        let none = match options.security.seccomp {
            Seccomp::Unconfined => true,
            Seccomp::Default => options.privileged,
            Seccomp::Profile(_) => false,
        };
        if none {
            self.unconfined()?;
        }
        self.storage(storage)
    }
}

/// None if there is no such file. It has to be root's, and no one else's to write to.
fn text_of(path: &Path) -> io::Result<Option<String>> {
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    if about.uid() != 0 || about.mode() & 0o022 != 0 {
        return Err(io::Error::other("others than root may write to it (chown root:root, chmod 644)"));
    }
    settings::text_in(file).map(Some)
}

#[cfg(test)]
mod tests;
