//! What only a shim can get wrong: restarts and deaths of those around it, pods, events, streams. What it does as any
//! other is in `containerd.rs`.

use std::fs;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_protocol::client::Client;
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Program;
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;

use crate::containerd::{Ctr, IMAGE, SHIM, daemon, ended};
use crate::daemons::lives;

const NEEDS: Needs = Needs::engines().deadline(200);
const PATIENCE: Duration = Duration::from_secs(20);
/// How soon containerd is to know.
const SOON: Duration = Duration::from_secs(2);
const LOOP: &[&str] = &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"];

/// How many processes have this in their command line.
fn count(host: &Host, pattern: &str) -> Result<usize> {
    Ok(host.run(["pgrep", "-f", pattern])?.stdout().lines().count())
}

fn kill(host: &Host, pattern: &str) -> Result<()> {
    host.run(["pkill", "-KILL", "-f", pattern])?.ok().map(drop)
}

fn nothing_left(host: &Host) -> Result<()> {
    for program in ["bulkhead-vmm", "bulkhead-oci", "virtiofsd", "containerd-shim"] {
        host.eventually("its processes to end", PATIENCE, || Ok(count(host, program)? == 0))
            .with_context(|| format!("{program} is still there"))?;
    }
    for dir in ["/run/containerd/s", "/run/containerd/bulkhead/s", "/run/containerd/bulkhead/states/default"]
    {
        let left: Vec<_> = fs::read_dir(dir)?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(left.is_empty(), "{dir} has {left:?}");
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains("/rootfs "), "a root file system is still mounted:\n{mounts}");
    Ok(())
}

fn import(host: &Host) -> Result<()> {
    let image = host.image("busybox-docker").display().to_string();
    Ctr::program(host, &["images", "import", &image]).run()?.ok().map(drop)
}

test!(it_outlives_containerd_and_tells_of_deaths, NEEDS);
fn it_outlives_containerd_and_tells_of_deaths(host: &Host) -> Result<()> {
    let first = daemon(host)?;
    import(host)?;
    let ctr = Ctr { host, runtime: SHIM };
    ctr.run(&["-d"], "life", LOOP)?.ok()?;
    let (pid, _) = ctr.task("life")?;
    first.end(&[])?;
    ensure!(lives(&pid), "the container ended with containerd");
    let second = daemon(host)?;
    ensure!(ctr.task("life")? == (pid, "RUNNING".to_owned()));
    ctr.call(&["task", "exec", "--exec-id", "e", "life", "sh", "-c", "exit 9"])?.status_is(9)?;
    ctr.all(&[&["task", "kill", "life"]])?;
    ctr.is("life", "STOPPED")?;
    ctr.call(&["task", "delete", "life"])?.stderr_has("exit code 3")?;

    // Whatever is killed, containerd is told, and what is left is taken away.
    for victim in ["bulkhead-vmm", "virtiofsd", "bulkhead-oci.*life"] {
        ctr.all(&[&["task", "start", "-d", "life"]])?;
        ctr.is("life", "RUNNING")?;
        kill(host, victim)?;
        host.eventually("its end to be told", SOON, || Ok(ctr.task("life")?.1 == "STOPPED"))
            .with_context(|| format!("{victim} was killed"))?;
        ctr.call(&["task", "delete", "life"])?.stderr_has("exit code 137")?;
    }
    ctr.all(&[&["task", "start", "-d", "life"]])?;
    ctr.is("life", "RUNNING")?;
    kill(host, "containerd-shim-bulkhead")?;
    host.eventually("its end to be told", SOON, || Ok(ctr.task("life")?.1.is_empty()))?;
    ctr.all(&[&["containers", "rm", "life"]])?;
    nothing_left(host)?;
    ctr.run(&["--rm"], "life", &["true"])?.ok()?;
    nothing_left(host)?;
    ended(second)
}

