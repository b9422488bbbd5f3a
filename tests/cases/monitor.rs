//! `bulkhead-vmm --config FILE`: a microVM monitor in its own right, no container in sight.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Finished, Program};
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;
use serde_json::{Value, json};

/// An initramfs of busybox whose /init is this script, made by busybox's own cpio.
fn initramfs(host: &Host, script: &str) -> Result<String> {
    let tree = host.work().join("tree");
    for dir in ["bin", "proc", "sys", "dev", "mnt"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    fs::copy("/usr/bin/busybox", tree.join("bin/busybox"))?;
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox --install /bin\nexport PATH=/bin\nmount -t proc proc /proc\n\
         mount -t sysfs sys /sys\nmount -t devtmpfs dev /dev 2>/dev/null\n{script}\nsleep 1\nreboot -f\n"
    );
    fs::write(tree.join("init"), init)?;
    let archive = host.work().join("initramfs").display().to_string();
    let line = format!(
        "chmod 755 init; mkdir -p dev; mknod dev/console c 5 1; find . | busybox cpio -o -H newc >{archive}"
    );
    Program::new(["sh", "-c", &line]).dir(&tree).run()?.ok()?;
    fs::remove_dir_all(tree)?;
    Ok(archive)
}

fn config(host: &Host, script: &str) -> Result<Value> {
    Ok(json!({
        "machine": {"vcpus": 1, "memory_mib": 128},
        "boot": {
            "kernel": host.kernel(), "initramfs": initramfs(host, script)?,
            "cmdline": "console=hvc0 quiet panic=-1 reboot=k",
        },
        "console": {"output": "stdout"},
        "report": host.work().join("monitor-report.json"),
    }))
}

fn monitor(host: &Host, config: &Value) -> Result<Program> {
    let file = host.file("monitor-config.json", config.to_string())?.display().to_string();
    Ok(Program::new(["bulkhead-vmm", "--config", &file]))
}

fn boots(host: &Host, config: &Value) -> Result<Finished> {
    monitor(host, config)?.run()?.ok()
}

test!(it_boots_linux_and_ends_with_it, Needs::bulkhead());
fn it_boots_linux_and_ends_with_it(host: &Host) -> Result<()> {
    let finished = boots(host, &config(host, "echo hello from the guest; uname -r; nproc")?)?;
    println!("boot of a busybox initramfs to its reboot: {:.3} s", finished.took.as_secs_f64());
    finished.stdout_has("hello from the guest")?.stdout_has("6.12")?;
    let report: Value = serde_json::from_slice(&fs::read(host.work().join("monitor-report.json"))?)?;
    ensure!(report.to_string().contains("reboot"), "{report}");
    Ok(())
}

test!(many_processors, Needs::bulkhead().deadline(120));
fn many_processors(host: &Host) -> Result<()> {
    let mut config = config(host, "nproc; cat /proc/interrupts | head -1")?;
    for vcpus in [2, 4] {
        config["machine"]["vcpus"] = json!(vcpus);
        boots(host, &config)?.stdout_has(&format!("{vcpus}"))?.stdout_has(&format!("CPU{}", vcpus - 1))?;
    }
    Ok(())
}

