//! The configuration file: what an administrator sets once for `bulkhead`, `bulkhead-oci` and containerd's shim alike.
//!
//! What a command line, an annotation or a `BULKHEAD_…` variable says comes first, then this file, then the defaults, which
//! are those of a file that is not there. `runtime/config.toml` is the file that is installed; it explains every key.

mod value;

use std::env;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::value::Size;
use crate::network::NetworkWish;
use crate::{Error, Result};

/// Names another file. Empty: none is read.
pub const VARIABLE: &str = "BULKHEAD_CONFIG";
/// `make install SYSCONFDIR=…` builds with another.
pub(crate) const DIRECTORY: &str = match option_env!("BULKHEAD_SYSCONFDIR") {
    Some(directory) => directory,
    None => "/etc",
};
/// The file that explains every key has some four KiB.
const MAX_BYTES: u64 = 1 << 20;

/// All settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Microvms.
    pub machine: Machine,
    /// Monitors and file servers.
    pub isolation: Isolation,
    /// `bulkhead run` where its command line says nothing.
    pub run: Run,
    /// Programs, where they are not to be looked for.
    pub programs: Programs,
    /// Directories.
    pub paths: Paths,
    /// Messages.
    pub log: Log,
}

/// `[machine]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Machine {
    /// Memory of a machine whose container has no limit.
    #[serde(deserialize_with = "value::memory")]
    pub memory: Size,
    /// Processors of a machine whose container has no limit.
    #[serde(deserialize_with = "value::vcpus")]
    pub vcpus: u8,
    /// The guest's kernel; empty: the one that was installed.
    #[serde(deserialize_with = "value::file")]
    pub kernel: PathBuf,
    /// The guest's initramfs; empty: the one that was installed.
    #[serde(deserialize_with = "value::file")]
    pub initramfs: PathBuf,
    /// More words for the guest kernel's command line.
    #[serde(deserialize_with = "value::parameters")]
    pub kernel_parameters: String,
    /// Seconds that a guest may take to boot.
    #[serde(deserialize_with = "value::seconds")]
    pub boot_timeout: u32,
    /// Whether machines start from templates.
    #[serde(deserialize_with = "value::switch")]
    pub templates: bool,
    /// Empty drives of a pod's machine, for the disks of containers that join it.
    #[serde(deserialize_with = "value::drives")]
    pub spare_drives: u8,
    /// Whether a root of EROFS layers becomes disks.
    #[serde(deserialize_with = "value::switch")]
    pub erofs_disks: bool,
}

/// `[isolation]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Isolation {
    /// Whether monitors are jailed.
    pub jail: Jail,
    /// First of the users that monitors become which root starts.
    #[serde(deserialize_with = "value::first_uid")]
    pub first_uid: u32,
    /// How many there are: so many microVMs of root's can run.
    #[serde(deserialize_with = "value::uids")]
    pub uids: u32,
}

/// What becomes of a monitor before its guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Jail {
    /// It is jailed as far as the host can do it.
    #[default]
    On,
    /// It keeps all rights of its caller.
    Off,
    /// It is jailed, or does not run.
    Required,
}

/// `[run]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Run {
    /// Size of the writable layer.
    #[serde(deserialize_with = "value::storage")]
    pub storage: Size,
    /// As `--network` has it.
    #[serde(deserialize_with = "value::network")]
    pub network: String,
}

/// `[programs]`: paths; empty: looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Programs {
    /// `bulkhead-vmm`.
    #[serde(deserialize_with = "value::file")]
    pub monitor: PathBuf,
    /// `bulkhead-oci`, for the shim.
    #[serde(deserialize_with = "value::file")]
    pub oci: PathBuf,
    /// virtiofsd.
    #[serde(deserialize_with = "value::file")]
    pub virtiofsd: PathBuf,
    /// passt.
    #[serde(deserialize_with = "value::file")]
    pub passt: PathBuf,
}

/// `[paths]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Paths {
    /// Images and containers of `bulkhead`.
    #[serde(deserialize_with = "value::directory")]
    pub data: PathBuf,
    /// Sockets of living sandboxes.
    #[serde(deserialize_with = "value::sockets")]
    pub run: PathBuf,
    /// States of `bulkhead-oci`'s containers.
    #[serde(deserialize_with = "value::directory")]
    pub oci: PathBuf,
    /// What containerd's shim keeps.
    #[serde(deserialize_with = "value::sockets")]
    pub containerd: PathBuf,
}

/// `[log]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// What `bulkhead-oci` writes.
    pub level: Level,
}

/// How much is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// What has failed.
    Error,
    /// And what was not done as asked.
    #[default]
    Warning,
    /// And what is done, as with `--debug`.
    Debug,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            memory: Size(512 << 20),
            vcpus: 1,
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            kernel_parameters: String::new(),
            boot_timeout: 60,
            templates: true,
            spare_drives: 4,
            erofs_disks: true,
        }
    }
}

