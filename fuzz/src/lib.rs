//! Fuzz targets: one function for each kind of bytes that a guest, an image, a bundle or a stored file brings.
//!
//! [`TARGETS`] is the table. Each target takes any bytes, does with them what the program does, and panics when something is
//! wrong. What drives them is not their affair: libFuzzer (`make fuzz`), or `cargo test`, which runs each on its seeds and on
//! a bounded number of mutations of them.
//!
//! [`guest`] is the other side of a virtio device: a language of moves, in which an input says what a guest and its host do.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a target that cannot go on panics: that is what is looked for

pub mod bytes;
pub mod guest;
pub mod targets;

/// What is run on any bytes.
pub type Run = fn(&[u8]);

/// A valid input, or one that once broke something, and what it is.
#[derive(Debug, Clone)]
pub struct Seed {
    /// For people; what it was, if it broke something.
    pub name: &'static str,
    /// The input.
    pub bytes: Vec<u8>,
}

/// A seed.
pub fn seed(name: &'static str, bytes: impl Into<Vec<u8>>) -> Seed {
    Seed { name, bytes: bytes.into() }
}

/// A surface and what drives it.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// As in `FUZZ_TARGETS`.
    pub name: &'static str,
    /// Whose bytes they are, and who reads them.
    pub surface: &'static str,
    /// Takes any bytes.
    pub run: Run,
    /// Where to begin.
    pub seeds: fn() -> Vec<Seed>,
}

/// The table, lowest layer first.
pub const TARGETS: &[Target] = &[
    targets::devices::BLOCK,
    targets::devices::NET,
    targets::devices::VSOCK,
    targets::devices::RNG,
    targets::devices::CONSOLE,
    targets::devices::FS,
    targets::registers::MMIO,
    targets::registers::PORTS,
    targets::packets::VSOCK_STREAMS,
    targets::backend::FS_BACKEND,
    targets::disks::COMPOSITE,
    targets::snapshot::STATE,
    targets::snapshot::DEVICE_STATE,
    targets::snapshot::WORKING_SET,
    targets::saved::MEMORY_FRAMES,
    targets::saved::PACKED_DISK,
    targets::control::REQUESTS,
    targets::agent::ANSWERS,
    targets::agent::STREAM,
    targets::image::LAYER,
    targets::image::LAYER_BLOB,
    targets::image::EROFS,
    targets::image::ARCHIVE,
    targets::image::DOCUMENTS,
    targets::files::BUNDLE,
    targets::files::COPY,
    targets::files::SETTINGS,
    targets::files::CONTAINER,
];

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
