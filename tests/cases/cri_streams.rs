//! Steps of `cri.rs`: the streams that kubectl's `exec -it`, `attach` and `port-forward` are made of.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::{Container, Session};

use crate::cri::{Node, PATIENCE};

/// A shell's line that comes to an end when the terminal has this size.
fn until_size(size: &str) -> String {
    format!("until stty size | grep -q '^{size}$'; do sleep 0.1; done; echo it-is-$((40 + 2))\n")
}

/// At a terminal whose shell is the session's: its size, twice, and what is typed.
fn sit_at(terminal: &mut Session) -> Result<()> {
    for (rows, columns) in [(33, 99), (44, 111)] {
        terminal.resize(rows, columns)?;
        terminal.send(Session::STDIN, until_size(&format!("{rows} {columns}")))?;
        terminal.wait_for(Session::STDOUT, "it-is-42")?;
        terminal.forget();
    }
    Ok(())
}

pub fn exec_and_attach(node: &Node<'_>) -> Result<()> {
    let config = node.pod("streams");
    let pod = node.cri.run_pod(&config, node.handler)?;
    let here = (pod.as_str(), &config);
    let script = "while read line; do echo got $line; echo bad $line >&2; done";
    let reader = Container { stdin: true, ..node.container("reader", 0, script) };
    let reader = node.start_this(here, reader)?;

    let mut exec = node.cri.exec_streams(&reader, true, &["sh"])?;
    sit_at(&mut exec).context("exec with a terminal")?;
    exec.send(Session::STDIN, "tty; exit 5\n")?;
    ensure!(exec.status().context("the end of exec with a terminal")? == 5);
    ensure!(exec.text(Session::STDOUT).contains("/dev/pts/"), "{}", exec.text(Session::STDOUT));

    let script = "read word; echo got $word; echo bad >&2; head -c 300000 | wc -c; exit 3";
    let mut exec = node.cri.exec_streams(&reader, false, &["sh", "-c", script])?;
    exec.send(Session::STDIN, "this\n")?;
    exec.wait_for(Session::STDOUT, "got this\n").context("exec with input")?;
    for _ in 0..10 {
        exec.send(Session::STDIN, [b'x'; 30_000])?;
    }
    ensure!(exec.status().context("the end of exec with input")? == 3);
    let said = (exec.text(Session::STDOUT), exec.text(Session::STDERR));
    ensure!(said == ("got this\n300000\n".into(), "bad\n".into()), "{said:?}");

    let hear = |attached: &mut Session, word: &str| -> Result<()> {
        attached.send(Session::STDIN, format!("{word}\n"))?;
        attached.wait_for(Session::STDOUT, &format!("got {word}\n"))?;
        attached.wait_for(Session::STDERR, &format!("bad {word}\n"))
    };
    hear(&mut node.cri.attach(&reader, false)?, "one").context("attach")?;
    // Whoever leaves may come back. containerd has one name for all who are attached: when it notices late that one has gone,
    // the next one hears nothing.
    node.host.eventually("attached again", PATIENCE, || {
        let mut attached = node.cri.attach(&reader, false)?;
        attached.patience(Duration::from_secs(1))?;
        Ok(hear(&mut attached, "two").is_ok())
    })?;

    let shell = Container { stdin: true, tty: true, ..node.container("shell", 0, "exec sh") };
    let shell = node.start_this(here, shell)?;
    let mut attached = node.cri.attach(&shell, true)?;
    sit_at(&mut attached).context("attach to a terminal")?;
    attached.send(Session::STDIN, "exit 6\n")?;
    attached.wait_for_end().context("the end of attach")?;
    ensure!(node.ended(&shell)? == (6, "Error".into()));
    node.remove(&pod)
}

/// Bytes of the file that is served.
const BIG: usize = 1_000_000;

pub fn port_forward(node: &Node<'_>) -> Result<()> {
    let config = node.pod("ports");
    let pod = node.cri.run_pod(&config, node.handler)?;
    // Nothing of it can be reached from outside the pod.
    let script = format!(
        "mkdir /www; echo served >/www/f; yes 0123456789abcde | head -c {BIG} >/www/big; \
         httpd -p 127.0.0.1:8080 -h /www; httpd -p [::1]:8081 -h /www; echo up; exec sleep 1000"
    );
    let web = node.start((&pod, &config), "web", 0, &script)?;
    let log = format!("{}/web.log", config.log_directory);
    node.host.eventually("the servers", PATIENCE, || Ok(std::fs::read_to_string(&log)?.contains(" up\n")))?;

    let get = |port: u16, file: &str| -> Result<Session> {
        let mut forward = node.cri.forward(&pod, port)?;
        forward.send(Session::DATA, format!("GET /{file} HTTP/1.0\r\n\r\n"))?;
        Ok(forward)
    };
    // Two at once, of which one is not listened to for a while.
    let mut big = get(8080, "big")?;
    // containerd looks for `localhost` in the host's files, where these tests have no ::1. The guest is asked for both.
    let ports = if node.handler == "runc" { &[8080][..] } else { &[8080, 8081] };
    for &port in ports {
        let mut small = get(port, "f")?;
        small.wait_for(Session::DATA, "\r\n\r\nserved\n").with_context(|| format!("port {port}"))?;
        let number = port.to_le_bytes();
        ensure!(small.heard(Session::DATA).starts_with(&number) && small.heard(Session::ERRORS) == number);
    }
    big.wait_for_end()?;
    let answer = big.heard(Session::DATA);
    let start = answer.windows(4).position(|four| four == b"\r\n\r\n").context("no header")? + 4;
    let body = &answer[start..];
    let whole = body.chunks(16).all(|line| b"0123456789abcde\n".starts_with(line));
    ensure!(body.len() == BIG && whole, "{} bytes came", body.len());

    // Where nobody listens.
    let mut nobody = get(9, "f")?;
    nobody.wait_for_end()?;
    ensure!(nobody.heard(Session::DATA) == 9u16.to_le_bytes(), "{:?}", nobody.text(Session::DATA));
    // Who breaks off is soon forgotten, and others are served.
    drop(get(8080, "big")?);
    std::thread::sleep(Duration::from_millis(100));
    get(8080, "f")?.wait_for(Session::DATA, "served\n")?;
    node.cri.on("StopContainer", &web, 0)?;
    node.remove(&pod)
}
