//! What of a snapshot is written while the guest runs: by a child process, or by a thread.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use serde::{Deserialize, Serialize};

use super::SavedDisk;
use crate::devices::virtio::block::backup::Backup;
use crate::devices::virtio::block::disk::Disk;
use crate::jail::{self, Kind};

/// What was written.
#[derive(Debug, Serialize, Deserialize)]
pub enum Copied {
    /// Memory and state.
    Memory {
        /// Of memory, without zeros.
        bytes: u64,
    },
    /// A disk.
    Disk(SavedDisk),
}

/// Somebody's work.
#[derive(Debug)]
pub struct Part {
    worker: Worker,
    /// Whoever works says here how it went.
    pipe: Option<File>,
    result: Option<Copied>,
}

#[derive(Debug)]
enum Worker {
    Nobody,
    Child(libc::pid_t),
    Thread { handle: Option<JoinHandle<()>>, give_up: Arc<AtomicBool>, disk: Arc<Disk> },
}

impl Part {
    /// Memory that is written already.
    pub fn done(bytes: u64) -> Self {
        Self { worker: Worker::Nobody, pipe: None, result: Some(Copied::Memory { bytes }) }
    }

    /// Writes memory in a child process, for which nothing changes any more, and which keeps the descriptors `own`.
    ///
    /// # Errors
    /// When no child can be had.
    pub fn fork(own: &[RawFd], write: impl FnOnce() -> io::Result<u64>) -> io::Result<Self> {
        let (reader, writer) = pipe()?;
        let confined = jail::is_confined();
        let mut keep: Vec<RawFd> = own.to_vec();
        keep.push(writer.as_raw_fd());
        keep.sort_unstable();
        // SAFETY: the child has this thread alone. It takes no lock that another may have held: it allocates, which glibc makes
        // possible after fork, reads guest memory and writes files. It ends by _exit.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                stay_out_of_the_way(&keep);
                let written = jail::confine_below(Kind::Memory, confined).and_then(|()| write());
                report(writer, written.map(|bytes| Copied::Memory { bytes }));
                // SAFETY: _exit has no preconditions.
                unsafe { libc::_exit(0) }
            }
            child => Ok(Self { worker: Worker::Child(child), pipe: Some(reader), result: None }),
        }
    }

    /// Copies a disk in a thread.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn copy(id: &str, disk: Arc<Disk>, backup: Arc<Backup>, durable: bool) -> io::Result<Self> {
        let (reader, writer) = pipe()?;
        let give_up = Arc::new(AtomicBool::new(false));
        let (asked, id) = (Arc::clone(&give_up), id.to_owned());
        let confined = jail::is_confined();
        let work = move || {
            if let Err(error) = jail::confine_below(Kind::Backup, confined) {
                return report(writer, Err(error));
            }
            let copied = backup.run(|| asked.load(Ordering::Relaxed)).and_then(|digest| {
                if durable {
                    backup.sync()?;
                }
                Ok(Copied::Disk(SavedDisk { id, digest: digest.value() }))
            });
            report(writer, copied);
        };
        let spawned = thread::Builder::new().name("backup".into()).spawn(work);
        if spawned.is_err() {
            disk.end_backup();
        }
        let worker = Worker::Thread { handle: Some(spawned?), give_up, disk };
        Ok(Self { worker, pipe: Some(reader), result: None })
    }

    /// Readable when it is done; none when its result was taken.
    pub fn fd(&self) -> Option<RawFd> {
        self.pipe.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Takes the result; waits for it if need be.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub fn collect(&mut self) -> Result<(), String> {
        let Some(mut pipe) = self.pipe.take() else { return Ok(()) };
        let mut text = Vec::new();
        let read = pipe.read_to_end(&mut text);
        self.stop();
        read.map_err(|error| error.to_string())?;
        let result = serde_json::from_slice::<Result<Copied, String>>(&text);
        let result = result.map_err(|_| "whoever wrote it was killed".to_owned())?;
        self.result = Some(result?);
        Ok(())
    }

    /// The result, if it was taken.
    pub fn into_result(mut self) -> Option<Copied> {
        self.result.take()
    }

    /// Ends the work, done or not.
    fn stop(&mut self) {
        match &mut self.worker {
            Worker::Nobody => {}
            Worker::Child(child) => {
                // SAFETY: takes integers; the child is ours and was not waited for. One that has ended does not mind.
                unsafe {
                    libc::kill(*child, libc::SIGKILL);
                    while libc::waitpid(*child, std::ptr::null_mut(), 0) < 0
                        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
                    {
                    }
                }
            }
            Worker::Thread { handle, give_up, disk } => {
                give_up.store(true, Ordering::Relaxed);
                disk.end_backup();
                if let Some(handle) = handle.take() {
                    let _ = handle.join();
                }
            }
        }
        self.worker = Worker::Nobody;
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The child ends when the monitor does, and holds nothing of the monitor's but guest memory and its own files: whoever waits for
/// the end of a connection must not wait for the child.
/// `keep` is in order.
fn stay_out_of_the_way(keep: &[RawFd]) {
    // SAFETY: integers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let close = |first: libc::c_uint, last: libc::c_uint| {
        if first <= last {
            // SAFETY: integers only. Descriptors that are closed here belong to objects that the child never touches again: it
            // ends by _exit, without destructors.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    };
    let mut first = 3;
    for fd in keep.iter().filter_map(|fd| libc::c_uint::try_from(*fd).ok()).filter(|fd| *fd >= 3) {
        close(first, fd.saturating_sub(1));
        first = fd.saturating_add(1);
    }
    close(first, libc::c_uint::MAX);
}

fn report(mut to: File, result: io::Result<Copied>) {
    let text = serde_json::to_vec(&result.map_err(|error| error.to_string())).unwrap_or_default();
    // Nobody listens to what was given up.
    let _ = to.write_all(&text);
}

fn pipe() -> io::Result<(File, File)> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were just opened and belong to nobody else.
    Ok(fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).map(File::from).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finish(mut part: Part) -> Result<Option<Copied>, String> {
        part.collect().map(|()| part.into_result())
    }

    #[test]
    fn a_child_sees_memory_as_it_was_and_says_how_it_went() {
        let mut value = Box::new(1_u64);
        let seen: *const u64 = &raw const *value;
        // SAFETY: the box is alive in parent and child.
        let part = Part::fork(&[], || Ok(unsafe { seen.read_volatile() })).unwrap();
        *value = 2;
        assert!(matches!(finish(part), Ok(Some(Copied::Memory { bytes: 1 }))));
        let failed = Part::fork(&[], || Err(io::Error::other("no room"))).unwrap();
        assert_eq!(finish(failed).unwrap_err(), "no room");
    }

    #[test]
    fn a_child_that_is_killed_or_given_up_is_not_waited_for() {
        let forever = || loop {
            thread::park();
        };
        let part = Part::fork(&[], forever).unwrap();
        let Worker::Child(child) = part.worker else { panic!("no child") };
        drop(part);
        // SAFETY: signal 0 only asks whether the process exists.
        assert_eq!(unsafe { libc::kill(child, 0) }, -1);
        let part = Part::fork(&[], forever).unwrap();
        let Worker::Child(child) = part.worker else { panic!("no child") };
        // SAFETY: our own child.
        unsafe { libc::kill(child, libc::SIGKILL) };
        assert!(finish(part).unwrap_err().contains("killed"));
    }
}
