//! `bulkhead logs`.

use std::io;
use std::time::Duration;

use bulkhead_runtime::state::{Files, Status, now_ns};
use bulkhead_runtime::{Layout, logs as runtime};

use super::lookup;
use crate::args::LogsArgs;
use crate::failure::{Failure, Outcome};

pub fn logs(layout: &Layout, args: &LogsArgs) -> Outcome {
    let record = lookup(layout, &args.container).map_err(Failure::plain)?;
    let files = Files::new(layout, &record.id);
    let show = runtime::Show {
        tail: args.tail,
        timestamps: args.timestamps,
        since_ns: args
            .since
            .map_or(0, |seconds| now_ns().saturating_sub(seconds.saturating_mul(1_000_000_000))),
    };
    let follows = args.follow && record.status != Status::Exited;
    let more = || {
        if !follows {
            return false;
        }
        std::thread::sleep(Duration::from_millis(50));
        lookup(layout, &record.id).is_ok_and(|record| record.status != Status::Exited)
    };
    match runtime::show(&files.log(), &show, &mut io::stdout().lock(), &mut io::stderr().lock(), more) {
        Err(bulkhead_runtime::Error::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => {
            Ok(0)
        }
        other => other.map(|()| 0).map_err(Failure::plain),
    }
}
