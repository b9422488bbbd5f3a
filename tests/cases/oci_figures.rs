//! Figures of docs/oci.md: file I/O, exec and memory of a container of `bulkhead-oci` beside one of runc's on the same directory,
//! and I/O on the virtio-blk disk of `bulkhead run`.
//!
//! What does the I/O is this program itself, as the container's process (`--measure-io DIR`): fio in Debian comes with the
//! libraries of two cluster file systems. Times are the host's own, as in `figures.rs`. The host's files are in its memory: what
//! is measured is the way there, not a disk.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;
use rustix::fs::{Advice, fadvise};
use serde_json::json;

use crate::BUSYBOX;
use crate::oci::{Bundle, pid_in};

/// The flag for [`measure_io`].
pub const FLAG: &str = "--measure-io";
const BLOCK: usize = 1 << 20;
const BLOCKS: usize = 32;
const PAGE: usize = 4096;
const RANDOM: u64 = 1000;
const SYNCED: u64 = 100;
const EXECS: usize = 9;

/// What is measured, in this order.
const ROWS: [&str; 5] = [
    "write 32 MiB by 1 MiB, fsync: MB/s",
    "read them, cache dropped: MB/s",
    "1000 random writes of 4 KiB, fsync: 1/s",
    "1000 random reads of 4 KiB, cache dropped: 1/s",
    "100 writes of 4 KiB, each with fsync: 1/s",
];

