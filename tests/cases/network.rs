//! Containers in network namespaces that somebody has prepared, and networks through passt.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Finished, Program};
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;
use rustix::process::{Pid, Signal, kill_process};

use crate::BUSYBOX;

/// Namespaces and links made for a test, removed at its end.
pub struct Prepared<'h> {
    host: &'h Host,
    namespaces: Vec<String>,
}

impl Prepared<'_> {
    /// `ip WORDS`.
    fn ip(&self, words: &str) -> Result<Finished> {
        Program::new(["ip"]).args(words.split_whitespace()).run()?.ok()
    }

    fn lines(&self, lines: &str) -> Result<()> {
        lines
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .try_for_each(|line| self.ip(line).map(drop))
    }

    /// `--network ns:…` of namespace number `number`.
    pub fn flag(&self, number: usize) -> String {
        format!("--network=ns:/run/netns/{}", self.namespaces[number])
    }

    /// `bulkhead run --rm` in namespace 0.
    fn shell(&self, script: &str) -> Result<Finished> {
        crate::shell(self.host, &[&self.flag(0)], script)
    }

    /// Nothing of a sandbox is in namespace `number`.
    fn is_clean(&self, number: usize) -> Result<()> {
        let name = &self.namespaces[number];
        self.ip(&format!("netns exec {name} ip link show"))?.stdout_lacks("bh")?;
        self.ip(&format!("netns exec {name} tc qdisc show"))?.stdout_lacks("ingress")?;
        Ok(())
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        // At once: a namespace's own links go some time after it.
        let _ = Program::new(["ip", "link", "delete", "v0"]).run();
        for name in &self.namespaces {
            let _ = Program::new(["ip", "netns", "delete", name]).run();
        }
        // `ip netns` makes it a mount of its own.
        let _ = Program::new(["umount", "/run/netns"]).run();
        let _ = fs::remove_dir("/run/netns");
    }
}

/// Namespace `box` with eth0, joined to the host's v0: 10.9.0.2 and fd09::2, the host is 10.9.0.1 and fd09::1.
pub fn prepare(host: &Host, mtu: u32) -> Result<Prepared<'_>> {
    let prepared = Prepared { host, namespaces: vec!["box".into()] };
    prepared.lines(&format!(
        "netns add box
         link add v0 mtu {mtu} type veth peer name eth0 netns box mtu {mtu}
         address add 10.9.0.1/24 dev v0
         address add fd09::1/64 dev v0 nodad
         link set v0 up
         -n box link set lo up
         -n box address add 10.9.0.2/24 dev eth0
         -n box address add fd09::2/64 dev eth0 nodad
         -n box link set eth0 up
         -n box route add default via 10.9.0.1
         -n box route add default via fd09::1"
    ))?;
    Ok(prepared)
}

test!(the_container_has_the_namespaces_network, BUSYBOX.deadline(60));
fn the_container_has_the_namespaces_network(host: &Host) -> Result<()> {
    let prepared = prepare(host, 1500)?;
    prepared.lines(
        "-n box route add 10.77.0.0/16 via 10.9.0.1 metric 50
         -n box route add 10.78.0.0/16 via 192.0.2.1 dev eth0 onlink
         -n box route add fd77::/64 via fd09::1
         -n box neighbour add 10.9.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent",
    )?;
    let link = prepared.ip("-n box -o link show eth0")?.stdout();
    let mac = link.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).context("no MAC")?;
    let script = "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; ip addr show; ip route; ip -6 route; \
                  ip neigh; cat /etc/hosts; ls /sys/class/net";
    let run = prepared.shell(script)?.ok()?.stdout_has(mac)?.stdout_has("1500\n")?;
    let run =
        run.stdout_has("inet 10.9.0.2/24")?.stdout_has("inet6 fd09::2/64")?.stdout_lacks("tentative")?;
    let run = run.stdout_has("default via 10.9.0.1")?.stdout_has("default via fd09::1")?;
    let run = run
        .stdout_has("10.77.0.0/16 via 10.9.0.1 dev eth0  metric 50")?
        .stdout_has("fd77::/64 via fd09::1")?;
    let run =
        run.stdout_has("10.78.0.0/16 via 192.0.2.1 dev eth0 onlink")?.stdout_has("02:00:00:00:00:77")?;
    run.stdout_has("10.9.0.2\t")?.stdout_has("fd09::2\t")?.stdout_has("eth0\nlo\n")?;
    prepared.is_clean(0)
}

