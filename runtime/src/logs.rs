//! What a container wrote, kept on disk: each line with its time and stream.
//!
//! The format is that of the container runtime interface, which Kubernetes' tools read:
//! `2026-01-31T08:15:30.123456789Z stdout F the line`, with `P` in the place of `F` for a piece of a longer line.
//! A guest can write for ever, so a log is two files of a bounded size, the older of which is dropped.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::state::now_ns;
use crate::{Context, Result};

/// Which of a process's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Size at which a file is set aside and a new one begun, in bytes. Two files are kept.
pub const ROTATE_AT: u64 = 32 << 20;
/// Longest piece of a line in one entry, in bytes.
const MAX_PIECE: usize = 16 << 10;

/// Writes the log. Errors of the disk end the log, never the container.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: Option<File>,
    written: u64,
    rotate_at: u64,
}

fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

impl Writer {
    /// Begins an empty log.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        let file = create(path).context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file: Some(file), written: 0, rotate_at: ROTATE_AT })
    }

    /// Appends bytes of one stream, cut into lines.
    pub fn write(&mut self, stream: Stream, bytes: &[u8]) {
        let Some(file) = &mut self.file else { return };
        let time = rfc3339(now_ns());
        let mut entries = Vec::with_capacity(bytes.len() + 64);
        for line in bytes.split_inclusive(|&byte| byte == b'\n') {
            let (line, whole) = line.strip_suffix(b"\n").map_or((line, false), |line| (line, true));
            let pieces = line.len().div_ceil(MAX_PIECE).max(1);
            for at in 0..pieces {
                let piece =
                    line.get(at * MAX_PIECE..((at + 1) * MAX_PIECE).min(line.len())).unwrap_or_default();
                let tag = if whole && at + 1 == pieces { "F" } else { "P" };
                entries.extend_from_slice(format!("{time} {} {tag} ", stream.name()).as_bytes());
                entries.extend_from_slice(piece);
                entries.push(b'\n');
            }
        }
        if file.write_all(&entries).is_err() {
            self.file = None;
            return;
        }
        self.written += entries.len() as u64;
        if self.written >= self.rotate_at {
            self.written = 0;
            self.file = fs::rename(&self.path, older(&self.path)).and_then(|()| create(&self.path)).ok();
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(path)
}

/// What to show of a log.
#[derive(Clone, Debug, Default)]
pub struct Show {
    /// Only this many of the last lines.
    pub tail: Option<usize>,
    /// Put the time before each line.
    pub timestamps: bool,
    /// Leave out entries before this time, nanoseconds since the epoch.
    pub since_ns: u64,
}

/// Reads a log to `out` and `err`; with `more`, waits for what is yet to come until `more` says no.
///
/// # Errors
/// The log cannot be read, or the outputs cannot be written.
pub fn show(
    path: &Path,
    show: &Show,
    out: &mut dyn Write,
    err: &mut dyn Write,
    mut more: impl FnMut() -> bool,
) -> Result<()> {
    let what = || format!("cannot read {}", path.display());
    let since = rfc3339(show.since_ns);
    let mut lines = Vec::new();
    let mut reader = None;
    for file in [older(path), path.to_owned()] {
        match File::open(&file) {
            Ok(file) => {
                let mut opened = BufReader::new(file);
                read_entries(&mut opened, &mut lines).context(what)?;
                reader = Some(opened);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context(what),
        }
    }
    let first = show.tail.map_or(0, |count| start_of_tail(&lines, count));
    let mut print =
        |entry: &[u8]| -> io::Result<()> { print_entry(entry, show.timestamps, &since, out, err) };
    let output = || "cannot write the log out".to_owned();
    for entry in lines.get(first..).unwrap_or_default() {
        print(entry).context(output)?;
    }
    let Some(mut reader) = reader else { return Ok(()) };
    loop {
        // Asked before the last read: what was written before the end is still shown.
        let goes_on = more();
        let mut fresh = Vec::new();
        read_entries(&mut reader, &mut fresh).context(what)?;
        for entry in &fresh {
            print(entry).context(output)?;
        }
        let here = reader.get_ref().metadata().context(what)?.ino();
        if let Ok(current) = File::open(path)
            && current.metadata().is_ok_and(|metadata| metadata.ino() != here)
        {
            reader = BufReader::new(current);
        } else if !goes_on {
            return Ok(());
        }
    }
}

/// Whole entries only; what follows the last newline is left for the next time.
fn read_entries(reader: &mut BufReader<File>, entries: &mut Vec<Vec<u8>>) -> io::Result<()> {
    loop {
        let mut entry = Vec::new();
        let length = reader.read_until(b'\n', &mut entry)?;
        if entry.last() != Some(&b'\n') {
            return reader.seek_relative(-i64::try_from(length).unwrap_or(0));
        }
        entries.push(entry);
    }
}

/// Where the last `count` lines begin, pieces of one line counting once.
fn start_of_tail(entries: &[Vec<u8>], count: usize) -> usize {
    let mut seen = 0;
    for (at, entry) in entries.iter().enumerate().rev() {
        let ends_a_line = entry.splitn(4, |&b| b == b' ').nth(2) == Some(b"F");
        if ends_a_line || at + 1 == entries.len() {
            if seen == count {
                return at + 1;
            }
            seen += 1;
        }
    }
    0
}

fn print_entry(
    entry: &[u8],
    timestamps: bool,
    since: &str,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<()> {
    let mut fields = entry.splitn(4, |&byte| byte == b' ');
    let (Some(time), Some(stream), Some(tag), Some(text)) =
        (fields.next(), fields.next(), fields.next(), fields.next())
    else {
        return Ok(());
    };
    if time < since.as_bytes() {
        return Ok(());
    }
    let text = if tag == b"P" { text.strip_suffix(b"\n").unwrap_or(text) } else { text };
    let target: &mut dyn Write = if stream == b"stderr" { err } else { out };
    if timestamps {
        target.write_all(time)?;
        target.write_all(b" ")?;
    }
    target.write_all(text)?;
    target.flush()
}

/// A time as RFC 3339 has it, in UTC with nanoseconds. Sorts as text.
#[must_use]
pub fn rfc3339(ns: u64) -> String {
    let (seconds, nanos) = (ns / 1_000_000_000, ns % 1_000_000_000);
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant's days-to-civil, for days since 1970-01-01 and never negative.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let (day, month) =
        (day_of_year - (153 * shifted + 2) / 5 + 1, if shifted < 10 { shifted + 3 } else { shifted - 9 });
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(path: &Path, what: &Show) -> (Vec<u8>, Vec<u8>) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        show(path, what, &mut out, &mut err, || false).unwrap();
        (out, err)
    }

    proptest! {
        #[test]
        fn what_was_written_is_shown_byte_for_byte(pieces in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..40)), 0..20)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("log");
            let mut writer = Writer::create(&path).unwrap();
            let (mut out, mut err) = (Vec::new(), Vec::new());
            for (to_err, bytes) in &pieces {
                writer.write(if *to_err { Stream::Stderr } else { Stream::Stdout }, bytes);
                if *to_err { err.extend(bytes) } else { out.extend(bytes) }
            }
            prop_assert_eq!(shown(&path, &Show::default()), (out, err));
        }
    }

    #[test]
    fn a_log_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut writer = Writer::create(&path).unwrap();
        writer.rotate_at = 1000;
        for number in 0..500 {
            writer.write(Stream::Stdout, format!("line {number}\n").as_bytes());
        }
        let size: u64 = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert!(size < 2200, "{size}");
        let (out, _) = shown(&path, &Show::default());
        assert!(out.ends_with(b"line 499\n"));
    }

    #[test]
    fn tail_counts_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut writer = Writer::create(&path).unwrap();
        writer.write(Stream::Stdout, b"a\nb\nlo");
        writer.write(Stream::Stdout, b"ng\nd\n");
        let tail = |count| shown(&path, &Show { tail: Some(count), ..Show::default() }).0;
        assert_eq!(tail(0), b"");
        assert_eq!(tail(1), b"d\n");
        assert_eq!(tail(2), b"long\nd\n");
        assert_eq!(tail(9), b"a\nb\nlong\nd\n");
    }

    #[test]
    fn times() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(rfc3339(951_782_400_000_000_001), "2000-02-29T00:00:00.000000001Z");
        assert_eq!(rfc3339(1_795_392_000_000_000_000), "2026-11-23T00:00:00.000000000Z");
    }
}
