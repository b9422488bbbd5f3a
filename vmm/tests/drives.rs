//! Disks put into drives of a machine that runs.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on panics

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use common::{Guest, Place, kvm, monitor, stderr};
use serde_json::json;
use vmm::control::{Client, EjectRequest, InsertRequest, Inserted, Method, SnapshotRequest};

/// Says "a" and ends with the capacity of the machine's third drive, once that has one.
fn looks_into_a_drive() -> Guest {
    // mov 0xd0002100,%ebx; again: mov (%rbx),%eax; test %eax,%eax; jz again
    Guest::new()
        .map_devices()
        .print("a")
        .load(0xd000_2100)
        .raw(&[0x8b, 0x03, 0x85, 0xc0, 0x74, 0xfa])
        .exit_with_eax()
}

fn start(place: &Place, guest: &Guest) -> (Child, Client) {
    let drive = |id: &str| json!({"id": id, "empty": true, "removable": true});
    let config = json!({
        "boot": {"kernel": place.write("kernel", guest.elf())},
        "control": place.path("control"), "report": place.path("report"),
        "disks": [{"id": "own", "path": disk(place, "own", 1)}, drive("one"), drive("two")],
    });
    let config = place.write("config", config.to_string());
    let mut child = monitor().arg("--config").arg(config).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Ok(mut client) = Client::connect(&place.path("control"))
            && client.status().is_ok_and(|status| status.console_tail == "a")
        {
            return (child, client);
        }
        assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline);
        thread::sleep(Duration::from_millis(2));
    }
}

fn disk(place: &Place, name: &str, sectors: usize) -> PathBuf {
    place.write(name, vec![0; sectors * 512])
}

fn insert(client: &mut Client, wish: InsertRequest) -> Result<Inserted, String> {
    let answer = client.call(Method::InsertDisk(wish)).map_err(|error| error.to_string())?;
    Ok(serde_json::from_value(answer).unwrap())
}

fn of(path: impl Into<PathBuf>) -> InsertRequest {
    InsertRequest { path: Some(path.into()), ..InsertRequest::default() }
}

fn eject(client: &mut Client, drive: &str, retire: bool) -> Result<(), String> {
    let wish = EjectRequest { drive: drive.into(), insertion: None, retire };
    client.call(Method::EjectDisk(wish)).map(drop).map_err(|error| error.to_string())
}

#[test]
fn a_guest_that_runs_gets_a_disk() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (mut child, mut client) = start(&place, &looks_into_a_drive());
    let first = insert(&mut client, of(disk(&place, "first", 7))).unwrap();
    assert_eq!((first.drive.as_str(), first.number, first.bytes), ("one", 1, 7 * 512));
    assert!(child.try_wait().unwrap().is_none());
    let second = insert(&mut client, of(disk(&place, "second", 42))).unwrap();
    assert_eq!((second.drive.as_str(), second.number), ("two", 2));
    assert_eq!(child.wait().unwrap().code(), Some(42));
}

#[test]
fn what_cannot_be_put_in_is_told_of_and_changes_nothing() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (mut child, mut client) = start(&place, &Guest::new().print("a").spin());
    let file = disk(&place, "file", 4);
    let refused = |client: &mut Client, wish: InsertRequest, word: &str| {
        let error = insert(client, wish).unwrap_err();
        assert!(error.contains(word), "{word}: {error}");
        assert_eq!(client.status().unwrap().empty_drives, 2);
    };
    refused(&mut client, of(place.path("missing")), "missing");
    refused(&mut client, of("file"), "absolute");
    refused(&mut client, of("/dev/null"), "neither a file nor a block device");
    refused(&mut client, InsertRequest::default(), "needs");
    refused(&mut client, InsertRequest { layers: vec![file.clone()], ..of(&file) }, "both");
    refused(&mut client, of(place.path("own")), "\"own\" already");
    // The same under another name.
    fs::hard_link(place.path("own"), place.path("link")).unwrap();
    refused(&mut client, InsertRequest { read_only: true, ..of(place.path("link")) }, "\"own\" already");
    for (drive, word) in [("three", "no drive"), ("own", "taken out"), ("one", "empty")] {
        let error = eject(&mut client, drive, false).unwrap_err();
        assert!(error.contains(word), "{drive}: {error}");
    }

    // One that nobody writes to may be in several; with all of them full there is no place for more.
    let read_only = || InsertRequest { read_only: true, ..of(&file) };
    insert(&mut client, read_only()).unwrap();
    let error = insert(&mut client, of(&file)).unwrap_err();
    assert!(error.contains("written to"), "{error}");
    insert(
        &mut client,
        InsertRequest { layers: vec![file.clone(), file.clone()], ..InsertRequest::default() },
    )
    .unwrap();
    let error = insert(&mut client, read_only()).unwrap_err();
    assert!(error.contains("no drive is empty"), "{error}");

    // A drive that is free again is used again, unless it must not be.
    eject(&mut client, "one", false).unwrap();
    let again = insert(&mut client, read_only()).unwrap();
    assert_eq!(again.drive, "one");
    // Who is late does not take out what came after.
    let late = EjectRequest { drive: "one".into(), insertion: Some(again.insertion - 1), retire: false };
    let error = client.call(Method::EjectDisk(late.clone())).unwrap_err().to_string();
    assert!(error.contains("another disk"), "{error}");
    let own = EjectRequest { insertion: Some(again.insertion), ..late };
    client.call(Method::EjectDisk(own)).unwrap();
    insert(&mut client, read_only()).unwrap();
    eject(&mut client, "one", true).unwrap();
    assert_eq!(client.status().unwrap().empty_drives, 0);
    assert!(insert(&mut client, read_only()).is_err() && eject(&mut client, "one", false).is_err());
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();
}

#[test]
fn a_snapshot_knows_what_is_in_the_drives() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (mut child, mut client) = start(&place, &looks_into_a_drive());
    insert(&mut client, of(disk(&place, "first", 7))).unwrap();
    let directory = place.path("saved");
    let wish = SnapshotRequest::new(directory.clone(), false);
    client.call(Method::Snapshot(wish)).unwrap();
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();

    let restore = || {
        let mut command = monitor();
        command.arg("--restore").arg(&directory);
        command
    };
    // It goes on with the same disk, and takes one more.
    let mut child = restore().spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut client = loop {
        if let Ok(client) = Client::connect(&place.path("control")) {
            break client;
        }
        assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline);
        thread::sleep(Duration::from_millis(2));
    };
    assert_eq!(client.status().unwrap().empty_drives, 1);
    assert_eq!(insert(&mut client, of(disk(&place, "second", 42))).unwrap().drive, "two");
    assert_eq!(child.wait().unwrap().code(), Some(42));
    // And not without it.
    fs::remove_file(place.path("first")).unwrap();
    let output = restore().output().unwrap();
    assert!(stderr(&output).contains("first"), "{}", stderr(&output));
}
