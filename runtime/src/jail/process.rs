//! Starts a program in namespaces of its own: of those of users and pids a process becomes a member only by being born in them, for
//! which the standard library has no way.

use std::env;
use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::ptr;

use rustix::process::{Pid, Signal, WaitOptions, pidfd_send_signal, waitpid};

use crate::clone::clone3;

/// Namespaces that a program is born in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// It is the first process of its pids.
    pub pid: bool,
    /// It is root in a namespace of users that has nobody but the caller.
    pub user: bool,
}

/// What the child does before it becomes the program. It has this process's memory and descriptors and nothing else: it makes system
/// calls on what was prepared before, takes no lock and allocates nothing. Standard error is the program's already.
pub type Prepare<'a> = &'a dyn Fn() -> io::Result<()>;

/// A program to be started.
pub struct Spawn<'a> {
    /// Its path.
    pub program: &'a Path,
    /// Its arguments, without its name.
    pub arguments: Vec<OsString>,
    /// Standard input, output and error.
    pub streams: [BorrowedFd<'a>; 3],
    /// Descriptors that it inherits under their own numbers, above those.
    pub inherited: Vec<RawFd>,
    /// What it is born in. Where the host does not allow that, it is born without.
    pub namespaces: Namespaces,
    /// What it does itself before.
    pub prepare: Option<Prepare<'a>>,
}

/// A child process.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
    ended: Option<ExitStatus>,
}

/// What the child needs, made before it is there: it may allocate nothing.
struct Prepared<'a> {
    program: CString,
    arguments: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    streams: [RawFd; 3],
    inherited: &'a [RawFd],
    prepare: Option<Prepare<'a>>,
    /// Files of the user namespace, and what is written into them.
    maps: Vec<(CString, Vec<u8>)>,
    /// Where it says why it could not become the program.
    failed: RawFd,
}

impl Spawn<'_> {
    /// Starts it, with this process's environment, `/` as working directory and no signal blocked.
    ///
    /// # Errors
    /// The program cannot be executed.
    pub fn start(&self) -> io::Result<Process> {
        let strings = |all: Vec<OsString>| -> io::Result<Vec<CString>> {
            all.into_iter().map(|one| CString::new(one.as_bytes()).map_err(io::Error::other)).collect()
        };
        let mut arguments = vec![self.program.as_os_str().to_owned()];
        arguments.extend(self.arguments.iter().cloned());
        let arguments = strings(arguments)?;
        let environment = strings(
            env::vars_os()
                .map(|(mut name, value)| {
                    name.push("=");
                    name.push(value);
                    name
                })
                .collect(),
        )?;
        let pointers = |all: &[CString]| all.iter().map(|one| one.as_ptr()).chain([ptr::null()]).collect();
        // Above the standard streams, so that putting one in its place does not take another's.
        let above = |fd: &BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, 3);
        let streams = [above(&self.streams[0])?, above(&self.streams[1])?, above(&self.streams[2])?];
        let (failure, failed) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let mut prepared = Prepared {
            program: CString::new(self.program.as_os_str().as_bytes()).map_err(io::Error::other)?,
            arguments: pointers(&arguments),
            environment: pointers(&environment),
            streams: [streams[0].as_raw_fd(), streams[1].as_raw_fd(), streams[2].as_raw_fd()],
            inherited: &self.inherited,
            prepare: self.prepare,
            maps: Vec::new(),
            failed: failed.as_raw_fd(),
        };
        let process = match self.born(&mut prepared, self.namespaces) {
            Err(_) if self.namespaces != Namespaces::default() => {
                self.born(&mut prepared, Namespaces::default())
            }
            born => born,
        };
        let mut process = process?;
        drop(failed);
        let mut errno = [0; 4];
        match rustix::io::retry_on_intr(|| rustix::io::read(&failure, &mut errno))? {
            4 => {
                let _ = process.wait();
                Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
            }
            _ => Ok(process),
        }
    }

    fn born(&self, prepared: &mut Prepared<'_>, namespaces: Namespaces) -> io::Result<Process> {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let map = |path: &str, text: String| Ok::<_, io::Error>((CString::new(path)?, text.into_bytes()));
        prepared.maps = if namespaces.user {
            vec![
                map("/proc/self/setgroups", "deny".into())?,
                map("/proc/self/uid_map", format!("0 {uid} 1"))?,
                map("/proc/self/gid_map", format!("0 {gid} 1"))?,
            ]
        } else {
            Vec::new()
        };
        let mut pidfd: libc::c_int = -1;
        let flag = |wanted, flag: libc::c_int| if wanted { flag } else { 0 };
        let flags = flag(namespaces.pid, libc::CLONE_NEWPID) | flag(namespaces.user, libc::CLONE_NEWUSER);
        // SAFETY: the child is alone, whatever other threads held here: `become_program` makes system calls on what was prepared
        // before.
        let pid = unsafe { clone3(flags, libc::SIGCHLD, Some(&mut pidfd)) };
        match pid {
            Err(error) => Err(error),
            Ok(0) => prepared.become_program(),
            Ok(pid) => {
                // SAFETY: the kernel has made it for us.
                let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
                Ok(Process { pid: u32::try_from(pid).map_err(io::Error::other)?, pidfd, ended: None })
            }
        }
    }
}

