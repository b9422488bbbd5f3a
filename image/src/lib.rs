//! OCI image store: load, pull, EROFS conversion, garbage collection.
//!
//! An image's layers are kept as EROFS files, made once, named after the SHA-256 of the uncompressed layer, and
//! mounted read-only by every sandbox. Nothing is ever extracted into a directory of the host: an archive is read
//! into a tree in memory and written out as a file system image, so there is no path on the host for a hostile
//! archive to escape to.
//!
//! [`Store::resolve`] is on the way of every `run` and costs two small file reads. All else takes a lock.

mod config;
mod digest;
pub mod erofs;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod image;
pub mod layer;
mod load;
mod manifest;
pub mod progress;
#[cfg(feature = "pull")]
mod pull;
mod reference;
mod store;
mod user;
pub mod verity;

pub use config::ImageConfig;
pub use digest::Digest;
pub use error::{Error, Result};
pub use image::{Image, LayerProof};
pub use layer::Limits;
pub use load::{LoadOptions, Source};
pub use progress::Progress;
#[cfg(feature = "pull")]
pub use pull::PullOptions;
pub use reference::{Platform, Reference};
pub use store::{ImageDetail, ImageSummary, LayerDetail, LoadedImage, PruneScope, Pruned, Removed, Store};
pub use user::User;
