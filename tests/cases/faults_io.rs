//! Descriptors, memory and disks that are not to be had: each start that fails says why, nothing is left, and who has what it needs
//! runs on.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Finished, Program};
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;

use crate::BUSYBOX;
use crate::faults::ends;

const PATIENCE: Duration = Duration::from_secs(20);

/// A line of shell that must end, with `$W` as the test's directory.
fn shell(host: &Host, line: &str) -> Result<Finished> {
    ends(Program::new(["sh", "-c", line]).env("W", host.work().as_os_str()).spawn()?)
}

/// It did what was asked, or it says why not in words; answers whether it did.
fn says_why(finished: Finished, reasons: &[&str]) -> Result<bool> {
    if finished.status == 0 {
        return Ok(true);
    }
    let said = finished.stderr();
    ensure!(!said.contains("panicked"), "{finished}");
    ensure!(reasons.iter().any(|reason| said.contains(reason)), "it does not say why: {finished}");
    finished.failed()?;
    Ok(false)
}

test!(without_descriptors_it_is_said_and_nothing_is_left, BUSYBOX.deadline(2000).shows_output());
fn without_descriptors_it_is_said_and_nothing_is_left(host: &Host) -> Result<()> {
    host.bulkhead(["run", "-d", "--name", "well", "busybox", "sleep", "100000"])?.ok()?;
    let share = host.work().join("share");
    fs::create_dir(&share)?;
    std::thread::sleep(Duration::from_secs(1));
    let before = host.look();
    println!("| verb | fails with as many descriptors as | works with |\n|---|---|---|");
    for line in [
        "bulkhead run --rm --name box busybox true",
        "bulkhead run --rm --name box --no-template -v $W/share:/share busybox true",
        "bulkhead exec well true",
        "bulkhead ps -a",
    ] {
        let (mut fails, mut works) = (0, 0);
        for limit in [4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 96] {
            let finished = shell(host, &format!("ulimit -n {limit}; exec {line}"))?;
            // The first: of its monitor, which has the same limit.
            let reasons = [
                "open files here",
                "Too many open files",
                "too many open files",
                "os error 24",
                "descriptor",
            ];
            match says_why(finished, &reasons).with_context(|| format!("with {limit} descriptors"))? {
                true if works == 0 => works = limit,
                true => {}
                false => fails = limit,
            }
            // What could not be removed for want of descriptors goes with the next look.
            host.bulkhead(["ps", "-a"])?.ok()?;
            host.is_as(&before, &format!("{line} with {limit} descriptors"), PATIENCE)?;
        }
        println!("| {line} | {fails} | {works} |");
        ensure!((1..=96).contains(&works), "{line} does not work with 96 descriptors");
    }
    host.bulkhead(["exec", "well", "echo", "well"])?.ok()?.stdout_is("well\n")?;
    host.bulkhead(["rm", "-f", "well"])?.ok().map(drop)
}

test!(without_memory_one_machine_ends_and_says_so, BUSYBOX.deadline(600).shows_output());
fn without_memory_one_machine_ends_and_says_so(host: &Host) -> Result<()> {
    host.bulkhead(["run", "-d", "--name", "well", "busybox", "sleep", "100000"])?.ok()?;
    std::thread::sleep(Duration::from_secs(1));
    let before = host.look();
    // Addresses: not enough for the guest, not enough for the program.
    for (kib, options) in
        [(600_000, "--memory 1g"), (600_000, "--memory 1g --no-template"), (60_000, ""), (20_000, "")]
    {
        let line = format!("ulimit -v {kib}; exec bulkhead run --rm {options} busybox true");
        let finished = shell(host, &line)?;
        let says = finished.stderr().trim_end().to_owned();
        let done = says_why(finished, &["memory", "Memory", "os error 12"]).with_context(|| line.clone())?;
        println!("{kib} KiB of addresses, {options}: {}", if done { "runs" } else { &says });
        // It is not the template's fault.
        ensure!(!says.contains("template, which is removed"), "{says}");
        host.is_as(&before, &line, PATIENCE)?;
    }
    // Pages, in a group of the host's that ends its largest process when there are no more.
    let group = PathBuf::from("/sys/fs/cgroup/small");
    fs::create_dir(&group)?;
    fs::write(group.join("memory.max"), (96 << 20).to_string())?;
    let hog = "dd if=/dev/zero of=/dev/shm/hog bs=1M count=400";
    let line = format!(
        "echo $$ >/sys/fs/cgroup/small/cgroup.procs; exec bulkhead run --name box --memory 800m --tmpfs /dev/shm busybox sh -c '{hog}'"
    );
    let finished = shell(host, &line)?;
    println!("{}", finished.stderr().lines().next().unwrap_or_default());
    finished.status_is(137)?.stderr_has("for want of memory")?;
    host.bulkhead(["inspect", "box"])?.ok()?.stdout_has("exited")?.stdout_has("for want of memory")?;
    host.bulkhead(["rm", "box"])?.ok()?;
    host.bulkhead(["exec", "well", "echo", "well"])?.ok()?.stdout_is("well\n")?;
    host.eventually("the group to be empty", PATIENCE, || Ok(fs::remove_dir(&group).is_ok()))?;
    host.is_as(&before, "a machine without memory", PATIENCE)?;
    host.bulkhead(["rm", "-f", "well"])?.ok().map(drop)
}

