//! The host's wall clock jumps, as after its suspend or when somebody sets it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;

use crate::BUSYBOX;

const PATIENCE: Duration = Duration::from_secs(20);

fn now() -> Result<i64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs().cast_signed())
}

fn number(text: &str) -> Result<i64> {
    text.trim().parse().with_context(|| format!("{text:?} is no number"))
}

test!(the_hosts_clock_jumps_and_nothing_breaks, BUSYBOX.deadline(600).shows_output());
fn the_hosts_clock_jumps_and_nothing_breaks(host: &Host) -> Result<()> {
    let begun = now()?;
    let script = "trap '' TERM; while :; do date +%s; sleep 0.2; done";
    host.bulkhead(["run", "-d", "--name", "old", "busybox", "sh", "-c", script])?.ok()?;
    host.bulkhead(["pool", "warm", "--image", "busybox", "-n", "1"])?.ok()?;
    let saved = host.work().join("saved").display().to_string();
    host.bulkhead(["snapshot", "old", &saved])?.ok()?;
    println!(
        "| the host's clock | a container that ran | a new one | one of the pool | a copy |\n|---|---|---|---|---|"
    );
    for jump in [86_400, -172_800, 40 * 365 * 86_400] {
        host.run(["date", "-s", &format!("@{}", now()? + jump)])?.ok()?;
        let says =
            |words: &[&str]| -> Result<i64> { Ok(number(&host.bulkhead(words)?.ok()?.stdout())? - now()?) };
        // Its clock is its guest's, which nobody sets a second time; who begins begins with the host's.
        let old = says(&["exec", "old", "date", "+%s"])? + now()? - begun;
        let new = says(&["run", "--rm", "--no-pool", "busybox", "date", "+%s"])?;
        let pooled = says(&["run", "--rm", "busybox", "date", "+%s"])?;
        host.bulkhead(["restore", "-d", "--name", "copy", &saved])?.ok()?;
        let copy = says(&["exec", "copy", "date", "+%s"])?;
        host.bulkhead(["rm", "-f", "copy"])?.ok()?;
        println!("| {jump:+} s | +{old} s since its start | {new:+} s | {pooled:+} s | {copy:+} s |");
        ensure!((0..60).contains(&old) && [new, pooled, copy].iter().all(|off| (-1..=1).contains(off)));

        // What is listed, logged and waited for.
        host.bulkhead(["ps", "-a"])?.ok()?.stdout_has("running")?;
        host.bulkhead(["logs", "-n", "3", "-t", "old"])?.ok()?;
        host.bulkhead(["logs", "--since", "10", "old"])?.ok()?;
        host.bulkhead(["pool", "ls"])?.ok()?.stdout_has("busybox")?;
        host.eventually("the pool to be full", PATIENCE, || {
            Ok(host.bulkhead(["pool", "ls"])?.ok()?.stdout().contains("1/1"))
        })?;
        let run = ["run", "-d", "--name", "stubborn", "busybox", "sh", "-c", script];
        host.bulkhead(run)?.ok()?;
        let (start, stop) = (Instant::now(), host.bulkhead_program(["stop", "-t", "3", "stubborn"]).spawn()?);
        std::thread::sleep(Duration::from_millis(500));
        host.run(["date", "-s", &format!("@{}", now()? - 1000)])?.ok()?;
        stop.wait()?.ok()?;
        host.run(["date", "-s", &format!("@{}", now()? + 1000)])?.ok()?;
        let took = start.elapsed().as_secs_f64();
        ensure!((2.9..4.5).contains(&took), "stop -t 3 took {took:.1} s while the clock jumped back");
        host.bulkhead(["wait", "stubborn"])?.ok()?.stdout_is("137\n")?;
        host.bulkhead(["rm", "stubborn"])?.ok()?;
    }
    host.bulkhead(["rm", "-f", "old"])?.ok()?;
    host.bulkhead(["pool", "rm", "--all"])?.ok()?;
    Ok(std::fs::remove_dir_all(saved)?)
}
