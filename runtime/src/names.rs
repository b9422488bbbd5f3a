//! Container ids and the names that people read.

use crate::{Context, Error, Result};

const ADJECTIVES: [&str; 16] = [
    "amber",
    "brisk",
    "calm",
    "daring",
    "eager",
    "fair",
    "gentle",
    "hardy",
    "keen",
    "lively",
    "merry",
    "noble",
    "proud",
    "quiet",
    "steady",
    "watertight",
];
const NOUNS: [&str; 16] = [
    "anchor", "barque", "beacon", "bosun", "capstan", "clipper", "cutter", "davit", "frigate", "galley",
    "halyard", "keel", "lugger", "rudder", "schooner", "sextant",
];

/// A fresh id: 64 hexadecimal digits, as docker's.
///
/// # Errors
/// The kernel gives no random bytes.
pub fn new_id() -> Result<String> {
    let mut bytes = [0u8; 32];
    random(&mut bytes)?;
    Ok(hex(&bytes))
}

/// Fills `bytes` from the kernel's random number generator.
///
/// # Errors
/// The kernel has none to give. Their device need not be there: a container's cgroup may forbid to open it.
pub fn random(bytes: &mut [u8]) -> Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(filled) => rest = rest.get_mut(filled..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context(|| "cannot get random bytes from the kernel".into()),
        }
    }
    Ok(())
}

/// A name made from an id, for a container that was given none; `attempt` makes the next one unlike the last.
#[must_use]
pub fn generate(id: &str, attempt: usize) -> String {
    let digit = |at: usize| {
        id.as_bytes().get(at).map_or(0, |&byte| (byte as char).to_digit(16).unwrap_or(0) as usize)
    };
    let adjective = ADJECTIVES.get(digit(attempt) % ADJECTIVES.len()).copied().unwrap_or("calm");
    let noun = NOUNS.get(digit(attempt + 1) % NOUNS.len()).copied().unwrap_or("keel");
    if attempt == 0 { format!("{adjective}_{noun}") } else { format!("{adjective}_{noun}{attempt}") }
}

/// Checks a name as docker does: `[a-zA-Z0-9][a-zA-Z0-9_.-]+`.
///
/// # Errors
/// [`Error::Usage`] with the rule.
pub fn check(name: &str) -> Result<()> {
    let mut bytes = name.bytes();
    let good = bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
        && (2..=128).contains(&name.len());
    if good {
        Ok(())
    } else {
        Err(Error::Usage(format!(
            "{name:?} is not a container name: 2 to 128 letters, digits, `_`, `.` or `-`, a letter or digit first"
        )))
    }
}

/// The form of an id that people are shown.
#[must_use]
pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// Two digits for each byte.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_long_and_differ() {
        let (a, b) = (new_id().unwrap(), new_id().unwrap());
        assert_eq!(a.len(), 64);
        assert_ne!(a, b);
        assert!(check(&generate(&a, 0)).is_ok());
        assert_ne!(generate(&a, 0), generate(&a, 1));
    }

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for bad in ["", "a", "..", "../x", "a/b", "-x", ".hidden", "a b", "ä1", "x\0y"] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        for good in ["web", "web-1", "a.b_c"] {
            assert!(check(good).is_ok(), "{good:?}");
        }
    }
}
