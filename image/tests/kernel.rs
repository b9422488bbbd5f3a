//! What a real kernel sees in our EROFS files, compared with what GNU tar extracts.
//!
//! Needs root, loop devices and EROFS in the kernel of this machine; says so when something is missing.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::Cursor;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_image::Limits;
use bulkhead_image::layer::convert_tar;
use common::{Layer, noise};
use tar::EntryType;

/// A mount that goes when dropped.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn mount(arguments: &[&str], at: &Path) -> Option<Mount> {
    fs::create_dir_all(at).unwrap();
    let output = Command::new("mount").args(arguments).arg(at).output().ok()?;
    if !output.status.success() {
        eprintln!("SKIPPED: mount {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    Some(Mount(at.to_owned()))
}

fn convert(tar: &[u8], path: &Path) {
    let file = fs::File::create(path).unwrap();
    let (size, notes) = convert_tar(tar, file, Cursor::new(Vec::new()), &Limits::default(), [1; 16]).unwrap();
    assert_eq!(fs::metadata(path).unwrap().len(), size);
    assert!(notes.is_empty(), "{notes:?}");
}

/// All that can be told about a file, but for its inode number.
type Seen = (u32, u32, u32, u64, u64, i64, i64, u64, Vec<u8>, Vec<(OsString, Vec<u8>)>);

fn look(root: &Path) -> BTreeMap<OsString, Seen> {
    let mut seen = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let kind = metadata.file_type();
        let content = match () {
            () if kind.is_dir() => {
                pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                Vec::new()
            }
            () if kind.is_file() => fs::read(&path).unwrap(),
            () if kind.is_symlink() => fs::read_link(&path).unwrap().into_os_string().into_vec(),
            () => Vec::new(),
        };
        let links = if kind.is_dir() { 0 } else { metadata.nlink() };
        let size = if kind.is_dir() { 0 } else { metadata.size() };
        let device = if kind.is_char_device() || kind.is_block_device() { metadata.rdev() } else { 0 };
        seen.insert(
            path.strip_prefix(root).unwrap().as_os_str().to_owned(),
            (
                metadata.mode(),
                metadata.uid(),
                metadata.gid(),
                size,
                links,
                metadata.mtime(),
                metadata.mtime_nsec(),
                device,
                content,
                xattrs(&path),
            ),
        );
    }
    seen
}

fn xattrs(path: &Path) -> Vec<(OsString, Vec<u8>)> {
    let mut names = vec![0; 4096];
    let count = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let names = names[..count].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut found: Vec<_> = names
        .map(|name| {
            let name = OsString::from_vec(name.to_vec());
            let mut value = vec![0; 65536];
            let count = rustix::fs::lgetxattr(path, name.as_os_str(), &mut value[..]).unwrap();
            value.truncate(count);
            (name, value)
        })
        .collect();
    found.sort();
    found
}

