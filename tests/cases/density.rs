//! Figures: memory and start of many containers from one template. `benches/run` makes a picture of them.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;

use crate::BUSYBOX;

/// As many as fit into the emulated host beside everything else.
const CLONES: usize = 40;
/// A line each so many.
const STEP: usize = 4;

/// A line of `/proc/PID/smaps_rollup`, in KiB.
fn kib(pid: &str, name: &str) -> Result<u64> {
    let path = Path::new("/proc").join(pid).join("smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let line = text.lines().find(|line| line.starts_with(name)).with_context(|| format!("no {name}"))?;
    Ok(line.split_whitespace().nth(1).context("no number")?.parse()?)
}

test!(
    density,
    BUSYBOX
        .deadline(300)
        .shows_output()
        .pending("figures of many containers: `make bench`, or `-- --ignored`")
);
fn density(host: &Host) -> Result<()> {
    // The template is made, and taught.
    host.bulkhead(["run", "--rm", "--memory", "64m", "busybox", "true"])?.ok()?;
    println!(
        "containers of one template, idle: number, KiB of each monitor: its own (anonymous), PSS; ms that `run -d` took"
    );
    for number in 1..=CLONES {
        std::thread::sleep(Duration::from_millis(300));
        let took = host
            .bulkhead(["run", "-d", "--memory", "64m", "busybox", "sleep", "1000"])?
            .ok()?
            .took
            .as_secs_f64();
        if number != 1 && number % STEP != 0 {
            continue;
        }
        let monitors = host.run(["pidof", "bulkhead-vmm"])?.ok()?.stdout();
        let monitors: Vec<_> = monitors.split_whitespace().collect();
        ensure!(monitors.len() == number, "{monitors:?}");
        let (mut own, mut pss) = (0, 0);
        for pid in &monitors {
            own += kib(pid, "Anonymous:")?;
            pss += kib(pid, "Pss:")?;
        }
        let count = number as u64;
        println!("density {number} {} {} {:.1}", own / count, pss / count, took * 1e3);
    }
    let all = host.bulkhead(["ps", "-q"])?.ok()?.stdout();
    let mut words = vec!["rm", "-f"];
    words.extend(all.split_whitespace());
    host.bulkhead(words)?.ok()?;
    Ok(())
}
