//! From a layer's archive to an EROFS file.

mod convert;
mod decode;
mod tar;
mod tree;
mod whiteout;

pub(crate) use convert::{Expected, add_layer};
pub(crate) use decode::{Capped, decode};
pub(crate) use tar::{Archive, EntryKind, Skip};
pub use tree::convert_tar;

use std::io;

use crate::erofs::WriteError;
use crate::{Digest, Error};

/// Limits against hostile layers. The defaults are far above what real images have.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of one layer after decompression.
    pub layer_bytes: u64,
    /// Files, directories and links of one layer.
    pub entries: u64,
    /// Bytes of memory for names, link targets and extended attributes of one layer, roughly.
    pub metadata_bytes: u64,
    /// Bytes of a path.
    pub path_len: u64,
    /// Directories above a file.
    pub depth: u64,
    /// Layers of one image.
    pub layers: u64,
    /// Bytes of an archive that must be spooled because it comes from a pipe or is compressed.
    pub archive_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            layer_bytes: 256 << 30,
            entries: 4_000_000,
            metadata_bytes: 1 << 30,
            path_len: 4096,
            depth: 512,
            layers: 1000,
            archive_bytes: 512 << 30,
        }
    }
}

/// Why an archive was not converted; `Fault::of_layer` adds which one.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The archive cannot be read: truncated, or its compression is damaged.
    #[error("cannot read the archive")]
    Input(#[source] io::Error),
    /// The archive is damaged, hostile, or has something that cannot be kept.
    #[error("{0}")]
    Bad(String),
    /// A limit was reached.
    #[error("{what} is more than {limit}")]
    Over {
        /// Which quantity.
        what: &'static str,
        /// The limit's value.
        limit: u64,
    },
    /// The image cannot be written.
    #[error("cannot write")]
    Output(#[source] io::Error),
}

impl Fault {
    pub(crate) fn of_layer(self, layer: &Digest, output: impl FnOnce(io::Error) -> Error) -> Error {
        let layer = layer.to_string();
        match self {
            Self::Input(source) => Error::Input { what: format!("layer {layer}"), source },
            Self::Bad(why) => Error::BadLayer { layer, why },
            Self::Over { what, limit } => Error::OverLimit { layer, what, limit },
            Self::Output(source) => output(source),
        }
    }
}

/// Reading failures, with the limit on expanded bytes told apart.
impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<decode::CapReached>()) {
            Some(cap) => Self::Over { what: "its expanded size", limit: cap.0 },
            None => Self::Input(error),
        }
    }
}

impl From<WriteError> for Fault {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Input(error) => error.into(),
            WriteError::Output(error) => Self::Output(error),
            WriteError::Limit(_) => Self::Bad(error.to_string()),
        }
    }
}
