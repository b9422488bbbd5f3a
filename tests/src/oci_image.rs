//! Writes container images as archives: the OCI image layout (image-spec, image-layout.md) and `docker save`'s format.
//! Independent of the code under test on purpose. The same input gives the same bytes.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

/// Files are never newer than this (2024-01-01), so that what scripts create does not change the digests.
const NEWEST: u64 = 1_704_067_200;

/// Who owns what, where it is not root: path from the image's root to user and group id.
pub type Owners = HashMap<PathBuf, (u64, u64)>;

/// One layer, as a tar and as that compressed.
#[derive(Debug)]
pub struct Layer {
    tar: Vec<u8>,
    gzip: Vec<u8>,
}

impl Layer {
    /// A layer of everything in `dir`. Files named `.wh.NAME` become whiteouts by being there (image-spec, layer.md).
    pub fn from_dir(dir: &Path, owners: &Owners) -> Result<Self> {
        Self::from_tar(tar_of(dir, owners)?)
    }

    /// The same in a gzip file that compresses nothing, for tests: in the emulated host that takes ten seconds for a busybox.
    pub fn stored(dir: &Path, owners: &Owners) -> Result<Self> {
        Self::packed(tar_of(dir, owners)?, Compression::none())
    }

    /// A layer of any bytes, good or bad.
    pub fn from_tar(tar: Vec<u8>) -> Result<Self> {
        Self::packed(tar, Compression::new(6))
    }

    fn packed(tar: Vec<u8>, compression: Compression) -> Result<Self> {
        let mut encoder = GzBuilder::new().mtime(0).write(Vec::new(), compression);
        encoder.write_all(&tar)?;
        Ok(Self { gzip: encoder.finish()?, tar })
    }
}

fn tar_of(dir: &Path, owners: &Owners) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut links = HashMap::new();
    add_dir(&mut archive, dir, Path::new(""), owners, &mut links)
        .with_context(|| format!("make a layer of {}", dir.display()))?;
    Ok(archive.into_inner()?)
}

fn add_dir(
    archive: &mut tar::Builder<Vec<u8>>,
    root: &Path,
    dir: &Path,
    owners: &Owners,
    links: &mut HashMap<(u64, u64), PathBuf>,
) -> Result<()> {
    let mut names: Vec<_> = fs::read_dir(root.join(dir))?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    names.sort();
    for name in names {
        let path = dir.join(name);
        let file = root.join(&path);
        let about = fs::symlink_metadata(&file)?;
        let kind = about.file_type();
        let (uid, gid) = owners.get(&path).copied().unwrap_or((0, 0));
        let mut header = Header::new_gnu();
        header.set_mode(about.mode() & 0o7777);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_mtime(u64::try_from(about.mtime()).unwrap_or(0).min(NEWEST));
        header.set_size(0);
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            archive.append_data(&mut header, path.join(""), std::io::empty())?;
            add_dir(archive, root, &path, owners, links)?;
        } else if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            archive.append_link(&mut header, &path, fs::read_link(&file)?)?;
        } else if let Some(first) = links.get(&(about.dev(), about.ino())) {
            header.set_entry_type(EntryType::Link);
            archive.append_link(&mut header, &path, first)?;
        } else if kind.is_file() {
            if about.nlink() > 1 {
                links.insert((about.dev(), about.ino()), path.clone());
            }
            header.set_entry_type(EntryType::Regular);
            header.set_size(about.len());
            archive.append_data(&mut header, &path, fs::File::open(&file)?)?;
        } else if kind.is_fifo() {
            header.set_entry_type(EntryType::Fifo);
            archive.append_data(&mut header, &path, std::io::empty())?;
        } else {
            bail!("{} is neither file, directory, link nor fifo", file.display());
        }
    }
    Ok(())
}

/// An image: its name, its layers (lowest first) and the `config` object of the image-spec (Env, Cmd, User, …).
#[derive(Debug)]
pub struct Image {
    /// Reference that the archives carry, `busybox:latest`.
    pub name: String,
    /// Lowest first.
    pub layers: Vec<Layer>,
    /// image-spec, config.md, property `config`.
    pub config: Value,
}

impl Image {
    fn image_config(&self) -> Vec<u8> {
        let diff_ids: Vec<String> = self.layers.iter().map(|layer| digest(&layer.tar)).collect();
        let created = "2024-01-01T00:00:00Z";
        let history: Vec<Value> = (0..self.layers.len())
            .map(|number| json!({"created": created, "created_by": format!("tests/images/build, layer {number}")}))
            .collect();
        json!({
            "created": created, "architecture": "amd64", "os": "linux", "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": history,
        })
        .to_string()
        .into_bytes()
    }

