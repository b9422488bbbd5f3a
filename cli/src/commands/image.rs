//! `bulkhead image …`.

use bulkhead_image::{Digest, LoadOptions, Progress, PruneScope, PullOptions, Source, progress};
use bulkhead_runtime::verify::{self, Stamps};
use bulkhead_runtime::{Error, Layout, Result, pool, state};

use super::store;
use crate::args::{ImageLsArgs, ImageRmArgs, ImagesArgs, LoadArgs, PruneArgs, PullArgs, TagArgs, VerifyArgs};
use crate::failure::{Failure, Outcome, each};
use crate::table::{self, Format};

fn shows(quiet: bool) -> Box<dyn Progress> {
    if quiet { Box::new(progress::Silent) } else { progress::for_stderr() }
}

pub fn load(layout: &Layout, args: &LoadArgs) -> Outcome {
    let file = args.input.as_ref().or(args.file.as_ref());
    let file = file.ok_or_else(|| Error::Usage("load needs a file".into()))?;
    let source = Source::from_argument(file.as_os_str());
    let loaded = store(layout)?
        .load(&source, &LoadOptions::default(), &*shows(args.quiet))
        .map_err(|error| Failure::plain(Error::from(error)))?;
    for image in &loaded {
        announce(&image.id, &image.names, args.quiet)?;
    }
    Ok(0)
}

pub fn pull(layout: &Layout, args: &PullArgs) -> Outcome {
    let options = PullOptions { plain_http: args.plain_http, ..PullOptions::default() };
    let image = store(layout)?
        .pull(&args.reference, &options, &*shows(args.quiet))
        .map_err(|error| Failure::plain(Error::from(error)))?;
    announce(&image.id, &image.names, args.quiet)?;
    Ok(0)
}

fn announce(id: &Digest, names: &[String], quiet: bool) -> Result<()> {
    match names {
        _ if quiet => table::print(&format!("{id}\n")),
        [] => table::print(&format!(
            "Loaded image {id}, which has no name: give it one with `bulkhead image tag`\n"
        )),
        names => names.iter().try_for_each(|name| table::print(&format!("Loaded image {name}\n"))),
    }
}

pub fn ls(layout: &Layout, args: &ImageLsArgs) -> Outcome {
    let images = store(layout)?.list().map_err(|error| Failure::plain(Error::from(error)))?;
    if args.quiet {
        for image in &images {
            table::print(&format!("{}\n", image.id))?;
        }
        return Ok(0);
    }
    match args.format {
        Format::Json => table::print_json(&images)?,
        Format::Table => {
            let mut rows = Vec::new();
            for image in &images {
                let id = image.id.to_string();
                let id = id.rsplit(':').next().and_then(|hex| hex.get(..12)).unwrap_or_default().to_owned();
                let created = image.created.clone().unwrap_or_default();
                let names: &[String] =
                    if image.names.is_empty() { &["<none>".to_owned()] } else { &image.names };
                for name in names {
                    rows.push(vec![
                        name.clone(),
                        id.clone(),
                        created.clone(),
                        table::size(image.size),
                        image.platform.clone(),
                    ]);
                }
            }
            table::print_table(&["NAME", "IMAGE ID", "CREATED", "SIZE", "PLATFORM"], &rows)?;
        }
    }
    Ok(0)
}

pub fn inspect(layout: &Layout, args: &ImagesArgs) -> Outcome {
    let store = store(layout)?;
    let mut found = Vec::new();
    let status = each(&args.images, |name| {
        found.push(store.inspect(name)?);
        Ok(())
    })?;
    table::print_json(&found)?;
    Ok(status)
}

pub fn verify(layout: &Layout, args: &VerifyArgs) -> Outcome {
    let store = store(layout)?;
    let all =
        || -> Result<Vec<String>> { Ok(store.list()?.iter().map(|image| image.id.to_string()).collect()) };
    let images = if args.images.is_empty() { all()? } else { args.images.clone() };
    each(&images, |name| {
        let image = store.resolve(name)?;
        let parts = verify::layers(&image);
        Stamps::of(layout).check_again(&parts)?;
        let unknown = image.layers.len() - parts.len();
        let names = store.inspect(name)?.summary.names;
        let shown = names.first().cloned().unwrap_or_else(|| image.id.to_string());
        let sealed = parts.iter().filter(|part| part.verity.is_some()).count();
        let seals = if sealed == 0 { String::new() } else { format!(", {sealed} sealed with fs-verity") };
        let known = format!("{shown}: {} layers are good{seals}", parts.len());
        if unknown == 0 {
            return table::print(&format!("{known}\n"));
        }
        table::print(&format!("{known}, of {unknown} no digest is known: load or pull the image again\n"))
    })
}

/// Whether a container, running or not, was made from an image, or machines wait for such containers.
fn in_use(layout: &Layout) -> Result<impl Fn(&Digest) -> bool + use<>> {
    let mut used: Vec<String> = state::list(layout)?.into_iter().map(|record| record.image_id).collect();
    used.extend(pool::images(layout)?);
    Ok(move |id: &Digest| used.contains(&id.to_string()))
}

pub fn rm(layout: &Layout, args: &ImageRmArgs) -> Outcome {
    let store = store(layout)?;
    let in_use = in_use(layout)?;
    each(&args.images, |name| {
        let removed = store.remove(name, args.force, &in_use)?;
        for name in &removed.untagged {
            table::print(&format!("Untagged {name}\n"))?;
        }
        if let Some(image) = &removed.image {
            table::print(&format!("Deleted {image}, {} freed\n", table::size(removed.freed)))?;
        }
        Ok(())
    })
}

pub fn tag(layout: &Layout, args: &TagArgs) -> Outcome {
    let name =
        store(layout)?.tag(&args.image, &args.name).map_err(|error| Failure::plain(Error::from(error)))?;
    table::print(&format!("{name}\n"))?;
    Ok(0)
}

pub fn prune(layout: &Layout, args: &PruneArgs) -> Outcome {
    let scope = if args.all { PruneScope::Unused } else { PruneScope::Unnamed };
    let pruned =
        store(layout)?.prune(scope, &in_use(layout)?).map_err(|error| Failure::plain(Error::from(error)))?;
    for image in &pruned.images {
        table::print(&format!("Deleted {image}\n"))?;
    }
    table::print(&format!(
        "{} images and {} layers deleted, {} freed\n",
        pruned.images.len(),
        pruned.layers.len(),
        table::size(pruned.freed)
    ))?;
    Ok(0)
}
