//! Bundles of people who mean harm or do not know better: each is refused with a word that says what is wrong, at once,
//! and nothing is left of it.

use std::fs::{self, File};
use std::os::unix::fs::symlink;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Program;
use bulkhead_tests::test;
use serde_json::{Value, json};

use crate::oci::{Bundle, NEEDS};

/// The bundle is refused, and the word is in why.
fn refused(bundle: &Bundle, what: &str, word: &str) -> Result<()> {
    let check = || {
        let end = bundle.call(&["run", "c1"])?.status_is(1)?.stderr_has(word)?;
        ensure!(end.stdout.is_empty() && !end.stderr().contains("panicked"), "{end}");
        ensure!(end.stderr.len() < 4096, "it says {} bytes", end.stderr.len());
        bundle.nothing_left()
    };
    check().with_context(|| what.to_owned())
}

/// A field (a JSON pointer), what it is set to (`null`: it is taken out), and the word of the refusal.
fn fields() -> Vec<(&'static str, Value, &'static str)> {
    vec![
        ("/ociVersion", Value::Null, "ociVersion is missing"),
        ("/ociVersion", json!("0.5.0"), "ociVersion"),
        ("/ociVersion", json!(1.2), "ociVersion"),
        ("/process", Value::Null, "no process"),
        ("/process", json!([]), "process is no object"),
        ("/process/args", Value::Null, "process.args"),
        ("/process/args", json!([]), "process.args"),
        ("/process/args", json!([""]), "process.args"),
        ("/process/args", json!("true"), "process.args"),
        ("/process/args", json!(["true", 7]), "process.args"),
        ("/process/args", json!(["true", "a\0b"]), "NUL"),
        ("/process/env", json!(["A=\0"]), "NUL"),
        ("/process/env", json!({"A": "b"}), "process.env"),
        ("/process/cwd", Value::Null, "process.cwd"),
        ("/process/cwd", json!("tmp"), "absolute"),
        ("/process/cwd", json!("/\0"), "NUL"),
        ("/root", Value::Null, "root.path"),
        ("/root", json!("rootfs"), "root.path"),
        ("/root/path", json!(""), "root.path"),
        ("/root/path", json!(5), "root.path"),
        ("/root/path", json!("missing"), "missing"),
        ("/root/path", json!("config.json"), "no directory"),
        ("/root/path", json!("out-of-it"), "symbolic link"),
        ("/root/path", json!("out-of-it/../rootfs"), "out-of-it"),
        ("/root/path", json!("a\0b"), "nul"),
        ("/hostname", json!(7), "hostname"),
        ("/annotations", json!({"a": 1}), "annotations"),
        ("/annotations", json!({"dev.bulkhead.memory": "much"}), "dev.bulkhead.memory"),
        ("/annotations", json!({"dev.bulkhead.memory": "99999999999"}), "dev.bulkhead.memory"),
        ("/annotations", json!({"dev.bulkhead.vcpus": "-1"}), "dev.bulkhead.vcpus"),
        ("/mounts", json!([{"destination": "rel", "type": "tmpfs"}]), "mounts[0]"),
        ("/mounts", json!([{"destination": "/x", "type": "bind", "source": "/no/such"}]), "/no/such"),
        ("/mounts", json!([{"destination": "/x", "type": "bind", "source": "a\0"}]), "nul"),
        ("/mounts", json!([{"destination": "/x\0y", "type": "tmpfs", "source": "tmpfs"}]), "nul"),
        ("/linux", json!(5), "network namespace"),
        ("/linux/namespaces", json!("all"), "network namespace"),
        ("/linux/cgroupsPath", json!(["/a"]), "cgroupsPath"),
        ("/linux/cgroupsPath", json!("/../../a"), "cgroupsPath"),
        ("/linux/cgroupsPath", json!("/a\0"), "cgroupsPath"),
        ("/linux/resources/blockIO", json!({"weight": "high"}), "blockIO.weight"),
        ("/linux/resources/cpu", json!({"cpus": 1}), "cpu.cpus"),
        ("/linux/resources/cpu", json!({"cpus": "4000"}), "cpuset.cpus"),
    ]
}

