//! From a layer's archive to an EROFS file.

/// Limits against hostile layers. The defaults are far above what real images have.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of one layer after decompression.
    pub layer_bytes: u64,
    /// Files, directories and links of one layer.
    pub entries: u64,
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
            path_len: 4096,
            depth: 512,
            layers: 1000,
            archive_bytes: 512 << 30,
        }
    }
}
