//! `bulkhead snapshot`, `restore` and `fork`: containers that are saved while they run, and copies that go on from there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;
use rustix::process::Signal;

use crate::BUSYBOX;
use crate::network::prepare;

/// Counts, and says a random number with each; ends with status 7 when told to.
const COUNTER: &str = "i=0; echo begun > /file; while [ ! -e /stop ]; do i=$((i+1)); \
    echo $i $(cat /proc/sys/kernel/random/uuid); sleep 0.05; done; echo stopped; exit 7";

const PATIENCE: Duration = Duration::from_secs(20);
/// Name of a snapshot that is only made.
const SNAPSHOT: &str = "saved";

fn start(host: &Host, name: &str, script: &str) -> Result<()> {
    host.bulkhead(["run", "-d", "--name", name, "busybox", "sh", "-c", script])?.ok()?;
    Ok(())
}

/// What a container said: each number, and the random word with it.
fn said(host: &Host, name: &str) -> Result<Vec<(u64, String)>> {
    let text = host.bulkhead(["logs", name])?.ok()?.stdout();
    parse(&text)
}

fn parse(text: &str) -> Result<Vec<(u64, String)>> {
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.map(|(number, word)| Ok((number.parse()?, word.to_owned()))).collect()
}

fn says_more(host: &Host, name: &str, than: usize) -> Result<()> {
    host.eventually(&format!("{name} to say more"), PATIENCE, || Ok(said(host, name)?.len() > than))
}

