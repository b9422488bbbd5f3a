//! The forked child: turns itself into the container's init, or into one more process of it, and executes it.
//! Read [`init`] and [`exec`] top to bottom: the order of the steps is the isolation.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent;
use rustix::fs::Mode;
use rustix::io::Errno;

use super::capabilities::Sets;
use super::channel;
use super::identity::Identity;
use super::namespaces::{Namespaces, loopback_up};
use super::rootfs::c_string;
use super::seccomp::Filter;
use super::spec::{Process, Rlimit, Spec};
use super::terminal::Terminal;
use super::{devices::Nodes, mounts};
use crate::error::{Code, Context, Error, Result};
use crate::hw;

/// What docker and runc search when the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The child's ends of its standard streams; `None` is /dev/null.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Read end.
    pub stdin: Option<OwnedFd>,
    /// Write end.
    pub stdout: Option<OwnedFd>,
    /// Write end.
    pub stderr: Option<OwnedFd>,
}

/// What every process of a container needs.
pub struct Common<'a> {
    /// The child's end of the channel.
    pub channel: BorrowedFd<'a>,
    /// Its streams, when it has no terminal.
    pub stdio: Stdio,
    /// What to run, as whom.
    pub process: &'a Process,
    /// Which system calls it may make.
    pub seccomp: Option<&'a Filter>,
    /// Compiled `process.capabilities`.
    pub capabilities: Sets,
}

/// What the container's init needs besides.
pub struct Init<'a> {
    /// The whole configuration.
    pub spec: &'a Spec,
    /// Its namespaces, in which the child already is, the joined ones excepted.
    pub namespaces: &'a Namespaces,
    /// The mounted root, in the agent's mount namespace.
    pub rootfs: &'a Path,
    /// The container's cgroup directory.
    pub cgroup: &'a Path,
    /// Files that the host puts into the root.
    pub files: &'a [agent::File],
}

/// Runs `body`, which ends in execve, and reports why if it does not. Never returns: this is a copy of the agent.
pub fn run(channel: OwnedFd, body: impl FnOnce(BorrowedFd<'_>) -> Result<Infallible>) -> ! {
    hw::release();
    // A panic must end this child, not the machine.
    std::panic::set_hook(Box::new(|info| {
        crate::boot::console(&format!("bulkhead agent, container set-up: {info}"))
    }));
    let error = match body(channel.as_fd()) {
        Err(error) => error,
        Ok(never) => match never {},
    };
    channel::send_failed(&channel, &error);
    let status = match error.code {
        Code::NotFound => 127,
        Code::PermissionDenied => 126,
        _ => 125,
    };
    // SAFETY: _exit takes no pointers; the agent's own exit handlers must not run in its child.
    unsafe { libc::_exit(status) }
}

/// The container's init.
///
/// # Errors
/// The step that failed.
pub fn init(common: &Common<'_>, init: &Init<'_>) -> Result<Infallible> {
    let Init { spec, namespaces, rootfs, cgroup, files } = *init;
    prepare(common, namespaces.has_user(), spec.process.as_ref().and_then(|p| p.oom_score_adj))?;
    namespaces.enter()?;
    if namespaces.has_net() {
        loopback_up()?;
    }
    if !spec.hostname.is_empty() {
        rustix::system::sethostname(spec.hostname.as_bytes())
            .context(|| format!("set hostname {}", spec.hostname))?;
    }
    if !spec.domainname.is_empty() {
        rustix::system::setdomainname(spec.domainname.as_bytes())
            .context(|| format!("set domainname {}", spec.domainname))?;
    }

    // From the agent's view of the files to the container's.
    let group = (!namespaces.has_cgroup()).then_some(cgroup);
    let prepared = mounts::prepare(&spec.mounts, group)?;
    let nodes = Nodes::prepare(&spec.linux.devices, namespaces.has_user())?;
    let old_root = mounts::enter_root(rootfs, namespaces.has_user())?;
    prepared.iter().try_for_each(mounts::Prepared::make)?;
    old_root.leave()?;
    nodes.make(&spec.linux.devices)?;
    let terminal =
        common.process.terminal.then(|| Terminal::open(common.process.console_size)).transpose()?;
    if let Some(terminal) = &terminal {
        terminal.become_console()?;
    }
    prepared.iter().try_for_each(mounts::Prepared::finish)?;

    for (name, value) in &spec.linux.sysctl {
        set_sysctl(name, value)?;
    }
    files.iter().try_for_each(put_file)?;
    spec.linux.readonly_paths.iter().try_for_each(|path| mounts::make_readonly(path))?;
    spec.linux.masked_paths.iter().try_for_each(|path| mounts::mask(path))?;
    set_root_flags(spec)?;
    finish(common, terminal)
}

/// Puts a file of the host's into the root, which is the container's by now: no link leads out of it.
fn put_file(file: &agent::File) -> Result<()> {
    let path = Path::new(&file.path);
    let put = || -> std::io::Result<()> {
        fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
        fs::write(path, &file.content)?;
        fs::set_permissions(path, fs::Permissions::from_mode(file.mode & 0o777))
    };
    put().context(|| format!("write {}", path.display()))
}

/// One more process in a running container: the agent has forked it into the pid namespace and cgroup.
///
/// # Errors
/// The step that failed.
pub fn exec(
    common: &Common<'_>,
    init: BorrowedFd<'_>,
    namespaces: &Namespaces,
    oom_score_adj: Option<i32>,
) -> Result<Infallible> {
    prepare(common, false, common.process.oom_score_adj.or(oom_score_adj))?;
    rustix::thread::move_into_thread_name_spaces(init, namespaces.exec_flags())
        .context(|| "join the container's namespaces (is it still running?)")?;
    if namespaces.has_user() {
        become_root()?;
    }
    let terminal =
        common.process.terminal.then(|| Terminal::open(common.process.console_size)).transpose()?;
    finish(common, terminal)
}

/// What comes before any namespace is entered.
fn prepare(common: &Common<'_>, user_namespace: bool, oom_score_adj: Option<i32>) -> Result<()> {
    // The agent blocks SIGCHLD for its signalfd and ignores SIGPIPE as every Rust program: both would be inherited.
    // SAFETY: the set is initialised by sigemptyset before it is used, and no handler is installed.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
    let adjust = oom_score_adj.unwrap_or(0).to_string();
    fs::write("/proc/self/oom_score_adj", &adjust).context(|| format!("set oom_score_adj {adjust}"))?;
    if user_namespace {
        if !channel::wait(common.channel) {
            return Err(Error::internal("given up by the agent"));
        }
        become_root()?;
    }
    Ok(())
}

/// Root of the user namespace just entered.
fn become_root() -> Result<()> {
    use rustix::fs::{Gid, Uid};
    let what = || "become root of the user namespace (does it map id 0?)";
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).context(what)?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).context(what)
}

