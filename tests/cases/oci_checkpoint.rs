//! `bulkhead-oci checkpoint` and `restore`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::console::ConsoleSocket;
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Finished, Program};
use bulkhead_tests::test;
use rustix::process::Signal;
use serde_json::json;

use crate::network::prepare;
use crate::oci::{Bundle, NEEDS};

const OURS: &str = "bulkhead-oci";
const PATIENCE: Duration = Duration::from_secs(20);
/// Counts in memory, and says each number with a random word, to its output and to a file that it keeps open. Ends with status
/// 5 when asked to.
const COUNTER: &str = "exec 3>>/said; i=0; trap 'echo told >&3; exit 5' TERM; while :; do i=$((i+1)); \
    w=$(cat /proc/sys/kernel/random/uuid); echo $i $w; echo $i $w >&3; sleep 0.05; done";

/// A bundle of a small machine.
fn bundle(host: &Host, name: &str, script: &str) -> Result<Bundle> {
    let bundle = Bundle::named(host, OURS, name)?;
    bundle.runs(script)?;
    bundle.change(|config| config["annotations"] = json!({"dev.bulkhead.memory": "128"}))?;
    Ok(bundle)
}

fn path(host: &Host, name: &str) -> String {
    host.work().join(name).display().to_string()
}

type Said = Vec<(u64, String)>;

fn said(file: &Path) -> Result<Said> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.map(|(number, word)| Ok((number.parse()?, word.to_owned()))).collect()
}

fn says_more(host: &Host, file: &Path, than: usize) -> Result<()> {
    host.eventually("more to be said", PATIENCE, || Ok(said(file)?.len() > than + 3))
}

/// Each number follows the one before. Answers the first.
fn counts(said: &Said) -> Result<u64> {
    let first = said.first().context("it said nothing")?.0;
    for ((number, _), wanted) in said.iter().zip(first..) {
        ensure!(*number == wanted, "{number} came where {wanted} should: {said:?}");
    }
    Ok(first)
}

