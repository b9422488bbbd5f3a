//! Containers that live on: exec, ps, logs, stop, kill, rm, wait, inspect, cp.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::BUSYBOX;

/// Starts a container in the background; answers its id.
fn start(host: &Host, name: &str, script: &str) -> Result<String> {
    let run = host.bulkhead(["run", "-d", "--name", name, "busybox", "sh", "-c", script])?.ok()?;
    let id = run.stdout().trim().to_string();
    ensure!(id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "run -d printed '{id}'");
    Ok(id)
}

fn ps(host: &Host, flags: &[&str]) -> Result<Vec<Value>> {
    let listed = host.bulkhead_program(["ps", "--format", "json"]).args(flags).run()?.ok()?;
    let value: Value = serde_json::from_slice(&listed.stdout).with_context(|| format!("{listed}"))?;
    Ok(value.as_array().context("ps --format json gives no array")?.clone())
}

const LIVES: &str = "trap 'exit 0' TERM; echo started; while :; do sleep 0.1; done";

test!(the_life_of_a_container, BUSYBOX.deadline(60));
fn the_life_of_a_container(host: &Host) -> Result<()> {
    let id = start(host, "life", LIVES)?;
    let rows = ps(host, &[])?;
    ensure!(rows.len() == 1 && rows[0]["id"] == id.as_str() && rows[0]["name"] == "life", "{rows:?}");
    ensure!(rows[0]["status"] == "running", "{rows:?}");
    host.bulkhead(["ps"])?.ok()?.stdout_has("life")?.stdout_has(&id[..12])?;
    host.bulkhead(["stop", "life"])?.ok()?.stdout_is("life\n")?;
    ensure!(ps(host, &[])?.is_empty());
    let rows = ps(host, &["-a"])?;
    ensure!(rows.len() == 1 && rows[0]["status"] == "exited" && rows[0]["exit_code"] == 0, "{rows:?}");
    host.bulkhead(["rm", &id[..12]])?.ok()?;
    ensure!(ps(host, &["-a"])?.is_empty());
    Ok(())
}

test!(exec_runs_one_more_process, BUSYBOX.deadline(60));
fn exec_runs_one_more_process(host: &Host) -> Result<()> {
    start(host, "box", LIVES)?;
    host.bulkhead(["exec", "box", "echo", "hi"])?.ok()?.stdout_is("hi\n")?;
    host.bulkhead(["exec", "box", "sh", "-c", "echo err >&2; exit 5"])?.status_is(5)?.stderr_is("err\n")?;
    let script = "echo $A; pwd; id -u; cat";
    let exec = host
        .bulkhead_program(["exec", "-i", "-e", "A=b", "-w", "/etc", "-u", "user", "box", "sh", "-c", script]);
    exec.stdin("input").run()?.ok()?.stdout_is("b\n/etc\n1000\ninput")?;
    host.bulkhead(["exec", "box", "/no/such"])?.status_is(127)?;
    host.bulkhead(["exec", "nobody", "true"])?.failed()?.stderr_has("nobody")?;
    // It shares the container's processes and files.
    host.bulkhead(["exec", "box", "sh", "-c", "cat /proc/1/cmdline; echo x >/shared"])?
        .ok()?
        .stdout_has("trap")?;
    host.bulkhead(["exec", "box", "cat", "/shared"])?.ok()?.stdout_is("x\n")?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    host.bulkhead(["exec", "box", "true"])?.failed()?;
    Ok(())
}

test!(several_execs_at_once, BUSYBOX.deadline(60));
fn several_execs_at_once(host: &Host) -> Result<()> {
    start(host, "box", LIVES)?;
    let running: Vec<_> = (0..6)
        .map(|number| {
            let script = format!("seq 1 2000; exit {number}");
            host.bulkhead_program(["exec", "box", "sh", "-c", &script]).spawn()
        })
        .collect::<Result<_>>()?;
    for (number, exec) in running.into_iter().enumerate() {
        let finished = exec.wait()?.status_is(i32::try_from(number)?)?;
        ensure!(finished.stdout().lines().count() == 2000 && finished.stdout().ends_with("2000\n"));
    }
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    Ok(())
}

