//! The real podman with `bulkhead-oci`; the same steps with runc when asked for (`--ignored`).

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Finished, Program};
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;

use crate::daemons::{Step, side_by_side};

/// podman keeps its bridge, its locks and its database.
const NEEDS: Needs = Needs::engines().deadline(300).shows_output().may_leave_things();

const IMAGE: &str = "busybox";

struct Podman<'a> {
    host: &'a Host,
    runtime: &'static str,
}

impl Podman<'_> {
    fn program(&self, words: &[&str]) -> Program {
        Program::new(["podman", "--runtime", self.runtime]).args(words.iter().copied())
    }

    fn call(&self, words: &[&str]) -> Result<Finished> {
        self.program(words).run()
    }

    fn shell(&self, flags: &[&str], script: &str) -> Result<Finished> {
        self.call(&[&["run", "--rm"], flags, &[IMAGE, "sh", "-c", script]].concat())
    }

    /// `run -d`, with a name.
    fn start(&self, name: &str, flags: &[&str], script: &str) -> Result<()> {
        self.call(&[&["run", "-d", "--name", name], flags, &[IMAGE, "sh", "-c", script]].concat())?.ok()?;
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.call(&["rm", "-f", "-t", "0", name])?.ok()?;
        Ok(())
    }
}

test!(what_people_do, NEEDS);
fn what_people_do(host: &Host) -> Result<()> {
    with(host, "/usr/local/bin/bulkhead-oci")
}

test!(
    what_people_do_with_runc,
    NEEDS.pending("shows that the script is right; some minutes, and of no use each time")
);
fn what_people_do_with_runc(host: &Host) -> Result<()> {
    with(host, "runc")
}

fn with(host: &Host, runtime: &'static str) -> Result<()> {
    host.run(["podman", "load", "-q", "-i", &host.image("busybox-docker").display().to_string()])?.ok()?;
    let name = runtime.rsplit('/').next().unwrap_or(runtime);
    side_by_side(&[(name, Podman { host, runtime })], &steps())
}

fn steps<'a>() -> [Step<Podman<'a>>; 17] {
    [
        ("run: output, status", run),
        ("run: user, env, workdir, hostname", identity),
        ("run: --read-only, --tmpfs, --shm-size", filesystems),
        ("run: --memory, --pids-limit, --cpus, --ulimit", limits),
        ("run: capabilities, --privileged", capabilities),
        ("run: what cannot be started: 126, 127", cannot_start),
        ("volumes and binds", volumes),
        ("exec, logs, ps, top, stats", attached),
        ("cp both ways, commit", copies),
        ("published port", port),
        ("pause, unpause", pause),
        ("stop, kill, wait, restart", ends),
        ("one network for two containers", shared_network),
        ("a pod (not with runc)", pod),
        ("build", build),
        ("-it: a terminal", terminal),
        ("nothing left running", nothing_left),
    ]
}

fn run(podman: &Podman<'_>) -> Result<()> {
    let run = podman.shell(&[], "echo out; echo err >&2; exit 3")?;
    run.status_is(3)?.stdout_is("out\n")?.stderr_is("err\n")?;
    let release = podman.shell(&[], "uname -r")?.ok()?.stdout();
    let here = podman.host.run(["uname", "-r"])?.ok()?.stdout();
    ensure!((release == here) == (podman.runtime == "runc"), "the kernel is {release}");
    let mut cat = podman.program(&["run", "--rm", "-i", IMAGE, "cat"]).open_stdin().spawn()?;
    cat.send("through\n")?;
    cat.close_stdin();
    cat.wait()?.ok()?.stdout_is("through\n")?;
    podman.shell(&["--network", "none"], "ls /sys/class/net")?.ok()?.stdout_is("lo\n")?;
    Ok(())
}

fn identity(podman: &Podman<'_>) -> Result<()> {
    let flags = ["--user", "1000:1000", "-e", "A=b", "-w", "/tmp", "--hostname", "h"];
    let run = podman.shell(&flags, "echo $(id -u) $(id -g) $A $PWD $(hostname)")?;
    run.ok()?.stdout_is("1000 1000 b /tmp h\n")?;
    Ok(())
}

fn filesystems(podman: &Podman<'_>) -> Result<()> {
    let flags = ["--read-only", "--tmpfs", "/t", "--shm-size", "10m"];
    let script =
        "touch /x 2>/dev/null || echo refused; touch /t/x /tmp/x; df -k /dev/shm | awk 'NR == 2 {print $2}'";
    podman.shell(&flags, script)?.ok()?.stdout_is("refused\n10240\n")?;
    Ok(())
}

fn limits(podman: &Podman<'_>) -> Result<()> {
    let flags = ["-m", "64m", "--pids-limit", "50", "--cpus", "0.5", "--ulimit", "nofile=99"];
    let script = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max; ulimit -n";
    podman.shell(&flags, script)?.ok()?.stdout_is("67108864\n50\n50000 100000\n99\n")?;
    podman.shell(&["-m", "32m"], "tail /dev/zero")?.status_is(137)?;
    Ok(())
}

