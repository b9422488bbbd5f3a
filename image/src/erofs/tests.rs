//! Trees written and read back.

use std::collections::BTreeMap;
use std::io::{Cursor, Read as _};
use std::process::Command;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;

use super::*;

/// A file as a test describes it.
#[derive(Debug, Clone)]
enum Spec {
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Device(u32, u32),
    Fifo,
    Directory(BTreeMap<Vec<u8>, (Metadata, Spec)>),
}

fn build(directory: &BTreeMap<Vec<u8>, (Metadata, Spec)>) -> Vec<u8> {
    let mut image = Vec::new();
    let mut writer = Writer::new(Cursor::new(&mut image), Cursor::new(Vec::new())).unwrap();
    let mut tree = Tree::new(Metadata { permissions: 0o755, ..Metadata::default() });
    fill(&mut writer, &mut tree, NodeId::ROOT, directory);
    let size = writer.finish(&tree, [7; 16]).unwrap();
    assert_eq!(size, image.len() as u64);
    image
}

fn fill<W: std::io::Write + std::io::Seek>(
    writer: &mut Writer<W, Cursor<Vec<u8>>>,
    tree: &mut Tree,
    at: NodeId,
    directory: &BTreeMap<Vec<u8>, (Metadata, Spec)>,
) {
    for (name, (metadata, spec)) in directory {
        let kind = match spec {
            Spec::File(content) => {
                let size = content.len() as u64;
                Kind::File(writer.add_file(&mut content.as_slice(), size, &metadata.xattrs).unwrap())
            }
            Spec::Symlink(target) => Kind::Symlink(target.clone()),
            Spec::Device(major, minor) => Kind::CharDevice(*major, *minor),
            Spec::Fifo => Kind::Fifo,
            Spec::Directory(_) => Kind::Directory(BTreeMap::new()),
        };
        let node = tree.add(metadata.clone(), kind).unwrap();
        tree.link(at, name, node);
        if let Spec::Directory(inner) = spec {
            fill(writer, tree, node, inner);
        }
    }
}

fn check(reader: &Reader<Vec<u8>>, inode: &Inode, expected: &BTreeMap<Vec<u8>, (Metadata, Spec)>) {
    let entries = reader.read_directory(inode).unwrap();
    let names: Vec<_> = entries.iter().map(|(name, _)| name).collect();
    assert_eq!(names, expected.keys().collect::<Vec<_>>());
    for ((name, nid), (metadata, spec)) in entries.iter().zip(expected.values()) {
        assert_eq!(reader.lookup(inode, name).unwrap(), Some(*nid));
        let found = reader.inode(*nid).unwrap();
        assert_eq!(found.mode & 0o7777, metadata.permissions);
        assert_eq!((found.uid, found.gid), (metadata.uid, metadata.gid));
        assert_eq!(found.mtime, (metadata.mtime, metadata.mtime_nsec));
        assert_eq!(reader.xattrs(&found).unwrap(), metadata.xattrs);
        match spec {
            Spec::File(content) => {
                assert!(found.is_file() && reader.read(&found, 1 << 20).unwrap() == *content)
            }
            Spec::Symlink(target) => {
                assert!(found.is_symlink());
                assert_eq!(reader.read(&found, 4096).unwrap(), *target);
            }
            Spec::Device(major, minor) => assert_eq!(found.device(), Some((*major, *minor))),
            Spec::Fifo => assert_eq!(found.mode & 0o170_000, 0o010_000),
            Spec::Directory(inner) => {
                let directories =
                    inner.values().filter(|(_, spec)| matches!(spec, Spec::Directory(_))).count();
                assert_eq!(found.links as usize, 2 + directories);
                check(reader, &found, inner);
            }
        }
    }
}

fn xattr() -> impl Strategy<Value = Xattr> {
    let name = prop_oneof![
        "user\\.[a-z]{1,20}".prop_map(String::into_bytes),
        "trusted\\.[a-z]{1,20}".prop_map(String::into_bytes),
        Just(b"security.capability".to_vec()),
    ];
    let value = prop_oneof![
        4 => proptest::collection::vec(any::<u8>(), 0..40),
        1 => proptest::collection::vec(any::<u8>(), 0..6000),
    ];
    (name, value).prop_map(|(name, value)| Xattr { name, value })
}

