//! Root file systems on disks, which the machine gets instead of the files on them: containerd's blockfile snapshotter, and a
//! block device as its devmapper snapshotter gives.

use std::fs;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Finished, Program};

use crate::containerd::IMAGE;

/// Settings of the snapshotters. The empty disk of blockfile is made here.
pub fn settings(host: &Host, program: &str) -> Result<String> {
    let work = host.work().display();
    host.run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", &format!("{work}/empty"), "24M"])?
        .ok()?;
    let erofs = if program.starts_with("containerd-2") { crate::erofs::SETTINGS } else { "" };
    Ok(format!(
        "{erofs}[plugins.\"io.containerd.snapshotter.v1.blockfile\"]\nroot_path = \"{work}/blockfile\"\n\
         scratch_file = \"{work}/empty\"\nfs_type = \"ext4\"\nmount_options = [\"loop\"]\n"
    ))
}

/// With a containerd that has these settings.
pub fn roots_on_disks(host: &Host) -> Result<()> {
    let ctr = |words: &[&str]| -> Result<Finished> {
        let socket = format!("{}/containerd.sock", host.work().display());
        Program::new(["ctr", "-a", &socket, "-n", "disks"]).args(words.iter().copied()).run()
    };
    let image = host.image("busybox-docker").display().to_string();
    ctr(&["images", "import", "--snapshotter", "blockfile", &image])?.ok()?;
    let run = ["run", "-d", "--runtime", "io.containerd.bulkhead.v2", "--snapshotter", "blockfile"];
    ctr(&[&run[..], &[IMAGE, "disk", "sleep", "1000"]].concat())?.ok()?;
    let script = "grep ' / ' /proc/mounts; echo kept >/file; sync";
    let exec = ["task", "exec", "--exec-id", "e", "disk", "sh", "-c"];
    ctr(&[&exec[..], &[script]].concat())?.ok()?.stdout_has("/dev/vda / ext4 rw")?;
    // Nothing of it passes through the host.
    ensure!(host.run(["pgrep", "virtiofsd"])?.status == 1, "there is a file server");
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains("/disks/disk/rootfs"), "the host has mounted it:\n{mounts}");
    // Others bring disks of their own, which go again with them: more than there are drives.
    let join = |id: &str, flags: &[&str], script: &str| -> Result<Finished> {
        let network = format!("network:/proc/{}/ns/net", pid_of(host, "disks", id)?);
        let joins = ["run", "--rm", "--runtime", "io.containerd.bulkhead.v2", "--snapshotter", "blockfile"];
        let more = ["--with-ns", &network, IMAGE, "other", "sh", "-c", script];
        ctr(&[&joins[..], flags, &more].concat())
    };
    let script =
        "grep ' / ' /proc/mounts; test -e /file || echo alone; echo $$ >/file; ls /sys/block | grep -c vd";
    for _ in 0..6 {
        let joined = join("disk", &[], script)?.ok()?;
        joined.stdout_has("/dev/vdb / ext4 rw")?.stdout_has("alone\n5\n")?;
    }
    // Two at a time, each on its own.
    let network = format!("network:/proc/{}/ns/net", pid_of(host, "disks", "disk")?);
    ctr(&[&run[..], &["--with-ns", &network, IMAGE, "second", "sleep", "1000"]].concat())?.ok()?;
    join("disk", &[], script)?.ok()?.stdout_has("/dev/vdc / ext4 rw")?;
    // One that is killed leaves its drive to the next.
    ctr(&["task", "rm", "-f", "second"])?;
    ctr(&["containers", "rm", "second"])?.ok()?;
    join("disk", &[], script)?.ok()?.stdout_has("/dev/vdb / ext4 rw")?;
    ctr(&[&exec[..], &["cat /file"]].concat())?.ok()?.stdout_is("kept\n")?;
    // A block device of its own, besides.
    let attach = "truncate -s 1M $0; device=$(losetup -f); losetup $device $0; echo -n $device";
    let volume =
        host.run(["sh", "-c", attach, &host.work().join("joined").display().to_string()])?.ok()?.stdout();
    let write = format!("grep ' / ' /proc/mounts; echo written >{volume}");
    join("disk", &["--device", &volume], &write)?.ok()?.stdout_has("/dev/vdb / ext4 rw")?;
    ensure!(fs::read(host.work().join("joined"))?.starts_with(b"written\n"));
    host.run(["losetup", "-d", &volume])?.ok()?;
    a_disk_that_is_held(host, &ctr)?;
    ensure!(host.run(["pgrep", "virtiofsd"])?.status == 1, "there is a file server");
    // What is no disk needs one, and there is none.
    let bind = format!("type=bind,src={},dst=/dir,options=rbind:rw", host.work().display());
    join("disk", &["--mount", &bind], script)?.failed()?.stderr_has("no file server for others")?;
    ctr(&["containers", "rm", "other"])?;
    // With one the disk of who joins is mounted on the host when there is no drive for it, for as long as it lives.
    with_settings("[machine]\nspare_drives = 0\n", || {
        ctr(&[&run[..], &["--mount", &bind, IMAGE, "first", "sleep", "1000"]].concat())?.ok()
    })?;
    join("first", &[], script)?.ok()?.stdout_has("virtiofs")?.stdout_has("alone\n1\n")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains("/disks/"), "it is still mounted:\n{mounts}");
    ctr(&["task", "rm", "-f", "first"])?;
    ctr(&["containers", "rm", "first"])?.ok()?;

    // Its writes are on the disk when it has ended, for `diff` and `commit`, and for the next start.
    ctr(&["task", "kill", "-s", "KILL", "disk"])?.ok()?;
    host.eventually("its end", std::time::Duration::from_secs(20), || {
        Ok(ctr(&["task", "ls"])?.stdout().contains("STOPPED"))
    })?;
    ctr(&["task", "delete", "disk"])?.stderr_has("exit code 137")?;
    ctr(&["task", "start", "-d", "disk"])?.ok()?;
    ctr(&[&exec[..], &["cat /file"]].concat())?.ok()?.stdout_is("kept\n")?;
    ctr(&["task", "rm", "-f", "disk"])?;
    ctr(&["containers", "rm", "disk"])?.ok()?;
    a_device_is_the_guests_alone(host)
}

