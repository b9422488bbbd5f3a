//! Reads EROFS images of the kind that [`super::Writer`] makes. The file is not trusted: all is checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::format::{
    BLOCK, COMPACT_SIZE, DIRENT_SIZE, EXTENDED_SIZE, FLAT_INLINE, FLAT_PLAIN, Fields, MAGIC, NAME_MAX,
    S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK, SLOT, SUPER_OFFSET, SUPER_SIZE,
    XATTR_HEADER, crc32c, decode_device, join_xattr_name,
};
use super::tree::Xattr;
use crate::{Error, Result};

/// Anything that can be read at an offset.
pub trait ReadAt {
    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` past the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = start.checked_add(buffer.len()).and_then(|end| self.get(start..end));
        buffer.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// An open image.
#[derive(Debug)]
pub struct Reader<F = File> {
    file: F,
    meta_start: u64,
    blocks: u64,
    root: u64,
    epoch: (i64, u32),
}

/// An inode, as read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Its number: two names with the same number are hard links.
    pub nid: u64,
    /// Type and permissions, as `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names.
    pub links: u32,
    /// Bytes of content.
    pub size: u64,
    /// Modification time: seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
    inline: bool,
    /// First block, or device number.
    union: u32,
    header_size: u64,
    xattr_size: u64,
}

impl Inode {
    /// Whether it is a directory.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        self.mode & S_IFMT == S_IFDIR
    }

    /// Whether it is a regular file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.mode & S_IFMT == S_IFREG
    }

    /// Whether it is a symbolic link.
    #[must_use]
    pub fn is_symlink(&self) -> bool {
        self.mode & S_IFMT == S_IFLNK
    }

    /// Major and minor number of a device.
    #[must_use]
    pub fn device(&self) -> Option<(u32, u32)> {
        matches!(self.mode & S_IFMT, S_IFCHR | S_IFBLK).then(|| decode_device(self.union))
    }

    /// Whether it is what overlayfs takes for an absent name.
    #[must_use]
    pub fn is_whiteout(&self) -> bool {
        self.mode & S_IFMT == S_IFCHR && self.union == 0
    }
}

impl Reader<File> {
    /// Opens an image file.
    ///
    /// # Errors
    /// It cannot be opened or is not such an image.
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(File::open(path).map_err(Error::io("open", path))?)
    }
}

impl<F: ReadAt> Reader<F> {
    /// Reads the superblock.
    ///
    /// # Errors
    /// Not an image that we can read.
    pub fn new(file: F) -> Result<Self> {
        let mut bytes = vec![0; (BLOCK - SUPER_OFFSET) as usize];
        file.read_at(&mut bytes, SUPER_OFFSET).map_err(|_| Error::DamagedErofs("no superblock"))?;
        let fields = Fields(&bytes);
        let parse = || {
            let good = fields.u32(0)? == MAGIC && fields.u8(12)? == 12 && fields.u32(80)? == 0;
            let time = (i64::from_le_bytes(fields.array(24)?), fields.u32(32)?);
            Some((good, fields.u32(4)?, fields.u16(14)?, time, fields.u32(36)?, fields.u32(40)?))
        };
        let Some((true, checksum, root, epoch, blocks, meta_block)) = parse() else {
            return Err(Error::DamagedErofs("the superblock is not one that we write"));
        };
        debug_assert!(bytes.len() > SUPER_SIZE, "the checksum covers the rest of the block too");
        bytes.get_mut(4..8).unwrap_or_default().fill(0);
        if crc32c(&bytes) != checksum {
            return Err(Error::DamagedErofs("wrong checksum of the superblock"));
        }
        let meta_start = u64::from(meta_block) * BLOCK;
        Ok(Self { file, meta_start, blocks: blocks.into(), root: root.into(), epoch })
    }

    /// The root directory.
    ///
    /// # Errors
    /// A damaged image.
    pub fn root(&self) -> Result<Inode> {
        let root = self.inode(self.root)?;
        if root.is_directory() { Ok(root) } else { Err(Error::DamagedErofs("the root is not a directory")) }
    }

    /// Reads an inode.
    ///
    /// # Errors
    /// A damaged image.
    pub fn inode(&self, nid: u64) -> Result<Inode> {
        let start = self.inode_start(nid)?;
        let mut bytes = [0; EXTENDED_SIZE as usize];
        let compact = bytes.get_mut(..COMPACT_SIZE as usize).unwrap_or_default();
        self.read_at(compact, start)?;
        let extended = Fields(&bytes).u16(0).unwrap_or_default() & 1 == 1;
        if extended {
            self.read_at(&mut bytes, start)?;
        }
        self.parse_inode(nid, &Fields(&bytes), extended)
            .ok_or(Error::DamagedErofs("an inode has an unknown format or type"))
    }

