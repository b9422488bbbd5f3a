//! Images made for tests.
#![allow(dead_code, missing_docs, clippy::new_without_default, reason = "each test binary uses a part")]

use std::io::Write as _;
use std::path::Path;

use bulkhead_image::Digest;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use tar::{EntryType, Header};

/// A layer's archive under construction.
pub struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    pub fn raw(
        mut self,
        kind: EntryType,
        path: &[u8],
        link: &[u8],
        content: &[u8],
        mode: u32,
        ids: (u64, u64),
    ) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        header.set_uid(ids.0);
        header.set_gid(ids.1);
        header.set_mtime(1_600_000_000 + content.len() as u64 % 3);
        if path.len() > 100 {
            let mut long = Header::new_gnu();
            long.set_entry_type(EntryType::GNULongName);
            long.set_size(path.len() as u64);
            long.set_cksum();
            self.0.append(&long, path).unwrap();
        }
        // Past `set_path`, which refuses just what is to be tested.
        let bytes = header.as_mut_bytes();
        let short = path.len().min(100);
        bytes[..short].copy_from_slice(&path[..short]);
        bytes[157..157 + link.len()].copy_from_slice(link);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub fn file(self, path: &str, content: &[u8]) -> Self {
        self.raw(EntryType::Regular, path.as_bytes(), b"", content, 0o644, (0, 0))
    }

    pub fn directory(self, path: &str) -> Self {
        self.raw(EntryType::Directory, path.as_bytes(), b"", b"", 0o755, (0, 0))
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.raw(EntryType::Symlink, path.as_bytes(), target.as_bytes(), b"", 0o777, (0, 0))
    }

    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.raw(EntryType::Link, path.as_bytes(), target.as_bytes(), b"", 0o644, (0, 0))
    }

    pub fn pax<'a>(mut self, records: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        self.0.append_pax_extensions(records).unwrap();
        self
    }

    pub fn tar(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// An image: layers as plain tar, and as the blobs that carry them.
pub struct TestImage {
    pub name: String,
    pub tars: Vec<Vec<u8>>,
    pub blobs: Vec<Vec<u8>>,
    pub config: Vec<u8>,
}

impl TestImage {
    /// Layers are packed with gzip, zstd and not at all, in turn.
    pub fn new(name: &str, tars: Vec<Vec<u8>>, config: serde_json::Value) -> Self {
        let pack = |(index, tar): (usize, &Vec<u8>)| match index % 3 {
            0 => gzip(tar),
            1 => zstd(tar),
            _ => tar.clone(),
        };
        let blobs = tars.iter().enumerate().map(pack).collect();
        let diff_ids: Vec<String> = tars.iter().map(|tar| Digest::of(tar).to_string()).collect();
        let config = json!({"architecture": "amd64", "os": "linux", "created": "2024-01-01T00:00:00Z",
            "config": config, "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": null});
        Self { name: name.to_owned(), tars, blobs, config: config.to_string().into_bytes() }
    }

    pub fn id(&self) -> Digest {
        Digest::of(&self.config)
    }

    pub fn manifest(&self) -> Vec<u8> {
        let layers: Vec<_> = self
            .blobs
            .iter()
            .map(|blob| descriptor("application/vnd.oci.image.layer.v1.tar+gzip", blob))
            .collect();
        json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &self.config), "layers": layers})
        .to_string()
        .into_bytes()
    }

    /// The members of an OCI layout.
    pub fn oci_members(&self) -> Vec<(String, Vec<u8>)> {
        let manifest = self.manifest();
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": self.name});
        let index = json!({"schemaVersion": 2, "manifests": [entry]});
        let mut members = vec![
            ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
            ("index.json".to_owned(), index.to_string().into_bytes()),
        ];
        for blob in self.blobs.iter().chain([&self.config, &manifest]) {
            members.push((format!("blobs/sha256/{}", Digest::of(blob).hex()), blob.clone()));
        }
        members
    }

    /// The members of what `docker save` writes.
    pub fn docker_members(&self) -> Vec<(String, Vec<u8>)> {
        let config_name = format!("{}.json", self.id().hex());
        let names: Vec<String> = (0..self.tars.len()).map(|index| format!("{index}/layer.tar")).collect();
        let manifest = json!([{"Config": config_name, "RepoTags": [self.name], "Layers": names}]);
        let mut members: Vec<_> = names.into_iter().zip(self.tars.iter().cloned()).collect();
        members.push((config_name, self.config.clone()));
        members.push(("manifest.json".to_owned(), manifest.to_string().into_bytes()));
        members
    }
}

pub fn descriptor(media_type: &str, blob: &[u8]) -> serde_json::Value {
    json!({"mediaType": media_type, "digest": Digest::of(blob).to_string(), "size": blob.len()})
}

pub fn archive(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let start = Layer::new();
    members.iter().fold(start, |layer, (name, content)| layer.file(name, content)).tar()
}

pub fn unpack(members: &[(String, Vec<u8>)], directory: &Path) {
    for (name, content) in members {
        let path = directory.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
}

/// Three layers with users, replaced and removed files.
pub fn sample() -> TestImage {
    let base = Layer::new()
        .directory("./")
        .directory("etc")
        .file("etc/passwd", b"root:x:0:0::/root:/bin/sh\nredis:x:101:102::/var/lib/redis:/bin/sh\n")
        .file("etc/group", b"root:x:0:\nredis:x:102:\nssl:x:7:redis\n")
        .file("gone", b"old")
        .file("replaced", b"old")
        .file("hidden/a", b"old")
        .symlink("link", "etc/../etc/passwd")
        .symlink("loop", "loop")
        .file("bin/big", &vec![0x5a; 300_000])
        .hard_link("bin/big2", "bin/big")
        .tar();
    let middle = Layer::new()
        .file(".wh.gone", b"")
        .file("replaced", b"new")
        .file("hidden/.wh..wh..opq", b"")
        .file("hidden/b", b"new")
        .tar();
    let top = Layer::new().file("data/random", &noise(50_000)).tar();
    let config = json!({"User": "redis", "Env": ["A=b"], "Entrypoint": ["/bin/sh"], "Cmd": null, "WorkingDir": "/data",
        "ExposedPorts": {"6379/tcp": {}}, "Labels": {"a": "b"}, "StopSignal": "SIGQUIT"});
    TestImage::new("sample:1", vec![base, middle, top], config)
}

/// Bytes that do not compress.
pub fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(step).take(count).collect()
}

/// All files below a store, but for the locks.
pub fn files(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else {
                found.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.retain(|name| !name.ends_with("lock"));
    found.sort();
    found
}
