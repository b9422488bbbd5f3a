//! What root forbids on this host.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Program;
use bulkhead_tests::test;

use crate::{BUSYBOX, shell};

const FILE: &str = "/etc/bulkhead/policy.toml";

/// Removes the policy when the test ends, however.
struct Written;

impl Drop for Written {
    fn drop(&mut self) {
        let _ = fs::remove_file(FILE);
    }
}

fn write(text: &str) -> Result<Written> {
    fs::create_dir_all("/etc/bulkhead")?;
    fs::write(FILE, text)?;
    fs::set_permissions(FILE, fs::Permissions::from_mode(0o644))?;
    Ok(Written)
}

test!(the_policy_binds_every_start, BUSYBOX.deadline(180));
fn the_policy_binds_every_start(host: &Host) -> Result<()> {
    if !host.is_emulated() {
        // There is one policy on a host, and this one is somebody's.
        return Ok(());
    }
    let allowed = host.work().join("allowed");
    fs::create_dir_all(allowed.join("secret"))?;
    fs::create_dir_all(allowed.join("data"))?;
    fs::write(allowed.join("data/file"), "file\n")?;
    let (shown, at) =
        (allowed.display().to_string(), |path: &str| format!("{}/{path}:/data", allowed.display()));
    let text = format!(
        "[images]\nallow = ['docker.io/library/busybox:*']\n[mounts]\nallow = ['{shown}']\ndeny = ['{shown}/secret']\n\
         read_only = ['{shown}/data']\n[containers]\nprivileged = false\ncap_add = ['NET_ADMIN']\nseccomp_unconfined = false\n\
         [limits]\nmemory = '256m'\nvcpus = 1\nstorage = '64m'\n"
    );
    let written = write(&text)?;
    let small = ["--memory", "64m", "--storage", "32m"];
    let run =
        |flags: &[&str]| shell(host, &[&small[..], flags].concat(), "cat /data/file 2>/dev/null; echo ran");
    run(&[])?.ok()?.stdout_is("ran\n")?;
    run(&["-v", &format!("{}:ro", at("data")), "--cap-add", "net_admin"])?.ok()?.stdout_is("file\nran\n")?;
    // A link that leads out is what it leads to.
    symlink("/etc", allowed.join("link"))?;
    symlink("secret", allowed.join("inner"))?;
    let refused = |flags: &[&str], rule: &str| -> Result<()> {
        shell(host, flags, "echo ran")?.status_is(125)?.stdout_is("")?.stderr_has(rule)?.stderr_has(FILE)?;
        Ok(())
    };
    for (flags, rule) in [
        (&["-v", &at("link")][..], "/etc of the host: mounts.allow"),
        (&["-v", "/etc:/data:ro"], "mounts.allow"),
        (&["-v", &at("secret")], "mounts.deny"),
        (&["-v", &at("inner")], "mounts.deny"),
        (&["-v", &at("")], "mounts.deny"),
        (&["-v", &at("data")], "mounts.read_only"),
        (&["--privileged"], "containers.privileged"),
        (&["--cap-add", "SYS_ADMIN"], "containers.cap_add"),
        (&["--security-opt", "seccomp=unconfined"], "containers.seccomp_unconfined"),
    ] {
        refused(&[&small[..], flags].concat(), rule)?;
    }
    refused(&["--memory", "512m", "--storage", "32m"], "limits.memory")?;
    refused(&["--cpus", "2", "--memory", "64m", "--storage", "32m"], "limits.vcpus")?;
    refused(&["--memory", "64m", "--storage", "65m"], "limits.storage")?;
    host.bulkhead(["image", "tag", "busybox", "other:1"])?.ok()?;
    host.bulkhead(["run", "--rm", "--memory", "64m", "--storage", "32m", "other:1", "true"])?
        .status_is(125)?
        .stderr_has("images.allow")?;
    host.bulkhead(["image", "rm", "other:1"])?.ok()?;
    // Whoever swaps a link while it is being opened gets what it led to then: allowed or refused, never both.
    let swapped = allowed.join("swapped");
    let swap = format!(
        "while :; do ln -sfn {shown}/empty {0}.x; mv -T {0}.x {0}; ln -sfn /etc {0}.x; mv -T {0}.x {0}; done",
        swapped.display()
    );
    fs::create_dir_all(allowed.join("empty"))?;
    let mut swapping = Command::new("sh").args(["-c", &swap]).spawn()?;
    let mut ran = 0;
    for _ in 0..8 {
        let tried = shell(host, &[&small[..], &["-v", &at("swapped")]].concat(), "ls /data | wc -l")?;
        if tried.stderr().contains("mounts.allow") {
            continue;
        }
        if tried.stdout() == "0\n" {
            ran += 1;
        } else if !tried.stderr().contains("does not exist") {
            let _ = swapping.kill();
            anyhow::bail!("something else was shared: {tried}");
        }
    }
    swapping.kill()?;
    swapping.wait()?;
    println!("{ran} of 8 ran");
    // By the OCI runtime, too.
    let bundle = host.work().join("bundle");
    fs::create_dir_all(bundle.join("rootfs/bin"))?;
    fs::copy("/usr/bin/busybox", bundle.join("rootfs/bin/true"))?;
    Program::new(["bulkhead-oci", "spec"]).dir(&bundle).run()?.ok()?;
    // It would have no filter, and so not come as far as its files.
    drop(written);
    let written = write(&format!("[mounts]\nallow = ['{shown}']\n"))?;
    let state = host.work().join("state");
    let oci =
        || Program::new(["bulkhead-oci", "--root"]).args([&state]).args(["run", "c1"]).dir(&bundle).run();
    oci()?.failed()?.stderr_has("mounts.allow")?;
    drop(written);

    // A policy that cannot be followed: nothing starts, what runs is ended.
    host.bulkhead(["run", "-d", "--name", "box", "busybox", "sleep", "1000"])?.ok()?;
    for text in ["[mounts]\nallow = 5\n", "nonsense", "[containers]\nprivilege = false\n"] {
        let _written = write(text)?;
        shell(host, &[], "true")?.status_is(125)?.stderr_has(FILE)?.stderr_has("nothing is started")?;
        oci()?.failed()?.stderr_has("nothing is started")?;
    }
    let _written = write("")?;
    fs::set_permissions(FILE, fs::Permissions::from_mode(0o666))?;
    shell(host, &[], "true")?.status_is(125)?.stderr_has("others than root may write")?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    ensure!(Path::new(FILE).exists());
    Ok(())
}

