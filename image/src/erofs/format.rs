//! The on-disk format, as far as layers use it. All numbers are little-endian.

/// Bytes of a block.
pub(super) const BLOCK: u64 = 4096;
/// Where the superblock is, in bytes.
pub(super) const SUPER_OFFSET: u64 = 1024;
/// Bytes of the superblock.
pub(super) const SUPER_SIZE: usize = 128;
pub(super) const MAGIC: u32 = 0xE0F5_E1E2;
/// Inodes are addressed in units of this many bytes from the start of the metadata.
pub(super) const SLOT: u64 = 32;
pub(super) const COMPACT_SIZE: u64 = 32;
pub(super) const EXTENDED_SIZE: u64 = 64;
/// Bytes of a directory entry without its name.
pub(super) const DIRENT_SIZE: usize = 12;
/// Bytes of the header before the xattrs of an inode.
pub(super) const XATTR_HEADER: u64 = 12;
pub(super) const NAME_MAX: usize = 255;
/// `raw_blkaddr` of an inode that has no block.
pub(super) const NO_BLOCK: u32 = u32::MAX;

/// Compatible features: the superblock has a checksum; extended inodes hold the mtime.
pub(super) const COMPAT_SB_CHKSUM: u32 = 1;
pub(super) const COMPAT_MTIME: u32 = 2;

/// Data layouts: consecutive blocks; the same with the last, partial block kept right after the inode.
pub(super) const FLAT_PLAIN: u16 = 0;
pub(super) const FLAT_INLINE: u16 = 2;

pub(super) const S_IFMT: u16 = 0o170_000;
pub(super) const S_IFSOCK: u16 = 0o140_000;
pub(super) const S_IFLNK: u16 = 0o120_000;
pub(super) const S_IFREG: u16 = 0o100_000;
pub(super) const S_IFBLK: u16 = 0o060_000;
pub(super) const S_IFDIR: u16 = 0o040_000;
pub(super) const S_IFCHR: u16 = 0o020_000;
pub(super) const S_IFIFO: u16 = 0o010_000;

/// Names of extended attributes are kept as a prefix number and a rest.
const XATTR_PREFIXES: [(u8, &[u8]); 6] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (5, b"lustre."),
    (6, b"security."),
];

/// Splits an xattr's full name; none if the format cannot hold it.
pub(super) fn split_xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    XATTR_PREFIXES.iter().find_map(|(index, prefix)| {
        let rest = name.strip_prefix(*prefix)?;
        // A prefix that ends in a dot wants a rest; the ACL names are complete.
        let fits = rest.is_empty() != prefix.ends_with(b".") && rest.len() <= NAME_MAX;
        fits.then_some((*index, rest))
    })
}

/// The full name of an xattr.
pub(super) fn join_xattr_name(index: u8, rest: &[u8]) -> Option<Vec<u8>> {
    let (_, prefix) = XATTR_PREFIXES.iter().find(|(number, _)| *number == index)?;
    Some([*prefix, rest].concat())
}

/// Linux's 32-bit device number ("new" encoding): 12 bits of major, 20 of minor.
pub(super) fn encode_device(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20).then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

pub(super) fn decode_device(device: u32) -> (u32, u32) {
    ((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xf_ff00))
}

/// The `file_type` byte of a directory entry.
pub(super) fn file_type(mode: u16) -> u8 {
    match mode & S_IFMT {
        S_IFREG => 1,
        S_IFDIR => 2,
        S_IFCHR => 3,
        S_IFBLK => 4,
        S_IFIFO => 5,
        S_IFSOCK => 6,
        S_IFLNK => 7,
        _ => 0,
    }
}

/// CRC-32C as the kernel's `crc32c(~0, …)`: no final inversion.
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg()))
    })
}

/// Reads little-endian fields out of bytes that may be too short.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.get(offset..offset.checked_add(N)?)?.try_into().ok()
    }

    pub(super) fn u8(&self, offset: usize) -> Option<u8> {
        self.0.get(offset).copied()
    }

    pub(super) fn u16(&self, offset: usize) -> Option<u16> {
        self.array(offset).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&self, offset: usize) -> Option<u32> {
        self.array(offset).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&self, offset: usize) -> Option<u64> {
        self.array(offset).map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_survive() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (8, 256), (4095, 0xf_ffff)] {
            assert_eq!(decode_device(encode_device(major, minor).unwrap()), (major, minor));
        }
        assert_eq!(encode_device(4096, 0), None);
        assert_eq!(encode_device(0, 1 << 20), None);
    }

    #[test]
    fn crc_is_castagnoli() {
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn xattr_names() {
        assert_eq!(split_xattr_name(b"user.a"), Some((1, &b"a"[..])));
        assert_eq!(split_xattr_name(b"system.posix_acl_access"), Some((2, &b""[..])));
        for name in [&b"user."[..], b"system.other", b"system.posix_acl_accessX", b"", b"a"] {
            assert_eq!(split_xattr_name(name), None);
        }
        assert_eq!(join_xattr_name(6, b"capability").unwrap(), b"security.capability");
        assert_eq!(join_xattr_name(9, b"x"), None);
    }
}
