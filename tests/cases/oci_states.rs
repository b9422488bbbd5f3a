//! `bulkhead-oci` asked for what the container's state does not allow, with ids and roots that are none, at once with
//! others, and on disks that are full. Beside runc where it does the same.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Program;
use bulkhead_tests::test;

use crate::oci::{Bundle, NEEDS, both};

test!(what_the_state_does_not_allow_is_refused, NEEDS);
fn what_the_state_does_not_allow_is_refused(host: &Host) -> Result<()> {
    both(host, |bundle| {
        bundle.runs("trap 'exit 0' TERM; while :; do sleep 0.1; done")?;
        let refused = |words: &[&str], status: i32| {
            let end = bundle.call(words)?.status_is(status).with_context(|| words.join(" "))?;
            ensure!(!end.stderr.is_empty(), "{words:?} says nothing");
            Ok(())
        };
        for verb in ["start", "kill", "pause", "resume", "delete", "state", "ps"] {
            refused(&[verb, "nobody"], 1)?;
        }
        refused(&["exec", "nobody", "true"], 255)?;
        bundle.apart(&["create", "c1"])?;
        refused(&["resume", "c1"], 1)?;
        bundle.call(&["start", "c1"])?.ok()?;
        refused(&["start", "c1"], 1)?;
        refused(&["resume", "c1"], 1)?;
        bundle.call(&["pause", "c1"])?.ok()?;
        refused(&["pause", "c1"], 1)?;
        refused(&["exec", "c1", "true"], 255)?;
        refused(&["delete", "c1"], 1)?;
        ensure!(bundle.status("c1")? == "paused");
        bundle.call(&["resume", "c1"])?.ok()?;
        refused(&["kill", "c1", "NOSUCH"], 1)?;
        bundle.call(&["kill", "c1"])?.ok()?;
        bundle.wait_for(host, "c1", "stopped")?;
        for verb in ["start", "pause", "resume"] {
            refused(&[verb, "c1"], 1)?;
        }
        bundle.call(&["kill", "c1"])?.status_is(1)?.stderr_has("container not running")?;
        ensure!(bundle.call(&["ps", "c1"])?.ok()?.stdout().lines().count() == 1);
        bundle.call(&["ps", "--format", "json", "c1"])?.ok()?.stdout_is("null\n")?;
        refused(&["events", "--stats", "c1"], 1)?;
        refused(&["update", "--pids-limit", "5", "c1"], 1)?;
        refused(&["create", "c1"], 1)?;
        bundle.call(&["delete", "c1"])?.ok()?;

        // A created one is killed, and removed, without having run.
        bundle.apart(&["create", "c1"])?;
        bundle.call(&["kill", "c1", "KILL"])?.ok()?;
        bundle.wait_for(host, "c1", "stopped")?;
        bundle.call(&["delete", "c1"])?.ok()?;
        bundle.apart(&["create", "c1"])?;
        bundle.call(&["delete", "--force", "c1"])?.ok()?;
        bundle.nothing_left()
    })
}

test!(ids_and_roots_that_are_none, NEEDS);
fn ids_and_roots_that_are_none(host: &Host) -> Result<()> {
    both(host, |bundle| {
        bundle.runs("true")?;
        let long = "x".repeat(300);
        for id in ["", ".", "..", "a/b", "../a", "/", "a b", "a\n", &long] {
            for verb in ["create", "run"] {
                let end = bundle.call(&[verb, id])?.status_is(1).with_context(|| format!("{verb} {id:?}"))?;
                ensure!(!end.stderr().contains("panicked"));
            }
            bundle.call(&["delete", id])?.status_is(1)?;
            bundle.call(&["state", id])?.status_is(1)?;
        }
        bundle.nothing_left()?;
        let file = host.file("file", "")?.display().to_string();
        let below = format!("{file}/root");
        // sysfs and procfs take nothing from anybody.
        for root in [file.as_str(), &below, "/sys/kernel/nowhere", "/proc/nowhere"] {
            let runtime = if bundle.is_ours() { "bulkhead-oci" } else { "runc" };
            let program = || Program::new([runtime, "--root", root]).dir(&bundle.dir);
            let end = program().args(["run", "c1"]).run()?.status_is(1).context(root.to_owned())?;
            ensure!(!bundle.is_ours() || end.stderr().contains(root), "{end}");
            program().args(["state", "c1"]).run()?.status_is(1)?;
        }
        Ok(())
    })
}

