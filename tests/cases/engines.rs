//! What the tests of container engines share.

use std::time::Instant;

use anyhow::{Context, Result};

/// What was done with an engine, and in how much of the host's time: printed at the end of a test, for people.
pub struct Table {
    engine: &'static str,
    runtime: &'static str,
    since: Instant,
    rows: Vec<(String, f64)>,
}

impl Table {
    pub fn new(engine: &'static str, runtime: &'static str) -> Self {
        let runtime = runtime.rsplit('/').next().unwrap_or(runtime);
        Self { engine, runtime, since: Instant::now(), rows: Vec::new() }
    }

    /// Notes that a step is done, or says which one is not.
    pub fn add(&mut self, step: &str, done: Result<()>) -> Result<()> {
        done.with_context(|| format!("{step}, with {}", self.runtime))?;
        self.rows.push((step.to_owned(), self.since.elapsed().as_secs_f64()));
        self.since = Instant::now();
        Ok(())
    }

    pub fn print(&self) {
        println!("| {} with {} | s |\n|---|---|", self.engine, self.runtime);
        for (step, seconds) in &self.rows {
            println!("| {step} | {seconds:.1} |");
        }
    }
}