fn set_sysctl(name: &str, value: &str) -> Result<()> {
    if name.split(['.', '/']).any(|part| part.is_empty()) {
        return Err(Error::invalid(format!("linux.sysctl {name:?} is not a name")));
    }
    // As sysctl(8): a name with dots, or with slashes so that its parts may have dots.
    let path = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    fs::write(Path::new("/proc/sys").join(path), value).context(|| format!("set sysctl {name} to {value:?}"))
}

fn set_root_flags(spec: &Spec) -> Result<()> {
    use rustix::mount::MountFlags;
    if !spec.linux.rootfs_propagation.is_empty() {
        let wanted = &spec.linux.rootfs_propagation;
        let change = mounts::propagation(wanted).ok_or_else(|| {
            Error::invalid(format!("linux.rootfsPropagation {wanted:?} is not a propagation"))
        })?;
        rustix::mount::mount_change("/", change).context(|| format!("make the root {wanted}"))?;
    }
    if spec.root.as_ref().is_some_and(|root| root.readonly) {
        let flags = MountFlags::BIND | MountFlags::RDONLY | mounts::inherited_flags("/")?;
        rustix::mount::mount_remount("/", flags, "").context(|| "make the root read-only")?;
    }
    Ok(())
}

/// Streams, limits, then the hold, then the loss of all privilege, then execve.
fn finish(common: &Common<'_>, terminal: Option<Terminal>) -> Result<Infallible> {
    let Common { channel, process, seccomp, .. } = common;
    rustix::process::setsid().context(|| "start a session")?;
    let identity = Identity::resolve(&process.user)?;
    let argv: Vec<_> = process.args.iter().map(|arg| c_string(arg)).collect::<Result<_>>()?;
    let env = environment(process, &identity)?;
    match &terminal {
        Some(terminal) => terminal.attach(&identity)?,
        None => attach(&common.stdio, &identity)?,
    }
    process.rlimits.iter().try_for_each(set_rlimit)?;
    rustix::process::umask(Mode::from_raw_mode(process.user.umask.unwrap_or(0o022)));
    enter_directory(&process.cwd)?;
    // A program that nobody finds is an error of the creation, as with runc: engines tell 126 and 127 by it. Looked up
    // again below, with the user's own rights.
    if !process.pause {
        find_program(&process.args, &process.env)?;
    }

    channel::send_ready(channel, terminal.as_ref().map(Terminal::master))?;
    drop(terminal);
    if !channel::wait(channel) {
        return Err(Error::internal("given up by the agent"));
    }

    let nothing_gained = process.no_new_privileges;
    common.capabilities.limit_bounding()?;
    // Without no_new_privs only a privileged process may set a filter: early, so that it must allow what follows.
    if !nothing_gained && let Some(filter) = seccomp {
        filter.load()?;
    }
    identity.assume()?;
    common.capabilities.apply()?;
    if nothing_gained {
        rustix::thread::set_no_new_privs(true).context(|| "set no_new_privs")?;
    }
    if process.pause {
        super::pause::pause();
    }
    let program = find_program(&process.args, &process.env)?;
    // Filters last: from here only execve and what reports its failure is called.
    if nothing_gained && let Some(filter) = seccomp {
        filter.load()?;
    }
    Err(execute(&program, &argv, &env))
}

