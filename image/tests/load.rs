//! Loading, finding and removing images.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;

use std::fs;
use std::path::Path;

use bulkhead_image::progress::Silent;
use bulkhead_image::{Digest, Error, LoadOptions, LoadedImage, PruneScope, Source, Store};
use common::{Layer, TestImage, archive, descriptor, files, gzip, sample, unpack, zstd};
use serde_json::json;

fn load_bytes(store: &Store, bytes: &[u8]) -> Result<Vec<LoadedImage>, Error> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("archive.tar");
    fs::write(&path, bytes).unwrap();
    store.load(&Source::Path(path), &LoadOptions::default(), &Silent)
}

fn store() -> (tempfile::TempDir, Store) {
    let scratch = tempfile::tempdir().unwrap();
    let store = Store::open(&scratch.path().join("store")).unwrap();
    (scratch, store)
}

fn root(scratch: &tempfile::TempDir) -> std::path::PathBuf {
    scratch.path().join("store")
}

fn nobody(_: &Digest) -> bool {
    false
}

#[test]
fn every_kind_of_archive_gives_the_same_image() {
    let image = sample();
    let directory = tempfile::tempdir().unwrap();
    unpack(&image.oci_members(), directory.path());
    let oci = archive(&image.oci_members());
    let docker = archive(&image.docker_members());
    let mut layers: Vec<Vec<Vec<u8>>> = Vec::new();
    for bytes in [oci.clone(), gzip(&oci), zstd(&oci), docker.clone(), gzip(&docker), Vec::new()] {
        let (_scratch, store) = store();
        let loaded = if bytes.is_empty() {
            store.load(&Source::Path(directory.path().to_owned()), &LoadOptions::default(), &Silent).unwrap()
        } else {
            load_bytes(&store, &bytes).unwrap()
        };
        assert_eq!(loaded.len(), 1);
        assert_eq!(loaded[0].id, image.id());
        assert_eq!(loaded[0].names, ["docker.io/library/sample:1"]);
        assert_eq!(loaded[0].new_layers, 3);
        let found = store.resolve("sample:1").unwrap();
        assert_eq!(found.id, image.id());
        assert_eq!(found.config.env, ["A=b"]);
        assert_eq!(found.config.stop_signal, "SIGQUIT");
        layers.push(found.layers.iter().map(|path| fs::read(path).unwrap()).collect());
    }
    assert!(layers.windows(2).all(|pair| pair[0] == pair[1]), "the same layer is the same bytes");
}

#[test]
fn files_are_seen_through_the_layers() {
    let (_scratch, store) = store();
    load_bytes(&store, &archive(&sample().oci_members())).unwrap();
    let image = store.resolve("sample:1").unwrap();
    let read = |path: &str| image.read_file(path).unwrap();
    assert_eq!(read("replaced").as_deref(), Some(&b"new"[..]));
    assert_eq!(read("/hidden/b").as_deref(), Some(&b"new"[..]));
    assert_eq!(read("hidden/a"), None);
    assert_eq!(read("gone"), None);
    assert_eq!(read("loop"), None);
    assert_eq!(read("etc"), None);
    assert_eq!(read("etc/passwd/x"), None);
    assert!(read("link").unwrap().starts_with(b"root:"));
    assert!(read("../../link").unwrap().starts_with(b"root:"));
    assert_eq!(read("bin/big2").unwrap(), vec![0x5a; 300_000]);
    let user = image.resolve_user("redis").unwrap();
    assert_eq!(
        (user.uid, user.gid, user.additional_gids, user.home.as_str()),
        (101, 102, vec![102, 7], "/var/lib/redis")
    );
    assert_eq!(image.resolve_user("5:ssl").unwrap().gid, 7);
    assert!(image.resolve_user("nobody").is_err());
    assert_eq!(image.resolve_group("redis").unwrap(), 102);
}

