//! What `docker save` writes: `manifest.json`, configurations and layers.

use serde::Deserialize;

use super::archive::{Members, bad};
use crate::manifest::{Plan, parse};
use crate::{Digest, Error, Limits, Platform, Reference, Result};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

pub(super) fn plans(
    members: &Members,
    manifest: &[u8],
    platform: &Platform,
    limits: &Limits,
) -> Result<Vec<Plan>> {
    let items: Vec<Item> = parse("manifest.json", manifest)?;
    if items.is_empty() {
        return Err(bad("manifest.json", "it lists no images"));
    }
    items.into_iter().map(|item| plan(members, item, platform, limits)).collect()
}

fn plan(members: &Members, item: Item, platform: &Platform, limits: &Limits) -> Result<Plan> {
    let missing = |name: &str| bad(name, "manifest.json refers to it, but it is missing from the archive");
    let config = members.read_member(&item.config)?.ok_or_else(|| missing(&item.config))?;
    // Its name is its digest: `<hex>.json`, or a blob path. Other names promise nothing.
    let name = item.config.rsplit('/').next().unwrap_or_default();
    let promised = Digest::from_hex(name.strip_suffix(".json").unwrap_or(name));
    let actual = Digest::of(&config);
    if let Some(expected) = promised.filter(|expected| *expected != actual) {
        return Err(Error::DigestMismatch {
            what: format!("configuration {}", item.config),
            expected,
            actual,
        });
    }
    let mut layers = Vec::new();
    for path in item.layers {
        let (_, size) = members.open_member(&path)?.ok_or_else(|| missing(&path))?;
        layers.push((None, size, path));
    }
    let mut plan = Plan::new(&format!("image {actual}"), config, None, layers, limits.layers)?;
    if !plan.suits(platform) {
        return Err(Error::NoPlatform {
            what: "the archive".to_owned(),
            wanted: platform.to_string(),
            available: format!("{}/{}", plan.config.os, plan.config.architecture),
        });
    }
    for tag in item.repo_tags.unwrap_or_default() {
        plan.names.push(Reference::parse(&tag)?.stored_name());
    }
    Ok(plan)
}
