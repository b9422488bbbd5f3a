//! `bulkhead-oci` as a runtime of dockerd, and beside runc: the same steps with the same daemon.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Finished, Program};
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;
use serde_json::json;

use crate::daemons::{Daemon, Step, lives, side_by_side};

const PATIENCE: Duration = Duration::from_secs(30);

/// docker's command line, with a runtime.
#[derive(Clone, Copy)]
pub struct Docker<'a> {
    pub host: &'a Host,
    pub runtime: &'static str,
}

impl Docker<'_> {
    fn program(host: &Host, words: &[&str]) -> Program {
        let socket = format!("unix://{}/docker.sock", host.work().display());
        Program::new(["docker", "-H", &socket]).args(words.iter().copied())
    }

    pub fn call(&self, words: &[&str]) -> Result<Finished> {
        Self::program(self.host, words).run()
    }

    /// `docker run FLAGS busybox sh -c SCRIPT`.
    pub fn run(&self, flags: &[&str], script: &str) -> Result<Finished> {
        self.image(flags, &["busybox", "sh", "-c", script])
    }

    fn image(&self, flags: &[&str], command: &[&str]) -> Result<Finished> {
        self.call(&[&["run", "--runtime", self.runtime], flags, command].concat())
    }

    pub fn inspect(&self, container: &str, format: &str) -> Result<String> {
        Ok(self.call(&["inspect", "-f", format, container])?.ok()?.stdout().trim_end().to_owned())
    }

    pub fn is(&self, container: &str, format: &str, expected: &str) -> Result<()> {
        let found = self.inspect(container, format)?;
        ensure!(found == expected, "{format} of {container} is {found:?}, not {expected:?}");
        Ok(())
    }

    pub fn all(&self, calls: &[&[&str]]) -> Result<()> {
        calls.iter().try_for_each(|words| self.call(words)?.ok().map(drop))
    }
}

fn returns(docker: &Docker<'_>) -> Result<()> {
    docker.image(&["--rm"], &["busybox", "true"])?.ok().map(drop)
}

fn status_and_streams(docker: &Docker<'_>) -> Result<()> {
    let script = "cat; echo out; echo err >&2; exit 42";
    let mut run = Docker::program(docker.host, &["run", "--runtime", docker.runtime, "--rm", "-i"])
        .args(["busybox", "sh", "-c", script])
        .open_stdin()
        .spawn()?;
    run.send("in\n")?;
    run.close_stdin();
    run.wait()?.status_is(42)?.stdout_is("in\nout\n")?.stderr_is("err\n")?;
    Ok(())
}

fn no_such_program(docker: &Docker<'_>) -> Result<()> {
    docker.image(&["--rm"], &["busybox", "nosuch"])?.status_is(127)?.stderr_has("not found")?;
    docker.image(&["--rm"], &["busybox", "/etc/passwd"])?.status_is(126)?.stderr_has("permission denied")?;
    docker.call(&["ps", "-aq"])?.ok()?.stdout_is("")?;
    Ok(())
}

/// The container of the steps that follow, `life`: as docker-compose has it, on a network of its own, with a port to the
/// outside, a volume and a directory.
fn in_the_background(docker: &Docker<'_>) -> Result<()> {
    let dir = docker.host.work().join("dir");
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("given"), "given\n")?;
    let bind = format!("{}:/dir", dir.display());
    docker.all(&[&["network", "create", "net"]])?;
    let flags =
        ["-d", "--name", "life", "--network", "net", "-p", "8080:80", "-v", "volume:/data", "-v", &bind];
    let script =
        "mkdir -p /www; echo served >/www/f; httpd -p 80 -h /www; echo kept >/data/f; cp /dir/given /dir/new
                  trap 'exit 3' TERM; echo up; echo err >&2; while :; do sleep 0.1; done";
    docker.run(&flags, script)?.ok()?;
    docker.host.eventually("its log", PATIENCE, || {
        let log = docker.call(&["logs", "life"])?.ok()?;
        Ok(log.stdout() == "up\n" && log.stderr() == "err\n")
    })?;
    docker.is("life", "{{.State.Status}} {{.State.ExitCode}}", "running 0")?;
    let pid = docker.inspect("life", "{{.State.Pid}}")?;
    ensure!(lives(&pid), "State.Pid is {pid:?}, which is no process");
    // The host's process of that number, whatever it is called.
    docker.call(&["top", "life", "-o", "pid"])?.ok()?.stdout_has(&pid)?;
    Ok(())
}

