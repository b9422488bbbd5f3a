//! containerd's erofs snapshotter: layers of images that are disks of the guest's.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::oci_image::{Image, Layer, Owners};
use bulkhead_tests::process::{Finished, Program};
use serde_json::json;

use crate::disks::{pid_of, with_settings};

/// Of a containerd that has the snapshotter: what makes its layers, and a handler of CRI's that has it.
pub const SETTINGS: &str = "[plugins.\"io.containerd.service.v1.diff-service\"]\ndefault = [\"erofs\", \"walking\"]\n\
    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.layers]\n\
    runtime_type = \"io.containerd.bulkhead.v2\"\nsandboxer = \"shim\"\nsnapshotter = \"erofs\"\n";
const IMAGE: &str = "docker.io/library/layers:latest";
/// Where containerd keeps what is written to containers, below its root.
const SNAPSHOTS: &str = "io.containerd.snapshotter.v1.erofs/snapshots";
const PATIENCE: Duration = Duration::from_secs(20);

/// An image whose second layer takes away files of its first.
fn image(host: &Host) -> Result<String> {
    let (low, high) = (host.work().join("low"), host.work().join("high"));
    for directory in [low.join("bin"), low.join("full"), high.join("full"), high.join("etc")] {
        fs::create_dir_all(directory)?;
    }
    fs::copy("/usr/bin/busybox", low.join("bin/busybox"))?;
    for program in ["sh", "cat", "ls", "grep", "sleep", "stat", "mkdir", "rm", "sync"] {
        symlink("busybox", low.join("bin").join(program))?;
    }
    for file in ["gone", "full/hidden", "both"] {
        fs::write(low.join(file), "low\n")?;
    }
    for (file, text) in
        [(".wh.gone", ""), ("full/.wh..wh..opq", ""), ("full/new", "high\n"), ("both", "high\n")]
    {
        fs::write(high.join(file), text)?;
    }
    let layer = |dir| Layer::stored(dir, &Owners::default());
    let config = json!({"Env": ["PATH=/bin"], "Cmd": ["sh"]});
    let image = Image { name: "layers:latest".into(), layers: vec![layer(&low)?, layer(&high)?], config };
    let file = host.work().join("layers.tar");
    image.write_oci(fs::File::create(&file)?)?;
    Ok(file.display().to_string())
}

