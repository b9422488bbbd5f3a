//! Containers of `bulkhead-oci`, as an engine has them.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::host::Host;
use serde_json::json;

use super::container::kill_pid;
use super::output::{self, Script, Whole};
use super::{PATIENCE, Soak};
use crate::oci::Bundle;

const RUNTIME: &str = "bulkhead-oci";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Created,
    Running,
    Paused,
    Stopped,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

struct Inside {
    id: String,
    script: Script,
    state: State,
    first: std::ops::RangeInclusive<u64>,
    whole: Whole,
    said: String,
}

/// A bundle, and the container that is in it.
pub struct Slot {
    bundle: Bundle,
    inside: Option<Inside>,
}

impl Slot {
    pub fn new(host: &Host, number: usize) -> Result<Self> {
        let bundle = Bundle::named(host, RUNTIME, &number.to_string())?;
        bundle.change(|config| config["annotations"] = json!({"dev.bulkhead.memory": "128"}))?;
        Ok(Self { bundle, inside: None })
    }

    pub fn is_used(&self) -> bool {
        self.inside.is_some()
    }

    /// It is in its state, and has said what it should.
    pub fn check(&mut self) -> Result<()> {
        let Some(inside) = &mut self.inside else { return Ok(()) };
        let status = self.bundle.status(&inside.id)?;
        ensure!(status == inside.state.word(), "{} is {status}, and should be {:?}", inside.id, inside.state);
        self.read().map(drop)
    }

    /// The number that comes next in its output.
    fn read(&mut self) -> Result<Option<u64>> {
        let inside = self.inside.as_mut().context("nobody is inside")?;
        let text = fs::read_to_string(self.bundle.dir.join("out"))?;
        ensure!(text.starts_with(&inside.said), "{} had said {:?}, and now {text:?}", inside.id, inside.said);
        inside.said = text;
        let whole = if inside.state == State::Stopped { inside.whole } else { Whole::Maybe };
        output::check(&inside.said, &inside.first, whole).with_context(|| format!("output of {}", inside.id))
    }

    fn has_begun(&mut self, host: &Host) -> Result<Option<u64>> {
        let mut next = None;
        host.eventually("it to begin", PATIENCE, || {
            next = self.read()?;
            Ok(self.inside.as_ref().is_some_and(|inside| next.is_some_and(|next| next > inside.script.burst)))
        })?;
        Ok(next)
    }

    fn call(&self, verb: &str, more: &[&str]) -> Result<()> {
        let inside = self.inside.as_ref().context("nobody is inside")?;
        self.bundle.call(&[&[verb, &inside.id], more].concat())?.ok().map(drop)
    }

    fn ends(&mut self, host: &Host, whole: Whole) -> Result<()> {
        let inside = self.inside.as_mut().context("nobody is inside")?;
        (inside.state, inside.whole) = (State::Stopped, whole);
        let id = inside.id.clone();
        self.bundle.wait_for(host, &id, "stopped")?;
        self.read().map(drop)
    }

    pub fn clear(&mut self) -> Result<()> {
        let Some(inside) = self.inside.take() else { return Ok(()) };
        self.bundle.call(&["delete", "--force", &inside.id])?.ok()?;
        self.bundle.call(&["state", &inside.id])?.failed()?.stderr_has("does not exist").map(drop)
    }
}

