//! What can go wrong, in words for the person who has to do something about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::Digest;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What failed, on what, why, and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, such as `open`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },

    /// The file system of the store is full.
    #[error(
        "no space left in {} while writing {what}: at least {needed} bytes needed, {free} free; nothing was kept; \
         free some space (`bulkhead image prune`) or put the store elsewhere (--root)",
        path.display()
    )]
    NoSpace {
        /// The store's directory.
        path: PathBuf,
        /// What was being written.
        what: String,
        /// Bytes written so far for this item and still missing, as far as known.
        needed: u64,
        /// Bytes that were free when the write failed.
        free: u64,
    },

    /// No image goes by this name.
    #[error(
        "no image `{name}` in the store; `bulkhead image ls` lists what is there, `bulkhead image load FILE` or `bulkhead image pull {name}` brings one"
    )]
    NotFound {
        /// The name as it was given.
        name: String,
    },

    /// Several images share this id prefix.
    #[error("`{prefix}` is the beginning of the ids of {count} images; give more digits")]
    Ambiguous {
        /// The prefix as it was given.
        prefix: String,
        /// How many images match.
        count: usize,
    },

    /// Not a valid image name.
    #[error("`{name}` is not an image name: {why}")]
    BadName {
        /// The name as it was given.
        name: String,
        /// Which rule it breaks.
        why: &'static str,
    },

    /// Not a digest that the store can use.
    #[error("`{text}` is not a digest of the form sha256:<64 hex digits>")]
    BadDigest {
        /// The beginning of the text.
        text: String,
    },

    /// Content is not what its digest promises.
    #[error("{what} is damaged or forged: its digest must be {expected} but is {actual}; nothing was kept")]
    DigestMismatch {
        /// The blob or layer.
        what: String,
        /// The digest that named it.
        expected: Digest,
        /// The digest of what came.
        actual: Digest,
    },

    /// The archive is not one we know, or is damaged.
    #[error("{what} is not a usable image: {why}")]
    BadImage {
        /// The archive or the part of it.
        what: String,
        /// What is wrong with it.
        why: String,
    },

    /// JSON that cannot be understood.
    #[error("{what} is not valid")]
    BadJson {
        /// Which document.
        what: String,
        /// What the parser said.
        source: serde_json::Error,
    },

    /// A layer's archive is damaged, hostile or uses something that cannot be kept.
    #[error("layer {layer}: {why}")]
    BadLayer {
        /// The layer's diff id or blob digest.
        layer: String,
        /// What is wrong and where.
        why: String,
    },

    /// A limit that guards against hostile images was reached.
    #[error("layer {layer} exceeds a safety limit: {what} is more than {limit}")]
    OverLimit {
        /// The layer's diff id or blob digest.
        layer: String,
        /// Which quantity.
        what: &'static str,
        /// The limit's value.
        limit: u64,
    },

    /// Reading the incoming bytes failed, truncation included.
    #[error("cannot read {what}")]
    Input {
        /// The archive, blob or layer.
        what: String,
        /// What the decoder or the kernel said.
        source: io::Error,
    },

    /// The image holds nothing for the wanted platform.
    #[error("{what} has no image for {wanted}; it has: {available}")]
    NoPlatform {
        /// The archive or reference.
        what: String,
        /// `os/architecture[/variant]`.
        wanted: String,
        /// What it has, comma separated.
        available: String,
    },

    /// The image cannot be removed now.
    #[error(
        "image {id} is used by a container, or by a pool (`bulkhead pool ls`): remove that first or give --force"
    )]
    InUse {
        /// Its id.
        id: Digest,
    },

    /// An id was given to remove an image that has several names.
    #[error("image {id} has several names ({names}); remove them one by one or give --force")]
    SeveralNames {
        /// Its id.
        id: Digest,
        /// All of its names, comma separated.
        names: String,
    },

    /// A file of the store is damaged.
    #[error("the store's {} is damaged: {why}; loading or pulling the image again repairs it", path.display())]
    DamagedStore {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },

    /// An EROFS file is damaged.
    #[error("damaged EROFS file: {0}")]
    DamagedErofs(&'static str),

    /// An EROFS file cannot represent this.
    #[error("cannot be kept in an EROFS file: {0}")]
    ErofsLimit(&'static str),

    /// The user or group of a container is not in the image.
    #[error("no {kind} `{name}` in the image's {file}; use a number, or a name from that file")]
    NoUser {
        /// `user` or `group`.
        kind: &'static str,
        /// The name.
        name: String,
        /// `/etc/passwd` or `/etc/group`.
        file: &'static str,
    },

    /// A number out of range for a user or group.
    #[error("user or group number {number} is out of range (0 to 2147483647)")]
    BadUserNumber {
        /// The number.
        number: String,
    },

    /// Talking to the registry failed.
    #[error("{action} {reference} failed: {why}")]
    Registry {
        /// What was tried.
        action: &'static str,
        /// On what.
        reference: String,
        /// What the registry or the network said, and what to do.
        why: String,
    },
}

impl Error {
    /// For `map_err` on a system call.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source: source.into() }
    }
}
