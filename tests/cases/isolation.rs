//! What happens inside stays inside.

use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;

use crate::{BUSYBOX, shell};

const PATIENCE: Duration = Duration::from_secs(10);

/// The host still does its work, and quickly.
fn host_is_healthy(host: &Host) -> Result<()> {
    let finished = host.run(["sh", "-c", "echo fine"])?.ok()?.stdout_is("fine\n")?;
    ensure!(finished.took < Duration::from_secs(1), "the host is slow: {finished}");
    Ok(())
}

test!(the_kernel_is_not_the_hosts, BUSYBOX);
fn the_kernel_is_not_the_hosts(host: &Host) -> Result<()> {
    let ours = host.run(["uname", "-r"])?.ok()?.stdout();
    let theirs = shell(host, &[], "uname -r")?.ok()?.stdout();
    ensure!(theirs.starts_with("6.12"), "the guest runs {theirs}");
    ensure!(theirs != ours, "container and host both run {ours}");
    let ours = std::fs::read_to_string("/proc/version")?;
    let theirs = shell(host, &[], "cat /proc/version")?.ok()?.stdout();
    ensure!(theirs.starts_with("Linux version 6.12") && theirs != ours, "{theirs}");
    let boot = "/proc/sys/kernel/random/boot_id";
    ensure!(shell(host, &[], &format!("cat {boot}"))?.ok()?.stdout() != std::fs::read_to_string(boot)?);
    Ok(())
}

test!(a_fork_bomb_stays_inside, BUSYBOX.deadline(120));
fn a_fork_bomb_stays_inside(host: &Host) -> Result<()> {
    let bomb = "bomb() { bomb | bomb & }; bomb; sleep 3; echo survived";
    let mut run = host.bulkhead_program(["run", "--rm", "--name", "bomb", "--pids-limit", "64"]);
    run = run.args(["busybox", "sh", "-c", bomb]);
    let mut run = run.spawn()?;
    std::thread::sleep(Duration::from_secs(2));
    host_is_healthy(host)?;
    if !run.ended()? {
        host.bulkhead(["kill", "bomb"])?.ok()?;
    }
    run.wait()?;
    host_is_healthy(host)
}

test!(a_memory_hog_dies_alone, BUSYBOX.deadline(120));
fn a_memory_hog_dies_alone(host: &Host) -> Result<()> {
    // MemAvailable falls when the kernel begins to reserve memory for huge pages.
    let free = || -> Result<u64> {
        let line = host.run(["awk", "/MemFree/{print $2}", "/proc/meminfo"])?.ok()?.stdout();
        Ok(line.trim().parse::<u64>()?)
    };
    // The first start makes a template, which is to stay.
    shell(host, &["--memory", "64m"], "true")?.ok()?;
    let before = free()?;
    // tail keeps the whole of an endless line.
    shell(host, &["--memory", "64m"], "tail /dev/zero")?.status_is(137)?;
    host_is_healthy(host)?;
    // The command is not kept until the host has taken the machine's memory apart; some 30 MiB then wait in the lists of
    // a processor, which count as used.
    host.eventually("the host to have its memory back", PATIENCE, || Ok(free()? + 49152 > before))
}

test!(a_hog_that_is_not_the_first_process_dies_alone, BUSYBOX.deadline(120));
fn a_hog_that_is_not_the_first_process_dies_alone(host: &Host) -> Result<()> {
    shell(host, &["--memory", "64m"], "tail /dev/zero; echo status $?")?.ok()?.stdout_is("status 137\n")?;
    Ok(())
}

test!(a_disk_filler_fills_its_own_disk, BUSYBOX.deadline(120));
fn a_disk_filler_fills_its_own_disk(host: &Host) -> Result<()> {
    let script = "dd if=/dev/zero of=/fill bs=1M; rm /fill && echo usable >/after && cat /after";
    shell(host, &["--storage", "48m"], script)?.ok()?.stdout_is("usable\n")?.stderr_has("no space left")?;
    host_is_healthy(host)
}

test!(the_guest_is_not_privileged_by_default, BUSYBOX);
fn the_guest_is_not_privileged_by_default(host: &Host) -> Result<()> {
    for attempt in [
        "mount -t tmpfs x /tmp",
        "mknod /tmp/vda b 254 0 && head -c 1 /tmp/vda",
        "head -c 1 /dev/vda",
        "reboot -f",
        "echo x >/proc/sys/kernel/hostname",
        // busybox's date says so, and ends with 0 all the same.
        "! date -s 2020-01-01 2>&1 | grep 'not permitted'",
    ] {
        shell(host, &[], &format!("{attempt} || echo refused"))?.ok()?.stdout_has("refused\n")?;
    }
    Ok(())
}
