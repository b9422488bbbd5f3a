//! Writes an EROFS image: file data as it comes, everything else at the end.

use std::collections::HashMap;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};

use super::format::{
    BLOCK, COMPACT_SIZE, COMPAT_MTIME, COMPAT_SB_CHKSUM, DIRENT_SIZE, EXTENDED_SIZE, FLAT_INLINE, FLAT_PLAIN,
    MAGIC, NAME_MAX, NO_BLOCK, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, S_IFSOCK, SLOT,
    SUPER_OFFSET, SUPER_SIZE, XATTR_HEADER, crc32c, encode_device, file_type, split_xattr_name,
};
use super::tree::{FileData, Kind, Metadata, Node, NodeId, Tree, Xattr};

/// The end of a file that fills no block goes beside its inode up to this many bytes. Longer ends would leave holes
/// in the metadata, because they must not cross a block boundary there.
const MAX_INLINE: u64 = BLOCK / 2;

/// The first inodes are left free: number 0 means "no entry" to some readers of directories.
const FIRST_INODE: u64 = 2 * SLOT;

/// What went wrong while writing.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The reader of a file's content failed.
    #[error("cannot read the content of a file")]
    Input(#[source] io::Error),
    /// The image cannot be written.
    #[error("cannot write the EROFS file")]
    Output(#[source] io::Error),
    /// The format cannot hold this.
    #[error("EROFS cannot hold {0}")]
    Limit(&'static str),
}

/// Writes one image to `W`. `T` takes the ends of files meanwhile; both must be empty.
pub struct Writer<W: Write + Seek, T: Read + Write + Seek> {
    out: BufWriter<W>,
    tails: BufWriter<T>,
    tails_len: u64,
    /// The next free block.
    block: u32,
    buffer: Vec<u8>,
}

/// Where an inode goes and how.
#[derive(Clone, Copy, Default)]
struct Place {
    nid: u64,
    links: u32,
    extended: bool,
    xattr_size: u64,
    size: u64,
    first_block: u32,
    inline_len: u64,
}

impl Place {
    fn inode_size(&self) -> u64 {
        if self.extended { EXTENDED_SIZE } else { COMPACT_SIZE }
    }

    fn total(&self) -> u64 {
        self.inode_size() + self.xattr_size + self.inline_len
    }
}

impl<W: Write + Seek, T: Read + Write + Seek> Writer<W, T> {
    /// Starts an image.
    ///
    /// # Errors
    /// Seeking in `out` failed.
    pub fn new(mut out: W, tails: T) -> Result<Self, WriteError> {
        // Block 0 is for the superblock, written last.
        out.seek(SeekFrom::Start(BLOCK)).map_err(WriteError::Output)?;
        Ok(Self {
            out: BufWriter::with_capacity(256 * 1024, out),
            tails: BufWriter::with_capacity(64 * 1024, tails),
            tails_len: 0,
            block: 1,
            buffer: vec![0; 128 * 1024],
        })
    }

    /// Bytes written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        u64::from(self.block) * BLOCK + self.tails_len
    }

    /// Takes `size` bytes of content from `input` for a file with these extended attributes.
    ///
    /// # Errors
    /// Reading or writing failed; `input` is too short; the image is too large.
    pub fn add_file(
        &mut self,
        input: &mut dyn Read,
        size: u64,
        xattrs: &[Xattr],
    ) -> Result<FileData, WriteError> {
        let tail_len = size % BLOCK;
        let beside = inline_fits(tail_len, xattrs_size(xattrs)?);
        let in_blocks = if beside { size - tail_len } else { size };
        let first_block = if in_blocks == 0 { NO_BLOCK } else { self.block };
        let blocks =
            u32::try_from(in_blocks.div_ceil(BLOCK)).map_err(|_| WriteError::Limit("a file this large"))?;
        self.block = self.block.checked_add(blocks).ok_or(WriteError::Limit("more than 16 TiB"))?;
        copy(input, &mut self.out, &mut self.buffer, in_blocks)?;
        pad(&mut self.out, in_blocks)?;
        let tail = beside.then_some(self.tails_len);
        if beside {
            copy(input, &mut self.tails, &mut self.buffer, tail_len)?;
            self.tails_len += tail_len;
        }
        Ok(FileData { size, first_block, tail })
    }

    /// Writes directories, inodes and the superblock. Gives the size of the image in bytes.
    ///
    /// # Errors
    /// Writing failed; the tree has something that the format cannot hold.
    pub fn finish(mut self, tree: &Tree, uuid: [u8; 16]) -> Result<u64, WriteError> {
        let nodes = tree.nodes();
        let links = count_links(nodes);
        let epoch = commonest_time(nodes, &links);
        let mut places = self.place_data(nodes, &links, epoch)?;
        let meta_block = self.block;
        let meta_len = number_inodes(&mut places);

        let parents = parents(nodes);
        self.write_directories(nodes, &places, &parents)?;
        let mut tails = self.tails.into_inner().map_err(|error| WriteError::Output(error.into_error()))?;
        tails.rewind().map_err(WriteError::Output)?;
        let mut tails = io::BufReader::with_capacity(64 * 1024, tails);
        let mut position = 0;
        for (index, (node, place)) in nodes.iter().zip(&places).enumerate() {
            if place.links == 0 {
                // Replaced by a later entry: its tail must still be passed over.
                skip_tail(&mut tails, &node.kind)?;
                continue;
            }
            let mut bytes = Vec::with_capacity(256);
            encode_inode(&mut bytes, index, node, place, epoch)?;
            encode_xattrs(&mut bytes, &node.metadata.xattrs)?;
            match &node.kind {
                Kind::File(data) if data.tail.is_some() => {
                    let read = (&mut tails).take(place.inline_len).read_to_end(&mut bytes);
                    read.map_err(WriteError::Output)?;
                }
                Kind::Symlink(target) if place.inline_len > 0 => bytes.extend_from_slice(target),
                Kind::Directory(entries) if place.inline_len > 0 => {
                    let parent = parents.get(index).copied().unwrap_or_default();
                    let blocks = directory_blocks(index, parent, entries);
                    if let Some(last) = blocks.last() {
                        bytes.extend_from_slice(&encode_directory_block(last, nodes, &places));
                    }
                }
                _ => {}
            }
            let start = place.nid * SLOT;
            zeros(&mut self.out, start - position)?;
            self.out.write_all(&bytes).map_err(WriteError::Output)?;
            position = start + bytes.len() as u64;
        }
        debug_assert_eq!(position, meta_len, "what was placed is what was written");
        pad(&mut self.out, position)?;
        let meta_blocks = u32::try_from(position.div_ceil(BLOCK)).ok();
        let blocks = meta_blocks.and_then(|count| meta_block.checked_add(count));
        let blocks = blocks.ok_or(WriteError::Limit("more than 16 TiB"))?;

        let inodes = places.iter().filter(|place| place.links > 0).count() as u64;
        let root = places.first().map_or(0, |root| root.nid);
        let first = first_block(&Super { root, inodes, epoch, blocks, meta_block, uuid });
        let write = |out: &mut BufWriter<W>| {
            out.seek(SeekFrom::Start(0))?;
            out.write_all(&first)?;
            out.flush()
        };
        write(&mut self.out).map_err(WriteError::Output)?;
        Ok(u64::from(blocks) * BLOCK)
    }

    /// Decides what goes beside each inode and gives the rest its blocks.
    fn place_data(
        &mut self,
        nodes: &[Node],
        links: &[u32],
        epoch: (i64, u32),
    ) -> Result<Vec<Place>, WriteError> {
        let mut places = Vec::with_capacity(nodes.len());
        for (node, links) in nodes.iter().zip(links) {
            let mut place = Place { links: *links, first_block: NO_BLOCK, ..Place::default() };
            if *links == 0 {
                places.push(place);
                continue;
            }
            place.xattr_size = xattrs_size(&node.metadata.xattrs)?;
            match &node.kind {
                Kind::File(data) => {
                    place.size = data.size;
                    place.first_block = data.first_block;
                    place.inline_len = data.tail.map_or(0, |_| data.size % BLOCK);
                }
                Kind::Symlink(target) => {
                    place.size = target.len() as u64;
                    if target.is_empty() || place.size >= BLOCK {
                        return Err(WriteError::Limit("a symbolic link with an empty or too long target"));
                    }
                    self.place_tail(&mut place)?;
                }
                Kind::Directory(entries) => {
                    place.size = directory_size(entries)?;
                    self.place_tail(&mut place)?;
                }
                Kind::CharDevice(..) | Kind::BlockDevice(..) | Kind::Fifo | Kind::Socket => {}
            }
            place.extended = !fits_compact(&node.metadata, &place, epoch);
            places.push(place);
        }
        Ok(places)
    }

    fn place_tail(&mut self, place: &mut Place) -> Result<(), WriteError> {
        let tail = place.size % BLOCK;
        if inline_fits(tail, place.xattr_size) {
            place.inline_len = tail;
        }
        let blocks = u32::try_from((place.size - place.inline_len).div_ceil(BLOCK)).ok();
        if blocks != Some(0) {
            place.first_block = self.block;
        }
        let next = blocks.and_then(|blocks| self.block.checked_add(blocks));
        self.block = next.ok_or(WriteError::Limit("more than 16 TiB"))?;
        Ok(())
    }

    /// Writes the blocks promised by `place_data`, in the same order.
    fn write_directories(
        &mut self,
        nodes: &[Node],
        places: &[Place],
        parents: &[usize],
    ) -> Result<(), WriteError> {
        for (index, (node, place)) in nodes.iter().zip(places).enumerate() {
            if place.links == 0 {
                continue;
            }
            match &node.kind {
                Kind::Symlink(target) if place.inline_len == 0 => {
                    self.out.write_all(target).map_err(WriteError::Output)?;
                    pad(&mut self.out, place.size)?;
                }
                Kind::Directory(entries) => {
                    let parent = parents.get(index).copied().unwrap_or_default();
                    let mut blocks = directory_blocks(index, parent, entries);
                    if place.inline_len > 0 {
                        blocks.pop();
                    }
                    for block in &blocks {
                        let bytes = encode_directory_block(block, nodes, places);
                        self.out.write_all(&bytes).map_err(WriteError::Output)?;
                        pad(&mut self.out, bytes.len() as u64)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// An inode, its xattrs and its tail must be in one block.
fn inline_fits(tail: u64, xattr_size: u64) -> bool {
    tail > 0 && tail <= MAX_INLINE && EXTENDED_SIZE + xattr_size + tail <= BLOCK
}

fn copy(
    input: &mut dyn Read,
    out: &mut dyn Write,
    buffer: &mut [u8],
    mut remaining: u64,
) -> Result<(), WriteError> {
    while remaining > 0 {
        let want = usize::try_from(remaining).unwrap_or(usize::MAX).min(buffer.len());
        let part = buffer.get_mut(..want).unwrap_or_default();
        let count = match input.read(part) {
            Ok(0) => return Err(WriteError::Input(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(WriteError::Input(error)),
        };
        out.write_all(part.get(..count).unwrap_or_default()).map_err(WriteError::Output)?;
        remaining = remaining.saturating_sub(count as u64);
    }
    Ok(())
}

/// Fills the block that `len` bytes have begun.
fn pad(out: &mut dyn Write, len: u64) -> Result<(), WriteError> {
    zeros(out, len.next_multiple_of(BLOCK) - len)
}

fn zeros(out: &mut dyn Write, count: u64) -> Result<(), WriteError> {
    io::copy(&mut io::repeat(0).take(count), out).map(drop).map_err(WriteError::Output)
}

fn skip_tail(tails: &mut dyn Read, kind: &Kind) -> Result<(), WriteError> {
    if let Kind::File(FileData { size, tail: Some(_), .. }) = kind {
        io::copy(&mut tails.take(size % BLOCK), &mut io::sink()).map_err(WriteError::Output)?;
    }
    Ok(())
}

/// How many names each inode has (directories as Unix counts them); 0 for those no longer in the tree.
fn count_links(nodes: &[Node]) -> Vec<u32> {
    let mut links = vec![0_u32; nodes.len()];
    if let Some(root) = links.first_mut() {
        *root = 2;
    }
    let mut pending = vec![NodeId::ROOT];
    while let Some(directory) = pending.pop() {
        let Some(Kind::Directory(entries)) = nodes.get(directory.index()).map(|node| &node.kind) else {
            continue;
        };
        for child in entries.values() {
            let is_directory =
                nodes.get(child.index()).is_some_and(|node| matches!(node.kind, Kind::Directory(_)));
            if let Some(count) = links.get_mut(child.index()) {
                *count += if is_directory { 2 } else { 1 };
            }
            if is_directory {
                pending.push(*child);
                if let Some(count) = links.get_mut(directory.index()) {
                    *count += 1;
                }
            }
        }
    }
    links
}

/// The parent of each directory, by index; the root is its own.
fn parents(nodes: &[Node]) -> Vec<usize> {
    let mut parents = vec![0; nodes.len()];
    for (index, node) in nodes.iter().enumerate() {
        if let Kind::Directory(entries) = &node.kind {
            for child in entries.values() {
                if let Some(parent) = parents.get_mut(child.index()) {
                    *parent = index;
                }
            }
        }
    }
    parents
}

/// Compact inodes have no time of their own; the most frequent one saves most space. Ties go to the earliest.
fn commonest_time(nodes: &[Node], links: &[u32]) -> (i64, u32) {
    let mut counts: HashMap<(i64, u32), u64> = HashMap::new();
    for (node, _) in nodes.iter().zip(links).filter(|(_, links)| **links > 0) {
        *counts.entry((node.metadata.mtime, node.metadata.mtime_nsec)).or_default() += 1;
    }
    let best =
        counts.into_iter().max_by(|(time_a, a), (time_b, b)| a.cmp(b).then_with(|| time_b.cmp(time_a)));
    best.map_or((0, 0), |(time, _)| time)
}

fn fits_compact(metadata: &Metadata, place: &Place, epoch: (i64, u32)) -> bool {
    (metadata.mtime, metadata.mtime_nsec) == epoch
        && u16::try_from(metadata.uid).is_ok()
        && u16::try_from(metadata.gid).is_ok()
        && u16::try_from(place.links).is_ok()
        && u32::try_from(place.size).is_ok()
}

/// Gives each inode its number. Returns the bytes that the metadata takes.
fn number_inodes(places: &mut [Place]) -> u64 {
    let mut position = FIRST_INODE;
    let mut end = 0;
    for place in places.iter_mut().filter(|place| place.links > 0) {
        let total = place.total();
        // What fits into a block stays in one; large xattrs may cross, an inode never does.
        let together = if total <= BLOCK { total } else { place.inode_size() };
        if position % BLOCK + together > BLOCK {
            position = position.next_multiple_of(BLOCK);
        }
        place.nid = position / SLOT;
        end = position + total;
        position = end.next_multiple_of(SLOT);
    }
    end
}

fn encode_inode(
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
fn xattrs_size(xattrs: &[Xattr]) -> Result<u64, WriteError> {
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

fn encode_xattrs(bytes: &mut Vec<u8>, xattrs: &[Xattr]) -> Result<(), WriteError> {
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

type Entry<'a> = (&'a [u8], usize);

/// The entries of a directory in the order of their bytes, cut into blocks.
fn directory_blocks<'a>(
    index: usize,
    parent: usize,
    entries: &'a std::collections::BTreeMap<Vec<u8>, NodeId>,
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

fn directory_size(entries: &std::collections::BTreeMap<Vec<u8>, NodeId>) -> Result<u64, WriteError> {
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

fn encode_directory_block(entries: &[Entry<'_>], nodes: &[Node], places: &[Place]) -> Vec<u8> {
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

struct Super {
    root: u64,
    inodes: u64,
    epoch: (i64, u32),
    blocks: u32,
    meta_block: u32,
    uuid: [u8; 16],
}

/// Block 0: nothing but the superblock.
fn first_block(fields: &Super) -> Vec<u8> {
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
