//! A container of `bulkhead run`, `restore` or `fork`: what it must be, and its ways to end.

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Running;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::output::{self, Script, Whole};
use super::{PATIENCE, Soak};

/// Kinds of machines: few, as a template is kept for each.
pub const SHAPES: &[&[&str]] = &[&[], &["--memory", "128m", "--cpus", "2"]];

/// Where a container must be in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Runs,
    /// With one of these statuses.
    Ended(Vec<i32>),
}

/// What `ps -a` says of one.
#[derive(Debug, Clone)]
pub struct Look {
    status: String,
    code: Option<i32>,
}

impl Look {
    pub fn of(row: &Value) -> Result<Self> {
        let status = row["status"].as_str().context("no status")?.to_owned();
        Ok(Self { status, code: row["exit_code"].as_i64().map(i32::try_from).transpose()? })
    }
}

/// The command that a container is attached to.
struct Client {
    running: Running,
    /// It, or the supervisor that it waits for, was killed.
    is_killed: bool,
}

pub struct Container {
    pub name: String,
    pub script: Script,
    pub share: Option<PathBuf>,
    pub network: bool,
    /// Numbers that its output may begin with.
    first: RangeInclusive<u64>,
    /// It goes when it ends.
    removes_itself: bool,
    state: State,
    is_gone: bool,
    whole: Whole,
    /// What it has said so far: no more may be missing from it later.
    said: String,
    client: Option<Client>,
}

impl Container {
    /// A copy of one that goes on from a moment at which its next number was one of these.
    pub fn copy(name: String, of: &Script, first: RangeInclusive<u64>) -> Self {
        Self {
            name,
            script: of.clone(),
            share: None,
            network: false,
            first,
            removes_itself: false,
            state: State::Runs,
            is_gone: false,
            whole: if of.lasts.is_some() { Whole::Maybe } else { Whole::No },
            said: String::new(),
            client: None,
        }
    }

    pub fn removes_itself(mut self, does: bool) -> Self {
        self.removes_itself = does;
        self
    }

    /// It runs, and goes on until somebody ends it.
    pub fn runs(&self) -> bool {
        self.state == State::Runs && self.script.lasts.is_none()
    }

    /// It runs, unless it has come to its own end.
    pub fn may_run(&self) -> bool {
        self.state == State::Runs
    }

    /// It may be gone at any time.
    pub fn removes_itself_soon(&self) -> bool {
        self.removes_itself && self.script.lasts.is_some()
    }

    pub fn is_gone(&self) -> bool {
        self.is_gone
    }

    pub fn volume(share: &Path) -> String {
        format!("{}:/v", share.display())
    }

    /// It is listed as it must be.
    pub fn is_listed_as(&mut self, look: Option<Look>) -> Result<()> {
        let name = &self.name;
        let Some(look) = look else {
            ensure!(
                self.removes_itself && (self.script.lasts.is_some() || self.state != State::Runs),
                "{name} is gone"
            );
            if self.state == State::Runs {
                self.ends(&[self.script.code], Whole::Yes);
            }
            self.is_gone = true;
            return Ok(());
        };
        match (&self.state, look.status.as_str(), look.code) {
            (State::Runs, "running", None) => {}
            (State::Runs, "exited", Some(code)) if self.script.lasts.is_some() => {
                ensure!(
                    code == self.script.code,
                    "{name} has ended with {code}, its script says {:?}",
                    self.script
                );
                self.ends(&[code], Whole::Yes);
            }
            (State::Ended(codes), "exited", Some(code)) if codes.contains(&code) => {
                self.state = State::Ended(vec![code]);
            }
            // It is about to be removed.
            (State::Ended(_), _, _) if self.removes_itself => {}
            (state, ..) => bail!("{name} is listed as {look:?} and should be {state:?}"),
        }
        Ok(())
    }

