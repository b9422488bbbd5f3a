//! Processes that stand still (SIGSTOP, which is also the nearest that this host has to its own suspend), readers that do not read,
//! and a clock that jumps: every verb ends in time, says why it could not do what was asked, and what goes on loses nothing.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Finished, Program};
use bulkhead_tests::test;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::BUSYBOX;
use crate::faults::{comm, ends, rss_kib};
use crate::network::connected;
use crate::oci::Bundle;

const PATIENCE: Duration = Duration::from_secs(20);
/// Says numbers, one after the other.
const COUNTER: &str = "trap 'exit 7' TERM; i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
/// How long a verb may take that needs no answer of who stands still, and one that waits for it.
const AT_ONCE: Duration = Duration::from_secs(2);
const IN_TIME: Duration = Duration::from_secs(75);

/// Supervisor and monitor.
fn processes(host: &Host, name: &str) -> Result<[u64; 2]> {
    let seen: Vec<Value> = serde_json::from_str(&host.bulkhead(["inspect", name])?.ok()?.stdout())?;
    let pid = |key: &str| seen[0][key].as_u64().filter(|pid| *pid > 0).with_context(|| format!("no {key}"));
    Ok([pid("supervisor_pid")?, pid("monitor_pid")?])
}

fn send(pid: u64, signal: Signal) -> Result<()> {
    Ok(kill_process(i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process")?, signal)?)
}

/// A verb that must end within a time.
fn within(host: &Host, patience: Duration, words: &[&str]) -> Result<Finished> {
    let finished = ends(host.bulkhead_program(words.iter().copied()).spawn()?)?;
    ensure!(finished.took <= patience, "it took longer than {patience:?}: {finished}");
    println!("| {} | {} | {:.1} s |", words.join(" "), finished.status, finished.took.as_secs_f64());
    Ok(finished)
}

/// Every number follows the one before, and there are more than there were.
fn counts_on(host: &Host, name: &str, than: u64) -> Result<u64> {
    let mut last = 0;
    host.eventually("it to count on", PATIENCE, || {
        let said = host.bulkhead(["logs", name])?.ok()?.stdout();
        for (line, wanted) in said.lines().zip(1_u64..) {
            ensure!(line.parse::<u64>()? == wanted, "{line} came where {wanted} should");
            last = wanted;
        }
        Ok(last > than + 2)
    })?;
    Ok(last)
}

fn counter(host: &Host, name: &str, options: &[&str]) -> Result<()> {
    let words = [&["run", "-d", "--name", name], options, &["busybox", "sh", "-c", COUNTER]].concat();
    host.bulkhead(words)?.ok()?;
    counts_on(host, name, 0).map(drop)
}

test!(a_monitor_that_stands_still_holds_up_nobody, BUSYBOX.deadline(2000).shows_output());
fn a_monitor_that_stands_still_holds_up_nobody(host: &Host) -> Result<()> {
    println!("| verb, with its monitor stopped | status | took |\n|---|---|---|");
    let before = {
        // It does nothing, so that waiting costs nothing.
        host.bulkhead(["run", "-d", "--name", "well", "busybox", "sleep", "100000"])?.ok()?;
        std::thread::sleep(Duration::from_secs(1));
        host.look()
    };
    let file = host.file("some", "thing")?.display().to_string();
    let saved = host.work().join("saved").display().to_string();
    counter(host, "box", &[])?;
    let [_, monitor] = processes(host, "box")?;
    let mut attached = host.bulkhead_program(["exec", "box", "sh", "-c", "sleep 1; echo slept"]).spawn()?;
    std::thread::sleep(Duration::from_millis(300));
    send(monitor, Signal::STOP)?;
    let said = counts_on(host, "box", 0)?;
    within(host, AT_ONCE, &["ps", "-a"])?.ok()?.stdout_has("running")?;
    within(host, AT_ONCE, &["inspect", "box"])?.ok()?.stdout_has("running")?;
    within(host, AT_ONCE, &["logs", "box"])?.ok()?;
    // At once, since each waits.
    let waits = [
        (&["exec", "box", "true"][..], "stands still"),
        (&["cp", &file, "box:/tmp"], "stands still"),
        (&["cp", "box:/etc/passwd", &saved], "stands still"),
        (&["top", "box"], "stands still"),
        (&["stats", "box"], "stands still"),
        (&["kill", "-s", "TERM", "box"], "stands still"),
        (&["snapshot", "box", &saved], "does not answer"),
        (&["fork", "--name", "twin", "box"], "does not answer"),
    ];
    let spawn = |words: &[&str]| host.bulkhead_program(words.iter().copied()).spawn();
    let running = waits.iter().map(|(words, _)| spawn(words)).collect::<Result<Vec<_>>>()?;
    for (running, (words, why)) in running.into_iter().zip(waits) {
        let finished = ends(running)?;
        println!("| {} | {} | fails |", words.join(" "), finished.status);
        ensure!(finished.took <= IN_TIME, "{finished}");
        finished.failed()?.stderr_has(why)?;
    }
    within(host, AT_ONCE, &["exec", "well", "true"])?.ok()?;
    // It goes on as if nothing had been, but for the time.
    ensure!(!attached.ended()?, "exec has ended while its machine stood still");
    send(monitor, Signal::CONT)?;
    ends(attached)?.ok()?.stdout_is("slept\n")?;
    counts_on(host, "box", said)?;
    within(host, AT_ONCE, &["exec", "box", "true"])?.ok()?;

    // Whoever is to end ends.
    for (verb, status) in
        [(&["stop", "-t", "1", "box"][..], "137"), (&["kill", "box"], "137"), (&["rm", "-f", "box"], "")]
    {
        let [_, monitor] = processes(host, "box")?;
        send(monitor, Signal::STOP)?;
        within(host, IN_TIME, verb)?.ok()?;
        if !status.is_empty() {
            host.eventually("its end", PATIENCE, || {
                Ok(host.bulkhead(["inspect", "box"])?.ok()?.stdout().contains("exited"))
            })?;
            host.bulkhead(["wait", "box"])?.ok()?.stdout_is(&format!("{status}\n"))?;
            host.bulkhead(["rm", "box"])?.ok()?;
            host.bulkhead(["run", "-d", "--name", "box", "busybox", "sleep", "1000"])?.ok()?;
        }
    }
    host.is_as(&before, "a stopped monitor", PATIENCE)?;
    host.bulkhead(["rm", "-f", "well"])?.ok().map(drop)
}

test!(a_supervisor_that_stands_still_holds_up_nobody, BUSYBOX.deadline(2000).shows_output());
fn a_supervisor_that_stands_still_holds_up_nobody(host: &Host) -> Result<()> {
    println!("| verb, with its supervisor stopped | status | took |\n|---|---|---|");
    let _network = connected(host)?;
    let share = host.work().join("share");
    fs::create_dir(&share)?;
    let volume = format!("{}:/share", share.display());
    let options = ["-v", &volume, "--network", "passt"];
    counter(host, "box", &options)?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    std::thread::sleep(Duration::from_secs(1));
    let before = host.look();
    counter(host, "box", &options)?;
    let [supervisor, _] = processes(host, "box")?;
    send(supervisor, Signal::STOP)?;
    within(host, AT_ONCE, &["ps", "-a"])?.ok()?.stdout_has("running")?;
    within(host, AT_ONCE, &["exec", "box", "true"])?.ok()?;
    within(host, AT_ONCE, &["kill", "-s", "CONT", "box"])?.ok()?;
    // What the container says waits for it, and is not lost.
    host.run(["sleep", "5"])?.ok()?;
    send(supervisor, Signal::CONT)?;
    counts_on(host, "box", 25)?;
    for verb in [&["stop", "-t", "1", "box"][..], &["rm", "-f", "box"]] {
        let [supervisor, _] = processes(host, "box")?;
        send(supervisor, Signal::STOP)?;
        within(host, IN_TIME, verb)?.ok()?;
        if verb[0] == "stop" {
            host.bulkhead(["ps", "-a"])?.ok()?.stdout_has("exited (137)")?;
            host.bulkhead(["rm", "box"])?.ok()?;
            host.is_as(&before, "a stopped supervisor", PATIENCE)?;
            counter(host, "box", &options)?;
        }
    }
    host.is_as(&before, "a stopped supervisor", PATIENCE)
}

test!(a_file_server_that_stands_still_holds_up_its_files_alone, BUSYBOX.deadline(2000).shows_output());
fn a_file_server_that_stands_still_holds_up_its_files_alone(host: &Host) -> Result<()> {
    println!("| verb, with its file server stopped | status | took |\n|---|---|---|");
    let share = host.work().join("share");
    fs::create_dir(&share)?;
    let volume = format!("{}:/share", share.display());
    let writer = "i=0; while :; do i=$((i+1)); echo $i >>/share/log; sleep 0.1; done";
    let run = ["run", "-d", "--name", "box", "-v", &volume, "busybox", "sh", "-c", writer];
    let servers = || -> Result<Vec<u64>> {
        let pids = host.run(["pgrep", "-f", "virtiofsd"])?.ok()?.stdout();
        pids.lines().map(|pid| Ok(pid.parse()?)).collect()
    };
    let all = |signal| servers()?.into_iter().try_for_each(|pid| send(pid, signal));
    let written = || -> Result<u64> {
        let text = fs::read_to_string(share.join("log")).unwrap_or_default();
        for (line, wanted) in text.lines().zip(1_u64..) {
            ensure!(line.parse::<u64>()? == wanted, "{line} came where {wanted} should");
        }
        Ok(text.lines().count().try_into()?)
    };
    for end in [&["rm", "-f", "box"][..], &["stop", "-t", "1", "box"], &["kill", "box"]] {
        let _ = fs::remove_file(share.join("log"));
        host.bulkhead(run)?.ok()?;
        host.eventually("it to write", PATIENCE, || Ok(written()? > 3))?;
        all(Signal::STOP)?;
        let before = written()?;
        host.run(["sleep", "5"])?.ok()?;
        ensure!(written()? == before, "the file grew under a stopped server");
        within(host, AT_ONCE, &["ps", "-a"])?.ok()?.stdout_has("running")?;
        within(host, AT_ONCE, &["exec", "box", "echo", "well"])?.ok()?.stdout_is("well\n")?;
        let reader = host.bulkhead_program(["exec", "box", "cat", "/share/log"]).spawn()?;
        std::thread::sleep(Duration::from_millis(500));
        all(Signal::CONT)?;
        // Who waited has its answer, and nothing is missing.
        ends(reader)?.ok()?.stdout_has("1\n2\n3\n")?;
        host.eventually("it to write on", PATIENCE, || Ok(written()? > before + 3))?;
        all(Signal::STOP)?;
        let stuck = host.bulkhead_program(["exec", "box", "cat", "/share/log"]).spawn()?;
        std::thread::sleep(Duration::from_millis(500));
        within(host, IN_TIME, end)?.ok()?;
        if end[0] == "kill" {
            // The guest's kernel waits for an answer that was asked for; a killed process ends when it comes.
            all(Signal::CONT)?;
        }
        ends(stuck)?;
        host.bulkhead(["rm", "-f", "box"])?.ok()?;
        host.eventually("the servers to go", PATIENCE, || Ok(servers().is_err()))?;
    }
    Ok(())
}

test!(an_engine_is_held_up_by_nobody_who_stands_still, BUSYBOX.deadline(2000).shows_output());
fn an_engine_is_held_up_by_nobody_who_stands_still(host: &Host) -> Result<()> {
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.runs(COUNTER)?;
    bundle.change(|config| config["annotations"] = json!({"dev.bulkhead.memory": "128"}))?;
    let bounded = |words: &[&str]| -> Result<Finished> {
        let finished = ends(bundle.program(words).spawn()?)?;
        ensure!(finished.took <= IN_TIME, "{finished}");
        println!("| {} | {} | {:.1} s |", words.join(" "), finished.status, finished.took.as_secs_f64());
        Ok(finished)
    };
    let images = host.work().join("images").display().to_string();
    for victim in ["bulkhead-vmm", "bulkhead-oci"] {
        println!("| verb, with {victim} stopped | status | took |\n|---|---|---|");
        for end in [&["kill", "box", "KILL"][..], &["delete", "-f", "box"]] {
            bundle.apart(&["run", "-d", "box"])?;
            host.run(["killall", "-STOP", victim])?.ok()?;
            bounded(&["state", "box"])?.ok()?.stdout_has("running")?;
            bounded(&["list"])?.ok()?;
            if victim == "bulkhead-vmm" && end[0] == "kill" {
                let waits = [
                    (&["exec", "box", "true"][..], "stands still"),
                    (&["pause", "box"], "stands still"),
                    (&["update", "--pids-limit", "100", "box"], "stands still"),
                    (&["kill", "box", "TERM"], "stands still"),
                    (&["checkpoint", "--image-path", &images, "box"], "does not answer"),
                ];
                let spawn = |words: &[&str]| bundle.program(words).spawn();
                let running = waits.iter().map(|(words, _)| spawn(words)).collect::<Result<Vec<_>>>()?;
                for (running, (_, why)) in running.into_iter().zip(waits) {
                    let finished = ends(running)?;
                    ensure!(finished.took <= IN_TIME && finished.status != 0, "{finished}");
                    finished.stderr_has(why)?;
                }
            }
            bounded(end)?.ok()?;
            bounded(&["delete", "-f", "box"])?.ok()?;
            bundle.nothing_left()?;
        }
    }
    Ok(())
}

test!(nobody_reads_and_all_else_goes_on, BUSYBOX.deadline(600).shows_output());
fn nobody_reads_and_all_else_goes_on(host: &Host) -> Result<()> {
    const READERS: usize = 24;
    host.bulkhead(["run", "-d", "--name", "box", "busybox", "sleep", "100000"])?.ok()?;
    let [supervisor, monitor] = processes(host, "box")?;
    let sizes = || -> Result<[u64; 2]> { Ok([rss_kib(supervisor)?, rss_kib(monitor)?]) };
    let before = sizes()?;
    let mut stuck = Vec::new();
    for _ in 0..READERS {
        // The pipe is full soon, and then the stream, and then the guest's own pipe.
        stuck.push(
            Program::new(["sh", "-c", "bulkhead exec box yes 'a line that nobody reads' | sleep 1000"])
                .spawn()?,
        );
    }
    host.run(["sleep", "5"])?.ok()?;
    let start = Instant::now();
    within(host, AT_ONCE, &["exec", "box", "echo", "well"])?.ok()?.stdout_is("well\n")?;
    within(host, AT_ONCE, &["top", "box"])?.ok()?;
    let file = host.file("some", vec![b'x'; 1 << 20])?.display().to_string();
    within(host, AT_ONCE, &["cp", &file, "box:/tmp"])?.ok()?;
    println!("beside {READERS} streams that nobody reads: {:.3} s", start.elapsed().as_secs_f64());
    let after = sizes()?;
    println!("supervisor and monitor, KiB: {before:?}, then {after:?}");
    // Guest pages among the monitor's: a few MiB for the processes and what was copied.
    ensure!(after[0] < before[0] + 4096 && after[1] < before[1] + 96 * 1024, "{before:?} {after:?}");
    within(host, IN_TIME, &["rm", "-f", "box"])?.ok()?;
    host.run(["killall", "sleep"])?.ok()?;
    for running in stuck {
        ends(running)?;
    }
    // Those of exec end with their container.
    host.eventually("all of exec to end", PATIENCE, || {
        Ok(!fs::read_dir("/proc")?.flatten().any(|entry| {
            entry
                .file_name()
                .to_str()
                .and_then(|pid| pid.parse().ok())
                .is_some_and(|pid| comm(pid) == "bulkhead")
        }))
    })
}
