//! The outside: takes `cargo test`'s arguments and runs each test in a host.

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::emulated::{self, Options, State};
use crate::host::PREFIX_VARIABLE;
use crate::registry::{Body, Needs, Test};
use crate::stage::{self, Layout};
use crate::{inside, workspace};

/// Emulated hosts at once: they share the build machines' two cores.
const AT_ONCE: usize = 2;
/// Variables with this beginning mean the same to a test wherever it runs.
const HANDED_IN: &str = "BULKHEAD_SOAK_";
/// So many tests are named with their time at the end.
const SLOWEST: usize = 12;
/// So many lines of a failed test are repeated at the end.
const WHY_LINES: usize = 8;

/// Where tests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the emulated host.
    Emulated,
    /// On this machine.
    Direct,
}

impl Place {
    /// This machine, when its KVM can run Linux; BULKHEAD_TEST_HOST=emulated or =direct decides otherwise.
    fn choose() -> Result<Self> {
        match std::env::var("BULKHEAD_TEST_HOST").as_deref() {
            Ok("emulated") => Ok(Self::Emulated),
            Ok("direct") => Ok(Self::Direct),
            Ok(other) => bail!("BULKHEAD_TEST_HOST is '{other}'; it may be 'emulated' or 'direct'"),
            Err(_) => {
                let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
                let virtualises = cpu.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
                let kvm = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
                Ok(if virtualises && kvm { Self::Direct } else { Self::Emulated })
            }
        }
    }
}

/// A host's preparation, done by the first test that needs it; its failure is every such test's failure.
type Once<T> = OnceLock<Result<T, String>>;

/// Runs tests in hosts.
#[derive(Debug)]
pub struct Runner {
    place: Place,
    bare: Once<State>,
    product: Once<State>,
    engines: Once<State>,
    no_cgroups: Once<State>,
    installed: Once<PathBuf>,
    show: bool,
    /// Real time that each test took, with its stalls.
    took: Mutex<Vec<(Duration, String)>>,
    /// The first lines of what each failed test said, with its name.
    failed: Mutex<Vec<(String, String)>>,
}

fn once<T: Clone>(cell: &Once<T>, make: impl FnOnce() -> Result<T>) -> Result<T> {
    cell.get_or_init(|| make().map_err(|error| format!("{error:#}"))).clone().map_err(|error| anyhow!(error))
}

impl Runner {
    fn new(show: bool) -> Result<Self> {
        let place = Place::choose()?;
        Ok(Self {
            place,
            bare: Once::new(),
            product: Once::new(),
            engines: Once::new(),
            no_cgroups: Once::new(),
            installed: Once::new(),
            show,
            took: Mutex::default(),
            failed: Mutex::default(),
        })
    }

    /// The emulated host with this program in it, and what else is needed.
    fn state(&self, needs: &Needs) -> Result<State> {
        let with_tests = |state: State| {
            let tests = Layout::tests()?;
            state.staged(&tests.key()?, |dir| tests.lay(dir), "cp -a /host/. /usr/local/")
        };
        let with_product = |state: State| {
            let layout = Layout::product()?;
            with_tests(state.staged(&layout.key()?, |dir| layout.lay(dir), "cp -a /host/. /usr/local/")?)
        };
        if needs.engines {
            return once(&self.engines, || with_product(State::booted()?.with_engines()?));
        }
        if !needs.cgroups {
            return once(&self.no_cgroups, || with_product(State::booted_without_cgroups()?));
        }
        if !needs.product {
            return once(&self.bare, || with_tests(State::booted()?));
        }
        once(&self.product, || {
            let layout = Layout::product()?;
            let command = format!("cp -a /host/. /usr/local/ && {{ {}; }}", stage::load_images("/usr/local"));
            with_tests(State::booted()?.staged(&layout.key()?, |dir| layout.lay(dir), &command)?)
        })
    }

    /// This machine's directory with what is under test and a store of its own.
    fn installed(&self, product: bool) -> Result<PathBuf> {
        if !product {
            return Ok(workspace::host_cache());
        }
        once(&self.installed, || {
            let layout = Layout::product()?;
            let name = format!("direct-{}", layout.key()?);
            workspace::cached_dir(&workspace::host_cache(), &name, |dir| {
                layout.lay(dir)?;
                let dir = dir.display().to_string();
                let loaded =
                    private_command(&dir, &stage::load_images(&dir)).status().context("load the images")?;
                if !loaded.success() {
                    bail!("loading the images failed with {loaded}");
                }
                Ok(())
            })
        })
    }

    /// Runs a test, its output going to `output`; answers whether it passed.
    fn run_inside(&self, test: &Test, output: &mut dyn Write) -> Result<bool> {
        let needs = &test.needs;
        // An emulated second takes several real ones at worst. Reached only when the host itself hangs.
        let backstop = Duration::from_secs(120 + 8 * needs.deadline_seconds);
        match self.place {
            Place::Emulated => {
                let state = self.state(needs)?;
                let command = format!("{}exec whole-system --inside {}", handed_in(), test.name());
                let options = Options { clock: needs.clock, share: None, backstop };
                let outcome = emulated::run(&state, &command, &options, output)?;
                if outcome.status > 1 {
                    write!(output, "--- status {}\n{}\n", outcome.status, outcome.console)?;
                }
                Ok(outcome.status == 0)
            }
            Place::Direct if needs.engines || !needs.cgroups => {
                writeln!(
                    output,
                    "left out: it would change what this machine keeps, so it runs on the emulated host only"
                )?;
                Ok(true)
            }
            Place::Direct => {
                let prefix = self.installed(needs.product)?.display().to_string();
                let program = std::env::current_exe()?.display().to_string();
                let line = format!("exec {program} --inside {}", test.name());
                let result = private_command(&prefix, &line)
                    .output()
                    .context("run unshare; is util-linux installed?")?;
                output.write_all(&result.stdout)?;
                output.write_all(&result.stderr)?;
                Ok(result.status.success())
            }
        }
    }