    /// From now on it has ended: by itself before that, or with one of these statuses.
    pub fn ends(&mut self, codes: &[i32], whole: Whole) {
        let mut codes = codes.to_vec();
        self.whole = whole;
        if self.script.lasts.is_some() && whole != Whole::Yes {
            codes.push(self.script.code);
            self.whole = Whole::Maybe;
        }
        self.state = State::Ended(codes);
    }

    /// Its output is what it must be, and nothing of what was there before is missing. Answers the number that comes next.
    pub fn read(&mut self, host: &Host) -> Result<Option<u64>> {
        let finished = host.bulkhead(["logs", &self.name])?;
        if finished.status != 0 && self.removes_itself {
            return Ok(None);
        }
        let finished = finished.ok()?;
        let text = finished.stdout();
        ensure!(text.starts_with(&self.said), "{} had said {:?}, and now\n{finished}", self.name, self.said);
        self.said = text;
        let whole = match &self.state {
            State::Runs => Whole::Maybe,
            State::Ended(_) => self.whole,
        };
        let next = output::check(&self.said, &self.first, whole)
            .with_context(|| format!("output of {}", self.name))?;
        if whole == Whole::Yes && *self.first.end() == 1 {
            finished.stderr_is("begun\n")?;
        }
        Ok(next)
    }

    /// It has said what it says at its beginning. Answers the number that comes next.
    pub fn has_begun(&mut self, host: &Host) -> Result<Option<u64>> {
        let mut next = None;
        host.eventually(&format!("{} to begin", self.name), PATIENCE, || {
            next = self.read(host)?;
            let is_copy = *self.first.end() > 1;
            Ok(next.is_some_and(|next| next > self.script.burst) || is_copy && self.script.lasts.is_some())
        })?;
        Ok(next)
    }

    /// It has been removed: its client has ended with it, and has had all that it said.
    pub fn was_removed(self) -> Result<()> {
        let Some(Client { running, is_killed }) = self.client else { return Ok(()) };
        let finished = running.wait()?;
        let text = finished.stdout();
        let (codes, whole) = match self.state {
            // By `rm -f`, of which the client's log says no more.
            State::Runs => (vec![137, self.script.code], Whole::Maybe),
            State::Ended(codes) => (codes, self.whole),
        };
        // Who was killed has had what came until then; all is in the log.
        let whole = if is_killed { Whole::Maybe } else { whole };
        if !is_killed {
            ensure!(codes.contains(&finished.status), "it should end with one of {codes:?}\n{finished}");
        }
        output::check(&text, &self.first, whole).with_context(|| format!("{finished}"))?;
        ensure!(!is_killed || text.starts_with(&self.said) || self.said.starts_with(&text), "{finished}");
        ensure!(is_killed || text.starts_with(&self.said), "the log had {:?}\n{finished}", self.said);
        Ok(())
    }

    fn inspected(&self, host: &Host) -> Result<Option<Value>> {
        let finished = host.bulkhead(["inspect", &self.name])?;
        if finished.status != 0 && self.script.lasts.is_some() && self.removes_itself {
            return Ok(None);
        }
        Ok(Some(serde_json::from_str::<Value>(&finished.ok()?.stdout())?[0].clone()))
    }
}

pub fn kill_pid(pid: i64) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process id")?;
    match kill_process(pid, Signal::KILL) {
        // It was at its end.
        Err(rustix::io::Errno::SRCH) => Ok(()),
        other => Ok(other?),
    }
}

/// The processes that a process has started, with the names of their programs.
pub fn children(of: i64) -> Vec<(i64, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((head, tail)) = stat.rsplit_once(") ") else { continue };
        let Some((pid, name)) = head.split_once(" (") else { continue };
        let mut fields = tail.split(' ');
        let state = fields.next();
        if let (Some(parent), Ok(pid)) = (fields.next(), pid.parse())
            && parent == of.to_string()
            && state != Some("Z")
        {
            found.push((pid, name.to_owned()));
        }
    }
    found
}

