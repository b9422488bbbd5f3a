//! Where messages go: standard error for a person, `--log FILE` for an engine, as logrus writes them.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::Arc;

use bulkhead_runtime::logs::rfc3339;
use bulkhead_runtime::settings::Level;
use bulkhead_runtime::state::now_ns;
use bulkhead_runtime::{Context, Result};

use crate::args::{Global, LogFormat};

/// The log of this call.
#[derive(Clone, Debug)]
pub struct Log {
    file: Option<Arc<File>>,
    format: LogFormat,
    level: Level,
}

impl Log {
    /// Opens the log that was asked for.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn open(global: &Global) -> Result<Self> {
        let open = |path: &std::path::PathBuf| {
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .context(|| format!("cannot open the log {}", path.display()))
        };
        let file = global.log.as_ref().map(open).transpose()?.map(Arc::new);
        let level = if global.debug { Level::Debug } else { Level::default() };
        Ok(Self { file, format: global.log_format, level })
    }

    /// Writes what the settings say, or more if the command line asks for it.
    pub fn at(mut self, level: Level) -> Self {
        if self.level != Level::Debug {
            self.level = level;
        }
        self
    }

    /// What ended the call. Also to standard error: engines show whichever they read.
    pub fn error(&self, message: &str) {
        self.line("error", message);
        eprintln!("bulkhead-oci: {message}");
    }

    /// What was not done as asked.
    pub fn warn(&self, message: &str) {
        if self.level < Level::Warning {
            return;
        }
        self.line("warning", message);
        if self.file.is_none() {
            eprintln!("bulkhead-oci: warning: {message}");
        }
    }

    /// What is done.
    pub fn debug(&self, message: &str) {
        if self.level >= Level::Debug {
            self.line("debug", message);
            if self.file.is_none() {
                eprintln!("bulkhead-oci: {message}");
            }
        }
    }

    fn line(&self, level: &str, message: &str) {
        let Some(mut file) = self.file.as_deref() else { return };
        let time = rfc3339(now_ns());
        let line = match self.format {
            LogFormat::Json => {
                serde_json::json!({"level": level, "msg": message, "time": time}).to_string() + "\n"
            }
            LogFormat::Text => format!("time={time:?} level={level} msg={message:?}\n"),
        };
        // One write, so that the lines of two callers do not mix. There is nobody to tell of a failure.
        let _ = file.write_all(line.as_bytes());
    }
}
