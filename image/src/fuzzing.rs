//! What the fuzz targets in `fuzz/` need of this crate's inside. Not part of its interface.

use std::io::{self, BufRead, Read};

use crate::config::ConfigFile;
use crate::manifest::{self, Document, Plan};
use crate::{Platform, Result, User, erofs, layer, user};

/// See `layer::decode`.
///
/// # Errors
/// Other compressions.
pub fn decode<'a>(input: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    layer::decode(input)
}

/// Reads bytes as each of the documents that they may be.
pub fn documents(bytes: &[u8]) {
    let platform = Platform::default();
    if let Ok(Document::Index(index)) = Document::parse("a document", bytes) {
        let _ = manifest::choose("an index", &index, &platform);
    }
    let layers =
        manifest::parse::<ConfigFile>("a configuration", bytes).map_or(0, |file| file.rootfs.diff_ids.len());
    let layers = (0..layers).map(|number| (None, 0, number.to_string())).collect();
    if let Ok(plan) = Plan::new("an image", bytes.to_vec(), None, layers, 10) {
        let _ = plan.suits(&platform);
    }
}

/// See `user::resolve`.
///
/// # Errors
/// Unknown names, numbers out of range.
pub fn resolve_user(spec: &str, passwd: &str, group: &str) -> Result<User> {
    user::resolve(spec, passwd, group)
}

/// Makes the checksum of an EROFS image's superblock right, behind which all else is hidden from who changes bytes.
pub fn correct_erofs_checksum(image: &mut [u8]) {
    erofs::correct_checksum(image);
}