/// With a containerd that has these settings.
pub fn roots_of_layers(host: &Host, program: &str) -> Result<()> {
    let ctr = |words: &[&str]| -> Result<Finished> {
        let socket = format!("{}/containerd.sock", host.work().display());
        Program::new(["ctr", "-a", &socket, "-n", "layers"]).args(words.iter().copied()).run()
    };
    ctr(&["images", "import", "--snapshotter", "erofs", &image(host)?])?.ok()?;
    let run = ["run", "--runtime", "io.containerd.bulkhead.v2", "--snapshotter", "erofs"];
    let inside =
        |id: &str, script: &str| ctr(&["task", "exec", "--exec-id", "e", id, "sh", "-c", script])?.ok();
    ctr(&[&run[..], &["-d", IMAGE, "own", "sleep", "1000"]].concat())?.ok()?;
    // Two layers on a disk that cannot be written, and one more disk; whiteouts as the image has them.
    let look = "grep -o '^overlay / overlay rw' /proc/mounts; cat /sys/block/vda/serial /both; echo; ls /full /gone 2>&1; \
                ls -d /sys/block/vda/vda*; cat /sys/block/vdb/serial; echo; stat -c %a /";
    inside("own", look)?.stdout_is(
        "overlay / overlay rw\nlayershigh\n\nls: /gone: No such file or directory\n/full:\nnew\n\
         /sys/block/vda/vda1\n/sys/block/vda/vda2\nwritable\n755\n",
    )?;
    inside("own", "echo kept >/kept; rm -r /full; mkdir /full; echo more >/full/more; sync")?;
    ensure!(host.run(["pgrep", "virtiofsd"])?.status == 1, "there is a file server");
    let written = || -> Result<bool> {
        let snapshots = host.work().join(program).join(SNAPSHOTS);
        let found = host.run(["find", &snapshots.display().to_string(), "-name", "bulkhead.ext4"])?;
        Ok(!found.ok()?.stdout().is_empty())
    };
    ensure!(written()?, "what is written is nowhere");

    // Who joins brings layers and a disk of its own.
    let network = format!("network:/proc/{}/ns/net", pid_of(host, "layers", "own")?);
    for _ in 0..3 {
        let script = "cat /sys/block/vdc/serial; echo; ls /full; echo x >/x; ls /kept 2>&1";
        let join = ["--rm", "--with-ns", &network, IMAGE, "joins", "sh", "-c", script];
        ctr(&[&run[..], &join].concat())?.stdout_is("spare0\nnew\nls: /kept: No such file or directory\n")?;
    }
    // Writes are there when the container is started anew: its machine was killed.
    host.run(["pkill", "-KILL", "bulkhead-vmm"])?.ok()?;
    host.eventually("its end", PATIENCE, || Ok(ctr(&["task", "ls"])?.stdout().contains("STOPPED")))?;
    ctr(&["task", "delete", "own"])?.stderr_has("exit code 137")?;
    ctr(&["task", "start", "-d", "own"])?.ok()?;
    inside("own", "cat /kept; ls /full")?.stdout_is("kept\nmore\n")?;
    ctr(&["task", "rm", "-f", "own"])?;
    ctr(&["containers", "rm", "own"])?.ok()?;
    host.eventually("what was written to go", PATIENCE, || Ok(!written()?))?;

    // For who wants to commit: the writes are where containerd looks for them.
    let diff = with_settings("[machine]\nerofs_disks = false\n", || {
        ctr(&[&run[..], &["-d", IMAGE, "shared", "sleep", "1000"]].concat())?.ok()?;
        inside("shared", "grep -o '^[a-z]* / virtiofs' /proc/mounts; echo seen >/seen")?
            .stdout_has("virtiofs")?;
        host.run(["sh", "-c", &format!("cat {}/{program}/{SNAPSHOTS}/*/fs/seen", host.work().display())])
    })?;
    diff.ok()?.stdout_is("seen\n")?;
    // A broken configuration lets nothing begin, and everything end.
    with_settings("[machine]\nmemroy = 1\n", || {
        ctr(&[&run[..], &["--rm", IMAGE, "new", "true"]].concat())?
            .failed()?
            .stderr_has("config.toml:2: `memroy")?;
        ctr(&["task", "exec", "--exec-id", "e", "shared", "cat", "/seen"])?.ok()?.stdout_is("seen\n")?;
        ctr(&["task", "kill", "-s", "KILL", "shared"])?.ok()?;
        host.eventually("its end", PATIENCE, || Ok(ctr(&["task", "ls"])?.stdout().contains("STOPPED")))?;
        ctr(&["task", "delete", "shared"])?.stderr_has("exit code 137")
    })?;
    ctr(&["containers", "rm", "shared"])?.ok()?;
    ctr(&["containers", "rm", "new"])?;
    a_pod(host)
}

/// Through CRI: two containers that join their pod's machine.
fn a_pod(host: &Host) -> Result<()> {
    let (_, node) = crate::cri::node(host, "erofs", "layers")?;
    let config = node.pod("layers");
    let pod = node.cri.run_pod(&config, node.handler)?;
    for name in ["one", "two"] {
        let id = node.start((&pod, &config), name, 0, "sleep 1000")?;
        let script = "grep -o '^overlay / overlay rw' /proc/mounts; echo x >/x; ls -d /sys/block/vd*";
        let said = node.cri.exec(&id, &["sh", "-c", script])?;
        // Four empty drives, of which each takes two.
        let disks: String = "abcd".chars().map(|letter| format!("/sys/block/vd{letter}\n")).collect();
        ensure!(said.0 == format!("overlay / overlay rw\n{disks}"), "{said:?}");
    }
    // For the third there is none left: its root is mounted on the host, and shared.
    let id = node.start((&pod, &config), "three", 0, "sleep 1000")?;
    let said = node.cri.exec(&id, &["sh", "-c", "grep ' / ' /proc/mounts; echo x >/x; cat /x"])?;
    ensure!(said.0.contains("virtiofs") && said.0.ends_with("x\n"), "{said:?}");
    node.remove(&pod)
}
