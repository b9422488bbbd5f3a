//! `bulkhead doctor`.

use bulkhead_runtime::Layout;
use bulkhead_runtime::doctor::{self as runtime, Verdict};

use crate::args::FormatArgs;
use crate::failure::Outcome;
use crate::table::{self, Format};

pub fn doctor(layout: &Layout, args: &FormatArgs) -> Outcome {
    let checks = runtime::examine(layout);
    match args.format {
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
                if !check.advice.is_empty() {
                    text.push_str(&format!("{:<20}what to do: {}\n", "", check.advice));
                }
            }
            table::print(&text)?;
        }
    }
    Ok(u8::from(checks.iter().any(|check| check.verdict == Verdict::Failed)))
}
