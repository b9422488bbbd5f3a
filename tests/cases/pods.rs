//! Containers that share a network, and what else their configuration says: with `bulkhead-oci` they share a microVM.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;
use serde_json::json;

use crate::oci::{Bundle, NEEDS, RUNTIMES, pid_in};

const PATIENCE: Duration = Duration::from_secs(10);

/// A container that others join, and the bundle of one of those.
struct Pod<'a> {
    host: &'a Host,
    first: Bundle,
    other: Bundle,
    pid: i32,
}

impl<'a> Pod<'a> {
    fn new(host: &'a Host, runtime: &'static str, script: &str) -> Result<Self> {
        let (first, other) = (Bundle::new(host, runtime)?, Bundle::named(host, runtime, "-other")?);
        first.runs(script)?;
        first.change(|config| config["hostname"] = json!("pod"))?;
        let file = first.dir.join("pid");
        first.apart(&["run", "-d", "--pid-file", &file.display().to_string(), "first"])?;
        let pid = pid_in(&file)?;
        let pod = Self { host, first, other, pid };
        pod.joins(&["network", "ipc", "uts", "pid"])?;
        Ok(pod)
    }

    /// The other container is to be in these namespaces of the first, under its name.
    fn joins(&self, kinds: &[&str]) -> Result<()> {
        self.other.change(|config| {
            config.as_object_mut().map(|config| config.remove("hostname"));
            for namespace in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
                let kind = namespace["type"].as_str().unwrap_or_default().to_owned();
                if kinds.contains(&kind.as_str()) {
                    let name = if kind == "network" { "net" } else { &kind };
                    namespace["path"] = json!(format!("/proc/{}/ns/{name}", self.pid));
                }
            }
        })
    }

    fn says(&self, bundle: &Bundle, text: &str) -> Result<()> {
        let file = bundle.dir.join("out");
        self.host.eventually(text, PATIENCE, || Ok(fs::read_to_string(&file)?.contains(text)))
    }

    /// How many mounts and open files the file server of the machine has.
    fn held(&self) -> Result<(usize, usize)> {
        let pid = self.host.run(["pgrep", "-f", "virtiofsd --fd"])?.ok()?.stdout();
        let proc = Path::new("/proc").join(pid.trim());
        let mounts = fs::read_to_string(proc.join("mountinfo"))?.lines().count();
        Ok((mounts, fs::read_dir(proc.join("fd"))?.count()))
    }

    fn end(&self) -> Result<()> {
        self.first.call(&["delete", "--force", "first"])?.ok()?;
        Ok(())
    }
}

const WAITS: &str = "echo up; while :; do sleep 0.1; done";

test!(they_share_what_they_are_told_to, NEEDS.deadline(120));
fn they_share_what_they_are_told_to(host: &Host) -> Result<()> {
    for runtime in RUNTIMES {
        share(host, runtime).with_context(|| format!("with {runtime}"))?;
    }
    Ok(())
}

fn share(host: &Host, runtime: &'static str) -> Result<()> {
    let first = "touch /dev/mqueue/queue /mine; busybox nc -l -p 8000 </mine; echo heard; while :; do sleep 0.1; done";
    let pod = Pod::new(host, runtime, first)?;
    let (first, other) = (&pod.first, &pod.other);
    host.eventually("the queue", PATIENCE, || {
        Ok(first.call(&["exec", "first", "busybox", "ls", "/dev/mqueue/queue"])?.status == 0)
    })?;

    // Its own root, the other's network, host name, queues and processes.
    other.runs(
        "busybox hostname; busybox ls /dev/mqueue; cat /proc/1/cmdline | busybox tr '\\0' ' ' | busybox cut -c 1-11; \
         echo; test -e /mine || echo alone; echo hello | busybox nc 127.0.0.1 8000; touch /theirs; exit 7",
    )?;
    let run = other.call(&["run", "other"])?.status_is(7)?;
    run.stdout_is("pod\nqueue\nsh -c touch\n\nalone\n")?;
    pod.says(first, "hello")?;
    pod.says(first, "heard")?;
    ensure!(other.dir.join("rootfs/theirs").exists(), "its file is not in its directory");
    ensure!(!first.dir.join("rootfs/theirs").exists(), "its file is in another's directory");

    // All verbs mean the one that they name.
    let file = other.dir.join("pid");
    other.runs("trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done")?;
    other.apart(&["create", "--pid-file", &file.display().to_string(), "other"])?;
    ensure!(other.status("other")? == "created");
    other.call(&["start", "other"])?.ok()?;
    pod.says(other, "up")?;
    other.call(&["exec", "other", "sh", "-c", "test -e /theirs && kill -0 1"])?.ok()?;
    other.call(&["pause", "other"])?.ok()?;
    ensure!(other.status("other")? == "paused" && first.status("first")? == "running");
    other.call(&["resume", "other"])?.ok()?;
    other.call(&["list", "-q"])?.ok()?.stdout_is("first\nother\n")?;
    other.call(&["update", "--pids-limit", "20", "other"])?.ok()?;
    other.call(&["exec", "other", "cat", "/sys/fs/cgroup/pids.max"])?.ok()?.stdout_is("20\n")?;
    other.call(&["delete", "other"])?.failed()?.stderr_has("not stopped")?;
    other.call(&["kill", "other"])?.ok()?;
    other.wait_for(host, "other", "stopped")?;
    ensure!(first.status("first")? == "running");
    other.call(&["delete", "other"])?.ok()?;

    // Whose namespaces they are, ends the others.
    other.runs(WAITS)?;
    other.apart(&["run", "-d", "other"])?;
    first.call(&["kill", "first", "KILL"])?.ok()?;
    first.wait_for(host, "first", "stopped")?;
    other.wait_for(host, "other", "stopped")?;
    other.call(&["delete", "other"])?.ok()?;
    pod.end()
}

