//! Templates: machines that have booted once, for all that come after.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Finished;
use bulkhead_tests::test;
use serde_json::Value;

use crate::{BUSYBOX, shell};

const HOME: &str = "/var/lib/bulkhead/templates";

fn templates() -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(HOME) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.join("state").exists() {
            found.push(path);
        }
    }
    Ok(found)
}

/// Runs a script, and tells what happened on the way: the names of the trace's marks.
fn traced(host: &Host, options: &[&str], script: &str) -> Result<(Finished, BTreeSet<String>)> {
    let trace = host.work().join("trace.json");
    let mut words = vec!["run", "--rm"];
    words.extend(options);
    words.extend(["busybox", "sh", "-c", script]);
    let finished = host.bulkhead_program(words).env("BULKHEAD_TRACE", trace.as_os_str()).run()?.ok()?;
    let text: Value = serde_json::from_slice(&fs::read(&trace).context("no trace was written")?)?;
    let events = text["traceEvents"].as_array().context("no events")?;
    let names = events.iter().filter_map(|event| event["name"].as_str()).map(str::to_owned).collect();
    fs::remove_file(trace)?;
    Ok((finished, names))
}

/// What must differ between two containers, and what must be right in each.
const IDENTITY: &str = "cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | hexdump -e '16/1 \"%02x\" \"\\n\"'; \
    hostname; date +%s; cut -d. -f1 /proc/uptime; cat /proc/sys/kernel/random/uuid";

