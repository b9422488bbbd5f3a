//! Adding images from archives and layout directories.

mod archive;
mod docker_archive;
mod oci_layout;

use std::collections::BTreeMap;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;

use archive::{Members, bad};

use crate::layer::{Expected, add_layer};
use crate::manifest::{Plan, PlannedLayer};
use crate::store::{LayerRecord, Lock, Record};
use crate::{Digest, Error, LoadedImage, Platform, Progress, Reference, Result, Store};

/// Layers converted at once.
const MAX_WORKERS: usize = 4;

/// Where to load from.
#[derive(Debug, Clone)]
pub enum Source {
    /// An archive file or an OCI layout directory.
    Path(PathBuf),
    /// An archive on standard input.
    Stdin,
}

impl Source {
    /// `-` is standard input, everything else a path.
    #[must_use]
    pub fn from_argument(argument: &std::ffi::OsStr) -> Self {
        if argument == "-" { Self::Stdin } else { Self::Path(argument.into()) }
    }
}

/// How to load.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Which image of a multi-platform archive.
    pub platform: Platform,
    /// A name for the image, beside those in the archive. Only for an archive with one image.
    pub name: Option<String>,
}

pub(crate) fn load(
    store: &Store,
    source: &Source,
    options: &LoadOptions,
    progress: &dyn Progress,
) -> Result<Vec<LoadedImage>> {
    // A bad name or path must not cost a conversion, nor make a store.
    let name = options.name.as_deref().map(Reference::parse).transpose()?;
    if let Source::Path(path) = source {
        std::fs::metadata(path).map_err(Error::io("open", path))?;
    }
    let lock = Lock::shared(store, progress)?;
    let result = load_locked(store, source, options, name.as_ref(), progress);
    if result.is_err() {
        clean_up(store, &lock, progress);
    }
    result
}

/// After a failure: layers that were already added are of no use. Where another command is at work they may be of
/// use to that one, and a later removal or prune finds them.
pub(crate) fn clean_up(store: &Store, lock: &Lock, progress: &dyn Progress) {
    if let Err(error) =
        lock.upgrade_now().and_then(|alone| if alone { store.sweep().map(drop) } else { Ok(()) })
    {
        progress.note(&format!("cleaning up failed: {error}"));
    }
}

fn load_locked(
    store: &Store,
    source: &Source,
    options: &LoadOptions,
    name: Option<&Reference>,
    progress: &dyn Progress,
) -> Result<Vec<LoadedImage>> {
    let (members, what, stem) = match source {
        Source::Stdin => {
            let what = "standard input".to_owned();
            (Members::spool(store, &mut std::io::stdin().lock(), &what, progress)?, what, None)
        }
        Source::Path(path) => {
            let stem = path.file_name().map(|name| name.to_string_lossy().into_owned());
            let stem = stem.and_then(|name| name.split('.').next().map(str::to_owned));
            (Members::open(store, path, progress)?, path.display().to_string(), stem)
        }
    };
    let limits = store.limits();
    let mut plans = if let Some(index) = members.read_member("index.json")? {
        oci_layout::plans(&members, &index, &options.platform, stem.as_deref(), limits)?
    } else if let Some(manifest) = members.read_member("manifest.json")? {
        docker_archive::plans(&members, &manifest, &options.platform, limits)?
    } else {
        let why = "neither an OCI image layout (no index.json) nor a docker archive (no manifest.json)";
        return Err(bad(&what, why));
    };
    match (name, plans.as_mut_slice()) {
        (Some(name), [plan]) => plan.names.push(name.stored_name()),
        (Some(_), several) => {
            return Err(bad(
                &what,
                &format!("it has {} images, so it cannot be given one name", several.len()),
            ));
        }
        (None, _) => {}
    }
    let layers = plans.iter().flat_map(|plan| plan.layers.iter());
    let (records, fresh) = add_layers(store, layers, progress, &|layer| {
        let member = members.open_member(&layer.path)?;
        member.map(|(reader, _)| reader).ok_or_else(|| bad(&layer.path, "it is missing from the archive"))
    })?;
    plans.into_iter().map(|plan| commit(store, plan, &records, &fresh)).collect()
}