impl Soak<'_> {
    fn slot(&mut self, is: impl Fn(&Slot) -> bool) -> Option<usize> {
        let fitting: Vec<_> = (0..self.slots.len()).filter(|&at| is(&self.slots[at])).collect();
        self.rng.choice(fitting)
    }

    fn slot_that_is(&mut self, state: State) -> Option<usize> {
        self.slot(|slot| slot.inside.as_ref().is_some_and(|inside| inside.state == state))
    }

    pub fn oci_begin(&mut self) -> Result<bool> {
        if self.is_full() {
            return Ok(false);
        }
        let Some(at) = self.slot(|slot| !slot.is_used()) else { return Ok(false) };
        let id = self.new_name("o");
        let script = Script { lasts: None, ..Script::random(&mut self.rng) };
        let creates = self.rng.bool();
        self.tell(format!("{id}, {script:?}"));
        let slot = &mut self.slots[at];
        slot.bundle.runs(&script.line())?;
        let (words, state) = if creates {
            (vec!["create", id.as_str()], State::Created)
        } else {
            (vec!["run", "-d", id.as_str()], State::Running)
        };
        slot.bundle.apart(&words)?;
        slot.inside = Some(Inside { id, script, state, first: 1..=1, whole: Whole::No, said: String::new() });
        self.made += 1;
        Ok(true)
    }

    pub fn oci_once(&mut self) -> Result<bool> {
        let Some(at) = self.slot(|slot| !slot.is_used()) else { return Ok(false) };
        let (bytes, code) = (self.bytes(50_000), self.rng.i32(0..=120));
        let id = self.new_name("o");
        let bundle = &self.slots[at].bundle;
        bundle.runs(&format!("echo err >&2; cat; exit {code}"))?;
        let finished = bundle.program(&["run", &id]).stdin(bytes.clone()).run()?.status_is(code)?;
        ensure!(finished.stdout == bytes, "{} bytes came, of {}", finished.stdout.len(), bytes.len());
        finished.stderr_is("err\n")?;
        bundle.call(&["state", &id])?.failed()?;
        self.made += 1;
        Ok(true)
    }

    /// Any verb that its state allows.
    pub fn oci_next(&mut self) -> Result<bool> {
        let Some(at) = self.slot(Slot::is_used) else { return Ok(false) };
        let number = self.rng.u8(0..6);
        let (count, code) = (self.rng.u64(1..2000), self.rng.i32(0..=120));
        let host = self.host;
        let slot = &mut self.slots[at];
        let inside = slot.inside.as_mut().context("nobody is inside")?;
        let id = inside.id.clone();
        let state = inside.state;
        match (state, number) {
            (State::Created, 0) | (State::Stopped, _) | (State::Paused, 0) => slot.clear_by(state)?,
            (State::Created, 1) => {
                slot.call("kill", &["KILL"])?;
                slot.ends(host, Whole::No)?;
            }
            (State::Created, _) => {
                inside.state = State::Running;
                slot.call("start", &[])?;
            }
            (State::Paused, _) => {
                inside.state = State::Running;
                slot.call("resume", &[])?;
            }
            (State::Running, 0) => {
                slot.has_begun(host)?;
                slot.call("kill", &["TERM"])?;
                slot.ends(host, Whole::Yes)?;
            }
            (State::Running, 1) => {
                slot.call("kill", &["KILL"])?;
                slot.ends(host, Whole::No)?;
            }
            (State::Running, 2) => {
                inside.state = State::Paused;
                slot.call("pause", &[])?;
            }
            (State::Running, 3) => slot.call("ps", &[])?,
            (State::Running, _) => {
                let line = format!("seq 1 {count}; exit {code}");
                let finished = slot.bundle.call(&["exec", &id, "sh", "-c", &line])?.status_is(code)?;
                ensure!(
                    output::check(&finished.stdout(), &(1..=1), Whole::Maybe)? == Some(count + 1),
                    "{finished}"
                );
            }
        }
        self.tell(format!("{id} was {state:?}: {number}"));
        Ok(true)
    }

    /// It ends with its checkpoint and goes on from there, or goes on at once.
    pub fn oci_checkpoint(&mut self) -> Result<bool> {
        let Some(at) = self.slot_that_is(State::Running) else { return Ok(false) };
        let image = self.host.work().join(self.new_name("checkpoint"));
        let path = image.display().to_string();
        let goes_on = self.rng.u8(0..3) == 0;
        let host = self.host;
        let slot = &mut self.slots[at];
        let Some(low) = slot.has_begun(host)? else { bail!("it says nothing") };
        let id = slot.inside.as_ref().context("nobody is inside")?.id.clone();
        if goes_on {
            slot.bundle.call(&["checkpoint", "--leave-running", "--image-path", &path, &id])?.ok()?;
        } else {
            slot.bundle.call(&["checkpoint", "--image-path", &path, &id])?.ok()?;
            slot.bundle.call(&["state", &id])?.failed()?.stderr_has("does not exist")?;
            let high = slot.read()?.context("it says nothing")?;
            slot.bundle.apart(&["restore", "-d", "--image-path", &path, &id])?;
            let inside = slot.inside.as_mut().context("nobody is inside")?;
            (inside.first, inside.said) = (low..=high, String::new());
            self.made += 1;
        }
        self.tell(format!("{id}{}", if goes_on { ", goes on" } else { "" }));
        Ok(fs::remove_dir_all(image).map(|()| true)?)
    }

    pub fn oci_monitor_is_killed(&mut self) -> Result<bool> {
        let Some(at) = self.slot_that_is(State::Running) else { return Ok(false) };
        let slot = &mut self.slots[at];
        slot.read()?;
        let id = slot.inside.as_ref().context("nobody is inside")?.id.clone();
        kill_pid(slot.bundle.state(&id)?["pid"].as_i64().context("no pid")?)?;
        slot.ends(self.host, Whole::No)?;
        self.tell(id);
        Ok(true)
    }
}

impl Slot {
    /// Removes it as its state allows.
    fn clear_by(&mut self, state: State) -> Result<()> {
        if state != State::Stopped {
            return self.clear();
        }
        self.read()?;
        self.call("delete", &[])?;
        self.inside = None;
        Ok(())
    }
}