/// Measures in a directory, and prints one number a line.
///
/// # Errors
/// A file cannot be written or read.
pub fn measure_io(dir: &Path) -> Result<()> {
    let path = dir.join("measured");
    let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = open().with_context(|| format!("open {}", path.display()))?;
    let megabytes = |took: Duration| (BLOCK * BLOCKS) as f64 / 1e6 / took.as_secs_f64();
    let rate = |count: u64, took: Duration| count as f64 / took.as_secs_f64();
    let cold = |file: &File, advice: Advice| -> Result<()> {
        file.sync_all()?;
        fadvise(file, 0, None, Advice::DontNeed)?;
        Ok(fadvise(file, 0, None, advice)?)
    };
    let mut block = vec![7; BLOCK];

    let start = Instant::now();
    for _ in 0..BLOCKS {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    println!("{:.0}", megabytes(start.elapsed()));

    cold(&file, Advice::Sequential)?;
    let mut again = open()?;
    let start = Instant::now();
    for _ in 0..BLOCKS {
        again.read_exact(&mut block)?;
    }
    println!("{:.0}", megabytes(start.elapsed()));

    // A walk that meets each page at most once.
    let pages = (BLOCK * BLOCKS / PAGE) as u64;
    let place = |number: u64| number * 2_654_435_761 % pages * PAGE as u64;
    let mut page = [9; PAGE];
    let start = Instant::now();
    for number in 0..RANDOM {
        file.write_all_at(&page, place(number))?;
    }
    file.sync_all()?;
    println!("{:.0}", rate(RANDOM, start.elapsed()));

    cold(&file, Advice::Random)?;
    let start = Instant::now();
    for number in 0..RANDOM {
        file.read_exact_at(&mut page, place(number))?;
    }
    println!("{:.0}", rate(RANDOM, start.elapsed()));

    let start = Instant::now();
    for number in 0..SYNCED {
        file.write_all_at(&page, place(number))?;
        file.sync_all()?;
    }
    println!("{:.0}", rate(SYNCED, start.elapsed()));
    Ok(fs::remove_file(path)?)
}

fn numbers(output: &str) -> Result<Vec<f64>> {
    let numbers: Vec<f64> = output.lines().map(|line| Ok(line.parse()?)).collect::<Result<_>>()?;
    ensure!(numbers.len() == ROWS.len() && numbers.iter().all(|&number| number > 0.0), "it said {output:?}");
    Ok(numbers)
}

/// I/O in a directory of the host's, bound into a container of a bundle.
fn in_bundle(bundle: &Bundle, dir: &Path, program: &Path) -> Result<Vec<f64>> {
    bundle.change(|config| {
        let bind = |from: &Path, to: &str, mode: &str| json!({"destination": to, "type": "bind", "source": from, "options": ["rbind", mode]});
        if let Some(mounts) = config["mounts"].as_array_mut() {
            mounts.extend([bind(dir, "/data", "rw"), bind(program, "/measure", "ro")]);
        }
        config["process"]["args"] = json!(["/measure", FLAG, "/data"]);
    })?;
    numbers(&bundle.call(&["run", "c1"])?.ok()?.stdout())
}

/// The time of an exec, the host's memory that the container's group is charged with, and what of it its processes share with nobody,
/// in milliseconds and MiB.
fn others(bundle: &Bundle) -> Result<[f64; 3]> {
    const GROUP: &str = "/sys/fs/cgroup/figures/box";
    bundle.change(|config| config["linux"]["cgroupsPath"] = "/figures/box".into())?;
    bundle.runs("while :; do sleep 1000; done")?;
    let file = bundle.dir.join("pid");
    bundle.apart(&["run", "-d", "--pid-file", &file.display().to_string(), "c1"])?;
    ensure!(Path::new("/proc").join(pid_in(&file)?.to_string()).exists());
    let mut times = Vec::new();
    for _ in 0..EXECS {
        times.push(bundle.call(&["exec", "c1", "true"])?.ok()?.took);
    }
    times.sort();
    let group = Path::new(GROUP);
    let charged: f64 = fs::read_to_string(group.join("memory.current"))?.trim().parse()?;
    let mut private = 0;
    for pid in fs::read_to_string(group.join("cgroup.procs"))?.lines() {
        // KVM keeps a thread of the kernel's in the group, which has no memory.
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let kib = rollup.lines().filter(|line| line.starts_with("Private_"));
        private += kib.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum::<u64>();
    }
    bundle.call(&["delete", "--force", "c1"])?.ok()?;
    fs::remove_dir("/sys/fs/cgroup/figures")?;
    ensure!(private > 0, "no process of the group has memory");
    let exec = times.get(EXECS / 2).context("no times")?;
    Ok([exec.as_secs_f64() * 1e3, charged / f64::from(1 << 20), private as f64 / 1024.0])
}

test!(
    files_exec_and_memory_beside_runc,
    BUSYBOX.deadline(200).shows_output().pending("figures for docs/oci.md, which take a minute")
);
fn files_exec_and_memory_beside_runc(host: &Host) -> Result<()> {
    let dir = host.work().join("data");
    fs::create_dir(&dir)?;
    let program = std::env::current_exe()?;
    let mut columns = Vec::new();
    let mut rest = Vec::new();
    for runtime in ["runc", "bulkhead-oci"] {
        let bundle = Bundle::new(host, runtime)?;
        columns.push(in_bundle(&bundle, &dir, &program).with_context(|| format!("with {runtime}"))?);
        rest.push(others(&bundle).with_context(|| format!("with {runtime}"))?);
    }
    let volume = format!("{}:/measure:ro", program.display());
    let run = host.bulkhead(["run", "--rm", "-v", &volume, "busybox", "/measure", FLAG, "/"])?;
    columns.push(numbers(&run.ok()?.stdout())?);

    println!(
        "| files, host's time | runc, the directory itself | `bulkhead-oci`, virtio-fs | `bulkhead run`, virtio-blk |"
    );
    println!("|---|---|---|---|");
    for (index, row) in ROWS.iter().enumerate() {
        let cells: Vec<_> = columns.iter().map(|column| format!("{:.0}", column[index])).collect();
        println!("| {row} | {} |", cells.join(" | "));
    }
    println!("\n| one container | runc | `bulkhead-oci` |\n|---|---|---|");
    let names =
        ["`exec c1 true`: ms", "`memory.current` of its cgroup: MiB", "private memory of its processes: MiB"];
    for (index, name) in names.iter().enumerate() {
        println!("| {name} | {:.1} | {:.1} |", rest[0][index], rest[1][index]);
    }
    Ok(())
}
