//! A person at a terminal.

use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;
use rustix::process::Signal;

use crate::BUSYBOX;

const PATIENCE: Duration = Duration::from_secs(10);

test!(a_shell_on_a_terminal, BUSYBOX);
fn a_shell_on_a_terminal(host: &Host) -> Result<()> {
    let mut run = host.bulkhead_program(["run", "--rm", "-it", "busybox", "sh"]).terminal(40, 120)?;
    run.send("test -t 0 && test -t 1 && echo is-a-ter''minal; stty size; tty\n")?;
    run.wait_for("is-a-terminal", PATIENCE)?;
    run.wait_for("40 120", PATIENCE)?;
    run.wait_for("/dev/pts/", PATIENCE)?;
    run.resize(50, 132)?;
    host.eventually("the size follows", PATIENCE, || {
        run.send("stty size\n")?;
        std::thread::sleep(Duration::from_millis(200));
        Ok(run.stdout_so_far().contains("50 132"))
    })?;
    run.send("exit 6\n")?;
    run.wait()?.status_is(6)?;
    Ok(())
}

test!(the_terminal_is_left_as_it_was, BUSYBOX);
fn the_terminal_is_left_as_it_was(host: &Host) -> Result<()> {
    let line = "stty -a >before; bulkhead run --rm -it busybox true; stty -a >after; cmp before after && echo as-it-was";
    let run = bulkhead_tests::process::Program::new(["sh", "-c", line]).dir(host.work()).terminal(24, 80)?;
    run.wait()?.ok()?.stdout_has("as-it-was")?;
    Ok(())
}

test!(control_c_reaches_the_process, BUSYBOX);
fn control_c_reaches_the_process(host: &Host) -> Result<()> {
    let script = "trap 'echo caught; exit 12' INT; echo ready; while :; do sleep 0.1; done";
    let mut run =
        host.bulkhead_program(["run", "--rm", "-it", "busybox", "sh", "-c", script]).terminal(24, 80)?;
    run.wait_for("ready", PATIENCE)?;
    run.send([3])?;
    run.wait()?.status_is(12)?.stdout_has("caught")?;
    Ok(())
}

test!(detach_keys_leave_it_running, BUSYBOX);
fn detach_keys_leave_it_running(host: &Host) -> Result<()> {
    let command = ["run", "-it", "--name", "box", "busybox", "sh"];
    let mut run = host.bulkhead_program(command).terminal(24, 80)?;
    run.send("echo re''ady\n")?;
    run.wait_for("ready", PATIENCE)?;
    run.send([0x10, 0x11])?;
    run.wait()?.ok()?;
    let listed = host.bulkhead(["ps", "-q"])?.ok()?.stdout();
    ensure!(listed.lines().count() == 1, "ps lists: {listed}");
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    Ok(())
}

test!(t_without_a_terminal_is_refused, BUSYBOX);
fn t_without_a_terminal_is_refused(host: &Host) -> Result<()> {
    host.bulkhead(["run", "--rm", "-it", "busybox", "true"])?.failed()?.stderr_has("terminal")?;
    Ok(())
}

test!(exec_on_a_terminal, BUSYBOX);
fn exec_on_a_terminal(host: &Host) -> Result<()> {
    host.bulkhead(["run", "-d", "--name", "box", "busybox", "sleep", "1000"])?.ok()?;
    let mut exec = host.bulkhead_program(["exec", "-it", "box", "sh"]).terminal(24, 80)?;
    exec.send("stty size; exit 8\n")?;
    exec.wait()?.status_is(8)?.stdout_has("24 80")?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    Ok(())
}

test!(control_c_at_any_moment_leaves_nothing, BUSYBOX.deadline(120));
fn control_c_at_any_moment_leaves_nothing(host: &Host) -> Result<()> {
    for milliseconds in (0..200).step_by(12) {
        let run = host.bulkhead_program(["run", "--rm", "busybox", "sleep", "20"]).spawn()?;
        std::thread::sleep(Duration::from_millis(milliseconds));
        run.signal(Signal::INT)?;
        // `sleep` as process 1 does not hear SIGINT; what counts is that a second and third one end it, as with docker.
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(400));
            let _ = run.signal(Signal::INT);
        }
        let finished = run.wait()?;
        ensure!(finished.status != 0 || finished.took > Duration::from_secs(20), "{finished}");
        let left = host.bulkhead(["ps", "-aq"])?.ok()?.stdout();
        ensure!(left.is_empty(), "after {milliseconds} ms: {left}");
    }
    Ok(())
}