test!(both_sides_reach_each_other, BUSYBOX.deadline(60));
fn both_sides_reach_each_other(host: &Host) -> Result<()> {
    let prepared = prepare(host, 1500)?;
    let script = "ping -c 3 -i 0.2 -W 5 10.9.0.1 && ping -c 3 -i 0.2 -W 5 fd09::1 && ping -c 2 -i 0.2 -s 20000 10.9.0.1";
    prepared.shell(script)?.ok()?.stdout_has("3 packets transmitted, 3 packets received")?;

    let server = "mkdir /www; echo served >/www/f; exec httpd -f -p 80 -h /www";
    let flag = prepared.flag(0);
    let run = ["run", "-d", "--rm", "--name", "server", flag.as_str(), "busybox", "sh", "-c", server];
    host.bulkhead(run)?.ok()?;
    for address in ["10.9.0.2", "[fd09::2]"] {
        host.eventually("the container serves", Duration::from_secs(20), || {
            let get = host.run(["wget", "-q", "-O", "-", &format!("http://{address}/f")])?;
            Ok(get.status == 0 && get.stdout() == "served\n")
        })?;
    }
    host.run(["ping", "-c", "2", "-i", "0.2", "10.9.0.2"])?.ok()?;
    host.run(["ping", "-6", "-c", "2", "-i", "0.2", "fd09::2"])?.ok()?;
    host.bulkhead(["exec", "server", "ip", "addr", "show", "eth0"])?.ok()?.stdout_has("10.9.0.2")?;
    host.bulkhead(["rm", "-f", "server"])?.ok()?;
    prepared.is_clean(0)
}

const UDP_ECHO: &str = "import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(('::', 5353))
print('up', flush=True)
while True:
    data, peer = s.recvfrom(70000)
    s.sendto(data, peer)";

test!(datagrams_of_all_sizes, Needs::bulkhead().images(&["python"]).deadline(60));
fn datagrams_of_all_sizes(host: &Host) -> Result<()> {
    let prepared = prepare(host, 1500)?;
    let run = host.bulkhead_program([
        "run",
        "--rm",
        "--name",
        "echo",
        &prepared.flag(0),
        "python",
        "python3",
        "-c",
        UDP_ECHO,
    ]);
    let run = run.spawn()?;
    run.wait_for("up", Duration::from_secs(20))?;
    for (own, address) in [("10.9.0.1:0", "10.9.0.2:5353"), ("[fd09::1]:0", "[fd09::2]:5353")] {
        let socket = UdpSocket::bind(own)?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        socket.connect(address)?;
        // Also empty, of an odd length, and of several fragments.
        for size in [0, 1, 2, 511, 1472, 1473, 9001, 60_001] {
            let data: Vec<u8> = (0..size).map(|i| (i % 253) as u8).collect();
            let mut back = vec![0; 70_000];
            socket.send(&data)?;
            let length = socket.recv(&mut back).with_context(|| format!("{size} bytes to {address}"))?;
            ensure!(back[..length] == data, "{size} bytes to {address} came back as {length} others");
        }
    }
    host.bulkhead(["rm", "-f", "echo"])?.ok()?;
    run.wait()?;
    prepared.is_clean(0)
}

test!(many_small_connections, BUSYBOX.deadline(120));
fn many_small_connections(host: &Host) -> Result<()> {
    let prepared = prepare(host, 1500)?;
    fs::create_dir_all(host.work().join("www"))?;
    host.file("www/f", "x")?;
    let server =
        Program::new(["httpd", "-f", "-p", "10.9.0.1:8000", "-h"]).args([host.work().join("www")]).spawn()?;
    let script =
        "i=0; while [ $i -lt 300 ]; do wget -q -O - http://10.9.0.1:8000/f || exit 1; i=$((i+1)); done";
    let run = prepared.shell(script)?.ok()?;
    ensure!(run.stdout == vec![b'x'; 300]);
    server.signal(Signal::KILL)?;
    server.wait()?;
    Ok(())
}

/// Accepts one connection within the test's patience.
fn accept(listener: &TcpListener) -> Result<TcpStream> {
    Ok(listener.accept()?.0)
}