#[test]
fn images_are_found_by_name_digest_and_id() {
    let (_scratch, store) = store();
    let image = sample();
    load_bytes(&store, &archive(&image.oci_members())).unwrap();
    let id = image.id();
    for name in
        ["sample:1", "docker.io/library/sample:1", &id.to_string(), &id.hex(), &id.short(), &id.hex()[..4]]
    {
        assert_eq!(store.resolve(name).unwrap().id, id, "{name}");
    }
    for name in ["sample", "other/sample:1", "quay.io/sample:1", "ffffffffffffff", "A/B/..", ""] {
        assert!(store.resolve(name).is_err(), "{name}");
    }
    store.tag("sample:1", "localhost/mine").unwrap();
    assert_eq!(store.resolve("mine").unwrap().name.as_deref(), Some("localhost/mine:latest"));
    assert_eq!(
        store.inspect("mine").unwrap().summary.names,
        ["docker.io/library/sample:1", "localhost/mine:latest"]
    );
    assert_eq!(store.list().unwrap().len(), 1);
    let long = format!("quay.io/{}/x", ["a"; 100].join("/"));
    store.tag("mine", &long).unwrap();
    assert_eq!(store.resolve(&long).unwrap().id, id);
}

#[test]
fn loading_again_converts_nothing() {
    let (_scratch, store) = store();
    let bytes = archive(&sample().oci_members());
    assert_eq!(load_bytes(&store, &bytes).unwrap()[0].new_layers, 3);
    assert_eq!(load_bytes(&store, &bytes).unwrap()[0].new_layers, 0);
}

#[test]
fn removal_keeps_what_others_need() {
    let (scratch, store) = store();
    let sample = sample();
    let shared = TestImage::new("other:1", vec![sample.tars[0].clone()], json!({}));
    load_bytes(&store, &archive(&sample.oci_members())).unwrap();
    load_bytes(&store, &archive(&shared.oci_members())).unwrap();
    store.tag("sample:1", "again").unwrap();

    assert!(matches!(store.remove(&sample.id().hex(), false, &nobody), Err(Error::SeveralNames { .. })));
    let removed = store.remove("again", false, &|_| true).unwrap();
    assert!(removed.image.is_none() && removed.layers.is_empty(), "it has another name");
    assert!(matches!(store.remove("sample:1", false, &|_| true), Err(Error::InUse { .. })));
    let removed = store.remove("sample:1", true, &|_| true).unwrap();
    assert_eq!((removed.image, removed.layers.len()), (Some(sample.id()), 2));
    assert!(matches!(store.resolve("sample:1"), Err(Error::NotFound { .. })));
    let other = store.resolve("other:1").unwrap();
    assert!(other.layers.iter().all(|path| path.exists()));

    // Its name goes to another image; prune takes it then.
    let newer = TestImage::new("other:1", vec![sample.tars[1].clone()], json!({}));
    load_bytes(&store, &archive(&newer.oci_members())).unwrap();
    assert_eq!(store.list().unwrap().len(), 2);
    assert_eq!(store.prune(PruneScope::Unnamed, &|_| true).unwrap().images, []);
    let pruned = store.prune(PruneScope::Unnamed, &nobody).unwrap();
    assert_eq!((pruned.images, pruned.layers.len()), (vec![shared.id()], 1));
    assert_eq!(store.prune(PruneScope::Unused, &nobody).unwrap().images, [newer.id()]);
    assert_eq!(files(&root(&scratch)), Vec::<String>::new());
}

#[test]
fn asking_an_empty_store_creates_nothing() {
    let (scratch, store) = store();
    assert!(store.list().unwrap().is_empty());
    assert!(store.resolve("a").is_err());
    assert!(store.remove("a", true, &nobody).is_err());
    store.prune(PruneScope::Unused, &nobody).unwrap();
    assert!(store.load(&Source::Path("/nonexistent".into()), &LoadOptions::default(), &Silent).is_err());
    assert!(!root(&scratch).exists());
}

