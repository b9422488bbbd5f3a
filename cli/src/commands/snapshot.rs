//! `bulkhead snapshot`, `restore` and `fork`.

use bulkhead_runtime::snapshot::{self, Manner, Summary, Wishes};
use bulkhead_runtime::{Error, Layout, Settings, doctor};

use super::run::finish;
use super::{lookup, store};
use crate::args::{ForkArgs, RestoreArgs, SnapshotArgs};
use crate::failure::{Failure, Outcome};
use crate::table;

pub fn snapshot(layout: &Layout, args: &SnapshotArgs) -> Outcome {
    let manner = Manner { durable: true, compress: args.compress, base: args.base.clone() };
    let take = || snapshot::take(layout, &lookup(layout, &args.container)?, &args.directory, &manner);
    let summary = take().map_err(failed)?;
    say(&summary);
    table::print(&format!("{}\n", args.directory.display()))?;
    Ok(0)
}

pub fn restore(layout: &Layout, settings: &Settings, args: RestoreArgs) -> Outcome {
    doctor::require_kvm(layout)?;
    let wishes = Wishes {
        detach: args.detach,
        auto_remove: args.rm,
        name: args.name,
        network: args.network,
        publish: (!args.publish.is_empty()).then_some(args.publish),
        detach_keys: args.detach_keys,
    };
    let launched = snapshot::restore(layout, &store(layout)?, &args.directory, &wishes, settings)?;
    finish(launched, args.detach)
}

pub fn fork(layout: &Layout, settings: &Settings, args: ForkArgs) -> Outcome {
    let record = lookup(layout, &args.container).map_err(Failure::plain)?;
    let wishes = Wishes { name: args.name, auto_remove: args.rm, ..Wishes::default() };
    let forked =
        snapshot::fork(layout, &store(layout)?, &record, args.count, &wishes, settings).map_err(failed)?;
    say(&forked.summary);
    if !record.options.publish.is_empty() {
        eprintln!("bulkhead: the ports of {} stay its own: none is published for its copies", record.name);
    }
    let mut status = 0;
    for copy in forked.copies {
        match copy {
            Ok(id) => table::print(&format!("{id}\n"))?,
            Err(error) => {
                let failure = Failure::plain(error);
                failure.print();
                status = failure.status();
            }
        }
    }
    Ok(status)
}

/// Of one that was interrupted, the status says so.
fn failed(error: Error) -> Failure {
    match error {
        Error::Interrupted => error.into(),
        error => Failure::plain(error),
    }
}

/// For a person: scripts read standard output.
fn say(summary: &Summary) {
    eprintln!(
        "bulkhead: the container stood still for {:.1} ms, its machine for {:.1} ms; {:.1} MiB of memory saved",
        summary.pause.as_secs_f64() * 1e3,
        summary.machine_pause_ns as f64 / 1e6,
        summary.memory_bytes as f64 / f64::from(1 << 20)
    );
}