    fn parse_inode(&self, nid: u64, fields: &Fields<'_>, extended: bool) -> Option<Inode> {
        let layout = fields.u16(0)? >> 1;
        let inline = match layout {
            FLAT_PLAIN => false,
            FLAT_INLINE => true,
            _ => return None,
        };
        let xattr_size = match u64::from(fields.u16(2)?) {
            0 => 0,
            count => XATTR_HEADER + 4 * (count - 1),
        };
        let mode = fields.u16(4)?;
        if !matches!(mode & S_IFMT, S_IFREG | S_IFDIR | S_IFLNK | S_IFCHR | S_IFBLK | S_IFIFO | S_IFSOCK) {
            return None;
        }
        let union = fields.u32(16)?;
        Some(if extended {
            let mtime = (i64::from_le_bytes(fields.array(32)?), fields.u32(40)?);
            let (uid, gid, links, size) = (fields.u32(24)?, fields.u32(28)?, fields.u32(44)?, fields.u64(8)?);
            let header_size = EXTENDED_SIZE;
            Inode { nid, mode, uid, gid, links, size, mtime, inline, union, header_size, xattr_size }
        } else {
            let (uid, gid) = (fields.u16(24)?.into(), fields.u16(26)?.into());
            let (links, size, mtime) = (fields.u16(6)?.into(), fields.u32(8)?.into(), self.epoch);
            let header_size = COMPACT_SIZE;
            Inode { nid, mode, uid, gid, links, size, mtime, inline, union, header_size, xattr_size }
        })
    }

    /// Up to `max` bytes of an inode's content, all of it or an error.
    ///
    /// # Errors
    /// More content than `max`; a damaged image.
    pub fn read(&self, inode: &Inode, max: u64) -> Result<Vec<u8>> {
        if inode.size > max || inode.size > self.blocks * BLOCK {
            return Err(Error::DamagedErofs("a file that is read whole is too large"));
        }
        let tail = if inode.inline { inode.size % BLOCK } else { 0 };
        let in_blocks = inode.size - tail;
        // Not larger than the image file, and read only from there.
        let mut content = vec![0; usize::try_from(inode.size).unwrap_or_default()];
        let (front, back) = content.split_at_mut(usize::try_from(in_blocks).unwrap_or_default());
        if !front.is_empty() {
            self.read_at(front, u64::from(inode.union) * BLOCK)?;
        }
        if !back.is_empty() {
            self.read_at(back, self.inode_start(inode.nid)? + inode.header_size + inode.xattr_size)?;
        }
        Ok(content)
    }

    /// The entries of a directory with the numbers of their inodes, without `.` and `..`.
    ///
    /// # Errors
    /// A damaged image, or not a directory.
    pub fn read_directory(&self, directory: &Inode) -> Result<Vec<(Vec<u8>, u64)>> {
        if !directory.is_directory() {
            return Err(Error::DamagedErofs("not a directory"));
        }
        let content = self.read(directory, 1 << 30)?;
        let mut entries = Vec::new();
        for block in content.chunks(BLOCK as usize) {
            parse_directory_block(block, &mut entries).ok_or(Error::DamagedErofs("a broken directory"))?;
        }
        Ok(entries)
    }

    /// The number of the inode called `name` in a directory.
    ///
    /// # Errors
    /// A damaged image, or not a directory.
    pub fn lookup(&self, directory: &Inode, name: &[u8]) -> Result<Option<u64>> {
        let entries = self.read_directory(directory)?;
        Ok(entries.into_iter().find(|(found, _)| found == name).map(|(_, nid)| nid))
    }

    /// All extended attributes of an inode.
    ///
    /// # Errors
    /// A damaged image.
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>> {
        if inode.xattr_size == 0 {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; usize::try_from(inode.xattr_size).unwrap_or_default()];
        self.read_at(&mut bytes, self.inode_start(inode.nid)? + inode.header_size)?;
        parse_xattrs(&bytes).ok_or(Error::DamagedErofs("broken extended attributes"))
    }

    fn inode_start(&self, nid: u64) -> Result<u64> {
        let offset = nid.checked_mul(SLOT).and_then(|offset| offset.checked_add(self.meta_start));
        offset.ok_or(Error::DamagedErofs("an inode number is out of range"))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file
            .read_at(buffer, offset)
            .map_err(|_| Error::DamagedErofs("it ends too early or cannot be read"))
    }
}

fn parse_directory_block(block: &[u8], entries: &mut Vec<(Vec<u8>, u64)>) -> Option<()> {
    let fields = Fields(block);
    let names_start = usize::from(fields.u16(8)?);
    if names_start == 0 || !names_start.is_multiple_of(DIRENT_SIZE) {
        return None;
    }
    let count = names_start / DIRENT_SIZE;
    for index in 0..count {
        let entry = index * DIRENT_SIZE;
        let nid = fields.u64(entry)?;
        let start = usize::from(fields.u16(entry + 8)?);
        let name = if index + 1 < count {
            block.get(start..usize::from(fields.u16(entry + DIRENT_SIZE + 8)?))?
        } else {
            let rest = block.get(start..)?;
            rest.split(|byte| *byte == 0).next()?
        };
        if name.is_empty() || name.len() > NAME_MAX {
            return None;
        }
        if name != b"." && name != b".." {
            entries.push((name.to_vec(), nid));
        }
    }
    Some(())
}

fn parse_xattrs(bytes: &[u8]) -> Option<Vec<Xattr>> {
    // Shared attributes are never written.
    if *bytes.get(4)? != 0 {
        return None;
    }
    let mut xattrs = Vec::new();
    let mut rest = bytes.get(XATTR_HEADER as usize..)?;
    while !rest.is_empty() {
        let fields = Fields(rest);
        let (name_len, index) = (usize::from(fields.u8(0)?), fields.u8(1)?);
        let value_end = 4 + name_len + usize::from(fields.u16(2)?);
        let name = join_xattr_name(index, rest.get(4..4 + name_len)?)?;
        xattrs.push(Xattr { name, value: rest.get(4 + name_len..value_end)?.to_vec() });
        rest = rest.get(value_end.next_multiple_of(4)..)?;
    }
    Some(xattrs)
}
