//! The KVM host as a test sees it from inside.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::leak::Snapshot;
use crate::process::{Finished, Program};

/// Where the artefacts lie in the host: `bin/`, `share/bulkhead/`, `share/bulkhead-tests/`.
const PREFIX: &str = "/usr/local";
/// Set on hosts that are not emulated, to where the artefacts lie there.
pub(crate) const PREFIX_VARIABLE: &str = "BULKHEAD_TESTS_PREFIX";

/// The KVM host a test runs in.
#[derive(Debug)]
pub struct Host {
    prefix: PathBuf,
    work: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new() -> Result<Self> {
        let prefix = std::env::var_os(PREFIX_VARIABLE).map_or_else(|| PathBuf::from(PREFIX), PathBuf::from);
        // Short, because sockets are made below it.
        let work = tempfile::Builder::new().prefix("t-").tempdir()?;
        Ok(Self { prefix, work })
    }

    /// Keeps the working directory: what lies in it may tell why the test failed.
    pub(crate) fn keep_work(&mut self) {
        self.work.disable_cleanup(true);
    }

    /// A directory of this test alone, removed at its end.
    pub fn work(&self) -> &Path {
        self.work.path()
    }

    /// Writes a file into [`Host::work`] and answers its path.
    pub fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.work().join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, contents).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// Runs a command to its end.
    pub fn run<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Result<Finished> {
        Program::new(words).run()
    }

    /// Runs `bulkhead` with these arguments to its end.
    pub fn bulkhead<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Result<Finished> {
        self.bulkhead_program(words).run()
    }

    /// `bulkhead` with these arguments, to be run.
    pub fn bulkhead_program<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Program {
        Program::new(["bulkhead"]).args(words)
    }

    /// The guest kernel under test.
    pub fn kernel(&self) -> PathBuf {
        self.prefix.join("share/bulkhead/vmlinux")
    }

    /// The initramfs with the agent under test.
    pub fn initramfs(&self) -> PathBuf {
        self.prefix.join("share/bulkhead/initramfs.cpio")
    }

    /// The monitor's program under test.
    pub fn monitor(&self) -> PathBuf {
        self.prefix.join("bin/bulkhead-vmm")
    }

    /// The archive of an image: `busybox`, `busybox-docker`, `python`, `redis`.
    pub fn image(&self, name: &str) -> PathBuf {
        self.tests_share().join("images").join(format!("{name}.tar"))
    }

    fn tests_share(&self) -> PathBuf {
        self.prefix.join("share/bulkhead-tests")
    }

    /// Fails with the reason when an image could not be loaded while the host was prepared.
    pub(crate) fn check_loaded(&self, image: &str) -> Result<()> {
        let log = self.tests_share().join(format!("loaded/{image}"));
        let log = fs::read_to_string(&log)
            .with_context(|| format!("image {image} was not loaded into this host"))?;
        match log.trim_end().rsplit_once("status ") {
            Some((_, "0")) => Ok(()),
            _ => bail!("'bulkhead image load {image}.tar' failed while this host was prepared:\n{log}"),
        }
    }

    /// Whether this is the emulated host.
    pub fn is_emulated(&self) -> bool {
        std::env::var_os(PREFIX_VARIABLE).is_none()
    }

    /// Repeats `check` until it is true; fails with `what` after `patience`.
    pub fn eventually(
        &self,
        what: &str,
        patience: Duration,
        mut check: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let end = Instant::now() + patience;
        while !check()? {
            if Instant::now() > end {
                bail!("{what}: not so within {patience:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// All that could be left behind on this host, but not the test's own files. [`Host::is_as`] compares with it.
    pub fn look(&self) -> Snapshot {
        // The one who watches over the test collects all orphans.
        Snapshot::of(std::os::unix::process::parent_id(), self.is_emulated()).without(self.work())
    }

    /// Fails unless all is again as it was before, within `patience`; `what` says after what.
    pub fn is_as(&self, before: &Snapshot, what: &str, patience: Duration) -> Result<()> {
        let end = Instant::now() + patience;
        let mut pause = Duration::from_millis(10);
        loop {
            let left = self.look().difference(before);
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("after {what}, the host is not as it was:\n  {}", left.join("\n  "));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(300));
        }
    }

    /// A small file system of its own (tmpfs of this many KiB), mounted until the answer is dropped.
    pub fn small_disk(&self, kib: u64) -> Result<SmallDisk> {
        let path = self.work().join("small-disk");
        fs::create_dir_all(&path)?;
        let size = format!("size={kib}k");
        Program::new(["mount", "-t", "tmpfs", "-o", &size, "small-disk"]).args([&path]).run()?.ok()?;
        Ok(SmallDisk { path })
    }
}

/// See [`Host::small_disk`].
#[derive(Debug)]
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A mount that stays is found by the leak check.
        let _ = Program::new(["umount"]).args([&self.path]).run();
        let _ = fs::remove_dir(&self.path);
    }
}
