//! How long a guest stands still while it is saved, beside how long all of it takes.
//!
//! `cargo bench -p vmm --bench pause`, with a guest that has touched 1.5 GiB: natively, on any /dev/kvm that opens.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a benchmark that cannot go on panics

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use common::{Guest, Place, kvm};
use vmm::control::{Client, Method, SnapshotRequest};

const RUNS: usize = 5;
const TOUCHED: u32 = 1536 << 20;

fn main() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::new().map_second_gib().touch(0x100_0000, TOUCHED >> 12).print("x").spin();
    let control = place.path("control");
    let mut command = place.monitor(&guest);
    let mut child = command.arg("--memory").arg("2048").arg("--control").arg(&control).spawn().unwrap();
    let mut client = loop {
        if let Ok(mut client) = Client::connect(&control)
            && client.status().is_ok_and(|status| status.console_tail == "x")
        {
            break client;
        }
        assert!(child.try_wait().unwrap().is_none(), "the guest has crashed");
        thread::sleep(Duration::from_millis(2));
    };
    println!("pause of a guest that has touched {} MiB; {RUNS} snapshots", TOUCHED >> 20);
    for _ in 0..RUNS {
        let directory = place.path("saved");
        let request = SnapshotRequest::new(directory.clone(), false);
        let start = Instant::now();
        let taken = client.snapshot(request, |_| (), |_| Ok(())).unwrap();
        println!(
            "  {:>6.1} ms of {:>6} ms, {} MiB written",
            taken.pause_ns as f64 / 1e6,
            start.elapsed().as_millis(),
            taken.memory_bytes >> 20
        );
        fs::remove_dir_all(directory).unwrap();
    }
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();
}