fn everything() -> Layer {
    let long_name = "n".repeat(255);
    let deep: String = (0..30).map(|depth| format!("directory-{depth}/")).collect();
    let mut layer = Layer::new()
        .raw(EntryType::Directory, b"./", b"", b"", 0o755, (0, 0))
        .raw(EntryType::Directory, b"tmp/", b"", b"", 0o1777, (0, 0))
        .raw(EntryType::Regular, b"setuid", b"", b"x", 0o6755, (1000, 70_000))
        .raw(EntryType::Regular, b"big-ids", b"", b"x", 0o600, (3_000_000, 4_000_000))
        .raw(EntryType::Regular, b"not-\xff\xfe-utf8", b"", b"x", 0o600, (0, 0))
        .raw(EntryType::Char, b"null", b"", b"", 0o666, (0, 0))
        .raw(EntryType::Block, b"disk", b"", b"", 0o660, (0, 6))
        .raw(EntryType::Fifo, b"pipe", b"", b"", 0o644, (0, 0))
        .file(&format!("long/{long_name}"), b"long")
        .file(&format!("{deep}file"), b"deep")
        .symlink("absolute", "/etc/passwd")
        .symlink("dangling", "../../nowhere")
        .file("replaced", b"first")
        .file("replaced", b"second, longer")
        .file("links/a", b"linked")
        .hard_link("links/b", "links/a")
        .hard_link("./links/c", "./links/b")
        .pax([("mtime", &b"1234567890.123456789"[..])])
        .file("nanoseconds", b"")
        .pax([("mtime", &b"-86400.5"[..])])
        .file("before-1970", b"")
        .pax([
            ("SCHILY.xattr.user.binary", &b"line\nbreak\0=\xff"[..]),
            ("SCHILY.xattr.trusted.thing", &[7_u8; 3000][..]),
            ("SCHILY.xattr.security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        ])
        .file("attributes", &noise(9000))
        .pax([("path", "pax/ünïcode".as_bytes())])
        .file("ignored", b"pax name")
        .pax([("linkpath", "t".repeat(3000).as_bytes())])
        .symlink("long-target", "ignored");
    // Sizes around where data goes: beside the inode, in blocks, both.
    for size in [0, 1, 31, 2047, 2048, 2049, 4031, 4032, 4095, 4096, 4097, 6143, 6144, 6145, 8192, 300_000] {
        layer = layer.file(&format!("sizes/{size}"), &noise(size));
    }
    for index in 0..1000 {
        layer = layer
            .file(&format!("many/file-with-a-rather-long-name-{index:04}"), format!("{index}").as_bytes());
    }
    layer
}

#[test]
fn the_kernel_sees_what_tar_extracts() {
    let scratch = tempfile::tempdir().unwrap();
    let tar = everything().tar();
    let image = scratch.path().join("image.erofs");
    convert(&tar, &image);
    let at = scratch.path().join("mounted");
    let Some(_mount) = mount(&["-t", "erofs", "-o", "loop,ro", image.to_str().unwrap()], &at) else { return };

    let extracted = scratch.path().join("extracted");
    fs::create_dir(&extracted).unwrap();
    fs::write(scratch.path().join("a.tar"), &tar).unwrap();
    let status = Command::new("tar")
        .args(["--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf"])
        .arg(scratch.path().join("a.tar"))
        .arg("-C")
        .arg(&extracted)
        .status()
        .unwrap();
    assert!(status.success());

    let (expected, found) = (look(&extracted), look(&at));
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    // Directories that the archive only implies have the time of extraction with tar; 1970 with us.
    let implied = |path: &OsString| {
        let path = path.to_string_lossy();
        ["long", "links", "pax", "sizes", "many"].contains(&&*path)
            || (path.starts_with("directory-") && !path.ends_with("file"))
    };
    for (path, mut expected) in expected {
        let found = &found[&path];
        if implied(&path) {
            (expected.5, expected.6) = (0, 0);
        }
        assert_eq!(&expected, found, "{}", path.display());
    }
    let listed = fs::read_dir(at.join("many")).unwrap().count();
    assert_eq!(listed, 1000);
}

#[test]
fn overlayfs_understands_the_whiteouts() {
    let scratch = tempfile::tempdir().unwrap();
    let lower = Layer::new()
        .file("gone", b"old")
        .file("gone-directory/a", b"old")
        .file("opaque/old", b"old")
        .file("merged/old", b"old")
        .file("comes-back/old", b"old")
        .file("kept", b"old")
        .tar();
    let upper = Layer::new()
        .file(".wh.gone", b"")
        .file(".wh.gone-directory", b"")
        .file(".wh.never-was", b"")
        .file("opaque/new", b"new")
        .file("opaque/.wh..wh..opq", b"")
        .file("merged/new", b"new")
        .file(".wh.comes-back", b"")
        .file("comes-back/new", b"new")
        .tar();
    let mut mounts = Vec::new();
    for (name, tar) in [("lower", lower), ("upper", upper)] {
        let image = scratch.path().join(format!("{name}.erofs"));
        convert(&tar, &image);
        let at = scratch.path().join(name);
        let Some(mount) = mount(&["-t", "erofs", "-o", "loop,ro", image.to_str().unwrap()], &at) else {
            return;
        };
        mounts.push(mount);
    }
    let at = scratch.path().join("merged");
    let layers = format!("lowerdir={0}/upper:{0}/lower", scratch.path().display());
    let Some(overlay) = mount(&["-t", "overlay", "-o", &layers, "overlay"], &at) else { return };
    let mut found: Vec<OsString> = look(&at).into_keys().collect();
    found.retain(|path| at.join(path).is_file());
    assert_eq!(found, ["comes-back/new", "kept", "merged/new", "merged/old", "opaque/new"]);
    drop(overlay);
}