    /// Runs a hidden test for another test that examines the framework: whether it passed, and all it printed.
    pub fn run_hidden(&self, name: &str) -> Result<(bool, String)> {
        let test = Test::find(name).with_context(|| format!("there is no test {name}"))?;
        let mut output = Vec::new();
        let passed = self.run_inside(test, &mut output)?;
        Ok((passed, String::from_utf8_lossy(&output).into_owned()))
    }

    fn run(&self, test: &Test) -> Result<(), Failed> {
        let start = Instant::now();
        let result = self.run_watched(test);
        if let Ok(mut took) = self.took.lock() {
            took.push((start.elapsed(), test.name()));
        }
        if let (Err(why), Ok(mut failed)) = (&result, self.failed.lock()) {
            failed.push((test.name(), why.message().unwrap_or_default().to_owned()));
        }
        result
    }

    /// Says in a few lines each why tests failed: of a long run often only the end is kept.
    fn print_failed(&self) {
        let Ok(failed) = self.failed.lock() else { return };
        for (name, why) in failed.iter() {
            println!("{name} failed:");
            for line in why.lines().filter(|line| !line.trim().is_empty()).take(WHY_LINES) {
                println!("  {line}");
            }
        }
    }

    /// Says where the time of a run of many tests went: what a suite that gets slow needs first.
    fn print_slowest(&self) {
        let Ok(mut took) = self.took.lock() else { return };
        if took.len() <= SLOWEST {
            return;
        }
        took.sort_by(|a, b| b.cmp(a));
        println!("slowest, in real time:");
        for (time, name) in took.iter().take(SLOWEST) {
            println!("  {:6.1} s  {name}", time.as_secs_f64());
        }
    }

    fn run_watched(&self, test: &Test) -> Result<(), Failed> {
        if let Body::Outside(body) = test.body {
            return body(self).map_err(|error| Failed::from(format!("{error:#}")));
        }
        if self.show {
            let passed =
                self.run_inside(test, &mut stdout()).map_err(|error| Failed::from(format!("{error:#}")))?;
            return if passed { Ok(()) } else { Err(Failed::from("see its output above")) };
        }
        let mut output = Vec::new();
        let result = self.run_inside(test, &mut output);
        let text = String::from_utf8_lossy(&output).into_owned();
        match result {
            Ok(true) => {
                if test.needs.shows_output {
                    println!("{text}");
                }
                Ok(())
            }
            Ok(false) => Err(Failed::from(text)),
            Err(error) => Err(Failed::from(format!("{text}\n{error:#}"))),
        }
    }
}

/// Settings of single tests, as they are in the environment here, for the emulated host's shell: `NAME=value; export NAME; `.
fn handed_in() -> String {
    let plain = |value: &str| value.chars().all(|letter| letter.is_ascii_alphanumeric());
    let given = std::env::vars().filter(|(name, value)| name.starts_with(HANDED_IN) && plain(value));
    given.map(|(name, value)| format!("{name}={value}; export {name}; ")).collect()
}

/// A shell line on this machine, in a mount namespace where Bulkhead's directories are the tests' own.
fn private_command(prefix: &str, line: &str) -> Command {
    let own = format!(
        "mkdir -p /run/bulkhead /var/lib/bulkhead {prefix}/store && mount -t tmpfs run /run/bulkhead && \
         mount --bind {prefix}/store /var/lib/bulkhead && {line}"
    );
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &own]).stdin(Stdio::null());
    command.env("PATH", format!("{prefix}/bin:{path}")).env(PREFIX_VARIABLE, prefix);
    command
}

/// The whole program: `main` of the test binary.
pub fn main() -> ! {
    let mut words = std::env::args().skip(1);
    let status = match (words.next().as_deref(), words.next()) {
        (Some("--inside"), Some(name)) => inside::supervise(&name).unwrap_or_else(|error| {
            println!("--- the framework failed: {error:#}");
            3
        }),
        (Some("--inside-test"), Some(name)) => match inside::run_test(&name) {
            Ok(()) => 0,
            Err(error) => {
                println!("{error:#}");
                1
            }
        },
        _ => outside(),
    };
    std::process::exit(status)
}

fn outside() -> i32 {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_ONCE);
    // cargo-nextest captures by itself and always says --nocapture.
    let show = arguments.nocapture && std::env::var_os("NEXTEST").is_none();
    let runner = match Runner::new(show) {
        Ok(runner) => Arc::new(runner),
        Err(error) => {
            eprintln!("{error:#}");
            return 2;
        }
    };
    let trials = Test::all()
        .into_iter()
        .filter(|test| !test.needs.hidden)
        .map(|test| {
            let runner = Arc::clone(&runner);
            Trial::test(test.name(), move || runner.run(test)).with_ignored_flag(test.needs.pending.is_some())
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    runner.print_slowest();
    runner.print_failed();
    if conclusion.has_failed() { 101 } else { 0 }
}
