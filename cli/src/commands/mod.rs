//! The verbs.

pub mod copy;
pub mod doctor;
pub mod exec;
pub mod image;
pub mod lifecycle;
pub mod list;
pub mod logs;
pub mod pool;
pub mod run;
pub mod snapshot;

use std::path::PathBuf;

use bulkhead_image::Store;
use bulkhead_runtime::state::{Record, find};
use bulkhead_runtime::{Context, Error, Layout, Result};

/// The record of the container that a person named.
pub fn lookup(layout: &Layout, wanted: &str) -> Result<Record> {
    Record::load(layout, &find(layout, wanted)?)
}

/// The image store.
pub fn store(layout: &Layout) -> Result<Store> {
    Ok(Store::open(&layout.data.join("images"))?)
}

/// The environment from files and flags, in that order; a name alone takes the caller's value, or nothing.
pub fn environment(files: &[PathBuf], flags: &[String]) -> Result<Vec<String>> {
    let mut env = Vec::new();
    for file in files {
        let text =
            std::fs::read_to_string(file).context(|| format!("cannot read --env-file {}", file.display()))?;
        for (number, line) in text.lines().enumerate() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            add_variable(&mut env, line)
                .map_err(|error| Error::Usage(format!("{}, line {}: {error}", file.display(), number + 1)))?;
        }
    }
    for flag in flags {
        add_variable(&mut env, flag)?;
    }
    Ok(env)
}

fn add_variable(env: &mut Vec<String>, text: &str) -> Result<()> {
    let name = text.split_once('=').map_or(text, |(name, _)| name);
    if name.is_empty() || name.contains(char::is_whitespace) || text.contains('\0') {
        return Err(Error::Usage(format!("{text:?} is not an environment variable: write NAME=VALUE")));
    }
    if text.contains('=') {
        env.push(text.to_owned());
    } else if let Ok(value) = std::env::var(name) {
        env.push(format!("{name}={value}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_come_from_files_then_flags_and_bad_ones_are_refused() {
        let file = std::env::temp_dir().join(format!("bulkhead-env-{}", std::process::id()));
        std::fs::write(&file, "# comment\n\nA=1\nB=two words\nBULKHEAD_NOT_SET\n").unwrap();
        let env = environment(std::slice::from_ref(&file), &["A=3".into(), "PATH".into()]).unwrap();
        std::fs::write(&file, "=x\n").unwrap();
        let bad = environment(std::slice::from_ref(&file), &[]);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(env[..3], ["A=1", "B=two words", "A=3"]);
        assert!(env[3].starts_with("PATH=/"));
        assert!(bad.unwrap_err().to_string().contains("line 1"));
    }
}
