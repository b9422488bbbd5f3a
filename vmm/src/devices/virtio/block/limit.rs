//! How much a guest may have its disk do in a time.
//!
//! A bucket's whole state is the moment until which it is in debt: a request may begin while that is not more than [`BURST_NS`]
//! ahead, and moves it on by what it costs. So a request of any size gets its turn, what was not used is kept for a tenth
//! of a second, and no sum of roundings or long idleness gives more. (It is the *virtual scheduling algorithm* of ITU-T I.371.)

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use crate::config::LimitConfig;

/// What was not used is kept for so long.
const BURST_NS: u64 = 100_000_000;
const SECOND_NS: u128 = 1_000_000_000;

/// So much in a second.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    per_second: NonZeroU64,
    /// In nanoseconds of the clock.
    in_debt_until: u64,
}

impl Bucket {
    fn new(per_second: NonZeroU64) -> Self {
        Self { per_second, in_debt_until: 0 }
    }

    /// How long from `now` on until something may begin, in nanoseconds.
    fn wait(&self, now: u64) -> u64 {
        self.in_debt_until.saturating_sub(now.saturating_add(BURST_NS))
    }

    fn spend(&mut self, now: u64, amount: u64) {
        // Rounded up, so that many small ones are not free.
        let cost = (u128::from(amount) * SECOND_NS).div_ceil(u128::from(self.per_second.get()));
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        self.in_debt_until = self.in_debt_until.max(now).saturating_add(cost);
    }
}

/// The limits of one disk, and what tells when it may go on.
#[derive(Debug)]
pub struct Limit {
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
    timer: TimerFd,
}

impl Limit {
    /// One as it is configured, all of it unused.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(config: &LimitConfig) -> io::Result<Self> {
        Ok(Self {
            bytes: config.bytes_per_second.map(Bucket::new),
            requests: config.requests_per_second.map(Bucket::new),
            timer: TimerFd::new().map_err(io::Error::from)?,
        })
    }

    /// Becomes readable when something may begin that could not.
    pub fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Whether a request that moves so many bytes may begin at the time `now` (nanoseconds). If not, the descriptor tells when to
    /// ask again.
    pub fn admits(&mut self, now: u64, bytes: usize) -> bool {
        let buckets = [
            self.bytes.as_mut().map(|bucket| (bucket, bytes as u64)),
            self.requests.as_mut().map(|bucket| (bucket, 1)),
        ];
        let wait = buckets.iter().flatten().map(|(bucket, _)| bucket.wait(now)).max().unwrap_or(0);
        // A timer that cannot be set would leave the guest waiting for ever: rather without a limit.
        if wait > 0 && self.timer.reset(Duration::from_nanos(wait), None).is_ok() {
            return false;
        }
        for (bucket, amount) in buckets.into_iter().flatten() {
            bucket.spend(now, amount);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate() -> impl Strategy<Value = NonZeroU64> {
        prop_oneof![1..100_u64, 1_000..1_000_000_000_u64, Just(u64::MAX)]
            .prop_map(|rate| NonZeroU64::new(rate).unwrap())
    }

    proptest! {
        /// In no interval does more begin than the rate allows in it, what is kept, and the one that goes into debt.
        #[test]
        fn no_interval_has_more_than_its_share(
            rate in rate(),
            asked in proptest::collection::vec((0..50_000_000_u64, 0..5_000_000_u64), 1..300),
        ) {
            let mut bucket = Bucket::new(rate);
            let (mut now, mut begun) = (1 << 40, Vec::new());
            for (pause, amount) in asked {
                now += pause;
                if bucket.wait(now) == 0 {
                    bucket.spend(now, amount);
                    begun.push((now, amount));
                }
            }
            for (first, (start, _)) in begun.iter().enumerate() {
                let mut sum = 0_u128;
                for (at, amount) in &begun[first..] {
                    let allowed = u128::from(rate.get()) * u128::from(at - start + BURST_NS) / SECOND_NS;
                    // Before the last of them began.
                    prop_assert!(sum <= allowed + 1, "{sum} in {} ns, {allowed} are allowed", at - start);
                    sum += u128::from(*amount);
                }
            }
        }

        /// Who waits as long as was said may go, and nobody is told to wait longer than what was spent takes.
        #[test]
        fn a_wait_ends(rate in rate(), amounts in proptest::collection::vec(any::<u64>(), 1..20), now in any::<u64>()) {
            let mut bucket = Bucket::new(rate);
            let mut now = now / 2;
            for amount in amounts {
                let wait = bucket.wait(now);
                now = now.saturating_add(wait);
                prop_assert_eq!(bucket.wait(now), 0);
                bucket.spend(now, amount);
            }
        }

        /// A guest that always has something to do gets what it is allowed, less one request at most.
        #[test]
        fn nothing_is_lost(rate in 1_000..1_000_000_000_u64, amount in 1..1_000_000_u64) {
            let mut bucket = Bucket::new(NonZeroU64::new(rate).unwrap());
            let (start, mut now, mut sum) = (1 << 40, 1 << 40, 0_u128);
            for _ in 0..200 {
                now += bucket.wait(now);
                bucket.spend(now, amount);
                sum += u128::from(amount);
            }
            let allowed = u128::from(rate) * u128::from(now - start) / SECOND_NS;
            prop_assert!(sum + u128::from(amount) >= allowed, "{sum} of {allowed}");
        }
    }

    #[test]
    fn idleness_saves_no_more_than_a_burst() {
        let mut bucket = Bucket::new(NonZeroU64::new(1_000).unwrap());
        // An hour of nothing, then as much as can be had at once: a tenth of a second's, and one more.
        let now = 3_600_000_000_000;
        let count =
            std::iter::from_fn(|| (bucket.wait(now) == 0).then(|| bucket.spend(now, 1))).take(10_000).count();
        assert_eq!(count, 101);
    }
}