    /// Writes the OCI image layout, layers gzipped.
    pub fn write_oci(&self, output: impl Write) -> Result<()> {
        let config = self.image_config();
        let descriptor = |kind: &str, bytes: &[u8]| {
            let media_type = format!("application/vnd.oci.image.{kind}");
            json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()})
        };
        let layers: Vec<Value> =
            self.layers.iter().map(|layer| descriptor("layer.v1.tar+gzip", &layer.gzip)).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("config.v1+json", &config), "layers": layers,
        })
        .to_string()
        .into_bytes();
        let mut entry = descriptor("manifest.v1+json", &manifest);
        let tag = self.name.rsplit(':').next().unwrap_or("latest");
        entry["annotations"] = json!({
            "org.opencontainers.image.ref.name": tag,
            "io.containerd.image.name": format!("docker.io/library/{}", self.name),
        });
        entry["platform"] = json!({"architecture": "amd64", "os": "linux"});
        let index = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry],
        });

        let mut archive = tar::Builder::new(output);
        put(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        put(&mut archive, "index.json", index.to_string().as_bytes())?;
        let blobs = self.layers.iter().map(|layer| layer.gzip.as_slice()).chain([&*config, &*manifest]);
        let mut written = Vec::new();
        for blob in blobs {
            let digest = digest(blob);
            if !written.contains(&digest) {
                put(&mut archive, &format!("blobs/{}", digest.replace(':', "/")), blob)?;
                written.push(digest);
            }
        }
        archive.into_inner()?.flush().context("write the image")
    }

    /// Writes what `docker save` of Docker up to 24 writes: layers uncompressed.
    pub fn write_docker(&self, output: impl Write) -> Result<()> {
        let config = self.image_config();
        let hex = |bytes: &[u8]| digest(bytes).replace("sha256:", "");
        let config_name = format!("{}.json", hex(&config));
        let names: Vec<String> =
            self.layers.iter().map(|layer| format!("{}/layer.tar", hex(&layer.tar))).collect();
        let manifest = json!([{"Config": config_name, "RepoTags": [self.name], "Layers": names}]);
        let mut archive = tar::Builder::new(output);
        for (name, layer) in names.iter().zip(&self.layers) {
            put(&mut archive, name, &layer.tar)?;
        }
        put(&mut archive, &config_name, &config)?;
        put(&mut archive, "manifest.json", manifest.to_string().as_bytes())?;
        archive.into_inner()?.flush().context("write the image")
    }
}

fn put(archive: &mut tar::Builder<impl Write>, name: &str, bytes: &[u8]) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_mtime(NEWEST);
    header.set_size(bytes.len() as u64);
    archive.append_data(&mut header, name, bytes).context("write the image")
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn example() -> Image {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/a"), "text").unwrap();
        fs::hard_link(dir.path().join("etc/a"), dir.path().join("etc/b")).unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("etc/c")).unwrap();
        let owners = Owners::from([(PathBuf::from("etc/a"), (7, 8))]);
        let layer = Layer::from_dir(dir.path(), &owners).unwrap();
        Image { name: "x:1".into(), layers: vec![layer], config: json!({"Cmd": ["sh"]}) }
    }

    #[test]
    fn a_layer_keeps_owners_and_links() {
        let image = example();
        let mut archive = tar::Archive::new(image.layers[0].tar.as_slice());
        let found: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let target = entry.link_name().unwrap().map(|name| name.display().to_string());
                (entry.path().unwrap().display().to_string(), entry.header().uid().unwrap(), target)
            })
            .collect();
        let expected = [
            ("etc/".to_string(), 0, None),
            ("etc/a".to_string(), 7, None),
            ("etc/b".to_string(), 0, Some("etc/a".to_string())),
            ("etc/c".to_string(), 0, Some("a".to_string())),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn every_blob_has_its_digest_as_name_and_the_bytes_repeat() {
        let write = || {
            let mut bytes = Vec::new();
            example().write_oci(&mut bytes).unwrap();
            bytes
        };
        let bytes = write();
        assert_eq!(bytes, write());
        let mut blobs = 0;
        for entry in tar::Archive::new(bytes.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut contents = Vec::new();
            entry.read_to_end(&mut contents).unwrap();
            if let Some(hex) = path.strip_prefix("blobs/sha256/") {
                assert_eq!(digest(&contents), format!("sha256:{hex}"));
                blobs += 1;
            }
        }
        assert_eq!(blobs, 3);
    }
}