/// Variables as given, with HOME as login would set it.
fn environment(process: &Process, identity: &Identity) -> Result<Vec<CString>> {
    let mut env: Vec<_> = process.env.iter().map(|variable| c_string(variable)).collect::<Result<_>>()?;
    if !process.env.iter().any(|variable| variable.starts_with("HOME=")) {
        env.push(c_string(&format!("HOME={}", identity.home))?);
    }
    Ok(env)
}

fn attach(stdio: &Stdio, identity: &Identity) -> Result<()> {
    use rustix::fs::{Gid, OFlags, Uid};
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .context(|| "open /dev/null")?;
    let ends = [&stdio.stdin, &stdio.stdout, &stdio.stderr];
    for (number, end) in (0..).zip(ends) {
        if let Some(end) = end
            && (identity.uid, identity.gid) != (0, 0)
        {
            // /dev/stdout is opened anew by name, with the user's own rights.
            let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
            rustix::fs::fchown(end, Some(uid), Some(gid)).context(|| "give the streams to the user")?;
        }
        duplicate_to(end.as_ref().unwrap_or(&null).as_fd(), number)?;
    }
    Ok(())
}

/// Makes `fd` standard stream `number`; the copy survives execve.
pub fn duplicate_to(fd: BorrowedFd<'_>, number: i32) -> Result<()> {
    // SAFETY: dup2 takes no pointers; 0, 1 and 2 belong to nobody in this child.
    crate::error::check(unsafe { libc::dup2(fd.as_raw_fd(), number) }).context(|| "set up the streams")?;
    Ok(())
}

fn set_rlimit(limit: &Rlimit) -> Result<()> {
    use rustix::process::Resource;
    let resource = match limit.kind.as_str() {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        other => return Err(Error::invalid(format!("unknown rlimit {other:?}"))),
    };
    let value = |n: u64| (n != u64::MAX).then_some(n);
    let new = rustix::process::Rlimit { current: value(limit.soft), maximum: value(limit.hard) };
    rustix::process::setrlimit(resource, new)
        .context(|| format!("set {} to {}:{}", limit.kind, limit.soft, limit.hard))
}

/// As docker: a working directory that does not exist is made.
fn enter_directory(cwd: &str) -> Result<()> {
    match rustix::process::chdir(cwd) {
        Err(Errno::NOENT) => {
            fs::create_dir_all(cwd).context(|| format!("create working directory {cwd}"))?;
            rustix::process::chdir(cwd)
        }
        result => result,
    }
    .context(|| format!("change to working directory {cwd}"))
}

/// Looks `args[0]` up as execvp does, with the words that docker and podman know.
fn find_program(args: &[String], env: &[String]) -> Result<PathBuf> {
    let name = args.first().map_or("", String::as_str);
    if name.contains('/') {
        let path = PathBuf::from(name);
        let wrong = |errno: Errno| {
            let code = if errno == Errno::NOENT { Code::NotFound } else { Code::PermissionDenied };
            Error::new(code, format!("exec: {name:?}: {}", plain(&errno.into())))
        };
        rustix::fs::access(&path, rustix::fs::Access::EXEC_OK).map_err(wrong)?;
        return if path.is_dir() { Err(wrong(Errno::ISDIR)) } else { Ok(path) };
    }
    let path = env.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let mut denied = false;
    for directory in path.split(':') {
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        if !fs::metadata(&candidate).is_ok_and(|meta| meta.is_file()) {
            continue;
        }
        match rustix::fs::access(&candidate, rustix::fs::Access::EXEC_OK) {
            Ok(()) => return Ok(candidate),
            Err(_) => denied = true,
        }
    }
    Err(if denied {
        Error::new(Code::PermissionDenied, format!("exec: {name:?}: permission denied"))
    } else {
        Error::not_found(format!("exec: {name:?}: executable file not found in $PATH"))
    })
}