fn left_in(directory: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(directory)?;
    let mut names: Vec<_> =
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

test!(a_container_goes_on_from_its_checkpoint_under_any_id, NEEDS.deadline(120));
fn a_container_goes_on_from_its_checkpoint_under_any_id(host: &Host) -> Result<()> {
    let one = bundle(host, "1", COUNTER)?;
    let (out, file) = (one.dir.join("out"), one.dir.join("rootfs/said"));
    one.apart(&["run", "-d", "c1"])?;
    says_more(host, &file, 0)?;

    // It goes on. The directory may be there already, if it is empty, and those that it is in need not.
    let (early, late) = (path(host, "early"), path(host, "images/of/late"));
    fs::create_dir(&early)?;
    one.call(&["checkpoint", "--leave-running", "--image-path", &early, "c1"])?.ok()?;
    ensure!(left_in(Path::new(&early))? == ["checkpoint.json", "machine"]);
    let at_early = said(&file)?.len();
    says_more(host, &file, at_early)?;
    ensure!(one.status("c1")? == "running");

    // It ends, and is removed as by runc.
    let flags = ["--tcp-established", "--shell-job", "--file-locks", "--ext-unix-sk"];
    let words =
        ["checkpoint", "--image-path", &late, "--work-path", "/nowhere", "--manage-cgroups-mode", "soft"];
    one.call(&[&words[..], &flags, &["c1"]].concat())?.ok()?;
    one.call(&["state", "c1"])?.failed()?.stderr_has("does not exist")?;
    one.nothing_left()?;
    let (before, at_late) = (said(&out)?, said(&file)?.len());

    // The same one again, to go on with what it had in memory and with the file it had open.
    let pid = path(host, "pid");
    one.apart(&["restore", "-d", "--no-subreaper", "--pid-file", &pid, "--image-path", &late, "c1"])?;
    says_more(host, &file, at_late)?;
    says_more(host, &out, 0)?;
    let state = one.state("c1")?;
    let pid: i64 = fs::read_to_string(&pid)?.parse()?;
    ensure!(state["status"] == "running" && state["pid"] == pid, "{state}");
    ensure!(counts(&said(&file)?)? == 1, "the file has a gap");
    let after = said(&out)?;
    let last = before.last().context("nothing")?.0;
    ensure!(counts(&after)? <= last + 1 && counts(&after)? > 1, "{before:?}, {after:?}");
    one.call(&["exec", "c1", "sh", "-c", "echo in; test -e /proc/1 && uname -r"])?
        .ok()?
        .stdout_has("in\n")?;
    one.call(&["ps", "c1"])?.ok()?.stdout_has("sleep")?;
    one.call(&["events", "--stats", "c1"])?.ok()?.stdout_has("pids")?;
    one.call(&["pause", "c1"])?.ok()?;
    ensure!(one.status("c1")? == "paused");

    // Another, beside it, in another bundle, from the earlier image; and a third, attached, from the same.
    let two = bundle(host, "2", "exit 99")?;
    // With all that the guest has looked at, which the directories are that things were mounted on.
    fs::remove_dir_all(two.dir.join("rootfs"))?;
    host.run(["cp".into(), "-a".into(), one.dir.join("rootfs"), two.dir.join("rootfs")])?.ok()?;
    two.apart(&["restore", "--detach", "--image-path", &early, "c2"])?;
    says_more(host, &two.dir.join("out"), 0)?;
    let third = two.program(&["restore", "--image-path", &early, "-b", &two.dir.display().to_string(), "c3"]);
    let third = third.spawn()?;
    third.wait_for("-", PATIENCE)?;
    two.call(&["exec", "c3", "cat", "/proc/1/comm"])?.ok()?.stdout_is("sh\n")?;

    // One that is suspended is saved as well, and runs when it goes on.
    let paused = path(host, "paused");
    one.call(&["checkpoint", "--leave-running", "--image-path", &paused, "c1"])?.ok()?;
    ensure!(one.status("c1")? == "paused");
    one.call(&["resume", "c1"])?.ok()?;
    says_more(host, &out, said(&out)?.len())?;
    one.call(&["kill", "c1", "TERM"])?.ok()?;
    one.wait_for(host, "c1", "stopped")?;
    ensure!(fs::read_to_string(&file)?.ends_with("told\n"));
    one.call(&["delete", "c1"])?.ok()?;
    let first = said(&out)?;
    fs::write(&file, "")?;
    one.apart(&["restore", "-d", "--image-path", &paused, "c1"])?;
    says_more(host, &out, 0)?;
    one.call(&["kill", "c1", "KILL"])?.ok()?;
    one.wait_for(host, "c1", "stopped")?;
    one.call(&["delete", "c1"])?.ok()?;

    two.call(&["kill", "c3", "TERM"])?.ok()?;
    let third = third.wait()?.status_is(5)?;
    fs::write(two.dir.join("third"), third.stdout())?;
    two.call(&["delete", "--force", "c2"])?.ok()?;
    one.nothing_left()?;

    // No two of them have said the same word.
    let mut words = BTreeSet::new();
    let all = [before, first, said(&out)?, said(&two.dir.join("out"))?, said(&two.dir.join("third"))?];
    for said in &all {
        counts(said)?;
        for (number, word) in said {
            ensure!(words.insert(word.clone()), "{number} {word} was said twice");
        }
    }
    for image in [early, paused, path(host, "images")] {
        fs::remove_dir_all(image)?;
    }
    Ok(())
}

test!(a_terminal_is_connected_anew, NEEDS.deadline(60));
fn a_terminal_is_connected_anew(host: &Host) -> Result<()> {
    let bundle = bundle(host, "t", "exec sh")?;
    bundle.change(|config| config["process"]["terminal"] = true.into())?;
    let socket = ConsoleSocket::listen(bundle.dir.join("tty"))?;
    bundle.apart(&["run", "-d", "--console-socket", &socket.path(), "c1"])?;
    let mut console = socket.take()?;
    console.wait_for("# ", PATIENCE)?;
    console.send("x=kept; cd /bin\n")?;
    console.wait_for("# ", PATIENCE)?;
    let image = path(host, "image");
    bundle.call(&["checkpoint", "--image-path", &image, "c1"])?.ok()?;
    console.finish();
    let words = ["restore", "-d", "--image-path", &image];
    bundle.call(&[&words[..], &["c1"]].concat())?.failed()?.stderr_has("console socket")?;
    bundle.apart(&[&words[..], &["--console-socket", &socket.path(), "c1"]].concat())?;
    let mut console = socket.take()?;
    console.resize(33, 101)?;
    host.eventually("the terminal's size", PATIENCE, || {
        console.send("echo $x-$PWD $(stty size)\n")?;
        Ok(console.wait_for("kept-/bin 33 101\r\n", Duration::from_millis(200)).is_ok())
    })?;
    console.send("exit 7\n")?;
    bundle.wait_for(host, "c1", "stopped")?;
    console.finish();
    bundle.call(&["delete", "c1"])?.ok()?;
    Ok(fs::remove_dir_all(image)?)
}

test!(what_cannot_be_is_refused_and_the_container_runs_on, NEEDS.deadline(120));
fn what_cannot_be_is_refused_and_the_container_runs_on(host: &Host) -> Result<()> {
    let one = bundle(host, "1", COUNTER)?;
    let file = one.dir.join("rootfs/said");
    let image = path(host, "image");
    let refused = |words: &[&str], word: &str| -> Result<()> {
        one.call(words)?.status_is(1)?.stderr_has(word).map(drop)
    };
    one.apart(&["create", "c1"])?;
    refused(&["checkpoint", "--image-path", &image, "c1"], "created")?;
    refused(&["checkpoint", "--image-path", &image, "nosuch"], "does not exist")?;
    one.call(&["start", "c1"])?.ok()?;
    says_more(host, &file, 0)?;
    for flag in
        ["--pre-dump", "--lazy-pages", "--page-server=1.2.3.4:5", "--parent-path=../p", "--status-fd=3"]
    {
        refused(&["checkpoint", "--image-path", &image, flag, "c1"], flag.split('=').next().unwrap_or(flag))?;
    }
    refused(
        &["checkpoint", "--image-path", &image, "--manage-cgroups-mode", "hard", "c1"],
        "manage-cgroups-mode",
    )?;
    refused(&["checkpoint", "--image-path", &image, "--empty-ns", "pid", "c1"], "--empty-ns pid")?;
    refused(&["checkpoint", "--image-path", &one.dir.display().to_string(), "c1"], "exists already")?;
    let config = one.dir.join("config.json").display().to_string();
    refused(&["checkpoint", "--image-path", &config, "c1"], "cannot make the snapshot")?;
    // A disk that is full.
    let disk = host.small_disk(4096)?;
    refused(
        &["checkpoint", "--image-path", &disk.path().join("a/b").display().to_string(), "c1"],
        "No space left",
    )?;
    ensure!(left_in(disk.path())?.iter().all(|name| name == "lost+found"), "{:?}", left_in(disk.path())?);
    drop(disk);
    // A pod of two.
    let pid = one.state("c1")?["pid"].to_string();
    let two = bundle(host, "2", "exec sleep 1000")?;
    two.change(|config| {
        config["linux"]["namespaces"] =
            json!([{"type": "network", "path": format!("/proc/{pid}/ns/net")}, {"type": "pid"}, {"type": "mount"}]);
    })?;
    two.apart(&["run", "-d", "c2"])?;
    refused(&["checkpoint", "--image-path", &image, "c2"], "microVM of container c1")?;
    refused(&["checkpoint", "--image-path", &image, "c1"], "c2")?;
    two.call(&["delete", "--force", "c2"])?.ok()?;
    let before = said(&file)?.len();
    says_more(host, &file, before)?;
    ensure!(!Path::new(&image).exists());

    // In the caller's directory when nobody says where.
    one.call(&["checkpoint", "c1"])?.ok()?;
    one.nothing_left()?;
    let image = one.dir.join("checkpoint");
    let restore = |words: &[&str], word: &str| -> Result<()> {
        one.call(&[&["restore", "-d"], words, &["c1"]].concat())?.status_is(1)?.stderr_has(word)?;
        one.nothing_left()
    };
    restore(&["--image-path", &path(host, "nosuch")], "no checkpoint")?;
    restore(&["--image-path", &one.dir.display().to_string()], "no checkpoint")?;
    restore(&["--lazy-pages"], "--lazy-pages")?;
    damaged(&image, &restore)?;
    // A bundle with other files of the host, or a terminal.
    one.change(|config| {
        let bind = json!({"destination": "/mnt", "type": "bind", "source": "/etc", "options": ["bind"]});
        config["mounts"].as_array_mut().map(|mounts| mounts.push(bind)).unwrap_or_default();
    })?;
    restore(&[], "/mnt")?;
    one.change(|config| {
        config["mounts"].as_array_mut().map(|mounts| drop(mounts.pop())).unwrap_or_default();
        config["process"]["terminal"] = true.into();
    })?;
    restore(&["--console-socket", "/nowhere"], "terminal")?;
    one.change(|config| config["process"]["terminal"] = false.into())?;
    // A file that it had open and that has gone.
    fs::rename(&file, one.dir.join("said"))?;
    restore(&[], "virtiofsd")?;
    fs::rename(one.dir.join("said"), &file)?;
    // After all of that it goes on; and its id is in use then.
    one.apart(&["restore", "-d", "c1"])?;
    let before = said(&file)?.len();
    says_more(host, &file, before)?;
    one.call(&["restore", "-d", "c1"])?.status_is(1)?.stderr_has("already exists")?;
    one.call(&["delete", "--force", "c1"])?.ok()?;
    one.nothing_left()
}

/// Each damage to an image is found before anything of a container is there.
fn damaged(image: &Path, restore: &dyn Fn(&[&str], &str) -> Result<()>) -> Result<()> {
    let spoil = |name: &str, change: &dyn Fn(&mut Vec<u8>), word: &str| -> Result<()> {
        let path = image.join(name);
        let good = fs::read(&path)?;
        let mut bytes = good.clone();
        change(&mut bytes);
        fs::write(&path, bytes)?;
        restore(&[], word)?;
        Ok(fs::write(&path, good)?)
    };
    let flip = |bytes: &mut Vec<u8>| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    };
    let half = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2);
    spoil("machine/state", &flip, "checksum")?;
    spoil("machine/state", &half, "cut off")?;
    spoil("checkpoint.json", &half, "damaged")?;
    let text = fs::read_to_string(image.join("checkpoint.json"))?;
    let newer = text.replacen("\"version\": 1", "\"version\": 2", 1);
    spoil("checkpoint.json", &|bytes| *bytes = newer.clone().into_bytes(), "of version 2")?;
    let other = text.replacen("\"memoryMib\": 128", "\"memoryMib\": 129", 1);
    spoil("checkpoint.json", &|bytes| *bytes = other.clone().into_bytes(), "checksum")?;
    let (memory, aside) = (image.join("machine/memory"), image.join("aside"));
    fs::rename(&memory, &aside)?;
    restore(&[], "memory")?;
    fs::copy("/bin/true", &memory)?;
    restore(&[], "cut off")?;
    Ok(fs::rename(aside, memory)?)
}

