//! Each flag of `bulkhead run` does what docker's does.

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;

use crate::{BUSYBOX, shell};

test!(env_and_env_file, BUSYBOX);
fn env_and_env_file(host: &Host) -> Result<()> {
    let file =
        host.file("env", "# a comment\nFROM_FILE=one two\nTAKEN\n\nBOTH=file\n")?.display().to_string();
    let flags = ["-e", "A=1", "--env", "EMPTY=", "-e", "CALLER", "--env-file", &file, "-e", "BOTH=flag"];
    let script = "echo \"$A|${EMPTY-unset}|$CALLER|$FROM_FILE|$TAKEN|$BOTH|${HOST_ONLY-unset}\"";
    let run = host.bulkhead_program(["run", "--rm"]).args(flags).args(["busybox", "sh", "-c", script]);
    let run = run.env("CALLER", "caller").env("TAKEN", "taken").env("HOST_ONLY", "leaked").run()?.ok()?;
    run.stdout_is("1||caller|one two|taken|flag|unset\n")?;
    Ok(())
}

test!(path_and_home_and_hostname_are_set, BUSYBOX);
fn path_and_home_and_hostname_are_set(host: &Host) -> Result<()> {
    shell(host, &[], "echo $PATH; echo $HOME; test -n \"$HOSTNAME\"")?
        .ok()?
        .stdout_is("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n/root\n")?;
    Ok(())
}

test!(workdir, BUSYBOX);
fn workdir(host: &Host) -> Result<()> {
    shell(host, &["-w", "/etc"], "pwd")?.ok()?.stdout_is("/etc\n")?;
    // One that is not there is made.
    shell(host, &["--workdir", "/not/there"], "pwd")?.ok()?.stdout_is("/not/there\n")?;
    Ok(())
}

test!(user, BUSYBOX);
fn user(host: &Host) -> Result<()> {
    shell(host, &[], "id -u; id -g")?.ok()?.stdout_is("0\n0\n")?;
    let script = "id -u; id -g; id -G; echo $HOME";
    shell(host, &["-u", "user"], script)?.ok()?.stdout_is("1000\n1000\n1000 29 50\n/home/user\n")?;
    shell(host, &["--user", "1234:29"], "id -u; id -g")?.ok()?.stdout_is("1234\n29\n")?;
    shell(host, &["-u", "user:staff"], "id -u; id -g")?.ok()?.stdout_is("1000\n50\n")?;
    Ok(())
}

test!(entrypoint, BUSYBOX);
fn entrypoint(host: &Host) -> Result<()> {
    host.bulkhead(["run", "--rm", "--entrypoint", "echo", "busybox", "a", "b"])?.ok()?.stdout_is("a b\n")?;
    Ok(())
}

test!(hostname, BUSYBOX);
fn hostname(host: &Host) -> Result<()> {
    shell(host, &["--hostname", "some-name"], "hostname; uname -n")?
        .ok()?
        .stdout_is("some-name\nsome-name\n")?;
    Ok(())
}

test!(memory_sizes_the_guest, BUSYBOX);
fn memory_sizes_the_guest(host: &Host) -> Result<()> {
    for (flag, least, most) in [("128m", 100, 260), ("1g", 900, 1300)] {
        let total =
            shell(host, &["--memory", flag], "awk '/MemTotal/{print int($2/1024)}' /proc/meminfo")?.ok()?;
        let mib: u64 = total.stdout().trim().parse()?;
        ensure!((least..=most).contains(&mib), "--memory {flag} gives {mib} MiB");
    }
    shell(host, &["-m", "64m"], "cat /sys/fs/cgroup/memory.max")?.ok()?.stdout_is("67108864\n")?;
    Ok(())
}

test!(cpus, BUSYBOX.deadline(60));
fn cpus(host: &Host) -> Result<()> {
    shell(host, &["--cpus", "2"], "nproc")?.ok()?.stdout_is("2\n")?;
    shell(host, &["--cpus", "0.5"], "nproc; cut -d' ' -f1 /sys/fs/cgroup/cpu.max")?
        .ok()?
        .stdout_is("1\n50000\n")?;
    Ok(())
}

test!(storage_limits, BUSYBOX.deadline(120));
fn storage_limits(host: &Host) -> Result<()> {
    // 8 MiB to the disk and back, of which a tenth of a second's worth is free at once. Longer it may take, shorter never.
    let script = "dd if=/dev/zero of=/f bs=1M count=8 conv=fsync 2>/dev/null && \
        echo 3 >/proc/sys/vm/drop_caches && dd if=/f of=/dev/null bs=1M 2>/dev/null && echo done";
    let took = |flags: &[&str]| -> Result<f64> {
        let flags = [&["--privileged"], flags].concat();
        Ok(shell(host, &flags, script)?.ok()?.stdout_is("done\n")?.took.as_secs_f64())
    };
    let free = took(&[])?;
    let bytes = took(&["--storage-bps", "4m"])?;
    let requests = took(&["--storage-iops", "10"])?;
    ensure!(
        free < 2.0 && bytes > 3.8 && requests > 1.0,
        "{free} s; by bytes {bytes} s, by requests {requests} s"
    );
    for (flag, value) in [("--storage-bps", "fast"), ("--storage-bps", "-1"), ("--storage-iops", "1.5")] {
        host.bulkhead(["run", "--rm", &format!("{flag}={value}"), "busybox", "true"])?
            .status_is(125)?
            .stderr_has(flag)?;
    }
    Ok(())
}