fn metadata() -> impl Strategy<Value = Metadata> {
    let ids = prop_oneof![3 => 0..1000_u32, 1 => any::<u32>()];
    let times = prop_oneof![3 => Just((1_700_000_000, 0)), 1 => (any::<i64>(), 0..1_000_000_000_u32)];
    let xattrs = prop_oneof![3 => Just(Vec::new()), 1 => proptest::collection::vec(xattr(), 0..4)];
    (0..=0o7777_u16, ids.clone(), ids, times, xattrs).prop_map(
        |(permissions, uid, gid, (mtime, mtime_nsec), xattrs)| Metadata {
            permissions,
            uid,
            gid,
            mtime,
            mtime_nsec,
            xattrs,
        },
    )
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_filter("no NUL, no slash", |byte| *byte != 0 && *byte != b'/');
    let length = prop_oneof![8 => 1..12_usize, 1 => 1..=255_usize];
    let bytes = length.prop_flat_map(move |length| proptest::collection::vec(byte.clone(), length));
    bytes.prop_filter("taken", |name| name != b"." && name != b"..")
}

fn spec() -> impl Strategy<Value = Spec> {
    let size = prop_oneof![4 => 0..5000_usize, 1 => prop_oneof![Just(0), Just(4096), Just(8192), Just(2048), Just(4095)],
                           1 => 0..30_000_usize];
    let file = (size, any::<u8>()).prop_map(|(size, seed)| {
        Spec::File((0..size).map(|index| (index as u8).wrapping_mul(31) ^ seed).collect())
    });
    let leaf = prop_oneof![
        6 => file,
        2 => proptest::collection::vec(1..=255_u8, 1..60).prop_map(Spec::Symlink),
        1 => proptest::collection::vec(1..=255_u8, 2000..4095).prop_map(Spec::Symlink),
        1 => (0..4096_u32, 0..1_048_576_u32).prop_map(|(major, minor)| Spec::Device(major, minor)),
        1 => Just(Spec::Fifo),
    ];
    leaf.prop_recursive(4, 60, 30, |inner| {
        proptest::collection::btree_map(name(), (metadata(), inner), 0..30).prop_map(Spec::Directory)
    })
}

fn directory() -> impl Strategy<Value = BTreeMap<Vec<u8>, (Metadata, Spec)>> {
    proptest::collection::btree_map(name(), (metadata(), spec()), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_written_is_read_back(directory in directory()) {
        let image = build(&directory);
        prop_assert_eq!(&image, &build(&directory), "deterministic");
        let reader = Reader::new(image).unwrap();
        let root = reader.root().unwrap();
        check(&reader, &root, &directory);
    }

    #[test]
    fn damaged_images_never_panic(directory in directory(), changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..50)) {
        let mut image = build(&directory);
        for (index, value) in changes {
            // Block 0 has a checksum; it would hide everything behind it.
            if image.len() > 4096 {
                let at = 4096 + index.index(image.len() - 4096);
                image[at] = value;
            }
        }
        let reader = Reader::new(image).unwrap();
        let mut pending: Vec<Inode> = reader.root().into_iter().collect();
        let mut budget = 500;
        while let Some(inode) = pending.pop() {
            let _ = (reader.read(&inode, 1 << 20), reader.xattrs(&inode));
            for (_, nid) in reader.read_directory(&inode).unwrap_or_default() {
                budget -= 1;
                pending.extend(reader.inode(nid).into_iter().filter(|_| budget > 0));
            }
        }
    }
}

#[test]
fn large_directories_and_many_links() {
    let mut tree = Tree::new(Metadata::default());
    let mut image = Vec::new();
    let mut writer = Writer::new(Cursor::new(&mut image), Cursor::new(Vec::new())).unwrap();
    let data = writer.add_file(&mut std::io::repeat(b'x').take(10), 10, &[]).unwrap();
    let node = tree.add(Metadata::default(), Kind::File(data)).unwrap();
    // More than a compact inode can count.
    for index in 0..70_000 {
        tree.link(NodeId::ROOT, format!("link-{index:06}").as_bytes(), node);
    }
    writer.finish(&tree, [0; 16]).unwrap();
    let reader = Reader::new(image).unwrap();
    let root = reader.root().unwrap();
    let entries = reader.read_directory(&root).unwrap();
    assert_eq!(entries.len(), 70_000);
    assert!(entries.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 == pair[1].1));
    assert_eq!(reader.inode(entries[0].1).unwrap().links, 70_000);
}

#[test]
fn short_content_is_an_error() {
    let mut writer = Writer::new(Cursor::new(Vec::new()), Cursor::new(Vec::new())).unwrap();
    assert!(matches!(writer.add_file(&mut &b"abc"[..], 4, &[]), Err(WriteError::Input(_))));
}

#[test]
fn fsck_agrees() {
    if Command::new("fsck.erofs").arg("--help").output().is_err() {
        eprintln!("SKIPPED: no fsck.erofs (apt-get install erofs-utils)");
        return;
    }
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy = directory();
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("image.erofs");
    for _ in 0..12 {
        let directory = strategy.new_tree(&mut runner).unwrap().current();
        std::fs::write(&path, build(&directory)).unwrap();
        let output = Command::new("fsck.erofs").arg(&path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}