fn more_processes(docker: &Docker<'_>) -> Result<()> {
    docker
        .call(&["exec", "life", "sh", "-c", "echo in; echo err >&2; exit 9"])?
        .status_is(9)?
        .stdout_is("in\n")?;
    let ask = "echo $A $PWD $(id -u) $(id -g)";
    let words = ["exec", "-u", "7:8", "-w", "/bin", "-e", "A=b", "life", "sh", "-c", ask];
    docker.call(&words)?.ok()?.stdout_is("b /bin 7 8\n")?;
    docker.call(&["exec", "-t", "life", "tty"])?.ok()?.stdout_is("/dev/pts/0\r\n")?;
    Ok(())
}

fn suspended(docker: &Docker<'_>) -> Result<()> {
    docker.all(&[&["pause", "life"]])?;
    docker.is("life", "{{.State.Status}}", "paused")?;
    docker.all(&[&["unpause", "life"]])?;
    docker.is("life", "{{.State.Status}}", "running")
}

fn files_in_and_out(docker: &Docker<'_>) -> Result<()> {
    let given = docker.host.file("given", "given\n")?.display().to_string();
    let taken = docker.host.work().join("taken");
    docker.all(&[
        &["cp", &given, "life:/tmp/given"],
        &["exec", "life", "sh", "-c", "cat /tmp/given /tmp/given >/tmp/twice"],
        &["cp", "life:/tmp/twice", &taken.display().to_string()],
    ])?;
    ensure!(fs::read_to_string(taken)? == "given\ngiven\n");
    docker.all(&[&["commit", "life", "committed"]])?;
    docker.image(&["--rm"], &["committed", "cat", "/tmp/twice"])?.ok()?.stdout_is("given\ngiven\n")?;
    docker.all(&[&["rmi", "committed"]])
}

fn its_end(docker: &Docker<'_>) -> Result<()> {
    docker.all(&[&["stop", "life"]])?;
    docker.is("life", "{{.State.Status}} {{.State.Pid}} {{.State.ExitCode}}", "exited 0 3")?;
    docker.all(&[&["start", "life"]])?;
    docker.is("life", "{{.State.Status}}", "running")?;
    docker.all(&[&["kill", "life"]])?;
    docker.call(&["wait", "life"])?.ok()?.stdout_is("137\n")?;
    docker.all(&[&["rm", "life"], &["network", "rm", "net"], &["volume", "rm", "volume"]])
}

fn started_again(docker: &Docker<'_>) -> Result<()> {
    docker.run(&["-d", "--name", "again", "--restart", "on-failure:2"], "echo go; exit 3")?.ok()?;
    docker.host.eventually("its last end", PATIENCE, || {
        Ok(docker.inspect("again", "{{.State.Status}} {{.RestartCount}} {{.State.ExitCode}}")?
            == "exited 2 3")
    })?;
    docker.call(&["logs", "again"])?.ok()?.stdout_is("go\ngo\ngo\n")?;
    docker.all(&[&["rm", "again"]])
}

fn out_of_memory(docker: &Docker<'_>) -> Result<()> {
    docker.run(&["--name", "greedy", "-m", "32m"], "exec tail /dev/zero")?.status_is(137)?;
    docker.is("greedy", "{{.State.OOMKilled}} {{.State.ExitCode}}", "true 137")?;
    docker.all(&[&["rm", "greedy"]])
}

/// `12.5MiB` in MiB.
fn mib(text: &str) -> Result<f64> {
    let number = text.trim().trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text.trim().get(number.len()..) {
        Some("KiB") => 1.0 / 1024.0,
        Some("MiB") => 1.0,
        Some("GiB") => 1024.0,
        unit => anyhow::bail!("{text:?} has the unit {unit:?}"),
    };
    Ok(number.parse::<f64>()? * unit)
}

