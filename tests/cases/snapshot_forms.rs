//! Snapshots that are compressed, or only what differs from another; and copies whose start is cut short.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;

use crate::BUSYBOX;

const PATIENCE: Duration = Duration::from_secs(20);
/// Says what is in its file, again and again.
const TELLER: &str = "echo first > /file; while :; do cat /file; sleep 0.05; done";
/// Of a snapshot of an idle machine of 1 GiB, as it is: 16 are the kernel's array of pages, 64 bytes for each of them.
const MOST_MIB: f64 = 44.0;
/// Of one that is compressed.
const MOST_COMPRESSED_MIB: f64 = 40.0;

/// MiB that a directory takes on the disk.
fn size(host: &Host, directory: &str) -> Result<f64> {
    let text = host.run(["du", "-s", "-k", directory])?.ok()?.stdout();
    Ok(text.split_whitespace().next().unwrap_or_default().parse::<f64>()? / 1024.0)
}

fn says(host: &Host, name: &str, word: &str) -> Result<()> {
    host.eventually(&format!("{name} to say {word}"), PATIENCE, || {
        Ok(host.bulkhead(["logs", name])?.ok()?.stdout().lines().last() == Some(word))
    })
}

test!(an_idle_gib_is_small_and_each_form_goes_on, BUSYBOX.deadline(240).shows_output());
fn an_idle_gib_is_small_and_each_form_goes_on(host: &Host) -> Result<()> {
    let run = ["run", "-d", "--name", "origin", "--memory", "960m", "busybox", "sh", "-c", TELLER];
    host.bulkhead(run)?.ok()?;
    says(host, "origin", "first")?;
    let path = |name: &str| host.work().join(name).display().to_string();
    let save = |name: &str, options: &[&str]| -> Result<Duration> {
        let mut words = vec!["snapshot"];
        words.extend(options);
        let directory = path(name);
        words.extend(["origin", &directory]);
        Ok(host.bulkhead(words)?.ok()?.took)
    };
    let (whole, second) = (path("whole"), path("second"));
    let mut times = vec![("whole", save("whole", &[])?), ("zipped", save("zipped", &["--compress"])?)];
    host.bulkhead(["exec", "origin", "sh", "-c", "echo second > /file"])?.ok()?;
    says(host, "origin", "second")?;
    times.push(("second", save("second", &["--base", &whole])?));
    host.bulkhead(["exec", "origin", "sh", "-c", "echo third > /file"])?.ok()?;
    says(host, "origin", "third")?;
    times.push(("third", save("third", &["--base", &second, "--compress"])?));
    host.bulkhead(["rm", "-f", "origin"])?.ok()?;

    println!(
        "| snapshot of an idle container, 1 GiB | saved in, ms | size, MiB | copy runs after, ms |\n|---|---|---|---|"
    );
    let mut sizes = Vec::new();
    for ((name, saved), word) in times.into_iter().zip(["first", "first", "second", "third"]) {
        let restored = host.bulkhead(["restore", "-d", "--name", name, &path(name)])?.ok()?.took;
        says(host, name, word)?;
        host.bulkhead(["exec", name, "cat", "/file"])?.ok()?.stdout_is(&format!("{word}\n"))?;
        host.bulkhead(["rm", "-f", name])?.ok()?;
        let size = size(host, &path(name))?;
        let (saved, restored) = (saved.as_secs_f64() * 1e3, restored.as_secs_f64() * 1e3);
        println!("| {name} | {saved:.0} | {size:.1} | {restored:.0} |");
        sizes.push(size);
    }
    ensure!(sizes[0] <= MOST_MIB && sizes[1] <= MOST_COMPRESSED_MIB, "{sizes:?}");
    ensure!(sizes[1] < sizes[0] / 2.0 && sizes[2] < sizes[0] / 2.0 && sizes[3] < sizes[2], "{sizes:?}");

    // The chain is looked at whole: what is missing or damaged is named, and nothing is left of the copy.
    let refused = |name: &str, word: &str| {
        host.bulkhead(["restore", &path(name)])?.status_is(125)?.stderr_has(word).map(drop)
    };
    fs::rename(host.work().join("second"), host.work().join("away"))?;
    refused("third", "which is not there")?;
    fs::rename(host.work().join("away"), host.work().join("second"))?;
    let state = host.work().join("whole/machine/state");
    let good = fs::read(&state)?;
    let mut bytes = good.clone();
    bytes[100] ^= 1;
    fs::write(&state, bytes)?;
    refused("third", "checksum")?;
    fs::write(&state, &good)?;
    let zipped = host.work().join("zipped/machine/memory.zst");
    let mut bytes = fs::read(&zipped)?;
    // Of the last piece's checksum, before the name. One in the middle can leave the content as it was: a match of another distance
    // in bytes that repeat.
    let checksum = bytes.len() - 25;
    bytes[checksum] ^= 1;
    fs::write(&zipped, bytes)?;
    refused("zipped", "damaged")?;
    host.bulkhead(["snapshot", "--base", &path("nothing"), "nosuch", &path("x")])?.status_is(1)?;
    // All of a family elsewhere.
    fs::create_dir(host.work().join("moved"))?;
    for name in ["whole", "second", "third"] {
        fs::rename(host.work().join(name), host.work().join("moved").join(name))?;
    }
    host.bulkhead(["restore", "-d", "--name", "moved", &path("moved/third")])?.ok()?;
    says(host, "moved", "third")?;
    // A disk that is full, in every form: the container runs, and nothing is left.
    let disk = host.small_disk(1024)?;
    let full = disk.path().join("saved").display().to_string();
    for options in [&["--compress"][..], &["--base", &path("moved/whole")]] {
        let fill = disk.path().join("fill");
        fs::write(&fill, vec![1; 700 << 10])?;
        let words = [&["snapshot"][..], options, &["moved", &full]].concat();
        host.bulkhead(words)?.status_is(1)?.stderr_has("No space left")?;
        fs::remove_file(fill)?;
        let left: Vec<_> =
            fs::read_dir(disk.path())?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
        ensure!(left.iter().all(|name| name == "lost+found"), "{left:?}");
        host.bulkhead(["exec", "moved", "echo", "well"])?.ok()?.stdout_is("well\n")?;
    }
    drop(disk);
    host.bulkhead(["rm", "-f", "moved"])?.ok()?;
    for name in ["moved", "zipped"] {
        fs::remove_dir_all(host.work().join(name))?;
    }
    Ok(())
}