test!(whoever_is_killed_during_a_checkpoint_nothing_half_made_stays, NEEDS.deadline(120));
fn whoever_is_killed_during_a_checkpoint_nothing_half_made_stays(host: &Host) -> Result<()> {
    // Memory that takes a moment to write.
    let large = "dd if=/dev/urandom of=/dev/shm/x bs=1M count=48 2>/dev/null; exec 3>>/said; i=0; \
        while :; do i=$((i+1)); echo $i x >&3; sleep 0.1; done";
    let one = bundle(host, "1", large)?;
    one.applets(&["dd"])?;
    let file = one.dir.join("rootfs/said");
    one.apart(&["run", "-d", "c1"])?;
    says_more(host, &file, 0)?;
    let images = host.work().join("images");
    fs::create_dir(&images)?;
    let image = images.join("image");
    let begin = |flags: &[&str]| {
        let at = image.display().to_string();
        let words = [&["checkpoint", "--image-path", &at], flags, &["c1"]].concat();
        let saving = one.program(&words).spawn()?;
        host.eventually("the checkpoint to begin", PATIENCE, || {
            Ok(images.join("image.partial/machine.partial/memory").exists() || image.exists())
        })?;
        Ok::<_, anyhow::Error>(saving)
    };
    for signal in [Signal::TERM, Signal::KILL] {
        // To the end with one that would end the container.
        let mut saving = begin(&[])?;
        ensure!(!saving.ended()?, "it was too quick");
        saving.signal(signal)?;
        ensure!(saving.wait()?.status != 0, "it was saved all the same");
        let before = said(&file)?.len();
        says_more(host, &file, before)?;
        if signal == Signal::TERM {
            ensure!(left_in(&images)?.is_empty(), "{:?}", left_in(&images)?);
        }
    }
    // What SIGKILL left is no hindrance, and goes.
    let saving = begin(&["--leave-running"])?;
    saving.wait()?.ok()?;
    ensure!(left_in(&images)? == ["image"], "{:?}", left_in(&images)?);
    fs::remove_dir_all(&image)?;

    let saving = begin(&[])?;
    let monitor = fs::read_to_string(PathBuf::from(format!("/proc/{}/status", one.state("c1")?["pid"])))?;
    ensure!(monitor.contains("bulkhead-oci"), "{monitor}");
    host.run(["killall", "-9", "bulkhead-vmm"])?.ok()?;
    saving.wait()?.status_is(1)?;
    ensure!(left_in(&images)?.is_empty(), "{:?}", left_in(&images)?);
    one.wait_for(host, "c1", "stopped")?;
    one.call(&["delete", "c1"])?.ok()?;
    one.nothing_left()
}