test!(they_share_one_kernel_and_leave_it_clean, NEEDS.deadline(120));
fn they_share_one_kernel_and_leave_it_clean(host: &Host) -> Result<()> {
    let pod = Pod::new(host, "bulkhead-oci", WAITS)?;
    let (first, other) = (&pod.first, &pod.other);
    let kernel = ["cat", "/proc/sys/kernel/random/boot_id"];
    let boot = first.call(&[&["exec", "first"][..], &kernel].concat())?.ok()?.stdout();
    let extra = host.file("shared/given", "given\n")?;
    other.change(|config| {
        let options = json!(["bind", "ro"]);
        for (at, source) in [("/given", extra.as_path()), ("/dir", extra.parent().unwrap_or(&extra))] {
            let bind = json!({"destination": at, "type": "bind", "source": source, "options": options});
            config["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(bind.clone()));
        }
    })?;
    other.runs(
        "cat /proc/sys/kernel/random/boot_id /given /dir/given; touch /dir/x 2>/dev/null || echo refused",
    )?;
    let mut before = None;
    for _ in 0..3 {
        let run = other.call(&["run", "other"])?.ok()?;
        run.stdout_is(&format!("{boot}given\ngiven\nrefused\n"))?;
        let mut held = pod.held()?;
        let expected = *before.get_or_insert(held);
        // The guest has let go; the server hears of it a moment later.
        host.eventually("the files to be let go of", PATIENCE, || {
            held = pod.held()?;
            Ok(held == expected)
        })
        .with_context(|| format!("{held:?} mounts and files, not {expected:?}"))?;
    }

    // Its sandbox is killed: what runs in the guest ends with it.
    other.runs("echo up; while :; do busybox sleep 7777; done")?;
    other.apart(&["run", "-d", "other"])?;
    pod.says(other, "up")?;
    let script =
        "cat /proc/[0-9]*/cmdline 2>/dev/null | busybox tr '\\0' ' ' | busybox grep -q 'sleep 777[7]'";
    let counts = |expected: bool| -> Result<bool> {
        Ok((first.call(&["exec", "first", "sh", "-c", script])?.status == 0) == expected)
    };
    host.eventually("the other's process", PATIENCE, || counts(true))?;
    let state = fs::read(host.work().join("bulkhead-oci-state/other/state.json"))?;
    let state: serde_json::Value = serde_json::from_slice(&state)?;
    host.run(["kill", "-KILL", &state["sandbox"].to_string()])?.ok()?;
    other.wait_for(host, "other", "stopped")?;
    host.eventually("its end", PATIENCE, || counts(false))?;
    other.call(&["delete", "--force", "other"])?.ok()?;
    ensure!(pod.held()?.0 == before.unwrap_or_default().0, "its files are still there");
    ensure!(first.status("first")? == "running");
    pod.end()
}

test!(what_cannot_be_joined_is_said, NEEDS);
fn what_cannot_be_joined_is_said(host: &Host) -> Result<()> {
    let pod = Pod::new(host, "bulkhead-oci", WAITS)?;
    let (first, other) = (&pod.first, &pod.other);
    other.runs("true")?;
    // Queues of another kernel, without the network that would put both into one.
    other.change(|config| {
        for namespace in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            if namespace["type"] == "network" {
                namespace.as_object_mut().map(|fields| fields.remove("path"));
            }
        }
    })?;
    other.call(&["run", "other"])?.status_is(1)?.stderr_has("whose network is joined")?;
    pod.joins(&["network"])?;
    // The same program, and a namespace that is nobody's.
    other.change(|config| {
        for namespace in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            if namespace["type"] == "ipc" {
                namespace["path"] = json!("/proc/1/ns/ipc");
            }
        }
    })?;
    other.call(&["run", "other"])?.status_is(1)?.stderr_has("/proc/1/ns/ipc")?;
    other.call(&["list", "-q"])?.ok()?.stdout_is("first\n")?;
    pod.joins(&["ipc"])?;
    // A program that is not there fails as it does alone, and the id is free again.
    other.change(|config| config["process"]["args"] = json!(["/no/such/program"]))?;
    for _ in 0..2 {
        other.call(&["run", "other"])?.failed()?.stderr_has("no such")?;
    }
    other.runs("exit 5")?;
    other.call(&["run", "other"])?.status_is(5)?;
    ensure!(first.status("first")? == "running");
    pod.end()
}
