//! `bulkhead run`: exit status, streams, what the process finds.

use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;
use rustix::process::Signal;

use crate::{BUSYBOX, shell};

test!(says_hello, BUSYBOX);
fn says_hello(host: &Host) -> Result<()> {
    host.bulkhead(["run", "--rm", "busybox", "echo", "hello"])?.ok()?.stdout_is("hello\n")?.stderr_is("")?;
    Ok(())
}

test!(exit_status_is_the_containers, BUSYBOX);
fn exit_status_is_the_containers(host: &Host) -> Result<()> {
    for status in [1, 42, 255] {
        shell(host, &[], &format!("exit {status}"))?.status_is(status)?;
    }
    Ok(())
}

test!(a_signal_is_128_and_its_number, BUSYBOX);
fn a_signal_is_128_and_its_number(host: &Host) -> Result<()> {
    // PID 1 of a namespace gets only the signals that it handles, except SIGKILL from outside: a child must die.
    shell(host, &[], "sh -c 'kill -9 $$'; exit $?")?.status_is(137)?;
    shell(host, &[], "sh -c 'kill -15 $$'; exit $?")?.status_is(143)?;
    Ok(())
}

test!(a_missing_command_is_127_and_one_that_cannot_run_126, BUSYBOX);
fn a_missing_command_is_127_and_one_that_cannot_run_126(host: &Host) -> Result<()> {
    host.bulkhead(["run", "--rm", "busybox", "/no/such"])?.status_is(127)?.stderr_has("/no/such")?;
    host.bulkhead(["run", "--rm", "busybox", "nosuch"])?.status_is(127)?.stderr_has("nosuch")?;
    host.bulkhead(["run", "--rm", "busybox", "/etc/passwd"])?.status_is(126)?.stderr_has("/etc/passwd")?;
    host.bulkhead(["run", "--rm", "busybox", "/etc"])?.status_is(126)?.stderr_has("/etc")?;
    Ok(())
}

test!(our_own_failures_are_125, BUSYBOX);
fn our_own_failures_are_125(host: &Host) -> Result<()> {
    host.bulkhead(["run", "--no-such-flag", "busybox", "true"])?
        .status_is(125)?
        .stderr_has("--no-such-flag")?;
    host.bulkhead(["run", "--rm", "--user", "nobody-knows", "busybox", "true"])?
        .status_is(125)?
        .stderr_has("nobody-knows")?;
    Ok(())
}

test!(stdout_and_stderr_stay_apart, BUSYBOX);
fn stdout_and_stderr_stay_apart(host: &Host) -> Result<()> {
    shell(host, &[], "echo out; echo err >&2")?.ok()?.stdout_is("out\n")?.stderr_is("err\n")?;
    Ok(())
}

test!(stdin_goes_in_with_i_only, BUSYBOX);
fn stdin_goes_in_with_i_only(host: &Host) -> Result<()> {
    let text = "line one\nno end of line";
    let cat = |flags: &[&str]| host.bulkhead_program(["run", "--rm"]).args(flags).args(["busybox", "cat"]);
    cat(&["-i"]).stdin(text).run()?.ok()?.stdout_is(text)?;
    cat(&[]).stdin(text).run()?.ok()?.stdout_is("")?;
    Ok(())
}

test!(a_megabyte_goes_in_and_out_unchanged, BUSYBOX.deadline(60));
fn a_megabyte_goes_in_and_out_unchanged(host: &Host) -> Result<()> {
    // Every byte value, in an order that no buffer size divides.
    let bytes: Vec<u8> = (0..1_000_003_u64).map(|number| (number * number / 7 % 251) as u8).collect();
    let cat =
        host.bulkhead_program(["run", "--rm", "-i", "busybox", "cat"]).stdin(bytes.clone()).run()?.ok()?;
    ensure!(cat.stdout == bytes, "{} bytes came back, of {}", cat.stdout.len(), bytes.len());
    Ok(())
}

test!(nothing_is_lost_of_100_mb_and_an_immediate_exit, BUSYBOX.deadline(300));
fn nothing_is_lost_of_100_mb_and_an_immediate_exit(host: &Host) -> Result<()> {
    let script = "dd if=/dev/zero bs=1M count=100 2>/dev/null; echo the end; exit 3";
    let finished = shell(host, &[], script)?.status_is(3)?;
    let expected = 100 * 1024 * 1024 + "the end\n".len();
    ensure!(finished.stdout.len() == expected, "{} bytes of {expected}", finished.stdout.len());
    ensure!(finished.stdout.ends_with(b"\0the end\n"));
    Ok(())
}

