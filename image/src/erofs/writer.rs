//! Writes an EROFS image: file data as it comes, everything else at the end.

use std::collections::HashMap;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};

use super::encode::{
    Super, directory_blocks, directory_size, encode_directory_block, encode_inode, encode_xattrs,
    first_block, xattrs_size,
};
use super::format::{BLOCK, COMPACT_SIZE, EXTENDED_SIZE, NO_BLOCK, SLOT};
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
pub(super) struct Place {
    pub(super) nid: u64,
    pub(super) links: u32,
    pub(super) extended: bool,
    pub(super) xattr_size: u64,
    pub(super) size: u64,
    pub(super) first_block: u32,
    pub(super) inline_len: u64,
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

pub(super) fn fits_compact(metadata: &Metadata, place: &Place, epoch: (i64, u32)) -> bool {
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
