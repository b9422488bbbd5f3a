//! How long from exec to the first KVM_RUN, and how much memory of its own the monitor has dirtied by then.
//!
//! `cargo bench -p vmm`, with a guest of two instructions: it measures the monitor, on any /dev/kvm that opens.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a benchmark that cannot go on panics

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use common::{Guest, Place, kvm};
use vmm::control::{Client, Method, SnapshotRequest};
use vmm::timeline::{START_ENV, now_ns};

const RUNS: usize = 50;
const MEMORY_MIB: u32 = 128;
/// How the monitor ends of flags that it does not know, as those are that the jailer adds.
const REFUSED: i32 = 64;

fn main() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let kernel = place.write("kernel", Guest::new().exit(0).elf());
    let config = format!(
        r#"{{"boot":{{"kernel":{kernel:?}}},"machine":{{"memory_mib":{MEMORY_MIB}}},"report":{:?},
            "vsock":{{"socket":{:?}}}}}"#,
        place.path("report"),
        place.path("vsock")
    );
    let config = place.write("config", config);
    let mut samples: Vec<(u64, Vec<(String, u64)>)> =
        (0..RUNS).map(|_| one_start(&place, &config, &[])).collect();
    samples.sort_by_key(|(total, _)| *total);
    let (best, median, worst) = (&samples[0], &samples[RUNS / 2], &samples[RUNS - 1]);
    println!("exec to first KVM_RUN, {MEMORY_MIB} MiB, vsock, rng, console; {RUNS} runs");
    println!("  best {} µs, median {} µs, worst {} µs", best.0 / 1000, median.0 / 1000, worst.0 / 1000);
    println!("  the best run, step by step:");
    for (event, ns) in &best.1 {
        println!("    {event:<14} {:>6} µs", ns / 1000);
    }
    jail(&place, &config);
    restores(&place);
    println!("private dirty memory of the monitor, guest excluded: {} KiB", dirty_memory(&place));
}

/// What the filters of system calls and the rest of the jail add, start by start in turn; and Firecracker's jailer, whose program
/// FIRECRACKER_JAILER names, around a program that ends at once.
fn jail(place: &Place, config: &Path) {
    // SAFETY: takes no pointers and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        println!("the jail: left out, the monitor makes all of it for root only");
        return;
    }
    let ways = [&["--no-seccomp"][..], &[], &["--jail"]];
    let mut times: [Vec<u64>; 3] = Default::default();
    for _ in 0..RUNS {
        for (way, times) in ways.iter().zip(&mut times) {
            times.push(one_start(place, config, way).0);
        }
    }
    println!("what isolation adds to it, {RUNS} runs of each in turn");
    difference("filters of system calls", &times[1], &times[0]);
    difference("filters and jail", &times[2], &times[0]);
    let Some(jailer) = env::var_os("FIRECRACKER_JAILER") else { return };
    // It takes a program of such a name only, and copies it.
    let program = place.path("firecracker");
    fs::copy(env!("CARGO_BIN_EXE_bulkhead-vmm"), &program).unwrap();
    let base = place.path("jails");
    fs::create_dir(&base).unwrap();
    let (mut jailed, mut plain) = (Vec::new(), Vec::new());
    for number in 0..RUNS {
        let time = |command: &mut Command| {
            let start = now_ns();
            let done = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
            let took = now_ns() - start;
            assert_eq!(done.code(), Some(REFUSED), "{command:?}: {done}");
            took
        };
        plain.push(time(Command::new(&program).arg("--id")));
        let mut command = Command::new(&jailer);
        command.arg("--id").arg(format!("bench{number}")).arg("--exec-file").arg(&program);
        command.args(["--uid", "1900000000", "--gid", "1900000000", "--chroot-base-dir"]).arg(&base);
        jailed.push(time(&mut command));
    }
    difference("Firecracker's jailer (no namespaces but that of mounts)", &jailed, &plain);
}

/// Best against best, and the median of the differences of runs that followed each other.
fn difference(what: &str, with: &[u64], without: &[u64]) {
    let best = |times: &[u64]| times.iter().min().copied().unwrap_or(0) as f64 / 1e6;
    let mut pairs: Vec<_> = with.iter().zip(without).map(|(a, b)| (*a as f64 - *b as f64) / 1e6).collect();
    pairs.sort_by(f64::total_cmp);
    println!(
        "  {what}: best {:.2} ms more, median of pairs {:.2} ms more",
        best(with) - best(without),
        pairs[pairs.len() / 2]
    );
}