/// Every member damaged in turn; the error must name what was damaged, and nothing may stay.
#[test]
fn damage_is_found_and_leaves_nothing() {
    let image = sample();
    for members in [image.oci_members(), image.docker_members()] {
        for (index, (name, content)) in members.iter().enumerate() {
            for position in [0, content.len() / 2, content.len() - 1] {
                let (scratch, store) = store();
                let mut damaged = members.clone();
                damaged[index].1[position] ^= 0x41;
                let result = load_bytes(&store, &archive(&damaged));
                if name == "oci-layout" {
                    continue;
                }
                let error = result.unwrap_err();
                let blob = name.rsplit('/').next().unwrap();
                if name.starts_with("blobs/") {
                    assert!(matches!(error, Error::DigestMismatch { .. }), "{name} {position}: {error}");
                    assert!(error.to_string().contains(blob), "{name}: {error}");
                } else if name.ends_with("layer.tar") {
                    assert!(matches!(error, Error::DigestMismatch { .. }), "{name} {position}: {error}");
                }
                assert_eq!(files(&root(&scratch)), Vec::<String>::new(), "{name}");
            }
        }
    }
}

#[test]
fn truncation_is_an_error_and_leaves_nothing() {
    let image = sample();
    for bytes in [
        archive(&image.oci_members()),
        archive(&image.docker_members()),
        gzip(&archive(&image.oci_members())),
    ] {
        // The last 1024 bytes are the end mark.
        for length in (0..bytes.len() - 1024 - 512).step_by(bytes.len() / 60) {
            let (scratch, store) = store();
            let result = load_bytes(&store, &bytes[..length]);
            assert!(result.is_err(), "{length} of {}", bytes.len());
            assert_eq!(files(&root(&scratch)), Vec::<String>::new());
        }
    }
}

#[test]
fn a_forged_configuration_cannot_name_other_layers() {
    let (scratch, store) = store();
    let mut image = sample();
    // The blobs are right by the manifest, but not what the configuration promises.
    image.tars.swap(0, 1);
    let lying = TestImage::new("lying", image.tars, json!({}));
    let mut forged = TestImage { blobs: sample().blobs, ..lying };
    let error = load_bytes(&store, &archive(&forged.oci_members())).unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
    forged.blobs.pop();
    let error = load_bytes(&store, &archive(&forged.oci_members())).unwrap_err();
    assert!(error.to_string().contains("3 layers, it has 2"), "{error}");
    assert_eq!(files(&root(&scratch)), Vec::<String>::new());
}

