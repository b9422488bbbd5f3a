//! Where console output goes: hvc0 and the serial port share it, so that an early panic is seen in the same place as
//! everything later. Keeps the latest output, copies all of it to file or stdout, and watches for a kernel panic.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use crate::config::Output;
use crate::error::{Error, Result};
use crate::sync::lock;

/// What the kernel prints first when it panics.
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// A sink for guest output, shared by the console devices and the report.
#[derive(Debug, Clone)]
pub struct ConsoleOutput(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    ring: VecDeque<u8>,
    capacity: usize,
    total: u64,
    /// Bytes of [`PANIC`] matched so far.
    matched: usize,
    panicked: bool,
}

impl ConsoleOutput {
    /// Keeps the latest `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        // Grown on demand: most guests print little.
        let ring = VecDeque::new();
        Self(Arc::new(Mutex::new(Inner { ring, capacity, total: 0, matched: 0, panicked: false })))
    }

    /// Notes what the guest printed.
    pub fn record(&self, bytes: &[u8]) {
        let mut inner = lock(&self.0);
        inner.total = inner.total.saturating_add(bytes.len() as u64);
        inner.watch(bytes);
        let kept = bytes.get(bytes.len().saturating_sub(inner.capacity)..).unwrap_or_default();
        let excess = (inner.ring.len() + kept.len()).saturating_sub(inner.capacity);
        inner.ring.drain(..excess);
        inner.ring.extend(kept);
    }

    /// The latest output, at most `limit` bytes of it.
    pub fn tail(&self, limit: usize) -> String {
        let inner = lock(&self.0);
        let skip = inner.ring.len().saturating_sub(limit);
        let bytes: Vec<u8> = inner.ring.iter().skip(skip).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Number of bytes printed since the start.
    pub fn total(&self) -> u64 {
        lock(&self.0).total
    }

    /// Whether a kernel panic was printed.
    pub fn panicked(&self) -> bool {
        lock(&self.0).panicked
    }
}

impl Inner {
    /// Looks for [`PANIC`], also when it comes a byte at a time. The pattern's first byte occurs in it once only, so that
    /// a mismatch need not look back further than itself.
    fn watch(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if PANIC.get(self.matched) == Some(byte) {
                self.matched += 1;
            } else {
                self.matched = usize::from(PANIC.first() == Some(byte));
            }
            if self.matched == PANIC.len() {
                self.panicked = true;
                self.matched = 0;
            }
        }
    }
}

/// One device's way out: the shared ring and its own file, if it has one.
#[derive(Debug)]
pub struct Outlet {
    shared: ConsoleOutput,
    file: Option<File>,
    /// Set when the file failed; said once.
    failed: bool,
}

impl Outlet {
    /// Opens `output`.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn open(shared: &ConsoleOutput, output: &Output) -> Result<Self> {
        let file = match output {
            Output::None => None,
            Output::Stdout => {
                let fd = io::stdout().as_fd().try_clone_to_owned();
                Some(File::from(fd.map_err(Error::os("use standard output"))?))
            }
            Output::File(path) => {
                let opened = OpenOptions::new().create(true).append(true).open(path);
                let path = path.clone();
                Some(opened.map_err(|source| Error::Input { what: "console output", path, source })?)
            }
        };
        Ok(Self { shared: shared.clone(), file, failed: false })
    }
}

impl Write for Outlet {
    /// Never fails: a full disk on the host is no reason to stop the guest.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.shared.record(bytes);
        if let Some(file) = &mut self.file
            && let Err(error) = file.write_all(bytes)
            && !std::mem::replace(&mut self.failed, true)
        {
            eprintln!("bulkhead-vmm: console output is lost: {error}");
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_ring_keeps_the_latest(chunks in proptest::collection::vec(proptest::collection::vec(b'a'..=b'z', 0..40), 0..20), capacity in 0_usize..60) {
            let output = ConsoleOutput::new(capacity);
            let mut all: Vec<u8> = Vec::new();
            for chunk in &chunks {
                output.record(chunk);
                all.extend(chunk);
            }
            prop_assert_eq!(output.total(), all.len() as u64);
            let expected = String::from_utf8(all.split_off(all.len().saturating_sub(capacity))).unwrap();
            prop_assert_eq!(output.tail(usize::MAX), expected);

        }

        #[test]
        fn a_panic_is_seen_however_it_is_cut(before in "[K er]{0,20}", cut in 1_usize..26) {
            let output = ConsoleOutput::new(10);
            output.record(before.as_bytes());
            prop_assert!(!output.panicked());
            output.record(&PANIC[..cut]);
            prop_assert_eq!(output.panicked(), cut == PANIC.len());
            output.record(&PANIC[cut..]);
            prop_assert!(output.panicked());
        }
    }
}
