//! The bytes of inodes, attributes, directories and the superblock.

use std::collections::BTreeMap;

use super::format::{
    BLOCK, COMPAT_MTIME, COMPAT_SB_CHKSUM, DIRENT_SIZE, FLAT_INLINE, FLAT_PLAIN, MAGIC, NAME_MAX, S_IFBLK,
    S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, S_IFSOCK, SUPER_OFFSET, SUPER_SIZE, XATTR_HEADER, crc32c,
    encode_device, file_type, split_xattr_name,
};
use super::tree::{Kind, Node, NodeId, Xattr};
use super::writer::{Place, WriteError, fits_compact};

pub(super) fn encode_inode(
    bytes: &mut Vec<u8>,
    index: usize,
    node: &Node,
    place: &Place,
    epoch: (i64, u32),
) -> Result<(), WriteError> {
    let metadata = &node.metadata;
    let layout = if place.inline_len > 0 { FLAT_INLINE } else { FLAT_PLAIN };
    let format = layout << 1 | u16::from(place.extended);
    let xattr_count = match place.xattr_size {
        0 => 0,
        size => u16::try_from((size - XATTR_HEADER) / 4 + 1)
            .map_err(|_| WriteError::Limit("xattrs this large"))?,
    };
    let device =
        |major, minor| encode_device(major, minor).ok_or(WriteError::Limit("a device number this large"));
    let union = match node.kind {
        Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) => device(major, minor)?,
        Kind::Fifo | Kind::Socket => 0,
        Kind::Directory(_) | Kind::File(_) | Kind::Symlink(_) => place.first_block,
    };
    // Only 32-bit programs see this number.
    let ino = u32::try_from(index).unwrap_or(u32::MAX).saturating_add(1);
    bytes.extend(format.to_le_bytes());
    bytes.extend(xattr_count.to_le_bytes());
    bytes.extend(mode(node).to_le_bytes());
    if place.extended {
        bytes.extend([0; 2]);
        bytes.extend(place.size.to_le_bytes());
        bytes.extend(union.to_le_bytes());
        bytes.extend(ino.to_le_bytes());
        bytes.extend(metadata.uid.to_le_bytes());
        bytes.extend(metadata.gid.to_le_bytes());
        bytes.extend(metadata.mtime.to_le_bytes());
        bytes.extend(metadata.mtime_nsec.to_le_bytes());
        bytes.extend(place.links.to_le_bytes());
        bytes.extend([0; 16]);
    } else {
        debug_assert!(fits_compact(metadata, place, epoch), "decided by place_data");
        // Truncation is excluded by `fits_compact`.
        bytes.extend((place.links as u16).to_le_bytes());
        bytes.extend((place.size as u32).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(union.to_le_bytes());
        bytes.extend(ino.to_le_bytes());
        bytes.extend((metadata.uid as u16).to_le_bytes());
        bytes.extend((metadata.gid as u16).to_le_bytes());
        bytes.extend([0; 4]);
    }
    Ok(())
}

fn mode(node: &Node) -> u16 {
    let kind = match node.kind {
        Kind::Directory(_) => S_IFDIR,
        Kind::File(_) => S_IFREG,
        Kind::Symlink(_) => S_IFLNK,
        Kind::CharDevice(..) => S_IFCHR,
        Kind::BlockDevice(..) => S_IFBLK,
        Kind::Fifo => S_IFIFO,
        Kind::Socket => S_IFSOCK,
    };
    kind | (node.metadata.permissions & 0o7777)
}

/// Bytes of the xattrs of an inode with their header; 0 for none.
pub(super) fn xattrs_size(xattrs: &[Xattr]) -> Result<u64, WriteError> {
    if xattrs.is_empty() {
        return Ok(0);
    }
    let mut size = XATTR_HEADER;
    for xattr in xattrs {
        let (_, rest) = split_xattr_name(&xattr.name).ok_or(WriteError::Limit("an xattr of this name"))?;
        if u16::try_from(xattr.value.len()).is_err() {
            return Err(WriteError::Limit("an xattr value of 64 KiB or more"));
        }
        size += (4 + rest.len() as u64 + xattr.value.len() as u64).next_multiple_of(4);
    }
    // The count is of 16 bits, in units of 4 bytes.
    if size > 4 * u64::from(u16::MAX) {
        Err(WriteError::Limit("more than 256 KiB of xattrs on a file"))
    } else {
        Ok(size)
    }
}

