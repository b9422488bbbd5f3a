//! `bulkhead image …`.

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::oci_image::{Image, Layer};
use bulkhead_tests::process::Program;
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;
use serde_json::{Value, json};

use crate::BUSYBOX;

/// A root of this test's own, so that the prepared store stays as it is.
fn root(host: &Host) -> String {
    host.work().join("root").display().to_string()
}

fn images(host: &Host, root: &str) -> Result<Vec<Value>> {
    let listed = host.bulkhead(["--root", root, "image", "ls", "--format", "json"])?.ok()?;
    let value: Value = serde_json::from_slice(&listed.stdout).with_context(|| format!("{listed}"))?;
    Ok(value.as_array().context("image ls --format json gives no array")?.clone())
}

test!(both_formats_load_to_the_same_image, Needs::bulkhead().deadline(60));
fn both_formats_load_to_the_same_image(host: &Host) -> Result<()> {
    let root = root(host);
    let load = |name: &str| {
        let file = host.image(name).display().to_string();
        host.bulkhead(["--root", &root, "image", "load", &file])?.ok()?.stdout_has("busybox")
    };
    load("busybox")?;
    load("busybox")?;
    let first = images(host, &root)?;
    ensure!(first.len() == 1, "{first:?}");
    load("busybox-docker")?;
    let ids = host.bulkhead(["--root", &root, "image", "ls", "-q"])?.ok()?.stdout();
    ensure!(ids.lines().count() == 1, "two formats of one image make: {ids}");
    host.bulkhead(["--root", &root, "run", "--rm", "busybox", "echo", "loaded"])?
        .ok()?
        .stdout_is("loaded\n")?;
    Ok(())
}

test!(load_reads_stdin, Needs::bulkhead());
fn load_reads_stdin(host: &Host) -> Result<()> {
    let root = root(host);
    let archive = fs::read(host.image("busybox"))?;
    host.bulkhead_program(["--root", &root, "image", "load", "-"]).stdin(archive).run()?.ok()?;
    ensure!(images(host, &root)?.len() == 1);
    Ok(())
}

test!(images_are_listed_inspected_tagged_and_removed, BUSYBOX.deadline(60));
fn images_are_listed_inspected_tagged_and_removed(host: &Host) -> Result<()> {
    let root = root(host);
    let file = host.image("busybox").display().to_string();
    let image = |words: &[&str]| host.bulkhead_program(["--root", &root, "image"]).args(words).run();
    image(&["load", &file])?.ok()?;
    image(&["ls"])?.ok()?.stdout_has("busybox")?;
    let shown: Value = serde_json::from_slice(&image(&["inspect", "busybox"])?.ok()?.stdout)?;
    ensure!(shown.to_string().contains("sha256:"), "{shown}");
    image(&["inspect", "nothing"])?.failed()?;
    image(&["tag", "busybox", "other:1"])?.ok()?;
    host.bulkhead(["--root", &root, "run", "--rm", "other:1", "true"])?.ok()?;
    image(&["rm", "busybox"])?.ok()?;
    ensure!(images(host, &root)?.len() == 1);
    image(&["rm", "other:1"])?.ok()?;
    ensure!(images(host, &root)?.is_empty());
    image(&["prune"])?.ok()?;
    let layers = host.run(["find", &root, "-name", "*.erofs"])?.ok()?;
    layers.stdout_is("")?;
    image(&["rm", "busybox"])?.failed()?.stderr_has("busybox")?;
    Ok(())
}

test!(an_image_in_use_is_not_removed, BUSYBOX.deadline(60));
fn an_image_in_use_is_not_removed(host: &Host) -> Result<()> {
    let root = root(host);
    let file = host.image("busybox").display().to_string();
    let bulkhead = |words: &[&str]| host.bulkhead_program(["--root", &root]).args(words).run();
    bulkhead(&["image", "load", &file])?.ok()?;
    bulkhead(&["run", "-d", "--name", "user", "busybox", "sleep", "1000"])?.ok()?;
    bulkhead(&["image", "rm", "busybox"])?.failed()?;
    bulkhead(&["image", "prune", "--all"])?.ok()?;
    bulkhead(&["exec", "user", "echo", "still here"])?.ok()?.stdout_is("still here\n")?;
    bulkhead(&["rm", "-f", "user"])?.ok()?;
    Ok(())
}

test!(layers_become_the_same_bytes_every_time, Needs::bulkhead().deadline(120));
fn layers_become_the_same_bytes_every_time(host: &Host) -> Result<()> {
    let file = host.image("busybox").display().to_string();
    let mut sums = Vec::new();
    for name in ["one", "two"] {
        let root = host.work().join(name).display().to_string();
        host.bulkhead(["--root", &root, "image", "load", &file])?.ok()?;
        let line = format!("find {root} -name '*.erofs' -exec sha256sum {{}} + | cut -d' ' -f1 | sort");
        let sum = host.run(["sh", "-c", &line])?.ok()?.stdout();
        ensure!(sum.lines().count() == 1, "layers of {name}: {sum}");
        sums.push(sum);
    }
    ensure!(sums[0] == sums[1], "{sums:?}");
    Ok(())
}

