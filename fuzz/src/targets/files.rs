//! Files that others give to the runtime: archives that come out of a guest, settings, snapshots of containers.

use std::cell::OnceCell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bulkhead_runtime::fuzzing;
use bulkhead_runtime::snapshot::Saved;
use tar::EntryType;
use tempfile::TempDir;

use super::image::Layer;
use crate::{Target, seed};

/// `bulkhead cp CONTAINER:…`.
pub const COPY: Target = Target {
    name: "copy",
    surface: "the archive that `cp` gets out of a guest, unpacked",
    run: copy,
    seeds: || {
        let of = |layer: Layer| [vec![1], layer.tar()].concat();
        let dir = || Layer::default().raw(EntryType::Directory, b"d/", b"", b"");
        let long = "a/".repeat(80);
        vec![
            seed("a file", of(Layer::default().file("f", b"content"))),
            seed("a tree", {
                let tree = dir().file("d/f", b"hi").raw(EntryType::Symlink, b"d/l", b"f", b"");
                of(tree.raw(EntryType::Link, b"d/h", b"d/f", b""))
            }),
            seed("out of the target", of(dir().file("d/../../x", b"x"))),
            seed("through a link", of(dir().raw(EntryType::Symlink, b"d/l", b"..", b"").file("d/l/x", b"x"))),
            seed("a device", of(dir().raw(EntryType::Char, b"d/null", b"", b""))),
            seed("a long name", {
                of(dir()
                    .raw(EntryType::GNULongName, b"././@LongLink", b"", format!("d/{long}\0").as_bytes())
                    .file("x", b""))
            }),
            seed("nothing", of(Layer::default())),
        ]
    },
};
/// A bundle's `config.json`.
pub const BUNDLE: Target = Target {
    name: "bundle",
    surface: "config.json of a bundle, as `bulkhead-oci create` reads it",
    run: |data| {
        with_place(|place| {
            fs::create_dir_all(place.join("rootfs")).expect("a directory");
            fs::write(place.join("config.json"), data).expect("a file");
            if let Err(why) = bulkhead_oci::fuzzing::bundle(place) {
                assert!(!why.is_empty());
            }
        });
    },
    seeds: || {
        let spec = |more: &str| {
            let text = r#"{"ociVersion":"1.2.0","process":{"args":["sh"],"cwd":"/","user":{"uid":0,"gid":0},"env":["A=b"]},"root":{"path":"rootfs"}"#;
            format!("{text},{more}}}")
        };
        vec![
            seed("small", spec(r#""hostname":"h""#)),
            seed(
                "what engines write",
                spec(
                    r#""mounts":[{"destination":"/proc","type":"proc","source":"proc"},
                    {"destination":"/etc/resolv.conf","type":"bind","source":"/dev/null","options":["rbind","ro"]},
                    {"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["size=64k","mode=1777"]}],
                    "hooks":{"poststop":[{"path":"/bin/true","args":["a"],"env":["A=b"],"timeout":5}]},
                    "annotations":{"io.kubernetes.cri.container-type":"sandbox"},
                    "linux":{"namespaces":[{"type":"pid"},{"type":"network","path":"/proc/1/ns/net"},{"type":"mount"}],
                    "cgroupsPath":"/a","resources":{"memory":{"limit":1000000},"cpu":{"quota":1000,"period":1000},
                    "devices":[{"allow":false,"access":"rwm"}]},"devices":[{"path":"/dev/fuse","type":"c","major":10,"minor":229}],
                    "maskedPaths":["/proc/kcore"],"readonlyPaths":["/proc/sys"],"seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}}"#,
                ),
            ),
            seed("a machine", spec(r#""vm":{"hypervisor":{"path":"/x"},"kernel":{"path":"/k"}}"#)),
            seed("nulls", spec(r#""mounts":null,"hooks":null,"linux":{"resources":null,"namespaces":null}"#)),
            seed("deep", "[".repeat(200)),
        ]
    },
};
/// `config.toml`.
pub const SETTINGS: Target = Target {
    name: "settings",
    surface: "config.toml, also one of which only parts make sense",
    run: |data| {
        let text = String::from_utf8_lossy(data);
        if let Err(why) = fuzzing::settings(&text) {
            let line = why.split(':').next().unwrap_or_default();
            assert!(
                line.parse::<usize>().is_ok_and(|line| line <= text.lines().count() + 1),
                "no line: {why}"
            );
        }
    },
    seeds: || {
        vec![
            seed("the one that is installed", include_bytes!("../../../runtime/config.toml")),
            seed("some", b"[machine]\nmemory = \"1GiB\"\nvcpus = 4\n[paths]\nroot = \"/r\"\n[log]\nlevel = \"debug\"\n"),
            seed("an unknown key", b"[machine]\nmemroy = 1\n"),
            seed("open", b"[paths\nroot='"),
        ]
    },
};
/// `container.json`.
pub const CONTAINER: Target = Target {
    name: "container-json",
    surface: "container.json of a snapshot that somebody else made",
    run: |data| {
        with_place(|place| {
            fs::write(place.join("container.json"), data).expect("a file");
            if let Ok(saved) = Saved::load(place) {
                let text = serde_json::to_vec(&saved).expect("what was read cannot be written");
                fs::write(place.join("container.json"), text).expect("a file");
                Saved::load(place).expect("what was written cannot be read");
            }
        });
    },
    seeds: || vec![seed("version 1", SAVED), seed("version 2", br#"{"version":2}"#), seed("nothing", b"{}")],
};

const SAVED: &str = r#"{"version":1,"taken_ns":5,"record":{"version":1,"id":"0123456789abcdef","name":"one","options":{},
"image":"busybox","image_id":"sha256:00","command":["sh"],"stop_signal":15,"status":"running","exit":null,"created_ns":1,
"started_ns":2,"finished_ns":0,"supervisor_pid":7,"monitor_pid":8},"hostname":"h","shape":{"vcpus":1,"memory_mib":64},
"disks":[{"id":"scratch","digest":"00"}]}"#;

thread_local! {
    static PLACE: OnceCell<TempDir> = const { OnceCell::new() };
}

fn with_place(then: impl FnOnce(&Path)) {
    PLACE.with(|place| {
        let place = place.get_or_init(|| {
            tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
        });
        then(place.path());
    });
}

/// Nothing appears outside of the target.
fn copy(data: &[u8]) {
    let Some((kind, archive)) = data.split_first() else { return };
    with_place(|place| {
        let (outside, target) = (place.join("outside"), place.join("outside/target"));
        fs::create_dir_all(&target).expect("a directory");
        fs::write(outside.join("secret"), "secret").expect("a file");
        let _ = fuzzing::unpack(archive, &target, kind % 4 == 0);
        let mut names: Vec<_> = fs::read_dir(&outside)
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["secret", "target"], "something left the target");
        assert_eq!(fs::read(outside.join("secret")).expect("the secret"), b"secret");
        let links = fs::metadata(outside.join("secret")).expect("the secret").nlink();
        assert_eq!(links, 1, "the secret has got another name");
        let _ = fs::remove_dir_all(&target);
        let _ = fs::remove_file(&target);
    });
}
