//! What `policy.toml` can say. `docs/policy.md` explains every key.

use std::path::{Component, Path, PathBuf};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::options::parse_capability;
use crate::settings::Size;

/// All rules. One that is not there forbids nothing.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rules {
    /// Images of containers.
    pub images: Images,
    /// Kernels and initramfs.
    pub kernels: Kernels,
    /// Directories, files and disks of the host.
    pub mounts: Mounts,
    /// Privileges in the guest.
    pub containers: Containers,
    /// Sizes.
    pub limits: Limits,
}

/// `[images]`: names and digests, in which `*` stands for anything.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Images {
    /// Only these.
    pub allow: Option<Vec<String>>,
    /// Not these.
    pub deny: Vec<String>,
    /// Of containers that an engine unpacks.
    pub engines: EngineImages,
}

/// `images.engines`: an engine hands over a directory or disks; some say which image they are of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineImages {
    /// The engine's affair. Names are looked at where there are any.
    #[default]
    Any,
    /// Only of those that the engine names.
    Named,
    /// None at all.
    None,
}

/// `[kernels]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Kernels {
    /// `sha256:…` of kernels and initramfs.
    #[serde(deserialize_with = "digests")]
    pub allow: Option<Vec<String>>,
}

/// `[mounts]`: absolute paths, each with all below it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mounts {
    /// Only these.
    #[serde(deserialize_with = "some_paths")]
    pub allow: Option<Vec<PathBuf>>,
    /// Not these, nor what has them below it.
    #[serde(deserialize_with = "paths")]
    pub deny: Vec<PathBuf>,
    /// These, and what has them below it, only to be read.
    #[serde(deserialize_with = "paths")]
    pub read_only: Vec<PathBuf>,
}

/// `[containers]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Containers {
    /// Whether there may be privileged ones.
    pub privileged: bool,
    /// Capabilities besides docker's default ones; absent: any.
    #[serde(deserialize_with = "capabilities")]
    pub cap_add: Option<Vec<String>>,
    /// Whether there may be ones without a seccomp filter.
    pub seccomp_unconfined: bool,
}

/// `[limits]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Of a machine.
    pub memory: Option<Size>,
    /// Of a machine.
    pub vcpus: Option<u8>,
    /// Of a writable layer.
    pub storage: Option<Size>,
}

impl Default for Containers {
    fn default() -> Self {
        Self { privileged: true, cap_add: None, seccomp_unconfined: true }
    }
}

fn digests<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<String>>, D::Error> {
    let digests = Vec::<String>::deserialize(from)?;
    let good = |digest: &String| {
        let digits = digest.strip_prefix("sha256:").unwrap_or_default();
        digits.len() == 64 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    };
    match digests.iter().find(|digest| !good(digest)) {
        Some(bad) => Err(D::Error::custom(format!("{bad:?} is not sha256: and 64 hexadecimal digits"))),
        None => Ok(Some(digests)),
    }
}

fn paths<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
    let paths = Vec::<PathBuf>::deserialize(from)?;
    let plain = |path: &Path| {
        path.is_absolute()
            && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
    };
    match paths.iter().find(|path| !plain(path)) {
        Some(bad) => Err(D::Error::custom(format!("{} is not an absolute path without ..", bad.display()))),
        None => Ok(paths),
    }
}

fn some_paths<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<PathBuf>>, D::Error> {
    paths(from).map(Some)
}

fn capabilities<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<String>>, D::Error> {
    let names = Vec::<String>::deserialize(from)?;
    let known =
        names.iter().map(|name| parse_capability(name).map_err(|error| D::Error::custom(error.to_string())));
    known.collect::<Result<_, _>>().map(Some)
}

/// Whether `name` is of the form of `pattern`, in which `*` stands for any characters.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = rest.get(at + part.len()..).unwrap_or_default();
    }
    rest.ends_with(last)
}
