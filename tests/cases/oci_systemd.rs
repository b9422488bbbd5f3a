//! `--systemd-cgroup` with the real systemd: it is the first process of namespaces on the emulated host, with a part of the
//! host's cgroups to itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Finished, Program, Running};
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;
use rustix::process::Signal;
use serde_json::json;

use crate::oci::Bundle;

const NEEDS: Needs = Needs::engines().deadline(90);
const PATIENCE: Duration = Duration::from_secs(20);
/// systemd's part of the host's cgroups; it is the root there.
const TOP: &str = "/sys/fs/cgroup/systemd";
/// `unshare` waits in the host's group: the one that becomes a root has to be empty.
const START: &str = r#"echo 0 >/sys/fs/cgroup/systemd/cgroup.procs
exec unshare --cgroup sh -c 'echo 0 >/sys/fs/cgroup/host/cgroup.procs
exec /usr/bin/unshare --pid --fork --mount --kill-child --mount-proc sh -c "echo 0 >/sys/fs/cgroup/systemd/cgroup.procs
umount /sys/fs/cgroup && mount -t cgroup2 cgroup /sys/fs/cgroup && mount -t tmpfs -o mode=755 run /run || exit
exec /usr/lib/systemd/systemd --system --unit=test.target --log-target=console"'"#;

/// The system bus as systemd wants it before it goes there: its socket and its daemon are units of these names.
const BUS: &[(&str, &str)] = &[
    (
        "units/dbus.socket",
        "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/dbus/system_bus_socket\n",
    ),
    (
        "units/dbus.service",
        "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\n[Service]\nExecStart=/usr/bin/dbus-daemon \
         --config-file=@work@/bus.conf --address=systemd: --nofork --nopidfile\n",
    ),
    (
        "bus.conf",
        "<busconfig><type>system</type><auth>EXTERNAL</auth><listen>unix:path=/run/dbus/system_bus_socket</listen>\
         <policy context='default'><allow user='*'/><allow send_destination='*' eavesdrop='true'/>\
         <allow eavesdrop='true'/><allow own='*'/></policy></busconfig>",
    ),
];

/// A systemd that runs until it is dropped.
struct Systemd<'a> {
    host: &'a Host,
    program: Option<Running>,
    pid: String,
}

impl<'a> Systemd<'a> {
    fn start(host: &'a Host) -> Result<Self> {
        for unit in ["test.target", "system.slice", "machine.slice"] {
            host.file(&format!("units/{unit}"), "[Unit]\nDefaultDependencies=no\n")?;
        }
        for (name, text) in BUS {
            host.file(name, text.replace("@work@", &host.work().display().to_string()))?;
        }
        fs::create_dir(TOP)?;
        let line = format!("({START}) </dev/null >{} 2>&1", host.work().join("systemd.log").display());
        // With a colon at the end its usual places come after ours: what it makes itself lies there.
        let units = format!("{}:", host.work().join("units").display());
        let program = Program::new(["sh", "-c", &line])
            .env("container", "test")
            .env("SYSTEMD_UNIT_PATH", &units)
            .spawn()?;
        let mut systemd = Self { host, program: Some(program), pid: String::new() };
        host.eventually("systemd runs", PATIENCE, || {
            systemd.pid = host.run(["pgrep", "-x", "systemd"])?.stdout().trim_end().to_owned();
            Ok(!systemd.pid.is_empty() && systemd.call("/", &["systemctl", "is-system-running"])?.status == 0)
        })?;
        Ok(systemd)
    }

    /// A program beside it, in its namespaces.
    fn program(&self, dir: &str, words: &[&str]) -> Program {
        Program::new(["nsenter", "-t", &self.pid, "-a", &format!("--wd={dir}")]).args(words.iter().copied())
    }

    fn call(&self, dir: &str, words: &[&str]) -> Result<Finished> {
        self.program(dir, words).run()
    }

