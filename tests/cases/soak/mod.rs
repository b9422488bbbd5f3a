//! Sandboxes by the hundred with random verbs, beside a model that knows what each must be and have said.
//!
//! What a step does is decided by a seed, which the message of a failure names. `BULKHEAD_SOAK_SEED` and
//! `BULKHEAD_SOAK_SANDBOXES` choose others than the usual. The same seed chooses the same things as long as
//! they come out the same, but not to the microsecond: a race may need some tries.

mod bundle;
mod container;
mod copies;
mod once;
mod output;
mod pools;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;
use serde_json::Value;

use self::bundle::Slot;
use self::container::{Container, Look};
use self::copies::Saved;
use crate::BUSYBOX;
use crate::network::{Prepared, prepare};

/// Living and ended sandboxes at once; a fork may have it be a few more.
const MOST: usize = 6;
const PATIENCE: Duration = Duration::from_secs(20);
/// So many of the last steps are told when one fails.
const TOLD: usize = 30;
/// What a sandbox may cost the host for ever, in KiB: less than any process, file or machine that stayed would.
const GROWTH: u64 = 8;

test!(a_few_sandboxes, BUSYBOX.deadline(300));
fn a_few_sandboxes(host: &Host) -> Result<()> {
    soak(host, 16, 8)
}

test!(
    a_thousand_sandboxes,
    BUSYBOX.deadline(14_400).shows_output().pending("the same as a_few_sandboxes, for half an hour")
);
fn a_thousand_sandboxes(host: &Host) -> Result<()> {
    soak(host, 1000, 50)
}

/// A number out of the environment.
fn set(name: &str, usual: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is {text:?}: give it a number")),
        Err(_) => Ok(usual),
    }
}

/// One thing to do. It answers false when there is nothing to do it to.
type Action<'h> = fn(&mut Soak<'h>) -> Result<bool>;

/// The sandboxes there are, as they must be.
struct Soak<'h> {
    host: &'h Host,
    rng: fastrand::Rng,
    containers: Vec<Container>,
    slots: Vec<Slot>,
    saved: Vec<Saved>,
    network: Prepared<'h>,
    has_pool: bool,
    /// Sandboxes made so far.
    made: usize,
    /// For names that come once.
    names: usize,
    /// How often each thing was done, and how long it took in all.
    counts: BTreeMap<&'static str, (u32, Duration)>,
    story: VecDeque<String>,
}

fn soak(host: &Host, sandboxes: u64, round: usize) -> Result<()> {
    let seed = set("BULKHEAD_SOAK_SEED", 6)?;
    let sandboxes = usize::try_from(set("BULKHEAD_SOAK_SANDBOXES", sandboxes)?)?;
    println!("seed {seed}, {sandboxes} sandboxes");
    let mut soak = Soak {
        host,
        rng: fastrand::Rng::with_seed(seed),
        containers: Vec::new(),
        slots: (0..2).map(|number| Slot::new(host, number)).collect::<Result<_>>()?,
        saved: Vec::new(),
        network: prepare(host, 1500)?,
        has_pool: false,
        made: 0,
        names: 0,
        counts: BTreeMap::new(),
        story: VecDeque::new(),
    };
    let before = host.look();
    let start = Instant::now();
    let mut first = None;
    let mut steps = 0;
    while soak.made < sandboxes {
        let end = (soak.made + round).min(sandboxes);
        while soak.made < end {
            steps += 1;
            soak.step().with_context(|| soak.told(seed, steps))?;
        }
        soak.clear()
            .and_then(|()| host.is_as(&before, "all was removed", PATIENCE))
            .with_context(|| soak.told(seed, steps))?;
        let memory = memory(host)?;
        println!("{:5} sandboxes, {:7.1} s: {memory:?}", soak.made, start.elapsed().as_secs_f64());
        first.get_or_insert((soak.made, memory));
    }
    println!("{steps} steps:");
    for (name, (count, time)) in &soak.counts {
        println!("{count:6} {name}, {:.3} s each", time.as_secs_f64() / f64::from(*count));
    }
    ensure!(
        soak.counts.len() > Soak::ACTIONS.len() || sandboxes < 200,
        "not all was done: {:?}",
        soak.counts
    );
    let (count, at_first) = first.context("no round")?;
    let lost = at_first.left.saturating_sub(memory(host)?.left);
    let allowed = GROWTH * u64::try_from(soak.made - count)? + 4096;
    ensure!(lost < allowed, "{lost} KiB of memory did not come back, and {allowed} would be much");
    for word in ["BUG", "WARNING:", "Oops", "Out of memory"] {
        host.run(["dmesg"])?.ok()?.stdout_lacks(word)?;
    }
    Ok(())
}

