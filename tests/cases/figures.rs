//! Figures: how long a container takes to start and to return, beside runc and crun in the same host.
//!
//! Times are the host's own. In the emulated host they count instructions (2 ns each): the same in every run, and to be
//! compared with each other, not with those of another machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Program;
use bulkhead_tests::test;
use serde_json::Value;

use crate::BUSYBOX;

const ROUNDS: usize = 5;
const REST: Duration = Duration::from_millis(300);

/// From the start of a command to its first output, and to its end. The middle one of several rounds each.
struct Times {
    first_output: Duration,
    end: Duration,
}

fn measure(mut program: impl FnMut(&str, usize) -> Program) -> Result<Times> {
    // Once for nothing, so that everything is in the page cache.
    program("true", ROUNDS).run()?.ok()?;
    let mut first_output = Vec::new();
    let mut end = Vec::new();
    for round in 0..ROUNDS {
        // What the one before still tidies up in the background is not this one's time.
        std::thread::sleep(REST);
        let start = Instant::now();
        let running = program("echo", 2 * ROUNDS + round).spawn()?;
        running.wait_for("x", Duration::from_secs(20))?;
        first_output.push(start.elapsed());
        running.wait()?.ok()?;
        std::thread::sleep(REST);
        end.push(program("true", ROUNDS + 1 + round).run()?.ok()?.took);
    }
    first_output.sort();
    end.sort();
    Ok(Times { first_output: first_output[ROUNDS / 2], end: end[ROUNDS / 2] })
}

/// A bundle whose process is `applet x`.
fn bundle(host: &Host, runtime: &str, applet: &str) -> Result<PathBuf> {
    let bundle = host.work().join(runtime).join(applet);
    if bundle.exists() {
        return Ok(bundle);
    }
    fs::create_dir_all(bundle.join("rootfs/bin"))?;
    fs::copy("/usr/bin/busybox", bundle.join("rootfs/bin").join(applet))?;
    Program::new([runtime, "spec"]).dir(&bundle).run()?.ok()?;
    let file = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = serde_json::json!([applet, "x"]);
    fs::write(file, config.to_string())?;
    Ok(bundle)
}

fn timeline(trace: &Path) -> Result<Vec<(String, f64)>> {
    let trace: Value = serde_json::from_slice(&fs::read(trace)?)?;
    let events = trace["traceEvents"].as_array().context("no traceEvents")?;
    let row = |event: &Value| {
        let name = format!("{:<9} {}", event["cat"].as_str()?, event["name"].as_str()?);
        Some((name, (event["ts"].as_f64()? + event["dur"].as_f64()?) / 1000.0))
    };
    Ok(events.iter().filter_map(row).collect())
}

test!(start_beside_runc_and_crun, BUSYBOX.deadline(240).shows_output());
fn start_beside_runc_and_crun(host: &Host) -> Result<()> {
    let run = |switch: &'static str| {
        move |applet: &str, _| {
            host.bulkhead_program(["run", "--rm", "busybox", applet, "x"]).env("BULKHEAD_TEMPLATES", switch)
        }
    };
    host.bulkhead(["pool", "warm", "--image", "busybox", "-n", "3"])?.ok()?;
    let pooled = measure(run("1"))?;
    let pooled_trace = trace_of(host, run("1")("true", 0))?;
    host.bulkhead(["pool", "rm", "--all"])?.ok()?;
    let mut rows = vec![
        ("bulkhead run, from its template", measure(run("1"))?),
        ("bulkhead run --no-template", measure(run("0"))?),
    ];
    for (runtime, name, switch) in [
        ("bulkhead-oci", "bulkhead-oci run, from its template", "1"),
        ("bulkhead-oci", "bulkhead-oci run, booted", "0"),
        ("runc", "runc run", "1"),
        ("crun", "crun run", "1"),
    ] {
        let (echo, quiet) = (bundle(host, runtime, "echo")?, bundle(host, runtime, "true")?);
        let state = host.work().join("state");
        let times = measure(|applet, number| {
            let bundle = if applet == "echo" { &echo } else { &quiet };
            let id = format!("c{number}");
            Program::new([runtime, "--root"])
                .args([&state])
                .args(["run", "--bundle"])
                .args([bundle])
                .args([id])
                .env("BULKHEAD_TEMPLATES", switch)
        })?;
        rows.push((name, times));
    }
    rows.insert(0, ("bulkhead run, from a pool", pooled));
    let ours = &rows[0].1;
    let (first, end) = (ours.first_output.as_secs_f64(), ours.end.as_secs_f64());
    println!(
        "| busybox, host's time | first output, ms | ours / theirs | `true` returns, ms | ours / theirs |"
    );
    println!("|---|---|---|---|---|");
    for (name, times) in &rows {
        println!(
            "| {name} | {:.1} | {:.2} | {:.1} | {:.2} |",
            times.first_output.as_secs_f64() * 1e3,
            first / times.first_output.as_secs_f64(),
            times.end.as_secs_f64() * 1e3,
            end / times.end.as_secs_f64(),
        );
    }

    let traces = [
        ("from a pool", pooled_trace),
        ("from its template", trace_of(host, run("1")("true", 0))?),
        ("booted", trace_of(host, run("0")("true", 0))?),
    ];
    for (how, steps) in traces {
        println!(
            "\n| step of `bulkhead run --rm busybox true`, {how} | done after, ms | took, ms |\n|---|---|---|"
        );
        let mut before = 0.0;
        for (name, at) in steps {
            println!("| {name} | {at:.2} | {:.2} |", at - before);
            before = at;
        }
    }
    Ok(())
}

fn trace_of(host: &Host, program: Program) -> Result<Vec<(String, f64)>> {
    let trace = host.work().join("timeline.json");
    std::thread::sleep(REST);
    program.env("BULKHEAD_TRACE", &trace).run()?.ok()?;
    timeline(&trace)
}