test!(memory_is_what_was_asked_for, Needs::bulkhead().deadline(60));
fn memory_is_what_was_asked_for(host: &Host) -> Result<()> {
    let mut config =
        config(host, "echo total $(( $(awk '/MemTotal/{print $2}' /proc/meminfo) / 1024 )) MiB")?;
    // The last one reaches over the hole below 4 GiB, without being touched.
    for mib in [64_u64, 512, 6144] {
        config["machine"]["memory_mib"] = json!(mib);
        let finished = boots(host, &config)?.stdout_has("total ")?;
        let text = finished.stdout();
        let total: u64 = text
            .split("total ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next())
            .context("no total")?
            .parse()?;
        ensure!(total <= mib && total + mib / 10 + 40 > mib, "{mib} MiB became {total}");
    }
    Ok(())
}

test!(disks_are_read_and_written, Needs::bulkhead().deadline(60));
fn disks_are_read_and_written(host: &Host) -> Result<()> {
    let mut contents = vec![0; 1 << 20];
    contents[..10].copy_from_slice(b"disk begin");
    let read_only = host.file("ro.img", &contents)?;
    let writable = host.file("rw.img", &contents)?;
    let script = "head -c 10 /dev/vda; echo; echo written | dd of=/dev/vdb bs=1 seek=100000 conv=fsync 2>/dev/null; \
        echo x | dd of=/dev/vda 2>&1 | head -1; cat /sys/block/vda/ro /sys/block/vda/size";
    let mut config = config(host, script)?;
    config["disks"] = json!([
        {"id": "first", "read_only": true, "path": read_only}, {"id": "second", "path": writable},
    ]);
    boots(host, &config)?.stdout_has("disk begin")?.stdout_has("1\r\n2048")?;
    ensure!(fs::read(&read_only)? == contents, "the read-only disk was changed");
    ensure!(fs::read(&writable)?[100_000..100_008] == *b"written\n");
    Ok(())
}

test!(layers_are_partitions_of_one_disk, Needs::bulkhead().deadline(60));
fn layers_are_partitions_of_one_disk(host: &Host) -> Result<()> {
    let layers: Vec<_> = (1..=3)
        .map(|number| host.file(&format!("layer{number}"), format!("layer {number}\n").repeat(1000)))
        .collect::<Result<_>>()?;
    let mut config = config(host, "for n in 1 2 3; do head -c 8 /dev/vda$n; done")?;
    config["disks"] = json!([{"id": "layers", "read_only": true, "layers": layers}]);
    boots(host, &config)?.stdout_has("layer 1\r\nlayer 2\r\nlayer 3")?;
    Ok(())
}

test!(a_guest_that_panics_is_told_with_its_last_words, Needs::bulkhead());
fn a_guest_that_panics_is_told_with_its_last_words(host: &Host) -> Result<()> {
    let config = config(host, "echo last words; exit 3")?;
    monitor(host, &config)?.run()?.status_is(70)?.stderr_has("panic")?.stdout_has("last words")?;
    Ok(())
}

test!(wrong_configurations_are_explained, Needs::bulkhead());
fn wrong_configurations_are_explained(host: &Host) -> Result<()> {
    let good = config(host, "")?;
    let run = |change: &dyn Fn(&mut Value)| -> Result<Finished> {
        let mut config = good.clone();
        change(&mut config);
        monitor(host, &config)?.run()?.failed()
    };
    run(&|config| config["unknown"] = json!(1))?.status_is(64)?.stderr_has("unknown")?;
    run(&|config| config["machine"]["vcpus"] = json!(0))?.status_is(64)?.stderr_has("vcpus")?;
    run(&|config| config["machine"]["vcpus"] = json!(33))?.status_is(64)?.stderr_has("32")?;
    run(&|config| config["machine"]["memory_mib"] = json!(1))?.status_is(64)?.stderr_has("memory")?;
    run(&|config| config["boot"]["kernel"] = json!("/no/such"))?.status_is(66)?.stderr_has("/no/such")?;
    run(&|config| config["disks"] = json!([{"id": "x", "path": "/no/disk"}]))?
        .status_is(66)?
        .stderr_has("/no/disk")?;
    let file = host.file("not.json", "{")?.display().to_string();
    host.run(["bulkhead-vmm", "--config", &file])?.status_is(64)?.stderr_has("not.json")?;
    host.run(["bulkhead-vmm", "--config", "/no/config"])?.failed()?.stderr_has("/no/config")?;
    host.run(["bulkhead-vmm", "--wrong"])?.failed()?.stderr_has("--wrong")?;
    Ok(())
}

test!(a_signal_ends_it_at_once, Needs::bulkhead());
fn a_signal_ends_it_at_once(host: &Host) -> Result<()> {
    let config = config(host, "echo up; sleep 1000")?;
    let running = monitor(host, &config)?.spawn()?;
    running.wait_for("up", Duration::from_secs(10))?;
    running.signal(rustix::process::Signal::TERM)?;
    let finished = running.wait()?;
    ensure!(finished.status != 0 && finished.took < Duration::from_secs(5), "{finished}");
    Ok(())
}

test!(linux_goes_on_from_a_snapshot, Needs::bulkhead().deadline(60));
fn linux_goes_on_from_a_snapshot(host: &Host) -> Result<()> {
    let path = |name: &str| host.work().join(name).display().to_string();
    host.run(["truncate", "-s", "16M", &path("disk"), &path("later")])?.ok()?;
    host.run(["mke2fs", "-q", "-F", &path("disk")])?.ok()?;
    // Timers, a file system in the middle of writing, both processors, and a drive that gets its disk later.
    let script = "mount -t ext4 /dev/vda /mnt; (while :; do usleep 50000; done) & \
        i=0; while [ $i -lt 30 ]; do i=$((i+1)); echo $i >> /mnt/log; sync; echo tick $i; usleep 10000; done; \
        echo lines $(wc -l < /mnt/log) cpus $(nproc) later $(cat /sys/block/vdb/size) $(head -c 5 /dev/vdb)";
    let mut config = config(host, script)?;
    let empty = json!({"id": "later", "empty": true});
    config["machine"]["vcpus"] = 2.into();
    config["disks"] = json!([{"id": "disk", "path": path("disk")}, empty]);
    config["networks"] = json!([{"empty": "tap"}]);
    config["filesystems"] = json!([{"tag": "none", "empty": true}]);
    config["vsock"] = json!({"socket": path("vsock")});
    config["control"] = path("control").into();
    let running = monitor(host, &config)?.spawn()?;
    running.wait_for("tick 10", Duration::from_secs(30))?;
    let ctl = |words: &[&str]| {
        let mut all = vec!["bulkhead-vmm".to_owned(), "--ctl".into(), path("control")];
        all.extend(words.iter().map(|word| (*word).to_owned()));
        host.run(all)
    };
    let taken: Value = serde_json::from_str(&ctl(&["snapshot", &path("snapshot")])?.ok()?.stdout())?;
    host.run(["cp", &path("disk"), &path("disk-then")])?.ok()?;
    println!(
        "a snapshot of {} KiB, pause {} ns",
        taken["memory_bytes"].as_u64().unwrap_or(0) >> 10,
        taken["pause_ns"]
    );
    let at_least = |text: String| text.lines().filter(|line| line.starts_with("tick")).count();
    ensure!(at_least(running.stdout_so_far()) >= 10);
    ctl(&["quit"])?.ok()?;
    running.wait()?;

    // The disk went on after the snapshot; its state then is what belongs to the memory.
    fs::rename(host.work().join("disk-then"), host.work().join("disk"))?;
    fs::write(host.work().join("later"), [b"later".as_slice(), &[0; 4096 - 5]].concat())?;
    if let Some(object) = config.as_object_mut() {
        object.remove("boot");
    }
    config["restore"] = path("snapshot").into();
    config["disks"][1] = json!({"id": "later", "path": path("later")});
    let finished = monitor(host, &config)?.run()?.ok()?;
    finished.stdout_has("tick 30")?.stdout_has("lines 30 cpus 2 later 8 later")?;
    host.run(["e2fsck", "-fn", &path("disk")])?.ok()?;
    Ok(())
}
