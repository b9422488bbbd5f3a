//! `bulkhead stop`, `kill`, `rm` and `wait`.

use std::time::Duration;

use bulkhead_runtime::state::{Files, Record, find};
use bulkhead_runtime::{Error, Layout, stop as runtime};

use super::lookup;
use crate::args::{KillArgs, ManyArgs, RmArgs, StopArgs};
use crate::failure::{Outcome, each};
use crate::table;

pub fn stop(layout: &Layout, args: &StopArgs) -> Outcome {
    let patience = u64::try_from(args.time).ok().map(Duration::from_secs);
    each(&args.containers, |name| {
        runtime::stop(layout, &lookup(layout, name)?, patience)?;
        table::print(&format!("{name}\n"))
    })
}

pub fn kill(layout: &Layout, args: &KillArgs) -> Outcome {
    each(&args.containers, |name| {
        runtime::kill(layout, &lookup(layout, name)?, args.signal)?;
        table::print(&format!("{name}\n"))
    })
}

pub fn rm(layout: &Layout, args: &RmArgs) -> Outcome {
    each(&args.containers, |name| {
        match find(layout, name) {
            Err(Error::NoSuchContainer(_)) if args.force => return Ok(()),
            found => {
                let id = found?;
                match Record::load(layout, &id) {
                    Ok(record) => runtime::remove(layout, &record, args.force)?,
                    // A record that cannot be read must not be for ever.
                    Err(_) if args.force => runtime::remove_unreadable(layout, &id, name)?,
                    Err(error) => return Err(error),
                }
            }
        }
        table::print(&format!("{name}\n"))
    })
}

pub fn wait(layout: &Layout, args: &ManyArgs) -> Outcome {
    each(&args.containers, |name| {
        let record = lookup(layout, name)?;
        let files = Files::new(layout, &record.id);
        let status = match record.exit {
            Some(exit) => Some(exit.code),
            None => Record::wait(&files)?,
        };
        let code = match status {
            Some(code) => code,
            None => Record::load(layout, &record.id)?.exit.map_or(137, |exit| exit.code),
        };
        table::print(&format!("{code}\n"))
    })
}