/// Bytes of which no part can be taken for another of the same place in a packet.
fn pattern(length: usize) -> Vec<u8> {
    let block: Vec<u8> =
        (0..999_983_u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let mut bytes = block.repeat(length / block.len() + 1);
    bytes.truncate(length);
    bytes
}

/// What the container's web server at `address` has as `/b`.
fn fetch(address: &str) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"GET /b HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let head = answer.windows(4).position(|window| window == b"\r\n\r\n").context("no answer")?;
    Ok(answer.split_off(head + 4))
}

/// The container takes what it is sent on port 9000 and serves it.
const TAKE_AND_SERVE: &str = "mkdir /tmp/www; nc HOST 9000 </dev/null >/tmp/www/b; \
                              echo serving; exec httpd -f -p 80 -h /tmp/www";

/// 50 MB each way, and what arrived is what was sent.
fn bulk(host: &Host, mtu: u32) -> Result<()> {
    let prepared = prepare(host, mtu)?;
    let bytes = pattern(50_000_000);
    for (own, address) in [("10.9.0.1", "10.9.0.2:80"), ("fd09::1", "[fd09::2]:80")] {
        let listener = TcpListener::bind((own, 9000))?;
        let script = TAKE_AND_SERVE.replace("HOST", own);
        let flag = prepared.flag(0);
        let flags = ["run", "--rm", "--name", "bulk", &flag, "--tmpfs", "/tmp:size=100m", "--memory", "256m"];
        let run = host.bulkhead_program(flags).args(["busybox", "sh", "-c", &script]).spawn()?;
        accept(&listener)?.write_all(&bytes)?;
        run.wait_for("serving", Duration::from_secs(60))?;
        std::thread::sleep(Duration::from_millis(200));
        let back = fetch(address)?;
        ensure!(back == bytes, "{address}: {} bytes came back, and not those that were sent", back.len());
        host.bulkhead(["rm", "-f", "bulk"])?.ok()?;
        run.wait()?;
    }
    prepared.is_clean(0)
}

test!(bulk_transfers_arrive_intact, BUSYBOX.deadline(60));
fn bulk_transfers_arrive_intact(host: &Host) -> Result<()> {
    bulk(host, 1500)
}

test!(bulk_transfers_with_a_small_mtu, BUSYBOX.deadline(60));
fn bulk_transfers_with_a_small_mtu(host: &Host) -> Result<()> {
    bulk(host, 1280)
}

test!(bulk_transfers_with_a_large_mtu, BUSYBOX.deadline(60));
fn bulk_transfers_with_a_large_mtu(host: &Host) -> Result<()> {
    bulk(host, 9000)
}

test!(mtus_are_those_of_the_namespace, BUSYBOX.deadline(60));
fn mtus_are_those_of_the_namespace(host: &Host) -> Result<()> {
    for mtu in [1280, 9000] {
        let prepared = prepare(host, mtu)?;
        // One packet that just fits, both ways.
        let script = format!("cat /sys/class/net/eth0/mtu; ping -c 2 -i 0.2 -s {} 10.9.0.1", mtu - 28);
        prepared.shell(&script)?.ok()?.stdout_has(&format!("{mtu}\n"))?.stdout_has("2 packets received")?;
    }
    Ok(())
}

test!(several_interfaces_keep_their_names, BUSYBOX.deadline(60));
fn several_interfaces_keep_their_names(host: &Host) -> Result<()> {
    let prepared = prepare(host, 1500)?;
    // Named against the order in which they are made; one is down, one has no address.
    prepared.lines(
        "link add v1 type veth peer name aaa netns box
         address add 10.10.0.1/24 dev v1
         link set v1 up
         -n box address add 10.10.0.2/24 dev aaa
         -n box link set aaa up
         -n box link add eth1 type dummy
         -n box link add down0 type dummy
         -n box address add 10.11.0.2/24 dev down0
         -n box address add 10.12.0.2/24 dev eth1
         -n box link set eth1 up",
    )?;
    let script = "ls /sys/class/net; ping -c 1 10.10.0.1; ping -c 1 10.9.0.1; ip addr show";
    let run = prepared.shell(script)?.ok()?.stdout_has("aaa\neth0\neth1\nlo\n")?;
    run.stdout_has("inet 10.10.0.2/24 scope global aaa")?
        .stdout_has("inet 10.12.0.2/24 scope global eth1")?;
    prepared.is_clean(0)
}

