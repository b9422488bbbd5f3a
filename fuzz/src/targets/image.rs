//! Images: archives, layers, manifests and names, all of strangers.

use std::cell::OnceCell;
use std::io::{Cursor, Read, Write};
use std::path::Path;

use bulkhead_image::erofs::{Inode, Reader};
use bulkhead_image::layer::convert_tar;
use bulkhead_image::progress::Silent;
use bulkhead_image::{Digest, Limits, LoadOptions, Reference, Source, Store, fuzzing};
use flate2::Compression;
use flate2::write::GzEncoder;
use tar::{EntryType, Header};
use tempfile::TempDir;

use super::devices::memory_file;
use crate::{Seed, Target, seed};

/// A layer's tar.
pub const LAYER: Target = Target {
    name: "layer",
    surface: "a layer's tar archive, made an EROFS image, which is read back whole",
    run: |data| convert(data),
    seeds: layer_seeds,
};
/// The same, compressed.
pub const LAYER_BLOB: Target = Target {
    name: "layer-blob",
    surface: "a layer's gzip or zstd",
    run: |data| {
        let mut expanded = Vec::new();
        // What comes of it is the other target's affair; here it must come, or end.
        if let Ok(reader) = fuzzing::decode(data) {
            let _ = reader.take(1 << 20).read_to_end(&mut expanded);
        }
        convert(&expanded);
    },
    seeds: || {
        let tar = Layer::default().file("f", &[7; 3000]).tar();
        let zstd = ruzstd::encoding::compress_to_vec(&tar[..], ruzstd::encoding::CompressionLevel::Fastest);
        let raw =
            ruzstd::encoding::compress_to_vec(&tar[..], ruzstd::encoding::CompressionLevel::Uncompressed);
        vec![
            seed("gzip", gzip(&tar)),
            seed("two members of gzip", [gzip(&tar[..512]), gzip(&tar[512..])].concat()),
            seed("zstd", zstd.clone()),
            seed("zstd, not packed", raw),
            seed("zstd after a frame to skip", [b"\x50\x2a\x4d\x18\x03\0\0\0abc".to_vec(), zstd].concat()),
            seed("xz", b"\xfd7zXZ\0".to_vec()),
        ]
    },
};
/// An EROFS image of a store that somebody has damaged.
pub const EROFS: Target = Target {
    name: "erofs",
    surface: "a damaged EROFS image of the store, read for users and groups",
    run: |data| {
        let mut image = data.to_vec();
        fuzzing::correct_erofs_checksum(&mut image);
        walk(image);
    },
    seeds: || {
        layer_seeds()
            .into_iter()
            .filter_map(|one| Some(seed(one.name, convert_to_image(&one.bytes)?)))
            .collect()
    },
};
/// An archive of images.
pub const ARCHIVE: Target = Target {
    name: "image-archive",
    surface: "an archive of images: its index, manifests and configurations, loaded into a store",
    run: archive,
    seeds: archive_seeds,
};
/// Manifests and the like by themselves.
pub const DOCUMENTS: Target = Target {
    name: "image-documents",
    surface: "manifests, configurations, references, digests, /etc/passwd of an image",
    run: documents,
    seeds: || {
        let config = r#"{"architecture":"amd64","os":"linux","config":{"Cmd":null,"Env":["A=b"],"User":"a:b"},"rootfs":{"diff_ids":[]}}"#;
        let index = r#"{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:4355a46b19d348dc2f57c046f8ef63d4538ebb936000f3c9ee954a27460dd865","size":2,"platform":{"os":"linux","architecture":"amd64"}}]}"#;
        let first = |kind: u8, text: &str| [vec![kind], text.as_bytes().to_vec()].concat();
        vec![
            seed("a configuration", first(0, config)),
            seed("an index", first(0, index)),
            seed("schema 1", first(0, r#"{"schemaVersion":1}"#)),
            seed(
                "a reference",
                first(
                    1,
                    "registry.example:5000/a/b:tag@sha256:4355a46b19d348dc2f57c046f8ef63d4538ebb936000f3c9ee954a27460dd865",
                ),
            ),
            seed(
                "a user",
                first(
                    2,
                    "redis:adm\0root:x:0:0::/root:/bin/sh\nredis:x:999:1000::/h:/bin/false\n\0adm:x:4:redis\n",
                ),
            ),
        ]
    },
};

fn limits() -> Limits {
    Limits {
        layer_bytes: 1 << 20,
        entries: 2000,
        metadata_bytes: 1 << 20,
        path_len: 4096,
        depth: 64,
        ..Limits::default()
    }
}

fn convert_to_image(tar: &[u8]) -> Option<Vec<u8>> {
    let mut image = Vec::new();
    let tails = Cursor::new(Vec::new());
    let (size, notes) = convert_tar(tar, Cursor::new(&mut image), tails, &limits(), [7; 16]).ok()?;
    assert_eq!(size, image.len() as u64);
    assert!(notes.len() <= 6, "{} remarks", notes.len());
    Some(image)
}

fn convert(tar: &[u8]) {
    let Some(image) = convert_to_image(tar) else { return };
    assert!(image.len() as u64 <= (4 << 20) + tar.len() as u64 * 8, "an image of {} bytes", image.len());
    assert_eq!(Some(&image), convert_to_image(tar).as_ref(), "the same layer gave other bytes");
    let reader = Reader::new(image).expect("an image of ours that is none");
    let mut seen = 0;
    read_all(&reader, &reader.root().expect("an image without a root"), &mut seen);
}

/// All of an image of ours can be read.
fn read_all(reader: &Reader<Vec<u8>>, directory: &Inode, seen: &mut u32) {
    let names = reader.read_directory(directory).expect("a directory of ours");
    assert!(names.windows(2).all(|pair| pair[0].0 < pair[1].0), "names out of order");
    for (name, nid) in names {
        assert!(!name.is_empty() && !name.contains(&b'/') && name != b"." && name != b"..");
        let inode = reader.inode(nid).expect("an inode of ours");
        reader.xattrs(&inode).expect("attributes of ours");
        *seen += 1;
        if inode.is_directory() {
            read_all(reader, &inode, seen);
        } else if inode.is_file() || inode.is_symlink() {
            reader.read(&inode, 1 << 20).expect("content of ours");
        }
    }
}

/// Nothing that is read of it makes it panic, or go round for ever.
fn walk(image: Vec<u8>) {
    let length = image.len();
    let Ok(reader) = Reader::new(image) else { return };
    let mut pending: Vec<Inode> = reader.root().into_iter().collect();
    let mut budget = 200;
    while let Some(inode) = pending.pop() {
        if let Ok(content) = reader.read(&inode, 1 << 20) {
            assert!(content.len() <= length, "more content than there is");
        }
        let _ = reader.xattrs(&inode);
        for (name, nid) in reader.read_directory(&inode).unwrap_or_default() {
            budget -= 1;
            if budget <= 0 {
                return;
            }
            if budget % 50 == 0 {
                let _ = reader.lookup(&inode, &name);
            }
            pending.extend(reader.inode(nid));
        }
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("memory");
    encoder.finish().expect("memory")
}

/// An archive under construction.
#[derive(Default)]
pub(super) struct Layer(Vec<u8>);

impl Layer {
    pub(super) fn raw(mut self, kind: EntryType, path: &[u8], link: &[u8], content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o4755);
        header.set_mtime(1_600_000_000);
        header.set_uid(7);
        header.set_gid(8);
        let bytes = header.as_mut_bytes();
        bytes[..path.len().min(100)].copy_from_slice(&path[..path.len().min(100)]);
        bytes[157..157 + link.len().min(100)].copy_from_slice(&link[..link.len().min(100)]);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(1).expect("a header with devices");
            header.set_device_minor(3).expect("a header with devices");
        }
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn file(self, path: &str, content: &[u8]) -> Self {
        self.raw(EntryType::Regular, path.as_bytes(), b"", content)
    }

    pub(super) fn tar(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

fn layer_seeds() -> Vec<Seed> {
    let pax = |text: &str| Layer::default().raw(EntryType::XHeader, b"pax", b"", text.as_bytes());
    let long = "long/".repeat(30);
    vec![
        seed("a file", Layer::default().file("d/f", b"content").tar()),
        seed(
            "one of each",
            Layer::default()
                .raw(EntryType::Directory, b"d/", b"", b"")
                .file("d/f", &[9; 1000])
                .raw(EntryType::Symlink, b"l", b"d", b"")
                .raw(EntryType::Link, b"d/h", b"d/f", b"")
                .raw(EntryType::Char, b"null", b"", b"")
                .raw(EntryType::Fifo, b"fifo", b"", b"")
                .tar(),
        ),
        seed("whiteouts", Layer::default().file(".wh.gone", b"").file("d/.wh..wh..opq", b"").tar()),
        seed("attributes", pax("23 SCHILY.xattr.user.a=b\n12 mtime=5.25\n").file("f", b"").tar()),
        seed("a size in a pax header", pax("9 size=5\n").file("f", b"12345").tar()),
        seed("a long name", {
            let name = Layer::default().raw(EntryType::GNULongName, b"././@LongLink", b"", long.as_bytes());
            name.file("short", b"x").tar()
        }),
        seed("links in a circle", {
            let one = Layer::default().raw(EntryType::Symlink, b"a", b"b", b"");
            one.raw(EntryType::Symlink, b"b", b"a", b"").file("a/f", b"").tar()
        }),
        seed("out of the root", Layer::default().file("../f", b"").tar()),
        seed("no end", Layer::default().file("f", b"x").0),
    ]
}

struct Place {
    place: TempDir,
}

thread_local! {
    static PLACE: OnceCell<Place> = const { OnceCell::new() };
}

fn archive(data: &[u8]) {
    PLACE.with(|place| {
        let Place { place } = place.get_or_init(|| Place {
            place: tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory"),
        });
        let root = place.path().join("store");
        let store = Store::open(&root).expect("a store").with_limits(limits());
        let mut data = data.to_vec();
        correct_tar(&mut data);
        let (_file, path) = memory_file(&data);
        let loaded = store.load(&Source::Path(path), &LoadOptions::default(), &Silent);
        match loaded {
            Ok(images) => {
                for image in images {
                    let found = store.resolve(&image.id.to_string()).expect("an image that was loaded");
                    let _ = found.resolve_user("");
                }
                std::fs::remove_dir_all(&root).expect("a store");
            }
            Err(_) => {
                let left = |part: &str| entries(&root.join(part));
                assert_eq!(
                    left("layers/sha256") + left("images") + left("names") + left("tmp"),
                    0,
                    "a failed load left something"
                );
            }
        }
    });
}

fn entries(directory: &Path) -> usize {
    std::fs::read_dir(directory).map_or(0, Iterator::count)
}

/// Makes the checksums of all headers right.
fn correct_tar(bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(512) {
        if block[257..262] == *b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

fn archive_seeds() -> Vec<Seed> {
    let layer = Layer::default().file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n").tar();
    let diff_id = Digest::of(&layer).to_string();
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"User":"root"}},"rootfs":{{"type":"layers","diff_ids":["{diff_id}"]}}}}"#
    );
    let docker = Layer::default()
        .file("manifest.json", br#"[{"Config":"config.json","RepoTags":["a:b"],"Layers":["layer.tar"]}]"#)
        .file("config.json", config.as_bytes())
        .file("layer.tar", &layer);
    let blob = |bytes: &[u8]| format!("blobs/sha256/{}", Digest::of(bytes).hex());
    let descriptor = |kind: &str, bytes: &[u8]| {
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.{kind}","digest":"{}","size":{}}}"#,
            Digest::of(bytes),
            bytes.len()
        )
    };
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#,
        descriptor("config.v1+json", config.as_bytes()),
        descriptor("layer.v1.tar", &layer)
    );
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
        descriptor("manifest.v1+json", manifest.as_bytes())
    );
    let oci = Layer::default()
        .file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
        .file("index.json", index.as_bytes())
        .file(&blob(manifest.as_bytes()), manifest.as_bytes())
        .file(&blob(config.as_bytes()), config.as_bytes())
        .file(&blob(&layer), &layer);
    vec![
        seed("of docker", docker.tar()),
        seed("an OCI layout", oci.tar()),
        seed("neither", Layer::default().file("f", b"x").tar()),
        seed("links in a circle", {
            let one = Layer::default().raw(EntryType::Symlink, b"index.json", b"manifest.json", b"");
            one.raw(EntryType::Symlink, b"manifest.json", b"index.json", b"").tar()
        }),
    ]
}

fn documents(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(rest);
    match kind % 3 {
        0 => fuzzing::documents(rest),
        1 => {
            if let Ok(reference) = Reference::parse(&text) {
                let name = reference.to_string();
                let again = Reference::parse(&name).expect("a name that we write and do not read");
                assert_eq!(again.to_string(), name);
            }
            if let Ok(digest) = text.parse::<Digest>() {
                assert_eq!(digest.to_string().parse::<Digest>().ok(), Some(digest));
            }
        }
        _ => {
            let mut parts = text.splitn(3, '\0');
            let mut part = || parts.next().unwrap_or_default().to_owned();
            let (spec, passwd, group) = (part(), part(), part());
            if let Ok(user) = fuzzing::resolve_user(&spec, &passwd, &group) {
                assert!(!user.additional_gids.is_empty());
            }
        }
    }
}
