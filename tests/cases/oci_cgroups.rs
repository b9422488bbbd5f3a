//! The host's cgroups of a container where they are not one hierarchy: v1, and hybrid.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::AsRawFd;
use serde_json::json;

use crate::oci::Bundle;

const NEEDS: Needs = Needs::no_cgroups().deadline(60);
const WAITS: &str = "while :; do sleep 1; done";

/// Hierarchies that are mounted until they are dropped.
struct Hierarchies<'a> {
    host: &'a Host,
    top: PathBuf,
    mounts: Vec<PathBuf>,
}

impl<'a> Hierarchies<'a> {
    /// Each entry: its directory's name, type of file system and options.
    fn mount(host: &'a Host, entries: &[(&str, &str, &str)]) -> Result<Self> {
        let top = host.work().join("cgroups");
        let mut all = Self { host, top, mounts: Vec::new() };
        for (name, kind, options) in entries {
            let at = all.top.join(name);
            fs::create_dir_all(&at)?;
            host.run(["mount", "-t", kind, "-o", options, "cgroup", &at.display().to_string()])?.ok()?;
            all.mounts.push(at);
        }
        Ok(all)
    }

    fn path(&self, below: &str) -> PathBuf {
        self.top.join(below)
    }

    fn text(&self, file: &str) -> Result<String> {
        let text = fs::read_to_string(self.path(file)).with_context(|| format!("read {file}"))?;
        Ok(text.trim_end().to_owned())
    }

    fn has(&self, file: &str, expected: &str) -> Result<()> {
        let text = self.text(file)?;
        ensure!(text == expected, "{file} is {text:?}, not {expected:?}");
        Ok(())
    }

    fn number(&self, file: &str) -> Result<u64> {
        self.text(file)?.parse().with_context(|| format!("{file} is no number"))
    }

    /// That the group has both processes of a container and its monitor.
    fn holds_all(&self, group: &str) -> Result<()> {
        let members = self.text(&format!("{group}/cgroup.procs"))?;
        let name = |pid: &str| {
            fs::read_to_string(format!("/proc/{pid}/comm")).map(|name| name.trim_end().to_owned())
        };
        let names: Vec<_> = members.lines().map(name).collect::<Result<_, _>>()?;
        let count = |name: &str| names.iter().filter(|known| *known == name).count();
        ensure!(count("bulkhead-oci") == 2 && count("bulkhead-vmm") == 1, "in {group}: {names:?}");
        Ok(())
    }

    /// OOM kills that the group's kernel has counted.
    fn oom_kills(&self, group: &str) -> Result<String> {
        let text = self.text(&format!("{group}/memory.oom_control"))?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(count.context("memory.oom_control has no oom_kill")?.to_owned())
    }
}

impl Drop for Hierarchies<'_> {
    fn drop(&mut self) {
        for mount in self.mounts.iter().rev() {
            // One that stays is found by the leak check.
            let _ = self.host.run(["umount", &mount.display().to_string()]);
        }
    }
}