impl Default for Isolation {
    fn default() -> Self {
        Self { jail: Jail::On, first_uid: 1_900_000_000, uids: 65_536 }
    }
}

impl Default for Run {
    fn default() -> Self {
        Self { storage: Size(10 << 30), network: "none".into() }
    }
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            data: "/var/lib/bulkhead".into(),
            run: "/run/bulkhead".into(),
            oci: "/run/bulkhead-oci".into(),
            containerd: "/run/containerd/bulkhead".into(),
        }
    }
}

impl Run {
    /// The network of a container whose command line names none.
    ///
    /// # Errors
    /// It is none, which the file's reader has refused already.
    pub fn network(&self) -> Result<NetworkWish> {
        NetworkWish::parse(&self.network)
    }
}

impl Settings {
    /// Those of the file in force.
    ///
    /// # Errors
    /// It cannot be read, or says what makes no sense: the error names the file, the line and what is allowed.
    pub fn load() -> Result<Self> {
        match file() {
            (Some(path), named) => Self::read(&path, named),
            (None, _) => Ok(Self::default()),
        }
    }

    /// Those of the file in force, for who ends machines and removes what they leave: that must go on, whatever has been
    /// written into the file meanwhile. Of one that makes no sense the directories and programs are taken as far as those
    /// sections do by themselves, and defaults for the rest; the error comes along.
    #[must_use]
    pub fn load_what_makes_sense() -> (Self, Option<Error>) {
        match Self::load() {
            Ok(settings) => (settings, None),
            Err(error) => {
                let text = file().0.and_then(|path| text_of(&path).ok()).unwrap_or_default();
                (Self::salvage(&text), Some(error))
            }
        }
    }

    pub(crate) fn salvage(text: &str) -> Self {
        let of = |section: &str| Self::parse(&part(text, section)).unwrap_or_default();
        Self { paths: of("paths").paths, programs: of("programs").programs, ..Self::default() }
    }

    /// Those of one file; defaults if it need not be there and is not.
    fn read(path: &Path, must_exist: bool) -> Result<Self> {
        let failed = |source| Error::Io {
            what: format!(
                "cannot read the configuration file {}{}",
                path.display(),
                if must_exist { format!(", which {VARIABLE} names") } else { String::new() }
            ),
            source,
        };
        let text = match text_of(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => {
                return Ok(Self::default());
            }
            result => result.map_err(failed)?,
        };
        Self::parse(&text).map_err(|why| Error::Usage(format!("{}:{why}", path.display())))
    }

    /// The error begins with the line's number.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        parse_toml(text)
    }
}

/// The error begins with the line's number.
pub(crate) fn parse_toml<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        let before = text.get(..at).unwrap_or_default();
        let line =
            text.lines().nth(before.lines().count().saturating_sub(usize::from(!before.ends_with('\n'))));
        let number = before.matches('\n').count() + 1;
        let line = line.unwrap_or_default().trim();
        let message = error.message().trim().replace('\n', " ");
        if line.is_empty() {
            format!("{number}: {message}")
        } else {
            format!("{number}: `{line}`: {message}")
        }
    })
}

fn text_of(path: &Path) -> io::Result<String> {
    text_in(File::open(path)?)
}

/// All that a file of settings or rules says, if that is not too long for one.
pub(crate) fn text_in(file: File) -> io::Result<String> {
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(io::Error::other(format!("it has more than {MAX_BYTES} bytes")));
    }
    Ok(text)
}

/// The lines of one section, its head included.
fn part(text: &str, section: &str) -> String {
    let head = format!("[{section}]");
    let mut within = false;
    let lines = text.lines().filter(|line| {
        let line = line.trim_start();
        if line.starts_with('[') {
            within = line.split('#').next().unwrap_or_default().trim_end() == head;
        }
        within
    });
    lines.map(|line| format!("{line}\n")).collect()
}

/// The file that is in force if it exists, and whether it has to. None: nothing is to be read.
fn file() -> (Option<PathBuf>, bool) {
    match env::var_os(VARIABLE) {
        Some(named) if named.is_empty() => (None, false),
        Some(named) => (Some(named.into()), true),
        None => (Some(Path::new(DIRECTORY).join("bulkhead/config.toml")), false),
    }
}

/// Which file is in force, for people.
#[must_use]
pub fn source() -> String {
    match file() {
        (Some(path), _) if path.exists() => path.display().to_string(),
        (Some(path), _) => format!("no {}: defaults", path.display()),
        (None, _) => format!("{VARIABLE} is empty: defaults"),
    }
}

#[cfg(test)]
mod tests;
