//! What the fuzz targets in `fuzz/` need of this crate's inside. Not part of its interface.

use std::io::{self, Read};
use std::path::Path;

use crate::{Settings, copy};

/// Unpacks the archive that `cp` gets out of a guest.
///
/// # Errors
/// Whatever is wrong with it.
pub fn unpack(stream: impl Read, to: &Path, contents_only: bool) -> io::Result<()> {
    copy::unpack(stream, to, contents_only)
}

/// Reads settings, and what makes sense of those that do not.
///
/// # Errors
/// The line, and what is wrong with it.
pub fn settings(text: &str) -> Result<(), String> {
    let _ = Settings::salvage(text);
    Settings::parse(text).map(drop)
}