fn capabilities(podman: &Podman<'_>) -> Result<()> {
    let script = "grep CapEff /proc/self/status";
    podman.shell(&["--cap-drop", "all"], script)?.ok()?.stdout_has("0000000000000000")?;
    podman.shell(&["--privileged"], script)?.ok()?.stdout_has("000001ffffffffff")?;
    Ok(())
}

fn cannot_start(podman: &Podman<'_>) -> Result<()> {
    podman.call(&["run", "--rm", IMAGE, "nosuch"])?.status_is(127)?;
    podman.call(&["run", "--rm", IMAGE, "/etc/passwd"])?.status_is(126)?;
    Ok(())
}

fn volumes(podman: &Podman<'_>) -> Result<()> {
    let shared =
        podman.host.file(&format!("shared-{}/given", podman.runtime.replace('/', "-")), "given\n")?;
    let dir = shared.parent().context("no parent")?;
    podman.shell(&["-v", "kept:/data"], "echo kept >/data/f")?.ok()?;
    let read =
        podman.shell(&["-v", "kept:/data:ro"], "cat /data/f; touch /data/g 2>/dev/null || echo refused")?;
    read.ok()?.stdout_is("kept\nrefused\n")?;
    let bind = format!("{}:/d", dir.display());
    podman
        .shell(&["-v", &bind], "cat /d/given; echo new >/d/new; chown 5:6 /d/new")?
        .ok()?
        .stdout_is("given\n")?;
    podman
        .host
        .run(["stat", "-c", "%u %g", &dir.join("new").display().to_string()])?
        .ok()?
        .stdout_is("5 6\n")?;
    podman.call(&["volume", "rm", "kept"])?.ok()?;
    Ok(())
}

fn attached(podman: &Podman<'_>) -> Result<()> {
    podman.start("c", &[], "echo up; echo bad >&2; exec sleep 1000")?;
    podman.host.eventually("its output", Duration::from_secs(10), || {
        let logs = podman.call(&["logs", "c"])?.ok()?;
        Ok(logs.stdout() == "up\n" && logs.stderr() == "bad\n")
    })?;
    podman.call(&["exec", "c", "sh", "-c", "echo in; exit 7"])?.status_is(7)?.stdout_is("in\n")?;
    podman
        .call(&["exec", "-u", "5", "-w", "/tmp", "-e", "A=b", "c", "sh", "-c", "echo $(id -u) $PWD $A"])?
        .ok()?
        .stdout_is("5 /tmp b\n")?;
    podman.call(&["exec", "c", "nosuch"])?.status_is(127)?;
    podman.call(&["ps", "--format", "{{.Names}} {{.Status}}"])?.ok()?.stdout_has("c Up")?;
    podman.call(&["top", "c", "pid"])?.ok()?.stdout_has("1\n")?;
    podman.call(&["stats", "--no-stream", "--format", "{{.Name}}", "c"])?.ok()?.stdout_has("c\n")?;
    podman.remove("c")
}

fn copies(podman: &Podman<'_>) -> Result<()> {
    podman.start("c", &[], "echo inside >/f; exec sleep 1000")?;
    let here = podman.host.work().join("copied").display().to_string();
    podman.host.eventually("its file", Duration::from_secs(10), || {
        Ok(podman.call(&["cp", "c:/f", &here])?.status == 0)
    })?;
    podman.host.run(["cat", &here])?.ok()?.stdout_is("inside\n")?;
    podman.call(&["cp", &here, "c:/g"])?.ok()?;
    podman.call(&["exec", "c", "cat", "/g"])?.ok()?.stdout_is("inside\n")?;
    podman.call(&["commit", "-q", "c", "committed"])?.ok()?;
    podman.call(&["run", "--rm", "committed", "cat", "/f", "/g"])?.ok()?.stdout_is("inside\ninside\n")?;
    podman.remove("c")?;
    podman.call(&["rmi", "committed"])?.ok()?;
    Ok(())
}

fn port(podman: &Podman<'_>) -> Result<()> {
    let server = "mkdir /www; echo served >/www/f; exec httpd -f -p 80 -h /www";
    podman.start("web", &["-p", "8080:80"], server)?;
    podman.host.eventually("the port", Duration::from_secs(20), || {
        Ok(podman.host.run(["wget", "-q", "-O", "-", "http://127.0.0.1:8080/f"])?.stdout() == "served\n")
    })?;
    podman.remove("web")
}

