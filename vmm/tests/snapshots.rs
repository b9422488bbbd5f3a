//! Snapshots of guests of a few instructions, and what goes on from them.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on panics

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use common::{Guest, Place, kvm, monitor, stderr};
use vm_memory::Bytes;
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

    // A client that is killed half-way leaves what it had made, which the next one of that name sweeps away.
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
    // It may have been quicker than the signal.
    while !place.path("given-up").exists() {
        match client.call(save(place.path("given-up"))) {
            Ok(_) => break,
            // The monitor may not have heard of its end yet.
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(left_of(&place, "given-up"), ["given-up"]);
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
    let error = client.record_working_set(&directory).unwrap_err().to_string();
    assert!(error.contains("it has booted"), "{error}");
    assert!(!directory.join("working-set").exists());
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
        let error = client.call(Method::WorkingSet).unwrap_err().to_string();
        assert!(error.contains("no descriptor"), "{error}");
        noted = client.record_working_set(&directory).unwrap();
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

/// A guest with memory that compresses well, and which goes on to change a little of it.
fn worker() -> Guest {
    Guest::new()
        .store(KEPT, 42)
        .fill(0x50_0000, 1 << 20)
        .print("a")
        .count(200_000)
        .store(KEPT, 43)
        .print("b")
        .load(KEPT)
        .exit_with_eax()
}

/// Bytes of a directory's files on the disk.
fn taken_by(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

#[test]
fn differences_and_compressed_ones_are_small_and_go_on_alike() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let disk = place.write("disk.raw", [vec![7; 1 << 20], vec![0; 1 << 20]].concat());
    let more = ["--memory", "64", "--disk", disk.to_str().unwrap()];
    let (mut child, mut client) = start(&place, &worker(), &more);
    let id = client.status().unwrap().disks[0].clone();
    client.call(Method::Pause).unwrap();
    let mut take = |name: &str, compress: bool, base: Option<&str>| {
        let request = SnapshotRequest {
            disks: vec![id.clone()],
            compress,
            base: base.map(|base| place.path(base)),
            ..SnapshotRequest::new(place.path(name), false)
        };
        client.snapshot(request, |_| (), |_| Ok(()))
    };
    let whole = take("whole", false, None).unwrap();
    assert!(whole.memory_bytes > 1 << 20);
    take("zipped", true, None).unwrap();
    let second = take("second", false, Some("whole")).unwrap();
    let third = take("third", true, Some("second")).unwrap();
    take("other", false, Some("zipped")).unwrap();
    // What the monitor is given must be what it says, and nothing is left of what is refused.
    let error = take("x", false, Some("nothing")).unwrap_err().to_string();
    assert!(error.contains("nothing"), "{error}");
    assert_eq!(left_of(&place, "x"), [""; 0]);
    for taken in [&second, &third] {
        assert!(taken.memory_bytes <= 16 << 10, "{taken:?}");
        assert_eq!(taken.disks, whole.disks, "the digest is of all of it");
    }
    let sizes = ["whole", "zipped", "second", "third", "other"].map(|name| taken_by(&place.path(name)));
    assert!(sizes[1] < sizes[0] / 4 && sizes[2..].iter().all(|size| *size < sizes[0] / 8), "{sizes:?}");
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();

    // The same disk comes out of each, and the same machine.
    let goes_on = |name: &str| {
        let opened = vmm::snapshot::Opened::open(&place.path(name)).unwrap();
        let copy = place.path("copy");
        let digest = vmm::snapshot::disk::Saved::open(&opened, &id).unwrap().copy(&copy).unwrap();
        assert_eq!(digest.value(), whole.disks[0].digest, "{name}");
        assert!(fs::read(&copy).unwrap() == fs::read(&disk).unwrap(), "{name}");
        fs::remove_file(&copy).unwrap();
        let output = restore(&place, &place.path(name)).output().unwrap();
        assert_eq!(output.status.code(), Some(43), "{name}: {}", stderr(&output));
    };
    ["zipped", "second", "third", "other"].iter().for_each(|name| goes_on(name));

    // A family can be moved together, and one of it alone.
    fs::create_dir(place.path("elsewhere")).unwrap();
    fs::rename(place.path("third"), place.path("elsewhere/third")).unwrap();
    goes_on("elsewhere/third");
    for name in ["whole", "second"] {
        fs::rename(place.path(name), place.path("elsewhere").join(name)).unwrap();
    }
    goes_on("elsewhere/third");

    // Without its base, with another, or with one that is damaged, it is an error that says so.
    let third = place.path("elsewhere/third");
    let whole = place.path("elsewhere/whole");
    fs::rename(&whole, place.path("away")).unwrap();
    refused(&restore(&place, &third).output().unwrap(), "which is not there");
    fs::rename(place.path("zipped"), &whole).unwrap();
    refused(&restore(&place, &third).output().unwrap(), "another snapshot");
    fs::rename(&whole, place.path("zipped")).unwrap();
    fs::rename(place.path("away"), &whole).unwrap();
    fs::OpenOptions::new().write(true).open(whole.join("memory")).unwrap().set_len(1 << 20).unwrap();
    refused(&restore(&place, &third).output().unwrap(), "cut off");
}

#[test]
fn damage_to_what_is_compressed_is_found() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let disk = place.write("disk.raw", (0..200_000_u32).map(|i| (i % 251) as u8).collect::<Vec<_>>());
    let (mut child, mut client) =
        start(&place, &worker(), &["--memory", "64", "--disk", disk.to_str().unwrap()]);
    let id = client.status().unwrap().disks[0].clone();
    client.call(Method::Pause).unwrap();
    let saved = place.path("saved");
    let request = SnapshotRequest {
        disks: vec![id.clone()],
        compress: true,
        ..SnapshotRequest::new(saved.clone(), false)
    };
    let digest = client.snapshot(request, |_| (), |_| Ok(())).unwrap().disks[0].digest;
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();
    let open = || vmm::snapshot::Opened::open(&saved);
    let memory = || {
        let guest = vmm::memory::create(64 << 20).unwrap();
        open().and_then(|opened| opened.fill(&guest))?;
        let mut bytes = vec![0; 64 << 20];
        guest.read_slice(&mut bytes, vm_memory::GuestAddress(0)).unwrap();
        Ok::<_, vmm::Error>(bytes)
    };
    let wanted = memory().unwrap();
    let mut found = 0;
    let file = saved.join("memory.zst");
    let good = fs::read(&file).unwrap();
    for step in 0..60 {
        let at = step * good.len() / 60;
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        fs::write(&file, &bytes).unwrap();
        // A bit of a frame's window size can change without a change of what comes out.
        match memory() {
            Ok(got) => assert!(got == wanted, "byte {at} of {}", good.len()),
            Err(_) => found += 1,
        }
        fs::write(&file, &good[..at]).unwrap();
        assert!(memory().is_err(), "{at} bytes of {}", good.len());
    }
    assert!(found > 50, "{found}");
    fs::write(&file, [&good[..], &[0]].concat()).unwrap();
    assert!(memory().unwrap_err().to_string().contains("saved"), "something follows");
    fs::write(&file, &good).unwrap();
    // Of a disk: an error, or the digest tells.
    let unpack = || {
        let to = place.path("copy");
        let copied = vmm::snapshot::disk::Saved::open(&open().unwrap(), &id).and_then(|disk| disk.copy(&to));
        let _ = fs::remove_file(&to);
        copied.map(vmm::devices::virtio::block::backup::Digest::value)
    };
    assert_eq!(unpack().unwrap(), digest);
    let file = saved.join(format!("disk-{id}.packed"));
    let good = fs::read(&file).unwrap();
    for at in (0..good.len()).step_by(5) {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        fs::write(&file, &bytes).unwrap();
        let got = unpack();
        assert!(got.is_err() || got.is_ok_and(|got| got == digest), "byte {at} of {}", good.len());
        if at % 16 == 0 {
            fs::write(&file, &good[..at]).unwrap();
            assert!(unpack().is_err(), "{at} bytes of {}", good.len());
        }
    }
    refused(&restore(&place, &saved.join("..").join("nothing")).output().unwrap(), "nothing");
}

#[test]
fn every_byte_of_a_state_counts_and_no_state_makes_the_monitor_panic() {
    if !kvm() {
        return;
    }
    use vmm::snapshot::{Snapshot, file};
    let place = Place::new();
    let (mut child, mut client) = start(&place, &counter(u32::MAX), &["--memory", "64", "--vcpus", "2"]);
    let saved = place.path("saved");
    client.call(save(saved.clone())).unwrap();
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();
    let state = fs::read(saved.join("state")).unwrap();
    file::decode::<Snapshot>(&state).unwrap();
    // A processor that has nothing of what the guest saw.
    let opened = vmm::snapshot::Opened::open(&saved).unwrap();
    let error = opened.fits_features(&kvm_bindings::CpuId::new(1).unwrap()).unwrap_err();
    assert_eq!(error.exit_status(), 66);
    assert!(error.to_string().contains("does not have"), "{error}");
    for at in 0..state.len() {
        let mut damaged = state.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(file::decode::<Snapshot>(&damaged).is_err(), "byte {at}");
        assert!(file::decode::<Snapshot>(&state[..at]).is_err(), "{at} bytes");
    }
    // Somebody who damages it on purpose mends the checksums: whatever it says, the monitor ends in an orderly way, or runs it.
    for step in 0..48 {
        let mut body = state[24..].to_vec();
        let at = step * body.len() / 48;
        body[at] = body[at].wrapping_add([1, 0x7f, 0x80, 0xff][step % 4]);
        let mut head = state[..16].to_vec();
        head.extend(crc32fast::hash(&body).to_le_bytes());
        head.extend(crc32fast::hash(&head).to_le_bytes());
        fs::write(saved.join("state"), [head, body].concat()).unwrap();
        let mut child = restore(&place, &saved).stderr(std::process::Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_millis(300);
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break Some(status),
                None if Instant::now() > deadline => break None,
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        let code = status.map(|status| status.code());
        assert!(code != Some(None) && code != Some(Some(101)), "byte {at}: {status:?} {}", stderr(&output));
        assert!(!stderr(&output).contains("panicked"), "byte {at}: {}", stderr(&output));
    }
}
