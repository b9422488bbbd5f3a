//! Checkpoints by engines: containerd with Bulkhead's shim and with its own for runc, and dockerd.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;

use crate::containerd::{Ctr, SHIM, daemon, ended};
use crate::docker::with_daemon;

const PATIENCE: Duration = Duration::from_secs(30);
/// Counts in memory, to its output and to a file that it keeps open.
const COUNTER: &str = "exec 3>>/said; i=0; while :; do i=$((i+1)); echo $i; echo $i >&3; sleep 0.1; done";

/// What was said last; 0 for nothing.
fn last(text: &str) -> u64 {
    text.lines().filter_map(|line| line.trim().parse().ok()).next_back().unwrap_or(0)
}

/// Numbers that follow each other.
fn counts(text: &str) -> Result<()> {
    let numbers: Vec<u64> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
    ensure!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
    Ok(())
}

fn containers(ctr: &Ctr<'_>) -> Result<()> {
    let inside = |id: &str| -> Result<String> {
        Ok(ctr.call(&["task", "exec", "--exec-id", "look", id, "cat", "/said"])?.stdout())
    };
    let flags = ["-d", "--memory-limit", "67108864"];
    ctr.run(&flags, "one", &["sh", "-c", COUNTER])?.ok()?;
    ctr.host.eventually("it to count", PATIENCE, || Ok(last(&inside("one")?) > 3))?;
    // The task alone, which goes on.
    ctr.call(&["task", "checkpoint", "one"])?.ok()?.stdout_has("one")?;
    ctr.is("one", "RUNNING")?;
    // With what it has written, and its configuration.
    ctr.all(&[&["containers", "checkpoint", "--task", "--rw", "--image", "one", "saved:one"]])?;
    ctr.is("one", "RUNNING")?;
    let before = last(&inside("one")?);
    ctr.host.eventually("it to go on", PATIENCE, || Ok(last(&inside("one")?) > before + 3))?;
    ctr.all(&[&["task", "kill", "-s", "KILL", "one"]])?;
    ctr.is("one", "STOPPED")?;
    ctr.call(&["task", "delete", "one"])?;
    ctr.all(&[&["containers", "rm", "one"]])?;

    let words = ["containers", "restore", "--live", "--rw", "two", "saved:one"];
    let two = Ctr::program(ctr.host, &words).spawn()?;
    ctr.is("two", "RUNNING")?;
    ctr.host.eventually("the copy to count", PATIENCE, || Ok(last(&inside("two")?) > before + 3))?;
    let said = inside("two")?;
    ensure!(said.starts_with("1\n"), "{said}");
    counts(&said)?;
    ctr.all(&[&["task", "pause", "two"], &["task", "resume", "two"]])?;
    ctr.all(&[&["task", "kill", "-s", "KILL", "two"]])?;
    let two = two.wait()?;
    ensure!(last(&two.stdout()) > before, "{}", two.stdout());
    counts(&two.stdout())?;
    ctr.is("two", "STOPPED")?;
    ctr.call(&["task", "delete", "two"])?;
    ctr.all(&[&["containers", "rm", "two"]])
}

/// containerd does not remove what it unpacks a checkpoint into.
fn sweep() -> Result<()> {
    for entry in fs::read_dir("/tmp")?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("ctrd-checkpoint") {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

test!(containerd_saves_and_restores, Needs::engines().deadline(200).shows_output());
fn containerd_saves_and_restores(host: &Host) -> Result<()> {
    let daemon = daemon(host)?;
    let image = host.image("busybox-docker").display().to_string();
    Ctr::program(host, &["images", "import", &image]).run()?.ok()?;
    let by_name: &[&str] = &["--runc-binary", "/usr/local/bin/bulkhead-oci"];
    let mut done = Ok(());
    for (name, runtime) in [("the shim", SHIM), ("bulkhead-oci", by_name)] {
        let ctr = Ctr { host, runtime };
        done = done.and(containers(&ctr).with_context(|| format!("with {name}")));
        let _ = ctr.call(&["images", "rm", "saved:one"]);
    }
    ended(daemon)?;
    sweep()?;
    done
}

test!(dockerd_saves_and_restores, Needs::engines().deadline(200).shows_output());
fn dockerd_saves_and_restores(host: &Host) -> Result<()> {
    with_daemon(host, true, |[_, docker]| {
        docker.run(&["-d", "--name", "d1", "-m", "64m"], COUNTER)?.ok()?;
        let said = || Ok::<_, anyhow::Error>(docker.call(&["logs", "d1"])?.ok()?.stdout());
        host.eventually("it to count", PATIENCE, || Ok(last(&said()?) > 3))?;
        docker.all(&[&["checkpoint", "create", "--leave-running", "d1", "early"]])?;
        docker.is("d1", "{{.State.Status}}", "running")?;
        docker.all(&[&["checkpoint", "create", "d1", "late"]])?;
        docker.call(&["checkpoint", "ls", "d1"])?.ok()?.stdout_has("early")?.stdout_has("late")?;
        host.eventually(
            "it to end",
            PATIENCE,
            || Ok(docker.inspect("d1", "{{.State.Status}}")? == "exited"),
        )?;
        let before = last(&said()?);
        docker.all(&[&["start", "--checkpoint", "late", "d1"]])?;
        host.eventually("it to go on", PATIENCE, || Ok(last(&said()?) > before + 3))?;
        docker.call(&["exec", "d1", "head", "-n", "1", "/said"])?.ok()?.stdout_is("1\n")?;
        docker
            .call(&["exec", "d1", "ip", "-4", "-o", "address", "show", "eth0"])?
            .ok()?
            .stdout_has("172.17.")?;
        docker.all(&[&["checkpoint", "rm", "d1", "early"], &["rm", "-f", "d1"]])
    })
}