/// Its host's process is killed, which is no wish of its user's; in its second life its figures are read and its limits
/// changed; then its user ends it for good.
fn two_lives(docker: &Docker<'_>) -> Result<()> {
    let script = "head -c 20000000 /dev/zero >/dev/shm/f; echo filled; while :; do sleep 0.1; done";
    docker.run(&["-d", "--name", "some", "--restart", "always", "-m", "96m"], script)?.ok()?;
    let pid = docker.inspect("some", "{{.State.Pid}}")?;
    docker.host.run(["kill", "-KILL", &pid])?.ok()?;
    docker.host.eventually("its second life", PATIENCE, || {
        let state = docker.inspect("some", "{{.State.Status}} {{.RestartCount}} {{.State.Pid}}")?;
        Ok(state.starts_with("running 1 ") && !state.ends_with(&format!(" {pid}")))
    })?;
    docker.host.eventually("its memory", PATIENCE, || {
        Ok(docker.call(&["logs", "some"])?.ok()?.stdout().ends_with("filled\n"))
    })?;

    let format = "{{.Name}}/{{.MemUsage}}/{{.PIDs}}/{{.CPUPerc}}";
    let stats = docker.call(&["stats", "--no-stream", "--format", format, "some"])?.ok()?.stdout();
    let fields: Vec<_> = stats.trim().split('/').collect();
    let [name, usage, limit, pids, cpu] = fields[..] else { anyhow::bail!("stats: {stats}") };
    let (usage, limit) = (mib(usage)?, mib(limit)?);
    ensure!(name == "some" && usage > 19.0 && usage < limit, "stats: {stats}");
    ensure!((96.0..400.0).contains(&limit), "stats: {stats}");
    ensure!(pids.parse::<u32>()? >= 1 && cpu.trim_end_matches('%').parse::<f64>()? >= 0.0, "stats: {stats}");

    let new = ["update", "--cpus", "0.7", "--pids-limit", "33", "-m", "64m", "--memory-swap", "64m", "some"];
    docker.all(&[&new])?;
    let script = "cd /sys/fs/cgroup; cat cpu.max pids.max memory.max";
    docker.call(&["exec", "some", "sh", "-c", script])?.ok()?.stdout_is("70000 100000\n33\n67108864\n")?;
    docker.all(&[&["kill", "some"]])?;
    docker.is(
        "some",
        "{{.State.Status}} {{.State.ExitCode}} {{.HostConfig.Memory}}",
        "exited 137 67108864",
    )?;
    docker.all(&[&["rm", "some"]])
}

fn privileged(docker: &Docker<'_>) -> Result<()> {
    let script = "mount -t tmpfs t /tmp && touch /tmp/f && umount /tmp && echo mounted
                  echo 5 >/proc/sys/vm/swappiness && echo 60 >/proc/sys/vm/swappiness && echo written
                  touch /sys/fs/cgroup/cgroup.procs && echo cgroup; test -c /dev/kmsg && echo devices
                  grep CapEff /proc/self/status; grep Seccomp: /proc/self/status";
    docker
        .run(&["--rm", "--privileged"], script)?
        .ok()?
        .stdout_is("mounted\nwritten\ncgroup\ndevices\nCapEff:\t0000003fffffffff\nSeccomp:\t0\n")?;
    Ok(())
}

fn limits(docker: &Docker<'_>) -> Result<()> {
    let flags =
        ["--rm", "--read-only", "--user", "1000:1001", "-m", "64m", "--cpus", "0.5", "--pids-limit", "50"];
    let more = ["--tmpfs", "/t", "--ulimit", "nofile=99", "--hostname", "box", "--cap-drop", "all"];
    let script = "cd /sys/fs/cgroup; echo $(id -u) $(id -g) $(ulimit -n) $(hostname); cat memory.max cpu.max pids.max;
                  touch /x 2>/dev/null || echo refused; touch /t/f && echo written; grep CapBnd /proc/self/status";
    docker.run(&[&flags[..], &more[..]].concat(), script)?.ok()?.stdout_is(
        "1000 1001 99 box\n67108864\n50000 100000\n50\nrefused\nwritten\nCapBnd:\t0000000000000000\n",
    )?;
    Ok(())
}

fn network_and_volumes(docker: &Docker<'_>) -> Result<()> {
    let dir = docker.host.work().join("dir");
    ensure!(fs::read_to_string(dir.join("new"))? == "given\n");
    fs::remove_dir_all(dir)?;
    docker.host.run(["wget", "-q", "-O", "-", "http://127.0.0.1:8080/f"])?.ok()?.stdout_is("served\n")?;
    // This busybox asks name servers in `nslookup` alone.
    let script = "cat /data/f; touch /data/g 2>/dev/null || echo refused
                  wget -q -O - http://$(nslookup life | sed -n 's/^Address: //p')/f";
    let flags = ["--rm", "--network", "net", "-v", "volume:/data:ro"];
    docker.run(&flags, script)?.ok()?.stdout_is("kept\nrefused\nserved\n")?;
    Ok(())
}