test!(on_v1_it_is_in_every_hierarchy, NEEDS);
fn on_v1_it_is_in_every_hierarchy(host: &Host) -> Result<()> {
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.runs("exit 5")?;
    bundle.call(&["run", "c0"])?.status_is(5)?;
    let all = Hierarchies::mount(
        host,
        &[
            ("systemd", "cgroup", "none,name=systemd"),
            ("memory", "cgroup", "memory"),
            ("cpu,cpuacct", "cgroup", "cpu,cpuacct"),
            ("cpuset", "cgroup", "cpuset"),
            ("disks", "cgroup", "blkio"),
            ("pids", "cgroup", "pids"),
            ("freezer", "cgroup", "freezer"),
            ("devices", "cgroup", "devices"),
            ("other", "cgroup", "none,name=other"),
        ],
    )?;
    let ours = ["systemd", "memory", "cpu,cpuacct", "cpuset", "disks", "pids", "freezer", "devices"];
    bundle.change(|config| {
        config["linux"]["cgroupsPath"] = "/engine/box".into();
        config["linux"]["resources"] = json!({
            "memory": {"limit": 64 << 20, "swap": 96 << 20},
            "cpu": {"quota": 150_000, "period": 50_000, "shares": 512, "cpus": "0"},
            "blockIO": {"throttleWriteBpsDevice": [{"major": 7, "minor": 0, "rate": 1_048_576}]},
        });
    })?;
    bundle.runs(WAITS)?;
    bundle.apart(&["run", "-d", "c1"])?;
    for name in ours {
        all.holds_all(&format!("{name}/engine/box"))?;
    }
    ensure!(!all.path("other/engine").exists(), "it is in a hierarchy of somebody's own");
    // Above the container's limit by what a machine costs. The guest's own memory is accounted for, and what it has from its template is not its own.
    let most = all.number("memory/engine/box/memory.limit_in_bytes")?;
    ensure!(most > (64 + 128) << 20 && most < 400 << 20, "memory.limit_in_bytes is {most}");
    let both = all.number("memory/engine/box/memory.memsw.limit_in_bytes")?;
    ensure!(both == most + (32 << 20), "memory.memsw.limit_in_bytes is {both}, without swap {most}");
    let now = all.number("memory/engine/box/memory.usage_in_bytes")?;
    ensure!(now > 3 << 20 && now < 24 << 20, "memory.usage_in_bytes is {now}");
    all.has("cpu,cpuacct/engine/box/cpu.cfs_quota_us", "150000")?;
    all.has("cpu,cpuacct/engine/box/cpu.cfs_period_us", "50000")?;
    all.has("cpu,cpuacct/engine/box/cpu.shares", "512")?;
    all.has("cpuset/engine/box/cpuset.cpus", "0")?;
    all.has("disks/engine/box/blkio.throttle.write_bps_device", "7:0 1048576")?;
    bundle.call(&["update", "--cpu-quota", "25000", "--cpu-share", "256", "c1"])?.ok()?;
    all.has("cpu,cpuacct/engine/box/cpu.cfs_quota_us", "25000")?;
    all.has("cpu,cpuacct/engine/box/cpu.shares", "256")?;
    bundle.call(&["update", "--cpu-quota", "150000", "c1"])?.ok()?;

    // What it may take is not too much for the host.
    let takes = ["exec", "c1", "busybox", "dd", "if=/dev/zero", "of=/dev/null", "bs=40M", "count=1"];
    bundle.call(&takes)?.ok()?;
    ensure!(all.oom_kills("memory/engine/box")? == "0");
    // Whoever else is in there ends with it: v1 has no file for that.
    let mut stray = Command::new("sleep").arg("1000").spawn()?;
    fs::write(all.path("memory/engine/box/cgroup.procs"), stray.id().to_string())?;
    bundle.call(&["delete", "--force", "c1"])?.ok()?;
    stray.wait()?;
    for name in ours {
        ensure!(!all.path(&format!("{name}/engine/box")).exists(), "{name}/engine/box is left");
    }

    // The guest kills for want of memory; the host has to say so, where conmon and containerd listen.
    bundle.runs("exec tail /dev/zero")?;
    bundle.apart(&["create", "c1"])?;
    let event = eventfd(0, EventfdFlags::NONBLOCK)?;
    let watched = fs::File::open(all.path("memory/engine/box/memory.oom_control"))?;
    let listen = format!("{} {}", event.as_raw_fd(), watched.as_raw_fd());
    fs::write(all.path("memory/engine/box/cgroup.event_control"), listen)?;
    bundle.call(&["start", "c1"])?.ok()?;
    bundle.wait_for(host, "c1", "stopped")?;
    ensure!(all.oom_kills("memory/engine/box")? == "1", "the host's cgroup knows of no OOM");
    rustix::io::read(&event, &mut [0; 8]).context("nobody was told of the OOM")?;
    drop(watched);
    bundle.call(&["delete", "c1"])?.ok()?;
    for name in ours {
        fs::remove_dir(all.path(&format!("{name}/engine")))?;
    }
    Ok(())
}

test!(on_a_hybrid_host_each_limit_is_where_its_controller_is, NEEDS);
fn on_a_hybrid_host_each_limit_is_where_its_controller_is(host: &Host) -> Result<()> {
    let all = Hierarchies::mount(
        host,
        &[
            ("systemd", "cgroup", "none,name=systemd"),
            ("memory", "cgroup", "memory"),
            ("unified", "cgroup2", "nsdelegate"),
        ],
    )?;
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.change(|config| {
        // From the runtime's own group on, which is the test's.
        config["linux"]["cgroupsPath"] = "box".into();
        config["linux"]["resources"] = json!({
            "memory": {"limit": 64 << 20},
            "cpu": {"quota": 150_000, "period": 100_000},
        });
    })?;
    let own = all.path("memory/outer");
    fs::create_dir(&own)?;
    fs::write(own.join("cgroup.procs"), std::process::id().to_string())?;
    bundle.runs(WAITS)?;
    bundle.apart(&["run", "-d", "c1"])?;
    let groups = ["memory/outer/box", "systemd/box", "unified/box"];
    for group in groups {
        all.holds_all(group)?;
    }
    let most = all.number("memory/outer/box/memory.limit_in_bytes")?;
    ensure!(most > (64 + 128) << 20 && most < 400 << 20, "memory.limit_in_bytes is {most}");
    all.has("unified/box/cpu.max", "150000 100000")?;
    ensure!(!all.path("unified/box/memory.max").exists(), "memory is not v1's here");
    bundle.call(&["delete", "--force", "c1"])?.ok()?;
    for group in groups {
        ensure!(!all.path(group).exists(), "{group} is left");
    }
    fs::write(all.path("memory/cgroup.procs"), std::process::id().to_string())?;
    fs::remove_dir(own)?;
    Ok(())
}
