//! The whole monitor, run with guests of a few instructions.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on panics

mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{Guest, Place, kvm, stderr};
use vmm::control::{Client, Method};

#[test]
fn the_exit_port_ends_with_its_status_and_marks_are_in_order() {
    if !kvm() {
        return;
    }
    for (written, status) in [(0, 0), (42, 42), (255, 255), (0x107, 7)] {
        let place = Place::new();
        let guest = Guest::new().mark(1).mark(200).exit(written);
        let output = place.monitor(&guest).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
        assert_eq!(stderr(&output), "");
        let report = place.report();
        assert_eq!((&report["outcome"], &report["exit_status"]), (&"exited".into(), &status.into()));
        let events: Vec<(&str, u64)> = report["timeline"]
            .as_array()
            .unwrap()
            .iter()
            .map(|event| (event["event"].as_str().unwrap(), event["ns"].as_u64().unwrap()))
            .collect();
        let names: Vec<&str> = events.iter().map(|(name, _)| *name).collect();
        let expected = [
            "main",
            "config-read",
            "memory",
            "devices",
            "kernel-loaded",
            "vcpus",
            "jail",
            "first-run",
            "guest-mark-1",
            "guest-mark-200",
            "exit",
        ];
        assert_eq!(names, expected);
        assert!(events.is_sorted_by_key(|(_, ns)| *ns), "{events:?}");
    }
}

#[test]
fn serial_output_reaches_stdout_and_the_report() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let output = place.monitor(&Guest::new().print("hello\n").exit(0)).arg("--serial").output().unwrap();
    assert_eq!(output.stdout, b"hello\n");
    assert_eq!(place.report()["console_tail"], "hello\n");
    let output = place.monitor(&Guest::new().print("quiet\n").exit(0)).output().unwrap();
    assert_eq!(output.stdout, b"");
    assert_eq!(place.report()["console_tail"], "quiet\n");
}

#[test]
fn a_reboot_is_an_end() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let output = place.monitor(&Guest::new().reboot()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(place.report()["outcome"], "reboot");
}

#[test]
fn a_panic_is_told_from_a_reboot() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::new().print("Kernel panic - not syncing: test\n").reboot();
    let output = place.monitor(&guest).output().unwrap();
    assert_eq!(output.status.code(), Some(70));
    assert_eq!(place.report()["outcome"], "panic");
    assert!(stderr(&output).contains("the guest kernel panicked"));
    assert!(stderr(&output).contains("| Kernel panic - not syncing: test"));
}

#[test]
fn a_crash_is_reported_with_all_that_is_known() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let output = place.monitor(&Guest::new().print("last words\n").triple_fault()).output().unwrap();
    assert_eq!(output.status.code(), Some(70));
    let text = stderr(&output);
    for part in ["vCPU 0", "rip 0x", "cr3", "efer", "| last words"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let report = place.report();
    assert_eq!(report["outcome"], "crash");
    assert_eq!(report["crash"]["vcpu"], 0);
}

#[test]
fn virtio_devices_answer_where_the_kernel_is_told() {
    if !kvm() {
        return;
    }
    // Magic, version 2, entropy device (4) and console (3), nothing behind them. The low byte is the status.
    for (address, expected) in [
        (0xd000_0000_u32, 'v' as i32),
        (0xd000_0004, 2),
        (0xd000_0008, 4),
        (0xd000_1008, 3),
        (0xd000_2000, 0xff),
    ] {
        let place = Place::new();
        let output =
            place.monitor(&Guest::new().map_devices().load(address).exit_with_eax()).output().unwrap();
        assert_eq!(output.status.code(), Some(expected), "{address:#x}: {}", stderr(&output));
    }
}

#[test]
fn ports_without_a_device_do_not_delay_anybody() {
    if !kvm() {
        return;
    }
    for (port, expected) in [(0x71, 0), (0x64, 0), (0x2f8, 0xff), (0xcfc, 0xff)] {
        let place = Place::new();
        let guest = Guest::new().eax(0).in8(port).exit_with_eax();
        let output = place.monitor(&guest).output().unwrap();
        assert_eq!(output.status.code(), Some(expected), "{port:#x}");
    }
}

