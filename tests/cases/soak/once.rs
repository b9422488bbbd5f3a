//! What is done and over in one step: containers that are attached to, programs in those that run, and commands that are killed.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::process::Finished;
use rustix::process::Signal;

use super::container::{Container, SHAPES, children, kill_pid};
use super::{PATIENCE, Soak};

/// Numbers from 1 on, a line each.
fn numbers(up_to: u64) -> String {
    (1..=up_to).map(|number| format!("{number}\n")).collect()
}

impl Soak<'_> {
    /// Bytes of every value.
    pub fn bytes(&mut self, most: usize) -> Vec<u8> {
        let count = self.rng.usize(..most);
        (0..count).map(|_| self.rng.u8(..)).collect()
    }

    fn run(&mut self, flags: &[&str], script: &str) -> Result<Finished> {
        self.made += 1;
        crate::shell(self.host, flags, script)
    }

    pub fn once(&mut self) -> Result<bool> {
        let (count, code) = (self.rng.u64(1..1500), self.rng.i32(0..=120));
        let seq = format!("seq 1 {count}; echo err >&2; exit {code}");
        let kind = self.rng.u8(0..7);
        self.tell(format!("kind {kind}, {count} numbers, status {code}"));
        match kind {
            0 => {
                let shape = self.rng.choice(SHAPES).context("no shape")?;
                self.run(shape, &seq)?.status_is(code)?.stdout_is(&numbers(count))?.stderr_is("err\n")?;
            }
            1 => {
                let share = self.new_share()?;
                let script = format!("cat /v/given; seq 1 {count} > /v/made; exit {code}");
                let volume = Container::volume(&share);
                self.run(&["-v", &volume], &script)?.status_is(code)?.stdout_is("of the host\n")?;
                ensure!(fs::read_to_string(share.join("made"))? == numbers(count), "{}", share.display());
                fs::remove_dir_all(share)?;
            }
            2 => {
                let script = "nproc; cat /sys/fs/cgroup/memory.max";
                self.run(SHAPES[1], script)?.ok()?.stdout_is("2\n134217728\n")?;
            }
            3 => {
                let bytes = self.bytes(100_000);
                self.made += 1;
                let line = format!("cat; exit {code}");
                let words = ["run", "--rm", "-i", "busybox", "sh", "-c", &line];
                let finished =
                    self.host.bulkhead_program(words).stdin(bytes.clone()).run()?.status_is(code)?;
                ensure!(finished.stdout == bytes, "{} bytes came, of {}", finished.stdout.len(), bytes.len());
            }
            4 => {
                self.made += 1;
                let words = ["run", "--rm", "-it", "busybox", "sh"];
                let mut terminal = self.host.bulkhead_program(words).terminal(33, 99)?;
                terminal.send(format!("stty size; seq 1 {count} | tail -n 1; exit {code}\n"))?;
                let last = format!("\n{count}\r\n");
                terminal.wait()?.status_is(code)?.stdout_has("33 99")?.stdout_has(&last)?;
            }
            5 if !self.network_is_used() => {
                let flag = self.network.flag(0);
                let script = format!("ping -c 1 -W 5 10.9.0.1 >/dev/null && exit {code}; ip address");
                self.run(&[&flag], &script)?.status_is(code)?;
            }
            _ => {
                let flags = ["-e", "A=b", "--hostname", "h", "-w", "/tmp", "-u", "1:2", "--read-only"];
                let script = "echo $A $(hostname) $(pwd) $(id -u):$(id -g); touch /x 2>/dev/null || echo ro";
                self.run(&flags, script)?.ok()?.stdout_is("b h /tmp 1:2\nro\n")?;
            }
        }
        Ok(true)
    }

    /// A container of this name may be there or not, and can be removed.
    fn is_cleared(&mut self, name: &str) -> Result<()> {
        self.host.bulkhead(["rm", "-f", name])?.ok()?;
        self.host
            .eventually(&format!("{name} to be gone"), PATIENCE, || Ok(!self.listed()?.contains_key(name)))
    }

    /// At any moment of a container's making: its name is free again.
    pub fn start_is_killed(&mut self) -> Result<bool> {
        if self.is_full() {
            return Ok(false);
        }
        let name = self.new_name("k");
        let moment = Duration::from_micros(self.rng.u64(0..90_000));
        let mut words = vec!["run", "--name", &name];
        if self.rng.bool() {
            words.push("-d");
        }
        if self.rng.bool() {
            words.push("--rm");
        }
        words.extend(["busybox", "sh", "-c", "seq 1 1000; exec sleep 1000"]);
        self.tell(format!("{} after {moment:?}", words.join(" ")));
        let run = self.host.bulkhead_program(&words).spawn()?;
        std::thread::sleep(moment);
        run.signal(Signal::KILL)?;
        self.made += 1;
        // Its output is held by the supervisor, if there is one.
        self.is_cleared(&name)?;
        run.wait()?;
        Ok(true)
    }

    /// As before, but whoever else has a part in it is killed: the command tells of it, and does not wait for ever.
    pub fn start_loses_a_process(&mut self) -> Result<bool> {
        if self.is_full() {
            return Ok(false);
        }
        let name = self.new_name("k");
        let share = self.new_share()?;
        let moment = Duration::from_micros(self.rng.u64(0..110_000));
        let volume = Container::volume(&share);
        let mut words = vec!["run", "--rm", "--name", &name];
        if self.rng.bool() {
            words.extend(["-v", &volume]);
        }
        words.extend(["busybox", "sh", "-c", "seq 1 1000; sleep 1"]);
        self.tell(format!("{} after {moment:?}", words.join(" ")));
        let run = self.host.bulkhead_program(&words).spawn()?;
        std::thread::sleep(moment);
        let mut family = children(run.pid().into());
        for (pid, _) in family.clone() {
            family.extend(children(pid));
        }
        let victim = self.rng.choice(&family).cloned();
        if let Some((pid, program)) = &victim {
            self.tell(format!("{program}, process {pid}"));
            kill_pid(*pid)?;
        }
        self.made += 1;
        let finished = run.wait()?;
        if victim.is_some() {
            ensure!(finished.status != 0 || finished.stdout() == numbers(1000), "{finished}");
        } else {
            finished.ok()?.stdout_is(&numbers(1000))?;
        }
        self.is_cleared(&name)?;
        fs::remove_dir_all(share)?;
        Ok(true)
    }

    fn one_that_runs(&mut self) -> Option<String> {
        let at = self.one(Container::runs)?;
        let name = self.containers[at].name.clone();
        self.tell(name.clone());
        Some(name)
    }

    pub fn exec(&mut self) -> Result<bool> {
        let Some(name) = self.one_that_runs() else { return Ok(false) };
        let (count, code) = (self.rng.u64(1..1500), self.rng.i32(0..=120));
        match self.rng.u8(0..4) {
            0 => {
                let bytes = self.bytes(50_000);
                let line = format!("cat; exit {code}");
                let exec = self.host.bulkhead_program(["exec", "-i", &name, "sh", "-c", &line]);
                let finished = exec.stdin(bytes.clone()).run()?.status_is(code)?;
                ensure!(finished.stdout == bytes, "{} bytes came, of {}", finished.stdout.len(), bytes.len());
            }
            1 => {
                self.host.bulkhead(["exec", &name, "/no/such"])?.status_is(127)?;
            }
            2 => {
                self.host
                    .bulkhead(["exec", &name, "sh", "-c", "sh -c 'kill -9 $$'; exit $?"])?
                    .status_is(137)?;
            }
            _ => {
                let line = format!("seq 1 {count}; echo err >&2; exit {code}");
                let finished = self.host.bulkhead(["exec", &name, "sh", "-c", &line])?.status_is(code)?;
                finished.stdout_is(&numbers(count))?.stderr_is("err\n")?;
            }
        }
        Ok(true)
    }

    pub fn execs_at_once(&mut self) -> Result<bool> {
        let Some(name) = self.one_that_runs() else { return Ok(false) };
        let execs = (1..=3).map(|number| {
            let line = format!("seq 1 {}; exit {number}", number * 100);
            self.host.bulkhead_program(["exec", &name, "sh", "-c", &line]).spawn()
        });
        for (exec, number) in execs.collect::<Result<Vec<_>>>()?.into_iter().zip(1..) {
            exec.wait()?.status_is(number)?.stdout_is(&numbers(u64::try_from(number)? * 100))?;
        }
        Ok(true)
    }

    /// The container goes on, and so does the next exec.
    pub fn exec_is_killed(&mut self) -> Result<bool> {
        let Some(name) = self.one_that_runs() else { return Ok(false) };
        let line = "echo in; exec sleep 1000";
        let exec = self.host.bulkhead_program(["exec", &name, "sh", "-c", line]).spawn()?;
        exec.wait_for("in", PATIENCE)?;
        exec.signal(Signal::KILL)?;
        exec.wait()?.status_is(137)?;
        self.host.bulkhead(["exec", &name, "echo", "well"])?.ok()?.stdout_is("well\n")?;
        Ok(true)
    }

    /// There and back.
    pub fn copy(&mut self) -> Result<bool> {
        let Some(name) = self.one_that_runs() else { return Ok(false) };
        let bytes = self.bytes(100_000);
        let given = self.host.file("given", &bytes)?.display().to_string();
        let taken = self.host.work().join("taken").display().to_string();
        self.host.bulkhead(["cp", &given, &format!("{name}:/tmp/copied")])?.ok()?;
        self.host.bulkhead(["cp", &format!("{name}:/tmp/copied"), &taken])?.ok()?;
        ensure!(fs::read(&taken)? == bytes, "the file came back changed");
        self.host.bulkhead(["exec", &name, "rm", "/tmp/copied"])?.ok()?;
        fs::remove_file(given)?;
        Ok(fs::remove_file(taken).map(|()| true)?)
    }

    /// What either end writes to a shared directory is there for the other.
    pub fn share(&mut self) -> Result<bool> {
        let Some(at) = self.one(|container| container.runs() && container.share.is_some()) else {
            return Ok(false);
        };
        let container = &self.containers[at];
        let (name, share) = (container.name.clone(), container.share.clone().context("no share")?);
        let (word, file) = (self.rng.u64(..).to_string(), self.new_name("file"));
        fs::write(share.join(&file), &word)?;
        let line = format!("cat /v/{file}; mv /v/{file} /v/{file}-back; echo -n more >> /v/{file}-back");
        self.host.bulkhead(["exec", &name, "sh", "-c", &line])?.ok()?.stdout_is(&word)?;
        ensure!(fs::read_to_string(share.join(format!("{file}-back")))? == format!("{word}more"));
        Ok(true)
    }

    pub fn figures(&mut self) -> Result<bool> {
        let Some(name) = self.one_that_runs() else { return Ok(false) };
        self.host.bulkhead(["stats", &name])?.ok()?.stdout_has(&name)?;
        self.host.bulkhead(["top", &name])?.ok()?.stdout_has("sh")?;
        Ok(true)
    }

    /// Refusals change nothing.
    pub fn refused(&mut self) -> Result<bool> {
        if let Some(name) = self.one_that_runs() {
            self.host.bulkhead(["rm", &name])?.failed()?.stderr_has("running")?;
            let again = ["run", "--rm", "--name", &name, "busybox", "true"];
            self.host.bulkhead(again)?.status_is(125)?.stderr_has("in use")?;
            return Ok(true);
        }
        let Some(at) = self.one(|container| !container.may_run()) else { return Ok(false) };
        let name = self.containers[at].name.clone();
        self.host.bulkhead(["exec", &name, "true"])?.failed()?;
        self.host.bulkhead(["kill", &name])?.failed()?;
        self.host.bulkhead(["fork", &name])?.failed()?;
        Ok(true)
    }
}
