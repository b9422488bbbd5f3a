//! The host's wall clock jumps, as after its suspend or when somebody sets it.

use std::fs;
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
    Ok(fs::remove_dir_all(saved)?)
}

/// All processes of the host stand still and go on, as in a suspend. What comes after that in one, devices and processors, the emulated
/// host does not wake up from.
fn sleep_and_wake() -> Result<()> {
    fs::write("/sys/power/pm_test", "freezer").context("choose what is done of a suspend")?;
    // Seconds, which its processor spends working.
    fs::write("/sys/module/suspend/parameters/pm_test_delay", "1").context("choose how long")?;
    let slept = fs::write("/sys/power/state", "mem").context("suspend");
    fs::write("/sys/power/pm_test", "none")?;
    slept
}

test!(the_host_falls_asleep_and_wakes, BUSYBOX.deadline(300));
fn the_host_falls_asleep_and_wakes(host: &Host) -> Result<()> {
    if !host.is_emulated() {
        println!("left out: this machine is somebody's");
        return Ok(());
    }
    let share = host.work().join("share");
    fs::create_dir(&share)?;
    let volume = format!("{}:/share", share.display());
    let count = "i=0; while :; do i=$((i+1)); echo $i; echo $i >>/share/lines; sleep 0.05; done";
    host.bulkhead(["run", "-d", "--name", "counter", "-v", &volume, "busybox", "sh", "-c", count])?.ok()?;
    let mut cat = host
        .bulkhead_program(["run", "--rm", "-i", "--name", "cat", "busybox", "cat"])
        .open_stdin()
        .spawn()?;
    cat.send("before\n")?;
    cat.wait_for("before", PATIENCE)?;
    let saved = host.work().join("saved").display().to_string();
    let stubborn = "trap '' TERM; sleep 1000";
    host.bulkhead(["run", "-d", "--name", "stubborn", "busybox", "sh", "-c", stubborn])?.ok()?;
    // In the middle of each of them.
    for words in [
        &["run", "--rm", "busybox", "true"][..],
        &["run", "--rm", "--no-template", "busybox", "true"],
        &["exec", "counter", "sleep", "0.1"],
        &["snapshot", "counter", &saved],
        &["stop", "-t", "1", "stubborn"],
    ] {
        let verb = host.bulkhead_program(words.iter().copied()).spawn()?;
        std::thread::sleep(Duration::from_millis(25));
        sleep_and_wake()?;
        verb.wait()?.ok()?;
        let says = number(&host.bulkhead(["exec", "counter", "date", "+%s"])?.ok()?.stdout())?;
        ensure!((says - now()?).abs() <= 1, "after {words:?} the guest's clock is {} s off", says - now()?);
    }
    cat.send("after\n")?;
    cat.wait_for("after", PATIENCE)?;
    cat.close_stdin();
    cat.wait()?.ok()?.stdout_is("before\nafter\n")?;
    host.bulkhead(["stop", "-t", "0", "counter"])?.ok()?;
    let lines = host.bulkhead(["logs", "counter"])?.ok()?.stdout();
    for text in [lines, fs::read_to_string(share.join("lines"))?] {
        let numbers: Vec<i64> = text.lines().map(number).collect::<Result<_>>()?;
        ensure!(numbers.len() > 20 && numbers.iter().zip(1..).all(|(is, to_be)| *is == to_be), "{text}");
    }
    host.bulkhead(["rm", "counter", "stubborn"])?.ok()?;
    Ok(fs::remove_dir_all(saved)?)
}
