//! The program that libFuzzer drives: one target, which `FUZZ_TARGET` names.

#![no_main]
#![allow(missing_docs)] // what the macro makes has none

use std::sync::OnceLock;

use fuzz::{Run, TARGETS, target};

static RUN: OnceLock<Run> = OnceLock::new();

fn chosen() -> Run {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    match target(&name) {
        Some(target) => target.run,
        None => {
            let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            eprintln!("FUZZ_TARGET={name:?} is no target; there are: {}", names.join(" "));
            std::process::exit(64);
        }
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| RUN.get_or_init(chosen)(data));
