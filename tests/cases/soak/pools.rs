//! Pools, which containers take machines from whether one knows it or not.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::container::kill_pid;
use super::{PATIENCE, Soak};

impl Soak<'_> {
    fn pools(&self) -> Result<Vec<Value>> {
        let text = self.host.bulkhead(["pool", "ls", "--format", "json"])?.ok()?.stdout();
        Ok(serde_json::from_str(&text)?)
    }

    pub fn warm(&mut self) -> Result<bool> {
        if self.has_pool {
            return Ok(false);
        }
        let count = self.rng.u8(1..=2).to_string();
        self.host.bulkhead(["pool", "warm", "--image", "busybox", "-n", &count])?.ok()?;
        self.has_pool = true;
        Ok(true)
    }

    pub fn cool(&mut self) -> Result<bool> {
        if !self.has_pool {
            return Ok(false);
        }
        self.end_pool()?;
        Ok(true)
    }

    pub fn end_pool(&mut self) -> Result<()> {
        if self.has_pool {
            self.host.bulkhead(["pool", "rm", "busybox"])?.ok()?;
            self.has_pool = false;
        }
        ensure!(self.pools()?.is_empty());
        Ok(())
    }

    /// A machine that waits is killed, and another made; or the process that keeps the pool, which ends it.
    pub fn pool_loses_a_process(&mut self) -> Result<bool> {
        let Some(pool) = self.pools()?.pop() else { return Ok(false) };
        let keeper = pool["pid"].as_i64().context("no keeper")?;
        if self.rng.u8(0..3) == 0 {
            self.tell(format!("keeper {keeper}"));
            kill_pid(keeper)?;
            self.host.eventually("the pool to end", PATIENCE, || Ok(self.pools()?.is_empty()))?;
            self.has_pool = false;
            return Ok(true);
        }
        let waiters = super::container::children(keeper);
        let Some((waiter, _)) = self.rng.choice(&waiters) else { return Ok(false) };
        let machines = super::container::children(*waiter);
        let machine = self.rng.choice(&machines).map(|(pid, _)| *pid);
        let victim = machine.filter(|_| self.rng.bool()).unwrap_or(*waiter);
        self.tell(format!("process {victim}"));
        kill_pid(victim)?;
        Ok(true)
    }
}