test!(macvlan_and_ipvlan_links, BUSYBOX.deadline(90));
fn macvlan_and_ipvlan_links(host: &Host) -> Result<()> {
    for kind in ["macvlan mode bridge", "ipvlan mode l2", "ipvlan mode l3"] {
        let prepared = Prepared { host, namespaces: vec!["box".into(), "peer".into()] };
        let subnets = if kind.ends_with("l3") { ("10.9.1", "10.9.0") } else { ("10.9.0", "10.9.0") };
        // Two links of the same parent: one for the sandbox, one beside it.
        prepared.lines(&format!(
            "link add d0 type dummy
             link set d0 up
             netns add box
             netns add peer
             link add link d0 name eth0 netns box type {kind}
             link add link d0 name eth0 netns peer type {kind}
             -n box address add {}.2/24 dev eth0
             -n box link set eth0 up
             -n box route add default dev eth0
             -n peer address add {}.1/24 dev eth0
             -n peer link set eth0 up
             -n peer route add default dev eth0",
            subnets.0, subnets.1
        ))?;
        let result = prepared.shell("ping -c 3 -i 0.2 -W 3 10.9.0.1").and_then(Finished::ok);
        prepared.ip("link delete d0")?;
        result.with_context(|| kind.to_string())?.stdout_has("3 packets received")?;
    }
    Ok(())
}

test!(a_namespace_that_cannot_be_used_is_an_error, BUSYBOX.deadline(60));
fn a_namespace_that_cannot_be_used_is_an_error(host: &Host) -> Result<()> {
    let run = |network: &str| host.bulkhead(["run", "--rm", "--network", network, "busybox", "true"]);
    run("ns:/run/netns/nowhere")?
        .status_is(125)?
        .stderr_has("/run/netns/nowhere")?
        .stderr_has("no such file")?;
    run("ns:/etc/passwd")?.status_is(125)?.stderr_has("not a network namespace")?;
    run("ns:/proc/self/ns/mnt")?.status_is(125)?.stderr_has("not a network namespace")?;
    run("ns:/proc/1/ns/net")?.status_is(125)?.stderr_has("the host")?;
    run("ns:relative")?.failed()?.stderr_has("absolute")?;
    run("host")?.failed()?.stderr_has("kernel of its own")?;
    host.bulkhead(["run", "--rm", "-p", "80:80", "busybox", "true"])?.failed()?.stderr_has("passt")?;

    let prepared = prepare(host, 1500)?;
    // Somebody else's filters are left alone.
    Program::new(["ip", "netns", "exec", "box", "tc", "qdisc", "add", "dev", "eth0", "clsact"])
        .run()?
        .ok()?;
    prepared.shell("true")?.status_is(125)?.stderr_has("clsact")?.stderr_has("eth0")?;
    prepared.ip("netns exec box tc qdisc show dev eth0")?.stdout_has("clsact")?;
    Program::new(["ip", "netns", "exec", "box", "tc", "qdisc", "del", "dev", "eth0", "clsact"])
        .run()?
        .ok()?;
    // And so are interfaces that are no Ethernet.
    prepared.lines(
        "-n box tuntap add t0 mode tun
         -n box address add 10.13.0.1/24 dev t0
         -n box link set t0 up",
    )?;
    prepared.shell("true")?.status_is(125)?.stderr_has("t0")?.stderr_has("ethernet")?;
    prepared.is_clean(0)
}

test!(a_namespace_with_loopback_alone, BUSYBOX.deadline(60));
fn a_namespace_with_loopback_alone(host: &Host) -> Result<()> {
    let prepared = Prepared { host, namespaces: vec!["box".into()] };
    prepared.ip("netns add box")?;
    prepared
        .shell("ls /sys/class/net; ping -c 1 127.0.0.1")?
        .ok()?
        .stdout_has("lo\n")?
        .stdout_lacks("eth")?;
    Ok(())
}

test!(a_namespace_is_used_by_one_at_a_time, BUSYBOX.deadline(60));
fn a_namespace_is_used_by_one_at_a_time(host: &Host) -> Result<()> {
    let prepared = prepare(host, 1500)?;
    let flag = prepared.flag(0);
    host.bulkhead(["run", "-d", "--rm", "--name", "first", &flag, "busybox", "sleep", "1000"])?.ok()?;
    prepared.shell("true")?.status_is(125)?.stderr_has("another sandbox")?;
    // The first one has not been harmed.
    host.run(["ping", "-c", "1", "-W", "5", "10.9.0.2"])?.ok()?;
    host.bulkhead(["rm", "-f", "first"])?.ok()?;
    prepared.is_clean(0)?;
    prepared.shell("ping -c 1 10.9.0.1")?.ok()?;
    Ok(())
}