test!(read_only, BUSYBOX);
fn read_only(host: &Host) -> Result<()> {
    shell(host, &["--read-only"], "touch /x")?.failed()?.stderr_has("read-only file system")?;
    shell(host, &["--read-only", "--tmpfs", "/scratch"], "touch /scratch/x")?.ok()?;
    Ok(())
}

test!(tmpfs, BUSYBOX);
fn tmpfs(host: &Host) -> Result<()> {
    let script = "grep ' /scratch ' /proc/mounts; dd if=/dev/zero of=/scratch/x bs=1M count=8";
    shell(host, &["--tmpfs", "/scratch:size=4m,mode=1770"], script)?
        .failed()?
        .stdout_has("tmpfs")?
        .stdout_has("size=4096k")?
        .stderr_has("no space left")?;
    Ok(())
}

test!(capabilities, BUSYBOX);
fn capabilities(host: &Host) -> Result<()> {
    let effective = |flags: &[&str]| -> Result<u64> {
        let line = shell(host, flags, "awk '/CapEff/{print $2}' /proc/self/status")?.ok()?.stdout();
        Ok(u64::from_str_radix(line.trim(), 16)?)
    };
    const NET_ADMIN: u64 = 1 << 12;
    const CHOWN: u64 = 1;
    // Docker's fourteen.
    ensure!(effective(&[])? == 0xa804_25fb, "default capabilities are {:x}", effective(&[])?);
    ensure!(effective(&["--cap-add", "NET_ADMIN"])? == 0xa804_25fb | NET_ADMIN);
    ensure!(effective(&["--cap-drop", "CAP_CHOWN"])? == 0xa804_25fb & !CHOWN);
    ensure!(effective(&["--cap-drop", "ALL"])? == 0);
    ensure!(effective(&["--cap-drop", "all", "--cap-add", "chown"])? == CHOWN);
    shell(host, &["--cap-drop", "CHOWN"], "touch /tmp/x; chown 1 /tmp/x")?
        .failed()?
        .stderr_has("not permitted")?;
    Ok(())
}

test!(ulimit, BUSYBOX);
fn ulimit(host: &Host) -> Result<()> {
    shell(host, &["--ulimit", "nofile=100:200"], "ulimit -n; ulimit -Hn")?.ok()?.stdout_is("100\n200\n")?;
    Ok(())
}

test!(sysctl, BUSYBOX);
fn sysctl(host: &Host) -> Result<()> {
    shell(host, &["--sysctl", "net.ipv4.ip_forward=1"], "cat /proc/sys/net/ipv4/ip_forward")?
        .ok()?
        .stdout_is("1\n")?;
    shell(host, &["--sysctl", "kernel.msgmax=1000"], "cat /proc/sys/kernel/msgmax")?
        .ok()?
        .stdout_is("1000\n")?;
    Ok(())
}

test!(pids_limit, BUSYBOX);
fn pids_limit(host: &Host) -> Result<()> {
    let script =
        "cat /sys/fs/cgroup/pids.max; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 5 & done; echo started";
    shell(host, &["--pids-limit", "8"], script)?.stdout_has("8\n")?.stderr_has("can't fork")?;
    Ok(())
}

test!(storage, BUSYBOX.deadline(60));
fn storage(host: &Host) -> Result<()> {
    let script = "dd if=/dev/zero of=/big bs=1M count=64";
    shell(host, &["--storage", "32m"], script)?.failed()?.stderr_has("no space left")?;
    shell(host, &["--storage", "128m"], script)?.ok()?;
    shell(host, &["--storage", "0"], "touch /in-memory")?.ok()?;
    Ok(())
}

test!(help_teaches, crate::Needs::bulkhead());
fn help_teaches(host: &Host) -> Result<()> {
    host.bulkhead(["--help"])?.ok()?.stdout_has("run")?.stdout_has("Examples")?;
    host.bulkhead(["run", "--help"])?.ok()?.stdout_has("--memory")?;
    host.run(["bulkhead-vmm", "--help"])?.ok()?.stdout_has("--config")?;
    host.bulkhead(["--version"])?.ok()?.stdout_has("bulkhead")?;
    Ok(())
}

test!(doctor_is_content_with_this_host, crate::Needs::bulkhead());
fn doctor_is_content_with_this_host(host: &Host) -> Result<()> {
    host.bulkhead(["doctor"])?.ok()?.stdout_has("kvm")?.stdout_lacks("FAILED")?;
    let json: serde_json::Value =
        serde_json::from_slice(&host.bulkhead(["doctor", "--format", "json"])?.ok()?.stdout)?;
    ensure!(json.as_array().is_some_and(|checks| checks.len() >= 4), "{json}");
    Ok(())
}
