//! Figures: a container's network beside that of a container of runc's in the same namespace.
//!
//! Times are the host's own, as in `figures.rs`. The emulated host has one processor: what is measured is what both ends
//! cost together.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Program;
use bulkhead_tests::test;
use serde_json::Value;

use crate::BUSYBOX;
use crate::network::prepare;

const BYTES: usize = 50_000_000;
const ROUND_TRIPS: usize = 200;
const CONNECTIONS: usize = 200;

/// The container's part: receives, echoes, serves.
const SCRIPT: &str = "mkdir -p /tmp/www; echo x >/tmp/www/f; head -c 25000000 /dev/zero >/tmp/www/b; \
                      nc 10.9.0.1 9000 </dev/null >/dev/null; nc 10.9.0.1 9001 </dev/null; \
                      nc -l -p 9002 -e cat; httpd -p 80 -h /tmp/www; nc -l -p 9003";

struct Figures {
    to: f64,
    from: f64,
    round_trip: Duration,
    connections: f64,
}

fn connect(port: u16) -> Result<TcpStream> {
    let start = Instant::now();
    loop {
        match TcpStream::connect(("10.9.0.2", port)) {
            Ok(stream) => return Ok(stream),
            Err(error) if start.elapsed() > Duration::from_secs(20) => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn measure(program: Program) -> Result<Figures> {
    let (to, done) = (TcpListener::bind("10.9.0.1:9000")?, TcpListener::bind("10.9.0.1:9001")?);
    let running = program.spawn()?;
    let megabytes_per_second = |took: Duration| BYTES as f64 / 1e6 / took.as_secs_f64();

    let (mut stream, _) = to.accept()?;
    let start = Instant::now();
    let chunk = vec![7; 1 << 20];
    let mut left = BYTES;
    while left > 0 {
        left -= stream.write(&chunk[..left.min(chunk.len())])?;
    }
    drop(stream);
    // The container asks for the next connection when it has everything.
    drop(done.accept()?);
    let to = megabytes_per_second(start.elapsed());

    let mut echo = connect(9002)?;
    echo.set_nodelay(true)?;
    let mut times = Vec::new();
    for _ in 0..ROUND_TRIPS {
        let start = Instant::now();
        echo.write_all(b"x")?;
        echo.read_exact(&mut [0])?;
        times.push(start.elapsed());
    }
    drop(echo);
    times.sort();

    // A web server sends with sendfile, in pieces as large as the kernel likes.
    drop(connect(80)?);
    let start = Instant::now();
    let mut received = 0;
    let mut buffer = vec![0; 1 << 20];
    while received < BYTES {
        let mut stream = connect(80)?;
        stream.write_all(b"GET /b HTTP/1.0\r\n\r\n")?;
        loop {
            match stream.read(&mut buffer)? {
                0 => break,
                count => received += count,
            }
        }
    }
    let from = megabytes_per_second(start.elapsed());
    let start = Instant::now();
    for _ in 0..CONNECTIONS {
        let mut stream = connect(80)?;
        stream.write_all(b"GET /f HTTP/1.0\r\n\r\n")?;
        stream.read_to_end(&mut Vec::new())?;
    }
    let connections = CONNECTIONS as f64 / start.elapsed().as_secs_f64();
    // The end of this connection is the container's.
    drop(connect(9003)?);
    running.wait()?;
    Ok(Figures { to, from, round_trip: times[ROUND_TRIPS / 2], connections })
}

/// A container of runc's in the namespace.
fn runc(host: &Host) -> Result<Program> {
    let bundle = host.work().join("bundle");
    fs::create_dir_all(bundle.join("rootfs/bin"))?;
    fs::create_dir_all(bundle.join("rootfs/tmp"))?;
    for applet in ["sh", "nc", "head", "cat", "mkdir", "echo", "httpd"] {
        fs::copy("/usr/bin/busybox", bundle.join("rootfs/bin").join(applet))?;
    }
    Program::new(["runc", "spec"]).dir(&bundle).run()?.ok()?;
    let file = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = serde_json::json!(["sh", "-c", SCRIPT]);
    config["root"]["readonly"] = false.into();
    let all = config["process"]["capabilities"]["bounding"].as_array_mut().context("no capabilities")?;
    all.push("CAP_NET_RAW".into());
    for namespace in config["linux"]["namespaces"].as_array_mut().context("no namespaces")? {
        if namespace["type"] == "network" {
            namespace["path"] = "/run/netns/box".into();
        }
    }
    fs::write(file, config.to_string())?;
    let program = Program::new(["runc", "--root"]).args([host.work().join("state")]);
    Ok(program.args(["run", "--bundle"]).args([bundle]).args(["peer"]))
}

test!(network_beside_runc, BUSYBOX.deadline(120).shows_output());
fn network_beside_runc(host: &Host) -> Result<()> {
    println!("| network, host's time | MTU | to it, MB/s | from it, MB/s | round trip, µs | requests/s |");
    println!("|---|---|---|---|---|---|");
    for mtu in [1500, 9000] {
        let prepared = prepare(host, mtu)?;
        let flag = prepared.flag(0);
        let ours = measure(host.bulkhead_program(["run", "--rm", &flag, "busybox", "sh", "-c", SCRIPT]))?;
        let theirs = measure(runc(host)?)?;
        for (name, figures) in [("bulkhead", &ours), ("runc", &theirs)] {
            println!(
                "| {name} | {mtu} | {:.0} | {:.0} | {:.0} | {:.0} |",
                figures.to,
                figures.from,
                figures.round_trip.as_secs_f64() * 1e6,
                figures.connections
            );
        }
        println!(
            "| ours / theirs | {mtu} | {:.2} | {:.2} | {:.2} | {:.2} |",
            ours.to / theirs.to,
            ours.from / theirs.from,
            ours.round_trip.as_secs_f64() / theirs.round_trip.as_secs_f64(),
            ours.connections / theirs.connections
        );
        fs::remove_dir_all(host.work().join("bundle"))?;
    }
    Ok(())
}
