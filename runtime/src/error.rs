//! One error type: what happened, to what, and why.

use std::io;

use bulkhead_protocol::client::CallError;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong on the host's side of a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The person asked for something that cannot be.
    #[error("{0}")]
    Usage(String),
    /// A name or id that is not known.
    #[error("no such container: {0} (`bulkhead ps -a` lists them)")]
    NoSuchContainer(String),
    /// An id prefix that fits several containers.
    #[error("{0:?} is the beginning of several container ids: write more of it")]
    Ambiguous(String),
    /// A name that another container has.
    #[error(
        "the name {name:?} is in use by container {id}: remove it (`bulkhead rm {name}`) or choose another"
    )]
    NameInUse {
        /// The name.
        name: String,
        /// The container that has it, short form.
        id: String,
    },
    /// The verb does not fit the container's state.
    #[error("container {id} is {state}: {hint}")]
    WrongState {
        /// The container, short form.
        id: String,
        /// Its state.
        state: &'static str,
        /// What to do.
        hint: String,
    },
    /// The command cannot be started: exit status 126 or 127.
    #[error("{message}")]
    CannotStart {
        /// 126: found but not executable; 127: not found.
        status: u8,
        /// The agent's words.
        message: String,
    },
    /// The microVM ended or never came up.
    #[error("{0}")]
    Monitor(String),
    /// Given up because the person asked for it.
    #[error("interrupted")]
    Interrupted,
    /// A file or a system call.
    #[error("{what}")]
    Io {
        /// What was being done, to what.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The agent refused or broke a call.
    #[error("{what}")]
    Agent {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: CallError,
    },
    /// The image store.
    #[error(transparent)]
    Image(#[from] bulkhead_image::Error),
    /// A state file that does not parse, a spec that cannot be built.
    #[error("{what}")]
    Other {
        /// What was being done, to what.
        what: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// The exit status for this error, as docker has it: 125 for our own failures, 126 and 127 for a command that
    /// cannot be started.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::CannotStart { status, .. } => *status,
            Self::Interrupted => 130,
            _ => 125,
        }
    }

    /// The whole cause chain in one line.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

/// Adds what was being done to an error.
pub trait Context<T> {
    /// `what` is a phrase like `cannot read /path`.
    ///
    /// # Errors
    /// The same error, with its context.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: what(), source })
    }
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| Error::Io { what: what(), source: errno.into() })
    }
}

impl<T> Context<T> for Result<T, CallError> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Agent { what: what(), source })
    }
}

impl<T> Context<T> for serde_json::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Other { what: what(), source: source.into() })
    }
}