test!(a_store_that_cannot_be_read_is_named, BUSYBOX.deadline(300));
fn a_store_that_cannot_be_read_is_named(host: &Host) -> Result<()> {
    let (root, away) = (host.work().join("r"), host.work().join("away"));
    let at = |words: &str| shell(host, &format!("exec bulkhead --root $W/r {words}"));
    at(&format!("image load -q {}", host.image("busybox").display()))?.ok()?;
    let found =
        host.run(["find".into(), root.join("images"), "-name".into(), "*.erofs".into()])?.ok()?.stdout();
    let layer = PathBuf::from(found.lines().next().context("no layer")?);
    for (path, what) in [(root.join("images"), "images"), (layer, ".erofs")] {
        fs::rename(&path, &away)?;
        // A file in the place of a directory, and a directory in that of a file: root cannot read them either.
        if away.is_dir() {
            fs::write(&path, "")?
        } else {
            fs::create_dir(&path)?
        }
        let tried = at("run --rm busybox true")?;
        let said = tried.stderr();
        ensure!(tried.status == 125 && !said.contains("panicked") && said.contains(what), "{tried}");
        if away.is_dir() {
            fs::remove_file(&path)?
        } else {
            fs::remove_dir(&path)?
        }
        fs::rename(&away, &path)?;
    }
    at("run --rm busybox true")?.ok().map(drop)
}

/// Only the emulated host: its disks are nobody else's.
const WITH_DISK: Needs = Needs::engines();

/// Of a disk, 512 bytes each.
const SECTORS: u64 = 2_097_152;

/// A file system on a disk that can be told to fail.
struct Disk<'h> {
    host: &'h Host,
}

impl<'h> Disk<'h> {
    fn make(host: &'h Host) -> Result<Self> {
        let line = "set -e; mkdir $W/disk; truncate -s 1G $W/backing; losetup /dev/loop7 $W/backing; \
            mkfs.ext4 -q /dev/loop7; dmsetup create faulty --noudevsync --table \"0 2097152 linear /dev/loop7 0\"; \
            dmsetup mknodes; mount /dev/mapper/faulty $W/disk";
        shell(host, line)?.ok()?;
        Ok(Self { host })
    }

    /// All of it.
    fn becomes(&self, target: &str) -> Result<()> {
        self.is_made_of(&format!("0 {SECTORS} {target}"))
    }

    /// Pieces: first sector, count, target.
    fn is_made_of(&self, table: &str) -> Result<()> {
        let line = format!(
            "set -e; dmsetup suspend --noflush --nolockfs --noudevsync faulty; \
             printf '{table}\\n' | dmsetup load faulty; dmsetup resume --noudevsync faulty"
        );
        shell(self.host, &line)?.ok().map(drop)
    }

    /// The longest run of blocks of 4 KiB that hold `text` again and again: the first, and how many.
    fn find(&self, text: &str) -> Result<(u64, u64)> {
        let mut file = fs::File::open(self.host.work().join("backing"))?;
        let twice = text.repeat(2);
        let (mut block, mut number, mut best, mut run) = ([0; 4096], 0, (0, 0), (0, 0));
        while file.read_exact(&mut block).is_ok() {
            // One comparison tells of most that they are not it: the host that tests run in is slow.
            if block != [0; 4096]
                && block.windows(twice.len()).take(text.len()).any(|part| part == twice.as_bytes())
            {
                run = if run.0 + run.1 == number { (run.0, run.1 + 1) } else { (number, 1) };
                best = if run.1 > best.1 { run } else { best };
            }
            number += 1;
        }
        Ok(best)
    }

    fn unmount(&self) -> Result<()> {
        let line = "set -e; umount $W/disk; dmsetup remove --noudevsync faulty; rm -f /dev/mapper/faulty; losetup -d /dev/loop7";
        shell(self.host, line)?.ok().map(drop)
    }
}