/// What the host has left, in KiB, and what else it might have gone to.
#[derive(Debug, Clone, Copy)]
struct Memory {
    /// What a program could have, and what templates take, which are kept on purpose.
    left: u64,
    #[expect(dead_code, reason = "printed")]
    templates: u64,
    #[expect(dead_code, reason = "printed")]
    slab: u64,
}

fn memory(host: &Host) -> Result<Memory> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = |name: &str| -> Result<u64> {
        let line = text.lines().find(|line| line.starts_with(name)).with_context(|| format!("no {name}"))?;
        Ok(line.split_whitespace().nth(1).context("no number")?.parse()?)
    };
    // Free pages that a processor keeps for its next use count as used.
    let zones = fs::read_to_string("/proc/zoneinfo")?;
    let counts = zones.lines().filter_map(|line| line.trim().strip_prefix("count:"));
    let pages = counts.map(|count| Ok(count.trim().parse::<u64>()?)).sum::<Result<u64>>()?;
    let size = host.run(["du", "-sk", "/var/lib/bulkhead/templates"])?.ok()?.stdout();
    let templates: u64 = size.split_whitespace().next().context("no size")?.parse()?;
    Ok(Memory { left: kib("MemAvailable:")? + pages * 4 + templates, templates, slab: kib("Slab:")? })
}

impl<'h> Soak<'h> {
    /// How often each is chosen, beside the others.
    const ACTIONS: [(u32, &'static str, Action<'h>); 32] = [
        (14, "run, attached", Self::once),
        (4, "run, its command killed", Self::start_is_killed),
        (4, "run, one of its processes killed", Self::start_loses_a_process),
        (20, "run in the background", Self::start),
        (6, "exec", Self::exec),
        (4, "several execs at once", Self::execs_at_once),
        (4, "exec, its command killed", Self::exec_is_killed),
        (4, "cp", Self::copy),
        (4, "share", Self::share),
        (2, "stats and top", Self::figures),
        (2, "what cannot be", Self::refused),
        (5, "stop", Self::stop),
        (5, "kill", Self::kill),
        (3, "monitor killed", Self::monitor_is_killed),
        (3, "supervisor killed", Self::supervisor_is_killed),
        (3, "file server killed", Self::file_server_is_killed),
        (3, "client killed", Self::client_is_killed),
        (6, "wait", Self::wait),
        (5, "rm", Self::remove),
        (10, "rm -f", Self::remove_by_force),
        (4, "snapshot", Self::snapshot),
        (4, "restore", Self::restore),
        (6, "fork", Self::fork),
        (2, "pool warm", Self::warm),
        (2, "pool rm", Self::cool),
        (2, "pool's process killed", Self::pool_loses_a_process),
        (8, "oci: run or create", Self::oci_begin),
        (6, "oci: run, attached", Self::oci_once),
        (8, "oci: next verb", Self::oci_next),
        (2, "oci: checkpoint and restore", Self::oci_checkpoint),
        (2, "oci: monitor killed", Self::oci_monitor_is_killed),
        (3, "time goes by", Self::rest),
    ];

    /// Does one thing, and sees whether all is as it should be.
    fn step(&mut self) -> Result<()> {
        let sum: u32 = Self::ACTIONS.iter().map(|(weight, ..)| weight).sum();
        loop {
            let mut number = self.rng.u32(0..sum);
            let chosen = Self::ACTIONS.iter().find(|(weight, ..)| match number.checked_sub(*weight) {
                Some(rest) => {
                    number = rest;
                    false
                }
                None => true,
            });
            let (_, name, action) = *chosen.context("no action")?;
            self.tell(name.to_owned());
            let start = Instant::now();
            if action(self).context(name)? {
                let (count, time) = self.counts.entry(name).or_default();
                *count += 1;
                *time += start.elapsed();
                break;
            }
            self.story.pop_back();
        }
        // Looking costs as much as doing.
        if self.rng.u8(0..4) > 0 {
            return Ok(());
        }
        let start = Instant::now();
        self.check()?;
        let (count, time) = self.counts.entry("look at all").or_default();
        *count += 1;
        *time += start.elapsed();
        Ok(())
    }