/// Does something while this is the host's configuration.
pub fn with_settings<T>(text: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let file = "/etc/bulkhead/config.toml";
    fs::create_dir_all("/etc/bulkhead")?;
    fs::write(file, text)?;
    let done = work();
    fs::remove_file(file)?;
    done
}

/// The process that stands for a container of this containerd namespace.
pub fn pid_of(host: &Host, namespace: &str, id: &str) -> Result<i64> {
    let states = format!("/run/containerd/bulkhead/states/{namespace}");
    let state = ["bulkhead-oci", "--root", &states, "state", id];
    let state: serde_json::Value = serde_json::from_str(&host.run(state)?.ok()?.stdout())?;
    state["pid"].as_i64().context("it has no pid")
}

/// A process of another container holds on to a root whose container has gone: its disk is taken away all the same, and the
/// drive is not used any more.
fn a_disk_that_is_held(host: &Host, ctr: &impl Fn(&[&str]) -> Result<Finished>) -> Result<()> {
    let pid = pid_of(host, "disks", "disk")?;
    let (network, pids) = (format!("network:/proc/{pid}/ns/net"), format!("pid:/proc/{pid}/ns/pid"));
    let run = ["run", "-d", "--runtime", "io.containerd.bulkhead.v2", "--snapshotter", "blockfile"];
    let with = ["--with-ns", &network, "--with-ns", &pids];
    ctr(&[&run[..], &with, &[IMAGE, "held", "sleep", "4321"]].concat())?.ok()?;
    let hold = "for p in /proc/[0-9]*; do [ \"$(tr '\\0' ' ' <$p/cmdline)\" != 'sleep 4321 ' ] || its=$p; done; \
                exec 3<$its/root/bin/busybox; echo holds >/state; sleep 1000";
    ctr(&["task", "exec", "-d", "--exec-id", "holder", "disk", "sh", "-c", hold])?.ok()?;
    let inside = |script: &str| ctr(&["task", "exec", "--exec-id", "e", "disk", "sh", "-c", script]);
    host.eventually("it to be held", std::time::Duration::from_secs(20), || {
        Ok(inside("cat /state")?.stdout() == "holds\n")
    })?;
    ctr(&["task", "rm", "-f", "held"])?;
    ctr(&["containers", "rm", "held"])?.ok()?;
    let look = "cat /sys/block/vdb/size; ls -l /proc/[0-9]*/fd/3 | grep -q busybox && echo held";
    inside(look)?.ok()?.stdout_is("0\nheld\n")?;
    let next = [&run[..], &["--with-ns", &network], &[IMAGE, "next", "sleep", "1000"]].concat();
    ctr(&next)?.ok()?;
    let look = ["task", "exec", "--exec-id", "e", "next", "grep", " / ", "/proc/mounts"];
    ctr(&look)?.ok()?.stdout_has("/dev/vdc / ext4 rw")?;
    ctr(&["task", "rm", "-f", "next"])?;
    ctr(&["containers", "rm", "next"])?.ok().map(drop)
}

