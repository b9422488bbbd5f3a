//! The small files of the store: names, images, blobs.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ConfigFile, Store, TempFile, lock};
use crate::{Digest, Error, Image, ImageConfig, LayerProof, Reference, Result, User};

/// No configuration, manifest or record is larger, in bytes.
pub(crate) const MAX_DOCUMENT: u64 = 8 << 20;

const VERSION: u32 = 1;

/// `images/<id>.json`: all that `run` needs in one read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) version: u32,
    pub(crate) id: Digest,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) manifest: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) created: Option<String>,
    pub(crate) os: String,
    pub(crate) architecture: String,
    pub(crate) config: ImageConfig,
    /// `config.user` looked up once, so that `run` need not read `/etc/passwd` out of the layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) user: Option<User>,
    pub(crate) layers: Vec<LayerRecord>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) diff_id: Digest,
    pub(crate) size: u64,
    #[serde(flatten)]
    pub(crate) proof: LayerProof,
}

impl Record {
    /// The record of an image all of whose layers are in the store.
    pub(crate) fn new(
        store: &Store,
        id: Digest,
        manifest: Option<Digest>,
        file: ConfigFile,
        layers: Vec<LayerRecord>,
    ) -> Self {
        let ConfigFile { created, architecture, os, config, rootfs: _ } = file;
        let mut record =
            Self { version: VERSION, id, manifest, created, os, architecture, config, user: None, layers };
        // A user that the image does not have is an error of `run`, which may name another one.
        record.user =
            record.clone().into_image(store, None, Vec::new()).resolve_user(&record.config.user).ok();
        record
    }

    pub(crate) fn into_image(self, store: &Store, name: Option<String>, names: Vec<String>) -> Image {
        let layers = self.layers.iter().map(|layer| store.layer_path(&layer.diff_id)).collect();
        let proofs = self.layers.iter().map(|layer| layer.proof).collect();
        Image::new(self.id, (name, names), self.config, (layers, proofs), self.user, self.manifest)
    }

    pub(crate) fn size(&self) -> u64 {
        self.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size))
    }
}

