//! The table as filters of the kernel, and who gets which.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::program::{self, Program, Test, Verdict};
use super::refused;
use super::table::{self, Entry, TABLE, When};

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The event loop.
    Main,
    /// A vCPU.
    Vcpu,
    /// Copies a disk into a snapshot.
    Backup,
    /// The forked child that writes memory into a snapshot.
    Memory,
    /// Waits beside an exchange with a vhost-user backend.
    Watch,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Main, Self::Vcpu, Self::Backup, Self::Memory, Self::Watch];

    fn bit(self) -> u8 {
        match self {
            Self::Main => table::MAIN,
            Self::Vcpu => table::VCPU,
            Self::Backup => table::BACKUP,
            Self::Memory => table::MEMORY,
            Self::Watch => table::WATCH,
        }
    }

    fn entries(self) -> impl Iterator<Item = &'static Entry> {
        TABLE.iter().filter(move |entry| entry.threads & self.bit() != 0)
    }
}

/// Whether threads are given filters at all.
static IN_FORCE: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Whether this thread has one, by which a vhost-user exchange knows whether those that it starts need theirs.
    static CONFINED: Cell<bool> = const { Cell::new(false) };
}

/// From now on every thread that asks is given its filter, and what it refuses is reported.
///
/// # Errors
/// When the kernel has no filters.
pub fn begin() -> io::Result<()> {
    let trap = program::TRAP;
    // SAFETY: asks whether an action is known, and reads its number.
    let known =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const trap) };
    if known != 0 {
        return Err(io::Error::last_os_error());
    }
    refused::report_to_log()?;
    IN_FORCE.store(true, Ordering::Relaxed);
    Ok(())
}

/// Leaves the calling thread, and those that it starts, nothing but what threads of this kind may do. Nothing happens where filters are
/// not in force.
///
/// # Errors
/// When the kernel refuses.
pub fn confine(kind: Kind) -> io::Result<()> {
    static PROGRAMS: [OnceLock<Program>; Kind::ALL.len()] = [const { OnceLock::new() }; Kind::ALL.len()];
    if !IN_FORCE.load(Ordering::Relaxed) {
        return Ok(());
    }
    let slot = Kind::ALL.iter().position(|other| *other == kind).and_then(|index| PROGRAMS.get(index));
    let slot = slot.ok_or(io::ErrorKind::NotFound)?;
    slot.get_or_init(|| compile(kind)).apply()?;
    CONFINED.set(true);
    Ok(())
}

/// As [`confine`] for a thread whose parent is confined; one of a program that is not (a test) stays as it is.
///
/// # Errors
/// When the kernel refuses.
pub fn confine_below(kind: Kind, parent_is_confined: bool) -> io::Result<()> {
    if parent_is_confined { confine(kind) } else { Ok(()) }
}

/// Whether the calling thread has a filter.
pub fn is_confined() -> bool {
    CONFINED.get()
}

/// Number of system calls that threads of this kind may make.
pub fn count(kind: Kind) -> usize {
    kind.entries().map(|entry| entry.call).collect::<std::collections::BTreeSet<_>>().len()
}

fn compile(kind: Kind) -> Program {
    let mut verdicts: BTreeMap<u32, Verdict> = BTreeMap::new();
    for entry in kind.entries() {
        let verdict = verdicts.entry(entry.call.id().unsigned_abs()).or_default();
        match entry.when {
            When::Always => verdict.always = Some(program::ALLOW),
            // The arguments of clone3 are in memory, which no filter sees.
            When::Unknown => verdict.always = Some(program::NO_SUCH_CALL),
            When::Is(argument, values) => {
                verdict.tests.extend(values.iter().map(|value| Test::Low { argument, value: *value }));
            }
            When::Without(argument, bits) => verdict.tests.push(Test::Without { argument, bits }),
            When::Exactly(argument, value) => verdict.tests.push(Test::Whole { argument, value }),
        }
    }
    Program::new(&verdicts)
}
