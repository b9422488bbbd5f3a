//! Snapshots, what is restored from them, and forks.

use std::fs;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::container::Container;
use super::output::Script;
use super::{MOST, Soak};

/// Snapshots at once: each has a machine's memory.
const SNAPSHOTS: usize = 2;

/// A snapshot.
pub struct Saved {
    directory: PathBuf,
    script: Script,
    first: RangeInclusive<u64>,
    share: Option<PathBuf>,
    network: bool,
}

impl Saved {
    pub fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.directory).with_context(|| self.directory.display().to_string())
    }
}

impl Soak<'_> {
    /// Does something that makes copies of a container. Answers the numbers that a copy may begin with: none that had come to the
    /// host before, and none after that which came next when all was done.
    fn copied(
        &mut self,
        at: usize,
        make: impl FnOnce(&str) -> Result<bool>,
    ) -> Result<Option<RangeInclusive<u64>>> {
        let host = self.host;
        let container = &mut self.containers[at];
        let Some(low) = container.has_begun(host)? else { return Ok(None) };
        if !make(&container.name)? {
            // It came to its own end before.
            ensure!(!container.runs(), "{} is not copied", container.name);
            return Ok(None);
        }
        let high = container.read(host)?.context("it says nothing")?;
        Ok(Some(low.max(2)..=high))
    }

    pub fn snapshot(&mut self) -> Result<bool> {
        if self.saved.len() >= SNAPSHOTS {
            let at = self.rng.usize(..self.saved.len());
            self.saved.remove(at).remove()?;
        }
        let Some(at) = self.one(|container| container.may_run() && !container.removes_itself_soon()) else {
            return Ok(false);
        };
        let directory = self.host.work().join(self.new_name("snapshot"));
        let path = directory.display().to_string();
        let host = self.host;
        let first = self.copied(at, |name| Ok(host.bulkhead(["snapshot", name, &path])?.status == 0))?;
        let Some(first) = first else { return Ok(false) };
        let container = &self.containers[at];
        let (share, network) = (container.share.clone(), container.network);
        let (name, script) = (container.name.clone(), container.script.clone());
        self.tell(format!("{name} to {path}, {first:?}"));
        self.saved.push(Saved { directory, script, first, share, network });
        Ok(true)
    }

    pub fn restore(&mut self) -> Result<bool> {
        if self.is_full() || self.saved.is_empty() {
            return Ok(false);
        }
        let at = self.rng.usize(..self.saved.len());
        if self.saved[at].network && self.network_is_used() {
            return Ok(false);
        }
        let name = self.new_name("r");
        let saved = &self.saved[at];
        let path = saved.directory.display().to_string();
        let mut copy = Container::copy(name.clone(), &saved.script, saved.first.clone());
        copy.share.clone_from(&saved.share);
        copy.network = saved.network;
        self.tell(format!("{name} of {path}"));
        self.host.bulkhead(["restore", "-d", "--name", &name, &path])?.ok()?;
        self.made += 1;
        self.containers.push(copy);
        Ok(true)
    }

    pub fn fork(&mut self) -> Result<bool> {
        if self.is_full() {
            return Ok(false);
        }
        let fits = |container: &Container| {
            container.may_run() && !container.network && !container.removes_itself_soon()
        };
        let Some(at) = self.one(fits) else { return Ok(false) };
        let count = self.rng.usize(1..=3);
        let name = self.new_name("f");
        let removes = self.rng.u8(0..4) == 0;
        let mut words = vec!["fork".to_owned(), "-n".to_owned(), count.to_string()];
        words.extend(["--name".to_owned(), name.clone()]);
        if removes {
            words.push("--rm".into());
        }
        let host = self.host;
        let first = self.copied(at, |of| Ok(host.bulkhead_program(words).args([of]).run()?.status == 0))?;
        let Some(first) = first else { return Ok(false) };
        self.tell(format!("{} to {name}, {count} times, {first:?}", self.containers[at].name));
        for number in 1..=count {
            let name = if count == 1 { name.clone() } else { format!("{name}-{number}") };
            let of = &self.containers[at];
            let mut copy = Container::copy(name, &of.script, first.clone()).removes_itself(removes);
            copy.share.clone_from(&of.share);
            self.made += 1;
            self.containers.push(copy);
        }
        ensure!(self.containers.len() <= MOST + 3);
        Ok(true)
    }
}
