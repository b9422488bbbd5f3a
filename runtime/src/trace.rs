//! A timeline of a start, step by step, in the form that trace viewers open (Chrome's trace events).
//!
//! `BULKHEAD_TRACE=FILE` switches it on; `BULKHEAD_TRACE=1` names a file for each start, `bulkhead-trace-PID.json` in the
//! directory for temporary files, which suits engines that start many. Times are of the monotonic clock, so the marks of `bulkhead`, of its
//! supervisor, of the monitor and of the guest's agent fall on one line.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::{env, fs};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

static TRACE: Mutex<Option<Trace>> = Mutex::new(None);

/// What was noted until now, which another process can go on with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Trace {
    /// As the variable has it.
    path: PathBuf,
    marks: Vec<(Cow<'static, str>, u64)>,
}

/// Begins to note marks if `BULKHEAD_TRACE` is set.
pub fn begin() {
    if let Some(path) = env::var_os("BULKHEAD_TRACE") {
        go_on_with(Some(Trace { path: path.into(), marks: Vec::new() }));
        mark("bulkhead started");
    }
}

/// What was noted until now. `None`: nothing is.
#[must_use]
pub fn so_far() -> Option<Trace> {
    TRACE.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Goes on with what another process has noted, or notes nothing.
pub fn go_on_with(trace: Option<Trace>) {
    *TRACE.lock().unwrap_or_else(PoisonError::into_inner) = trace;
}

/// Notes that `step` has just been done.
pub fn mark(step: &'static str) {
    if let Some(trace) = TRACE.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        trace.marks.push((step.into(), now_ns()));
    }
}

/// The monotonic clock, nanoseconds.
#[must_use]
pub fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Whether marks are noted.
pub fn enabled() -> bool {
    TRACE.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// Writes the timeline, with the monitor's among ours.
pub fn write(monitor: Option<&Value>) {
    let trace = TRACE.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(Trace { mut path, marks }) = trace else { return };
    if path.as_os_str() == "1" {
        path = env::temp_dir().join(format!("bulkhead-trace-{}.json", std::process::id()));
    }
    // What a machine that waited in a pool did before is no part of the start.
    let begun = marks.first().map_or(0, |&(_, ns)| ns);
    let ours = marks.into_iter().map(|(name, ns)| ("bulkhead", name.into_owned(), ns));
    let monitor = monitor.and_then(Value::as_array);
    let theirs = monitor.into_iter().flatten().filter_map(|mark| {
        Some(("monitor", mark.get("event")?.as_str()?.to_owned(), mark.get("ns")?.as_u64()?))
    });
    let mut all: Vec<_> = ours.chain(theirs.filter(|&(_, _, ns)| ns >= begun)).collect();
    all.sort_by_key(|&(_, _, ns)| ns);
    let first = all.first().map_or(0, |&(_, _, ns)| ns);
    let mut before = first;
    let events: Vec<_> = all
        .iter()
        .map(|(who, name, ns)| {
            // A step lasts from the mark before it, whoever made that one.
            let event = json!({
                "name": name, "cat": who, "ph": "X", "pid": 1, "tid": who,
                "ts": (before - first) as f64 / 1000.0, "dur": (ns - before) as f64 / 1000.0,
            });
            before = *ns;
            event
        })
        .collect();
    let _ = fs::write(path, json!({"traceEvents": events, "displayTimeUnit": "ms"}).to_string());
}
