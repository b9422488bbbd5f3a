//! Filters of system calls, which come compiled from the host.

use bulkhead_protocol::agent::Seccomp;
use libc::sock_filter;

use crate::error::{Context, Error, Result, check};

/// The kernel's limit, in instructions.
const MAX_PROGRAM: usize = 4096;

/// A program ready to be loaded.
#[derive(Clone, Debug)]
pub struct Filter {
    program: Vec<sock_filter>,
    flags: u32,
}

impl Filter {
    /// Takes a program. Whether it is a good one is the kernel's to say.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for what cannot be one.
    pub fn from_message(message: &Seccomp) -> Result<Self> {
        let (instructions, rest) = message.program.as_chunks::<8>();
        if instructions.is_empty() || instructions.len() > MAX_PROGRAM || !rest.is_empty() {
            let length = message.program.len();
            return Err(Error::invalid(format!("a seccomp filter of {length} bytes is no program")));
        }
        let instruction = |&[a, b, jt, jf, c, d, e, f]: &[u8; 8]| sock_filter {
            code: u16::from_le_bytes([a, b]),
            jt,
            jf,
            k: u32::from_le_bytes([c, d, e, f]),
        };
        Ok(Self { program: instructions.iter().map(instruction).collect(), flags: message.flags })
    }

    /// Puts the filter on this process.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn load(&self) -> Result<()> {
        let program =
            libc::sock_fprog { len: self.program.len() as u16, filter: self.program.as_ptr().cast_mut() };
        const SET_MODE_FILTER: u32 = 1;
        // SAFETY: `program` points to `len` instructions, which the kernel only reads and checks before use.
        check(unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, self.flags, &raw const program) })
            .context(|| "load the seccomp filter")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_a_program_is_refused() {
        let taken = |length: usize| Filter::from_message(&Seccomp { program: vec![6; length], flags: 0 });
        assert!(taken(0).is_err() && taken(7).is_err() && taken(8 * (MAX_PROGRAM + 1)).is_err());
        let filter = taken(16).unwrap();
        assert_eq!((filter.program.len(), filter.program[1].code), (2, 0x0606));
    }
}