pub(super) fn encode_xattrs(bytes: &mut Vec<u8>, xattrs: &[Xattr]) -> Result<(), WriteError> {
    if xattrs.is_empty() {
        return Ok(());
    }
    bytes.extend([0; XATTR_HEADER as usize]);
    for xattr in xattrs {
        let (prefix, rest) =
            split_xattr_name(&xattr.name).ok_or(WriteError::Limit("an xattr of this name"))?;
        let value_len =
            u16::try_from(xattr.value.len()).map_err(|_| WriteError::Limit("an xattr this large"))?;
        bytes.extend([
            u8::try_from(rest.len()).map_err(|_| WriteError::Limit("an xattr of this name"))?,
            prefix,
        ]);
        bytes.extend(value_len.to_le_bytes());
        bytes.extend_from_slice(rest);
        bytes.extend_from_slice(&xattr.value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    Ok(())
}

pub(super) type Entry<'a> = (&'a [u8], usize);

/// The entries of a directory in the order of their bytes, cut into blocks.
pub(super) fn directory_blocks<'a>(
    index: usize,
    parent: usize,
    entries: &'a BTreeMap<Vec<u8>, NodeId>,
) -> Vec<Vec<Entry<'a>>> {
    let mut all: Vec<Entry<'a>> = vec![(b".", index), (b"..", parent)];
    all.extend(entries.iter().map(|(name, node)| (name.as_slice(), node.index())));
    all.sort_unstable();
    let mut blocks: Vec<Vec<Entry<'a>>> = Vec::new();
    let mut used = BLOCK as usize;
    for entry in all {
        let need = DIRENT_SIZE + entry.0.len();
        if used + need > BLOCK as usize {
            blocks.push(Vec::new());
            used = 0;
        }
        used += need;
        if let Some(block) = blocks.last_mut() {
            block.push(entry);
        }
    }
    blocks
}

pub(super) fn directory_size(entries: &BTreeMap<Vec<u8>, NodeId>) -> Result<u64, WriteError> {
    if entries
        .keys()
        .any(|name| name.is_empty() || name.len() > NAME_MAX || name.contains(&b'/') || name.contains(&0))
    {
        return Err(WriteError::Limit("a name that is empty, longer than 255 bytes or has / or NUL in it"));
    }
    let blocks = directory_blocks(0, 0, entries);
    let last: usize =
        blocks.last().map_or(0, |last| last.iter().map(|(name, _)| DIRENT_SIZE + name.len()).sum());
    Ok((blocks.len() as u64).saturating_sub(1) * BLOCK + last as u64)
}

pub(super) fn encode_directory_block(entries: &[Entry<'_>], nodes: &[Node], places: &[Place]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK as usize);
    let mut name_offset = entries.len() * DIRENT_SIZE;
    for (name, index) in entries {
        let nid = places.get(*index).map_or(0, |place| place.nid);
        let kind = nodes.get(*index).map_or(0, |node| file_type(mode(node)));
        bytes.extend(nid.to_le_bytes());
        // Below 4096, as the block was cut so.
        bytes.extend((name_offset as u16).to_le_bytes());
        bytes.extend([kind, 0]);
        name_offset += name.len();
    }
    entries.iter().for_each(|(name, _)| bytes.extend_from_slice(name));
    bytes
}

pub(super) struct Super {
    pub(super) root: u64,
    pub(super) inodes: u64,
    pub(super) epoch: (i64, u32),
    pub(super) blocks: u32,
    pub(super) meta_block: u32,
    pub(super) uuid: [u8; 16],
}

/// Block 0: nothing but the superblock.
pub(super) fn first_block(fields: &Super) -> Vec<u8> {
    let encode = |checksum: u32| {
        let mut bytes = vec![0; SUPER_OFFSET as usize];
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend(checksum.to_le_bytes());
        bytes.extend((COMPAT_SB_CHKSUM | COMPAT_MTIME).to_le_bytes());
        bytes.extend([BLOCK.trailing_zeros() as u8, 0]);
        // The root is the first inode, so its number is small.
        bytes.extend((fields.root as u16).to_le_bytes());
        bytes.extend(fields.inodes.to_le_bytes());
        bytes.extend(fields.epoch.0.to_le_bytes());
        bytes.extend(fields.epoch.1.to_le_bytes());
        bytes.extend(fields.blocks.to_le_bytes());
        bytes.extend(fields.meta_block.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(fields.uuid);
        debug_assert!(
            bytes.len() <= SUPER_OFFSET as usize + SUPER_SIZE,
            "the rest is zero: no other feature"
        );
        bytes.resize(BLOCK as usize, 0);
        bytes
    };
    let checked = encode(0);
    encode(crc32c(checked.get(SUPER_OFFSET as usize..).unwrap_or_default()))
}