    /// From now on it is reached over the system bus alone.
    fn only_by_bus(&self) -> Result<()> {
        self.call("/", &["systemctl", "start", "dbus.socket", "dbus.service"])?.ok()?;
        self.call("/", &["rm", "/run/systemd/private"])?.ok()?;
        // Then systemctl goes there too.
        self.host.eventually("systemd is on the bus", PATIENCE, || {
            Ok(self.call("/", &["systemctl", "is-system-running"])?.status == 0)
        })
    }

    fn says(&self, unit: &str, property: &str) -> Result<String> {
        let shown = self.call("/", &["systemctl", "show", "-P", property, unit])?.ok()?;
        Ok(shown.stdout().trim_end().to_owned())
    }

    fn reload(&self) -> Result<()> {
        self.call("/", &["systemctl", "daemon-reload"])?.ok().map(drop)
    }
}

impl Drop for Systemd<'_> {
    fn drop(&mut self) {
        let Some(program) = self.program.take() else { return };
        // All in its namespaces go with it.
        let _ = self.host.run(["kill", "-KILL", &self.pid]);
        let _ = program.signal(Signal::KILL);
        let _ = program.wait();
        // What stays is found by the leak check.
        let _ = self.host.eventually("its groups are gone", PATIENCE, || {
            remove_groups(Path::new(TOP));
            Ok(!Path::new(TOP).exists())
        });
    }
}

fn remove_groups(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    let _ = fs::remove_dir(dir);
}

/// A container that systemd is asked for.
struct Container<'a> {
    systemd: &'a Systemd<'a>,
    bundle: Bundle,
}

impl Container<'_> {
    fn call(&self, words: &[&str]) -> Result<Finished> {
        let dir = self.bundle.dir.display().to_string();
        let line = "exec bulkhead-oci --systemd-cgroup \"$@\" >out 2>err </dev/null";
        let finished = self.systemd.call(&dir, &[&["sh", "-c", line, "sh"], words].concat())?;
        ensure!(
            finished.status == 0,
            "{words:?} ended with {}: {}",
            finished.status,
            fs::read_to_string(self.bundle.dir.join("err"))?
        );
        Ok(finished)
    }

    fn group() -> PathBuf {
        Path::new(TOP).join("machine.slice/test-box.scope")
    }

    fn has(file: &str, expected: &str) -> Result<()> {
        let text = fs::read_to_string(Self::group().join(file)).with_context(|| format!("read {file}"))?;
        ensure!(text.trim_end() == expected, "{file} is {text:?}, not {expected:?}");
        Ok(())
    }
}