impl Soak<'_> {
    pub fn start(&mut self) -> Result<bool> {
        if self.is_full() {
            return Ok(false);
        }
        let name = self.new_name("c");
        let script = Script::random(&mut self.rng);
        let mut container = Container::copy(name.clone(), &script, 1..=1);
        container.whole = Whole::No;
        let mut words = vec!["run".to_owned(), "--name".to_owned(), name.clone()];
        words.extend(self.rng.choice(SHAPES).into_iter().copied().flatten().map(|&word| word.to_owned()));
        if self.rng.u8(0..3) == 0 {
            let share = self.new_share()?;
            words.extend(["-v".to_owned(), Container::volume(&share)]);
            container.share = Some(share);
        }
        if self.rng.u8(0..6) == 0 && !self.network_is_used() {
            words.push(self.network.flag(0));
            container.network = true;
        }
        container.removes_itself = self.rng.u8(0..5) == 0;
        if container.removes_itself {
            words.push("--rm".into());
        }
        let is_attached = self.rng.u8(0..3) == 0;
        if !is_attached {
            words.push("-d".into());
        }
        words.extend(["busybox", "sh", "-c", &script.line()].map(str::to_owned));
        self.tell(format!("{} for {:?}", words.join(" "), script.lasts));
        let program = self.host.bulkhead_program(words);
        if is_attached {
            let running = program.spawn()?;
            running.wait_for("1\n", PATIENCE)?;
            container.client = Some(Client { running, is_killed: false });
        } else {
            program.run()?.ok()?;
        }
        self.made += 1;
        self.containers.push(container);
        Ok(true)
    }

    /// One that is asked to end says its last line, and ends with its own status. `-t 0` gives it no time for that.
    pub fn stop(&mut self) -> Result<bool> {
        let Some(at) = self.one(Container::may_run) else { return Ok(false) };
        let host = self.host;
        let at_once = self.rng.bool();
        let container = &mut self.containers[at];
        let code = container.script.code;
        let stopped = if at_once {
            container.ends(&[code, 137], Whole::Maybe);
            host.bulkhead(["stop", "-t", "0", &container.name])?
        } else {
            container.has_begun(host)?;
            container.ends(&[code], Whole::Yes);
            host.bulkhead(["stop", "-t", "10", &container.name])?
        };
        let name = container.name.clone();
        if !(container.script.lasts.is_some() && container.removes_itself) {
            stopped.ok()?;
        }
        self.tell(format!("{name}{}", if at_once { ", at once" } else { "" }));
        self.has_ended(at)
    }

    pub fn kill(&mut self) -> Result<bool> {
        let Some(at) = self.one(Container::may_run) else { return Ok(false) };
        let host = self.host;
        let asks = self.rng.bool();
        let container = &mut self.containers[at];
        let signal = if asks {
            container.has_begun(host)?;
            "TERM"
        } else {
            "KILL"
        };
        let killed = host.bulkhead(["kill", "-s", signal, &container.name])?;
        if asks {
            container.ends(&[container.script.code], Whole::Yes);
        } else {
            container.ends(&[137], Whole::No);
        }
        if container.script.lasts.is_none() {
            killed.ok()?;
        }
        let name = container.name.clone();
        self.tell(format!("{name}: {signal}"));
        self.has_ended(at)
    }

    /// Waits for the end that must come.
    pub fn has_ended(&mut self, at: usize) -> Result<bool> {
        let host = self.host;
        let container = &mut self.containers[at];
        let name = container.name.clone();
        if container.removes_itself {
            host.eventually(&format!("{name} to be removed"), PATIENCE, || {
                Ok(!self.listed()?.contains_key(&name))
            })?;
            self.containers.remove(at).was_removed()?;
            return Ok(true);
        }
        let code = host.bulkhead(["wait", &name])?.ok()?.stdout().trim().parse::<i32>()?;
        container.is_listed_as(Some(Look { status: "exited".into(), code: Some(code) }))?;
        container.read(host)?;
        Ok(true)
    }

    /// Kills one of the processes of a container, which is named by what `inspect` tells.
    fn loses(&mut self, at: usize, process: impl Fn(&Value) -> Option<i64>) -> Result<bool> {
        let host = self.host;
        let container = &mut self.containers[at];
        // What has come so far stays, whoever is killed.
        container.read(host)?;
        let Some(pid) = container.inspected(host)?.and_then(|value| process(&value)).filter(|&pid| pid > 0)
        else {
            return Ok(false);
        };
        kill_pid(pid)?;
        container.ends(&[137], Whole::No);
        let name = container.name.clone();
        self.tell(format!("{name}: process {pid}"));
        Ok(true)
    }

    pub fn monitor_is_killed(&mut self) -> Result<bool> {
        let Some(at) = self.one(Container::may_run) else { return Ok(false) };
        Ok(self.loses(at, |value| value["monitor_pid"].as_i64())? && self.has_ended(at)?)
    }

    /// It is found to have ended by whoever looks next, who removes it if it was to remove itself.
    pub fn supervisor_is_killed(&mut self) -> Result<bool> {
        let Some(at) = self.one(Container::may_run) else { return Ok(false) };
        if !self.loses(at, |value| value["supervisor_pid"].as_i64())? {
            return Ok(false);
        }
        let container = &mut self.containers[at];
        if let Some(client) = &mut container.client {
            client.is_killed = true;
        }
        self.has_ended(at)
    }

    pub fn file_server_is_killed(&mut self) -> Result<bool> {
        let Some(at) = self.one(|container| container.may_run() && container.share.is_some()) else {
            return Ok(false);
        };
        let server = |value: &Value| {
            let children = children(value["supervisor_pid"].as_i64()?);
            Some(children.iter().find(|(_, name)| name != "bulkhead-vmm")?.0)
        };
        Ok(self.loses(at, server)? && self.has_ended(at)?)
    }

    /// The container goes on without the command that it was attached to.
    pub fn client_is_killed(&mut self) -> Result<bool> {
        let Some(at) = self.one(|container| container.runs() && container.client.is_some()) else {
            return Ok(false);
        };
        let container = &mut self.containers[at];
        let Some(client) = &mut container.client else { return Ok(false) };
        client.running.signal(Signal::KILL)?;
        client.is_killed = true;
        self.host.bulkhead(["exec", &container.name, "echo", "well"])?.ok()?.stdout_is("well\n")?;
        Ok(true)
    }

    /// For one that comes to its end, or has.
    pub fn wait(&mut self) -> Result<bool> {
        let Some(at) = self.one(|container| !container.runs() && !container.removes_itself) else {
            return Ok(false);
        };
        self.has_ended(at)
    }

    pub fn remove(&mut self) -> Result<bool> {
        let ended = |container: &Container| !container.may_run() && !container.removes_itself;
        let Some(at) = self.one(ended) else { return Ok(false) };
        let mut container = self.containers.remove(at);
        container.read(self.host)?;
        self.host.bulkhead(["rm", &container.name])?.ok()?.stdout_is(&format!("{}\n", container.name))?;
        container.was_removed()?;
        Ok(true)
    }

    pub fn remove_by_force(&mut self) -> Result<bool> {
        let Some(at) = self.one(|_| true) else { return Ok(false) };
        let mut container = self.containers.remove(at);
        container.read(self.host)?;
        self.tell(container.name.clone());
        self.host.bulkhead(["rm", "-f", &container.name])?.ok()?;
        self.host.bulkhead(["inspect", &container.name])?.failed()?.stderr_has("no such container")?;
        container.was_removed()?;
        std::thread::sleep(Duration::from_millis(self.rng.u64(0..20)));
        Ok(true)
    }
}