impl Prepared<'_> {
    /// In the child, which has nothing but its descriptors and this.
    fn become_program(&self) -> ! {
        let error = self.try_to_become();
        let errno = error.raw_os_error().unwrap_or(libc::EINVAL).to_ne_bytes();
        // SAFETY: four bytes that are there; _exit has no preconditions.
        unsafe {
            libc::write(self.failed, errno.as_ptr().cast(), errno.len());
            libc::_exit(127)
        }
    }

    fn try_to_become(&self) -> io::Error {
        for (path, text) in &self.maps {
            // SAFETY: a C string, and as many bytes as are there.
            let written = unsafe {
                let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                fd >= 0 && libc::write(fd, text.as_ptr().cast(), text.len()) == text.len().cast_signed()
            };
            if !written {
                return io::Error::last_os_error();
            }
        }
        for (fd, number) in self.streams.iter().zip(0..) {
            // SAFETY: plain numbers.
            if unsafe { libc::dup2(*fd, number) } < 0 {
                return io::Error::last_os_error();
            }
        }
        for fd in self.inherited {
            // SAFETY: F_SETFD takes flags and touches no memory.
            if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } < 0 {
                return io::Error::last_os_error();
            }
        }
        if let Some(Err(error)) = self.prepare.map(|prepare| prepare()) {
            return error;
        }
        // SAFETY: an empty set of signals, C strings, and lists of them that end with null.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            libc::chdir(c"/".as_ptr());
            libc::execve(self.program.as_ptr(), self.arguments.as_ptr(), self.environment.as_ptr());
        }
        io::Error::last_os_error()
    }
}

impl Process {
    /// Its process id here.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.pid
    }

    /// Kills it. One that has ended does not mind.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Somebody else has waited for it.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let pid = Pid::from_raw(self.pid.cast_signed());
        let waited = rustix::io::retry_on_intr(|| waitpid(pid, WaitOptions::empty()))?;
        let (_, status) = waited.ok_or(io::ErrorKind::NotFound)?;
        let status = ExitStatus::from_raw(status.as_raw());
        self.ended = Some(status);
        Ok(status)
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn run(namespaces: Namespaces, script: &str) -> (ExitStatus, String) {
        let dir = tempfile::tempdir().unwrap();
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let output = File::create(dir.path().join("output")).unwrap();
        let spawn = Spawn {
            program: Path::new("/bin/sh"),
            arguments: vec!["-c".into(), script.into()],
            streams: [null.as_fd(), output.as_fd(), null.as_fd()],
            inherited: Vec::new(),
            namespaces,
            prepare: None,
        };
        let mut process = spawn.start().unwrap();
        let status = process.wait().unwrap();
        assert_eq!(process.wait().unwrap(), status);
        (status, fs::read_to_string(dir.path().join("output")).unwrap())
    }

    #[test]
    fn a_program_has_its_streams_its_environment_and_its_status() {
        let (status, output) = run(Namespaces::default(), "echo $PWD $PATH; exit 3");
        assert_eq!(status.code(), Some(3));
        assert_eq!(output, format!("/ {}\n", env::var("PATH").unwrap()));
        let (status, _) = run(Namespaces::default(), "kill -9 $$");
        assert_eq!(status.signal(), Some(9));
    }

    #[test]
    fn it_is_the_first_of_its_pids_where_the_host_allows_it() {
        let may = run(Namespaces { pid: true, user: false }, "echo $$").1;
        let root = rustix::process::geteuid().is_root();
        if !root || may.trim() != "1" {
            eprintln!("not tested: no pid namespace without being root ({})", may.trim());
            return;
        }
        let (status, output) = run(Namespaces { pid: true, user: false }, "echo $$; exit 4");
        assert_eq!((status.code(), output.as_str()), (Some(4), "1\n"));
    }

    #[test]
    fn a_program_that_is_none_is_an_error() {
        let null = File::open("/dev/null").unwrap();
        let spawn = Spawn {
            program: Path::new("/nowhere"),
            arguments: Vec::new(),
            streams: [null.as_fd(); 3],
            inherited: Vec::new(),
            namespaces: Namespaces::default(),
            prepare: None,
        };
        assert_eq!(spawn.start().unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