/// Writes the records of an image whose layers are all there.
pub(crate) fn commit(
    store: &Store,
    plan: Plan,
    records: &BTreeMap<Digest, LayerRecord>,
    fresh: &[Digest],
) -> Result<LoadedImage> {
    let new_layers = plan.layers.iter().filter(|layer| fresh.contains(&layer.diff_id)).count();
    let layers: Option<Vec<LayerRecord>> =
        plan.layers.iter().map(|layer| records.get(&layer.diff_id).copied()).collect();
    let layers = layers.ok_or_else(|| bad(&format!("image {}", plan.id), "a layer was not converted"))?;
    let _records = Lock::records(store)?;
    let manifest_digest = plan.manifest.as_ref().map(|(digest, _)| *digest);
    let record = Record::new(store, plan.id, manifest_digest, plan.config, layers);
    store.commit(&record, &plan.config_bytes, plan.manifest.as_ref().map(|(_, bytes)| bytes.as_slice()))?;
    let mut names = plan.names;
    names.sort();
    names.dedup();
    for name in &names {
        store.write_name(name, &plan.id)?;
    }
    Ok(LoadedImage { id: plan.id, names, new_layers })
}

type Opener<'a> = dyn Fn(&PlannedLayer) -> Result<Box<dyn std::io::Read + Send + 'a>> + Sync + 'a;

/// Converts the layers that are not there yet, several at once. Gives the records of all and the ids of the new ones.
fn add_layers<'a>(
    store: &Store,
    layers: impl Iterator<Item = &'a PlannedLayer>,
    progress: &dyn Progress,
    open: &Opener<'_>,
) -> Result<(BTreeMap<Digest, LayerRecord>, Vec<Digest>)> {
    let mut records = BTreeMap::new();
    let mut missing: BTreeMap<Digest, &PlannedLayer> = BTreeMap::new();
    for layer in layers {
        match store.existing_layer(&layer.diff_id)? {
            Some(record) => drop(records.insert(layer.diff_id, record)),
            None => drop(missing.insert(layer.diff_id, layer)),
        }
    }
    let fresh: Vec<Digest> = missing.keys().copied().collect();
    // The largest first, so that the end is not one worker with a large layer.
    let mut queue: Vec<&PlannedLayer> = missing.into_values().collect();
    queue.sort_by_key(|layer| layer.size);
    let workers = thread::available_parallelism().map_or(1, NonZero::get).min(MAX_WORKERS).min(queue.len());
    let queue = Mutex::new(queue);
    let work = || -> Result<Vec<LayerRecord>> {
        let mut done = Vec::new();
        // A poisoned lock means that another worker panicked; its layer will be missed.
        while let Some(layer) = queue.lock().ok().and_then(|mut queue| queue.pop()) {
            let result = add_one(store, layer, progress, open);
            if result.is_err()
                && let Ok(mut queue) = queue.lock()
            {
                queue.clear();
            }
            done.push(result?);
        }
        Ok(done)
    };
    let results: Vec<Result<Vec<LayerRecord>>> = if workers <= 1 {
        vec![work()]
    } else {
        thread::scope(|scope| {
            let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            handles.into_iter().filter_map(|handle| handle.join().ok()).collect()
        })
    };
    for result in results {
        records.extend(result?.into_iter().map(|record| (record.diff_id, record)));
    }
    Ok((records, fresh))
}

fn add_one(
    store: &Store,
    layer: &PlannedLayer,
    progress: &dyn Progress,
    open: &Opener<'_>,
) -> Result<LayerRecord> {
    let task = progress.start(&format!("layer {}", layer.diff_id.short()), Some(layer.size));
    let mut input = open(layer)?;
    let expected = Expected { blob: layer.blob, diff_id: layer.diff_id, size: layer.size };
    let record = add_layer(store, input.as_mut(), &expected, progress, task.as_ref())?;
    task.finish("done");
    Ok(record)
}
