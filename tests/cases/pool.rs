//! `bulkhead pool`: machines that wait for their containers.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Finished;
use bulkhead_tests::test;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::BUSYBOX;

const PATIENCE: Duration = Duration::from_secs(20);
/// The mark of a container whose machine waited.
const TAKEN: &str = "machine taken";

fn pools(host: &Host) -> Result<Vec<Value>> {
    let text = host.bulkhead(["pool", "ls", "--format", "json"])?.ok()?.stdout();
    Ok(serde_json::from_str::<Value>(&text)?.as_array().context("no array")?.clone())
}

/// Waits until the one pool has so many machines.
fn holds(host: &Host, count: u64) -> Result<()> {
    host.eventually(&format!("{count} machines to wait"), PATIENCE, || {
        Ok(pools(host)?.first().is_some_and(|pool| pool["waiting"] == count && pool["warming"] == 0))
    })
}

fn warm(host: &Host, count: u32, options: &[&str]) -> Result<String> {
    let count = count.to_string();
    let mut words = vec!["pool", "warm", "--image", "busybox", "-n", &count];
    words.extend(options);
    Ok(host.bulkhead(words)?.ok()?.stdout().trim().to_owned())
}

/// Runs a container; tells whether its machine waited for it.
pub fn traced(host: &Host, options: &[&str], script: &str) -> Result<(Finished, bool)> {
    let trace = host.work().join("trace.json");
    let mut words = vec!["run", "--rm"];
    words.extend(options);
    words.extend(["busybox", "sh", "-c", script]);
    let finished = host.bulkhead_program(words).env("BULKHEAD_TRACE", trace.as_os_str()).run()?.ok()?;
    let text = fs::read_to_string(&trace).context("no trace was written")?;
    fs::remove_file(trace)?;
    ensure!(text.contains("container ended"), "{text}");
    Ok((finished, text.contains(TAKEN)))
}

fn entries(path: &str) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn monitors(host: &Host) -> Result<usize> {
    Ok(host.run(["pgrep", "-x", "bulkhead-vmm"])?.stdout().lines().count())
}

fn kill(pid: u64) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process id")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// Everything of pools is gone, and of containers too.
fn nothing_is_left(host: &Host) -> Result<()> {
    host.eventually("all monitors to be gone", PATIENCE, || Ok(monitors(host)? == 0))?;
    ensure!(pools(host)?.is_empty());
    host.bulkhead(["ps", "-a", "-q"])?.ok()?.stdout_is("")?;
    for path in ["/var/lib/bulkhead/pools", "/var/lib/bulkhead/warm", "/var/lib/bulkhead/containers"] {
        ensure!(entries(path).is_empty(), "{path}: {:?}", entries(path));
    }
    let run: Vec<_> = entries("/run/bulkhead")
        .into_iter()
        .filter(|name| !["kvm-works", "verified"].contains(&name.as_str()))
        .collect();
    ensure!(run.is_empty(), "{run:?}");
    Ok(())
}

/// What must differ between two containers, and what must be right in each.
const IDENTITY: &str = "cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | hexdump -e '16/1 \"%02x\" \"\\n\"'; \
    hostname; date +%s; ls / | wc -l; cat /proc/sys/kernel/random/uuid";

/// In a store of its own, as everything that is in no use goes.
fn prune_leaves_it(host: &Host) -> Result<()> {
    let root = host.work().join("root").display().to_string();
    let archive = host.image("busybox").display().to_string();
    let there = |words: &[&str]| host.bulkhead([&["--root", &root], words].concat())?.ok();
    there(&["image", "load", &archive])?;
    there(&["pool", "warm", "--image", "busybox", "-n", "1"])?;
    there(&["image", "prune", "-a"])?;
    there(&["image", "inspect", "busybox"])?;
    there(&["pool", "rm", "busybox"])?;
    there(&["image", "prune", "-a"])?;
    host.bulkhead(["--root", &root, "image", "inspect", "busybox"])?.status_is(1)?;
    Ok(())
}

