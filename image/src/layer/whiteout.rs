//! Deletions in a layer, as the OCI image specification writes them, and as overlayfs reads them.

/// What a file name means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Name<'a> {
    /// An ordinary file.
    Plain,
    /// `.wh.NAME`: lower layers' NAME is gone.
    Whiteout(&'a [u8]),
    /// `.wh..wh..opq`: everything that lower layers have in this directory is gone.
    Opaque,
    /// Bookkeeping of aufs, to be ignored.
    Ignored,
    /// A whiteout of nothing that can be.
    Broken,
}

pub(super) fn classify(name: &[u8]) -> Name<'_> {
    match name.strip_prefix(b".wh.") {
        None => Name::Plain,
        Some(b".wh..opq") => Name::Opaque,
        Some(rest) if rest.starts_with(b".wh.") => Name::Ignored,
        Some(b"" | b"." | b"..") => Name::Broken,
        Some(rest) => Name::Whiteout(rest),
    }
}

/// The attribute by which overlayfs hides what lower layers have in a directory.
pub(super) const OPAQUE: (&[u8], &[u8]) = (b"trusted.overlay.opaque", b"y");

/// Attributes with which overlayfs steers itself. A layer that brings its own could refer to other files of the image.
pub(super) const OVERLAY_PREFIX: &[u8] = b"trusted.overlay.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(classify(b"file"), Name::Plain);
        assert_eq!(classify(b".wh"), Name::Plain);
        assert_eq!(classify(b".wh.file"), Name::Whiteout(b"file"));
        assert_eq!(classify(b".wh..wh..opq"), Name::Opaque);
        assert_eq!(classify(b".wh..wh.plnk"), Name::Ignored);
        assert_eq!(classify(b".wh..."), Name::Broken);
        assert_eq!(classify(b".wh."), Name::Broken);
    }
}