test!(a_damaged_state_is_told_and_force_removes_all, NEEDS);
fn a_damaged_state_is_told_and_force_removes_all(host: &Host) -> Result<()> {
    let bundle = &Bundle::new(host, "bulkhead-oci")?;
    bundle.runs("while :; do sleep 1; done")?;
    let file = host.work().join("bulkhead-oci-state/c1/state.json");
    for damage in [Some("{"), Some("[]"), None] {
        bundle.apart(&["run", "-d", "c1"])?;
        match damage {
            Some(text) => fs::write(&file, text)?,
            None => fs::remove_file(&file)?,
        }
        bundle.nothing_left()?;
        bundle.call(&["state", "c1"])?.status_is(1)?.stderr_has("state.json")?;
        bundle.call(&["kill", "c1"])?.status_is(1)?.stderr_has("state.json")?;
        bundle.call(&["delete", "c1"])?.status_is(1)?.stderr_has("state.json")?;
        bundle.call(&["create", "c1"])?.status_is(1)?.stderr_has("exists")?;
        bundle.call(&["delete", "--force", "c1"])?.ok()?;
        // What is left of it else is found by the leak check.
        ensure!(!file.parent().is_some_and(Path::exists), "its directory is still there");
    }
    Ok(())
}

test!(of_two_creates_of_one_id_one_wins, NEEDS);
fn of_two_creates_of_one_id_one_wins(host: &Host) -> Result<()> {
    // Not beside runc: of its losers some get so far that they spoil the winner's container.
    let bundle = &Bundle::new(host, "bulkhead-oci")?;
    bundle.runs("echo up; exit 5")?;
    for round in 0..5 {
        let racers: Vec<_> = (0..3)
            .map(|racer| {
                // A container's streams stay open; so each has files for them.
                let line = format!("exec \"$@\" >out.{racer} 2>err.{racer} </dev/null");
                bundle.wrapped(&["sh", "-c", &line, "sh"], &["create", "c1"]).spawn()
            })
            .collect::<Result<_>>()?;
        let mut winner = None;
        for (racer, running) in racers.into_iter().enumerate() {
            let said = |stream: &str| fs::read_to_string(bundle.dir.join(format!("{stream}.{racer}")));
            match running.wait()?.status {
                0 => ensure!(winner.replace(racer).is_none(), "two have made c1"),
                1 => ensure!(said("err")?.contains("exist"), "the loser says {:?}", said("err")?),
                other => anyhow::bail!("status {other}: {}", said("err")?),
            }
        }
        let winner = winner.context("nobody has made c1")?;
        ensure!(bundle.status("c1")? == "created");
        if round == 4 {
            bundle.call(&["start", "c1"])?.ok()?;
            bundle.wait_for(host, "c1", "stopped")?;
            ensure!(fs::read_to_string(bundle.dir.join(format!("out.{winner}")))? == "up\n");
        }
        bundle.call(&["delete", "--force", "c1"])?.ok()?;
    }
    bundle.nothing_left()
}

/// All that is below a directory.
fn files_in(dir: &Path) -> Result<Vec<String>> {
    let mut names: Vec<_> = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

test!(a_full_disk_is_told_and_leaves_nothing, NEEDS.deadline(120));
fn a_full_disk_is_told_and_leaves_nothing(host: &Host) -> Result<()> {
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.runs("echo up")?;
    let disk = host.small_disk(256)?;
    let root = disk.path().display().to_string();
    let mut failures = 0;
    // With less and less room.
    for free in [128, 12, 8, 4, 0] {
        fs::write(disk.path().join("filler"), vec![0; (256 - free) << 10])?;
        let call = Program::new(["bulkhead-oci", "--root", &root, "run", "c1"]).dir(&bundle.dir).run()?;
        if call.status == 0 {
            call.stdout_is("up\n")?;
        } else {
            failures += 1;
            call.status_is(1)?.stderr_has("no space left").with_context(|| format!("{free} KiB free"))?;
        }
        let left = files_in(disk.path())?;
        ensure!(left == ["filler"], "with {free} KiB free there is left: {left:?}");
    }
    ensure!((1..5).contains(&failures), "{failures} of 5 have failed");
    Ok(())
}

test!(a_full_root_is_the_containers_own_trouble, NEEDS);
fn a_full_root_is_the_containers_own_trouble(host: &Host) -> Result<()> {
    both(host, |bundle| {
        let disk = host.small_disk(8192)?;
        let root = disk.path().join("rootfs");
        Program::new(["cp", "-a"]).args([bundle.dir.join("rootfs"), root.clone()]).run()?.ok()?;
        bundle.change(|config| config["root"]["path"] = root.display().to_string().into())?;
        bundle.runs("cat /dev/zero >/full || echo refused; touch /still; kill -0 1; echo up")?;
        bundle.call(&["run", "c1"])?.ok()?.stdout_is("refused\nup\n")?.stderr_has("no space left")?;
        // Full from the start: whatever cannot be made is told, and what can be runs.
        let call = bundle.call(&["run", "c1"])?;
        ensure!(call.status == 0 || call.stderr().to_lowercase().contains("no space left"), "{call}");
        bundle.nothing_left()
    })
}
