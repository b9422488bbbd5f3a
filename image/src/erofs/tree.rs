//! The files of a layer, in memory: all but the content of regular files.

use std::collections::BTreeMap;

/// An index into [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

impl NodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// What every inode has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits with setuid, setgid and sticky.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// Modification time, nanoseconds below a second.
    pub mtime_nsec: u32,
    /// Extended attributes, in the order in which they came.
    pub xattrs: Vec<Xattr>,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// The full name, such as `security.capability`.
    pub name: Vec<u8>,
    /// The value.
    pub value: Vec<u8>,
}

/// Where a regular file's content was put. Made by [`super::Writer::add_file`] alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileData {
    pub(super) size: u64,
    pub(super) first_block: u32,
    /// Where in the tail file the last bytes are, if they go beside the inode.
    pub(super) tail: Option<u64>,
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory: its entries by name.
    Directory(BTreeMap<Vec<u8>, NodeId>),
    /// A regular file.
    File(FileData),
    /// A symbolic link: its target.
    Symlink(Vec<u8>),
    /// A character device: major and minor number. 0:0 is an overlayfs whiteout.
    CharDevice(u32, u32),
    /// A block device: major and minor number.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl Kind {
    /// What overlayfs takes for "this name is not there, whatever the layers below have".
    pub const WHITEOUT: Self = Self::CharDevice(0, 0);
}

#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) metadata: Metadata,
    pub(super) kind: Kind,
}

/// A directory tree. Nodes live until the end, whether still linked or not.
#[derive(Debug, Clone)]
pub struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// A tree of an empty root directory.
    #[must_use]
    pub fn new(root: Metadata) -> Self {
        Self { nodes: vec![Node { metadata: root, kind: Kind::Directory(BTreeMap::new()) }] }
    }

    /// A new inode, in no directory yet; none if there are too many.
    pub fn add(&mut self, metadata: Metadata, kind: Kind) -> Option<NodeId> {
        let id = NodeId(u32::try_from(self.nodes.len()).ok()?);
        self.nodes.push(Node { metadata, kind });
        Some(id)
    }

    /// Links `name` in `directory` to `node`, in place of what it was. Nothing happens if it is not a directory.
    pub fn link(&mut self, directory: NodeId, name: &[u8], node: NodeId) {
        if let Some(entries) = self.entries_mut(directory) {
            entries.insert(name.to_vec(), node);
        }
    }

    /// What `name` in `directory` is.
    #[must_use]
    pub fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        match self.kind(directory)? {
            Kind::Directory(entries) => entries.get(name).copied(),
            _ => None,
        }
    }

    /// What an inode is.
    #[must_use]
    pub fn kind(&self, node: NodeId) -> Option<&Kind> {
        self.nodes.get(node.index()).map(|node| &node.kind)
    }

    /// An inode's metadata, to change.
    pub fn metadata_mut(&mut self, node: NodeId) -> Option<&mut Metadata> {
        self.nodes.get_mut(node.index()).map(|node| &mut node.metadata)
    }

    /// Takes `name` out of `directory`.
    pub fn unlink(&mut self, directory: NodeId, name: &[u8]) {
        if let Some(entries) = self.entries_mut(directory) {
            entries.remove(name);
        }
    }

    fn entries_mut(&mut self, directory: NodeId) -> Option<&mut BTreeMap<Vec<u8>, NodeId>> {
        match &mut self.nodes.get_mut(directory.index())?.kind {
            Kind::Directory(entries) => Some(entries),
            _ => None,
        }
    }

    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }
}