test!(a_disk_that_fails_fails_its_containers_and_can_be_left, WITH_DISK.deadline(600).shows_output());
fn a_disk_that_fails_fails_its_containers_and_can_be_left(host: &Host) -> Result<()> {
    let before = host.look();
    let disk = Disk::make(host)?;
    let at = |words: &str| shell(host, &format!("exec bulkhead --root $W/disk/b {words}"));
    at(&format!("image load -q {}", host.image("busybox").display()))?.ok()?;
    at("run -d --name box busybox sleep 100000")?.ok()?;
    at("exec box sh -c 'echo kept >/file; sync'")?.ok()?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    disk.becomes("error")?;
    let write = "dd if=/dev/zero of=/big bs=1M count=8 conv=fsync";
    let wrote = at(&format!("exec box {write}"))?;
    println!("exec: {}", wrote.stderr().lines().next().unwrap_or_default());
    wrote.failed()?;
    for verb in ["ps -a", "inspect box", "run --rm busybox true", "image ls"] {
        let finished = at(verb)?;
        println!("{verb}: {}, {}", finished.status, finished.stderr().trim_end());
        ensure!(finished.status != 101 && finished.took < Duration::from_secs(30), "{finished}");
        ensure!(finished.status == 0 || !finished.stderr().trim().is_empty(), "{finished}");
    }
    // Its machine can be ended, whatever becomes of its files.
    let ended = at("rm -f box")?;
    println!("rm -f box: {}, {}", ended.status, ended.stderr().trim_end());
    host.eventually("the machine to end", PATIENCE, || {
        Ok(host.run(["pgrep", "-x", "bulkhead-vmm"])?.status == 1)
    })?;
    // The disk is well again, as after a path to it has come back; its file system is mounted anew.
    disk.becomes("linear /dev/loop7 0")?;
    shell(host, "umount $W/disk && mount /dev/mapper/faulty $W/disk")?.ok()?;
    at("ps -a")?.ok()?;
    at("rm -f box")?.ok()?;
    at("run --rm busybox true")?.ok()?;
    disk.unmount()?;
    host.is_as(&before, "a disk that failed", PATIENCE)
}

test!(blocks_that_fail_are_errors_of_what_is_in_them_alone, WITH_DISK.deadline(600).shows_output());
fn blocks_that_fail_are_errors_of_what_is_in_them_alone(host: &Host) -> Result<()> {
    const TEXT: &str = "blocks that fail\n";
    let before = host.look();
    let disk = Disk::make(host)?;
    let at = |words: &str| shell(host, &format!("exec bulkhead --root $W/disk/b {words}"));
    // Nothing of a file that is read is to be in memory, here or in the guest.
    let inside = |script: &str| {
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        at(&format!("exec box sh -c 'echo 3 >/proc/sys/vm/drop_caches; {script}'"))
    };
    at(&format!("image load -q {}", host.image("busybox").display()))?.ok()?;
    at("run -d --privileged --name box busybox sleep 100000")?.ok()?;
    let fill =
        format!("yes {} | head -c 2097152 >/bad; echo well >/good; md5sum /bad; sync", TEXT.trim_end());
    let sum = at(&format!("exec box sh -c '{fill}'"))?.ok()?.stdout();
    shell(host, "sync")?.ok()?;
    let (first, count) = disk.find(TEXT)?;
    ensure!(count >= 64, "{count} blocks from {first}");
    let (start, end) = (first * 8, (first + count) * 8);
    let broken = format!(
        "0 {start} linear /dev/loop7 0\\n{start} {} error\\n{end} {} linear /dev/loop7 {end}",
        end - start,
        SECTORS - end
    );

    disk.is_made_of(&broken)?;
    let read = inside("cat /bad >/dev/null")?;
    println!("read: {}", read.stderr().trim_end());
    read.status_is(1)?.stderr_has("Input/output error")?;
    inside("cat /good")?.ok()?.stdout_is("well\n")?;
    inside("echo more >/more; sync; cat /more")?.ok()?.stdout_is("more\n")?;
    // Written to, they are the error of who asks whether it has arrived.
    let wrote = inside("dd if=/dev/zero of=/bad bs=64k count=32 conv=notrunc,fsync")?;
    println!("write: {}", wrote.stderr().lines().next().unwrap_or_default());
    wrote.failed()?.stderr_has("Input/output error")?;
    inside("cat /good")?.ok()?.stdout_is("well\n")?;

    // The blocks are well again: so is what is in them, once it is written anew.
    disk.becomes("linear /dev/loop7 0")?;
    inside(&fill)?.ok()?.stdout_is(&sum)?;
    inside("md5sum /bad")?.ok()?.stdout_is(&sum)?;
    at("rm -f box")?.ok()?;
    disk.unmount()?;
    host.is_as(&before, "blocks that failed", PATIENCE)
}