fn left_in(directory: &Path) -> Result<Vec<String>> {
    fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

test!(copies_go_on_where_the_container_was_and_none_is_like_another, BUSYBOX.deadline(120));
fn copies_go_on_where_the_container_was_and_none_is_like_another(host: &Host) -> Result<()> {
    start(host, "first", COUNTER)?;
    says_more(host, "first", 3)?;
    let snapshot = host.work().join(SNAPSHOT).display().to_string();
    let finished = host.bulkhead(["snapshot", "first", &snapshot])?.ok()?;
    finished.stderr_has("stood still for")?.stdout_is(&format!("{snapshot}\n"))?;
    let before = said(host, "first")?;
    ensure!(left_in(host.work())? == [SNAPSHOT], "{:?}", left_in(host.work())?);

    // The container goes on, and so does a copy in the background, each with a disk of its own.
    host.bulkhead(["restore", "-d", "--name", "second", &snapshot])?.ok()?;
    says_more(host, "second", 3)?;
    says_more(host, "first", before.len() + 3)?;
    host.bulkhead(["exec", "second", "sh", "-c", "cat /file; echo changed > /file"])?
        .ok()?
        .stdout_is("begun\n")?;
    host.bulkhead(["exec", "first", "cat", "/file"])?.ok()?.stdout_is("begun\n")?;
    let time = host.bulkhead(["exec", "second", "date", "+%s"])?.ok()?.stdout().trim().parse::<u64>()?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    ensure!(now.abs_diff(time) <= 2, "the copy has {time}, the host {now}");
    let name =
        |container| Ok::<_, anyhow::Error>(host.bulkhead(["exec", container, "hostname"])?.ok()?.stdout());
    ensure!(name("first")? == name("second")?, "a copy keeps its host name");

    // In the foreground, with its streams and its status; the snapshot serves as often as one likes.
    let third = host.bulkhead_program(["restore", "--rm", "--name", "third", &snapshot]).spawn()?;
    third.wait_for("-", Duration::from_secs(20))?;
    host.bulkhead(["exec", "third", "touch", "/stop"])?.ok()?;
    let third = third.wait()?.status_is(7)?.stdout_has("stopped")?;
    // A copy of the copy, and two at once.
    let forked = host.bulkhead(["fork", "-n", "2", "--name", "twin", "second"])?.ok()?;
    ensure!(forked.stdout().lines().count() == 2, "{}", forked.stdout());
    for twin in ["twin-1", "twin-2"] {
        says_more(host, twin, 3)?;
        host.bulkhead(["exec", twin, "cat", "/file"])?.ok()?.stdout_is("changed\n")?;
    }

    let mut words = BTreeSet::new();
    let mut all = vec![parse(&third.stdout())?];
    for container in ["first", "second", "twin-1", "twin-2"] {
        all.push(said(host, container)?);
    }
    for said in &all {
        let first = said.first().context("it said nothing")?.0;
        for ((number, word), wanted) in said.iter().zip(first..) {
            ensure!(*number == wanted, "{number} came where {wanted} should: {said:?}");
            ensure!(words.insert(word.clone()), "two containers said {word}");
        }
    }
    for copy in &all[..1] {
        let (first, last) = (copy[0].0, before.last().context("nothing")?.0);
        ensure!(first > 3 && first <= last + 1, "a copy begins with {first}, the container was at {last}");
    }

    // All verbs know a copy by its own name.
    host.bulkhead(["stats", "second"])?.ok()?.stdout_has("second")?;
    host.bulkhead(["top", "second"])?.ok()?.stdout_has("sleep")?;
    let file = host.work().join("copied");
    host.bulkhead(["cp", "second:/file", &file.display().to_string()])?.ok()?;
    ensure!(fs::read_to_string(&file)? == "changed\n");
    host.bulkhead(["stop", "-t", "1", "second"])?.ok()?;
    host.bulkhead(["wait", "second"])?.ok()?.stdout_is("137\n")?;
    host.bulkhead(["rm", "-f", "first", "second", "twin-1", "twin-2"])?.ok()?;
    fs::remove_file(file)?;
    Ok(fs::remove_dir_all(snapshot)?)
}

test!(directories_of_the_host_and_files_open_in_them_go_along, BUSYBOX.deadline(120));
fn directories_of_the_host_and_files_open_in_them_go_along(host: &Host) -> Result<()> {
    let shared = host.work().join("shared");
    fs::create_dir_all(shared.join("deep/er"))?;
    fs::write(shared.join("deep/er/input"), "first\nsecond\nthird\nfourth\n")?;
    let volume = format!("{}:/v", shared.display());
    let single = host.file("single", "of the host\n")?;
    let file = format!("{}:/single:ro", single.display());
    // Two files stay open throughout: one is read a line a step, one is written to.
    let script = "exec 3</v/deep/er/input 4>>/v/said; while [ ! -e /v/$(cat /name)-go ]; do sleep 0.05; done; \
        read line <&3; echo $line; while read line <&3; do echo $(cat /name) $line >&4; done; cat /single; exit 3";
    let mut words = vec!["run", "-d", "--name", "first", "-v", &volume, "-v", &file];
    let step = format!("echo first > /name; {script}");
    words.extend(["busybox", "sh", "-c", &step]);
    host.bulkhead(words)?.ok()?;
    host.eventually("the container to have opened its files", PATIENCE, || Ok(shared.join("said").exists()))?;
    let snapshot = host.work().join(SNAPSHOT).display().to_string();
    host.bulkhead(["snapshot", "first", &snapshot])?.ok()?;
    let copy = host.bulkhead_program(["restore", "--rm", "--name", "second", &snapshot]).spawn()?;
    host.eventually("the copy to run", PATIENCE, || {
        Ok(host.bulkhead(["exec", "second", "sh", "-c", "echo second > /name"])?.status == 0)
    })?;
    for name in ["second", "first"] {
        fs::write(shared.join(format!("{name}-go")), "")?;
        if name == "first" {
            host.bulkhead(["wait", "first"])?.ok()?.stdout_is("3\n")?;
        } else {
            host.eventually("the copy to end", PATIENCE, || {
                Ok(host.bulkhead(["ps", "-q"])?.stdout().lines().count() == 1)
            })?;
        }
    }
    copy.wait()?.status_is(3)?.stdout_is("first\nof the host\n")?;
    host.bulkhead(["logs", "first"])?.ok()?.stdout_is("first\nof the host\n")?;
    let said = fs::read_to_string(shared.join("said"))?;
    let wanted =
        ["second", "first"].map(|name| format!("{name} second\n{name} third\n{name} fourth\n")).concat();
    ensure!(said == wanted, "{said}");

    // What was open and is gone is an error that says so, and ends nothing but that copy.
    fs::remove_dir_all(shared.join("deep"))?;
    host.bulkhead(["restore", "--rm", &snapshot])?.status_is(125)?.stderr_has("virtiofsd")?;
    host.bulkhead(["rm", "first"])?.ok()?;
    fs::remove_dir_all(shared)?;
    fs::remove_file(single)?;
    Ok(fs::remove_dir_all(snapshot)?)
}

test!(a_directory_that_is_written_to_and_read_all_the_time_goes_along, BUSYBOX.deadline(240));
fn a_directory_that_is_written_to_and_read_all_the_time_goes_along(host: &Host) -> Result<()> {
    let shared = host.work().join("busy");
    fs::create_dir(&shared)?;
    let volume = format!("{}:/v", shared.display());
    // Three at once, each with a file that always has the same content: whoever has written it, it is right.
    let script = "seq 1 20000 > /tmp/right; sum=$(md5sum < /tmp/right); work() { i=0; while :; do \
        dd if=/tmp/right of=/v/$1 bs=16k conv=notrunc 2>/dev/null || echo $1 failed; echo 3 >/proc/sys/vm/drop_caches; \
        [ \"$(md5sum < /v/$1)\" = \"$sum\" ] || echo $1 wrong; i=$((i+1)); echo $i $1; done; }; work a & work b & work c & wait";
    let words =
        ["run", "-d", "--privileged", "--name", "first", "-v", &volume, "busybox", "sh", "-c", script];
    host.bulkhead(words)?.ok()?;
    // Each of the three has done so much.
    let does_more = |name: &str| -> Result<()> {
        let so_far = said(host, name)?;
        let count = |lines: &[(u64, String)], who: &str| lines.iter().filter(|(_, word)| word == who).count();
        host.eventually(&format!("{name} to work on"), PATIENCE, || {
            let now = said(host, name)?;
            Ok(["a", "b", "c"].iter().all(|who| count(&now, who) >= count(&so_far, who) + 2))
        })
    };
    does_more("first")?;
    let saved: Vec<String> =
        (0..2).map(|number| host.work().join(format!("busy-{number}")).display().to_string()).collect();
    for directory in &saved {
        host.bulkhead(["snapshot", "first", directory])?.ok()?;
        does_more("first")?;
    }
    host.bulkhead(["rm", "-f", "first"])?.ok()?;
    for directory in &saved {
        host.bulkhead(["restore", "-d", "--name", "copy", directory])?.ok()?;
        does_more("copy")?;
        let fork = host.bulkhead(["fork", "--name", "fork", "copy"])?.ok()?.stdout();
        ensure!(!fork.is_empty());
        does_more("fork")?;
        host.bulkhead(["rm", "-f", "copy", "fork"])?.ok()?;
        fs::remove_dir_all(directory)?;
    }
    Ok(fs::remove_dir_all(shared)?)
}

test!(what_does_not_fit_is_refused_and_leaves_nothing, BUSYBOX.deadline(120));
fn what_does_not_fit_is_refused_and_leaves_nothing(host: &Host) -> Result<()> {
    let shared = host.work().join("shared");
    fs::create_dir(&shared)?;
    host.run(["ip", "netns", "add", "nest"])?.ok()?;
    let network =
        ["run", "-d", "--name", "bound", "--network", "ns:/run/netns/nest", "busybox", "sleep", "1000"];
    host.bulkhead(network)?.ok()?;
    start(host, "good", "sleep 1000")?;
    let path = |name: &str| host.work().join(name).display().to_string();
    let refused =
        |words: &[&str], status, word| host.bulkhead(words)?.status_is(status)?.stderr_has(word).map(drop);
    refused(&["fork", "bound"], 1, "network namespace")?;
    refused(&["snapshot", "nosuch", &path("x")], 1, "no such container")?;
    refused(&["snapshot", "good", &path("shared")], 1, "exists already")?;
    refused(&["snapshot", "good", &path("no/such")], 1, "there is no directory")?;
    refused(&["fork", "-n", "0", "good"], 125, "0")?;
    refused(&["fork", "nosuch"], 1, "no such container")?;
    refused(&["fork", "--name", "bound", "good"], 1, "in use")?;
    refused(&["restore", &path("shared")], 125, "is no snapshot")?;
    // A disk that is full: the container runs, and nothing is left.
    let disk = host.small_disk(8192)?;
    let full = disk.path().join("saved").display().to_string();
    refused(&["snapshot", "good", &full], 1, "No space left")?;
    ensure!(left_in(disk.path())?.iter().all(|name| name == "lost+found"), "{:?}", left_in(disk.path())?);
    host.bulkhead(["exec", "good", "echo", "well"])?.ok()?.stdout_is("well\n")?;
    drop(disk);
    let good = path("good");
    host.bulkhead(["snapshot", "good", &good])?.ok()?;
    host.bulkhead(["rm", "-f", "bound"])?.ok()?;
    // The mount that ip makes for its names stays otherwise.
    host.run(["sh", "-c", "ip netns del nest; umount /run/netns; rmdir /run/netns"])?.ok()?;
    refused(&["snapshot", "good", &good], 1, "exists already")?;
    refused(&["restore", "--name", "good", &good], 125, "in use")?;
    refused(&["restore", "-p", "1:1", &good], 125, "-p")?;
    let file = |name: &str| PathBuf::from(&good).join(name);
    let flip = |name: &str| -> Result<()> {
        let mut bytes = fs::read(file(name))?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        Ok(fs::write(file(name), bytes)?)
    };
    flip("machine/state")?;
    refused(&["restore", &good], 125, "checksum")?;
    flip("machine/state")?;
    let told = fs::read_to_string(file("container.json"))?;
    fs::write(file("container.json"), told.replacen("\"version\": 1", "\"version\": 2", 1))?;
    refused(&["restore", &good], 125, "of version 2")?;
    fs::write(file("container.json"), &told[..told.len() / 2])?;
    refused(&["restore", &good], 125, "damaged")?;
    let digits: String =
        told.split("image_id\": \"sha256:").nth(1).context("no image")?.chars().take(64).collect();
    fs::write(file("container.json"), told.replace(&digits, &"0".repeat(64)))?;
    refused(&["restore", &good], 125, "not here")?;
    fs::write(file("container.json"), &told)?;
    let disk = fs::OpenOptions::new().write(true).open(file("machine/disk-scratch"))?;
    std::os::unix::fs::FileExt::write_all_at(&disk, b"changed", 5 << 20)?;
    refused(&["restore", &good], 125, "is not as it was")?;
    fs::remove_file(file("machine/disk-scratch"))?;
    refused(&["restore", &good], 125, "disk-scratch")?;
    fs::OpenOptions::new().write(true).open(file("machine/memory"))?.set_len(1 << 20)?;
    let names = host.bulkhead(["ps", "-a", "-q"])?.ok()?.stdout();
    ensure!(names.lines().count() == 1, "{names}");

    host.bulkhead(["stop", "-t", "0", "good"])?.ok()?;
    refused(&["snapshot", "good", &path("x")], 1, "needs a running container")?;
    host.bulkhead(["rm", "good"])?.ok()?;
    let mut left = left_in(host.work())?;
    left.sort();
    ensure!(left == ["good", "shared"], "{left:?}");
    fs::remove_dir_all(shared)?;
    Ok(fs::remove_dir_all(good)?)
}

test!(a_container_in_a_network_namespace_goes_on_in_it_or_in_another, BUSYBOX.deadline(120));
fn a_container_in_a_network_namespace_goes_on_in_it_or_in_another(host: &Host) -> Result<()> {
    let network = prepare(host, 1500)?;
    let flag = network.flag(0);
    host.bulkhead(["run", "-d", "--name", "first", &flag, "busybox", "httpd", "-f", "-h", "/etc"])?.ok()?;
    let serves = |address: &str| {
        let url = format!("http://{address}/hostname");
        host.eventually(&url, PATIENCE, || {
            Ok(host.run(["busybox", "wget", "-q", "-O", "-", &url])?.status == 0)
        })
    };
    serves("10.9.0.2")?;
    let snapshot = host.work().join(SNAPSHOT).display().to_string();
    host.bulkhead(["snapshot", "first", &snapshot])?.ok()?;
    // There is room for one.
    host.bulkhead(["restore", "-d", &snapshot])?.status_is(125)?.stderr_has("another sandbox uses")?;
    host.bulkhead(["restore", "-d", "--network", "none", &snapshot])?
        .status_is(125)?
        .stderr_has("--network")?;
    serves("10.9.0.2")?;
    host.bulkhead(["rm", "-f", "first"])?.ok()?;
    host.bulkhead(["restore", "-d", "--name", "second", &snapshot])?.ok()?;
    serves("10.9.0.2")?;
    let script = "ip netns add other
        ip link add v1 type veth peer name eth0 netns other
        ip address add 10.8.0.1/24 dev v1
        ip link set v1 up
        ip -n other address add 10.8.0.7/24 dev eth0
        ip -n other link set eth0 up";
    host.run(["sh", "-ec", script])?.ok()?;
    let other = "ns:/run/netns/other";
    host.bulkhead(["restore", "-d", "--name", "third", "--network", other, &snapshot])?.ok()?;
    serves("10.8.0.7")?;
    serves("10.9.0.2")?;
    host.bulkhead(["exec", "third", "ip", "address"])?
        .ok()?
        .stdout_has("10.8.0.7/24")?
        .stdout_lacks("10.9.0.2")?;
    host.bulkhead(["rm", "-f", "second", "third"])?.ok()?;
    host.run(["ip", "netns", "delete", "other"])?.ok()?;
    drop(network);
    Ok(fs::remove_dir_all(snapshot)?)
}

test!(whoever_is_killed_while_it_is_saved_nothing_half_made_stays, BUSYBOX.deadline(120));
fn whoever_is_killed_while_it_is_saved_nothing_half_made_stays(host: &Host) -> Result<()> {
    // Memory that takes a moment to write.
    let large = "dd if=/dev/urandom of=/dev/shm/x bs=1M count=48 2>/dev/null; echo ready; i=0; \
        while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    let begin = |name: &str| -> Result<()> {
        start(host, name, large)?;
        host.eventually("the container to be ready", PATIENCE, || {
            Ok(host.bulkhead(["logs", name])?.ok()?.stdout().contains("ready"))
        })
    };
    let lines =
        |name: &str| Ok::<_, anyhow::Error>(host.bulkhead(["logs", name])?.ok()?.stdout().lines().count());
    begin("victim")?;
    let snapshot = host.work().join(SNAPSHOT);
    let path = snapshot.display().to_string();
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 130), (Signal::KILL, 137)] {
        let mut saving = host.bulkhead_program(["snapshot", "victim", &path]).spawn()?;
        host.eventually("the snapshot to begin", PATIENCE, || {
            Ok(host.work().join("saved.partial/machine.partial/memory").exists() || snapshot.exists())
        })?;
        if !saving.ended()? {
            saving.signal(signal)?;
        }
        let finished = saving.wait()?;
        if finished.status != 0 {
            finished.status_is(status)?;
            ensure!(!snapshot.exists());
            if signal != Signal::KILL {
                ensure!(left_in(host.work())?.is_empty(), "{:?}", left_in(host.work())?);
            }
        }
        // The container goes on, whoever had stopped it.
        let before = lines("victim")?;
        host.eventually("the container to go on", PATIENCE, || Ok(lines("victim")? > before + 1))?;
        let _ = fs::remove_dir_all(&snapshot);
    }
    // What SIGKILL left is no hindrance, and goes.
    host.bulkhead(["snapshot", "victim", &path])?.ok()?;
    ensure!(left_in(host.work())? == [SNAPSHOT], "{:?}", left_in(host.work())?);
    fs::remove_dir_all(&snapshot)?;

    // The monitor itself.
    let saving = host.bulkhead_program(["snapshot", "victim", &path]).spawn()?;
    host.eventually("the snapshot to begin", PATIENCE, || {
        Ok(host.work().join("saved.partial/machine.partial/memory").exists() || snapshot.exists())
    })?;
    host.run(["killall", "-9", "bulkhead-vmm"])?;
    let finished = saving.wait()?;
    if finished.status != 0 {
        finished.status_is(1)?;
        ensure!(left_in(host.work())?.is_empty(), "{:?}", left_in(host.work())?);
    }
    host.bulkhead(["rm", "-f", "victim"])?.ok()?;
    host.eventually("all monitors to be gone", PATIENCE, || {
        Ok(host.run(["pgrep", "bulkhead-vmm"])?.status == 1)
    })?;

    // Killed between the snapshot and its copies: the next fork clears away what is left.
    begin("victim")?;
    let _ = fs::remove_dir_all(&snapshot);
    let forks = Path::new("/var/lib/bulkhead/forks");
    let forking = host.bulkhead_program(["fork", "-n", "5", "victim"]).spawn()?;
    host.eventually("the fork to begin", PATIENCE, || Ok(forks.exists()))?;
    forking.signal(Signal::KILL)?;
    forking.wait()?;
    host.bulkhead(["fork", "--rm", "--name", "copy", "victim"])?.ok()?;
    ensure!(!forks.exists(), "{:?}", left_in(forks));
    let ids = host.bulkhead(["ps", "-a", "-q"])?.ok()?.stdout();
    let mut remove = vec!["rm", "-f"];
    remove.extend(ids.lines());
    host.bulkhead(remove)?.ok()?;
    Ok(())
}
