//! The host and the framework themselves.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Finished, Program};
use bulkhead_tests::registry::Needs;
use bulkhead_tests::runner::Runner;
use bulkhead_tests::test;

test!(host_has_kvm, Needs::host());
fn host_has_kvm(host: &Host) -> Result<()> {
    host.run(["test", "-c", "/dev/kvm"])?.ok()?;
    host.run(["test", "-c", "/dev/net/tun"])?.ok()?;
    host.run(["test", "-c", "/dev/vhost-vsock"])?.ok()?;
    let controllers = host.run(["cat", "/sys/fs/cgroup/cgroup.subtree_control"])?.ok()?;
    for controller in ["cpu", "memory", "pids", "io", "cpuset"] {
        ensure!(
            controllers.stdout().split_whitespace().any(|name| name == controller),
            "no {controller} controller"
        );
    }
    Ok(())
}

test!(idle_time_is_skipped_but_counted, Needs::host().deadline(4000));
fn idle_time_is_skipped_but_counted(_: &Host) -> Result<()> {
    let start = Instant::now();
    std::thread::sleep(Duration::from_secs(3600));
    ensure!(start.elapsed() >= Duration::from_secs(3600));
    Ok(())
}

test!(runc_and_crun_run_busybox, Needs::host());
fn runc_and_crun_run_busybox(host: &Host) -> Result<()> {
    for runtime in ["runc", "crun"] {
        let runs = run_true(host, runtime)?;
        println!("{runtime} run true: {:.3} s", runs.took.as_secs_f64());
        if host.is_emulated() {
            ensure!(runs.took < Duration::from_millis(200), "{runtime} was quicker before: {runs}");
        }
    }
    Ok(())
}

/// `RUNTIME run` of busybox's true, a second time, so that everything is in the page cache.
pub fn run_true(host: &Host, runtime: &str) -> Result<Finished> {
    let bundle = host.work().join(runtime);
    std::fs::create_dir_all(bundle.join("rootfs/bin"))?;
    let busybox = bundle.join("rootfs/bin/true");
    std::fs::copy("/usr/bin/busybox", busybox)?;
    Program::new([runtime, "spec"]).dir(&bundle).run()?.ok()?;
    let config = std::fs::read_to_string(bundle.join("config.json"))?;
    let config = config.replace("\"terminal\": true", "\"terminal\": false").replace("\"sh\"", "\"true\"");
    std::fs::write(bundle.join("config.json"), config)?;
    for name in ["first", "second"] {
        let state = host.work().join("state");
        let run = Program::new([runtime, "--root"])
            .args([&state])
            .args(["run", "--bundle"])
            .args([&bundle])
            .args([name]);
        let finished = run.run()?.ok()?;
        if name == "second" {
            return Ok(finished);
        }
    }
    unreachable!("the loop ends with its second round")
}

test!(hidden_failing, Needs::host().hidden());
fn hidden_failing(host: &Host) -> Result<()> {
    println!("words of the test");
    host.file("monitor.log", "words of a log")?;
    host.run(["sh", "-c", "echo words of a command; exit 3"])?.ok()?;
    Ok(())
}

test!(hidden_hanging, Needs::host().hidden().deadline(20));
fn hidden_hanging(host: &Host) -> Result<()> {
    host.file("guest-console", "words of a guest")?;
    host.run(["sleep", "123456"])?;
    Ok(())
}

test!(hidden_busy, Needs::host().hidden().deadline(2));
fn hidden_busy(host: &Host) -> Result<()> {
    host.run(["sh", "-c", "while :; do :; done"])?;
    Ok(())
}

test!(hidden_panicking, Needs::host().hidden());
fn hidden_panicking(_: &Host) -> Result<()> {
    panic!("words of a panic")
}

test!(hidden_leaking, Needs::host().hidden());
fn hidden_leaking(host: &Host) -> Result<()> {
    for line in [
        "setsid sleep 4242 </dev/null >/dev/null 2>&1 &",
        "mkdir /sys/fs/cgroup/left; ip tuntap add dev left0 mode tap; mkdir /tmp/left; mount -t tmpfs t /tmp/left",
        "truncate -s 1M /dev/shm/disk; losetup -f /dev/shm/disk",
        "umount /dev/pts",
    ] {
        host.run(["sh", "-ec", line])?.ok()?;
    }
    Ok(())
}

test!(outside failures_are_told_with_all_that_helps);
fn failures_are_told_with_all_that_helps(runner: &Runner) -> Result<()> {
    let expectations: [(&str, &[&str]); 5] = [
        (
            "framework::hidden_failing",
            &[
                "words of the test",
                "expected status 0",
                "status 3",
                "words of a command",
                "words of a log",
                "kernel log",
            ],
        ),
        (
            "framework::hidden_hanging",
            &["deadline: not done after 20 s", "sleep 123456", "words of a guest", "20.0"],
        ),
        ("framework::hidden_busy", &["deadline: not done after 2 s", "while :"]),
        ("framework::hidden_panicking", &["words of a panic", "the test panicked"]),
        (
            "framework::hidden_leaking",
            &[
                "left behind: process",
                "sleep 4242",
                "left behind: cgroup /sys/fs/cgroup/left",
                "left behind: network link left0",
                "left behind: mount /tmp/left (tmpfs)",
                "left behind: file /tmp/left",
                "left behind: loop device loop0 on /dev/shm/disk",
                "gone: mount /dev/pts (devpts)",
            ],
        ),
    ];
    for (name, words) in expectations {
        let (passed, output) = runner.run_hidden(name)?;
        ensure!(!passed, "{name} passed");
        for word in words {
            ensure!(output.contains(word), "{name} does not tell '{word}':\n{output}");
        }
    }
    Ok(())
}
