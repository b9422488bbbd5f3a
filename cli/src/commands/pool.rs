//! `bulkhead pool …`.

use bulkhead_runtime::pool::{self, Status, Wishes};
use bulkhead_runtime::{Layout, Settings, doctor};

use super::run::{find_or_pull, memory};
use super::store;
use crate::args::{CoolArgs, FormatArgs, WarmArgs};
use crate::failure::{Failure, Outcome, each};
use crate::table::{self, Format};

pub fn warm(layout: &Layout, settings: &Settings, args: WarmArgs) -> Outcome {
    doctor::require_kvm(layout)?;
    find_or_pull(layout, &store(layout)?, &args.image)?;
    let wishes = Wishes {
        image: args.image,
        count: args.count,
        memory: memory(args.memory)?,
        milli_cpus: args.cpus,
        storage: args.storage,
        network: args.network.map_or_else(|| settings.run.network(), Ok)?,
    };
    let status = pool::warm(layout, &wishes)?;
    table::print(&format!("{}\n", status.id))?;
    Ok(0)
}

pub fn ls(layout: &Layout, args: &FormatArgs) -> Outcome {
    let pools = pool::list(layout).map_err(Failure::plain)?;
    match args.format {
        Format::Json => table::print_json(&pools)?,
        Format::Table => {
            let rows: Vec<_> = pools.iter().map(row).collect();
            table::print_table(
                &["POOL ID", "IMAGE", "WAITING", "TAKEN", "CREATED", "OPTIONS", "STATUS"],
                &rows,
            )?;
        }
    }
    Ok(0)
}

fn row(pool: &Status) -> Vec<String> {
    let Wishes { image, count, memory, milli_cpus, storage, network } = &pool.wishes;
    let mut options = Vec::new();
    options.extend(memory.map(|bytes| format!("--memory {bytes}")));
    options.extend(milli_cpus.map(|milli| format!("--cpus {}", milli as f64 / 1000.0)));
    options.extend(storage.map(|bytes| format!("--storage {bytes}")));
    if network.is_some() {
        options.push("--network passt".to_owned());
    }
    let status = match &pool.problem {
        Some(problem) => problem.chars().map(|c| if c.is_control() { ' ' } else { c }).collect(),
        None if pool.waiting >= *count => "full".to_owned(),
        None => "filling".to_owned(),
    };
    vec![
        pool.id.clone(),
        image.clone(),
        format!("{}/{count}", pool.waiting),
        pool.taken.to_string(),
        table::ago(pool.created_ns),
        options.join(" "),
        status,
    ]
}

pub fn rm(layout: &Layout, args: &CoolArgs) -> Outcome {
    let wanted = if args.all {
        pool::list(layout).map_err(Failure::plain)?.into_iter().map(|pool| pool.id).collect()
    } else {
        args.pools.clone()
    };
    each(&wanted, |name| {
        for id in pool::cool(layout, name)? {
            table::print(&format!("{id}\n"))?;
        }
        Ok(())
    })
}
