//! Memory and start of many machines that go on from one snapshot: 100 of them here, with a guest that writes 16 MiB before it is
//! saved and halts. With `--linux FILE` and `--svg FILE`, a picture of these and of the Linux machines that the case
//! `density` of the whole-system tests has measured.
//!
//! `benches/run` does both and writes docs/density.svg.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a benchmark that cannot go on panics

#[path = "../tests/common/mod.rs"]
mod common;
mod plot;

use std::fs;
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use common::{Guest, Place, kvm};
use plot::Point;
use vmm::control::{Client, Method, SnapshotRequest};
use vmm::timeline::{START_ENV, now_ns};

const CLONES: usize = 100;
/// A point of the picture each so many machines.
const STEP: usize = 5;
const MEMORY_MIB: u32 = 128;

fn main() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let snapshot = save(&place);
    let mut clones: Vec<(Child, Client)> = Vec::new();
    let mut points = Vec::new();
    println!(
        "machines that go on from one snapshot, guest of 16 MiB, idle: memory of each monitor, all of it; start"
    );
    while clones.len() < CLONES {
        let (child, client, start_us) = go_on(&place, &snapshot, clones.len());
        clones.push((child, client));
        if clones.len() == 1 || clones.len().is_multiple_of(STEP) {
            points.push(point(&clones, start_us));
        }
    }
    for Point { number, own_kib, pss_kib, start_ms } in points.iter().filter(|p| p.number % 20 < 2) {
        println!(
            "  {number:>3}: own {own_kib:.0} KiB, PSS {pss_kib:.0} KiB, exec to first KVM_RUN {start_ms:.2} ms"
        );
    }
    for (child, client) in &mut clones {
        client.call(Method::Quit).unwrap();
        child.wait().unwrap();
    }
    let mut words = std::env::args().skip_while(|word| word != "--linux");
    if let (Some(linux), Some(svg)) = (words.nth(1), words.nth(1)) {
        let linux = plot::read(&fs::read_to_string(linux).unwrap());
        plot::draw(Path::new(&svg), &points, &linux).unwrap();
        println!("written: {svg}");
    }
}

/// Saves a guest that has written 16 MiB and halts.
fn save(place: &Place) -> std::path::PathBuf {
    const HALT_FOR_EVER: [u8; 3] = [0xf4, 0xeb, 0xfd];
    let guest = Guest::new().fill(0x100_0000, 16 << 20).print("x").raw(&HALT_FOR_EVER);
    let kernel = place.write("kernel", guest.elf());
    let control = place.path("first.control");
    let config = place.write("first", config(place, "first", &format!(r#""boot":{{"kernel":{kernel:?}}}"#)));
    let mut child = common::monitor().arg("--config").arg(config).spawn().unwrap();
    let mut client = connect(&control, "x");
    let directory = place.path("snapshot");
    let wish = SnapshotRequest::new(directory.clone(), false);
    client.call(Method::Snapshot(wish)).unwrap();
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();
    directory
}

fn config(place: &Place, name: &str, from: &str) -> String {
    format!(
        r#"{{{from},"machine":{{"memory_mib":{MEMORY_MIB}}},"control":{:?},"vsock":{{"socket":{:?}}}}}"#,
        place.path(&format!("{name}.control")),
        place.path(&format!("{name}.vsock"))
    )
}

fn connect(socket: &Path, printed: &str) -> Client {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Ok(mut client) = Client::connect(socket)
            && client.status().is_ok_and(|status| status.console_tail == printed)
        {
            return client;
        }
        assert!(Instant::now() < deadline, "the monitor does not answer");
        thread::sleep(Duration::from_millis(1));
    }
}

/// One more machine, and how many microseconds it took from exec to the first entry into the guest.
fn go_on(place: &Place, snapshot: &Path, number: usize) -> (Child, Client, u64) {
    let name = format!("clone{number}");
    let config = place.write(&name, config(place, &name, &format!(r#""restore":{snapshot:?}"#)));
    let start = now_ns();
    let child =
        common::monitor().arg("--config").arg(config).env(START_ENV, start.to_string()).spawn().unwrap();
    let mut client = connect(&place.path(&format!("{name}.control")), "");
    let metrics = client.call(Method::Metrics).unwrap();
    let events = metrics["timeline"].as_array().unwrap();
    let first_run = events.iter().find(|event| event["event"] == "first-run").unwrap();
    (child, client, (first_run["ns"].as_u64().unwrap() - start) / 1000)
}

fn point(clones: &[(Child, Client)], start_us: u64) -> Point {
    let (mut own, mut pss) = (0, 0);
    for (child, _) in clones {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", child.id())).unwrap();
        let kib = |name: &str| {
            let line = rollup.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        own += kib("Anonymous:");
        pss += kib("Pss:");
    }
    let number = clones.len();
    let mean = |sum: u64| sum as f64 / number as f64;
    Point { number, own_kib: mean(own), pss_kib: mean(pss), start_ms: start_us as f64 / 1000.0 }
}