    /// Remembers for the message of a failure.
    fn tell(&mut self, what: String) {
        if self.story.len() == TOLD {
            self.story.pop_front();
        }
        self.story.push_back(what);
    }

    fn told(&self, seed: u64, steps: usize) -> String {
        let story: Vec<_> = self.story.iter().map(String::as_str).collect();
        format!("seed {seed}, step {steps}, sandbox {}, after\n  {}\n", self.made, story.join("\n  "))
    }

    /// A name that no other has had.
    fn new_name(&mut self, kind: &str) -> String {
        self.names += 1;
        format!("{kind}-{}", self.names)
    }

    fn new_share(&mut self) -> Result<PathBuf> {
        let share = self.host.work().join(self.new_name("share"));
        fs::create_dir(&share)?;
        fs::write(share.join("given"), "of the host\n")?;
        Ok(share)
    }

    /// One of the containers that are so.
    fn one(&mut self, is: impl Fn(&Container) -> bool) -> Option<usize> {
        let fitting: Vec<_> = (0..self.containers.len()).filter(|&at| is(&self.containers[at])).collect();
        self.rng.choice(fitting)
    }

    fn is_full(&self) -> bool {
        let bundles = self.slots.iter().filter(|slot| slot.is_used()).count();
        self.containers.len() + bundles >= MOST
    }

    /// Whether somebody is in the one network namespace.
    fn network_is_used(&self) -> bool {
        self.containers.iter().any(|container| container.network && container.may_run())
    }

    /// Some time, in which containers speak and those with an end of their own come to it.
    fn rest(&mut self) -> Result<bool> {
        std::thread::sleep(Duration::from_millis(self.rng.u64(1..2000)));
        Ok(true)
    }

    /// What `ps -a` tells.
    fn listed(&self) -> Result<BTreeMap<String, Look>> {
        let text = self.host.bulkhead(["ps", "-a", "--format", "json"])?.ok()?.stdout();
        let rows: Vec<Value> = serde_json::from_str(&text)?;
        rows.iter()
            .map(|row| Ok((row["name"].as_str().context("no name")?.to_owned(), Look::of(row)?)))
            .collect()
    }

    /// All are listed as they are, nobody else is, and one has said what it should have.
    fn check(&mut self) -> Result<()> {
        let mut listed = self.listed()?;
        for container in &mut self.containers {
            container.is_listed_as(listed.remove(&container.name))?;
        }
        ensure!(listed.is_empty(), "nobody made these: {listed:?}");
        // Those that remove themselves are known no longer.
        while let Some(at) = self.containers.iter().position(Container::is_gone) {
            self.containers.remove(at).was_removed()?;
        }
        if let Some(at) = self.one(|_| true) {
            let host = self.host;
            self.containers[at].read(host)?;
        }
        let at = self.rng.usize(..self.slots.len());
        self.slots[at].check()
    }

    /// Ends and removes all, after a last look at what each has said.
    fn clear(&mut self) -> Result<()> {
        for container in &mut self.containers {
            container.read(self.host)?;
        }
        if !self.containers.is_empty() {
            let mut words = vec!["rm", "-f"];
            words.extend(self.containers.iter().map(|container| container.name.as_str()));
            self.host.bulkhead(words)?.ok()?;
        }
        for container in std::mem::take(&mut self.containers) {
            container.was_removed()?;
        }
        for slot in &mut self.slots {
            slot.clear()?;
        }
        self.end_pool()?;
        for saved in std::mem::take(&mut self.saved) {
            saved.remove()?;
        }
        for entry in fs::read_dir(self.host.work())? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("share")) {
                fs::remove_dir_all(path)?;
            }
        }
        ensure!(self.listed()?.is_empty());
        Ok(())
    }
}