fn execute(program: &Path, argv: &[CString], env: &[CString]) -> Error {
    let path = match c_string(&program.to_string_lossy()) {
        Ok(path) => path,
        Err(error) => return error,
    };
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: both arrays end with a null pointer and point to C strings that live until execve has read them.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    let error = std::io::Error::last_os_error();
    let code = match error.kind() {
        std::io::ErrorKind::NotFound => Code::NotFound,
        _ => Code::PermissionDenied,
    };
    Error::new(code, format!("exec: {:?}: {}", program.display().to_string(), plain(&error)))
}

/// An OS error without Rust's "(os error 2)", in the lower case that people search for.
fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

/// Makes the pipes that the host asked for: the child's ends, and the agent's in the same order.
///
/// # Errors
/// Out of descriptors.
pub fn pipes(asked: &agent::Stdio) -> Result<(Stdio, [Option<OwnedFd>; 3])> {
    use rustix::pipe::{PipeFlags, pipe_with};
    let make = |wanted: bool| -> Result<Option<(OwnedFd, OwnedFd)>> {
        wanted.then(|| pipe_with(PipeFlags::CLOEXEC).context(|| "make a pipe")).transpose()
    };
    let (mut child, mut ours) = (Stdio::default(), [None, None, None]);
    if let Some((read, write)) = make(asked.stdin)? {
        (child.stdin, ours[0]) = (Some(read), Some(write));
    }
    if let Some((read, write)) = make(asked.stdout)? {
        (child.stdout, ours[1]) = (Some(write), Some(read));
    }
    if let Some((read, write)) = make(asked.stderr)? {
        (child.stderr, ours[2]) = (Some(write), Some(read));
    }
    for end in ours.iter().flatten() {
        rustix::io::ioctl_fionbio(end, true)?;
    }
    Ok((child, ours))
}

/// Closes every descriptor of the agent but those listed and the standard streams: other containers' pipes would
/// never see their end while this child is held.
pub fn close_all_but(keep: &[BorrowedFd<'_>]) {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok()).collect();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if fd > from {
            // SAFETY: closes descriptors that only the agent's objects name, and those are never used in this child
            // again: it leaves by execve or _exit, so that nothing is closed twice by a destructor.
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = from.max(fd.saturating_add(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_program_is_looked_up_as_execvp_does() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, mode| {
            let path = directory.path().join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        file("yes", 0o755);
        file("no", 0o644);
        fs::create_dir(directory.path().join("dir")).unwrap();
        let env = [format!("PATH=/nonexistent:{}", directory.path().display())];
        let find = |name: &str| find_program(&[name.to_owned()], &env);
        assert_eq!(find("yes").unwrap(), directory.path().join("yes"));
        assert_eq!(find("no").unwrap_err().code, Code::PermissionDenied);
        assert_eq!(find("dir").unwrap_err().code, Code::NotFound);
        let error = find("foo").unwrap_err();
        assert_eq!(error.message, "exec: \"foo\": executable file not found in $PATH");
        let here = |name: &str| directory.path().join(name).display().to_string();
        assert_eq!(find(&here("yes")).unwrap(), directory.path().join("yes"));
        assert_eq!(find(&here("no")).unwrap_err().code, Code::PermissionDenied);
        assert_eq!(find(&here("dir")).unwrap_err().code, Code::PermissionDenied);
        let error = find("/no/such").unwrap_err();
        assert_eq!(
            (error.code, &*error.message),
            (Code::NotFound, "exec: \"/no/such\": no such file or directory")
        );
    }

    #[test]
    fn errors_read_as_people_know_them() {
        assert_eq!(plain(&std::io::Error::from_raw_os_error(libc::ENOENT)), "no such file or directory");
        assert_eq!(plain(&std::io::Error::from_raw_os_error(libc::EACCES)), "permission denied");
    }
}
