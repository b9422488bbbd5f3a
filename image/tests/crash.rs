//! Kills at any moment, and full disks.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_image::progress::Silent;
use bulkhead_image::{Error, LoadOptions, PruneScope, Source, Store};
use common::{Layer, TestImage, archive, files, noise};
use serde_json::json;

const ROOT: &str = "BULKHEAD_TEST_ROOT";
const ARCHIVE: &str = "BULKHEAD_TEST_ARCHIVE";

fn large() -> TestImage {
    let layer = |name: &str| {
        let files =
            (0..60).fold(Layer::new(), |layer, index| layer.file(&format!("{name}/{index}"), &noise(6_000)));
        files.tar()
    };
    TestImage::new("large:1", ["a", "b", "c", "d"].map(layer).to_vec(), json!({"User": "0"}))
}

fn load(root: &Path, path: &Path) -> Result<(), Error> {
    let store = Store::open(root).unwrap();
    store.load(&Source::Path(path.to_owned()), &LoadOptions::default(), &Silent).map(drop)
}

/// Not a test: what the test below kills.
#[test]
#[ignore = "started by kills_leave_nothing_visible"]
fn child() {
    if let (Some(root), Some(path)) = (std::env::var_os(ROOT), std::env::var_os(ARCHIVE)) {
        load(root.as_ref(), path.as_ref()).unwrap();
    }
}

#[test]
fn kills_leave_nothing_visible() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("large.tar");
    let image = large();
    fs::write(&path, archive(&image.oci_members())).unwrap();
    let reference = scratch.path().join("reference");
    load(&reference, &path).unwrap();
    let whole: Vec<(String, u64)> = sizes(&reference);
    let spawn = |root: &Path| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored"])
            .env(ROOT, root)
            .env(ARCHIVE, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let start = Instant::now();
    assert!(spawn(&scratch.path().join("timing")).wait().unwrap().success());
    let usual = start.elapsed();

    let root = scratch.path().join("store");
    let mut killed = 0;
    for round in 0..40_u32 {
        let mut child = spawn(&root);
        // Spread over the usual time; never the same moment twice.
        thread::sleep(usual * (round % 20) / 19 + Duration::from_micros(u64::from(round) * 7));
        child.kill().unwrap();
        killed += u32::from(!child.wait().unwrap().success());

        let store = Store::open(&root).unwrap();
        // Every file that has its final name is whole.
        for (name, size) in sizes(&root) {
            if !name.starts_with("tmp/") {
                let expected = whole.iter().find(|(other, _)| *other == name);
                assert_eq!(expected.map(|(_, size)| *size), Some(size), "round {round}: {name}");
            }
        }
        if let Ok(found) = store.resolve("large:1") {
            assert!(found.read_file("a/0").unwrap().is_some());
            store.remove("large:1", false, &|_| false).unwrap();
        }
        if round % 3 == 0 {
            store.prune(PruneScope::Unused, &|_| false).unwrap();
            assert_eq!(files(&root), Vec::<String>::new(), "round {round}");
        }
    }
    assert!(killed >= 10, "only {killed} kills came in time");
    load(&root, &path).unwrap();
    assert_eq!(sizes(&root), whole);
}

fn sizes(root: &Path) -> Vec<(String, u64)> {
    files(root)
        .into_iter()
        .map(|name| (name.clone(), fs::metadata(root.join(&name)).unwrap().len()))
        .collect()
}

/// The other test's children may hold our descriptors for a moment, between fork and exec.
fn unmount(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !Command::new("umount").arg(path).status().unwrap().success() {
        assert!(Instant::now() < deadline, "{} stays mounted", path.display());
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_full_disk_is_said_so_and_nothing_is_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("large.tar");
    fs::write(&path, archive(&large().oci_members())).unwrap();
    let root = scratch.path().join("small");
    fs::create_dir(&root).unwrap();
    for (size, fits) in [("64k", false), ("1m", false), ("1300k", false), ("1500k", false), ("32m", true)] {
        let options = format!("size={size}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&root).status();
        if !mounted.is_ok_and(|status| status.success()) {
            eprintln!("SKIPPED: cannot mount a tmpfs");
            return;
        }
        let result = load(&root, &path);
        let left = files(&root);
        // The same archive from a pipe or compressed needs a spool.
        let packed = scratch.path().join("large.tar.gz");
        fs::write(&packed, common::gzip(&fs::read(&path).unwrap())).unwrap();
        let spooled = load(&root, &packed);
        let left_after_spool = files(&root);
        unmount(&root);
        if fits {
            result.unwrap();
            spooled.unwrap();
            continue;
        }
        for (result, left) in [(result, left), (spooled, left_after_spool)] {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::NoSpace { .. }), "{size}: {error}");
            assert!(error.to_string().contains("nothing was kept"));
            assert_eq!(left, Vec::<String>::new(), "{size}");
        }
    }
}