#[test]
fn what_is_no_image_is_said_so() {
    let (_scratch, store) = store();
    let cases: [(Vec<u8>, &str); 6] = [
        (Vec::new(), "empty"),
        (b"hello".to_vec(), "cannot read"),
        (vec![b'x'; 4096], "not a tar archive"),
        (Layer::new().file("a", b"b").tar(), "neither an OCI image layout"),
        (Layer::new().file("index.json", b"{}").tar(), "index.json is not valid"),
        (Layer::new().file("manifest.json", b"[]").tar(), "lists no images"),
    ];
    for (bytes, expected) in cases {
        let error = load_bytes(&store, &bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn the_platform_is_chosen() {
    let (_scratch, store) = store();
    let image = sample();
    let mut members = image.oci_members();
    let entry = |os: &str, architecture: &str, bytes: &[u8]| {
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", bytes);
        entry["platform"] = json!({"os": os, "architecture": architecture});
        entry
    };
    let nested = json!({"schemaVersion": 2, "manifests": [
        entry("unknown", "unknown", b"attestation"), entry("linux", "arm64", b"absent"),
        entry("linux", "amd64", &image.manifest())]})
    .to_string();
    let mut top = descriptor("application/vnd.oci.image.index.v1+json", nested.as_bytes());
    top["annotations"] = json!({"org.opencontainers.image.ref.name": "multi:1"});
    members[1].1 = json!({"schemaVersion": 2, "manifests": [top]}).to_string().into_bytes();
    members.push((format!("blobs/sha256/{}", Digest::of(nested.as_bytes()).hex()), nested.into_bytes()));
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("multi.tar");
    fs::write(&path, archive(&members)).unwrap();
    let load = |platform: &str| {
        let options = LoadOptions { platform: platform.parse().unwrap(), name: None };
        store.load(&Source::Path(path.clone()), &options, &Silent)
    };
    assert_eq!(load("linux/amd64").unwrap()[0].names, ["docker.io/library/multi:1"]);
    let error = load("linux/riscv64").unwrap_err().to_string();
    assert!(error.contains("linux/arm64, linux/amd64"), "{error}");
}

#[test]
fn a_name_can_be_given() {
    let (_scratch, store) = store();
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("x.tar");
    fs::write(&path, archive(&sample().oci_members())).unwrap();
    let options = LoadOptions { name: Some("mine:2".to_owned()), ..LoadOptions::default() };
    store.load(&Source::Path(path.clone()), &options, &Silent).unwrap();
    assert_eq!(store.resolve("mine:2").unwrap().id, sample().id());
    let bad = LoadOptions { name: Some("NOT A NAME".to_owned()), ..LoadOptions::default() };
    assert!(store.load(&Source::Path(path), &bad, &Silent).is_err());
}

#[test]
fn the_same_image_loaded_twice_at_once() {
    let (scratch, store) = store();
    let bytes = archive(&sample().oci_members());
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| load_bytes(&store, &bytes).unwrap());
        }
    });
    let found = files(&root(&scratch));
    let layers =
        |suffix| found.iter().filter(|name| name.starts_with("layers/") && name.ends_with(suffix)).count();
    assert_eq!((layers(".erofs"), layers(".digest")), (3, 3));
    assert!(!found.iter().any(|name| name.starts_with("tmp/")));
    assert!(store.resolve("sample:1").is_ok());
}

#[test]
fn images_can_be_removed_while_others_are_added() {
    let (scratch, store) = store();
    load_bytes(&store, &archive(&sample().oci_members())).unwrap();
    // What a command that adds images holds.
    let lock = fs::File::open(root(&scratch).join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockShared).unwrap();
    let removed = store.remove("sample:1", false, &nobody).unwrap();
    assert_eq!((removed.image, removed.layers.len()), (Some(sample().id()), 0), "layers may be wanted");
    assert!(store.resolve("sample:1").is_err());
    drop(lock);
    assert_eq!(store.prune(PruneScope::Unnamed, &nobody).unwrap().layers.len(), 3);
    assert_eq!(files(&root(&scratch)), Vec::<String>::new());
}

#[test]
fn stale_temporary_files_go() {
    let (scratch, store) = store();
    let bytes = archive(&sample().oci_members());
    load_bytes(&store, &bytes).unwrap();
    let stale = root(&scratch).join("tmp/123-4");
    fs::write(&stale, b"left by a kill").unwrap();
    let orphan = root(&scratch).join(format!("layers/sha256/{}.erofs", Digest::of(b"x").hex()));
    fs::write(&orphan, b"left by a kill").unwrap();
    load_bytes(&store, &bytes).unwrap();
    assert!(!stale.exists());
    store.prune(PruneScope::Unnamed, &nobody).unwrap();
    assert!(!orphan.exists());
    assert!(store.resolve("sample:1").is_ok());
}

#[test]
fn a_damaged_store_is_reported() {
    let (scratch, store) = store();
    load_bytes(&store, &archive(&sample().oci_members())).unwrap();
    let record = root(&scratch).join(format!("images/{}.json", sample().id().hex()));
    fs::write(&record, b"{\"version\":").unwrap();
    assert!(matches!(store.resolve("sample:1"), Err(Error::DamagedStore { .. })));
    fs::remove_file(&record).unwrap();
    assert!(matches!(store.resolve("sample:1"), Err(Error::DamagedStore { .. })));
    assert!(mode(&root(&scratch)) == 0o700);
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt as _;
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}