/// Those that the agent in the guest refuses: a machine is booted for each.
fn fields_for_the_guest() -> Vec<(&'static str, Value, &'static str)> {
    vec![
        ("/process/user/uid", json!(-1), "invalid value"),
        ("/process/rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": 1e30, "hard": 1}]), "invalid type"),
        ("/linux/resources/memory", json!({"limit": 1.5e19}), "invalid type"),
        ("/mounts", json!("all of them"), "invalid type"),
    ]
}

/// Sets or removes what a pointer names, whose parents are made.
fn put(config: &mut Value, pointer: &str, value: Value) {
    let mut parts: Vec<_> = pointer.split('/').skip(1).collect();
    let last = parts.pop().unwrap_or_default();
    let mut at = config;
    for part in parts {
        if !at[part].is_object() {
            at[part] = json!({});
        }
        at = &mut at[part];
    }
    match (value, at.as_object_mut()) {
        (Value::Null, Some(fields)) => drop(fields.remove(last)),
        (value, Some(fields)) => drop(fields.insert(last.to_owned(), value)),
        (_, None) => {}
    }
}

test!(a_hostile_config_is_refused_by_name, NEEDS.deadline(120));
fn a_hostile_config_is_refused_by_name(host: &Host) -> Result<()> {
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.runs("echo up")?;
    symlink("/", bundle.dir.join("out-of-it"))?;
    let file = bundle.dir.join("config.json");
    let good = fs::read(&file)?;
    for (pointer, value, word) in fields().into_iter().chain(fields_for_the_guest()) {
        let what = format!("{pointer} is {value}");
        fs::write(&file, &good)?;
        bundle.change(|config| put(config, pointer, value))?;
        refused(&bundle, &what, word)?;
    }

    let text = String::from_utf8(good.clone())?;
    let nested = format!("{}1{}", "[".repeat(5000), "]".repeat(5000));
    let with = |value: &str| text.replacen('{', &format!("{{\"x\":{value},"), 1).into_bytes();
    for (what, contents, word) in [
        ("nothing at all", Vec::new(), "malformed"),
        ("null", b"null".to_vec(), "no JSON object"),
        ("a list", b"[]".to_vec(), "no JSON object"),
        ("its first half", good[..good.len() / 2].to_vec(), "malformed"),
        ("deep nesting", with(&nested), "recursion"),
        ("a number too large", with("1e400"), "out of range"),
        ("no UTF-8", [b"{\"\xff\xfe\":1,".as_slice(), &good[1..]].concat(), "malformed"),
        ("words after it", [good.as_slice(), b"x"].concat(), "malformed"),
    ] {
        fs::write(&file, contents)?;
        refused(&bundle, what, word)?;
    }

    // What has the file's name and is none, or far too large.
    File::create(&file)?.set_len(100 << 20)?;
    refused(&bundle, "100 MiB", "too large")?;
    fs::remove_file(&file)?;
    refused(&bundle, "none", "No such file")?;
    Program::new(["mkfifo"]).args([&file]).run()?.ok()?;
    refused(&bundle, "a fifo", "no regular file")?;
    fs::remove_file(&file)?;
    fs::create_dir(&file)?;
    refused(&bundle, "a directory", "no regular file")?;
    fs::remove_dir(&file)?;
    symlink("/dev/zero", &file)?;
    refused(&bundle, "a device", "no regular file")?;
    fs::remove_file(&file)?;

    // What is odd, and means the same to runc: of two the last one counts, null is nothing, a limit may be any number.
    let mut odd: Value = serde_json::from_slice(&good)?;
    odd["process"]["rlimits"] = Value::Null;
    odd["linux"]["resources"]["memory"] = json!({"limit": i64::MAX});
    odd["linux"]["resources"]["cpu"] = json!({"quota": 1_000_000_000, "period": 100_000});
    let odd = odd.to_string().replacen('{', "{\"process\":7,", 1);
    fs::write(&file, odd)?;
    bundle.call(&["run", "c1"])?.ok()?.stdout_is("up\n")?;
    bundle.nothing_left()
}
