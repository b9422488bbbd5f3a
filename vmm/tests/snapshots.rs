//! Snapshots of guests of a few instructions, and what goes on from them.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on panics

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use common::{Guest, Place, kvm, monitor, stderr};
use vmm::control::{Client, Method, SnapshotRequest};

/// Where the guest keeps what only a machine with its memory knows.
const KEPT: u32 = 0x40_0000;

/// Says "a", and when it has counted long enough "b", and ends with what it wrote to memory before.
fn counter(count: u32) -> Guest {
    Guest::new().store(KEPT, 42).mark(1).print("a").count(count).mark(2).print("b").load(KEPT).exit_with_eax()
}

fn start(place: &Place, guest: &Guest, more: &[&str]) -> (Child, Client) {
    let socket = place.path("control");
    let mut child = place.monitor(guest).arg("--control").arg(&socket).args(more).spawn().unwrap();
    let client = connect(&socket, &mut child);
    (child, client)
}

fn connect(socket: &Path, child: &mut Child) -> Client {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Ok(mut client) = Client::connect(socket)
            && client.status().is_ok_and(|status| status.console_tail.contains('a'))
        {
            return client;
        }
        assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline);
        thread::sleep(Duration::from_millis(2));
    }
}

fn restore(place: &Place, directory: &Path) -> Command {
    let mut command = monitor();
    command.arg("--restore").arg(directory).arg("--report").arg(place.path("restored"));
    command
}

fn report(place: &Place) -> serde_json::Value {
    serde_json::from_slice(&fs::read(place.path("restored")).unwrap()).unwrap()
}

fn refused(output: &Output, word: &str) {
    assert_eq!(output.status.code(), Some(66), "{}", stderr(output));
    assert!(stderr(output).contains(word), "{word}: {}", stderr(output));
}

#[test]
fn a_machine_goes_on_where_it_stood_as_often_as_one_likes() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (mut child, mut client) = start(&place, &counter(400_000), &["--memory", "64"]);
    let directory = place.path("saved");
    let taken = client.call(save(directory.clone())).unwrap();
    // The guest has touched a few hundred KiB; its 64 MiB must not be in the file.
    assert!(taken["memory_bytes"].as_u64().unwrap() < 2 << 20, "{taken}");
    use std::os::unix::fs::MetadataExt;
    let file = fs::metadata(directory.join("memory")).unwrap();
    assert_eq!(file.len(), (64 << 20) + 4096);
    assert!(file.blocks() * 512 < 2 << 20, "{}", file.blocks());

    // The machine itself goes on.
    assert_eq!(client.status().unwrap().state, "running");
    assert_eq!(child.wait().unwrap().code(), Some(42));
    assert_eq!(place.report()["console_tail"], "ab");

    for _ in 0..3 {
        let output = restore(&place, &directory).output().unwrap();
        assert_eq!(output.status.code(), Some(42), "{}", stderr(&output));
        let report = report(&place);
        assert_eq!(report["console_tail"], "b");
        let marks = report["timeline"].to_string();
        assert!(marks.contains("guest-mark-2") && !marks.contains("guest-mark-1"), "{marks}");
    }
}

#[test]
fn a_machine_that_goes_on_can_be_saved_again() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (mut child, mut client) = start(&place, &counter(u32::MAX), &["--vcpus", "2"]);
    client.call(Method::Pause).unwrap();
    let first = place.path("first");
    let taken = client.call(save(first.clone())).unwrap();
    assert_eq!(taken["pause_ns"], 0, "it stood already");
    assert_eq!(client.status().unwrap().state, "paused");
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();

    let socket = place.path("again");
    let mut child = restore(&place, &first).arg("--control").arg(&socket).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut client = loop {
        match Client::connect(&socket) {
            Ok(client) => break client,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    };
    let status = client.status().unwrap();
    assert_eq!(status.machine.vcpus, 2);
    assert!(status.vcpus[0].rip >= u64::from(common::ENTRY), "{status:?}");
    let second = place.path("second");
    client.call(save(second.clone())).unwrap();
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();
    let memory = |directory: &Path| fs::read(directory.join("memory")).unwrap();
    let (a, b) = (memory(&first), memory(&second));
    // Of the same guest in the same loop; only the last page, which names the snapshot, differs.
    let content = a.len() - 4096;
    assert!(a[..content] == b[..content]);
    assert_ne!(a[content..], b[content..]);
}