test!(image_defaults_are_used, Needs::bulkhead().images(&["redis"]).deadline(60));
fn image_defaults_are_used(host: &Host) -> Result<()> {
    let run = host.bulkhead([
        "run",
        "--rm",
        "--entrypoint",
        "sh",
        "redis:7",
        "-c",
        "id -un; pwd; ls -ld . | cut -c1-10",
    ])?;
    run.ok()?.stdout_is("redis\n/data\ndrwxr-xr-x\n")?;
    host.bulkhead(["run", "--rm", "redis:7", "--version"])?.ok()?.stdout_has("Redis server v=7")?;
    Ok(())
}

/// Puts an OCI archive into a registry's file storage, as its own push handler would.
fn publish(archive: &Path, storage: &Path, repository: &str, tag: &str) -> Result<()> {
    let v2 = storage.join("docker/registry/v2");
    let write = |path: PathBuf, bytes: &[u8]| -> Result<()> {
        fs::create_dir_all(path.parent().context("no parent")?)?;
        fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))
    };
    let repository = v2.join("repositories").join(repository);
    let mut manifest = String::new();
    for entry in tar::Archive::new(fs::File::open(archive)?).entries()? {
        let mut entry = entry?;
        let name = entry.path()?.display().to_string();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        if let Some(hex) = name.strip_prefix("blobs/sha256/") {
            write(v2.join(format!("blobs/sha256/{}/{hex}/data", &hex[..2])), &bytes)?;
            write(repository.join(format!("_layers/sha256/{hex}/link")), format!("sha256:{hex}").as_bytes())?;
        } else if name == "index.json" {
            let index: Value = serde_json::from_slice(&bytes)?;
            manifest = index["manifests"][0]["digest"].as_str().context("no digest")?.to_string();
        }
    }
    let hex = manifest.replace("sha256:", "");
    for link in [
        format!("_manifests/revisions/sha256/{hex}/link"),
        format!("_manifests/tags/{tag}/current/link"),
        format!("_manifests/tags/{tag}/index/sha256/{hex}/link"),
    ] {
        write(repository.join(link), manifest.as_bytes())?;
    }
    Ok(())
}

test!(pull_from_a_registry, Needs::bulkhead().deadline(300));
fn pull_from_a_registry(host: &Host) -> Result<()> {
    let root = root(host);
    let storage = host.work().join("registry").display().to_string();
    let config = format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {storage}\nhttp:\n  addr: 127.0.0.1:5000\n"
    );
    let config = host.file("registry.yml", config)?.display().to_string();
    publish(&host.image("busybox"), Path::new(&storage), "test/busybox", "v1")?;
    let registry = Program::new(["docker-registry", "serve", &config]).spawn()?;
    let listens = || Ok(TcpStream::connect("127.0.0.1:5000").is_ok());
    host.eventually("the registry listens", Duration::from_secs(20), listens)?;
    let reference = "127.0.0.1:5000/test/busybox:v1";
    let without = host.bulkhead(["--root", &root, "image", "pull", reference])?.failed()?;
    without.stderr_has("ca-certificates")?;
    let authority = host.file("authority.pem", include_str!("data/authority.pem"))?;
    let pull = |name: &str| {
        host.bulkhead_program(["--root", &root, "image", "pull", "-q", name])
            .env("SSL_CERT_FILE", &authority)
            .run()
    };
    pull(reference)?.ok()?.stdout_has("sha256:")?;
    host.bulkhead(["--root", &root, "run", "--rm", reference, "echo", "pulled"])?
        .ok()?
        .stdout_is("pulled\n")?;
    pull("127.0.0.1:5000/test/nothing:v1")?.failed()?.stderr_has("nothing")?;
    registry.signal(rustix::process::Signal::TERM)?;
    registry.wait()?;
    pull("127.0.0.1:5000/test/busybox:v2")?.failed()?.stderr_has("refused")?;
    Ok(())
}

/// Loads an archive that must be refused; nothing of it may stay.
fn refused(host: &Host, what: &str, archive: &[u8], word: &str) -> Result<()> {
    let root = host.work().join("bad-root").display().to_string();
    let file = host.file("bad.tar", archive)?.display().to_string();
    let load = host.bulkhead(["--root", &root, "image", "load", &file]).with_context(|| what.to_string())?;
    load.failed().and_then(|load| load.stderr_has(word)).with_context(|| what.to_string())?;
    ensure!(images(host, &root)?.is_empty(), "{what}: an image is there all the same");
    let layers = host.run(["find", &root, "-name", "*.erofs"])?.ok()?.stdout();
    ensure!(layers.is_empty(), "{what}: {layers}");
    Ok(())
}

