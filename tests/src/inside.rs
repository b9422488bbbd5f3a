//! The inside of the KVM host: runs one test, watches over it, and says what happened.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, getpid, kill_process, pidfd_open, set_child_subreaper, wait,
};

use crate::host::{Host, PREFIX_VARIABLE};
use crate::leak::{Snapshot, descendants};
use crate::process::shell_status;
use crate::registry::{Body, Test};

/// After a test ended: so long may the last of what it started take to go away by itself.
const GRACE: Duration = Duration::from_secs(1);
/// So much of each log is shown.
const LOG_TAIL: u64 = 12_000;

/// Runs the test in a child process and watches over it. The answer is this program's exit status.
pub fn supervise(name: &str) -> Result<i32> {
    let test = Test::find(name).with_context(|| format!("there is no test {name}"))?;
    set_child_subreaper(Some(getpid())).context("become subreaper")?;
    let whole = std::env::var_os(PREFIX_VARIABLE).is_none();
    let before = Snapshot::take(whole);
    let uptime_before = uptime();
    // File times come from a clock that ticks every few milliseconds.
    let started = (Instant::now(), SystemTime::now() - Duration::from_millis(50));

    let mut child = Command::new(std::env::current_exe()?)
        .args(["--inside-test", name])
        .process_group(0)
        .spawn()
        .context("start the test")?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("no pid")?;
    let done = Arc::new(AtomicBool::new(false));
    let until = Arc::clone(&done);
    std::thread::spawn(move || reap_orphans(pid, &until));
    let deadline = Duration::from_secs(test.needs.deadline_seconds);
    let mut complaints = Vec::new();
    if !ends_within(pid, deadline)? {
        let mut complaint = format!(
            "deadline: not done after {} s of the host's time; these ran then:",
            test.needs.deadline_seconds
        );
        for process in descendants() {
            complaint += &format!("\n  {} {} [{}]", process.pid, process.command, process.waits_in);
        }
        complaints.push(complaint);
        kill_descendants();
    }
    done.store(true, Ordering::Release);
    let status = shell_status(child.wait().context("wait for the test")?);
    if status != 0 && complaints.is_empty() {
        complaints.push(match status {
            1 => "the test failed".to_string(),
            101 => "the test panicked".to_string(),
            status => format!("the test ended with status {status}"),
        });
    }
    let took = started.0.elapsed();

    let mut left = Vec::new();
    let patience = Instant::now() + GRACE;
    loop {
        reap();
        if complaints.is_empty() && !test.needs.may_leave {
            left = Snapshot::take(whole).difference(&before);
        }
        if left.is_empty() || Instant::now() > patience {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    if !left.is_empty() {
        complaints.push(format!("the host is not as it was before the test:\n  {}", left.join("\n  ")));
    }
    println!("--- {name}: {:.3} s of the host's time", took.as_secs_f64());
    if complaints.is_empty() {
        return Ok(0);
    }
    for complaint in &complaints {
        println!("--- {complaint}");
    }
    show_logs(started.1, uptime_before);
    kill_descendants();
    Ok(1)
}

/// Runs the test itself.
pub fn run_test(name: &str) -> Result<()> {
    let test = Test::find(name).with_context(|| format!("there is no test {name}"))?;
    let Body::Inside(body) = test.body else { bail!("{name} does not run inside") };
    let mut host = Host::new()?;
    let result =
        test.needs.images.iter().try_for_each(|image| host.check_loaded(image)).and_then(|()| body(&host));
    if result.is_err() {
        host.keep_work();
    }
    result
}

fn ends_within(pid: Pid, patience: Duration) -> Result<bool> {
    let process = pidfd_open(pid, PidfdFlags::empty()).context("watch the test")?;
    let timeout = Timespec { tv_sec: i64::try_from(patience.as_secs())?, tv_nsec: 0 };
    loop {
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for the test"),
        }
    }
}

fn kill_descendants() {
    // Twice: one that was just being started may have been missed.
    for _ in 0..2 {
        for process in descendants() {
            if let Some(pid) = Pid::from_raw(process.pid) {
                // It may have ended by itself.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Collects orphans as init would, as long as `but` lives and not `done`: an unreaped process keeps its pid namespace
/// alive, and programs that look for it find it.
fn reap_orphans(but: Pid, done: &AtomicBool) {
    loop {
        // SAFETY: all zeroes is a value of this plain structure of integers.
        let mut about: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: `about` is alive and writable during the call; nobody is reaped by it.
        let status = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut about, libc::WEXITED | libc::WNOWAIT) };
        // SAFETY: waitid() has filled in the part of the structure that tells of a child, or it stayed zero.
        let pid = Pid::from_raw(unsafe { about.si_pid() });
        if status != 0 || pid.is_none() || pid == Some(but) || done.load(Ordering::Acquire) {
            return;
        }
        let _ = rustix::process::waitpid(pid, WaitOptions::NOHANG);
    }
}

/// Collects orphans that ended.
fn reap() {
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

/// Prints every log, console and report that changed since `start`, and the kernel's last words.
fn show_logs(start: SystemTime, uptime: f64) {
    let mut logs = Vec::new();
    for dir in ["/run/bulkhead", "/var/lib/bulkhead", "/tmp"] {
        find_logs(Path::new(dir), start, &mut logs);
    }
    for log in logs {
        println!("--- {}", log.display());
        println!("{}", tail_of(&log).unwrap_or_else(|error| format!("{error:#}")).trim_end());
    }
    println!("--- the host's kernel log since the test began");
    println!("{}", kernel_log(uptime).unwrap_or_else(|error| format!("cannot run dmesg: {error}")));
}

/// The kernel's last messages that are newer than `uptime` seconds.
fn kernel_log(uptime: f64) -> std::io::Result<String> {
    let log = Command::new("dmesg").output()?.stdout;
    let log = String::from_utf8_lossy(&log).into_owned();
    let newer = |line: &&str| {
        let time =
            line.trim_start_matches('[').split(']').next().and_then(|time| time.trim().parse::<f64>().ok());
        time.is_none_or(|time| time >= uptime)
    };
    let lines: Vec<&str> = log.lines().filter(newer).collect();
    Ok(lines.get(lines.len().saturating_sub(40)..).unwrap_or_default().join("\n"))
}

/// Seconds since this host booted, the kernel log's clock.
fn uptime() -> f64 {
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    uptime.split_whitespace().next().and_then(|seconds| seconds.parse().ok()).unwrap_or(0.0)
}

fn find_logs(dir: &Path, start: SystemTime, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(about) = entry.metadata() else { continue };
        let name = entry.file_name().to_string_lossy().to_lowercase();
        if about.is_dir() {
            find_logs(&entry.path(), start, found);
        } else if about.is_file()
            && about.len() > 0
            && about.modified().is_ok_and(|time| time >= start)
            && ["log", "console", "report", "stderr", "state", "serial"]
                .iter()
                .any(|word| name.contains(word))
        {
            found.push(entry.path());
        }
    }
}

fn tail_of(path: &Path) -> Result<String> {
    let mut file = fs::File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LOG_TAIL)))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL).read_to_end(&mut bytes)?;
    if bytes.contains(&0) {
        return Ok("(not text)".to_owned());
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