test!(an_exec_ends_with_its_container, BUSYBOX.deadline(60));
fn an_exec_ends_with_its_container(host: &Host) -> Result<()> {
    start(host, "box", LIVES)?;
    let exec = host.bulkhead_program(["exec", "box", "sh", "-c", "echo in; sleep 1000"]).spawn()?;
    exec.wait_for("in", Duration::from_secs(10))?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    ensure!(exec.wait()?.status != 0);
    Ok(())
}

test!(logs_are_kept_and_followed, BUSYBOX.deadline(60));
fn logs_are_kept_and_followed(host: &Host) -> Result<()> {
    start(host, "talker", "echo one; echo two >&2; sleep 2; echo three; sleep 2; echo four")?;
    let follow = host.bulkhead_program(["logs", "-f", "talker"]).spawn()?;
    follow.wait_for("three", Duration::from_secs(20))?;
    follow.wait()?.ok()?.stdout_is("one\nthree\nfour\n")?.stderr_is("two\n")?;
    host.bulkhead(["logs", "talker"])?.ok()?.stdout_is("one\nthree\nfour\n")?.stderr_is("two\n")?;
    host.bulkhead(["logs", "--tail", "1", "talker"])?.ok()?.stdout_is("four\n")?;
    host.bulkhead(["rm", "talker"])?.ok()?;
    Ok(())
}

test!(wait_answers_the_exit_status, BUSYBOX.deadline(60));
fn wait_answers_the_exit_status(host: &Host) -> Result<()> {
    start(host, "short", "sleep 1; exit 33")?;
    host.bulkhead(["wait", "short"])?.ok()?.stdout_is("33\n")?;
    host.bulkhead(["wait", "short"])?.ok()?.stdout_is("33\n")?;
    host.bulkhead(["rm", "short"])?.ok()?;
    Ok(())
}

test!(stop_kills_what_does_not_listen, BUSYBOX.deadline(60));
fn stop_kills_what_does_not_listen(host: &Host) -> Result<()> {
    start(host, "deaf", "trap '' TERM; while :; do sleep 0.1; done")?;
    let stop = host.bulkhead(["stop", "-t", "2", "deaf"])?.ok()?;
    ensure!((2.0..6.0).contains(&stop.took.as_secs_f64()), "{stop}");
    ensure!(ps(host, &["-a"])?[0]["exit_code"] == 137);
    host.bulkhead(["rm", "deaf"])?.ok()?;
    Ok(())
}

test!(kill_sends_any_signal, BUSYBOX.deadline(60));
fn kill_sends_any_signal(host: &Host) -> Result<()> {
    start(host, "box", "trap 'echo usr1' USR1; trap 'exit 4' HUP; echo up; while :; do sleep 0.1; done")?;
    host.bulkhead(["kill", "-s", "USR1", "box"])?.ok()?;
    host.eventually("it got SIGUSR1", Duration::from_secs(10), || {
        Ok(host.bulkhead(["logs", "box"])?.stdout().contains("usr1"))
    })?;
    host.bulkhead(["kill", "--signal", "SIGHUP", "box"])?.ok()?;
    host.bulkhead(["wait", "box"])?.ok()?.stdout_is("4\n")?;
    host.bulkhead(["kill", "box"])?.failed()?;
    host.bulkhead(["rm", "box"])?.ok()?;

    start(host, "box", LIVES)?;
    host.bulkhead(["kill", "box"])?.ok()?;
    host.bulkhead(["wait", "box"])?.ok()?.stdout_is("137\n")?;
    host.bulkhead(["rm", "box"])?.ok()?;
    Ok(())
}

test!(rm_refuses_what_runs_unless_forced, BUSYBOX.deadline(60));
fn rm_refuses_what_runs_unless_forced(host: &Host) -> Result<()> {
    start(host, "box", LIVES)?;
    host.bulkhead(["rm", "box"])?.failed()?.stderr_has("running")?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    host.bulkhead(["rm", "box"])?.failed()?.stderr_has("no such container")?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    Ok(())
}

test!(a_name_belongs_to_one, BUSYBOX.deadline(60));
fn a_name_belongs_to_one(host: &Host) -> Result<()> {
    start(host, "box", LIVES)?;
    host.bulkhead(["run", "--rm", "--name", "box", "busybox", "true"])?
        .status_is(125)?
        .stderr_has("in use")?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    host.bulkhead(["run", "--rm", "--name", "box", "busybox", "true"])?.ok()?;
    host.bulkhead(["run", "--rm", "--name", "../box", "busybox", "true"])?.status_is(125)?;
    Ok(())
}