test!(damaged_archives_are_refused_whole, Needs::bulkhead().deadline(120));
fn damaged_archives_are_refused_whole(host: &Host) -> Result<()> {
    let good = fs::read(host.image("busybox"))?;
    let middle = good.len() / 2;
    refused(host, "an empty file", b"", "")?;
    refused(host, "not an archive", &[b'x'; 4096], "")?;
    refused(host, "half an archive", &good[..middle], "")?;
    let mut flipped = good.clone();
    flipped[middle] ^= 1;
    refused(host, "a flipped bit in a layer", &flipped, "digest")?;
    let missing = host.bulkhead(["image", "load", "/no/such.tar"])?;
    missing.failed()?.stderr_has("/no/such.tar")?;
    Ok(())
}

/// A tar of entries that no honest program writes.
fn hostile(entries: &[(&str, tar::EntryType, &str)]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for (name, kind, link) in entries {
        let mut header = tar::Header::new_ustar();
        let fields = header.as_ustar_mut().context("not ustar")?;
        // Not by set_path, which refuses such names.
        fields.name[..name.len()].copy_from_slice(name.as_bytes());
        fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        let size = if *kind == tar::EntryType::Regular { 5 } else { 0 };
        header.set_size(size);
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
        if size > 0 {
            bytes.extend_from_slice(b"owned");
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
    }
    bytes.resize(bytes.len() + 1024, 0);
    Ok(bytes)
}

test!(hostile_layers_touch_nothing_outside, Needs::bulkhead().deadline(120));
fn hostile_layers_touch_nothing_outside(host: &Host) -> Result<()> {
    use tar::EntryType::{Directory, Link, Regular, Symlink};
    let cases: [(&str, Vec<u8>); 4] = [
        ("dots", hostile(&[("../../../../../../tmp/owned", Regular, "")])?),
        ("absolute", hostile(&[("/tmp/owned", Regular, "")])?),
        ("link", hostile(&[("out", Symlink, "/tmp"), ("out/owned", Regular, "")])?),
        ("hard link", hostile(&[("d", Directory, ""), ("d/x", Link, "../../../../etc/passwd")])?),
    ];
    for (what, layer) in cases {
        let image = Image {
            name: "hostile:latest".into(),
            layers: vec![Layer::from_tar(layer)?],
            config: json!({"Cmd": ["x"]}),
        };
        let mut archive = Vec::new();
        image.write_oci(&mut archive)?;
        let file = host.file("hostile.tar", &archive)?.display().to_string();
        let root = host.work().join("hostile").display().to_string();
        // Refused, or taken with the entry inside the image's root: either way nothing appears outside.
        let load = host.bulkhead(["--root", &root, "image", "load", &file])?;
        ensure!((0..=125).contains(&load.status) && load.status != 101, "{what}: {load}");
        ensure!(!Path::new("/tmp/owned").exists(), "{what}: a file appeared outside\n{load}");
    }
    Ok(())
}

test!(a_full_disk_during_load_leaves_nothing, Needs::bulkhead().deadline(120));
fn a_full_disk_during_load_leaves_nothing(host: &Host) -> Result<()> {
    for kib in [64, 1024, 2048] {
        let disk = host.small_disk(kib)?;
        let root = disk.path().display().to_string();
        let file = host.image("python").display().to_string();
        host.bulkhead(["--root", &root, "image", "load", &file])?.failed()?.stderr_has("space")?;
        ensure!(images(host, &root)?.is_empty(), "{kib} KiB");
        let used = host.run(["du", "-sk", &root])?.ok()?.stdout();
        let used: u64 = used.split_whitespace().next().unwrap_or("0").parse()?;
        ensure!(used < 64, "{used} KiB are left of a load that failed, with {kib} KiB");
    }
    Ok(())
}

test!(a_killed_load_leaves_no_half_image, Needs::bulkhead().deadline(300));
fn a_killed_load_leaves_no_half_image(host: &Host) -> Result<()> {
    let root = root(host);
    let file = host.image("busybox").display().to_string();
    for milliseconds in [5, 30, 80, 150, 300, 600] {
        let load = host.bulkhead_program(["--root", &root, "image", "load", &file]).spawn()?;
        std::thread::sleep(Duration::from_millis(milliseconds));
        // It may have finished.
        let _ = load.signal(rustix::process::Signal::KILL);
        load.wait()?;
        for image in images(host, &root)? {
            ensure!(!image.is_null());
            host.bulkhead(["--root", &root, "run", "--rm", "busybox", "true"])?.ok()?;
        }
    }
    host.bulkhead(["--root", &root, "image", "load", &file])?.ok()?;
    host.bulkhead(["--root", &root, "run", "--rm", "busybox", "true"])?.ok()?;
    Ok(())
}
