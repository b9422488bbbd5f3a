//! `--console-socket` of `bulkhead-oci`: who gets the terminal can do with it what runc's receiver can.

use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::console::{Console, ConsoleSocket, stale_socket};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;
use serde_json::json;

use crate::oci::{Bundle, NEEDS, both};

const PATIENCE: Duration = Duration::from_secs(10);

fn terminal(bundle: &Bundle, args: &[&str]) -> Result<()> {
    bundle.change(|config| {
        config["process"]["terminal"] = true.into();
        config["process"]["args"] = json!(args);
    })
}

/// Asks for the size until it is `size`: a change takes its time to get in.
fn size_becomes(host: &Host, console: &mut Console, size: &str) -> Result<()> {
    host.eventually(size, PATIENCE, || {
        console.send("stty size\n")?;
        Ok(console.wait_for(size, Duration::from_millis(200)).is_ok())
    })
}

/// What a person does at a shell: programs that are interrupted, stopped and taken up again.
fn job_control(console: &mut Console) -> Result<()> {
    console.send("sleep 1000\n")?;
    console.wait_for("sleep 1000\r\n", PATIENCE)?;
    std::thread::sleep(Duration::from_millis(300));
    console.send("\x03")?;
    console.send("echo after-$?\n")?;
    console.wait_for("after-130\r\n", PATIENCE)?;
    console.send("sleep 2000\n")?;
    console.wait_for("sleep 2000\r\n", PATIENCE)?;
    std::thread::sleep(Duration::from_millis(300));
    console.send("\x1a")?;
    console.wait_for("Stopped", PATIENCE)?;
    console.send("kill %1; fg; echo then-$?\n")?;
    console.wait_for("then-143\r\n", PATIENCE)
}

test!(a_terminal_by_socket_is_one_to_work_at, NEEDS.deadline(120));
fn a_terminal_by_socket_is_one_to_work_at(host: &Host) -> Result<()> {
    both(host, |bundle| {
        let socket = ConsoleSocket::listen(bundle.dir.join("tty"))?;
        terminal(bundle, &["sh"])?;
        bundle.change(|config| config["process"]["consoleSize"] = json!({"height": 30, "width": 100}))?;
        bundle.apart(&["create", "--console-socket", &socket.path(), "c1"])?;
        let mut console = socket.take()?;
        bundle.call(&["start", "c1"])?.ok()?;
        console.wait_for("# ", PATIENCE)?;
        console.send("stty size\n")?;
        console.wait_for("30 100\r\n", PATIENCE)?;
        console.resize(41, 121)?;
        size_becomes(host, &mut console, "41 121")?;
        job_control(&mut console)?;

        // Another process with a terminal of its own.
        bundle.apart(&["exec", "-t", "-d", "--console-socket", &socket.path(), "c1", "sh"])?;
        let mut other = socket.take()?;
        other.wait_for("# ", PATIENCE)?;
        other.resize(27, 71)?;
        size_becomes(host, &mut other, "27 71")?;
        other.send("exit\n")?;
        other.finish();

        console.send("exit 7\n")?;
        bundle.wait_for(host, "c1", "stopped")?;
        console.finish();
        bundle.call(&["delete", "c1"])?.ok()?;
        bundle.nothing_left()
    })
}

test!(a_terminal_by_socket_passes_every_byte_and_no_other, NEEDS);
fn a_terminal_by_socket_passes_every_byte_and_no_other(host: &Host) -> Result<()> {
    both(host, |bundle| {
        bundle.applets(&["head", "echo"])?;
        let socket = ConsoleSocket::listen(bundle.dir.join("tty"))?;
        let script = "stty raw -echo; echo ready; head -c 512; stty sane; echo; echo end";
        terminal(bundle, &["sh", "-c", script])?;
        bundle.apart(&["run", "-d", "--console-socket", &socket.path(), "c1"])?;
        let mut console = socket.take()?;
        console.wait_for("ready\n", PATIENCE)?;
        let all: Vec<u8> = (0..=255).chain(0..=255).collect();
        console.send(&all)?;
        let shown = console.finish();
        let expected = [b"ready\n", all.as_slice(), b"\r\nend\r\n"].concat();
        ensure!(shown == expected, "the terminal showed {:?}", String::from_utf8_lossy(&shown));
        bundle.wait_for(host, "c1", "stopped")?;
        bundle.call(&["delete", "c1"])?.ok()?;
        bundle.nothing_left()
    })
}