test!(inspect_tells_all, BUSYBOX.deadline(60));
fn inspect_tells_all(host: &Host) -> Result<()> {
    let id = start(host, "box", LIVES)?;
    let shown = host.bulkhead(["inspect", "box"])?.ok()?;
    let value: Value = serde_json::from_slice(&shown.stdout)?;
    ensure!(
        value.is_array() && shown.stdout().contains(&id) && shown.stdout().contains("busybox"),
        "{shown}"
    );
    host.bulkhead(["inspect", "nobody"])?.failed()?;
    host.bulkhead(["top", "box"])?.ok()?.stdout_has("sleep")?;
    host.bulkhead(["stats", "box"])?.ok()?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    Ok(())
}

test!(cp_copies_both_ways, BUSYBOX.deadline(60));
fn cp_copies_both_ways(host: &Host) -> Result<()> {
    start(host, "box", LIVES)?;
    let file = host.file("in/file", "contents")?;
    fs::create_dir_all(host.work().join("in/sub"))?;
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|number| (number / 11) as u8).collect();
    host.file("in/sub/big", &bytes)?;
    let path = |path: &std::path::Path| path.display().to_string();
    host.bulkhead(["cp", &path(&file), "box:/tmp/one"])?.ok()?;
    host.bulkhead(["exec", "box", "cat", "/tmp/one"])?.ok()?.stdout_is("contents")?;
    host.bulkhead(["cp", &path(&host.work().join("in")), "box:/tmp/tree"])?.ok()?;
    let out = host.work().join("out");
    host.bulkhead(["cp", "box:/tmp/tree", &path(&out)])?.ok()?;
    ensure!(fs::read(out.join("sub/big"))? == bytes, "the big file came back changed");
    ensure!(fs::read(out.join("file"))? == b"contents");
    host.bulkhead(["cp", "box:/no/such", &path(&out)])?.failed()?.stderr_has("/no/such")?;
    // A link in the container leads nowhere else.
    host.bulkhead(["exec", "box", "ln", "-s", "/etc/passwd", "/tmp/link"])?.ok()?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    Ok(())
}

test!(a_container_that_has_ended_can_be_looked_at, BUSYBOX.deadline(60));
fn a_container_that_has_ended_can_be_looked_at(host: &Host) -> Result<()> {
    host.bulkhead(["run", "--name", "kept", "busybox", "sh", "-c", "echo output; exit 3"])?.status_is(3)?;
    ensure!(ps(host, &["-a"])?[0]["exit_code"] == 3);
    host.bulkhead(["logs", "kept"])?.ok()?.stdout_is("output\n")?;
    host.bulkhead(["rm", "kept"])?.ok()?;
    Ok(())
}

test!(a_killed_monitor_is_a_killed_container, BUSYBOX.deadline(60));
fn a_killed_monitor_is_a_killed_container(host: &Host) -> Result<()> {
    start(host, "box", LIVES)?;
    let pid = ps(host, &[])?[0]["pid"].as_i64().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    kill_process(pid.context("ps tells no pid")?, Signal::KILL)?;
    host.bulkhead(["wait", "box"])?.ok()?.stdout_is("137\n")?;
    ensure!(ps(host, &[])?.is_empty());
    host.bulkhead(["rm", "box"])?.ok()?;
    Ok(())
}

test!(a_killed_client_leaves_a_container_that_can_be_removed, BUSYBOX.deadline(60));
fn a_killed_client_leaves_a_container_that_can_be_removed(host: &Host) -> Result<()> {
    let run = host.bulkhead_program(["run", "--name", "box", "busybox", "sh", "-c", LIVES]).spawn()?;
    run.wait_for("started", Duration::from_secs(10))?;
    run.signal(Signal::KILL)?;
    // As with docker the container lives on; it has the client's output until it ends.
    host.bulkhead(["exec", "box", "echo", "alive"])?.ok()?.stdout_is("alive\n")?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    run.wait()?.status_is(137)?;
    Ok(())
}

test!(a_detached_container_removes_itself, BUSYBOX.deadline(60));
fn a_detached_container_removes_itself(host: &Host) -> Result<()> {
    host.bulkhead(["run", "-d", "--rm", "busybox", "true"])?.ok()?;
    host.eventually("it is gone", Duration::from_secs(10), || Ok(ps(host, &["-a"])?.is_empty()))
}
