//! `bulkhead exec`.

use bulkhead_runtime::exec::ExecOptions;
use bulkhead_runtime::{Layout, exec as runtime, stop};

use super::{environment, lookup, store};
use crate::args::ExecArgs;
use crate::failure::Outcome;

pub fn exec(layout: &Layout, args: ExecArgs) -> Outcome {
    let record = lookup(layout, &args.container)?;
    stop::running(&record)?;
    let image = store(layout)?.resolve(&record.image_id)?;
    let options = ExecOptions {
        env: environment(&args.env_file, &args.env)?,
        command: args.command,
        interactive: args.interactive,
        tty: args.tty,
        detach: args.detach,
        workdir: args.workdir,
        user: args.user,
        privileged: args.privileged,
        detach_keys: args.detach_keys,
    };
    Ok(runtime::exec(layout, &record, &image, &options)?)
}