fn shared_network(podman: &Podman<'_>) -> Result<()> {
    let server = "echo served >/f; touch /dev/shm/f; while :; do nc -l -p 80 </f; done";
    podman.start("first", &["--ipc", "shareable"], server)?;
    let flags = ["--network", "container:first", "--ipc", "container:first", "--pid", "container:first"];
    podman.host.eventually("its server", Duration::from_secs(10), || {
        Ok(podman.shell(&flags, "nc 127.0.0.1 80")?.stdout() == "served\n")
    })?;
    let address = "ip -4 -o addr show eth0 | awk '{print $4}'";
    let script = format!("ls /dev/shm; test -e /f || echo alone; kill -0 1 && {address}");
    let second = podman.shell(&flags, &script)?.ok()?.stdout();
    let address = podman.call(&["exec", "first", "sh", "-c", address])?.ok()?.stdout();
    ensure!(second == format!("f\nalone\n{address}"), "the second says {second:?}");
    podman.remove("first")
}

fn pod(podman: &Podman<'_>) -> Result<()> {
    if podman.runtime == "runc" {
        // Without systemd, podman 4.3 puts pods into a cgroup in which no device can be opened: runc fails there.
        return Ok(());
    }
    let infra = ["--infra-image", IMAGE, "--infra-command", "sleep 1000"];
    podman.call(&[&["pod", "create", "--name", "p", "-p", "8081:80"], &infra[..]].concat())?.ok()?;
    let server = "mkdir /www; echo served >/www/f; exec httpd -f -p 80 -h /www";
    podman.start("web", &["--pod", "p"], server)?;
    podman.host.eventually("the port", Duration::from_secs(20), || {
        Ok(podman.host.run(["wget", "-q", "-O", "-", "http://127.0.0.1:8081/f"])?.stdout() == "served\n")
    })?;
    let flags = ["--pod", "p", "-m", "32m"];
    let script = "hostname; wget -q -O - http://127.0.0.1/f; cat /sys/fs/cgroup/memory.max";
    podman.shell(&flags, script)?.ok()?.stdout_is("p\nserved\n33554432\n")?;
    podman.shell(&flags, "tail /dev/zero")?.status_is(137)?;
    podman.call(&["exec", "web", "cat", "/www/f"])?.ok()?.stdout_is("served\n")?;
    podman.call(&["restart", "-t", "0", "web"])?.ok()?;
    podman.host.run(["pgrep", "-c", "bulkhead-vmm"])?.ok()?.stdout_is("1\n")?;
    podman.call(&["pod", "stop", "-t", "0", "p"])?.ok()?;
    podman.call(&["pod", "start", "p"])?.ok()?;
    podman.call(&["pod", "rm", "-f", "-t", "0", "p"])?.ok()?;
    Ok(())
}

fn pause(podman: &Podman<'_>) -> Result<()> {
    podman.start("c", &[], "exec sleep 1000")?;
    podman.call(&["pause", "c"])?.ok()?;
    podman.call(&["ps", "--filter", "status=paused", "--format", "{{.Names}}"])?.ok()?.stdout_is("c\n")?;
    podman.call(&["exec", "c", "true"])?.status_is(255)?;
    podman.call(&["unpause", "c"])?.ok()?;
    podman.call(&["exec", "c", "true"])?.ok()?;
    podman.remove("c")
}

fn ends(podman: &Podman<'_>) -> Result<()> {
    podman.start("c", &[], "trap 'exit 4' TERM; while :; do sleep 0.1; done")?;
    podman.call(&["stop", "-t", "5", "c"])?.ok()?;
    let status =
        |podman: &Podman<'_>| podman.call(&["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "c"]);
    status(podman)?.ok()?.stdout_is("exited 4\n")?;
    podman.call(&["restart", "c"])?.ok()?;
    podman.call(&["kill", "c"])?.ok()?;
    podman.call(&["wait", "c"])?.ok()?.stdout_is("137\n")?;
    podman.remove("c")
}

fn build(podman: &Podman<'_>) -> Result<()> {
    let file = podman.host.file("build/Containerfile", "FROM busybox\nRUN echo built >/built\n")?;
    let dir = file.parent().context("no parent")?.display().to_string();
    podman.call(&["build", "-q", "--no-cache", "-t", "built", &dir])?.ok()?;
    podman.call(&["run", "--rm", "built", "cat", "/built"])?.ok()?.stdout_is("built\n")?;
    podman.call(&["rmi", "built"])?.ok()?;
    Ok(())
}

fn terminal(podman: &Podman<'_>) -> Result<()> {
    let mut run = podman.program(&["run", "--rm", "-it", IMAGE, "sh"]).terminal(24, 80)?;
    run.wait_for("# ", Duration::from_secs(20))?;
    run.send("stty size; tty\n")?;
    run.wait_for("24 80", Duration::from_secs(10))?;
    run.wait_for("/dev/", Duration::from_secs(10))?;
    run.send("exit 5\n")?;
    run.wait()?.status_is(5)?;
    Ok(())
}

fn nothing_left(podman: &Podman<'_>) -> Result<()> {
    podman.call(&["ps", "-aq"])?.ok()?.stdout_is("")?;
    for program in ["bulkhead-vmm", "bulkhead-oci", "virtiofsd", "conmon"] {
        let left = podman.host.run(["pgrep", "-f", program])?;
        ensure!(left.status == 1, "{program} is still there: {}", left.stdout());
    }
    Ok(())
}