test!(it_goes_on_in_the_network_that_it_finds, NEEDS.deadline(120));
fn it_goes_on_in_the_network_that_it_finds(host: &Host) -> Result<()> {
    let network = prepare(host, 1500)?;
    let ip = |words: &str| Program::new(["ip"]).args(words.split_whitespace()).run()?.ok();
    // A connection that is open throughout, and that says what it is told.
    let one =
        bundle(host, "1", "exec nc 10.9.0.1 7001 -e sh -c 'echo hello; while read x; do echo got-$x; done'")?;
    one.applets(&["nc", "ip"])?;
    let join = |bundle: &Bundle, name: &str| {
        bundle.change(|config| {
            config["linux"]["namespaces"] = json!([
                {"type": "network", "path": format!("/run/netns/{name}")}, {"type": "pid"}, {"type": "mount"}
            ]);
        })
    };
    join(&one, "box")?;
    let mut peer = Program::new(["busybox", "nc", "-l", "-p", "7001"]).open_stdin().spawn()?;
    one.apart(&["run", "-d", "c1"])?;
    peer.wait_for("hello", PATIENCE)?;
    let mac = ip("-n box -o link show eth0")?.stdout();
    let mac = mac.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).context("no MAC")?;
    let image = path(host, "image");
    one.call(&["checkpoint", "--tcp-established", "--image-path", &image, "c1"])?.ok()?;

    // Into a new namespace with the same address: the connection is there still.
    ip("netns delete box")?;
    host.eventually("the old link to be gone", PATIENCE, || {
        Ok(host.run(["ip", "link", "show", "v0"])?.status != 0)
    })?;
    ip("netns add box")?;
    let again = format!(
        "link add v0 type veth peer name eth0 address {mac} netns box
         address add 10.9.0.1/24 dev v0
         link set v0 up
         -n box link set lo up
         -n box address add 10.9.0.2/24 dev eth0
         -n box address add fd09::2/64 dev eth0 nodad
         -n box link set eth0 up
         -n box route add default via 10.9.0.1"
    );
    again.lines().try_for_each(|line| ip(line).map(drop))?;
    one.apart(&["restore", "-d", "--image-path", &image, "c1"])?;
    peer.send("there\n")?;
    peer.wait_for("got-there", PATIENCE)?;
    let shown = |id: &str, name: &str| -> Result<Finished> {
        one.call(&["exec", id, "ip", "-o", "address", "show", "dev", name])?.ok()
    };
    shown("c1", "eth0")?.stdout_has("10.9.0.2/24")?;
    one.call(&["delete", "--force", "c1"])?.ok()?;
    peer.signal(Signal::TERM)?;
    peer.wait()?;

    // Into one with another address, name, MTU and MAC: they are its own then, and the old ones are gone.
    ip("netns add other")?;
    let other = "link add v1 mtu 1400 type veth peer name net7 netns other mtu 1400
         address add 10.8.0.1/24 dev v1
         link set v1 up
         -n other link set lo up
         -n other address add 10.8.0.7/24 dev net7
         -n other link set net7 up
         -n other route add default via 10.8.0.1";
    other.lines().try_for_each(|line| ip(line).map(drop))?;
    join(&one, "other")?;
    one.apart(&["restore", "-d", "--image-path", &image, "c2"])?;
    shown("c2", "net7")?.stdout_has("10.8.0.7/24")?.stdout_lacks("10.9.0.2")?.stdout_lacks("fd09::2")?;
    one.call(&["exec", "c2", "ip", "link", "show", "net7"])?.ok()?.stdout_has("mtu 1400")?;
    one.call(&["exec", "c2", "ip", "route"])?
        .ok()?
        .stdout_has("default via 10.8.0.1")?
        .stdout_lacks("10.9.0.")?;
    host.run(["ping", "-c", "1", "-W", "5", "10.8.0.7"])?.ok()?;
    one.call(&["delete", "--force", "c2"])?.ok()?;

    // None, where there was one.
    one.change(|config| {
        config["linux"]["namespaces"] = json!([{"type": "network"}, {"type": "pid"}, {"type": "mount"}])
    })?;
    one.call(&["restore", "-d", "--image-path", &image, "c3"])?
        .status_is(1)?
        .stderr_has("network interfaces: eth0")?;
    one.nothing_left()?;
    ip("netns delete other")?;
    drop(network);
    Ok(fs::remove_dir_all(image)?)
}

test!(figures, NEEDS.deadline(120).shows_output());
fn figures(host: &Host) -> Result<()> {
    let one = bundle(host, "1", COUNTER)?;
    one.change(|config| config["annotations"] = json!({}))?;
    let file = one.dir.join("rootfs/said");
    one.apart(&["run", "-d", "c1"])?;
    says_more(host, &file, 0)?;
    let image = path(host, "image");
    let start = Instant::now();
    let words = ["--debug", "checkpoint", "--image-path", &image, "c1"];
    let said_by = one.call(&words)?.ok()?.stderr();
    let took = start.elapsed();
    let line = said_by.lines().find(|line| line.contains("stood still")).context("no figures")?;
    println!("checkpoint of 512 MiB: {:.0} ms; {line}", took.as_secs_f64() * 1e3);
    let size = host.run(["du", "-k", "-s", &image])?.ok()?.stdout();
    println!("its image: {} KiB", size.split_whitespace().next().unwrap_or_default());
    let start = Instant::now();
    one.apart(&["restore", "-d", "--image-path", &image, "c1"])?;
    println!("restore -d: {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
    one.call(&["delete", "--force", "c1"])?.ok()?;
    Ok(fs::remove_dir_all(image)?)
}
