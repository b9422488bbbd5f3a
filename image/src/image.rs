//! An image ready to run.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::erofs::Stack;
use crate::{Digest, ImageConfig, Result, User, user};

/// No `/etc/passwd` or `/etc/group` larger than this is looked at, in bytes.
const MAX_USER_FILE: u64 = 4 << 20;

/// By what a layer's EROFS file is known again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerProof {
    /// SHA-256 of its content as it was written; none for a layer from before it was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Digest>,
    /// Its fs-verity digest, if it is sealed: see [`verity`](crate::verity).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verity: Option<Digest>,
}

/// An image of the store, ready to run.
#[derive(Debug, Clone)]
pub struct Image {
    /// The digest of its configuration.
    pub id: Digest,
    /// The full name that it was found by; none if it was found by id.
    pub name: Option<String>,
    /// That name; all of its names in full if it was found by id.
    pub names: Vec<String>,
    /// The defaults for a container.
    pub config: ImageConfig,
    /// Its EROFS files, lowest first.
    pub layers: Vec<PathBuf>,
    /// Of those files, in the same order.
    pub proofs: Vec<LayerProof>,
    /// The digest of the manifest that brought it; none for docker archives.
    pub manifest: Option<Digest>,
    default_user: Option<User>,
}

impl Image {
    pub(crate) fn new(
        id: Digest,
        (name, names): (Option<String>, Vec<String>),
        config: ImageConfig,
        (layers, proofs): (Vec<PathBuf>, Vec<LayerProof>),
        default_user: Option<User>,
        manifest: Option<Digest>,
    ) -> Self {
        Self { id, name, names, config, layers, proofs, manifest, default_user }
    }

    /// The content of a regular file as a container will see it at first, symbolic links followed within the image;
    /// none if there is no such regular file.
    ///
    /// # Errors
    /// Damaged layers; a file larger than 4 MiB.
    pub fn read_file(&self, path: &str) -> Result<Option<Vec<u8>>> {
        Stack::open(&self.layers)?.read_file(path.as_bytes(), MAX_USER_FILE)
    }

    /// The numbers behind `user[:group]`, each a name or a number, as docker finds them. Costs nothing for the
    /// image's own default; otherwise reads `/etc/passwd` and `/etc/group` out of the layers.
    ///
    /// # Errors
    /// Unknown names, numbers out of range, damaged layers.
    pub fn resolve_user(&self, spec: &str) -> Result<User> {
        if let Some(user) = self.default_user.as_ref().filter(|_| spec == self.config.user) {
            return Ok(user.clone());
        }
        let stack = Stack::open(&self.layers)?;
        let text = |path: &[u8]| -> Result<String> {
            let bytes = stack.read_file(path, MAX_USER_FILE)?.unwrap_or_default();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        user::resolve(spec, &text(b"/etc/passwd")?, &text(b"/etc/group")?)
    }

    /// The number of a group given by name or number (`--group-add`).
    ///
    /// # Errors
    /// As [`Image::resolve_user`].
    pub fn resolve_group(&self, spec: &str) -> Result<u32> {
        let bytes = self.read_file("/etc/group")?.unwrap_or_default();
        user::resolve_group(spec, &String::from_utf8_lossy(&bytes))
    }
}