test!(a_pod_has_one_shim_and_one_machine, NEEDS);
fn a_pod_has_one_shim_and_one_machine(host: &Host) -> Result<()> {
    let daemon = daemon(host)?;
    import(host)?;
    let ctr = Ctr { host, runtime: SHIM };
    let pod = ["--annotation", "io.kubernetes.cri.sandbox-id=pod"];
    ctr.run(&[&["-d"], &pod[..]].concat(), "pod", &["sh", "-c", "busybox nc -ll -p 80 -e echo hello"])?
        .ok()?;
    let (pid, _) = ctr.task("pod")?;
    let network = format!("network:/proc/{pid}/ns/net");
    let joins = [&pod[..], &["--with-ns", &network]].concat();
    ctr.run(&[&["-d"], &joins[..]].concat(), "other", LOOP)?.ok()?;
    let greeting = ["sh", "-c", "nc 127.0.0.1 80; cat /proc/sys/kernel/random/boot_id"];
    let third = ctr.run(&[&["--rm"], &joins[..]].concat(), "third", &greeting)?.ok()?.stdout();
    let boot = ["task", "exec", "--exec-id", "e", "other", "cat", "/proc/sys/kernel/random/boot_id"];
    ensure!(third == format!("hello\n{}", ctr.call(&boot)?.ok()?.stdout()), "the third says {third:?}");
    ensure!(count(host, "containerd-shim-bulkhead")? == 1, "a shim for each container");
    ensure!(count(host, "bulkhead-vmm")? == 1, "a machine for each container");
    // A container of the pod ends and comes again; the others stay.
    ctr.all(&[&["task", "kill", "-s", "KILL", "other"]])?;
    ctr.is("other", "STOPPED")?;
    ctr.call(&["task", "delete", "other"])?.stderr_has("exit code 137")?;
    ctr.all(&[&["task", "start", "-d", "other"]])?;
    ctr.is("other", "RUNNING")?;
    ensure!(ctr.task("pod")?.1 == "RUNNING");
    // The machine is the first one's.
    ctr.all(&[&["task", "kill", "-s", "KILL", "pod"]])?;
    for id in ["pod", "other"] {
        ctr.is(id, "STOPPED")?;
        ctr.call(&["task", "delete", id])?.stderr_has("exit code 137")?;
        ctr.all(&[&["containers", "rm", id]])?;
    }
    nothing_left(host)?;
    ended(daemon)
}

