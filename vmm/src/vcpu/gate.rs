//! What everybody else wants of the vCPU threads: run, stand still, or tell where they are. Threads look here only when
//! they were interrupted, so that a running guest pays nothing for it.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::sync::lock;

/// Longest wait for vCPU threads. A thread that runs its guest answers within microseconds.
const PATIENCE: Duration = Duration::from_millis(500);

/// Where a vCPU was when somebody asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// `running`, `halted` (waiting for an interrupt), `waiting` (not started by the guest), `paused` or `crashed`;
    /// `unknown` when the thread did not answer in time.
    pub state: String,
    /// Instruction pointer.
    pub rip: u64,
}

/// Something for each vCPU thread to do with its vCPU `V`, of which it is told the number.
pub type Errand<V> = Arc<dyn Fn(usize, &V) + Send + Sync>;

/// The meeting point of vCPU threads, each with a `V`, and the event loop.
pub struct Gate<V> {
    wishes: Mutex<Wishes<V>>,
    changed: Condvar,
}

struct Wishes<V> {
    paused: bool,
    /// Threads standing still.
    parked: usize,
    /// Raised whenever somebody wants samples.
    round: u64,
    /// Per vCPU: the round it answered last, and its answer.
    samples: Vec<(u64, Option<Sample>)>,
    errand: Option<Errand<V>>,
    /// Per vCPU: it has yet to run the errand.
    due: Vec<bool>,
}

impl<V> Gate<V> {
    /// A gate for `count` vCPUs.
    pub fn new(count: usize) -> Self {
        let wishes = Wishes {
            paused: false,
            parked: 0,
            round: 0,
            samples: vec![(0, None); count],
            errand: None,
            due: vec![false; count],
        };
        Self { wishes: Mutex::new(wishes), changed: Condvar::new() }
    }

    /// Called by vCPU `index` when it was interrupted: answers what is asked and returns when it may run. `sample` tells
    /// where it is, errands are run with `vcpu`.
    pub fn pass(&self, index: usize, vcpu: &V, sample: impl Fn() -> Sample) {
        let mut wishes = lock(&self.wishes);
        let mut parked = false;
        loop {
            let (round, paused) = (wishes.round, wishes.paused);
            if let Some(slot) = wishes.samples.get_mut(index)
                && slot.0 != round
            {
                let mut now = sample();
                if paused {
                    now.state = "paused".to_owned();
                }
                *slot = (round, Some(now));
                self.changed.notify_all();
            }
            if let Some(due) = wishes.due.get_mut(index)
                && std::mem::take(due)
                && let Some(errand) = wishes.errand.clone()
            {
                // In the lock: nobody else has anything to do here meanwhile.
                errand(index, vcpu);
                self.changed.notify_all();
            }
            if paused != parked {
                parked = paused;
                wishes.parked = if parked { wishes.parked + 1 } else { wishes.parked.saturating_sub(1) };
                self.changed.notify_all();
            }
            if !paused {
                return;
            }
            wishes = self.changed.wait(wishes).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Makes all vCPUs stand still; `kick` interrupts them. False when one did not within the time allowed.
    pub fn pause(&self, kick: impl Fn()) -> bool {
        lock(&self.wishes).paused = true;
        kick();
        self.wait_until(|wishes| wishes.parked == wishes.samples.len())
    }

    /// Lets them run again.
    pub fn resume(&self) {
        lock(&self.wishes).paused = false;
        self.changed.notify_all();
    }

    /// Whether they are made to stand still.
    pub fn paused(&self) -> bool {
        lock(&self.wishes).paused
    }

    /// Asks every vCPU where it is; `kick` interrupts them.
    pub fn samples(&self, kick: impl Fn()) -> Vec<Sample> {
        let round = {
            let mut wishes = lock(&self.wishes);
            wishes.round += 1;
            self.changed.notify_all();
            wishes.round
        };
        kick();
        self.wait_until(|wishes| wishes.samples.iter().all(|(answered, _)| *answered == round));
        let unknown = Sample { state: "unknown".to_owned(), rip: 0 };
        let wishes = lock(&self.wishes);
        wishes
            .samples
            .iter()
            .map(|(answered, sample)| match sample {
                Some(sample) if *answered == round => sample.clone(),
                _ => unknown.clone(),
            })
            .collect()
    }

    /// Lets every vCPU run `errand` once; `kick` interrupts them. False when one did not within the time allowed.
    pub fn send(&self, errand: Errand<V>, kick: impl Fn()) -> bool {
        {
            let mut wishes = lock(&self.wishes);
            wishes.errand = Some(errand);
            wishes.due.fill(true);
            self.changed.notify_all();
        }
        kick();
        let done = self.wait_until(|wishes| !wishes.due.contains(&true));
        let mut wishes = lock(&self.wishes);
        wishes.errand = None;
        wishes.due.fill(false);
        done
    }

    fn wait_until(&self, done: impl Fn(&Wishes<V>) -> bool) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let mut wishes = lock(&self.wishes);
        while !done(&wishes) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            wishes = self.changed.wait_timeout(wishes, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::thread;

    #[test]
    fn threads_stand_still_and_answer() {
        let gate: Gate<u64> = Gate::new(2);
        let (turns, end) = (AtomicU64::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            for index in 0..2 {
                let (gate, turns, end) = (&gate, &turns, &end);
                scope.spawn(move || {
                    while !end.load(Ordering::SeqCst) {
                        turns.fetch_add(1, Ordering::SeqCst);
                        gate.pass(index, &(index as u64 * 10), || Sample {
                            state: "running".to_owned(),
                            rip: index as u64,
                        });
                        thread::yield_now();
                    }
                });
            }
            let samples = gate.samples(|| {});
            assert_eq!(samples.iter().map(|sample| sample.rip).collect::<Vec<_>>(), [0, 1]);
            assert!(gate.pause(|| {}));
            let before = turns.load(Ordering::SeqCst);
            assert_eq!(gate.samples(|| {})[1], Sample { state: "paused".to_owned(), rip: 1 });
            assert_eq!(turns.load(Ordering::SeqCst), before);
            let seen = Arc::new(Mutex::new(Vec::new()));
            let errand = {
                let seen = Arc::clone(&seen);
                Arc::new(move |index: usize, vcpu: &u64| seen.lock().unwrap().push((index, *vcpu)))
            };
            assert!(gate.send(errand, || {}));
            seen.lock().unwrap().sort_unstable();
            assert_eq!(*seen.lock().unwrap(), [(0, 0), (1, 10)]);
            assert_eq!(turns.load(Ordering::SeqCst), before);
            gate.resume();
            while turns.load(Ordering::SeqCst) == before {
                thread::yield_now();
            }
            end.store(true, Ordering::SeqCst);
        });
    }
}