test!(a_killed_monitor_leaves_a_namespace_usable, BUSYBOX.deadline(90));
fn a_killed_monitor_leaves_a_namespace_usable(host: &Host) -> Result<()> {
    let prepared = prepare(host, 1500)?;
    let flag = prepared.flag(0);
    for supervisor in [false, true] {
        host.bulkhead(["run", "-d", "--name", "first", &flag, "busybox", "sleep", "1000"])?.ok()?;
        let record: serde_json::Value =
            serde_json::from_slice(&host.bulkhead(["inspect", "first"])?.ok()?.stdout)?;
        let key = if supervisor { "supervisor_pid" } else { "monitor_pid" };
        let pid = find(&record, key).with_context(|| format!("no {key} in {record}"))?;
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no pid")?;
        kill_process(pid, Signal::KILL)?;
        if supervisor {
            // Nobody has put anything away yet: the next one does.
            prepared.shell("ping -c 1 10.9.0.1")?.ok()?;
        }
        host.eventually("the first is known to have ended", Duration::from_secs(10), || {
            Ok(host.bulkhead(["ps"])?.stdout().lines().count() == 1)
        })?;
        host.bulkhead(["rm", "-f", "first"])?.ok()?;
        prepared.is_clean(0)?;
        prepared.shell("ping -c 1 10.9.0.1")?.ok()?;
    }
    Ok(())
}

/// The number behind `key`, wherever it is.
fn find(value: &serde_json::Value, key: &str) -> Option<i64> {
    match value {
        serde_json::Value::Object(fields) => fields
            .get(key)
            .and_then(serde_json::Value::as_i64)
            .or_else(|| fields.values().find_map(|v| find(v, key))),
        serde_json::Value::Array(values) => values.iter().find_map(|value| find(value, key)),
        _ => None,
    }
}

test!(names_are_resolved_as_asked, BUSYBOX.deadline(60));
fn names_are_resolved_as_asked(host: &Host) -> Result<()> {
    let prepared = prepare(host, 1500)?;
    let flag = prepared.flag(0);
    let run = crate::shell(
        host,
        &[&flag, "--dns", "192.0.2.53", "--hostname", "web"],
        "cat /etc/resolv.conf /etc/hosts",
    )?;
    run.ok()?
        .stdout_has("nameserver 192.0.2.53\n")?
        .stdout_has("10.9.0.2\tweb\n")?
        .stdout_has("127.0.0.1\tlocalhost\n")?;
    fs::create_dir_all("/etc/netns/box")?;
    fs::write("/etc/netns/box/resolv.conf", "nameserver 10.9.0.1\nsearch box.example\n")?;
    let run = prepared.shell("cat /etc/resolv.conf")?;
    fs::remove_dir_all("/etc/netns")?;
    run.ok()?.stdout_is("search box.example\nnameserver 10.9.0.1\n")?;
    Ok(())
}

/// A host with a connection to nowhere, which passt needs, removed at the test's end.
pub fn connected(host: &Host) -> Result<Prepared<'_>> {
    let prepared = Prepared { host, namespaces: vec!["unused".into()] };
    prepared.lines(
        "netns add unused
         link add up0 netns unused type veth peer name up0
         address add 192.0.2.2/24 dev up0
         link set up0 up
         -n unused link set up0 up
         route add default via 192.0.2.1 dev up0",
    )?;
    fs::write("/etc/resolv.conf", "nameserver 192.0.2.1\n")?;
    Ok(prepared)
}

