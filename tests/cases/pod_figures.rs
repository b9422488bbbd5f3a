//! Figures of docs/kubernetes.md: twenty pods at once, what a pod costs in memory, how long a container takes to come into a
//! living pod, and an exec; all through CRI, beside runc.

use std::collections::HashSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;

use crate::cri::{Node, node, with_containerd};

const PODS: usize = 20;
const STARTS: usize = 5;
const EXECS: usize = 9;
/// In every container: something that lives.
const SCRIPT: &str = "echo up; exec sleep 100000";
/// What a machine under load still does is not what the next figure is of.
const REST: Duration = Duration::from_secs(2);
const BOOT: [&str; 2] = ["cat", "/proc/sys/kernel/random/boot_id"];

/// Pods with their containers.
struct Running {
    pod: String,
    containers: Vec<String>,
}

fn pod(node: &Node<'_>, name: &str, containers: usize) -> Result<Running> {
    let config = node.pod(name);
    let pod = node.cri.run_pod(&config, node.handler)?;
    let start = |number: usize| node.start((&pod, &config), &format!("c{number}"), 0, SCRIPT);
    let containers = (0..containers).map(start).collect::<Result<_>>()?;
    Ok(Running { pod, containers })
}

/// Does something twenty times at once, each with a connection of its own, and answers how long all of it took.
fn at_once<A: Send, B: Send>(
    host: &Host,
    handler: &'static str,
    inputs: Vec<A>,
    work: impl Fn(&Node<'_>, A) -> Result<B> + Sync,
) -> Result<(Vec<B>, Duration)> {
    let start = Instant::now();
    let done: Result<Vec<B>> = thread::scope(|scope| {
        let one = |input| {
            let work = &work;
            scope.spawn(move || work(&node(host, "containerd", handler)?.1, input))
        };
        let threads: Vec<_> = inputs.into_iter().map(one).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?).collect()
    });
    Ok((done?, start.elapsed()))
}

/// From the first call to the last answer: of starting, and of removing.
fn twenty_at_once(host: &Host, handler: &'static str) -> Result<[Duration; 2]> {
    let names: Vec<_> = (0..PODS).map(|number| format!("crowd{number}")).collect();
    let (pods, started) = at_once(host, handler, names, |node, name| pod(node, &name, 1))?;
    let pods: Vec<_> = pods.into_iter().map(|pod| (pod.pod, pod.containers)).collect();
    // Each is there, and each has the kernel that it should have.
    let inside = at_once(host, handler, pods, |node, (pod, containers)| {
        let (id, _, status) = node.cri.exec(&containers[0], &BOOT)?;
        ensure!(status == 0, "exec ended with {status}");
        Ok((pod, id))
    });
    let pods = inside?.0;
    let kernels: HashSet<_> = pods.iter().map(|(_, id)| id.clone()).collect();
    ensure!(kernels.len() == if handler == "runc" { 1 } else { PODS }, "{} kernels", kernels.len());
    let (_, removed) = at_once(host, handler, pods, |node, (pod, _)| node.remove(&pod))?;
    Ok([started, removed])
}