test!(copies_ids_and_engines_are_bound_too, BUSYBOX.deadline(120));
fn copies_ids_and_engines_are_bound_too(host: &Host) -> Result<()> {
    if !host.is_emulated() {
        return Ok(());
    }
    let saved = host.work().join("saved").display().to_string();
    host.bulkhead(["run", "-d", "--name", "origin", "busybox", "sleep", "1000"])?.ok()?;
    host.bulkhead(["snapshot", "origin", &saved])?.ok()?;
    let id = host.bulkhead(["image", "ls", "-q"])?.ok()?.stdout();
    let ids: Vec<_> = id.lines().collect();
    let mut busybox = None;
    for id in ids {
        let shown = host.bulkhead(["image", "inspect", id])?.ok()?.stdout();
        busybox = busybox.or_else(|| shown.contains("library/busybox:latest").then_some(id));
    }
    let id = busybox.context("busybox has no id")?;
    let restore = ["restore", "-d", "--name", "copy", &saved];
    let fork = ["fork", "--name", "copy", "origin"];
    let by_id = ["run", "--rm", id, "true"];
    {
        let _written = write("[images]\ndeny = ['*/busybox:latest']\n")?;
        for words in [&restore[..], &fork, &by_id] {
            host.bulkhead(words.iter().copied())?.failed()?.stderr_has("images.deny")?.stderr_has(FILE)?;
        }
    }
    for limit in
        ["[limits]\nmemory = '32m'\n", "[containers]\nseccomp_unconfined = false\n[limits]\nvcpus = 0\n"]
    {
        let _written = write(limit)?;
        host.bulkhead(restore)?.status_is(125)?.stderr_has("limits.")?;
    }
    ensure!(host.bulkhead(["ps", "-aq"])?.ok()?.stdout().lines().count() == 1, "a refused copy is there");
    let _written = write("[images]\nallow = ['*/busybox:latest']\nengines = 'named'\n")?;
    for words in [&restore[..], &["rm", "-f", "copy"], &fork, &["rm", "-f", "copy"], &by_id] {
        host.bulkhead(words.iter().copied())?.ok()?;
    }
    host.bulkhead(["rm", "-f", "origin"])?.ok()?;

    let bundle = host.work().join("bundle");
    fs::create_dir_all(bundle.join("rootfs/bin"))?;
    fs::copy("/usr/bin/busybox", bundle.join("rootfs/bin/true"))?;
    Program::new(["bulkhead-oci", "spec"]).dir(&bundle).run()?.ok()?;
    let file = bundle.join("config.json");
    let plain: serde_json::Value = serde_json::from_slice(&fs::read(&file)?)?;
    let run = |image: Option<&str>| {
        let mut config = plain.clone();
        config["process"]["args"] = serde_json::json!(["true"]);
        config["process"]["terminal"] = serde_json::json!(false);
        if let Some(image) = image {
            config["annotations"] = serde_json::json!({ "io.kubernetes.cri.image-name": image });
        }
        fs::write(&file, config.to_string())?;
        let root = host.work().join("state").display().to_string();
        Program::new(["bulkhead-oci", "--root", &root, "run", "c1"]).dir(&bundle).run()
    };
    run(None)?.failed()?.stderr_has("images.engines = \"named\"")?;
    run(Some("docker.io/library/other:1"))?.failed()?.stderr_has("images.allow")?;
    run(Some("docker.io/library/busybox:latest"))?.ok()?;
    Ok(fs::remove_dir_all(saved)?)
}