test!(passt_needs_no_namespace, BUSYBOX.deadline(90));
fn passt_needs_no_namespace(host: &Host) -> Result<()> {
    let _prepared = connected(host)?;
    // 20 MB each way: out through a connection of the host's own, in through a published port.
    let bytes = pattern(20_000_000);
    let listener = TcpListener::bind("192.0.2.2:9000")?;
    // With wget: passt forgets what is on its way to a guest that has closed its side, as nc does here.
    let script = "cat /etc/resolv.conf; mkdir /tmp/www; wget -q -O /tmp/www/b http://192.0.2.2:9000/; \
                  echo serving; exec httpd -f -p 80 -h /tmp/www";
    let flags =
        ["run", "--rm", "--name", "bulk", "--network", "passt", "-p", "8082:80", "--tmpfs", "/tmp:size=100m"];
    let run = host.bulkhead_program(flags).args(["busybox", "sh", "-c", script]).spawn()?;
    let mut stream = accept(&listener)?;
    let _ = stream.read(&mut [0; 1000])?;
    stream.write_all(format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len()).as_bytes())?;
    stream.write_all(&bytes)?;
    drop(stream);
    run.wait_for("serving", Duration::from_secs(60))?;
    std::thread::sleep(Duration::from_millis(200));
    let back = fetch("127.0.0.1:8082")?;
    ensure!(back == bytes, "{} bytes came back, and not those that were sent", back.len());
    host.bulkhead(["rm", "-f", "bulk"])?.ok()?;
    run.wait()?.stdout_has("nameserver 10.0.2.3\n")?;

    // In: published ports, of one address and of all, TCP and UDP.
    let ports = ["-p", "8080:80", "-p", "127.0.0.1:8081:80", "-p", "5353:5353/udp"];
    let server = "mkdir /www; echo served >/www/f; exec httpd -f -p 80 -h /www";
    let program = host.bulkhead_program(["run", "-d", "--name", "server", "--network", "passt"]).args(ports);
    program.args(["busybox", "sh", "-c", server]).run()?.ok()?;
    for url in ["http://127.0.0.1:8080/f", "http://192.0.2.2:8080/f", "http://127.0.0.1:8081/f"] {
        host.eventually("the container serves", Duration::from_secs(20), || {
            Ok(host.run(["wget", "-q", "-O", "-", url])?.stdout() == "served\n")
        })?;
    }
    host.run(["wget", "-q", "-O", "-", "http://192.0.2.2:8081/f"])?.failed()?;
    // A port that is taken is an error that says so, and nothing is left.
    let taken = ["run", "--rm", "--network", "passt", "-p", "8080:80", "busybox", "true"];
    host.bulkhead(taken)?.status_is(125)?.stderr_has("8080")?;
    host.bulkhead(["rm", "-f", "server"])?.ok()?;
    // A machine of a pool has a passt of its own; one with ports must be made.
    host.bulkhead(["pool", "warm", "--image", "busybox", "--network", "passt"])?.ok()?;
    let look = "grep nameserver /etc/resolv.conf; ip address show eth0 | grep -o 10.0.2.15";
    let (said, taken) = crate::pool::traced(host, &["--network", "passt"], look)?;
    said.stdout_is("nameserver 10.0.2.3\n10.0.2.15\n")?;
    ensure!(taken && !crate::pool::traced(host, &["--network", "passt", "-p", "8080:80"], "true")?.1);
    host.bulkhead(["pool", "rm", "busybox"])?.ok()?;
    host.eventually("passt has ended", Duration::from_secs(10), || {
        Ok(host.run(["pidof", "passt", "passt.avx2"])?.status != 0)
    })?;
    host.run(["ip", "link", "delete", "up0"])?.ok()?;
    fs::remove_file("/etc/resolv.conf")?;
    Ok(())
}

test!(passt_carries_datagrams, Needs::bulkhead().images(&["python"]).deadline(60));
fn passt_carries_datagrams(host: &Host) -> Result<()> {
    let _prepared = connected(host)?;
    let run =
        host.bulkhead_program(["run", "--rm", "--name", "echo", "--network", "passt", "-p", "5300:5353/udp"]);
    let run = run.args(["python", "python3", "-c", UDP_ECHO]).spawn()?;
    run.wait_for("up", Duration::from_secs(20))?;
    let socket = UdpSocket::bind("192.0.2.2:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.connect("192.0.2.2:5300")?;
    for size in [1, 511, 9001] {
        let data: Vec<u8> = (0..size).map(|i| (i % 253) as u8).collect();
        let mut back = vec![0; 70_000];
        socket.send(&data)?;
        let length = socket.recv(&mut back).with_context(|| format!("{size} bytes"))?;
        ensure!(back[..length] == data, "{size} bytes came back as {length} others");
    }
    host.bulkhead(["rm", "-f", "echo"])?.ok()?;
    run.wait()?;
    host.run(["ip", "link", "delete", "up0"])?.ok()?;
    fs::remove_file("/etc/resolv.conf")?;
    Ok(())
}
