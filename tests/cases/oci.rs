//! `bulkhead-oci` as an engine uses it, and beside runc: the same bundle, the same words.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Finished, Program};
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;
use serde_json::{Value, json};

pub const NEEDS: Needs = Needs::deadline(Needs::bulkhead(), 60);

/// What passes with the one must pass with the other.
pub const RUNTIMES: [&str; 2] = ["runc", "bulkhead-oci"];

/// A bundle of busybox, and a runtime to run it with.
pub struct Bundle {
    pub dir: PathBuf,
    root: PathBuf,
    runtime: &'static str,
}

impl Bundle {
    pub fn new(host: &Host, runtime: &'static str) -> Result<Self> {
        Self::named(host, runtime, "")
    }

    /// One of several, whose containers the same runtime knows.
    pub fn named(host: &Host, runtime: &'static str, name: &str) -> Result<Self> {
        let dir = host.work().join(format!("{runtime}{name}"));
        let bin = dir.join("rootfs/bin");
        fs::create_dir_all(&bin)?;
        fs::copy("/usr/bin/busybox", bin.join("busybox"))?;
        for applet in [
            "sh", "true", "cat", "sleep", "tail", "id", "uname", "seq", "stty", "touch", "env", "mount",
            "kill",
        ] {
            symlink("busybox", bin.join(applet))?;
        }
        let bundle = Self { root: host.work().join(format!("{runtime}-state")), dir, runtime };
        Program::new([runtime, "spec"]).dir(&bundle.dir).run()?.ok()?;
        bundle.change(|config| {
            config["process"]["terminal"] = false.into();
            config["root"]["readonly"] = false.into();
        })?;
        Ok(bundle)
    }

    pub fn change(&self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let file = self.dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
        change(&mut config);
        Ok(fs::write(file, config.to_string())?)
    }

    pub fn runs(&self, script: &str) -> Result<()> {
        self.change(|config| config["process"]["args"] = json!(["sh", "-c", script]))
    }

    pub fn program(&self, words: &[&str]) -> Program {
        let root = self.root.display().to_string();
        Program::new([self.runtime, "--root", &root]).args(words.iter().copied()).dir(&self.dir)
    }

    /// The same, by way of another program.
    pub fn wrapped(&self, by: &[&str], words: &[&str]) -> Program {
        let root = self.root.display().to_string();
        let program = Program::new(by.iter().copied()).args([self.runtime, "--root", &root]);
        program.args(words.iter().copied()).dir(&self.dir)
    }

    pub fn is_ours(&self) -> bool {
        self.runtime == "bulkhead-oci"
    }

    pub fn call(&self, words: &[&str]) -> Result<Finished> {
        self.program(words).run()
    }

    /// For what leaves a process behind that holds its streams: they go to the files `out` and `err` of the bundle.
    pub fn apart(&self, words: &[&str]) -> Result<Finished> {
        let line = "exec \"$@\" >out 2>err </dev/null";
        self.wrapped(&["sh", "-c", line, "sh"], words).run()?.ok()
    }

    /// What a container's state says.
    pub fn state(&self, id: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.call(&["state", id])?.ok()?.stdout())?)
    }

    /// More of busybox.
    pub fn applets(&self, names: &[&str]) -> Result<()> {
        Ok(names.iter().try_for_each(|name| symlink("busybox", self.dir.join("rootfs/bin").join(name)))?)
    }

    /// There is no container of this root.
    pub fn nothing_left(&self) -> Result<()> {
        self.call(&["list", "-q"])?.ok()?.stdout_is("")?;
        Ok(())
    }

    pub fn status(&self, id: &str) -> Result<String> {
        Ok(self.state(id)?["status"].as_str().context("no status")?.to_owned())
    }

    pub fn wait_for(&self, host: &Host, id: &str, status: &str) -> Result<()> {
        host.eventually(status, Duration::from_secs(10), || Ok(self.status(id)? == status))
    }
}

/// The same steps with both, since whatever passes here passes with what engines know.
pub fn both(host: &Host, steps: impl Fn(&Bundle) -> Result<()>) -> Result<()> {
    for runtime in RUNTIMES {
        steps(&Bundle::new(host, runtime)?).with_context(|| format!("with {runtime}"))?;
    }
    Ok(())
}

pub fn pid_in(file: &Path) -> Result<i32> {
    Ok(fs::read_to_string(file)?.parse()?)
}

