//! What the tests of container engines have in common: a daemon for the time of a test, and the same steps with each
//! runtime, told side by side.

use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, mem};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Program, Running};
use rustix::process::Signal;

/// How long a daemon may take to answer first, and to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// One step with one runtime.
pub type Step<E> = (&'static str, fn(&E) -> Result<()>);

/// Does every step with every engine, whether those before have worked or not, and prints a table of it.
///
/// # Errors
/// A step has failed.
pub fn side_by_side<E>(engines: &[(&str, E)], steps: &[Step<E>]) -> Result<()> {
    let mut rows: Vec<_> = steps.iter().map(|(name, _)| format!("| {name} |")).collect();
    let mut failures = Vec::new();
    for (runtime, engine) in engines {
        for ((name, step), row) in steps.iter().zip(&mut rows) {
            let start = Instant::now();
            let cell = match step(engine) {
                Ok(()) => format!(" {:.2} |", start.elapsed().as_secs_f64()),
                Err(error) => {
                    failures.push(format!("{name}, with {runtime}: {error:#}"));
                    " failed |".to_owned()
                }
            };
            // The table may never come.
            println!("{runtime}: {name}:{cell}");
            *row += &cell;
        }
    }
    let names: Vec<_> = engines.iter().map(|(runtime, _)| *runtime).collect();
    println!("| seconds of the host's time | {} |\n|---|{}", names.join(" | "), "---|".repeat(names.len()));
    println!("{}", rows.join("\n"));
    ensure!(failures.is_empty(), "{} steps failed\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

/// A daemon that ends with this.
pub struct Daemon {
    program: Option<Running>,
}

impl Daemon {
    /// Starts one, and waits until `client` has an answer. What it says goes to the file `daemon.log` of the test.
    ///
    /// # Errors
    /// It ends, or does not answer in time.
    pub fn start(host: &Host, command: &str, client: impl Fn() -> Program) -> Result<Self> {
        let log = host.work().join("daemon.log");
        let line = format!("exec {command} >{} 2>&1", log.display());
        let mut program = Program::new(["sh", "-c", &line]).spawn()?;
        let end = Instant::now() + PATIENCE;
        while client().run()?.status != 0 {
            if program.ended()? || Instant::now() > end {
                bail!("{command} does not answer; it said\n{}", fs::read_to_string(&log)?);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(Self { program: Some(program) })
    }

    /// Ends it, and removes what it keeps in `dirs` for its next start.
    ///
    /// # Errors
    /// It ends with an error, or not at all.
    pub fn end(mut self, dirs: &[&str]) -> Result<()> {
        let mut program = mem::take(&mut self.program).context("it has ended")?;
        program.signal(Signal::TERM)?;
        let end = Instant::now() + PATIENCE;
        while !program.ended()? {
            ensure!(Instant::now() < end, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        program.wait()?.ok()?;
        dirs.iter().try_for_each(|dir| match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context(dir.to_string()),
            _ => Ok(()),
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(program) = &self.program {
            // The test has failed already.
            let _ = program.signal(Signal::TERM);
        }
    }
}

/// Whether there is a process of this number.
pub fn lives(pid: &str) -> bool {
    !pid.is_empty() && pid != "0" && Path::new("/proc").join(pid).exists()
}