test!(the_last_line_is_never_missing, BUSYBOX.deadline(60));
fn the_last_line_is_never_missing(host: &Host) -> Result<()> {
    for _ in 0..8 {
        shell(host, &[], "echo first; echo last >&2; echo last")?
            .ok()?
            .stdout_is("first\nlast\n")?
            .stderr_is("last\n")?;
    }
    Ok(())
}

test!(stdin_left_open_does_not_keep_it, BUSYBOX);
fn stdin_left_open_does_not_keep_it(host: &Host) -> Result<()> {
    let program = host.bulkhead_program(["run", "--rm", "-i", "busybox", "echo", "done"]).open_stdin();
    program.spawn()?.wait()?.ok()?.stdout_is("done\n")?;
    Ok(())
}

test!(stdin_that_the_container_closes_is_no_error, BUSYBOX);
fn stdin_that_the_container_closes_is_no_error(host: &Host) -> Result<()> {
    let program = host.bulkhead_program(["run", "--rm", "-i", "busybox", "head", "-c", "5"]);
    program.stdin(vec![b'x'; 1 << 20]).run()?.ok()?.stdout_is("xxxxx")?;
    Ok(())
}

test!(a_reader_that_goes_away_ends_it, BUSYBOX);
fn a_reader_that_goes_away_ends_it(host: &Host) -> Result<()> {
    let line = "bulkhead run --rm busybox yes | head -n 2";
    host.run(["sh", "-c", line])?.ok()?.stdout_is("y\ny\n")?;
    Ok(())
}

test!(a_slow_reader_slows_the_writer_and_loses_nothing, BUSYBOX.deadline(60));
fn a_slow_reader_slows_the_writer_and_loses_nothing(host: &Host) -> Result<()> {
    let line = "bulkhead run --rm busybox seq 1 200000 | { sleep 3; md5sum; }";
    let expected = host.run(["sh", "-c", "seq 1 200000 | md5sum"])?.ok()?.stdout();
    host.run(["sh", "-c", line])?.ok()?.stdout_is(&expected)?;
    Ok(())
}

test!(signals_go_to_the_process, BUSYBOX);
fn signals_go_to_the_process(host: &Host) -> Result<()> {
    let script = "trap 'echo got it; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let run = host.bulkhead_program(["run", "--rm", "busybox", "sh", "-c", script]).spawn()?;
    run.wait_for("ready", Duration::from_secs(10))?;
    run.signal(Signal::TERM)?;
    run.wait()?.status_is(9)?.stdout_has("got it")?;
    Ok(())
}

test!(orphans_are_reaped_and_end_with_it, BUSYBOX);
fn orphans_are_reaped_and_end_with_it(host: &Host) -> Result<()> {
    // The orphan holds stdout open: the container's end must be the stream's end all the same.
    shell(host, &[], "(sleep 1000 &) ; echo over")?.ok()?.stdout_is("over\n")?;
    Ok(())
}

test!(the_process_is_1_and_sees_only_its_own, BUSYBOX);
fn the_process_is_1_and_sees_only_its_own(host: &Host) -> Result<()> {
    shell(host, &[], "echo $$; ls /proc | grep -c '^[0-9]'")?.ok()?.stdout_has("1\n")?;
    let count = shell(host, &[], "ls -d /proc/[0-9]* | wc -l")?.ok()?.stdout();
    ensure!(count.trim().parse::<u32>()? <= 3, "{count} processes are visible");
    Ok(())
}

test!(the_root_is_the_images_and_writable, BUSYBOX);
fn the_root_is_the_images_and_writable(host: &Host) -> Result<()> {
    let script = "touch /new /etc/new && cat /etc/passwd | head -1 && stat -c %a /tmp && ls -ld /home/user | awk '{print $3}'";
    shell(host, &[], script)?.ok()?.stdout_is("root:x:0:0:root:/root:/bin/sh\n1777\nuser\n")?;
    // And the next one does not see it.
    shell(host, &[], "test ! -e /new")?.ok()?;
    Ok(())
}

test!(usual_devices_and_mounts_are_there, BUSYBOX);
fn usual_devices_and_mounts_are_there(host: &Host) -> Result<()> {
    let script = "set -e; for d in null zero full random urandom tty; do test -c /dev/$d; done; \
        test -d /dev/pts; test -d /dev/shm; echo x >/dev/null; echo x >/dev/shm/x; head -c 4 /dev/urandom >/dev/null; \
        test -e /proc/self/fd/0; test -L /dev/stdout; test -d /sys/kernel; grep -q cgroup2 /proc/mounts; hostname; cat /etc/hostname || true";
    shell(host, &[], script)?.ok()?;
    // Masked, as runc and docker do.
    shell(host, &[], "cat /proc/kcore 2>/dev/null | head -c 1 | wc -c")?.stdout_is("0\n")?;
    shell(host, &[], "echo 1 >/proc/sysrq-trigger")?.failed()?;
    Ok(())
}