test!(its_scope_is_systemds, NEEDS);
fn its_scope_is_systemds(host: &Host) -> Result<()> {
    const SCOPE: &str = "test-box.scope";
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.change(|config| {
        config["linux"]["cgroupsPath"] = "machine.slice:test:box".into();
        config["linux"]["resources"] = json!({
            "memory": {"limit": 64 << 20},
            "cpu": {"quota": 150_000, "period": 50_000, "shares": 512, "cpus": "0"},
        });
    })?;
    bundle.runs("while :; do sleep 1; done")?;
    bundle
        .call(&["--systemd-cgroup", "run", "c0"])?
        .failed()?
        .stderr_has("systemd not running on this host")?;
    bundle.call(&["list", "-q"])?.ok()?.stdout_is("")?;

    let systemd = Systemd::start(host)?;
    let container = Container { systemd: &systemd, bundle };
    // Over its own socket, then over the bus; the name is free again each time.
    for by_bus in [false, true] {
        if by_bus {
            systemd.only_by_bus()?;
        }
        container.call(&["run", "-d", "c1"])?;
        let members = fs::read_to_string(Container::group().join("cgroup.procs"))?;
        let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm"));
        let names: Vec<_> = members.lines().map(name).collect::<Result<_, _>>()?;
        let count = |name: &str| names.iter().filter(|known| known.trim_end() == name).count();
        ensure!(count("bulkhead-oci") == 2 && count("bulkhead-vmm") == 1, "in the group: {names:?}");
        for (property, expected) in [
            ("ActiveState", "active"),
            ("Slice", "machine.slice"),
            ("Delegate", "yes"),
            ("Transient", "yes"),
            ("CPUWeight", "20"),
            ("CPUQuotaPerSecUSec", "3s"),
            ("CPUQuotaPeriodUSec", "50ms"),
            ("AllowedCPUs", "0"),
        ] {
            let says = systemd.says(SCOPE, property)?;
            ensure!(says == expected, "{property} is {says:?}, not {expected:?}");
        }
        let most = systemd.says(SCOPE, "MemoryMax")?;
        let bytes: u64 = most.parse().with_context(|| format!("MemoryMax is {most:?}"))?;
        ensure!(bytes > (64 + 128) << 20 && bytes < 400 << 20, "MemoryMax is {most}");

        // What systemd writes again is no other than what was asked for, and after an update no older.
        systemd.reload()?;
        Container::has("memory.max", &most)?;
        Container::has("cpu.max", "150000 50000")?;
        Container::has("cpuset.cpus", "0")?;
        container.call(&["update", "--cpu-quota", "25000", "--cpu-period", "50000", "c1"])?;
        systemd.reload()?;
        Container::has("cpu.max", "25000 50000")?;
        container.call(&["delete", "--force", "c1"])?;
        ensure!(!Container::group().exists(), "its group is left");
        ensure!(systemd.says(SCOPE, "LoadState")? == "not-found", "systemd still knows of {SCOPE}");
    }

    // systemd removes the group when all have left, but not before engines have seen how the container ended.
    container.bundle.runs("exec tail /dev/zero")?;
    container.call(&["create", "c1"])?;
    let members = fs::read_to_string(Container::group().join("cgroup.procs"))?;
    let stands =
        |pid: &&str| fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(is_first_of_namespace);
    let stand_in = members.lines().find(stands).context("no stand-in")?;
    container.call(&["start", "c1"])?;
    host.eventually("its end", PATIENCE, || Ok(!Path::new("/proc").join(stand_in).exists()))?;
    let events = fs::read_to_string(Container::group().join("memory.events"))
        .context("the group is gone before anybody can look")?;
    ensure!(events.contains("oom_kill 1\n"), "the host's cgroup knows of no OOM: {events}");
    container.call(&["delete", "c1"])?;
    Ok(())
}

/// Whether this `/proc/PID/status` is of a process in a pid namespace below systemd's, like the stand-in.
fn is_first_of_namespace(status: String) -> bool {
    let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    pids.is_some_and(|pids| pids.split_whitespace().count() == 3 && pids.trim_end().ends_with("\t1"))
}

test!(podman_with_systemd_as_cgroup_manager, NEEDS.deadline(180).may_leave_things());
fn podman_with_systemd_as_cgroup_manager(host: &Host) -> Result<()> {
    let systemd = Systemd::start(host)?;
    let podman = |words: &[&str]| {
        let engine = ["podman", "--cgroup-manager", "systemd", "--runtime", "/usr/local/bin/bulkhead-oci"];
        systemd.call("/", &[&engine, words].concat())
    };
    podman(&["load", "-q", "-i", &host.image("busybox-docker").display().to_string()])?.ok()?;
    let ask = "cat /sys/fs/cgroup/memory.max";
    let run = ["run", "--rm", "--network", "none", "-m", "64m", "busybox", "sh", "-c", ask];
    podman(&run)?.ok()?.stdout_is("67108864\n")?;
    let hungry =
        ["run", "--name", "hungry", "--network", "none", "-m", "32m", "busybox", "tail", "/dev/zero"];
    podman(&hungry)?.status_is(137)?;
    podman(&["rm", "hungry"])?.ok()?;
    let scopes =
        systemd.call("/", &["systemctl", "list-units", "--all", "--plain", "--no-legend", "libpod-*"])?;
    scopes.ok()?.stdout_is("")?;
    Ok(())
}
