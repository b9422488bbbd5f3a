//! Puts a layer's entries into a tree, as extracting them would, but on no file system.

use std::collections::VecDeque;
use std::io::{Read, Seek, Write};

use super::tar::{Archive, Entry, EntryKind, Skip, named};
use super::whiteout::{self, Name};
use super::{Fault, Limits};
use crate::erofs::{Kind, Metadata, NodeId, Tree, Writer, Xattr};

/// As many symbolic links as Linux follows on one path.
const MAX_SYMLINKS: u32 = 40;
/// Memory that a node takes beside its names and attributes, roughly.
const NODE_COST: u64 = 256;
/// Remarks about one layer that are worth a person's time.
const MAX_NOTES: usize = 5;

/// Reads a whole tar stream and writes it as an EROFS image to `out`. `tails` takes parts of it meanwhile; both must
/// be empty. Gives the image's size in bytes and remarks about what was left out. What follows the archive's end mark
/// is not read.
///
/// # Errors
/// Whatever is wrong with the archive, a limit, or writing.
pub fn convert_tar<R, W, T>(
    input: R,
    out: W,
    tails: T,
    limits: &Limits,
    uuid: [u8; 16],
) -> Result<(u64, Vec<String>), Fault>
where
    R: Read,
    W: Write + Seek,
    T: Read + Write + Seek,
{
    let mut archive = Archive::new(Plain(input));
    let root = Metadata { permissions: 0o755, ..Metadata::default() };
    let mut builder = Builder {
        limits,
        tree: Tree::new(root),
        writer: Writer::new(out, tails)?,
        nodes: 0,
        memory: 0,
        bytes: 0,
        notes: Vec::new(),
        more_notes: 0,
    };
    while let Some(entry) = archive.next()? {
        builder.add(entry, &mut archive)?;
    }
    let size = builder.writer.finish(&builder.tree, uuid)?;
    if builder.more_notes > 0 {
        builder.notes.push(format!("and {} more of this kind", builder.more_notes));
    }
    Ok((size, builder.notes))
}

/// Input without a way to skip but by reading.
struct Plain<R>(R);

impl<R: Read> Read for Plain<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> Skip for Plain<R> {}

struct Builder<'a, W: Write + Seek, T: Read + Write + Seek> {
    limits: &'a Limits,
    tree: Tree,
    writer: Writer<W, T>,
    nodes: u64,
    memory: u64,
    bytes: u64,
    notes: Vec<String>,
    more_notes: u64,
}