test!(events_come_in_order_and_streams_are_whole, NEEDS);
fn events_come_in_order_and_streams_are_whole(host: &Host) -> Result<()> {
    let daemon = daemon(host)?;
    import(host)?;
    let ctr = Ctr { host, runtime: SHIM };
    let watch = Ctr::program(host, &["events"]).spawn()?;
    ctr.run(&["--rm", "--memory-limit", "67108864"], "big", &["tail", "/dev/zero"])?.status_is(137)?;
    watch.wait_for("/tasks/delete", PATIENCE)?;
    watch.signal(rustix::process::Signal::KILL)?;
    let told = watch.wait()?.stdout();
    let topics: Vec<_> = told.split_whitespace().filter_map(|word| word.strip_prefix("/tasks/")).collect();
    ensure!(topics == ["create", "start", "oom", "exit", "delete"], "{topics:?} in\n{told}");

    // A terminal, its size, a status.
    let words = [&["run", "--rm", "-t"], SHIM, &[IMAGE, "tty", "sh"]].concat();
    let mut run = Ctr::program(host, &words).terminal(24, 80)?;
    run.wait_for("# ", PATIENCE)?;
    run.send("stty size; exit 5\n")?;
    run.wait_for("24 80", PATIENCE)?;
    run.wait()?.status_is(5)?;

    // Input to its end; much output, all of it.
    let words = [&["run", "--rm"], SHIM, &[IMAGE, "in", "sh", "-c", "cat; echo end"]].concat();
    let mut run = Ctr::program(host, &words).open_stdin().spawn()?;
    run.send("given\n")?;
    run.close_stdin();
    run.wait()?.ok()?.stdout_is("given\nend\n")?;
    let much = ctr.run(&["--rm"], "much", &["seq", "100000"])?.ok()?.stdout();
    ensure!(much.lines().count() == 100_000 && much.ends_with("\n100000\n"), "{} bytes", much.len());

    // Loggers: a file, and a program that is told whose output it reads.
    let file = host.work().join("output");
    let uri = format!("file://{}", file.display());
    let both = ["sh", "-c", "echo out; echo err >&2"];
    ctr.run(&["-d", "--log-uri", &uri], "logged", &both)?.ok()?;
    ctr.is("logged", "STOPPED")?;
    ensure!(fs::read_to_string(&file)? == "out\nerr\n");
    ctr.all(&[&["task", "delete", "logged"], &["containers", "rm", "logged"]])?;
    let script =
        "#!/bin/sh\nexec 5>&-\n{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $1\"; cat <&3; cat <&4; } >$2\n";
    let logger = host.file("logger", script)?;
    host.run(["chmod", "755", &logger.display().to_string()])?.ok()?;
    let written = host.work().join("written");
    let uri = format!("binary://{}?word&{}", logger.display(), written.display());
    ctr.run(&["-d", "--log-uri", &uri], "logged", &both)?.ok()?;
    ctr.is("logged", "STOPPED")?;
    host.eventually("the logger", PATIENCE, || {
        Ok(fs::read_to_string(&written).is_ok_and(|text| text == "default/logged word\nout\nerr\n"))
    })?;
    ctr.all(&[&["task", "delete", "logged"], &["containers", "rm", "logged"]])?;

    // A fifo that nobody reads stops who writes, and nothing else.
    ctr.run(&["-d"], "life", LOOP)?.ok()?;
    let script = ["sh", "-c", "yes | head -c 4000000; touch /done; echo the end; yes"];
    ctr.run(&["-d"], "full", &script)?.ok()?;
    let done = || -> Result<bool> {
        let test = ["task", "exec", "--exec-id", "look", "full", "test", "-e", "/done"];
        Ok(ctr.call(&test)?.status == 0)
    };
    ensure!(!done()?, "nobody reads, and it has all been written");
    ctr.call(&["task", "exec", "--exec-id", "e", "life", "echo", "alive"])?.ok()?.stdout_is("alive\n")?;
    for process in ["containerd-shim-bulkhead-v2 -namespace", "bulkhead-oci.*full"] {
        let pids = host.run(["pgrep", "-f", process])?.ok()?.stdout();
        for pid in pids.lines() {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("").trim();
            let kib: u64 = resident.trim_end_matches(" kB").parse().with_context(|| process.to_owned())?;
            ensure!(kib < 16 << 10, "{process} holds {kib} KiB");
        }
    }
    let fifo = Program::new(["sh", "-c", "exec cat /run/containerd/fifo/*/full-stdout"]).spawn()?;
    host.eventually("the rest to be written", PATIENCE, &done)?;
    fifo.wait_for("the end", PATIENCE)?;
    fifo.signal(rustix::process::Signal::KILL)?;
    fifo.wait()?;
    ctr.all(&[&["task", "kill", "-s", "KILL", "full"]])?;
    ctr.is("full", "STOPPED")?;
    ctr.call(&["task", "delete", "full"])?.stderr_has("exit code 137")?;
    ctr.all(&[&["containers", "rm", "full"]])?;

    // A process that was added ends by SIGKILL, in the guest too.
    ctr.call(&["task", "exec", "-d", "--exec-id", "e", "life", "sleep", "7777"])?.ok()?;
    let others = || -> Result<bool> {
        let look = ["task", "exec", "--exec-id", "look", "life", "sh", "-c", "ps | grep -q 'sleep 777[7]'"];
        Ok(ctr.call(&look)?.status == 0)
    };
    host.eventually("the other process", PATIENCE, &others)?;
    ctr.all(&[&["task", "kill", "--exec-id", "e", "-s", "KILL", "life"]])?;
    host.eventually("its end", PATIENCE, || Ok(!others()?))?;
    ctr.call(&["task", "rm", "-f", "life"])?;
    ctr.all(&[&["containers", "rm", "life"]])?;
    nothing_left(host)?;
    ended(daemon)
}

/// A request with an id, and what only a later containerd knows of.
#[derive(Clone, PartialEq, prost::Message)]
struct Request {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "99")]
    unknown: String,
}

/// `ConnectResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct Connected {
    #[prost(uint32, tag = "1")]
    shim_pid: u32,
}

