//! OCI image layouts: `index.json` and `blobs/`.

use oci_spec::image::{Descriptor, ImageIndex};

use super::archive::{Members, bad, blob_path};
use crate::manifest::{Document, MAX_NESTING, Plan, choose, digest_of};
use crate::{Error, Limits, Platform, Reference, Result};

const REF_NAME: &str = "org.opencontainers.image.ref.name";
const FULL_NAME: &str = "io.containerd.image.name";

/// The images of the layout for a platform. `stem` is what the archive is called, for images that only have a tag.
pub(super) fn plans(
    members: &Members,
    index: &[u8],
    platform: &Platform,
    stem: Option<&str>,
    limits: &Limits,
) -> Result<Vec<Plan>> {
    let index: ImageIndex = crate::manifest::parse("index.json", index)?;
    if index.manifests().is_empty() {
        return Err(bad("index.json", "it lists no images"));
    }
    let mut plans: Vec<Plan> = Vec::new();
    for descriptor in choose("the archive", &index, platform)? {
        let name = name_of(descriptor, stem)?;
        let found = plan(members, descriptor, platform, limits, MAX_NESTING)?;
        for mut plan in found {
            plan.names.extend(name.clone());
            match plans.iter_mut().find(|other| other.id == plan.id) {
                Some(other) => other.names.append(&mut plan.names),
                None => plans.push(plan),
            }
        }
    }
    // Where the index did not say, the configuration does.
    let unsuitable: Vec<String> = plans
        .iter()
        .filter(|plan| !plan.suits(platform))
        .map(|plan| format!("{}/{}", plan.config.os, plan.config.architecture))
        .collect();
    plans.retain(|plan| plan.suits(platform));
    if plans.is_empty() {
        let available = unsuitable.join(", ");
        return Err(Error::NoPlatform {
            what: "the archive".to_owned(),
            wanted: platform.to_string(),
            available,
        });
    }
    Ok(plans)
}

fn plan(
    members: &Members,
    descriptor: &Descriptor,
    platform: &Platform,
    limits: &Limits,
    nesting: u32,
) -> Result<Vec<Plan>> {
    let digest = digest_of(descriptor)?;
    let what = format!("manifest {digest}");
    let bytes = members.read_blob(&digest)?;
    match Document::parse(&what, &bytes)? {
        Document::Index(index) => {
            let nesting =
                nesting.checked_sub(1).ok_or_else(|| bad(&what, "indexes are nested too deeply"))?;
            let mut plans = Vec::new();
            for inner in choose(&what, &index, platform)? {
                plans.extend(plan(members, inner, platform, limits, nesting)?);
            }
            Ok(plans)
        }
        Document::Manifest(manifest) => {
            let config = members.read_blob(&digest_of(manifest.config())?)?;
            let layer = |layer: &Descriptor| {
                let blob = digest_of(layer)?;
                Ok((Some(blob), layer.size(), blob_path(&blob)))
            };
            let layers = manifest.layers().iter().map(layer).collect::<Result<_>>()?;
            let plan =
                Plan::new(&format!("image {digest}"), config, Some((digest, bytes)), layers, limits.layers)?;
            Ok(vec![plan])
        }
    }
}

/// The full name of an image. `ref.name` may be a whole name (skopeo, podman) or only a tag (umoci, buildkit); then
/// the archive's own name is the repository.
fn name_of(descriptor: &Descriptor, stem: Option<&str>) -> Result<Option<String>> {
    let annotation = |key| descriptor.annotations().as_ref().and_then(|annotations| annotations.get(key));
    if let Some(name) = annotation(FULL_NAME) {
        return Ok(Some(Reference::parse(name)?.stored_name()));
    }
    let Some(name) = annotation(REF_NAME) else { return Ok(None) };
    if name.contains(['/', ':']) {
        return Ok(Some(Reference::parse(name)?.stored_name()));
    }
    let Some(stem) = stem else { return Ok(None) };
    let repository = stem.to_ascii_lowercase();
    Ok(Reference::parse(&format!("localhost/{repository}:{name}")).ok().map(|name| name.stored_name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(annotations: &str, stem: Option<&str>) -> Option<String> {
        let digest = crate::Digest::of(b"");
        let descriptor: Descriptor = serde_json::from_str(&format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":1,"annotations":{annotations}}}"#
        ))
        .unwrap();
        name_of(&descriptor, stem).unwrap()
    }

    #[test]
    fn names_come_from_annotations() {
        let full =
            r#"{"io.containerd.image.name":"docker.io/library/a:1","org.opencontainers.image.ref.name":"1"}"#;
        assert_eq!(name(full, None).as_deref(), Some("docker.io/library/a:1"));
        let whole = r#"{"org.opencontainers.image.ref.name":"busybox:1"}"#;
        assert_eq!(name(whole, Some("x")).as_deref(), Some("docker.io/library/busybox:1"));
        let tag = r#"{"org.opencontainers.image.ref.name":"latest"}"#;
        assert_eq!(name(tag, Some("busybox")).as_deref(), Some("localhost/busybox:latest"));
        assert_eq!(name(tag, None), None);
        assert_eq!(name(tag, Some("not a name")), None);
        assert_eq!(name("{}", Some("busybox")), None);
    }
}
