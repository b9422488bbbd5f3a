//! What a container of `bulkhead-oci` is on the host: a process that stands for it, and a cgroup.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;
use serde_json::json;

use crate::oci::{Bundle, NEEDS, pid_in};

const GROUP: &str = "/sys/fs/cgroup/engine/box";

/// A number of a cgroup's file: its only one, or that of a key.
fn number(file: &str, key: &str) -> Result<u64> {
    let text = fs::read_to_string(Path::new(GROUP).join(file)).with_context(|| format!("read {file}"))?;
    let line = text.lines().find(|line| line.starts_with(key)).context("no such key")?;
    Ok(line.trim_start_matches(key).trim().parse()?)
}

/// Runs the bundle's script as c1 and answers the pid that the engine is told.
fn started(bundle: &Bundle, script: &str) -> Result<i32> {
    bundle.runs(script)?;
    let file = bundle.dir.join("pid");
    bundle.apart(&["run", "-d", "--pid-file", &file.display().to_string(), "c1"])?;
    pid_in(&file)
}

test!(the_pid_stands_for_the_containers_process, NEEDS);
fn the_pid_stands_for_the_containers_process(host: &Host) -> Result<()> {
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    let shared = host.file("shared/given", "given\n")?;
    let shared = shared.parent().context("no parent")?.to_owned();
    bundle.change(|config| {
        let bind =
            json!({"destination": "/mnt/d", "type": "bind", "source": shared, "options": ["rbind", "ro"]});
        if let Some(mounts) = config["mounts"].as_array_mut() {
            mounts.push(bind);
        }
    })?;
    let script = "trap 'exit 6' TERM; echo mine >/mine; echo up; while :; do sleep 0.1; done";
    let pid = started(&bundle, script)?;
    let root = format!("/proc/{pid}/root");
    host.eventually("the container's file", Duration::from_secs(5), || {
        Ok(fs::read_to_string(format!("{root}/mine")).is_ok_and(|text| text == "mine\n"))
    })?;
    ensure!(fs::read_to_string(format!("{root}/mnt/d/given"))? == "given\n");
    ensure!(!Path::new(&format!("{root}/usr/local/bin/bulkhead-oci")).exists(), "the host's files are there");
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net"));
    ensure!(namespace(&pid.to_string())? != namespace("self")?, "it is in the host's network");
    // A signal to it is one to the container.
    host.run(["kill", "-TERM", &pid.to_string()])?.ok()?;
    bundle.wait_for(host, "c1", "stopped")?;
    bundle.call(&["delete", "c1"])?.ok()?;

    // Its death is the container's.
    let pid = started(&bundle, "while :; do sleep 1; done")?;
    host.run(["kill", "-KILL", &pid.to_string()])?.ok()?;
    host.eventually("the machine has gone", Duration::from_secs(10), || {
        Ok(host.run(["pgrep", "bulkhead-vmm"])?.status == 1)
    })?;
    bundle.call(&["delete", "c1"])?.ok()?;
    Ok(())
}

test!(its_cgroup_holds_all_of_it_and_counts_its_oom, NEEDS);
fn its_cgroup_holds_all_of_it_and_counts_its_oom(host: &Host) -> Result<()> {
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.change(|config| {
        config["linux"]["cgroupsPath"] = "/engine/box".into();
        config["linux"]["resources"] = json!({
            "memory": {"limit": 64 << 20},
            "cpu": {"quota": 150_000, "period": 100_000, "cpus": "0"},
        });
    })?;
    started(&bundle, "while :; do sleep 1; done")?;
    let members = fs::read_to_string(Path::new(GROUP).join("cgroup.procs"))?;
    let names: Vec<_> = members
        .lines()
        .map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).map(|name| name.trim_end().to_owned()))
        .collect::<Result<_, _>>()?;
    let count = |name: &str| names.iter().filter(|known| *known == name).count();
    ensure!(count("bulkhead-oci") == 2 && count("bulkhead-vmm") == 1, "in the group: {names:?}");
    // Above the container's limit by what a machine costs. The guest's own memory is accounted for, and what it has from its template is not its own.
    let (most, now) = (number("memory.max", "")?, number("memory.current", "")?);
    ensure!(most > 64 << 20 && most < 400 << 20, "memory.max is {most}");
    ensure!(now > 3 << 20 && now < 24 << 20, "memory.current is {now}");
    ensure!(fs::read_to_string(Path::new(GROUP).join("cpu.max"))? == "150000 100000\n");
    ensure!(fs::read_to_string(Path::new(GROUP).join("cpuset.cpus"))? == "0\n");
    bundle.call(&["update", "--cpu-quota", "50000", "c1"])?.ok()?;
    ensure!(fs::read_to_string(Path::new(GROUP).join("cpu.max"))? == "50000 100000\n");
    bundle.call(&["update", "--memory", "1073741824", "c1"])?.failed()?.stderr_has("made with")?;
    ensure!(number("memory.events", "oom_kill")? == 0);
    bundle.call(&["delete", "--force", "c1"])?.ok()?;
    ensure!(!Path::new(GROUP).exists());

    // The guest kills for want of memory; the host's group, which engines watch, has to say so.
    started(&bundle, "exec tail /dev/zero")?;
    bundle.wait_for(host, "c1", "stopped")?;
    ensure!(number("memory.events", "oom_kill")? == 1, "the host's cgroup knows of no OOM");
    bundle.call(&["delete", "c1"])?.ok()?;
    fs::remove_dir("/sys/fs/cgroup/engine")?;
    Ok(())
}
