//! What a container says, and how much of it must have come.

use std::ops::RangeInclusive;

use anyhow::{Result, ensure};

/// The last line of one that ends by itself or is asked to.
pub const LAST: &str = "last";

/// A container that says the numbers from 1 on.
#[derive(Debug, Clone)]
pub struct Script {
    /// So many at once.
    pub burst: u64,
    /// Status that it ends with.
    pub code: i32,
    /// It ends by itself, after so many seconds. Otherwise it goes on counting.
    pub lasts: Option<u64>,
}

impl Script {
    pub fn random(rng: &mut fastrand::Rng) -> Self {
        let burst = *rng.choice([1, 20, 200, 1500].iter()).unwrap_or(&1);
        let lasts = if rng.u8(0..4) == 0 { Some(rng.u64(0..15)) } else { None };
        Self { burst: rng.u64(1..=burst), code: rng.i32(0..=120), lasts }
    }

    /// As a shell's line. SIGTERM ends it in order at any time after its first line.
    pub fn line(&self) -> String {
        let Self { burst, code, lasts } = self;
        let body = match lasts {
            Some(seconds) => format!("sleep {seconds} & wait; trap '' TERM; echo {LAST}; exit {code}"),
            None => format!("i={burst}; while :; do i=$((i+1)); echo $i; sleep 0.5 & wait; done"),
        };
        format!("trap 'echo {LAST}; exit {code}' TERM; echo begun >&2; seq 1 {burst}; {body}")
    }
}

/// Whether a container's output has come to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whole {
    Yes,
    /// It was killed: its words end somewhere.
    No,
    Maybe,
}

/// The numbers come one after the other from one of `first` on, each once; a last line ends them, and there is one if it is whole.
/// Answers the number that would come next, if any has come.
pub fn check(text: &str, first: &RangeInclusive<u64>, whole: Whole) -> Result<Option<u64>> {
    let mut next: Option<u64> = None;
    let mut is_over = false;
    for line in text.split_inclusive('\n') {
        let shown = || {
            format!("{:?}", text.chars().rev().take(200).collect::<Vec<_>>().iter().rev().collect::<String>())
        };
        ensure!(!is_over, "{line:?} came after the last line: {}", shown());
        let Some(line) = line.strip_suffix('\n') else {
            ensure!(whole != Whole::Yes, "it ends in the middle of a line: {}", shown());
            let begins = |word: &str| word.starts_with(line);
            let number = next.map(|next| begins(&next.to_string()));
            ensure!(begins(LAST) || number.unwrap_or(true), "{line:?} where {next:?} should be: {}", shown());
            break;
        };
        if line == LAST {
            is_over = true;
            continue;
        }
        let number: u64 = line.parse().map_err(|_| anyhow::anyhow!("{line:?} is no number: {}", shown()))?;
        match next {
            Some(next) => ensure!(number == next, "{number} came where {next} should: {}", shown()),
            None => ensure!(first.contains(&number), "it begins with {number}, not one of {first:?}"),
        }
        next = Some(number + 1);
    }
    ensure!(
        is_over || whole != Whole::Yes,
        "the last line is missing: {} bytes, next is {next:?}",
        text.len()
    );
    ensure!(!is_over || whole != Whole::No, "there is a last line of one that was killed");
    Ok(next)
}