impl<W: Write + Seek, T: Read + Write + Seek> Builder<'_, W, T> {
    fn add<R: Skip>(&mut self, mut entry: Entry, archive: &mut Archive<R>) -> Result<(), Fault> {
        let mut path = self.components(&entry.path)?;
        let Some(name) = path.pop() else {
            return self.set_root(entry);
        };
        let at = self.directory(&path, &entry.path)?;
        match whiteout::classify(&name) {
            Name::Plain => {}
            Name::Whiteout(hidden) => return self.hide(at, hidden, &entry),
            Name::Opaque => {
                self.make_opaque(at);
                return Ok(());
            }
            Name::Ignored => return Ok(()),
            Name::Broken => return Err(named(&entry.path, "is a whiteout of nothing")),
        }
        self.drop_unusable_xattrs(&mut entry);
        let kind = match entry.kind {
            EntryKind::Directory => return self.add_directory(at, &name, entry.metadata),
            EntryKind::HardLink(ref target) => {
                let target = self.link_target(target, &entry.path)?;
                self.replace(at, &name, target);
                return self.pay(name.len() as u64);
            }
            EntryKind::File => {
                self.bytes = self.bytes.saturating_add(entry.size);
                if self.bytes > self.limits.layer_bytes {
                    let limit = self.limits.layer_bytes;
                    return Err(Fault::Over { what: "the size of its files", limit });
                }
                Kind::File(self.writer.add_file(archive, entry.size, &entry.metadata.xattrs)?)
            }
            EntryKind::Symlink(target) => {
                if target.is_empty()
                    || target.len() as u64 >= self.limits.path_len.min(4096)
                    || target.contains(&0)
                {
                    return Err(named(
                        &entry.path,
                        "is a symbolic link with an empty, too long or broken target",
                    ));
                }
                Kind::Symlink(target)
            }
            EntryKind::CharDevice(major, minor) => Kind::CharDevice(major, minor),
            EntryKind::BlockDevice(major, minor) => Kind::BlockDevice(major, minor),
            EntryKind::Fifo => Kind::Fifo,
            EntryKind::Unknown(byte) => {
                let shown = String::from_utf8_lossy(&entry.path).into_owned();
                self.note(format!("`{}` left out: unknown tar type {byte:#04x}", shown.escape_debug()));
                return Ok(());
            }
        };
        let node = self.node(entry.metadata, kind)?;
        self.replace(at, &name, node);
        self.pay(name.len() as u64)
    }

    /// The parts of a path below the root. No `..` comes through, so nothing leads out.
    fn components(&self, path: &[u8]) -> Result<Vec<Vec<u8>>, Fault> {
        if path.len() as u64 > self.limits.path_len {
            return Err(Fault::Over { what: "the length of a path", limit: self.limits.path_len });
        }
        let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
        let parts: Vec<Vec<u8>> = parts.map(<[u8]>::to_vec).collect();
        if parts.len() as u64 > self.limits.depth {
            return Err(Fault::Over { what: "the depth of a path", limit: self.limits.depth });
        }
        if parts.iter().any(|part| part == b"..") {
            return Err(named(path, "leads out of the layer by `..`"));
        }
        if parts.iter().any(|part| part.len() > 255 || part.contains(&0)) {
            return Err(named(path, "has a name longer than 255 bytes or with a NUL byte"));
        }
        Ok(parts)
    }

    /// Walks to a directory, making what is missing. Symbolic links of this layer are followed within the tree, with
    /// the tree's root as `/`.
    fn directory(&mut self, path: &[Vec<u8>], shown: &[u8]) -> Result<NodeId, Fault> {
        let mut above: Vec<NodeId> = vec![NodeId::ROOT];
        let mut pending: VecDeque<Vec<u8>> = path.iter().cloned().collect();
        let mut symlinks = 0;
        while let Some(part) = pending.pop_front() {
            if part == b".." {
                if above.len() > 1 {
                    above.pop();
                }
                continue;
            }
            let at = above.last().copied().unwrap_or(NodeId::ROOT);
            let child = self.tree.child(at, &part);
            match child.and_then(|child| self.tree.kind(child)) {
                Some(Kind::Directory(_)) => above.extend(child),
                Some(Kind::Symlink(target)) => {
                    symlinks += 1;
                    if symlinks > MAX_SYMLINKS {
                        return Err(named(shown, "goes through too many symbolic links"));
                    }
                    if target.starts_with(b"/") {
                        above.truncate(1);
                    }
                    let parts = target.split(|byte| *byte == b'/');
                    let parts = parts.filter(|part| !part.is_empty() && *part != b".").map(<[u8]>::to_vec);
                    parts.rev().for_each(|part| pending.push_front(part));
                }
                None | Some(&Kind::WHITEOUT) => {
                    if part.len() > 255 {
                        return Err(named(shown, "has a name longer than 255 bytes"));
                    }
                    self.add_directory(at, &part, Metadata { permissions: 0o755, ..Metadata::default() })?;
                    above.extend(self.tree.child(at, &part));
                }
                Some(_) => return Err(named(shown, "is below something that is not a directory")),
            }
            if above.len() as u64 > self.limits.depth.saturating_add(1) {
                return Err(Fault::Over { what: "the depth of a path", limit: self.limits.depth });
            }
        }
        Ok(above.last().copied().unwrap_or(NodeId::ROOT))
    }

    fn set_root(&mut self, mut entry: Entry) -> Result<(), Fault> {
        if entry.kind != EntryKind::Directory {
            return Err(named(&entry.path, "would replace the root directory"));
        }
        self.drop_unusable_xattrs(&mut entry);
        self.set_directory(NodeId::ROOT, entry.metadata)
    }

    fn add_directory(&mut self, at: NodeId, name: &[u8], metadata: Metadata) -> Result<(), Fault> {
        let there = self.tree.child(at, name);
        match there.and_then(|there| Some((there, self.tree.kind(there)?))) {
            Some((there, Kind::Directory(_))) => self.set_directory(there, metadata),
            other => {
                let hidden = matches!(other, Some((_, &Kind::WHITEOUT)));
                let node = self.node(metadata, Kind::Directory(Default::default()))?;
                self.replace(at, name, node);
                if hidden {
                    self.make_opaque(node);
                }
                self.pay(name.len() as u64)
            }
        }
    }

    /// A directory that comes again takes the later metadata; that it hides lower layers stays.
    fn set_directory(&mut self, node: NodeId, metadata: Metadata) -> Result<(), Fault> {
        self.pay(metadata.xattrs.iter().map(|xattr| (xattr.name.len() + xattr.value.len()) as u64).sum())?;
        let Some(old) = self.tree.metadata_mut(node) else { return Ok(()) };
        let opaque = old.xattrs.iter().any(|xattr| xattr.name == whiteout::OPAQUE.0);
        *old = metadata;
        if opaque {
            self.make_opaque(node);
        }
        Ok(())
    }

    /// The inode that a hard link means.
    fn link_target(&mut self, target: &[u8], shown: &[u8]) -> Result<NodeId, Fault> {
        let mut path = self.components(target)?;
        let name = path.pop().ok_or_else(|| named(shown, "is a hard link to the root directory"))?;
        let at = self.directory(&path, target)?;
        let node = self.tree.child(at, &name);
        match node.and_then(|node| Some((node, self.tree.kind(node)?))) {
            Some((_, Kind::Directory(_))) => Err(named(shown, "is a hard link to a directory")),
            None | Some((_, &Kind::WHITEOUT)) => {
                let target: String = String::from_utf8_lossy(target).chars().take(200).collect();
                let why =
                    format!("is a hard link to `{}`, which this layer does not have", target.escape_debug());
                Err(named(shown, &why))
            }
            Some((node, _)) => Ok(node),
        }
    }

    /// A whiteout concerns lower layers only: what this layer itself has under the name stays.
    fn hide(&mut self, at: NodeId, name: &[u8], entry: &Entry) -> Result<(), Fault> {
        match self.tree.child(at, name) {
            Some(there) => {
                if matches!(self.tree.kind(there), Some(Kind::Directory(_))) {
                    self.make_opaque(there);
                }
                Ok(())
            }
            None => {
                let Metadata { mtime, mtime_nsec, .. } = entry.metadata;
                let node =
                    self.node(Metadata { mtime, mtime_nsec, ..Metadata::default() }, Kind::WHITEOUT)?;
                self.tree.link(at, name, node);
                self.pay(name.len() as u64)
            }
        }
    }

    fn make_opaque(&mut self, directory: NodeId) {
        let (name, value) = whiteout::OPAQUE;
        if let Some(metadata) = self.tree.metadata_mut(directory) {
            metadata.xattrs.retain(|xattr| xattr.name != name);
            metadata.xattrs.push(Xattr { name: name.to_vec(), value: value.to_vec() });
        }
    }

    fn replace(&mut self, at: NodeId, name: &[u8], node: NodeId) {
        self.tree.link(at, name, node);
    }

    fn node(&mut self, metadata: Metadata, kind: Kind) -> Result<NodeId, Fault> {
        self.nodes += 1;
        let xattrs: usize = metadata.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
        let target = if let Kind::Symlink(target) = &kind { target.len() } else { 0 };
        self.pay(NODE_COST + (xattrs + target) as u64)?;
        let over = || Fault::Over { what: "the number of its files", limit: self.limits.entries };
        if self.nodes > self.limits.entries {
            return Err(over());
        }
        self.tree.add(metadata, kind).ok_or_else(over)
    }

    /// Accounts for memory.
    fn pay(&mut self, bytes: u64) -> Result<(), Fault> {
        self.memory = self.memory.saturating_add(bytes);
        if self.memory > self.limits.metadata_bytes {
            let limit = self.limits.metadata_bytes;
            return Err(Fault::Over { what: "the size of its names and attributes", limit });
        }
        Ok(())
    }

    fn drop_unusable_xattrs(&mut self, entry: &mut Entry) {
        for xattr in std::mem::take(&mut entry.metadata.xattrs) {
            let ours = xattr.name.starts_with(whiteout::OVERLAY_PREFIX);
            if !ours && crate::erofs::can_hold_xattr(&xattr.name) {
                entry.metadata.xattrs.push(xattr);
            } else {
                let path = String::from_utf8_lossy(&entry.path);
                let name = String::from_utf8_lossy(&xattr.name);
                self.note(format!("`{}`: attribute {} left out", path.escape_debug(), name.escape_debug()));
            }
        }
    }

    fn note(&mut self, note: String) {
        if self.notes.len() < MAX_NOTES {
            self.notes.push(note);
        } else {
            self.more_notes += 1;
        }
    }
}