/// As devmapper gives it: a block device.
fn a_device_is_the_guests_alone(host: &Host) -> Result<()> {
    let work = host.work().display();
    let script = format!(
        "set -e; cp {work}/empty {work}/image; mkdir -p {work}/m {work}/b/rootfs\n\
         device=$(losetup -f); losetup $device {work}/image; mount -t ext4 $device {work}/m\n\
         mkdir {work}/m/bin; cp /usr/bin/busybox {work}/m/bin/sh; umount {work}/m\n\
         truncate -s 1M {work}/volume; volume=$(losetup -f); losetup $volume {work}/volume\n\
         echo $device $volume; cat /sys/block/${{volume#/dev/}}/dev"
    );
    let made = host.run(["sh", "-c", &script])?.ok()?.stdout();
    let mut words = made.split_whitespace();
    let (device, volume) = words.next().zip(words.next()).context("no devices")?;
    let (major, minor) = words.next().and_then(|numbers| numbers.split_once(':')).context("no numbers")?;
    let (major, minor) = (major.parse::<u32>()?, minor.parse::<u32>()?);
    // And a device that the container has as such.
    let numbers = serde_json::json!({"path": "/dev/volume", "type": "b", "major": major, "minor": minor});
    let rule =
        serde_json::json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": "rw"});
    let config = serde_json::json!({
        "ociVersion": "1.0.2", "root": {"path": "rootfs"},
        "process": {"args": ["/bin/sh", "-c", "echo $0 >/made; echo written >/dev/volume; read line"], "cwd": "/"},
        "linux": {
            "namespaces": [{"type": "network"}, {"type": "mount"}, {"type": "pid"}],
            "devices": [numbers],
            "resources": {"devices": [{"allow": false, "access": "rwm"}, rule]},
        },
    });
    host.file("b/config.json", config.to_string())?;
    let disk = format!(r#"{{"type":"ext4","source":"{device}","options":["rw"]}}"#);
    let bundle = format!("{work}/b");
    let run = || {
        let words = ["run", "--detach", "--bundle", &bundle, "--root-disk", &disk, "d"];
        host.run(["bulkhead-oci"].into_iter().chain(words))
    };
    // While the host has it mounted, no guest gets it; and the other way round.
    host.run(["mount", "-t", "ext4", device, &format!("{work}/m")])?.ok()?;
    run()?.failed()?.stderr_has("this host has it mounted")?;
    host.run(["umount", &format!("{work}/m")])?.ok()?;
    run()?.ok()?;
    let mount = || host.run(["mount", "-t", "ext4", device, &format!("{work}/m")]);
    mount()?.failed()?;
    host.run(["bulkhead-oci", "delete", "--force", "d"])?.ok()?;
    mount()?.ok()?;
    ensure!(fs::read_to_string(host.work().join("m/made"))? == "/bin/sh\n");
    ensure!(fs::read(host.work().join("volume"))?.starts_with(b"written\n"));
    host.run(["sh", "-c", &format!("umount {work}/m; losetup -d {device}; losetup -d {volume}")])?.ok()?;
    Ok(())
}