impl Store {
    pub(crate) fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.root.join(format!("layers/sha256/{}.erofs", diff_id.hex()))
    }

    /// The record of a layer that is already there.
    pub(crate) fn existing_layer(&self, diff_id: &Digest) -> Result<Option<LayerRecord>> {
        let path = self.layer_path(diff_id);
        match fs::metadata(&path) {
            Ok(metadata) => {
                let proof = self.proof_of(diff_id)?;
                Ok(Some(LayerRecord { diff_id: *diff_id, size: metadata.len(), proof }))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("look at", &path)(error)),
        }
    }

    /// Where the digests of a layer's file are: the first was written before the file had its name.
    pub(crate) fn proof_path(&self, diff_id: &Digest) -> PathBuf {
        self.root.join(format!("layers/sha256/{}.digest", diff_id.hex()))
    }

    fn proof_of(&self, diff_id: &Digest) -> Result<LayerProof> {
        let path = self.proof_path(diff_id);
        let Some(bytes) = read_small(&path)? else { return Ok(LayerProof::default()) };
        let digest = |line: &str| {
            line.parse()
                .map_err(|_| Error::DamagedStore { path: path.clone(), why: "not a digest".to_owned() })
        };
        let text = String::from_utf8_lossy(&bytes);
        let mut lines = text.lines();
        let content = Some(digest(lines.next().unwrap_or_default())?);
        Ok(LayerProof { content, verity: lines.next().map(digest).transpose()? })
    }

    /// Writes down the digests of a layer's file, a line each.
    pub(crate) fn write_proof(&self, diff_id: &Digest, proof: &LayerProof) -> Result<()> {
        let lines: String =
            [proof.content, proof.verity].iter().flatten().map(|digest| format!("{digest}\n")).collect();
        self.write_small(&self.proof_path(diff_id), lines.as_bytes())
    }

    pub(super) fn record_path(&self, id: &Digest) -> PathBuf {
        self.root.join(format!("images/{}.json", id.hex()))
    }

    pub(super) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join(format!("blobs/sha256/{}", digest.hex()))
    }

    pub(super) fn name_path(&self, name: &str) -> PathBuf {
        self.root.join("names").join(encode_name(name))
    }

    /// The id of the image with exactly this full name.
    pub(super) fn id_of_name(&self, name: &str) -> Result<Option<Digest>> {
        let path = self.name_path(name);
        Ok(read_name(&path)?.filter(|(_, found)| found == name).map(|(id, _)| id))
    }

    pub(super) fn record(&self, id: &Digest) -> Result<Option<Record>> {
        let path = self.record_path(id);
        let Some(bytes) = read_small(&path)? else { return Ok(None) };
        let damaged = |why| Error::DamagedStore { path: path.clone(), why };
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if record.version != VERSION {
            return Err(damaged(format!(
                "version {} is not known, this program knows {VERSION}",
                record.version
            )));
        }
        Ok(Some(record))
    }

    /// Adds an image, from the bottom up.
    pub(crate) fn commit(&self, record: &Record, config: &[u8], manifest: Option<&[u8]>) -> Result<()> {
        self.write_small(&self.blob_path(&record.id), config)?;
        if let (Some(digest), Some(bytes)) = (&record.manifest, manifest) {
            self.write_small(&self.blob_path(digest), bytes)?;
        }
        let json = serde_json::to_vec(record)
            .map_err(|source| Error::BadJson { what: "the image record".to_owned(), source })?;
        self.write_small(&self.record_path(&record.id), &json)
    }

    /// Lets `name` mean `id`, whatever it meant before.
    pub(crate) fn write_name(&self, name: &str, id: &Digest) -> Result<()> {
        self.write_small(&self.name_path(name), format!("{id}\n{name}\n").as_bytes())
    }

    fn write_small(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let what = path.strip_prefix(&self.root).unwrap_or(path).display().to_string();
        let temp = TempFile::named(self)?;
        temp.file()
            .write_all(bytes)
            .and_then(|()| temp.replace(path))
            .map_err(|error| self.write_error(&what, bytes.len() as u64, error))
    }

    /// All names with their ids, sorted by name.
    pub(super) fn names(&self) -> Result<Vec<(String, Digest)>> {
        let mut names = Vec::new();
        for path in list(&self.root.join("names"))? {
            if let Some((id, name)) = read_name(&path)? {
                names.push((name, id));
            }
        }
        names.sort();
        Ok(names)
    }

    /// All image records, unsorted.
    pub(super) fn records(&self) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        for id in self.ids()? {
            // It may be removed in the meantime.
            records.extend(self.record(&id)?);
        }
        Ok(records)
    }

    pub(super) fn ids(&self) -> Result<Vec<Digest>> {
        let paths = list(&self.root.join("images"))?;
        Ok(paths.iter().filter_map(|path| digest_of_file(path, ".json")).collect())
    }

    /// The record that `name` means, and the full name if it was found by name.
    pub(super) fn find(&self, name: &str) -> Result<(Record, Option<String>)> {
        let not_found = || Error::NotFound { name: name.to_owned() };
        let reference = Reference::parse(name);
        if let Ok(reference) = &reference {
            for full in [Some(reference.stored_name()), reference.local_name()].into_iter().flatten() {
                if let Some(id) = self.id_of_name(&full)? {
                    let record = self.record(&id)?.ok_or_else(|| Error::DamagedStore {
                        path: self.name_path(&full),
                        why: format!("it refers to image {id}, which is not there"),
                    })?;
                    return Ok((record, Some(full)));
                }
            }
        }
        let prefix = name.strip_prefix("sha256:").unwrap_or(name);
        if let Some(id) = Digest::from_hex(prefix) {
            return Ok((self.record(&id)?.ok_or_else(not_found)?, None));
        }
        // Two digits are as likely a mistyped name.
        let hex = prefix.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if !hex || prefix.len() < 3 || prefix.len() > 64 {
            return Err(reference.err().unwrap_or_else(not_found));
        }
        let matches: Vec<Digest> =
            self.ids()?.into_iter().filter(|id| id.hex().starts_with(prefix)).collect();
        match matches.as_slice() {
            [] => Err(not_found()),
            [id] => Ok((self.record(id)?.ok_or_else(not_found)?, None)),
            several => Err(Error::Ambiguous { prefix: name.to_owned(), count: several.len() }),
        }
    }
}

/// A file name for an image name. Names are ASCII; those too long for a file name become a hash (the file itself
/// holds the name too).
fn encode_name(name: &str) -> String {
    let mut encoded = String::with_capacity(name.len() + 8);
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'.' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    if encoded.len() > 250 { format!("%{}", Digest::of(name.as_bytes()).hex()) } else { encoded }
}

fn read_name(path: &Path) -> Result<Option<(Digest, String)>> {
    let Some(bytes) = read_small(path)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes);
    let mut lines = text.lines();
    match (lines.next().and_then(|id| id.parse().ok()), lines.next()) {
        (Some(id), Some(name)) => Ok(Some((id, name.to_owned()))),
        _ => Err(Error::DamagedStore { path: path.to_owned(), why: "not an id and a name".to_owned() }),
    }
}

/// The whole of a small file, or none if there is no such file.
fn read_small(path: &Path) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let mut bytes = Vec::with_capacity(4096);
    file.take(MAX_DOCUMENT).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    Ok(Some(bytes))
}

/// The paths in a directory; none if it does not exist.
pub(super) fn list(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", directory)(error)),
    };
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(Error::io("list", directory))).collect()
}

/// The digest in a file name `<hex><suffix>`.
pub(super) fn digest_of_file(path: &Path, suffix: &str) -> Option<Digest> {
    Digest::from_hex(path.file_name()?.to_str()?.strip_suffix(suffix)?)
}

/// Removes a file; gives its size, 0 if it was gone already.
pub(super) fn remove(path: &Path) -> Result<u64> {
    let size = fs::symlink_metadata(path).map_or(0, |metadata| metadata.len());
    match fs::remove_file(path) {
        Ok(()) => lock::sync_directory_of(path).map(|()| size).map_err(Error::io("sync directory of", path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(Error::io("remove", path)(error)),
    }
}