test!(whoever_is_killed_while_a_copy_starts_nothing_of_it_stays, BUSYBOX.deadline(240));
fn whoever_is_killed_while_a_copy_starts_nothing_of_it_stays(host: &Host) -> Result<()> {
    host.bulkhead(["run", "-d", "--name", "origin", "busybox", "sh", "-c", TELLER])?.ok()?;
    says(host, "origin", "first")?;
    let saved = host.work().join("saved").display().to_string();
    host.bulkhead(["snapshot", "origin", &saved])?.ok()?;
    let restore = ["restore", "--rm", "-d", "--name", "copy", &saved];
    let fork = ["fork", "--rm", "--name", "copy", "origin"];
    let origin = host.bulkhead(["inspect", "origin"])?.ok()?.stdout();
    let pid = |key: &str| {
        let after = origin.split(&format!("\"{key}\": ")).nth(1).unwrap_or_default();
        after.chars().take_while(char::is_ascii_digit).collect::<String>()
    };
    let (supervisor, monitor) = (pid("supervisor_pid"), pid("monitor_pid"));
    let containers = Path::new("/var/lib/bulkhead/containers");
    for words in [&restore[..], &fork] {
        for victims in ["bulkhead", "bulkhead-vmm", "bulkhead|bulkhead-vmm"] {
            for moment in [2, 8, 20, 35, 50, 70, 90, 130] {
                let running = host.bulkhead_program(words.iter().copied()).spawn()?;
                std::thread::sleep(Duration::from_millis(moment));
                // All of these but the origin's own.
                let script = format!(
                    "for p in $(pgrep -x '{victims}'); do case $p in {supervisor}|{monitor}) ;; *) kill -9 $p;; esac; done"
                );
                host.run(["sh", "-c", &script])?;
                running.wait()?;
                let what = format!("{words:?}, {victims} killed after {moment} ms");
                host.bulkhead(["rm", "-f", "copy"])?.ok()?;
                host.eventually(&format!("the copy to be gone ({what})"), PATIENCE, || {
                    host.bulkhead(["ps", "-a"])?.ok()?;
                    Ok(fs::read_dir(containers)?.count() == 1)
                })?;
                host.bulkhead(["exec", "origin", "echo", "well"])?.ok()?.stdout_is("well\n")?;
            }
            // The next is as good as the first, and clears away what was half-made.
            host.bulkhead(words.iter().copied())?.ok()?;
            says(host, "copy", "first")?;
            host.bulkhead(["rm", "-f", "copy"])?.ok()?;
        }
    }
    ensure!(!Path::new("/var/lib/bulkhead/forks").exists());
    host.bulkhead(["rm", "-f", "origin"])?.ok()?;
    Ok(fs::remove_dir_all(saved)?)
}
