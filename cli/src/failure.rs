//! How a command ends: an exit status, or an error with its whole cause chain on standard error.

use std::error::Error as _;

use bulkhead_runtime::Error;

/// What a command answers: the exit status of the program.
pub type Outcome = Result<u8, Failure>;

/// An error, with what was being done to whom.
#[derive(Debug)]
pub struct Failure {
    error: Error,
    /// Status that replaces the error's own.
    status: Option<u8>,
}

impl Failure {
    /// An error of another verb than run and exec: status 1, as with docker.
    pub fn plain(error: impl Into<Error>) -> Self {
        Self { error: error.into(), status: Some(1) }
    }

    /// The program's exit status.
    pub fn status(&self) -> u8 {
        self.status.unwrap_or_else(|| self.error.exit_status())
    }

    /// Prints the error and its causes, one line each where there are several.
    pub fn print(&self) {
        eprintln!("bulkhead: {}", self.error);
        let mut cause = self.error.source();
        while let Some(error) = cause {
            eprintln!("  because: {error}");
            cause = error.source();
        }
    }
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { error: error.into(), status: None }
    }
}

/// Does something to each of several containers; goes on after a failure and ends with status 1 then.
pub fn each(names: &[String], mut act: impl FnMut(&str) -> Result<(), Error>) -> Outcome {
    let mut status = 0;
    for name in names {
        if let Err(error) = act(name) {
            Failure::plain(error).print();
            status = 1;
        }
    }
    Ok(status)
}
