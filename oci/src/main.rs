//! `bulkhead-oci`: an OCI runtime with runc's command line, whose containers are microVMs.
//!
//! The library beside it says where to begin to read.

use std::process::ExitCode;

use bulkhead_oci::args::{self, Arguments, Verb};
use bulkhead_oci::log::Log;
use bulkhead_oci::store::{self, Root};
use bulkhead_oci::{Context, verbs};
use bulkhead_runtime::{Error, Settings, trace};
use clap::Parser;

fn main() -> ExitCode {
    trace::begin();
    let arguments = match Arguments::try_parse_from(args::as_getopt(std::env::args_os())) {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            // As runc: 1 for every mistake.
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    if arguments.global.version {
        println!("bulkhead-oci version {}\nspec: {}", env!("CARGO_PKG_VERSION"), store::SPEC_VERSION);
        return ExitCode::SUCCESS;
    }
    let log = match Log::open(&arguments.global) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("bulkhead-oci: {}", error.chain());
            return ExitCode::FAILURE;
        }
    };
    let Some(verb) = arguments.verb else {
        log.error("no verb is given: `bulkhead-oci --help` lists them");
        return ExitCode::FAILURE;
    };
    let (settings, wrong) = Settings::load_what_makes_sense();
    let prepared = match wrong {
        // Whatever is written into the file, containers can be ended and removed.
        Some(error) if is_about_what_is_there(&verb) => {
            log.warn(&error.chain());
            Ok(settings)
        }
        Some(error) => Err(error),
        None => Ok(settings),
    };
    let result = prepared.and_then(|settings| {
        let global = &arguments.global;
        let root = Root::new(global.root.as_deref(), &settings.paths)?;
        let log = Log::open(global)?.at(settings.log.level);
        let rootless = match global.rootless.as_str() {
            "true" => true,
            "false" => false,
            _ => !rustix::process::geteuid().is_root(),
        };
        let context = Context { root, log, settings, systemd_cgroup: global.systemd_cgroup, rootless };
        run(&context, verb)
    });
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            log.error(&error.chain());
            ExitCode::FAILURE
        }
    }
}

/// Whether it makes no machine, so that the settings for one do not matter.
fn is_about_what_is_there(verb: &Verb) -> bool {
    matches!(
        verb,
        Verb::Start(_)
            | Verb::Kill(_)
            | Verb::Delete(_)
            | Verb::Pause(_)
            | Verb::Resume(_)
            | Verb::Update(_)
            | Verb::Exec(_)
            | Verb::Checkpoint(_)
            | Verb::State(_)
            | Verb::List(_)
            | Verb::Ps(_)
            | Verb::Events(_)
            | Verb::Spec(_)
            | Verb::Features
    )
}

fn run(context: &Context, verb: Verb) -> Result<u8, Error> {
    use verbs::{checkpoint, create, exec, life, look, templates};
    match verb {
        Verb::Create(wish) => create::create(context, &wish).map(|_| 0),
        Verb::Run(wish) => create::run(context, &wish),
        Verb::Start(wish) => life::start(context, &wish.id).map(|()| 0),
        Verb::Kill(wish) => life::kill(context, &wish).map(|()| 0),
        Verb::Delete(wish) => life::delete(context, &wish.id, wish.force).map(|()| 0),
        Verb::Pause(wish) => life::pause(context, &wish.id, true).map(|()| 0),
        Verb::Resume(wish) => life::pause(context, &wish.id, false).map(|()| 0),
        Verb::Update(wish) => life::update(context, &wish).map(|()| 0),
        Verb::Exec(wish) => Ok(exec::exec(context, &wish)),
        Verb::Checkpoint(wish) => checkpoint::checkpoint(context, &wish).map(|()| 0),
        Verb::Restore(wish) => checkpoint::restore(context, &wish),
        Verb::State(wish) => look::state(context, &wish.id).map(|()| 0),
        Verb::List(wish) => look::list(context, &wish).map(|()| 0),
        Verb::Ps(wish) => look::ps(context, &wish).map(|()| 0),
        Verb::Events(wish) => look::events(context, &wish).map(|()| 0),
        Verb::Spec(wish) => templates::spec(&wish).map(|()| 0),
        Verb::Features => templates::features().map(|()| 0),
    }
}
