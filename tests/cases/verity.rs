//! Layers on a file system with fs-verity are sealed, and what the disk gives back is checked by the kernel.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;
use serde_json::Value;

const BLOCK: usize = 4096;

/// A disk in a file, mounted as long as this lives.
struct Disk<'a> {
    host: &'a Host,
    file: PathBuf,
    at: PathBuf,
}

impl<'a> Disk<'a> {
    fn new(host: &'a Host, feature: &str) -> Result<Self> {
        let disk = Self { host, file: host.work().join("disk"), at: host.work().join("mounted") };
        File::create(&disk.file)?.set_len(96 << 20)?;
        fs::create_dir_all(&disk.at)?;
        let words = ["mkfs.ext4", "-q", "-b", "4096", "-O", feature, &disk.file.display().to_string()];
        host.run(words)?.ok()?;
        disk.mount()?;
        Ok(disk)
    }

    fn mount(&self) -> Result<()> {
        let words = ["mount".into(), "-o".into(), "loop".into(), self.file.clone(), self.at.clone()];
        self.host.run(words)?.ok().map(drop)
    }

    fn unmount(&self) -> Result<()> {
        // The machine of a run that has returned may be about to end.
        self.host.eventually("unmounted", Duration::from_secs(5), || {
            Ok(self.host.run(["umount".into(), self.at.clone()])?.status == 0)
        })
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        // A mount that stays is found by the leak check.
        let _ = self.unmount();
    }
}

/// What `image inspect` says of the only layer.
fn layer(host: &Host, root: &str) -> Result<Value> {
    let shown = host.bulkhead(["--root", root, "image", "inspect", "busybox"])?.ok()?;
    let shown: Value = serde_json::from_slice(&shown.stdout)?;
    shown.pointer("/0/layers/0").cloned().context("no layer")
}

/// Changes one bit of what the disk has of a file, where the file system does not see it.
fn damage(disk: &Path, content: &[u8]) -> Result<()> {
    let all = fs::read(disk)?;
    let blocks: Vec<_> = content.chunks_exact(BLOCK).collect();
    // One from the middle that is there once.
    let wanted = blocks.get(blocks.len() / 2).context("the layer is too small")?;
    let found: Vec<_> =
        all.chunks_exact(BLOCK).enumerate().filter(|(_, block)| block == wanted).map(|(at, _)| at).collect();
    ensure!(found.len() == 1, "the block is there {} times", found.len());
    let at = found[0] * BLOCK + 99;
    OpenOptions::new().write(true).open(disk)?.write_all_at(&[all[at] ^ 4], at as u64)?;
    Ok(())
}

test!(layers_are_sealed_where_the_disk_can, Needs::bulkhead().deadline(120));
fn layers_are_sealed_where_the_disk_can(host: &Host) -> Result<()> {
    if !host.is_emulated() {
        println!("left out: whether this machine's kernel has fs-verity is not known");
        return Ok(());
    }
    let archive = host.image("busybox").display().to_string();
    // One without it: nothing is sealed, and all goes on as ever.
    let plain = Disk::new(host, "^verity")?;
    let root = plain.at.join("root").display().to_string();
    host.bulkhead(["--root", &root, "image", "load", &archive])?.ok()?;
    ensure!(layer(host, &root)?["verity"].is_null());
    host.bulkhead(["--root", &root, "image", "verify"])?.ok()?.stdout_has("good\n")?;
    drop(plain);

    let disk = Disk::new(host, "verity")?;
    host.bulkhead(["--root", &root, "image", "load", &archive])?.ok()?;
    let about = layer(host, &root)?;
    ensure!(about["verity"].as_str().is_some_and(|digest| digest.starts_with("sha256:")), "{about}");
    let path = PathBuf::from(about["path"].as_str().context("no path")?);
    let write = OpenOptions::new().write(true).open(&path).map_err(|error| error.kind());
    ensure!(
        matches!(write, Err(ErrorKind::PermissionDenied)),
        "a sealed layer is opened to write: {write:?}"
    );
    let run = || host.bulkhead(["--root", &root, "run", "--rm", "busybox", "md5sum", "/bin/busybox"]);
    let sum = run()?.ok()?.stdout();
    host.bulkhead(["--root", &root, "image", "verify"])?.ok()?.stdout_has("1 sealed with fs-verity")?;

    // Replaced by an equal one that is not sealed, and put back.
    let content = fs::read(&path)?;
    let away = path.with_extension("away");
    fs::rename(&path, &away)?;
    fs::write(&path, &content)?;
    run()?.status_is(125)?.stderr_has("is so no longer")?.stderr_has("bulkhead image rm")?;
    fs::rename(&away, &path)?;
    run()?.ok()?.stdout_is(&sum)?;

    // A bit of the disk: nothing of the file's looks tells of it.
    disk.unmount()?;
    damage(&disk.file, &content)?;
    disk.mount()?;
    host.bulkhead(["--root", &root, "image", "verify"])?
        .failed()?
        .stderr_has("cannot read the image layer")?;
    let run = run()?.failed()?;
    ensure!(run.stdout() != sum, "what the disk gave was taken for good: {run}");

    // Removed and loaded again, it is sound.
    host.bulkhead(["--root", &root, "image", "rm", "busybox"])?.ok()?;
    host.bulkhead(["--root", &root, "image", "load", &archive])?.ok()?;
    host.bulkhead(["--root", &root, "run", "--rm", "busybox", "md5sum", "/bin/busybox"])?
        .ok()?
        .stdout_is(&sum)?;
    Ok(())
}
