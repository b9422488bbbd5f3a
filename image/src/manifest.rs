//! OCI indexes and manifests, and what the store makes of them: a plan of one image.

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde::de::DeserializeOwned;

use crate::config::ConfigFile;
use crate::{Digest, Error, Platform, Result};

/// How deep indexes may refer to indexes.
pub(crate) const MAX_NESTING: u32 = 4;

/// One image on its way into the store.
pub(crate) struct Plan {
    pub(crate) id: Digest,
    pub(crate) config_bytes: Vec<u8>,
    pub(crate) config: ConfigFile,
    /// Digest and bytes of the manifest, where there is one.
    pub(crate) manifest: Option<(Digest, Vec<u8>)>,
    pub(crate) names: Vec<String>,
    pub(crate) layers: Vec<PlannedLayer>,
}

/// A layer and where it comes from.
#[derive(Debug, Clone)]
pub(crate) struct PlannedLayer {
    pub(crate) diff_id: Digest,
    /// Absent in docker archives.
    pub(crate) blob: Option<Digest>,
    pub(crate) size: u64,
    /// Its path in an archive.
    pub(crate) path: String,
}

impl Plan {
    /// Puts the parts together. `layers` are the manifest's, lowest first, without their diff ids.
    pub(crate) fn new(
        what: &str,
        config_bytes: Vec<u8>,
        manifest: Option<(Digest, Vec<u8>)>,
        layers: Vec<(Option<Digest>, u64, String)>,
        max_layers: u64,
    ) -> Result<Self> {
        let id = Digest::of(&config_bytes);
        let config: ConfigFile = parse(&format!("the configuration of {what}"), &config_bytes)?;
        let bad = |why| Err(Error::BadImage { what: what.to_owned(), why });
        let diff_ids = &config.rootfs.diff_ids;
        if diff_ids.len() != layers.len() {
            return bad(format!(
                "its configuration names {} layers, it has {}",
                diff_ids.len(),
                layers.len()
            ));
        }
        if layers.is_empty() {
            return bad("it has no layers".to_owned());
        }
        if layers.len() as u64 > max_layers {
            return bad(format!("it has {} layers; {max_layers} are the limit", layers.len()));
        }
        let layers = diff_ids.iter().zip(layers);
        let layers =
            layers.map(|(diff_id, (blob, size, path))| PlannedLayer { diff_id: *diff_id, blob, size, path });
        Ok(Self { id, layers: layers.collect(), config_bytes, config, manifest, names: Vec::new() })
    }

    /// Whether this image can run on `wanted`. Images without a platform are taken on trust.
    pub(crate) fn suits(&self, wanted: &Platform) -> bool {
        let ConfigFile { os, architecture, .. } = &self.config;
        (os.is_empty() && architecture.is_empty()) || wanted.accepts(os, architecture, None)
    }
}

/// Reads a JSON document called `what`.
pub(crate) fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|source| Error::BadJson { what: what.to_owned(), source })
}

/// A descriptor's digest, which must be SHA-256.
pub(crate) fn digest_of(descriptor: &Descriptor) -> Result<Digest> {
    descriptor.digest().to_string().parse()
}

/// What a document that a descriptor or tag refers to is.
pub(crate) enum Document {
    Index(Box<ImageIndex>),
    Manifest(Box<ImageManifest>),
}

impl Document {
    /// Told by its content: `manifests` or `config`. Media types are often absent or wrong in archives.
    pub(crate) fn parse(what: &str, bytes: &[u8]) -> Result<Self> {
        let value: serde_json::Value = parse(what, bytes)?;
        if value.get("manifests").is_some() {
            return Ok(Self::Index(Box::new(parse(what, bytes)?)));
        }
        if value.get("schemaVersion").and_then(serde_json::Value::as_u64) == Some(1) {
            let why = "it is in Docker's schema 1 format of before 2016; push it again with a current tool";
            return Err(Error::BadImage { what: what.to_owned(), why: why.to_owned() });
        }
        Ok(Self::Manifest(Box::new(parse(what, bytes)?)))
    }
}

/// The platform of a descriptor: `os/architecture`, none if it does not say.
pub(crate) fn platform_of(descriptor: &Descriptor) -> Option<(String, String, Option<String>)> {
    let platform = descriptor.platform().as_ref()?;
    Some((platform.os().to_string(), platform.architecture().to_string(), platform.variant().clone()))
}

/// Those of an index that suit a platform, or say nothing about theirs.
pub(crate) fn choose<'a>(
    what: &str,
    index: &'a ImageIndex,
    wanted: &Platform,
) -> Result<Vec<&'a Descriptor>> {
    let suits = |descriptor: &&Descriptor| match platform_of(descriptor) {
        Some((os, architecture, variant)) => wanted.accepts(&os, &architecture, variant.as_deref()),
        None => true,
    };
    let chosen: Vec<&Descriptor> = index.manifests().iter().filter(suits).collect();
    if chosen.is_empty() {
        let show = |(os, architecture, variant): (String, String, Option<String>)| {
            let variant = variant.map_or_else(String::new, |variant| format!("/{variant}"));
            format!("{os}/{architecture}{variant}")
        };
        let mut available: Vec<String> = index.manifests().iter().filter_map(platform_of).map(show).collect();
        // Attestations are listed beside images, on no platform.
        available.retain(|platform| platform != "unknown/unknown");
        available.dedup();
        let available = if available.is_empty() { "nothing".to_owned() } else { available.join(", ") };
        return Err(Error::NoPlatform { what: what.to_owned(), wanted: wanted.to_string(), available });
    }
    Ok(chosen)
}