test!(a_life_from_create_to_delete, NEEDS);
fn a_life_from_create_to_delete(host: &Host) -> Result<()> {
    both(host, |bundle| {
        bundle.runs("trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done")?;
        let pid_file = bundle.dir.join("pid");
        let file = pid_file.display().to_string();
        bundle.apart(&["create", "--pid-file", &file, "c1"])?;
        ensure!(bundle.status("c1")? == "created");
        let pid = pid_in(&pid_file)?;
        ensure!(Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is not there");
        bundle.call(&["start", "c1"])?.ok()?;
        ensure!(bundle.status("c1")? == "running");
        bundle.call(&["start", "c1"])?.failed()?;
        host.eventually("output", Duration::from_secs(5), || {
            Ok(fs::read_to_string(bundle.dir.join("out"))? == "up\n")
        })?;
        bundle.call(&["create", "c1"])?.failed()?;
        bundle.call(&["delete", "c1"])?.failed()?.stderr_has("not stopped")?;
        bundle.call(&["list", "-q"])?.ok()?.stdout_is("c1\n")?;
        bundle.call(&["pause", "c1"])?.ok()?;
        ensure!(bundle.status("c1")? == "paused");
        bundle.call(&["resume", "c1"])?.ok()?;
        bundle.call(&["kill", "c1"])?.ok()?;
        bundle.wait_for(host, "c1", "stopped")?;
        bundle.call(&["exec", "c1", "true"])?.status_is(255)?;
        bundle.call(&["delete", "c1"])?.ok()?;
        bundle.call(&["state", "c1"])?.failed()?.stderr_has("does not exist")?;
        bundle.call(&["delete", "c1"])?.failed()?;
        bundle.call(&["delete", "--force", "c1"])?.ok()?;
        Ok(())
    })
}

test!(run_ends_as_the_process_does, NEEDS);
fn run_ends_as_the_process_does(host: &Host) -> Result<()> {
    both(host, |bundle| {
        bundle.runs("echo out; echo err >&2; cat; exit 42")?;
        let mut run = bundle.program(&["run", "c1"]).open_stdin().spawn()?;
        run.send("in\n")?;
        run.close_stdin();
        run.wait()?.status_is(42)?.stdout_is("out\nin\n")?.stderr_is("err\n")?;
        bundle.runs("kill -9 $$")?;
        // A container's first process is safe from itself; so it ends by its next line.
        bundle.call(&["run", "c2"])?;
        bundle.runs("exec nosuch")?;
        bundle.call(&["run", "c3"])?.status_is(127)?;
        ensure!(bundle.call(&["list", "-q"])?.ok()?.stdout().is_empty(), "run leaves containers behind");
        Ok(())
    })
}

test!(a_missing_program_is_told_as_engines_expect, NEEDS);
fn a_missing_program_is_told_as_engines_expect(host: &Host) -> Result<()> {
    both(host, |bundle| {
        bundle.change(|config| config["process"]["args"] = json!(["nosuch"]))?;
        bundle.call(&["run", "c1"])?.failed()?.stderr_has("executable file not found in $PATH")?;
        ensure!(bundle.call(&["list", "-q"])?.ok()?.stdout().is_empty());
        Ok(())
    })
}

test!(exec_in_every_way, NEEDS);
fn exec_in_every_way(host: &Host) -> Result<()> {
    both(host, |bundle| {
        bundle.runs("while :; do sleep 0.1; done")?;
        bundle.apart(&["run", "-d", "c1"])?;
        bundle.call(&["exec", "c1", "sh", "-c", "echo in; exit 9"])?.status_is(9)?.stdout_is("in\n")?;
        bundle
            .call(&[
                "exec",
                "--env",
                "A=b",
                "--cwd",
                "/bin",
                "--user",
                "7:8",
                "c1",
                "sh",
                "-c",
                "echo $A $PWD $(id -u) $(id -g)",
            ])?
            .ok()?
            .stdout_is("b /bin 7 8\n")?;
        let process = json!({"args": ["sh", "-c", "exit 4"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]});
        let file = host.file("process.json", process.to_string())?.display().to_string();
        bundle.call(&["exec", "--process", &file, "c1"])?.status_is(4)?;
        bundle
            .call(&["exec", "c1", "nosuch"])?
            .status_is(255)?
            .stderr_has("executable file not found in $PATH")?;
        // The end of its input is one inside, though its output goes on.
        let script = "cat; echo over";
        let words = ["exec", "c1", "sh", "-c", script];
        bundle.program(&words).stdin("in\n").run()?.ok()?.stdout_is("in\nover\n")?;
        let pid_file = bundle.dir.join("exec-pid");
        let name = pid_file.display().to_string();
        bundle.apart(&["exec", "-d", "--pid-file", &name, "c1", "sleep", "0.3"])?;
        let pid = pid_in(&pid_file)?;
        host.eventually("the detached process ends", Duration::from_secs(10), || {
            Ok(fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z ")))
        })?;
        bundle.call(&["kill", "c1", "KILL"])?.ok()?;
        bundle.wait_for(host, "c1", "stopped")?;
        bundle.call(&["delete", "c1"])?.ok()?;
        Ok(())
    })
}

test!(two_hundred_short_execs_lose_nothing, NEEDS.deadline(120));
fn two_hundred_short_execs_lose_nothing(host: &Host) -> Result<()> {
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.runs("while :; do sleep 1; done")?;
    bundle.apart(&["run", "-d", "c1"])?;
    for number in 0..200 {
        let script = format!("seq 1 20; echo {number}");
        let output = bundle.call(&["exec", "c1", "sh", "-c", &script])?.ok()?.stdout();
        ensure!(output.ends_with(&format!("20\n{number}\n")), "exec {number} said {output:?}");
    }
    let scripts: Vec<_> = (0..20).map(|number| format!("seq 1 500; exit {number}")).collect();
    let running: Vec<_> = scripts
        .iter()
        .map(|script| bundle.program(&["exec", "c1", "sh", "-c", script]).spawn())
        .collect::<Result<_>>()?;
    for (exec, status) in running.into_iter().zip(0..) {
        let finished = exec.wait()?.status_is(status)?;
        ensure!(finished.stdout().ends_with("500\n"));
    }
    bundle.call(&["delete", "--force", "c1"])?.ok()?;
    Ok(())
}

test!(writes_land_in_the_bundle_and_binds_are_what_they_say, NEEDS);
fn writes_land_in_the_bundle_and_binds_are_what_they_say(host: &Host) -> Result<()> {
    both(host, |bundle| {
        let shared = bundle.dir.join("shared");
        fs::create_dir(&shared)?;
        fs::write(shared.join("given"), "given\n")?;
        let single = host.file("single", "single\n")?;
        bundle.change(|config| {
            let Some(mounts) = config["mounts"].as_array_mut() else { return };
            let bind = |to: &str, from: &Path, mode: &str| json!({"destination": to, "type": "bind", "source": from, "options": ["rbind", mode]});
            mounts.extend([bind("/rw", &shared, "rw"), bind("/ro", &shared, "ro"), bind("/single", &single, "ro")]);
        })?;
        bundle.runs("cat /ro/given /single; echo new >/rw/new; touch /in-root; touch /ro/no 2>/dev/null || echo refused")?;
        bundle.call(&["run", "c1"])?.ok()?.stdout_is("given\nsingle\nrefused\n")?;
        ensure!(fs::read_to_string(shared.join("new"))? == "new\n");
        ensure!(bundle.dir.join("rootfs/in-root").exists());
        ensure!(!shared.join("no").exists());
        Ok(())
    })
}

test!(whatever_is_killed_delete_cleans_up, NEEDS.deadline(120));
fn whatever_is_killed_delete_cleans_up(host: &Host) -> Result<()> {
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.runs("while :; do sleep 1; done")?;
    for victim in ["bulkhead-oci", "bulkhead-vmm", "virtiofsd"] {
        bundle.apart(&["run", "-d", "c1"])?;
        host.run(["pkill", "-KILL", "-f", victim])?.ok()?;
        bundle.wait_for(host, "c1", "stopped").with_context(|| format!("after {victim} was killed"))?;
        bundle.call(&["delete", "--force", "c1"])?.ok()?;
    }
    Ok(())
}

test!(bad_bundles_and_ids_leave_nothing, NEEDS);
fn bad_bundles_and_ids_leave_nothing(host: &Host) -> Result<()> {
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.call(&["create", "a/b"])?.status_is(1)?.stderr_has("invalid container ID")?;
    bundle.call(&["create", "--bundle", "/nowhere", "c1"])?.status_is(1)?.stderr_has("/nowhere")?;
    bundle.call(&["create", "--no-such-flag", "c1"])?.status_is(1)?.stderr_has("no-such-flag")?;
    bundle.call(&["create", "--console-socket", "/nowhere", "c1"])?.status_is(1)?.stderr_has("tty")?;
    bundle.change(|config| config["process"]["terminal"] = true.into())?;
    bundle.call(&["create", "--console-socket", "/nowhere", "c1"])?.status_is(1)?.stderr_has("/nowhere")?;
    bundle.change(|config| {
        config["process"]["terminal"] = false.into();
        config["root"]["path"] = "missing".into();
    })?;
    bundle.call(&["create", "c1"])?.status_is(1)?.stderr_has("missing")?;
    bundle.change(|config| {
        config["root"]["path"] = "rootfs".into();
        config["linux"]["namespaces"] = json!([{"type": "pid"}]);
    })?;
    bundle.call(&["create", "c1"])?.status_is(1)?.stderr_has("network")?;
    fs::write(bundle.dir.join("config.json"), "{")?;
    let log = bundle.dir.join("log");
    let name = log.display().to_string();
    bundle.call(&["--log", &name, "--log-format", "json", "create", "c1"])?.status_is(1)?;
    let line: Value = serde_json::from_str(&fs::read_to_string(log)?)?;
    ensure!(
        line["level"] == "error" && line["msg"].as_str().is_some_and(|text| text.contains("malformed")),
        "{line}"
    );
    ensure!(bundle.call(&["list", "-q"])?.ok()?.stdout().is_empty());
    Ok(())
}