#[test]
fn what_does_not_fit_is_refused_with_the_reason() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (mut child, mut client) = start(&place, &counter(u32::MAX), &[]);
    let good = place.path("good");
    client.call(save(good.clone())).unwrap();
    let error = client.call(save(good.clone())).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
    let error = client.call(save("relative".into())).unwrap_err().to_string();
    assert!(error.contains("absolute"), "{error}");
    let error = client.call(save(place.path("no/such"))).unwrap_err().to_string();
    assert!(error.contains("No such file"), "{error}");
    // None of it has hurt the machine.
    assert_eq!(client.status().unwrap().state, "running");
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();

    let with = |more: &[&str]| restore(&place, &good).args(more).output().unwrap();
    refused(&restore(&place, &place.path("nowhere")).output().unwrap(), "state");
    let disk = place.write("disk", [0; 4096]);
    refused(&with(&["--disk", disk.to_str().unwrap()]), "virtio devices");

    let config = |text: String| {
        let path = place.write("config", text);
        monitor().arg("--config").arg(path).output().unwrap()
    };
    let here = good.display();
    refused(&config(format!(r#"{{"restore":"{here}","machine":{{"memory_mib":128}}}}"#)), "256 MiB");
    refused(&config(format!(r#"{{"restore":"{here}","machine":{{"vcpus":3}}}}"#)), "1 vCPUs");
    let output = config(format!(r#"{{"restore":"{here}","rng":false,"vsock":{{"socket":"{here}/v"}}}}"#));
    refused(&output, "vsock");

    let state = fs::read(good.join("state")).unwrap();
    for at in [0, 9, 13, 17, 22, 40, state.len() / 2, state.len() - 1] {
        let mut damaged = state.clone();
        damaged[at] ^= 4;
        fs::write(good.join("state"), damaged).unwrap();
        refused(&with(&[]), "snapshot");
    }
    fs::write(good.join("state"), &state[..state.len() - 1]).unwrap();
    refused(&with(&[]), "cut off");
    fs::write(good.join("state"), &state).unwrap();
    let memory = fs::OpenOptions::new().write(true).open(good.join("memory")).unwrap();
    memory.set_len(1 << 20).unwrap();
    refused(&with(&[]), "cut off");
}

/// A guest whose memory takes long to write.
fn large() -> Guest {
    Guest::new().touch(0x100_0000, (256 << 20) >> 12).print("a").spin()
}

fn left_of(place: &Place, name: &str) -> Vec<String> {
    let names = fs::read_dir(place.path("")).unwrap();
    names
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|left| left.starts_with(name))
        .collect()
}

#[test]
fn the_guest_goes_on_while_it_is_written_and_who_goes_away_gives_it_up() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let disk = place.write("disk.raw", vec![7; 1 << 20]);
    let more = ["--memory", "512", "--disk", disk.to_str().unwrap()];
    let (mut child, mut client) = start(&place, &large(), &more);
    let id = client.status().unwrap().disks[0].clone();
    let with_disk = |name: &str, id: &str| SnapshotRequest {
        disks: vec![id.to_owned()],
        ..SnapshotRequest::new(place.path(name), false)
    };
    let mut states = Vec::new();
    let mut other = Client::connect(&place.path("control")).unwrap();
    let taken = client
        .snapshot(
            with_disk("saved", &id),
            |pause_ns| {
                assert!(pause_ns > 0);
                // Told while memory is written: the machine runs, and there is no second snapshot beside it.
                states.push(other.status().unwrap().state);
                let error = other.call(save(place.path("second"))).unwrap_err().to_string();
                states.push(error);
            },
            |_| Ok(()),
        )
        .unwrap();
    assert_eq!(states[0], "running");
    assert!(states[1].contains("already"), "{states:?}");
    assert!(taken.memory_bytes >= 256 << 20 && taken.pause_ns > 0, "{taken:?}");
    assert_eq!(taken.disks[0].id, id);
    let copy = place.path("saved").join(format!("disk-{id}"));
    assert!(fs::read(&copy).unwrap() == fs::read(&disk).unwrap());

    let error = client.snapshot(with_disk("no", "nosuch"), |_| (), |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("no disk \"nosuch\""), "{error}");
    assert_eq!(left_of(&place, "no"), [""; 0]);

    // A client that is killed half-way: nothing stays, and the next one is served.
    let program = env!("CARGO_BIN_EXE_bulkhead-vmm");
    let mut asking = Command::new(program)
        .arg("--ctl")
        .arg(place.path("control"))
        .arg("snapshot")
        .arg(place.path("given-up"))
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while left_of(&place, "given-up").is_empty() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(1));
    }
    asking.kill().unwrap();
    asking.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !left_of(&place, "given-up").is_empty() {
        // It may have been quicker than the signal.
        if place.path("given-up").join("state").exists() {
            break;
        }
        assert!(Instant::now() < deadline, "{:?}", left_of(&place, "given-up"));
        thread::sleep(Duration::from_millis(1));
    }
    client.call(save(place.path("again"))).unwrap();

    // And the child that writes does not outlive a monitor that is killed.
    client
        .snapshot(
            with_disk("orphan", &id),
            |_| {
                let children = format!("/proc/{0}/task/{0}/children", child.id());
                let children = fs::read_to_string(children).unwrap();
                let writer = children.split_whitespace().next().map(str::to_owned);
                child.kill().unwrap();
                child.wait().unwrap();
                let deadline = Instant::now() + Duration::from_secs(10);
                while let Some(writer) = &writer
                    && Path::new("/proc").join(writer).exists()
                {
                    assert!(Instant::now() < deadline, "process {writer} goes on");
                    thread::sleep(Duration::from_millis(1));
                }
            },
            |_| Ok(()),
        )
        .unwrap_err();
    assert!(!place.path("orphan").exists());
}

#[test]
fn a_full_disk_leaves_the_machine_running_and_no_snapshot() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    // A limit on the size of files, after which writing fails as it does on a full disk.
    let kernel = place.write("kernel", counter(u32::MAX).elf());
    let socket = place.path("control");
    let script = format!(
        "trap '' XFSZ; ulimit -f 64; exec {} --kernel {} --control {}",
        env!("CARGO_BIN_EXE_bulkhead-vmm"),
        kernel.display(),
        socket.display()
    );
    let mut child = Command::new("sh").arg("-c").arg(script).spawn().unwrap();
    let mut client = connect(&socket, &mut child);
    let error = client.call(save(place.path("saved"))).unwrap_err().to_string();
    assert!(error.contains("File too large"), "{error}");
    assert_eq!(client.status().unwrap().state, "running");
    let left: Vec<_> =
        fs::read_dir(place.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("saved")), "{left:?}");
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();
}

fn save(directory: std::path::PathBuf) -> Method {
    Method::Snapshot(SnapshotRequest::new(directory, false))
}

#[test]
fn what_one_machine_wrote_to_the_next_has_from_the_start() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::new().print("a").count(100_000).fill(KEPT, 32 << 10).print("b").spin();
    let (mut child, mut client) = start(&place, &guest, &["--memory", "64"]);
    let error = client.call(Method::WorkingSet).unwrap_err().to_string();
    assert!(error.contains("it has booted"), "{error}");
    let directory = place.path("saved");
    client.call(save(directory.clone())).unwrap();
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();

    let socket = place.path("control2");
    // Goes on until it has written; answers what the monitor had to say of it.
    let go_on = |last: &mut dyn FnMut(&mut Client)| {
        let mut child = restore(&place, &directory).arg("--control").arg(&socket).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut client = loop {
            if let Ok(mut client) = Client::connect(&socket)
                && client.status().is_ok_and(|status| status.console_tail.contains('b'))
            {
                break client;
            }
            assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline);
            thread::sleep(Duration::from_millis(2));
        };
        last(&mut client);
        client.call(Method::Quit).unwrap();
        child.wait().unwrap();
        report(&place)["timeline"].to_string()
    };
    let mut noted = 0;
    let marks = go_on(&mut |client| {
        noted = client.call(Method::WorkingSet).unwrap()["bytes"].as_u64().unwrap();
    });
    // Not mapped from the snapshot before, so that it may have got a huge page.
    assert!((32 << 10..8 << 20).contains(&noted), "{noted}");
    assert!(!marks.contains("populated"), "{marks}");
    let marks = go_on(&mut |_| ());
    assert!(marks.contains("populated"), "{marks}");
    // One that cannot be read is no reason not to go on.
    fs::write(directory.join("working-set"), "nonsense").unwrap();
    let marks = go_on(&mut |_| ());
    assert!(!marks.contains("populated"), "{marks}");
}
