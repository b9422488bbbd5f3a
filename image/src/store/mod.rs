//! The store on disk.
//!
//! ```text
//! ROOT/lock                          flock: shared while adding, exclusive while removing layers
//! ROOT/records.lock                  flock: exclusive for moments, while names and images change
//! ROOT/names/<name, %-encoded>       the id of the image that goes by this name
//! ROOT/images/<id>.json              everything `run` needs to know: defaults and layers
//! ROOT/blobs/sha256/<digest>         configuration and manifest, byte for byte as they came
//! ROOT/layers/sha256/<diff id>.erofs
//! ROOT/layers/sha256/<diff id>.digest the digest of that file, written down before it had its name; on a second line
//!                                    its fs-verity digest, if its file system has that
//! ROOT/tmp/                          files being written, where they cannot be without a name
//! ```
//!
//! A file appears under its name complete and on disk, or not at all (written under no name or one in `tmp`, synced, then named). An image is
//! added from the bottom up: layers, blobs, `images/`, `names/`; and removed from the top down. So at no moment does
//! anything refer to something that is not there, and a kill leaves at most unreferenced files, which the next
//! `prune` or `rm` removes; stale files in `tmp` go as soon as anything takes the lock exclusively.

mod gc;
mod lock;
mod records;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::config::ConfigFile;
use crate::{Digest, ImageConfig, Limits, LoadOptions, Progress, Result, Source};

pub(crate) use lock::{Lock, TempFile};
pub(crate) use records::{LayerRecord, MAX_DOCUMENT, Record};

/// An image store below one directory.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    limits: Limits,
}

/// An image that is now in the store.
#[derive(Debug, Clone, Serialize)]
pub struct LoadedImage {
    /// The digest of its configuration.
    pub id: Digest,
    /// The names it got, in full (`docker.io/library/busybox:latest`).
    pub names: Vec<String>,
    /// Layers that had to be converted; the others were there.
    pub new_layers: usize,
}

/// One image in a listing.
#[derive(Debug, Clone, Serialize)]
pub struct ImageSummary {
    /// The digest of its configuration.
    pub id: Digest,
    /// All of its names in full, sorted; none for an image whose name was given to another.
    pub names: Vec<String>,
    /// When it was built, RFC 3339, as the image says; may be absent.
    pub created: Option<String>,
    /// Bytes of its EROFS layers; layers shared with other images count in each.
    pub size: u64,
    /// `os/architecture`.
    pub platform: String,
}

/// All about one image.
#[derive(Debug, Clone, Serialize)]
pub struct ImageDetail {
    /// The same as in the listing.
    #[serde(flatten)]
    pub summary: ImageSummary,
    /// The digest of the manifest that brought it; absent for docker archives.
    pub manifest: Option<Digest>,
    /// The defaults for its containers.
    pub config: ImageConfig,
    /// Lowest first.
    pub layers: Vec<LayerDetail>,
}

/// One layer of an image.
#[derive(Debug, Clone, Serialize)]
pub struct LayerDetail {
    /// The digest of the uncompressed layer.
    pub diff_id: Digest,
    /// Bytes of the EROFS file.
    pub size: u64,
    /// The EROFS file.
    pub path: PathBuf,
    /// Of the EROFS file; absent for layers from before it was kept.
    pub digest: Option<Digest>,
    /// Its fs-verity digest, if it is sealed.
    pub verity: Option<Digest>,
}

/// What a removal did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Removed {
    /// Names that are gone.
    pub untagged: Vec<String>,
    /// The image that is gone, if that was its last name.
    pub image: Option<Digest>,
    /// Layers that no image needed any more.
    pub layers: Vec<Digest>,
    /// Bytes of disk that came free.
    pub freed: u64,
}

/// What a prune did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Pruned {
    /// Images that are gone.
    pub images: Vec<Digest>,
    /// Layers that are gone.
    pub layers: Vec<Digest>,
    /// Bytes of disk that came free.
    pub freed: u64,
}

/// Which images a prune takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PruneScope {
    /// Those without a name.
    Unnamed,
    /// Those that no container uses.
    Unused,
}

impl Store {
    /// A store below `root`. Touches nothing: directories appear (mode 0700) when something is added.
    ///
    /// # Errors
    /// None today; the result leaves room for a store format check.
    pub fn open(root: &Path) -> Result<Self> {
        Ok(Self { root: root.to_owned(), limits: Limits::default() })
    }

    /// The same store with other limits against hostile images.
    #[must_use]
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Adds all images of an archive or layout directory.
    ///
    /// # Errors
    /// Unreadable, damaged or hostile input; a full disk. Nothing is kept then.
    pub fn load(
        &self,
        source: &Source,
        options: &LoadOptions,
        progress: &dyn Progress,
    ) -> Result<Vec<LoadedImage>> {
        crate::load::load(self, source, options, progress)
    }

    /// Fetches an image from a registry.
    ///
    /// # Errors
    /// Network, authentication, absence, damaged or hostile content, a full disk. Nothing is kept then.
    #[cfg(feature = "pull")]
    pub fn pull(
        &self,
        reference: &str,
        options: &crate::PullOptions,
        progress: &dyn Progress,
    ) -> Result<LoadedImage> {
        crate::pull::pull(self, reference, options, progress)
    }
}