fn running(place: &Place) -> (Child, Client) {
    let socket = place.path("control");
    let mut child =
        place.monitor(&Guest::new().print("up\n").spin()).arg("--control").arg(&socket).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Ok(mut client) = Client::connect(&socket)
            && client.status().is_ok_and(|status| status.console_tail == "up\n")
        {
            return (child, client);
        }
        assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline);
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn the_control_socket_tells_pauses_and_quits() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (mut child, mut client) = running(&place);
    let status = client.status().unwrap();
    assert_eq!((status.state.as_str(), status.pid), ("running", child.id()));
    let [vcpu] = &status.vcpus[..] else { panic!("{status:?}") };
    assert!(vcpu.rip >= u64::from(common::ENTRY) && vcpu.rip < u64::from(common::ENTRY) + 4096, "{vcpu:?}");
    assert_eq!(vcpu.state, "running");

    client.call(Method::Pause).unwrap();
    assert_eq!(client.status().unwrap().state, "paused");
    assert_eq!(client.status().unwrap().vcpus[0].state, "paused");
    client.call(Method::Resume).unwrap();
    assert_eq!(client.status().unwrap().vcpus[0].state, "running");
    assert!(client.call(Method::Metrics).unwrap()["devices"]["console"].is_object());

    client.call(Method::Quit).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(place.report()["outcome"], "quit");
    assert!(!place.path("control").exists());
}

#[test]
fn nonsense_on_the_control_socket_is_answered() {
    use std::io::{BufRead, BufReader, Write};
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (mut child, mut client) = running(&place);
    let mut stream = BufReader::new(std::os::unix::net::UnixStream::connect(place.path("control")).unwrap());
    for (request, id) in [
        ("{\"id\":7,\"method\":\"fly\"}\n", "\"id\":7"),
        ("not json\n", "\"id\":0"),
        ("{}\n", "\"id\":0"),
        ("\u{7f}\n", "\"id\":0"),
    ] {
        stream.get_mut().write_all(request.as_bytes()).unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        assert!(line.contains("\"error\"") && line.contains(id), "{request:?}: {line:?}");
    }
    // More than a request can be: the connection ends, the monitor does not.
    let _ = stream.get_mut().write_all(&[b'x'; 200_000]);
    let mut line = String::new();
    assert!(matches!(stream.read_line(&mut line), Ok(0) | Err(_)));
    assert_eq!(client.status().unwrap().state, "running");
    client.call(Method::Quit).unwrap();
    child.wait().unwrap();
}

#[test]
fn signals_end_it_as_signals_do_and_leave_nothing() {
    if !kvm() {
        return;
    }
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let place = Place::new();
        let (mut child, _client) = running(&place);
        // SAFETY: plain numbers; the child is ours and has not been waited for.
        unsafe { libc::kill(child.id() as i32, signal) };
        assert_eq!(child.wait().unwrap().signal(), Some(signal));
        assert_eq!(place.report()["outcome"], "signal");
        assert!(!place.path("control").exists());
    }
}

#[test]
fn it_can_die_with_its_parent() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let kernel = place.write("kernel", Guest::new().print("up\n").spin().elf());
    let out = place.path("out");
    let script = format!(
        "{} --kernel {} --serial --die-with-parent > {} & echo $!; while ! [ -s {} ]; do sleep 0.01; done",
        env!("CARGO_BIN_EXE_bulkhead-vmm"),
        kernel.display(),
        out.display(),
        out.display()
    );
    let output =
        std::process::Command::new("sh").arg("-c").arg(script).stderr(Stdio::inherit()).output().unwrap();
    let pid = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let deadline = Instant::now() + Duration::from_secs(5);
    let alive = || {
        std::fs::read_to_string(Path::new("/proc").join(&pid).join("stat"))
            .is_ok_and(|stat| !stat.contains(") Z "))
    };
    while alive() {
        assert!(Instant::now() < deadline, "process {pid} lives on");
        thread::sleep(Duration::from_millis(5));
    }
}
