//! `bulkhead doctor`.

use std::path::Path;

use bulkhead_runtime::doctor::{self as runtime, Verdict};
use bulkhead_runtime::{Error, Layout, Settings};

use crate::args::DoctorArgs;
use crate::failure::Outcome;
use crate::table::{self, Format};

/// `wrong`: why there are no settings but the defaults.
pub fn doctor(layout: &Layout, settings: &Settings, wrong: Option<&Error>, args: &DoctorArgs) -> Outcome {
    let mut checks = runtime::examine(layout, settings, wrong);
    if args.engines {
        checks.extend(runtime::engines::examine(Path::new("/")));
    }
    match args.format.format {
        Format::Json => table::print_json(&checks)?,
        Format::Table => {
            let mut text = String::new();
            for check in &checks {
                let word = match check.verdict {
                    Verdict::Ok => "ok",
                    Verdict::Warning => "warning",
                    Verdict::Failed => "FAILED",
                };
                text.push_str(&format!("{word:<8} {:<10} {}\n", check.name, check.found));
                let mut lines = check.advice.lines();
                if let Some(first) = lines.next() {
                    text.push_str(&format!("{:<20}what to do: {first}\n", ""));
                }
                // Lines for a file, to be copied as they are.
                lines.for_each(|line| text.push_str(&format!("    {line}\n")));
            }
            table::print(&text)?;
        }
    }
    Ok(u8::from(checks.iter().any(|check| check.verdict == Verdict::Failed)))
}