test!(it_takes_callers_that_are_not_containerd, Needs::bulkhead());
fn it_takes_callers_that_are_not_containerd(host: &Host) -> Result<()> {
    let config = host.file("bundle/config.json", "{}")?;
    let bundle = config.parent().context("no parent")?;
    let start = || {
        let flags = ["-namespace", "n", "-id", "i", "-address", "/nowhere.sock", "start"];
        Program::new(["containerd-shim-bulkhead-v2"]).args(flags).dir(bundle)
    };
    // Two at once are one.
    let both = [start().spawn()?, start().spawn()?];
    let answers = both.into_iter().map(|call| Ok(call.wait()?.ok()?.stdout())).collect::<Result<Vec<_>>>()?;
    ensure!(answers.first() == answers.last(), "{answers:?}");
    ensure!(count(host, "containerd-shim-bulkhead-v2 -namespace")? == 1);
    let path =
        answers.first().and_then(|answer| answer.strip_prefix("unix://")).context("no address")?.to_owned();

    // Noise, a frame of four gigabytes, half a frame.
    for bytes in [vec![0xff; 1 << 20], vec![0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 1, 0], vec![0, 0, 0, 9, 0]] {
        let mut stream = UnixStream::connect(&path)?;
        // It may hang up before it has read all.
        let _ = stream.write_all(&bytes);
    }
    let call = || -> Result<_> { Ok(Client::new(UnixStream::connect(&path)?, "containerd.task.v2.Task")) };
    let request = Request { id: "i".into(), unknown: "more".into() };
    let connected: Connected = call()?.call("Connect", &request)?;
    ensure!(
        host.run(["pgrep", "-f", "shim-bulkhead-v2 -namespace"])?.stdout().trim()
            == connected.shim_pid.to_string()
    );
    for method in ["State", "Start", "Delete", "Kill", "Pids", "Stats", "Wait", "Pause", "Update"] {
        let Err(error) = call()?.call::<Connected>(method, &request) else {
            bail!("{method} of nothing works")
        };
        ensure!(!error.to_string().is_empty());
    }
    // The same of the sandbox API; what makes a pod has to be a pod's description.
    for method in [
        "CreateSandbox",
        "StartSandbox",
        "Platform",
        "StopSandbox",
        "WaitSandbox",
        "SandboxStatus",
        "PingSandbox",
    ] {
        let mut client = Client::new(UnixStream::connect(&path)?, "containerd.runtime.sandbox.v1.Sandbox");
        let Err(error) = client.call::<Connected>(method, &request) else {
            bail!("{method} of nothing works")
        };
        let word = if method == "CreateSandbox" { "PodSandboxConfig" } else { "does not exist" };
        ensure!(error.to_string().contains(word), "{method}: {error}");
    }
    let _ = call()?.call::<Connected>("Shutdown", &request);
    host.eventually("its end", PATIENCE, || {
        Ok(count(host, "containerd-shim-bulkhead-v2 -namespace")? == 0 && !Path::new(&path).exists())
    })?;
    // A socket that nobody listens on any more is in nobody's way.
    drop(UnixListener::bind(&path)?);
    start().run()?.ok()?.stdout_is(&format!("unix://{path}"))?;
    let _ = call()?.call::<Connected>("Shutdown", &request);
    host.eventually("its end", PATIENCE, || Ok(count(host, "containerd-shim-bulkhead-v2 -namespace")? == 0))?;
    fs::remove_dir_all("/run/containerd")?;
    Ok(())
}

test!(doctor_says_what_engines_lack, NEEDS);
fn doctor_says_what_engines_lack(host: &Host) -> Result<()> {
    let doctor = || host.bulkhead(["doctor", "--engines"]);
    // The lines stand by themselves, to be copied.
    let advice = doctor()?
        .ok()?
        .stdout_has("    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.bulkhead]\n")?;
    advice.stdout_has("    \"runtimes\": {\"bulkhead\": {\"path\": \"/usr/local/bin/bulkhead-oci\"}}\n")?;
    fs::create_dir_all("/etc/docker")?;
    let runtimes = "{\"runtimes\": {\"vm\": {\"path\": \"/usr/local/bin/bulkhead-oci\"}}}";
    fs::write("/etc/docker/daemon.json", runtimes)?;
    doctor()?.ok()?.stdout_has("`docker run --runtime vm`")?;
    fs::write("/etc/docker/daemon.json", "{")?;
    doctor()?.failed()?.stdout_has("/etc/docker/daemon.json: EOF")?;
    fs::remove_dir_all("/etc/docker")?;
    Ok(())
}

test!(the_program_says_what_it_is, Needs::bulkhead());
fn the_program_says_what_it_is(_: &Host) -> Result<()> {
    let program = "containerd-shim-bulkhead-v2";
    Program::new([program, "-v"]).run()?.ok()?.stdout_has(program)?;
    Program::new([program]).run()?.failed()?.stderr_has("containerd runs this program")?;
    Program::new([program, "-nosuch"]).run()?.failed()?.stderr_has("nosuch")?;
    let here = ["-namespace", "n", "-id", "i", "-address", "/a", "start"];
    Program::new([program]).args(here).dir(Path::new("/")).run()?.failed()?.stderr_has("config.json")?;
    Ok(())
}
