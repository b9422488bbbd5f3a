//! Archives made to do harm.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;

use std::io::{Cursor, Read, Write as _};

use bulkhead_image::Limits;
use bulkhead_image::erofs::{Inode, Reader};
use bulkhead_image::layer::{Fault, convert_tar};
use common::{Layer, gzip, noise};
use proptest::prelude::*;
use tar::EntryType;

fn limits() -> Limits {
    Limits { layer_bytes: 1 << 20, entries: 1000, metadata_bytes: 1 << 20, ..Limits::default() }
}

fn convert(input: impl Read) -> Result<(Vec<u8>, Vec<String>), Fault> {
    let mut image = Vec::new();
    let (_, notes) =
        convert_tar(input, Cursor::new(&mut image), Cursor::new(Vec::new()), &limits(), [0; 16])?;
    Ok((image, notes))
}

fn refused(layer: Layer, expected: &str) {
    let error = convert(&layer.tar()[..]).unwrap_err();
    assert!(error.to_string().contains(expected), "{error}, not {expected}");
}

/// All paths with their inodes.
fn tree(image: Vec<u8>) -> Vec<(String, Inode, Vec<String>)> {
    let reader = Reader::new(image).unwrap();
    let mut found = Vec::new();
    let mut pending = vec![(String::new(), reader.root().unwrap())];
    while let Some((path, inode)) = pending.pop() {
        if inode.is_directory() {
            for (name, nid) in reader.read_directory(&inode).unwrap() {
                pending
                    .push((format!("{path}/{}", String::from_utf8_lossy(&name)), reader.inode(nid).unwrap()));
            }
        }
        let xattrs = reader.xattrs(&inode).unwrap();
        let xattrs = xattrs.iter().map(|xattr| String::from_utf8_lossy(&xattr.name).into_owned()).collect();
        found.push((path, inode, xattrs));
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

fn paths(layer: Layer) -> Vec<String> {
    tree(convert(&layer.tar()[..]).unwrap().0).into_iter().map(|(path, ..)| path).collect()
}

#[test]
fn nothing_leads_out() {
    for path in ["../a", "a/../../b", "a/..", "..", "/../etc/passwd", "./../x"] {
        refused(Layer::new().file(path, b"x"), "leads out");
        refused(Layer::new().file("a", b"").hard_link("b", path), "leads out");
    }
    assert_eq!(paths(Layer::new().file("/etc/passwd", b"x")), ["", "/etc", "/etc/passwd"]);
    assert_eq!(paths(Layer::new().file("//./a//./b", b"x")), ["", "/a", "/a/b"]);
    // Through symbolic links one stays inside, with the layer's root as `/`.
    let through = Layer::new().symlink("out", "../../../etc").file("out/passwd", b"x");
    assert_eq!(paths(through), ["", "/etc", "/etc/passwd", "/out"]);
    let absolute = Layer::new().symlink("out", "/etc").file("out/passwd", b"x");
    assert_eq!(paths(absolute), ["", "/etc", "/etc/passwd", "/out"]);
    let usual = Layer::new().directory("usr/lib").symlink("lib", "usr/lib").file("lib/x.so", b"x");
    assert_eq!(paths(usual), ["", "/lib", "/usr", "/usr/lib", "/usr/lib/x.so"]);
    refused(Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", b""), "too many symbolic links");
}

#[test]
fn links_are_kept_inside_the_layer() {
    refused(Layer::new().hard_link("a", "etc/shadow"), "which this layer does not have");
    refused(Layer::new().directory("d").hard_link("a", "d"), "hard link to a directory");
    refused(Layer::new().hard_link("a", "/"), "hard link to the root");
    refused(Layer::new().file(".wh.a", b"").hard_link("b", "a"), "which this layer does not have");
    let itself = Layer::new().file("a", b"x").hard_link("a", "a");
    assert_eq!(paths(itself), ["", "/a"]);
    let mut found = tree(convert(&Layer::new().file("a", b"x").hard_link("b", "/a").tar()[..]).unwrap().0);
    let (_, b, _) = found.pop().unwrap();
    let (_, a, _) = found.pop().unwrap();
    assert_eq!((a.nid, a.links), (b.nid, 2));
}

#[test]
fn absurd_names_and_sizes_are_refused() {
    refused(Layer::new().file(&"n".repeat(256), b""), "longer than 255");
    refused(Layer::new().file(&"a/".repeat(600), b""), "depth");
    refused(
        Layer::new().raw(EntryType::Regular, "n/".repeat(2500).as_bytes(), b"", b"", 0, (0, 0)),
        "length of a path",
    );
    refused(Layer::new().pax([("path", &b"a\0b"[..])]).file("x", b""), "NUL");
    refused(Layer::new().raw(EntryType::Regular, b"", b"", b"x", 0, (0, 0)), "replace the root");
    refused(Layer::new().symlink("a", ""), "empty, too long or broken target");
    refused(Layer::new().pax([("linkpath", "t".repeat(5000).as_bytes())]).symlink("a", "x"), "too long");
    refused(Layer::new().pax([("uid", &b"4294967296"[..])]).file("a", b""), "owner");
    refused(
        Layer::new().pax([("size", &b"9223372036854775807"[..])]).file("a", b""),
        "size of its files is more than",
    );
    refused(Layer::new().pax([("size", &b"18446744073709551615"[..])]).file("a", b""), "absurd");
    refused(Layer::new().pax([("GNU.sparse.major", &b"1"[..])]).file("a", b""), "sparse");
    refused(Layer::new().pax([("mtime", &b"1e400"[..])]).file("a", b""), "broken time");
    refused(Layer::new().file("a", b"").file("a/b", b""), "not a directory");
    refused(Layer::new().file(".wh..", b""), "whiteout of nothing");
    let large = noise(700_000);
    refused(Layer::new().file("a", &large).file("b", &large), "size of its files");
    // 1000 files are allowed; each of these needs several directories.
    let many = (0..400).fold(Layer::new(), |layer, index| layer.file(&format!("{index}/a/b"), b""));
    refused(many, "number of its files");
    let attribute = vec![b'x'; 60_000];
    let greedy = (0..30).fold(Layer::new(), |layer, index| {
        layer.pax([("SCHILY.xattr.user.a", &attribute[..])]).file(&index.to_string(), b"")
    });
    refused(greedy, "names and attributes");
}

#[test]
fn a_header_that_promises_eight_exbibytes_reads_nothing() {
    let mut header = tar::Header::new_gnu();
    header.set_path("a").unwrap();
    header.set_size(1 << 62);
    header.set_cksum();
    let error = convert(header.as_bytes().chain(std::io::repeat(0))).unwrap_err();
    assert!(matches!(error, Fault::Over { .. }), "{error}");
    // The same for the archive's own structure.
    header.set_entry_type(EntryType::GNULongName);
    header.set_cksum();
    let error = convert(header.as_bytes().chain(std::io::repeat(b'x'))).unwrap_err();
    assert!(matches!(error, Fault::Over { .. }), "{error}");
}

#[test]
fn device_nodes_and_setuid_are_kept_and_strange_types_left_out() {
    let layer = Layer::new()
        .raw(EntryType::Char, b"null", b"", b"", 0o666, (0, 0))
        .raw(EntryType::Regular, b"su", b"", b"x", 0o4755, (0, 0))
        .raw(EntryType::new(b'V'), b"volume", b"", b"", 0, (0, 0))
        .raw(EntryType::new(b'Z'), b"strange", b"", b"content", 0, (0, 0));
    let (image, notes) = convert(&layer.tar()[..]).unwrap();
    let found = tree(image);
    assert_eq!(found.iter().map(|(path, ..)| path.as_str()).collect::<Vec<_>>(), ["", "/null", "/su"]);
    assert_eq!(found[1].1.device(), Some((1, 3)));
    assert_eq!(found[2].1.mode, 0o104_755);
    assert_eq!(notes.len(), 2, "{notes:?}");
}

#[test]
fn a_layer_cannot_steer_overlayfs() {
    let layer = Layer::new()
        .pax([("SCHILY.xattr.trusted.overlay.redirect", &b"/etc"[..]), ("SCHILY.xattr.user.ok", b"1")])
        .directory("d")
        .pax([("SCHILY.xattr.strange.name", &b"1"[..])])
        .file("f", b"");
    let (image, notes) = convert(&layer.tar()[..]).unwrap();
    let found = tree(image);
    assert_eq!(found[1].2, ["user.ok"]);
    assert!(found[2].2.is_empty());
    assert_eq!(notes.len(), 2, "{notes:?}");
}

#[test]
fn whiteouts_and_entries_of_one_layer_in_any_order() {
    let opaque = |layer: Layer| {
        let found = tree(convert(&layer.tar()[..]).unwrap().0);
        let (_, inode, xattrs) = found.iter().find(|(path, ..)| path == "/d").unwrap().clone();
        (inode.is_directory(), xattrs)
    };
    let hides = (true, vec!["trusted.overlay.opaque".to_owned()]);
    assert_eq!(opaque(Layer::new().file(".wh.d", b"").file("d/a", b"")), hides);
    assert_eq!(opaque(Layer::new().file("d/a", b"").file(".wh.d", b"")), hides);
    assert_eq!(opaque(Layer::new().file("d/.wh..wh..opq", b"").directory("d")), hides);
    assert_eq!(opaque(Layer::new().directory("d").file("d/.wh..wh..plnk", b"")), (true, vec![]));
    let found = tree(
        convert(&Layer::new().file("a", b"x").file(".wh.a", b"").file(".wh.b", b"").tar()[..]).unwrap().0,
    );
    assert!(found[1].1.is_file(), "what the layer itself has stays");
    assert!(found[2].1.is_whiteout());
}

#[test]
fn bombs_end_at_the_limit() {
    let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let mut header = tar::Header::new_gnu();
    header.set_path("zeros").unwrap();
    header.set_size(1 << 40);
    header.set_cksum();
    bomb.write_all(header.as_bytes()).unwrap();
    bomb.write_all(&vec![0; 8 << 20]).unwrap();
    let bomb = bomb.finish().unwrap();
    let error = convert(flate2::read::GzDecoder::new(&bomb[..])).unwrap_err();
    assert!(matches!(error, Fault::Over { .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any change of any bytes gives an image that can be read, or an error; never a panic, never much memory.
    #[test]
    fn mutated_archives(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        fix_checksums: bool,
        cut in any::<prop::sample::Index>(),
        cut_it: bool,
    ) {
        let mut bytes = Layer::new()
            .directory("d")
            .file("d/file", &noise(3000))
            .pax([("SCHILY.xattr.user.a", &b"value"[..]), ("mtime", b"12.5"), ("size", b"700")])
            .file("pax", &noise(700))
            .symlink("link", "d")
            .hard_link("d/hard", "d/file")
            .file(&"long/".repeat(30), b"")
            .raw(EntryType::Char, b"null", b"", b"", 0o666, (0, 0))
            .file(".wh.gone", b"")
            .tar();
        for (index, value) in changes {
            let at = index.index(bytes.len());
            bytes[at] = value;
        }
        if fix_checksums {
            for block in bytes.chunks_exact_mut(512) {
                if block[257..262] == *b"ustar" {
                    block[148..156].fill(b' ');
                    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
                    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                }
            }
        }
        if cut_it {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok((image, _)) = convert(&bytes[..]) {
            prop_assert!(image.len() < 4 << 20);
            tree(image);
        }
    }

    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = convert(&bytes[..]);
        let _ = convert(flate2::read::GzDecoder::new(&gzip(&bytes)[..]));
    }
}
