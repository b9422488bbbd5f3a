//! EROFS, the read-only file system of the layers: a writer and a reader of the subset that layers need.
//!
//! Uncompressed, 4 KiB blocks. The data of regular files comes first, in the order in which it arrives, so that a
//! layer is written while it is being read; directories and then inodes come after it, and the superblock in block 0
//! says where. The format is described by `fs/erofs/erofs_fs.h` and `Documentation/filesystems/erofs.rst` of Linux.

mod encode;
mod format;
mod reader;
mod stack;
mod tree;
mod writer;

pub use reader::{Inode, Reader};
pub(crate) use stack::Stack;
pub use tree::{FileData, Kind, Metadata, NodeId, Tree, Xattr};
pub use writer::{WriteError, Writer};

/// Whether an extended attribute of this full name can be kept.
pub(crate) fn can_hold_xattr(name: &[u8]) -> bool {
    format::split_xattr_name(name).is_some()
}

/// Makes the checksum of a superblock right, if there is one.
pub(crate) fn correct_checksum(image: &mut [u8]) {
    use format::{BLOCK, SUPER_OFFSET};
    let Some(block) = image.get_mut(SUPER_OFFSET as usize..BLOCK as usize) else { return };
    block[4..8].fill(0);
    let sum = format::crc32c(block);
    block[4..8].copy_from_slice(&sum.to_le_bytes());
}

#[cfg(test)]
mod tests;
