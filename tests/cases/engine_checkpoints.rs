//! Checkpoints by engines: containerd with Bulkhead's shim and with its own for runc, and dockerd.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_tests::host::Host;
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;

use crate::containerd::{Ctr, SHIM, daemon, ended};
use crate::docker::{Docker, with_daemon};

const PATIENCE: Duration = Duration::from_secs(30);
/// Counts in memory, to its output and to a file that it keeps open.
const COUNTER: &str = "exec 3>>/said; i=0; while :; do i=$((i+1)); echo $i; echo $i >&3; sleep 0.1; done";
/// The same on a file system of the guest's own.
const INSIDE: &str = "i=0; while :; do i=$((i+1)); echo $i; echo $i >/dev/shm/said; sleep 0.1; done";

/// What was said last; 0 for nothing.
fn last(text: &str) -> u64 {
    text.lines().filter_map(|line| line.trim().parse().ok()).next_back().unwrap_or(0)
}

/// `tag` begins the containers' names: containerd 1.6 keeps a configuration that it has saved, and does not save it twice.
fn containers(ctr: &Ctr<'_>, tag: &str) -> Result<()> {
    let (one, saved) = (&*format!("{tag}-1"), &*format!("saved:{tag}"));
    let inside = |id: &str| -> Result<String> {
        Ok(ctr.call(&["task", "exec", "--exec-id", "look", id, "cat", "/dev/shm/said"])?.stdout())
    };
    let flags = ["-d", "--memory-limit", "67108864"];
    ctr.run(&flags, one, &["sh", "-c", INSIDE])?.ok()?;
    ctr.host.eventually("it to count", PATIENCE, || Ok(last(&inside(one)?) > 3))?;
    // The task alone, which goes on.
    ctr.call(&["task", "checkpoint", one])?.ok()?.stdout_has(one)?;
    ctr.is(one, "RUNNING")?;
    // With what it has written, and its configuration.
    ctr.all(&[&["containers", "checkpoint", "--task", "--rw", "--image", one, saved]])?;
    ctr.is(one, "RUNNING")?;
    let before = last(&inside(one)?);
    ctr.host.eventually("it to go on", PATIENCE, || Ok(last(&inside(one)?) > before + 3))?;
    ctr.all(&[&["task", "kill", "-s", "KILL", one]])?;
    ctr.is(one, "STOPPED")?;
    ctr.call(&["task", "delete", one])?;
    ctr.all(&[&["containers", "rm", one]])
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

test!(containerd_saves, Needs::engines().deadline(200).shows_output());
fn containerd_saves(host: &Host) -> Result<()> {
    let daemon = daemon(host)?;
    let image = host.image("busybox-docker").display().to_string();
    Ctr::program(host, &["images", "import", &image]).run()?.ok()?;
    let by_name: &[&str] = &["--runc-binary", "/usr/local/bin/bulkhead-oci"];
    let mut done = Ok(());
    for (name, runtime) in [("shim", SHIM), ("runc", by_name)] {
        let ctr = Ctr { host, runtime };
        let one = containers(&ctr, name).with_context(|| format!("with {name}"));
        println!("{name}: {one:?}");
        done = done.and(one);
        let _ = ctr.call(&["images", "rm", &format!("saved:{name}")]);
    }
    ended(daemon)?;
    sweep()?;
    done
}

fn containers_of_dockerd(docker: &Docker<'_>, one: &str) -> Result<()> {
    docker.run(&["-d", "--name", one, "-m", "64m"], COUNTER)?.ok()?;
    let said = || Ok::<_, anyhow::Error>(docker.call(&["logs", one])?.ok()?.stdout());
    let host = docker.host;
    host.eventually("it to count", PATIENCE, || Ok(last(&said()?) > 3))?;
    docker.all(&[&["checkpoint", "create", "--leave-running", one, "early"]])?;
    docker.is(one, "{{.State.Status}}", "running")?;
    docker.all(&[&["checkpoint", "create", one, "late"]])?;
    docker.call(&["checkpoint", "ls", one])?.ok()?.stdout_has("early")?.stdout_has("late")?;
    host.eventually("it to end", PATIENCE, || Ok(docker.inspect(one, "{{.State.Status}}")? == "exited"))?;
    let before = last(&said()?);
    docker.all(&[&["start", "--checkpoint", "late", one]])?;
    host.eventually("it to go on", PATIENCE, || Ok(last(&said()?) > before + 3))?;
    docker.call(&["exec", one, "head", "-n", "1", "/said"])?.ok()?.stdout_is("1\n")?;
    let address = ["exec", one, "ip", "-4", "-o", "address", "show", "eth0"];
    docker.call(&address)?.ok()?.stdout_has("172.17.")?;
    docker.all(&[&["checkpoint", "rm", one, "early"], &["rm", "-f", one]])
}

test!(dockerd_saves_and_restores, Needs::engines().deadline(200).shows_output());
fn dockerd_saves_and_restores(host: &Host) -> Result<()> {
    let done = with_daemon(host, true, |[_, docker]| containers_of_dockerd(&docker, "d1"));
    sweep()?;
    done
}