test!(a_part_that_was_changed_does_not_start, BUSYBOX.deadline(120));
fn a_part_that_was_changed_does_not_start(host: &Host) -> Result<()> {
    if !host.is_emulated() {
        // It damages the installation.
        return Ok(());
    }
    host.bulkhead(["image", "verify"])?
        .ok()?
        .stdout_has("docker.io/library/busybox:latest")?
        .stdout_has("good")?;
    shell(host, &[], "true")?.ok()?;
    // In a new file: a program that runs cannot be written to.
    let replace = |path: &Path, bytes: &[u8]| -> Result<()> {
        let (new, mode) = (path.with_extension("new"), fs::metadata(path)?.permissions());
        fs::write(&new, bytes)?;
        fs::set_permissions(&new, mode)?;
        Ok(fs::rename(&new, path)?)
    };
    let flip = |path: &Path| -> Result<Vec<u8>> {
        let bytes = fs::read(path)?;
        let mut changed = bytes.clone();
        let middle = changed.len() / 2;
        changed[middle] ^= 1;
        replace(path, &changed)?;
        Ok(bytes)
    };
    for (part, name) in
        [(host.kernel(), "guest kernel"), (host.initramfs(), "guest initramfs"), (host.monitor(), "monitor")]
    {
        let good = flip(&part)?;
        let tried = shell(host, &[], "true")?.status_is(125)?;
        tried
            .stderr_has(&format!("the {name}"))?
            .stderr_has("damaged")?
            .stderr_has("expected is sha256:")?
            .stderr_has("install")?;
        host.bulkhead(["doctor"])?.stdout_has("damaged")?;
        replace(&part, &good)?;
        shell(host, &[], "true")?.ok()?;
    }
    let inspected = host.bulkhead(["image", "inspect", "busybox"])?.ok()?.stdout();
    let json: serde_json::Value = serde_json::from_str(&inspected)?;
    let layer = json[0]["layers"][0].clone();
    ensure!(layer["digest"].as_str().is_some_and(|digest| digest.starts_with("sha256:")), "{layer}");
    let path = Path::new(layer["path"].as_str().unwrap_or_default());
    let saved = host.work().join("saved").display().to_string();
    host.bulkhead(["run", "-d", "--name", "origin", "busybox", "sleep", "1000"])?.ok()?;
    host.bulkhead(["snapshot", "origin", &saved])?.ok()?;
    host.bulkhead(["rm", "-f", "origin"])?.ok()?;
    let good = flip(path)?;
    host.bulkhead(["restore", "-d", &saved])?
        .status_is(125)?
        .stderr_has("image layer")?
        .stderr_has("damaged")?;
    shell(host, &[], "true")?
        .status_is(125)?
        .stderr_has("image layer")?
        .stderr_has("damaged")?
        .stderr_has("image rm")?;
    host.bulkhead(["image", "verify", "busybox"])?.failed()?.stderr_has("damaged")?;
    replace(path, &good)?;
    host.bulkhead(["image", "verify", "busybox"])?.ok()?;
    shell(host, &[], "true")?.ok()?;
    Ok(())
}
