//! Several layers seen as one file system, as overlayfs shows them, for looking up a few small files.

use std::path::PathBuf;

use super::reader::{Inode, Reader};
use crate::Result;

/// As many as Linux follows.
const MAX_SYMLINKS: u32 = 40;
const PATH_MAX: u64 = 4096;

/// The layers of an image, top first.
pub(crate) struct Stack {
    layers: Vec<Reader>,
}

/// A directory in each layer that has a part in it, top first: (layer, inode).
type Merged = Vec<(usize, Inode)>;

enum Found {
    Nothing,
    Directory(Merged),
    Other(usize, Inode),
}

impl Stack {
    /// Opens the layers, given lowest first.
    pub(crate) fn open(layers: &[PathBuf]) -> Result<Self> {
        let layers = layers.iter().rev().map(|path| Reader::open(path)).collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    /// The content of a regular file, symbolic links followed within the layers.
    pub(crate) fn read_file(&self, path: &[u8], max: u64) -> Result<Option<Vec<u8>>> {
        let mut symlinks = 0;
        let mut pending: Vec<Vec<u8>> = components(path);
        let mut directories: Vec<Merged> = vec![self.root()?];
        while let Some(name) = pending.pop() {
            if name == b".." {
                if directories.len() > 1 {
                    directories.pop();
                }
                continue;
            }
            let Some(directory) = directories.last() else { return Ok(None) };
            match self.lookup(directory, &name)? {
                Found::Directory(merged) => directories.push(merged),
                Found::Other(layer, inode) if inode.is_symlink() => {
                    symlinks += 1;
                    let Some(reader) = self.layers.get(layer).filter(|_| symlinks <= MAX_SYMLINKS) else {
                        return Ok(None);
                    };
                    let target = reader.read(&inode, PATH_MAX)?;
                    if target.starts_with(b"/") {
                        directories.truncate(1);
                    }
                    pending.extend(components(&target));
                }
                Found::Other(layer, inode) if inode.is_file() && pending.is_empty() => {
                    return self.layers.get(layer).map(|reader| reader.read(&inode, max)).transpose();
                }
                Found::Other(..) | Found::Nothing => return Ok(None),
            }
        }
        Ok(None)
    }

    fn root(&self) -> Result<Merged> {
        let mut merged = Vec::new();
        for (layer, reader) in self.layers.iter().enumerate() {
            let root = reader.root()?;
            let opaque = is_opaque(reader, &root)?;
            merged.push((layer, root));
            if opaque {
                break;
            }
        }
        Ok(merged)
    }

    fn lookup(&self, directory: &Merged, name: &[u8]) -> Result<Found> {
        let mut merged: Merged = Vec::new();
        for (layer, part) in directory {
            let Some(reader) = self.layers.get(*layer) else { continue };
            let Some(nid) = reader.lookup(part, name)? else { continue };
            let inode = reader.inode(nid)?;
            if !inode.is_directory() {
                if merged.is_empty() && !inode.is_whiteout() {
                    return Ok(Found::Other(*layer, inode));
                }
                break;
            }
            let opaque = is_opaque(reader, &inode)?;
            merged.push((*layer, inode));
            if opaque {
                break;
            }
        }
        Ok(if merged.is_empty() { Found::Nothing } else { Found::Directory(merged) })
    }
}

fn is_opaque(reader: &Reader, directory: &Inode) -> Result<bool> {
    let xattrs = reader.xattrs(directory)?;
    Ok(xattrs.iter().any(|xattr| xattr.name == b"trusted.overlay.opaque" && xattr.value == b"y"))
}

/// The parts of a path, last one first.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    parts.rev().map(<[u8]>::to_vec).collect()
}