test!(what_nobody_takes_is_an_error, NEEDS);
fn what_nobody_takes_is_an_error(host: &Host) -> Result<()> {
    both(host, |bundle| {
        let nobody = stale_socket(&bundle.dir.join("nobody"))?;
        terminal(bundle, &["sh"])?;
        let socket = ["--console-socket", nobody.as_str()];
        for verb in [&["create"][..], &["run", "-d"]] {
            let end = bundle.call(&[verb, &socket, &["c1"]].concat())?.status_is(1)?;
            end.stderr_has("nobody")?.stderr_has("connection refused")?;
            bundle.nothing_left()?;
        }
        bundle.change(|config| config["process"]["terminal"] = false.into())?;
        let words = ["create", "--pid-file", "/no/where", "c1"];
        bundle.call(&words)?.status_is(1)?.stderr_has("/no/")?;
        bundle.nothing_left()?;
        bundle.change(|config| config["process"]["terminal"] = true.into())?;
        // With a terminal and nowhere to put it, and the reverse.
        let (no_place, no_use) = ("cannot allocate tty if", "cannot use console socket if");
        bundle.call(&["create", "c1"])?.status_is(1)?.stderr_has(no_place)?;
        bundle.call(&["run", "-d", "c1"])?.status_is(1)?.stderr_has(no_place)?;
        bundle.call(&[&["run"], &socket[..], &["c1"]].concat())?.status_is(1)?.stderr_has(no_use)?;
        bundle.change(|config| config["process"]["terminal"] = false.into())?;
        bundle.call(&[&["create"], &socket[..], &["c1"]].concat())?.status_is(1)?.stderr_has(no_use)?;
        bundle.nothing_left()?;

        bundle.runs("while :; do sleep 1; done")?;
        bundle.apart(&["run", "-d", "c1"])?;
        let command = ["c1", "sleep", "4321"];
        for (flags, word) in [
            (&["-t", "-d"][..], no_place),
            (&["-d", "--console-socket", &nobody], no_use),
            (&["-t", "--console-socket", &nobody], no_use),
            (&["-t", "-d", "--console-socket", &nobody], "nobody"),
            (&["-d", "--pid-file", "/no/where"], "/no/"),
            (&["--pid-file", "/no/where"], "/no/"),
        ] {
            let end = bundle.call(&[&["exec"], flags, &command].concat())?.status_is(255)?;
            end.stderr_has(word)?;
        }
        // Nothing of it waits inside for ever.
        if bundle.is_ours() {
            let listed = bundle.call(&["ps", "c1"])?.ok()?.stdout();
            let others = listed.lines().skip(1).filter(|line| !line.contains("sleep 1"));
            ensure!(others.count() == 0, "in the container:\n{listed}");
        }
        bundle.call(&["delete", "--force", "c1"])?.ok()?;
        bundle.nothing_left()
    })
}

test!(the_callers_terminal_is_the_containers, NEEDS);
fn the_callers_terminal_is_the_containers(host: &Host) -> Result<()> {
    both(host, |bundle| {
        terminal(bundle, &["sh"])?;
        let mut run = bundle.program(&["run", "c1"]).terminal(24, 80)?;
        run.wait_for("# ", PATIENCE)?;
        run.send("stty size; tty\n")?;
        run.wait_for("24 80\r\n/dev/", PATIENCE)?;
        run.resize(31, 91)?;
        host.eventually("31 91", PATIENCE, || {
            run.send("stty size\n")?;
            Ok(run.wait_for("31 91\r\n", Duration::from_millis(200)).is_ok())
        })?;
        let mut exec = bundle.program(&["exec", "-t", "c1", "sh"]).terminal(20, 60)?;
        exec.wait_for("# ", PATIENCE)?;
        exec.send("stty size; exit 6\n")?;
        exec.wait_for("20 60\r\n", PATIENCE)?;
        exec.wait()?.status_is(6)?;
        // An interrupt is one inside, and nobody else's.
        run.send("sleep 1000\n")?;
        run.wait_for("sleep 1000\r\n", PATIENCE)?;
        std::thread::sleep(Duration::from_millis(300));
        run.send("\x03")?;
        run.send("echo after-$?\n")?;
        run.wait_for("after-130\r\n", PATIENCE)?;
        run.send("exit 5\n")?;
        run.wait()?.status_is(5)?;
        bundle.nothing_left()
    })
}
