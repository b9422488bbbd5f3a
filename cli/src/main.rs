//! `bulkhead`: hard-isolated containers, each with a kernel of its own.

mod args;
mod commands;
mod failure;
mod table;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command, ImageCommand, PoolCommand};
use bulkhead_runtime::{Layout, Settings, trace};
use failure::Outcome;

fn main() -> ExitCode {
    trace::begin();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match perform(cli) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            failure.print();
            ExitCode::from(failure.status())
        }
    }
}

/// Help is a success; a wrong flag is status 125, as with docker, so that it is not taken for the container's.
fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(125) } else { ExitCode::SUCCESS }
}

fn perform(cli: Cli) -> Outcome {
    // A file that makes no sense is what `doctor` is there to tell.
    let settings = match Settings::load() {
        Err(error) if !matches!(cli.command, Command::Doctor(_)) => return Err(error.into()),
        settings => settings,
    };
    let (settings, wrong) = match settings {
        Ok(settings) => (settings, None),
        Err(error) => (Settings::default(), Some(error)),
    };
    let layout = Layout::new(cli.root.as_deref(), &settings.paths)?;
    match cli.command {
        Command::Run(args) => commands::run::run(&layout, &settings, *args),
        Command::Exec(args) => commands::exec::exec(&layout, args),
        Command::Ps(args) => commands::list::ps(&layout, &args),
        Command::Top(args) => commands::list::top(&layout, &args),
        Command::Stats(args) => commands::list::stats(&layout, &args),
        Command::Inspect(args) => commands::list::inspect(&layout, &args),
        Command::Logs(args) => commands::logs::logs(&layout, &args),
        Command::Stop(args) => commands::lifecycle::stop(&layout, &args),
        Command::Kill(args) => commands::lifecycle::kill(&layout, &args),
        Command::Rm(args) => commands::lifecycle::rm(&layout, &args),
        Command::Wait(args) => commands::lifecycle::wait(&layout, &args),
        Command::Cp(args) => commands::copy::cp(&layout, &args),
        Command::Snapshot(args) => commands::snapshot::snapshot(&layout, &args),
        Command::Restore(args) => commands::snapshot::restore(&layout, &settings, args),
        Command::Fork(args) => commands::snapshot::fork(&layout, &settings, args),
        Command::Pool(PoolCommand::Warm(args)) => commands::pool::warm(&layout, &settings, args),
        Command::Pool(PoolCommand::Ls(args)) => commands::pool::ls(&layout, &args),
        Command::Pool(PoolCommand::Rm(args)) => commands::pool::rm(&layout, &args),
        Command::Image(ImageCommand::Load(args)) => commands::image::load(&layout, &args),
        Command::Image(ImageCommand::Pull(args)) => commands::image::pull(&layout, &args),
        Command::Image(ImageCommand::Ls(args)) => commands::image::ls(&layout, &args),
        Command::Image(ImageCommand::Inspect(args)) => commands::image::inspect(&layout, &args),
        Command::Image(ImageCommand::Rm(args)) => commands::image::rm(&layout, &args),
        Command::Image(ImageCommand::Tag(args)) => commands::image::tag(&layout, &args),
        Command::Image(ImageCommand::Verify(args)) => commands::image::verify(&layout, &args),
        Command::Image(ImageCommand::Prune(args)) => commands::image::prune(&layout, &args),
        Command::Doctor(args) => commands::doctor::doctor(&layout, &settings, wrong.as_ref(), &args),
    }
}