/// The same for a machine that goes on from a snapshot of a guest that writes 16 MiB and then waits.
fn restores(place: &Place) {
    let guest = Guest::new().fill(0x100_0000, 16 << 20).print("x").spin();
    let kernel = place.write("kernel2", guest.elf());
    let devices = format!(
        r#""machine":{{"memory_mib":{MEMORY_MIB}}},"report":{:?},"vsock":{{"socket":{:?}}}"#,
        place.path("report"),
        place.path("vsock")
    );
    let control = place.path("control2");
    let first = place
        .write("first", format!(r#"{{"boot":{{"kernel":{kernel:?}}},"control":{control:?},{devices}}}"#));
    let mut child = common::monitor().arg("--config").arg(first).spawn().unwrap();
    let mut client = loop {
        if let Ok(mut client) = Client::connect(&control)
            && client.status().is_ok_and(|status| status.console_tail == "x")
        {
            break client;
        }
        thread::sleep(Duration::from_millis(2));
    };
    let directory = place.path("snapshot");
    let taken = client.call(save(directory.clone())).unwrap();
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();
    let ready = place.path("ready");
    let listener = std::os::unix::net::UnixListener::bind(&ready).unwrap();
    let config = format!(r#"{{"restore":{directory:?},"control":{control:?},"ready":{ready:?},{devices}}}"#);
    let config = place.write("restore", config);
    let mut samples: Vec<(u64, Vec<(String, u64)>)> = (0..RUNS)
        .map(|_| {
            let start = now_ns();
            let mut child = common::monitor()
                .arg("--config")
                .arg(&config)
                .env(START_ENV, start.to_string())
                .spawn()
                .unwrap();
            drop(listener.accept().unwrap());
            let mut client = loop {
                match Client::connect(&control) {
                    Ok(client) => break client,
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            };
            client.call(Method::Quit).unwrap();
            child.wait().unwrap();
            steps(place, start)
        })
        .collect();
    samples.sort_by_key(|(total, _)| *total);
    let (best, median, worst) = (&samples[0], &samples[RUNS / 2], &samples[RUNS - 1]);
    println!("exec to first KVM_RUN of a machine that goes on from a snapshot of 16 MiB: {taken}");
    println!("  best {} µs, median {} µs, worst {} µs", best.0 / 1000, median.0 / 1000, worst.0 / 1000);
    for (event, ns) in &best.1 {
        println!("    {event:<14} {:>6} µs", ns / 1000);
    }
}

/// Time from exec to the first entry into the guest, and the steps between in nanoseconds.
fn one_start(place: &Place, config: &Path, more: &[&str]) -> (u64, Vec<(String, u64)>) {
    let start = now_ns();
    let mut monitor = common::monitor();
    monitor.arg("--config").arg(config).args(more).env(START_ENV, start.to_string());
    let status = monitor.status().unwrap();
    assert!(status.success(), "{status}");
    steps(place, start)
}

/// What the report says of the start.
fn steps(place: &Place, start: u64) -> (u64, Vec<(String, u64)>) {
    let report = place.report();
    let mut last = start;
    let mut steps = Vec::new();
    for event in report["timeline"].as_array().unwrap().iter().skip(1) {
        let ns = event["ns"].as_u64().unwrap();
        steps.push((event["event"].as_str().unwrap().to_owned(), ns - last));
        last = ns;
        if event["event"] == "first-run" {
            break;
        }
    }
    (last - start, steps)
}

/// Pages of its own of a monitor whose guest runs, in KiB, without the guest's memory: the one huge mapping.
/// `Private_Dirty` would count the pages of a binary that was only just written to disk.
fn dirty_memory(place: &Place) -> u64 {
    let socket = place.path("control");
    let mut child = place
        .monitor(&Guest::new().spin())
        .arg("--memory")
        .arg(MEMORY_MIB.to_string())
        .arg("--control")
        .arg(&socket)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !Client::connect(&socket).is_ok_and(|mut client| client.status().is_ok()) {
        assert!(Instant::now() < deadline, "the monitor does not answer");
        thread::sleep(Duration::from_millis(5));
    }
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", child.id())).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let (mut total, mut mapping_kib) = (0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next().and_then(|word| word.parse::<u64>().ok())) {
            (Some("Size:"), Some(kib)) => mapping_kib = kib,
            (Some("Anonymous:"), Some(kib)) if mapping_kib < u64::from(MEMORY_MIB) * 1024 => total += kib,
            _ => {}
        }
    }
    total
}

fn save(directory: std::path::PathBuf) -> Method {
    Method::Snapshot(SnapshotRequest::new(directory, false))
}