test!(all_but_the_first_start_from_it_and_none_is_like_another, BUSYBOX);
fn all_but_the_first_start_from_it_and_none_is_like_another(host: &Host) -> Result<()> {
    ensure!(templates()?.is_empty());
    let (_, first) = traced(host, &[], "true")?;
    ensure!(first.contains("template made") && first.contains("snapshot-read"), "{first:?}");
    let [template] = &templates()?[..] else { anyhow::bail!("not one template: {:?}", templates()?) };
    ensure!(first.contains("template taught") && template.join("working-set").exists(), "{first:?}");
    // Neither the machine that it was made of nor the container's, which may end a moment after `run` has returned.
    host.eventually("no machine to be left", Duration::from_secs(2), || {
        Ok(host.run(["pgrep", "bulkhead-vmm"])?.status == 1)
    })?;

    let mut seen = BTreeSet::new();
    for _ in 0..4 {
        let (finished, marks) = traced(host, &[], IDENTITY)?;
        ensure!(marks.contains("template found") && marks.contains("snapshot-read"), "{marks:?}");
        ensure!(!marks.contains("kernel-loaded"), "it booted: {marks:?}");
        ensure!(marks.contains("populated") && !marks.contains("template taught"), "{marks:?}");
        let text = finished.stdout();
        let [boot, random, hostname, time, uptime, uuid] = text.lines().collect::<Vec<_>>()[..] else {
            anyhow::bail!("{text}")
        };
        for word in [boot, random, hostname, uuid] {
            ensure!(seen.insert(word.to_owned()), "{word} came twice");
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
        ensure!(now.abs_diff(time.parse()?) <= 1, "the guest has {time}, the host {now}");
        ensure!(uptime.parse::<u64>()? < 60, "{uptime}");
    }
    ensure!(templates()? == std::slice::from_ref(template));
    Ok(())
}

test!(one_can_do_without, BUSYBOX);
fn one_can_do_without(host: &Host) -> Result<()> {
    let (_, marks) = traced(host, &["--no-template"], "true")?;
    ensure!(marks.contains("kernel-loaded") && !marks.contains("snapshot-read"), "{marks:?}");
    host.bulkhead_program(["run", "--rm", "busybox", "true"]).env("BULKHEAD_TEMPLATES", "0").run()?.ok()?;
    ensure!(templates()?.is_empty());
    Ok(())
}

test!(each_shape_has_its_own, BUSYBOX);
fn each_shape_has_its_own(host: &Host) -> Result<()> {
    let shared = host.work().join("shared");
    fs::create_dir(&shared)?;
    fs::write(shared.join("file"), "of the host")?;
    let bind = format!("{}:/mnt", shared.display());
    let shapes: [(&[&str], &str, &str); 4] = [
        (&["--cpus", "2"], "nproc", "2\n"),
        (&["--memory", "100m"], "cat /sys/fs/cgroup/memory.max", "104857600\n"),
        (&["--storage", "0"], "grep -c /dev/vdb /proc/mounts", "0\n"),
        (&["-v", &bind], "cat /mnt/file && echo of the guest > /mnt/file", "of the host"),
    ];
    for (number, (options, script, answer)) in shapes.into_iter().enumerate() {
        for _ in 0..2 {
            fs::write(shared.join("file"), "of the host")?;
            let (finished, marks) = traced(host, options, &format!("{script} || true"))?;
            finished.stdout_is(answer)?;
            ensure!(marks.contains("snapshot-read"), "{marks:?}");
        }
        ensure!(templates()?.len() == number + 1, "{:?}", templates()?);
    }
    ensure!(fs::read_to_string(shared.join("file"))? == "of the guest\n");
    fs::remove_dir_all(shared)?;
    Ok(())
}

test!(a_damaged_one_is_named_and_made_anew, BUSYBOX);
fn a_damaged_one_is_named_and_made_anew(host: &Host) -> Result<()> {
    type Damage = fn(&Path) -> Result<()>;
    let damages: [(&str, Damage); 3] = [
        ("checksum", |template| {
            let mut state = fs::read(template.join("state"))?;
            let middle = state.len() / 2;
            state[middle] ^= 1;
            Ok(fs::write(template.join("state"), state)?)
        }),
        ("cut off", |template| {
            Ok(fs::OpenOptions::new().write(true).open(template.join("memory"))?.set_len(1 << 20)?)
        }),
        ("memory", |template| Ok(fs::remove_file(template.join("memory"))?)),
    ];
    for (word, damage) in damages {
        shell(host, &[], "true")?.ok()?;
        let [template] = &templates()?[..] else { anyhow::bail!("not one template") };
        damage(template)?;
        shell(host, &[], "true")?.status_is(125)?.stderr_has(word)?.stderr_has("try again")?;
        ensure!(templates()?.is_empty());
        shell(host, &[], "echo well")?.ok()?.stdout_is("well\n")?;
    }
    Ok(())
}

test!(of_two_that_want_one_at_once_both_run, BUSYBOX);
fn of_two_that_want_one_at_once_both_run(host: &Host) -> Result<()> {
    let mut running = Vec::new();
    for number in 0..3 {
        let number = number.to_string();
        running.push(host.bulkhead_program(["run", "--rm", "busybox", "echo", &number]).spawn()?);
    }
    for (number, run) in running.into_iter().enumerate() {
        run.wait()?.ok()?.stdout_is(&format!("{number}\n"))?;
    }
    ensure!(templates()?.len() == 1, "{:?}", templates()?);
    Ok(())
}

test!(one_that_was_killed_half_way_is_cleared_away, BUSYBOX.deadline(120));
fn one_that_was_killed_half_way_is_cleared_away(host: &Host) -> Result<()> {
    let half = |name: &str| {
        let found = |home: &str, word: &str| {
            fs::read_dir(home).is_ok_and(|mut entries| {
                entries
                    .any(|entry| entry.is_ok_and(|entry| entry.file_name().to_string_lossy().contains(word)))
            })
        };
        found("/run/bulkhead", "template-") || found(HOME, name)
    };
    // At whatever step the signal comes: everything that it leaves is gone after the next start.
    for moment in [20, 60, 100, 140, 180] {
        let run = host.bulkhead_program(["run", "--rm", "--name", "killed", "busybox", "true"]).spawn()?;
        std::thread::sleep(Duration::from_millis(moment));
        host.run(["killall", "-9", "bulkhead", "bulkhead-vmm"])?;
        let _ = run.wait()?;
        host.run(["sh", "-c", "rm -rf /var/lib/bulkhead/templates/[0-9a-f]*[0-9a-f]"])?.ok()?;
        shell(host, &["--name", "next"], "true")?.ok()?;
        ensure!(templates()?.len() == 1 && !half(".partial"), "after {moment} ms: {:?}", templates()?);
        host.bulkhead(["rm", "-f", "killed"])?;
        for template in templates()? {
            fs::remove_dir_all(template)?;
        }
    }
    Ok(())
}

test!(a_full_disk_is_no_reason_not_to_run, BUSYBOX);
fn a_full_disk_is_no_reason_not_to_run(host: &Host) -> Result<()> {
    fs::create_dir_all(HOME)?;
    let disk = host.small_disk(4096)?;
    host.run(["mount", "--bind", &disk.path().display().to_string(), HOME])?.ok()?;
    let (_, marks) = traced(host, &[], "true")?;
    ensure!(marks.contains("template failed") && marks.contains("kernel-loaded"), "{marks:?}");
    let told = host.bulkhead(["doctor"])?.stdout();
    ensure!(told.contains("No space left"), "doctor says: {told}");
    // And nobody tries again at once.
    let (_, marks) = traced(host, &[], "true")?;
    ensure!(!marks.contains("template failed") && marks.contains("kernel-loaded"), "{marks:?}");
    ensure!(templates()?.is_empty());
    fs::remove_file(Path::new(HOME).join("failure"))?;
    host.run(["umount", HOME])?.ok()?;
    Ok(())
}

test!(one_lives_on_while_its_machine_is_killed, BUSYBOX);
fn one_lives_on_while_its_machine_is_killed(host: &Host) -> Result<()> {
    shell(host, &[], "true")?.ok()?;
    host.bulkhead(["run", "-d", "--name", "alive", "busybox", "sleep", "1000"])?.ok()?;
    // Its template may go while it runs.
    for template in templates()? {
        fs::remove_dir_all(template)?;
    }
    host.bulkhead([
        "exec",
        "alive",
        "sh",
        "-c",
        "dd if=/dev/zero of=/tmp/x bs=1M count=20 2>/dev/null; echo alive",
    ])?
    .ok()?
    .stdout_is("alive\n")?;
    host.run(["killall", "-9", "bulkhead-vmm"])?.ok()?;
    host.bulkhead(["wait", "alive"])?.ok()?.stdout_is("137\n")?;
    host.bulkhead(["rm", "alive"])?.ok()?;
    Ok(())
}
