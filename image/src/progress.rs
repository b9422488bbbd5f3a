//! How loading and pulling tell a person how far they are.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Receives progress. Several tasks may run at once, each from its own thread.
pub trait Progress: Sync {
    /// A task begins; `total` is its size in bytes where that is known beforehand.
    fn start(&self, what: &str, total: Option<u64>) -> Box<dyn Task>;

    /// One line for the person, such as a warning about something in an image.
    fn note(&self, line: &str);
}

/// One task under way. Dropping it without [`Task::finish`] means that it failed.
pub trait Task: Send {
    /// `bytes` more are done.
    fn inc(&self, bytes: u64);

    /// The task ended well; `outcome` is a word or two, such as `done` or `already here`.
    fn finish(self: Box<Self>, outcome: &str);
}

/// Says nothing at all.
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _what: &str, _total: Option<u64>) -> Box<dyn Task> {
        Box::new(Silent)
    }

    fn note(&self, _line: &str) {}
}

impl Task for Silent {
    fn inc(&self, _bytes: u64) {}

    fn finish(self: Box<Self>, _outcome: &str) {}
}

/// One plain line on stderr for each task that ends, for logs and pipes.
pub struct Lines;

struct Line {
    what: String,
}

impl Progress for Lines {
    fn start(&self, what: &str, _total: Option<u64>) -> Box<dyn Task> {
        Box::new(Line { what: what.to_owned() })
    }

    fn note(&self, line: &str) {
        say(line);
    }
}

impl Task for Line {
    fn inc(&self, _bytes: u64) {}

    fn finish(self: Box<Self>, outcome: &str) {
        say(&format!("{}: {outcome}", self.what));
    }
}

/// Progress must never end the work it reports on: a closed stderr is ignored.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A bar for each task, on a terminal.
pub struct Bars {
    bars: MultiProgress,
}

impl Bars {
    /// Draws on stderr.
    #[must_use]
    pub fn new() -> Self {
        Self { bars: MultiProgress::new() }
    }
}

impl Default for Bars {
    fn default() -> Self {
        Self::new()
    }
}

struct Bar {
    bar: ProgressBar,
}

impl Progress for Bars {
    fn start(&self, what: &str, total: Option<u64>) -> Box<dyn Task> {
        let (bar, template) = match total {
            Some(total) => {
                (ProgressBar::new(total), "{msg:<22} [{bar:30}] {bytes:>10}/{total_bytes:<10} {eta}")
            }
            None => (ProgressBar::new_spinner(), "{msg:<22} {spinner} {bytes:>10} {bytes_per_sec}"),
        };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.bars.add(bar.with_style(style.progress_chars("=> ")).with_message(what.to_owned()));
        bar.enable_steady_tick(Duration::from_millis(120));
        Box::new(Bar { bar })
    }

    fn note(&self, line: &str) {
        if self.bars.println(line).is_err() {
            say(line);
        }
    }
}

impl Task for Bar {
    fn inc(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn finish(self: Box<Self>, outcome: &str) {
        let message = format!("{}: {outcome}", self.bar.message());
        if let Ok(style) = ProgressStyle::with_template("{msg}") {
            self.bar.set_style(style);
        }
        self.bar.finish_with_message(message);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if !self.bar.is_finished() {
            self.bar.abandon();
        }
    }
}

/// Bars when stderr is a terminal, plain lines otherwise.
#[must_use]
pub fn for_stderr() -> Box<dyn Progress> {
    if std::io::stderr().is_terminal() { Box::new(Bars::new()) } else { Box::new(Lines) }
}
