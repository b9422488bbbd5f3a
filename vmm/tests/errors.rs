//! What people get when something is wrong: the right words, the right status, and no machine.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on panics

mod common;

use std::process::Command;

use common::{Guest, Place, kvm, monitor, stderr};

fn expect(command: &mut Command, status: i32, words: &[&str]) {
    let output = command.output().unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(status), "{command:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{command:?}: no {word:?} in {text}");
    }
}

#[test]
fn bad_usage() {
    expect(&mut monitor(), 64, &["--kernel", "--help"]);
    expect(monitor().arg("--kernle").arg("x"), 64, &["--kernel"]);
    expect(monitor().arg("--kernel").arg("x").arg("--vcpus").arg("99"), 64, &["vcpus", "32"]);
    expect(monitor().arg("--kernel").arg("x").arg("--memory").arg("0"), 64, &["memory_mib"]);
    expect(monitor().arg("--ctl").arg("/nowhere/socket"), 64, &["METHOD"]);
    expect(
        monitor().arg("--ctl").arg("/nowhere/socket").arg("status"),
        1,
        &["/nowhere/socket", "may have ended"],
    );
}

#[test]
fn bad_configuration() {
    let place = Place::new();
    expect(monitor().arg("--config").arg(place.path("none")), 66, &["none", "No such file"]);
    let file = place.write("config", "{");
    expect(monitor().arg("--config").arg(&file), 64, &["config", "line 1"]);
    let file = place.write("config", r#"{"boot":{"kernel":"k"},"memroy":1}"#);
    expect(monitor().arg("--config").arg(&file), 64, &["memroy", "expected one of"]);
}

#[test]
fn bad_files() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    expect(monitor().arg("--kernel").arg(place.path("none")), 66, &["kernel", "none", "No such file"]);
    let empty = place.write("empty", "");
    expect(monitor().arg("--kernel").arg(empty), 66, &["empty"]);
    let text = place.write("text", "this is not a kernel".repeat(1000));
    expect(monitor().arg("--kernel").arg(text), 66, &["neither an ELF vmlinux nor a bzImage"]);
    expect(monitor().arg("--kernel").arg("/bin/sh"), 66, &["/bin/sh", "cannot be booted"]);
    let elf = Guest::new().exit(0).elf();
    for length in [4, 40, 64, 100, 4096, elf.len() - 1] {
        let cut = place.write("cut", &elf[..length]);
        expect(monitor().arg("--kernel").arg(cut), 66, &["cut", "cannot be booted"]);
    }

    let mut command = place.monitor(&Guest::new().exit(0));
    expect(command.arg("--initramfs").arg(place.path("none")), 66, &["initramfs", "none"]);
    let mut command = place.monitor(&Guest::new().exit(0));
    expect(command.arg("--disk").arg(place.path("none")), 66, &["disk", "none"]);
    let tiny = place.write("tiny", "x");
    let mut command = place.monitor(&Guest::new().exit(0));
    expect(command.arg("--disk").arg(tiny), 66, &["less than one sector"]);
    let mut command = place.monitor(&Guest::new().exit(0));
    expect(command.arg("--memory").arg("2"), 64, &["2 MiB", "at least 11 MiB", "--memory"]);
    let mut command = place.monitor(&Guest::new().exit(0));
    expect(command.arg("--cmdline").arg("x".repeat(2040)), 64, &["command line", "2047"]);
    let mut command = place.monitor(&Guest::new().exit(0));
    expect(command.arg("--control").arg("/nowhere/socket"), 71, &["listen", "/nowhere/socket"]);
}

#[test]
fn check_runs_nothing() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let output = place.monitor(&Guest::new().exit(9)).arg("--check").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!place.path("report").exists());
    let mut command = place.monitor(&Guest::new().exit(9));
    expect(command.arg("--check").arg("--disk").arg("/nowhere"), 66, &["/nowhere"]);
}

#[test]
fn help_teaches_and_printed_configurations_work() {
    let output = monitor().arg("--help").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for word in ["Examples:", "--initramfs", "--ctl", "0xb44", "70:"] {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
    if !kvm() {
        return;
    }
    let place = Place::new();
    let output = place.monitor(&Guest::new().exit(9)).arg("--print-config").output().unwrap();
    let config = place.write("config", output.stdout);
    assert_eq!(monitor().arg("--config").arg(config).status().unwrap().code(), Some(9));
}
