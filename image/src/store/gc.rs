//! Asking and removing.

use std::collections::HashSet;

use super::lock::Lock;
use super::records::{Record, digest_of_file, list, remove};
use super::{ImageDetail, ImageSummary, LayerDetail, PruneScope, Pruned, Removed, Store};
use crate::{Digest, Error, Image, Reference, Result};

impl Store {
    /// What a name, `name@digest`, id or unique id prefix means. Two small file reads for a name.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`], a damaged store.
    pub fn resolve(&self, name: &str) -> Result<Image> {
        let (record, full_name) = self.find(name)?;
        let names = match &full_name {
            Some(name) => vec![name.clone()],
            None => {
                self.names()?.into_iter().filter(|(_, id)| *id == record.id).map(|(name, _)| name).collect()
            }
        };
        Ok(record.into_image(self, full_name, names))
    }

    /// All images, by name, those without a name last.
    ///
    /// # Errors
    /// A damaged store.
    pub fn list(&self) -> Result<Vec<ImageSummary>> {
        let names = self.names()?;
        let mut images: Vec<_> = self.records()?.iter().map(|record| summary(record, &names)).collect();
        images
            .sort_by(|a, b| (a.names.is_empty(), &a.names, a.id).cmp(&(b.names.is_empty(), &b.names, b.id)));
        Ok(images)
    }

    /// All about one image.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn inspect(&self, name: &str) -> Result<ImageDetail> {
        let (record, _) = self.find(name)?;
        let summary = summary(&record, &self.names()?);
        let layers = record.layers.iter().map(|layer| LayerDetail {
            diff_id: layer.diff_id,
            size: layer.size,
            path: self.layer_path(&layer.diff_id),
            digest: layer.proof.content,
            verity: layer.proof.verity,
        });
        Ok(ImageDetail {
            summary,
            manifest: record.manifest,
            layers: layers.collect(),
            config: record.config,
        })
    }

    /// Gives the image `source` the further name `new`.
    ///
    /// # Errors
    /// As [`Store::resolve`]; a bad new name; a full disk.
    pub fn tag(&self, source: &str, new: &str) -> Result<String> {
        let reference = Reference::parse(new)?;
        if reference.digest().is_some() {
            return Err(Error::BadName { name: new.to_owned(), why: "a new name cannot have a digest" });
        }
        let _shared = Lock::shared(self, &crate::progress::Silent)?;
        let _records = Lock::records(self)?;
        let (record, _) = self.find(source)?;
        self.write_name(&reference.stored_name(), &record.id)?;
        Ok(reference.stored_name())
    }

    /// Removes a name, and the image with its layers if that was the last name. By id, the image with all its names;
    /// `force` is needed for several names or an image in use. Running sandboxes keep their open layers. While another
    /// command adds images, layers stay until the next removal or prune.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::InUse`], [`Error::SeveralNames`], a damaged store.
    pub fn remove(&self, name: &str, force: bool, in_use: &dyn Fn(&Digest) -> bool) -> Result<Removed> {
        // A question to an empty store shall not create one.
        self.find(name)?;
        let alone = Lock::exclusive_now(self)?;
        let _records = Lock::records(self)?;
        let (record, full_name) = self.find(name)?;
        let id = record.id;
        let all: Vec<String> = self.names_of(&id)?;
        let (going, last) = match full_name {
            Some(full_name) => {
                // The digest form of a name goes with the last tag: nobody chose it.
                let last = all.iter().all(|other| *other == full_name || other.contains('@'));
                (if last { all } else { vec![full_name] }, last)
            }
            None if all.len() > 1 && !force => {
                return Err(Error::SeveralNames { id, names: all.join(", ") });
            }
            None => (all, true),
        };
        if last && !force && in_use(&id) {
            return Err(Error::InUse { id });
        }
        let mut removed = Removed::default();
        for name in going {
            remove(&self.name_path(&name))?;
            removed.untagged.push(name);
        }
        if last {
            remove(&self.record_path(&id))?;
            removed.image = Some(id);
        }
        if last && alone.is_some() {
            (removed.layers, removed.freed) = self.sweep()?;
        }
        Ok(removed)
    }

    /// Removes images that nobody needs, and everything left behind by commands that were killed. Waits for commands
    /// that add images.
    ///
    /// # Errors
    /// A damaged store.
    pub fn prune(&self, scope: PruneScope, in_use: &dyn Fn(&Digest) -> bool) -> Result<Pruned> {
        let mut pruned = Pruned::default();
        if !self.root.exists() {
            return Ok(pruned);
        }
        let _alone = Lock::exclusive(self)?;
        let _records = Lock::records(self)?;
        let names = self.names()?;
        for id in self.ids()? {
            let own: Vec<&String> =
                names.iter().filter(|(_, owner)| *owner == id).map(|(name, _)| name).collect();
            if in_use(&id) || (scope == PruneScope::Unnamed && !own.is_empty()) {
                continue;
            }
            for name in own {
                remove(&self.name_path(name))?;
            }
            remove(&self.record_path(&id))?;
            pruned.images.push(id);
        }
        pruned.images.sort();
        (pruned.layers, pruned.freed) = self.sweep()?;
        Ok(pruned)
    }

    fn names_of(&self, id: &Digest) -> Result<Vec<String>> {
        Ok(self.names()?.into_iter().filter(|(_, owner)| owner == id).map(|(name, _)| name).collect())
    }

    /// Removes layers and blobs that no image refers to. Only under the exclusive lock.
    pub(crate) fn sweep(&self) -> Result<(Vec<Digest>, u64)> {
        let mut needed = HashSet::new();
        // A record that cannot be read stops the sweep: what it needs is not known.
        for record in self.records()? {
            needed.insert(record.id);
            needed.extend(record.manifest);
            needed.extend(record.layers.iter().map(|layer| layer.diff_id));
        }
        let mut layers = Vec::new();
        let mut freed: u64 = 0;
        for path in list(&self.root.join("layers/sha256"))? {
            if let Some(diff_id) = digest_of_file(&path, ".erofs").filter(|diff_id| !needed.contains(diff_id))
            {
                freed = freed.saturating_add(remove(&path)?);
                layers.push(diff_id);
            }
            // Also one whose layer was never finished.
            if digest_of_file(&path, ".digest").is_some_and(|diff_id| !needed.contains(&diff_id)) {
                remove(&path)?;
            }
        }
        for path in list(&self.root.join("blobs/sha256"))? {
            if digest_of_file(&path, "").is_some_and(|digest| !needed.contains(&digest)) {
                freed = freed.saturating_add(remove(&path)?);
            }
        }
        layers.sort();
        Ok((layers, freed))
    }
}

fn summary(record: &Record, names: &[(String, Digest)]) -> ImageSummary {
    let own = names.iter().filter(|(_, id)| *id == record.id).map(|(name, _)| name.clone());
    ImageSummary {
        id: record.id,
        names: own.collect(),
        created: record.created.clone(),
        size: record.size(),
        platform: format!("{}/{}", record.os, record.architecture),
    }
}
