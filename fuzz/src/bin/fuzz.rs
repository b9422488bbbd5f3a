//! Runs the targets under libFuzzer, one after the other, and prints what each did as a table.
//!
//! ```text
//! cargo run -p fuzz                      all of them, FUZZ_SECONDS (60) each
//! cargo run -p fuzz -- vsock block       these
//! cargo run -p fuzz -- vsock FILE…       this one on these inputs, once, with all that it says
//! ```
//!
//! The program is built with the compiler that is there: coverage is a pass of LLVM, not a feature of nightly.
//! `FUZZ_SANITIZER=address` adds AddressSanitizer, which is (the compiler is told that it is one).

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use fuzz::{TARGETS, Target, target};

/// What makes a program that libFuzzer can look into: edges that are counted, comparisons that are seen.
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
const HOST: &str = "x86_64-unknown-linux-gnu";
/// Seconds that one input may take, and MiB that the program may have.
const TIMEOUT: u32 = 10;
const MEMORY_MIB: u32 = 2048;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("fuzz: {error:#}");
            ExitCode::from(64)
        }
    }
}

fn run() -> Result<bool> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let seconds: u32 = match std::env::var("FUZZ_SECONDS") {
        Ok(text) => text.parse().context("FUZZ_SECONDS is no number of seconds")?,
        Err(_) => 60,
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tree")?;
    if let [name, files @ ..] = arguments.as_slice()
        && files.iter().any(|file| target(file).is_none())
    {
        let target = named(name)?;
        return again(&build(root)?, target, files);
    }
    let targets: Vec<&Target> = if arguments.is_empty() {
        TARGETS.iter().collect()
    } else {
        arguments.iter().map(|name| named(name)).collect::<Result<_>>()?
    };
    let program = build(root)?;
    let mut good = true;
    println!(
        "{:<16} {:>10} {:>9} {:>7} {:>8} {:>7} {:>8}",
        "target", "runs", "a second", "edges", "features", "inputs", "peak RSS"
    );
    for target in targets {
        good &= fuzz(&program, target, &root.join(".cache/fuzz"), seconds)?;
    }
    Ok(good)
}

fn named(name: &str) -> Result<&'static Target> {
    target(name).with_context(|| {
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        format!("{name:?} is no target; there are: {}", names.join(" "))
    })
}

fn build(root: &Path) -> Result<PathBuf> {
    let sanitizer = std::env::var("FUZZ_SANITIZER").unwrap_or_default();
    let directory = root.join("target").join(format!("fuzz{sanitizer}"));
    let mut flags = COVERAGE.join(" ");
    let mut command = Command::new("cargo");
    match sanitizer.as_str() {
        "" => {}
        "address" => {
            flags.push_str(" -Zsanitizer=address");
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        other => bail!("FUZZ_SANITIZER={other:?}: there is \"address\""),
    }
    command
        .args([
            "build",
            "--quiet",
            "--profile",
            "fuzz",
            "-p",
            "fuzz",
            "--features",
            "libfuzzer",
            "--bin",
            "libfuzzer",
        ])
        .args(["--target", HOST, "--target-dir"])
        .arg(&directory)
        .env("RUSTFLAGS", flags)
        .current_dir(root);
    ensure!(command.status().context("cannot run cargo")?.success(), "the fuzz program cannot be built");
    Ok(directory.join(HOST).join("fuzz/libfuzzer"))
}

fn command(program: &Path, target: &Target) -> Command {
    let mut command = Command::new(program);
    command.env("FUZZ_TARGET", target.name).stdin(Stdio::null());
    command.arg(format!("-timeout={TIMEOUT}")).arg(format!("-rss_limit_mb={MEMORY_MIB}"));
    command
}

/// Runs a target on inputs, and lets it say all that it has to say.
fn again(program: &Path, target: &Target, files: &[String]) -> Result<bool> {
    Ok(command(program, target).args(files).status()?.success())
}

fn fuzz(program: &Path, target: &Target, place: &Path, seconds: u32) -> Result<bool> {
    let corpus = place.join("corpus").join(target.name);
    let found = place.join("found");
    for directory in [&corpus, &found] {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    }
    for (number, seed) in (target.seeds)().into_iter().enumerate() {
        fs::write(corpus.join(format!("seed-{number}")), seed.bytes)?;
    }
    let prefix = found.join(format!("{}-", target.name));
    let output = command(program, target)
        .arg(&corpus)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}", prefix.display()))
        // What targets print is not worth the time that it takes.
        .args(["-print_final_stats=1", "-close_fd_mask=3", "-use_value_profile=1"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    fs::write(place.join(format!("{}.log", target.name)), text.as_bytes())?;
    let of = |word: &str| {
        let after = text.rsplit_once(word).map_or("", |(_, after)| after).trim_start();
        after.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default().to_owned()
    };
    let peak = of("stat::peak_rss_mb:");
    println!(
        "{:<16} {:>10} {:>9} {:>7} {:>8} {:>7} {:>8}",
        target.name,
        of("stat::number_of_executed_units:"),
        of("stat::average_exec_per_sec:"),
        of(" cov: "),
        of(" ft: "),
        of(" corp: "),
        format!("{peak} MiB"),
    );
    std::io::stdout().flush()?;
    if output.status.success() {
        return Ok(true);
    }
    let input =
        text.lines().rev().find_map(|line| line.split_once("Test unit written to ")).map(|(_, path)| path);
    match input {
        Some(input) => {
            eprintln!("{}: it breaks on {input}:", target.name);
            again(program, target, &[input.to_owned()])?;
        }
        None => eprintln!("{}: it ended with {}; {}", target.name, output.status, text),
    }
    Ok(false)
}