/// A container in the namespaces of another: with Bulkhead in its microVM.
fn joined(docker: &Docker<'_>) -> Result<()> {
    let server = "echo served >/f; touch /dev/shm/mine; while :; do nc -l -p 80 </f; done";
    docker.run(&["-d", "--name", "first", "--ipc", "shareable"], server)?.ok()?;
    let flags =
        ["--rm", "--network", "container:first", "--pid", "container:first", "--ipc", "container:first"];
    docker.host.eventually("the first one's server", PATIENCE, || {
        Ok(docker.run(&flags, "nc 127.0.0.1 80")?.stdout() == "served\n")
    })?;
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let script = format!("ls /dev/shm; test -e /f || echo alone; kill -0 1 && {boot}");
    let second = docker.run(&flags, &script)?.ok()?.stdout();
    let first = docker.call(&["exec", "first", "sh", "-c", boot])?.ok()?.stdout();
    ensure!(second == format!("mine\nalone\n{first}"), "the second says {second:?}");
    docker.all(&[&["rm", "-f", "first"]])
}

fn steps<'a>() -> [Step<Docker<'a>>; 11] {
    [
        ("run -i: status, streams", status_and_streams),
        ("`run --rm busybox true`", returns),
        ("run of what is missing (127) or no program (126)", no_such_program),
        ("run -d --network -p -v, logs, inspect, top", in_the_background),
        ("the port, a name on the network, the volume, the directory", network_and_volumes),
        ("exec -u -w -e -t", more_processes),
        ("pause, unpause", suspended),
        ("cp both ways, commit", files_in_and_out),
        ("stop, start, kill, wait, rm", its_end),
        ("--restart on-failure:2", started_again),
        ("--read-only --user -m --cpus --pids-limit --tmpfs --ulimit --hostname --cap-drop", limits),
    ]
}

/// Beside runc only when asked for: dockerd's own part in them takes long.
fn more_steps<'a>() -> [Step<Docker<'a>>; 4] {
    [
        ("--network, --pid, --ipc container:…", joined),
        ("--restart always, kill -9, stats, update, kill", two_lives),
        ("-m, and more memory than that: OOMKilled, 137", out_of_memory),
        ("--privileged", privileged),
    ]
}

test!(what_people_do, Needs::engines().deadline(300).shows_output());
fn what_people_do(host: &Host) -> Result<()> {
    with_daemon(host, false, |[_, bulkhead]| side_by_side(&[("bulkhead", bulkhead)], &all_steps()))
}

test!(
    the_same_with_runc,
    Needs::engines()
        .deadline(400)
        .shows_output()
        .pending("shows that the script is right, and the figures side by side; five minutes")
);
fn the_same_with_runc(host: &Host) -> Result<()> {
    with_daemon(host, false, |[runc, bulkhead]| {
        side_by_side(&[("runc", runc), ("bulkhead", bulkhead)], &all_steps())
    })
}

fn all_steps<'a>() -> Vec<Step<Docker<'a>>> {
    steps().into_iter().chain(more_steps()).collect()
}

/// dockerd, for the time of `work`. With `experimental` it has checkpoints.
pub fn with_daemon(
    host: &Host,
    experimental: bool,
    work: impl FnOnce([Docker<'_>; 2]) -> Result<()>,
) -> Result<()> {
    let dir = host.work().display();
    let runtimes = json!({"bulkhead": {"path": "/usr/local/bin/bulkhead-oci"}});
    let settings = json!({"runtimes": runtimes, "experimental": experimental}).to_string();
    let settings = host.file("daemon.json", settings)?;
    let command = format!(
        "dockerd -H unix://{dir}/docker.sock --config-file {} --exec-opt native.cgroupdriver=cgroupfs -s overlay2 \
         --data-root {dir}/data --exec-root {dir}/exec --pidfile {dir}/pid",
        settings.display()
    );
    let daemon = Daemon::start(host, &command, || Docker::program(host, &["version"]))?;
    let image = host.image("busybox-docker").display().to_string();
    Docker::program(host, &["load", "-q", "-i", &image]).run()?.ok()?;
    let done = work(["runc", "bulkhead"].map(|runtime| Docker { host, runtime }));
    daemon.end(&["/run/containerd", "/run/docker"])?;
    // What dockerd keeps for its next start.
    Command::new("ip").args(["link", "delete", "docker0"]).status()?;
    let _ = fs::remove_dir("/sys/fs/cgroup/docker");
    done
}