test!(containers_take_what_waits_and_it_is_made_anew, BUSYBOX.deadline(120));
fn containers_take_what_waits_and_it_is_made_anew(host: &Host) -> Result<()> {
    let id = warm(host, 2, &[])?;
    ensure!(id.len() == 12, "{id}");
    host.bulkhead(["pool", "ls"])?.ok()?.stdout_has("2/2")?.stdout_has(&id)?.stdout_has("full")?;
    ensure!(monitors(host)? == 2);
    // They are no containers: not listed, and nothing that an id could mean.
    host.bulkhead(["ps", "-a", "-q"])?.ok()?.stdout_is("")?;
    let hidden = entries("/var/lib/bulkhead/containers").pop().context("no machine has files")?;
    for verb in [vec!["inspect", &hidden[..12]], vec!["rm", &hidden[..12]], vec!["stop", &hidden]] {
        host.bulkhead(verb)?.status_is(1)?.stderr_has("no such container")?;
    }

    // The image stays for as long as machines wait for it.
    host.bulkhead(["image", "rm", "busybox"])?.status_is(1)?.stderr_has("bulkhead pool")?;
    prune_leaves_it(host)?;

    // Some time after, each is itself.
    let mut seen = BTreeSet::new();
    for _ in 0..4 {
        host.run(["sleep", "5"])?.ok()?;
        let (finished, taken) = traced(host, &[], IDENTITY)?;
        ensure!(taken, "no machine was taken");
        let text = finished.stdout();
        let [boot, random, hostname, time, files, uuid] = text.lines().collect::<Vec<_>>()[..] else {
            anyhow::bail!("{text}")
        };
        for word in [boot, random, hostname, uuid] {
            ensure!(seen.insert(word.to_owned()), "{word} came twice");
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
        ensure!(now.abs_diff(time.parse()?) <= 1, "the guest has {time}, the host {now}");
        let alone = traced(host, &["--no-pool"], IDENTITY)?;
        ensure!(
            !alone.1 && alone.0.stdout().lines().nth(4) == Some(files),
            "{files} files: {}",
            alone.0.stdout()
        );
        holds(host, 2)?;
    }
    ensure!(pools(host)?[0]["taken"] == 4, "{:?}", pools(host)?);

    // What a container is given that is known only now.
    let (said, taken) = traced(
        host,
        &["-e", "A=b", "--hostname", "h", "-w", "/tmp", "-u", "1:2", "--read-only", "--pids-limit", "50"],
        "echo $A $(hostname) $(pwd) $(id -u):$(id -g) $(cat /sys/fs/cgroup/pids.max); touch /x 2>/dev/null || echo ro",
    )?;
    said.stdout_is("b h /tmp 1:2 50\nro\n")?;
    ensure!(taken);
    host.bulkhead_program(["run", "--rm", "-i", "busybox", "sh", "-c", "cat; echo err >&2; exit 42"])
        .stdin("in")
        .run()?
        .status_is(42)?
        .stdout_is("in")?
        .stderr_is("err\n")?;
    holds(host, 2)?;
    let mut terminal = host.bulkhead_program(["run", "--rm", "-it", "busybox", "sh"]).terminal(33, 99)?;
    terminal.send("stty size; exit 3\n")?;
    terminal.wait()?.status_is(3)?.stdout_has("33 99")?;
    holds(host, 2)?;
    // In the background it is like any other, and outlives its pool.
    host.bulkhead(["run", "-d", "--name", "web", "busybox", "sh", "-c", "echo begun; sleep 1000"])?.ok()?;
    host.bulkhead(["exec", "web", "echo", "well"])?.ok()?.stdout_is("well\n")?;
    host.bulkhead(["ps"])?.ok()?.stdout_has("web")?;
    // Errors are what they are elsewhere, and cost no machine or one.
    host.bulkhead(["run", "--rm", "--name", "web", "busybox", "true"])?
        .status_is(125)?
        .stderr_has("in use")?;
    host.bulkhead(["run", "--rm", "busybox", "nosuch"])?.status_is(127)?.stderr_has("nosuch")?;
    host.bulkhead(["run", "--rm", "--pids-limit", "x", "busybox", "true"])?.status_is(125)?;

    // Who wants another machine has one made.
    for options in [
        &["--memory", "64m"][..],
        &["--cpus", "2"],
        &["--storage", "0"],
        &["-v", "/tmp:/t"],
        &["--no-template"],
    ] {
        ensure!(!traced(host, options, "true")?.1, "{options:?} is no reason to make a machine");
    }

    // More, fewer, another kind, none.
    holds(host, 2)?;
    ensure!(warm(host, 3, &[])? == id);
    ensure!(monitors(host)? == 4 && pools(host)?.len() == 1);
    ensure!(warm(host, 1, &[])? == id);
    holds(host, 1)?;
    let small = warm(host, 1, &["--memory", "64m", "--storage", "0"])?;
    ensure!(small != id && pools(host)?.len() == 2);
    let (said, taken) =
        traced(host, &["--memory", "64m", "--storage", "0"], "cat /sys/fs/cgroup/memory.max")?;
    said.stdout_is("67108864\n")?;
    ensure!(taken);
    host.bulkhead(["pool", "rm", "nosuch"])?.status_is(1)?.stderr_has("there is no pool")?;
    host.bulkhead(["pool", "rm", &small[..6]])?.ok()?.stdout_is(&format!("{small}\n"))?;
    host.bulkhead(["pool", "cool", "busybox"])?.ok()?.stdout_is(&format!("{id}\n"))?;
    ensure!(pools(host)?.is_empty());
    host.eventually("one monitor to be left", PATIENCE, || Ok(monitors(host)? == 1))?;
    host.bulkhead(["logs", "web"])?.ok()?.stdout_is("begun\n")?;
    host.bulkhead(["rm", "-f", "web"])?.ok()?;
    for (words, why) in [
        (&["--image", "busybox", "-n", "0"][..], "1 to 256"),
        (&["--image", "busybox", "--network", "ns:/x"], "network namespace"),
    ] {
        host.bulkhead(["pool", "warm"].iter().chain(words))?.status_is(125)?.stderr_has(why)?;
    }
    nothing_is_left(host)
}

test!(whoever_is_killed_no_container_is_lost_and_nothing_stays, BUSYBOX.deadline(240));
fn whoever_is_killed_no_container_is_lost_and_nothing_stays(host: &Host) -> Result<()> {
    warm(host, 2, &[])?;
    // A machine that waits, or the process that waits with it: another is made.
    for who in ["bulkhead-vmm", "waiter"] {
        let victim = host.run(["pgrep", "-n", "-x", "bulkhead-vmm"])?.ok()?.stdout().trim().parse::<u64>()?;
        let stat = fs::read_to_string(format!("/proc/{victim}/stat"))?;
        let parent = stat.split_whitespace().nth(3).context("no parent")?.parse()?;
        kill(if who == "waiter" { parent } else { victim })?;
        host.eventually("it to be gone", PATIENCE, || Ok(!Path::new(&format!("/proc/{victim}")).exists()))?;
        holds(host, 2)?;
        let (said, _) = traced(host, &[], "echo well")?;
        said.stdout_is("well\n")?;
        holds(host, 2)?;
    }
    // All that wait are killed, and somebody wants one before anybody has noticed: that takes the host's kernel some time.
    for moment in [0, 5, 10, 20, 40] {
        host.run(["pkill", "-9", "-x", "bulkhead-vmm"])?.ok()?;
        std::thread::sleep(Duration::from_millis(moment));
        let (said, _) = traced(host, &[], "echo well")?;
        said.stdout_is("well\n")?;
        holds(host, 2)?;
    }
    // More containers at once than machines.
    let mut running = Vec::new();
    for number in 0..4 {
        let number = number.to_string();
        running.push(host.bulkhead_program(["run", "--rm", "busybox", "echo", &number]).spawn()?);
    }
    for (number, run) in running.into_iter().enumerate() {
        run.wait()?.ok()?.stdout_is(&format!("{number}\n"))?;
    }
    holds(host, 2)?;

    // Who takes one, at any moment: the name is free again, whether the container began or not.
    for moment in [1, 3, 5, 7, 9, 12, 16, 25] {
        let run = host.bulkhead_program(["run", "--rm", "--name", "half", "busybox", "true"]).spawn()?;
        std::thread::sleep(Duration::from_millis(moment));
        let _ = run.signal(Signal::KILL);
        run.wait()?;
        host.eventually("the name to be free", PATIENCE, || {
            host.bulkhead(["ps"])?.ok()?;
            Ok(entries("/var/lib/bulkhead/names").is_empty())
        })?;
        holds(host, 2)?;
    }

    // The keeper: the others see it and end. The container that took one stays.
    host.bulkhead(["run", "-d", "--name", "web", "busybox", "sleep", "1000"])?.ok()?;
    kill(pools(host)?[0]["pid"].as_u64().context("no keeper")?)?;
    host.eventually("the machines to end", PATIENCE, || Ok(monitors(host)? == 1))?;
    ensure!(!traced(host, &[], "true")?.1);
    host.bulkhead(["exec", "web", "echo", "well"])?.ok()?.stdout_is("well\n")?;
    ensure!(pools(host)?.is_empty());
    host.bulkhead(["rm", "-f", "web"])?.ok()?;
    nothing_is_left(host)?;

    // All at once: the next command clears away what is left, and a container runs.
    warm(host, 2, &[])?;
    for signal in ["-STOP", "-9"] {
        host.run(["killall", signal, "bulkhead", "bulkhead-vmm"])?.ok()?;
    }
    ensure!(!entries("/var/lib/bulkhead/warm").is_empty());
    ensure!(!traced(host, &[], "true")?.1);
    nothing_is_left(host)?;
    // Half-way through the making of a pool, too.
    for moment in [5, 20, 60, 120, 200] {
        let warming = host.bulkhead_program(["pool", "warm", "--image", "busybox", "-n", "2"]).spawn()?;
        std::thread::sleep(Duration::from_millis(moment));
        host.run(["killall", "-9", "bulkhead", "bulkhead-vmm"])?;
        warming.wait()?;
        nothing_is_left(host)?;
    }
    // A signal ends the waiting for a pool, and not the pool.
    let warming = host.bulkhead_program(["pool", "warm", "--image", "busybox", "-n", "3"]).spawn()?;
    host.eventually("the pool to begin", PATIENCE, || Ok(!pools(host)?.is_empty()))?;
    let _ = warming.signal(Signal::INT);
    warming.wait()?;
    holds(host, 3)?;
    host.bulkhead(["pool", "rm", "--all"])?.ok()?;
    nothing_is_left(host)
}

test!(a_pool_follows_what_it_is_made_of, BUSYBOX.deadline(400));
fn a_pool_follows_what_it_is_made_of(host: &Host) -> Result<()> {
    let initramfs = host.work().join("initramfs");
    fs::copy(host.initramfs(), &initramfs)?;
    let with =
        |words: &[&str]| host.bulkhead_program(words).env("BULKHEAD_INITRAMFS", initramfs.as_os_str()).run();
    let taken = || -> Result<bool> {
        let trace = host.work().join("trace.json");
        host.bulkhead_program(["run", "--rm", "busybox", "true"])
            .env("BULKHEAD_INITRAMFS", initramfs.as_os_str())
            .env("BULKHEAD_TRACE", trace.as_os_str())
            .run()?
            .ok()?;
        let text = fs::read_to_string(&trace)?;
        fs::remove_file(trace)?;
        Ok(text.contains(TAKEN))
    };
    with(&["pool", "warm", "--image", "busybox"])?.ok()?;
    ensure!(taken()?);
    holds(host, 1)?;
    // Another agent: nobody gets a machine with the old one, and before long the pool has new ones.
    let mut bytes = fs::read(&initramfs)?;
    bytes.extend([0; 512]);
    fs::write(host.work().join("new"), bytes)?;
    fs::rename(host.work().join("new"), &initramfs)?;
    ensure!(!taken()?, "a machine with the old agent was taken");
    host.eventually("a machine with the new agent", Duration::from_secs(100), || {
        std::thread::sleep(Duration::from_secs(1));
        taken()
    })?;
    // An image that goes by force: its pool lets go of it, and says why it is empty.
    holds(host, 1)?;
    host.bulkhead(["image", "rm", "-f", "busybox"])?.ok()?;
    host.eventually("the pool to let go", Duration::from_secs(100), || {
        std::thread::sleep(Duration::from_secs(1));
        Ok(pools(host)?[0]["waiting"] == 0 && monitors(host)? == 0)
    })?;
    let told = pools(host)?[0]["problem"].as_str().context("no problem")?.to_owned();
    ensure!(told.contains("busybox"), "{told}");
    host.bulkhead(["image", "load", "--quiet", &host.image("busybox").display().to_string()])?.ok()?;
    holds(host, 1)?;
    ensure!(taken()?);
    host.bulkhead(["pool", "rm", "busybox"])?.ok()?;
    // A pool that cannot be filled is an error, and none.
    fs::write(&initramfs, "no archive")?;
    with(&["pool", "warm", "--image", "busybox"])?.status_is(125)?.stderr_has("cannot be filled")?;
    fs::remove_file(initramfs)?;
    nothing_is_left(host)
}