fn middle(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Of a container in a living pod (made and started), and of an exec in it.
fn start_and_exec(node: &Node<'_>) -> Result<[Duration; 2]> {
    let config = node.pod("times");
    let pod = node.cri.run_pod(&config, node.handler)?;
    let mut starts = Vec::new();
    let mut last = String::new();
    for number in 0..=STARTS {
        let start = Instant::now();
        last = node.start((&pod, &config), &format!("c{number}"), 0, SCRIPT)?;
        starts.push(start.elapsed());
        thread::sleep(REST);
    }
    let mut execs = Vec::new();
    for _ in 0..=EXECS {
        let start = Instant::now();
        ensure!(node.cri.exec(&last, &["true"])?.2 == 0);
        execs.push(start.elapsed());
    }
    node.remove(&pod)?;
    // The first of each has filled the caches.
    Ok([middle(starts.split_off(1)), middle(execs.split_off(1))])
}

fn processes() -> Result<HashSet<u32>> {
    let names = fs::read_dir("/proc")?.flatten();
    Ok(names.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// A line of a file like `/proc/PID/smaps_rollup`, in KiB. A process that has just ended has none.
fn kib(path: &str, key: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Memory of some pods, in MiB: all processes that have come with them, shims included (PSS: what several share is divided),
/// what the containers' cgroups are charged with, and the resident memory of one shim.
fn memory(node: &Node<'_>, pods: usize, containers: usize) -> Result<[f64; 3]> {
    const GROUPS: &str = "/sys/fs/cgroup/k8s.io";
    let before = processes()?;
    let names = (0..pods).map(|number| format!("memory{number}"));
    let running: Vec<_> = names.map(|name| pod(node, &name, containers)).collect::<Result<_>>()?;
    thread::sleep(REST);
    let (mut shared, mut shim) = (0, 0);
    for pid in processes()?.difference(&before) {
        shared += kib(&format!("/proc/{pid}/smaps_rollup"), "Pss:");
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.starts_with("containerd-shim") {
            shim = shim.max(kib(&format!("/proc/{pid}/status"), "VmRSS:"));
        }
    }
    let mut charged: u64 = 0;
    for group in fs::read_dir(GROUPS).context(GROUPS)?.flatten() {
        let current = fs::read_to_string(group.path().join("memory.current")).unwrap_or_default();
        charged += current.trim().parse::<u64>().unwrap_or(0) / 1024;
    }
    running.iter().try_for_each(|running| node.remove(&running.pod))?;
    ensure!(shared > 0 && charged > 0 && shim > 0, "nothing was measured");
    Ok([shared, charged, shim].map(|kib| kib as f64 / 1024.0))
}

/// All figures with one runtime, by their names.
fn figures(host: &Host, handler: &'static str) -> Result<Vec<(&'static str, String)>> {
    let node = node(host, "containerd", handler)?.1;
    // Once for nothing, so that everything is in the page cache.
    node.remove(&pod(&node, "first", 1)?.pod)?;
    let [start, exec] = start_and_exec(&node).context("start and exec")?;
    let together = memory(&node, 1, 3).context("memory of a pod")?;
    let alone = memory(&node, 3, 1).context("memory of three pods")?;
    let [started, removed] = twenty_at_once(host, handler).context("twenty pods")?;
    let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
    let milliseconds = |time: Duration| format!("{:.0} ms", time.as_secs_f64() * 1e3);
    let mib = |figures: [f64; 3]| format!("{:.1} MiB; {:.1} MiB", figures[0], figures[1]);
    Ok(vec![
        ("20 pods at once, each with a container: all run", seconds(started)),
        ("and all are removed", seconds(removed)),
        ("a container in a living pod is made and started", milliseconds(start)),
        ("`exec true` in it", milliseconds(exec)),
        ("memory of a pod of three containers: processes (PSS); cgroups", mib(together)),
        ("of three pods of one container each", mib(alone)),
        ("shim of a pod of three containers, resident", format!("{:.1} MiB", together[2])),
    ])
}

test!(
    pods_beside_runc,
    Needs::engines()
        .deadline(300)
        .shows_output()
        .may_leave_things()
        .pending("figures for docs/kubernetes.md, which take minutes")
);
fn pods_beside_runc(host: &Host) -> Result<()> {
    with_containerd(host, "containerd", || {
        let runc = figures(host, "runc").context("with runc")?;
        println!("runc: {runc:?}");
        let bulkhead = figures(host, "bulkhead").context("with Bulkhead")?;
        println!("| | runc | Bulkhead |\n|---|---|---|");
        for ((name, theirs), (_, ours)) in runc.iter().zip(&bulkhead) {
            println!("| {name} | {theirs} | {ours} |");
        }
        Ok(())
    })
}
