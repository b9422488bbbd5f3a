//! One error type: a code the host can act on and words a person can. It crosses a process boundary (container set-up
//! runs in a forked child) and then the wire, so the chain of causes is kept as text.

pub use bulkhead_protocol::wire::Code;

/// What happened, to what, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// For the host's decisions.
    pub code: Code,
    /// For people; outermost cause first.
    pub message: String,
}

/// A result with the agent's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with a code and words.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The caller asked for something that makes no sense or is not supported.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// The caller named something that does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    /// The request is right, but not now.
    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, message)
    }

    /// Anything that is not the caller's fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::internal(errno.to_string())
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::internal(error.to_string())
    }
}

/// Says what was being done when something failed.
pub trait Context<T> {
    /// Puts `what` before the cause; the code of an [`Error`] is kept.
    ///
    /// # Errors
    /// The same failure, told better.
    fn context<S: AsRef<str>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for Result<T, E> {
    fn context<S: AsRef<str>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| {
            let Error { code, message } = error.into();
            Error { code, message: format!("{}: {message}", what().as_ref()) }
        })
    }
}

/// The result of a libc call that answers -1 and errno.
pub fn check(result: impl Into<i64>) -> std::io::Result<i64> {
    match result.into() {
        -1 => Err(std::io::Error::last_os_error()),
        value => Ok(value),
    }
}
