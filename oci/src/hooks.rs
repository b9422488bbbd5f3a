//! Runs hooks: the state on standard input, the environment of the hook alone, a limit of time.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bulkhead_runtime::network::NamespaceRef;
use bulkhead_runtime::{Context, Error, Result, null};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

use crate::log::Log;
use crate::store::Hook;

/// How much of the end of what a failed hook said is shown, in bytes.
const SHOWN: usize = 2048;
/// What is read of a hook's words after its end: more than a pipe holds is somebody else's talk.
const LAST_WORDS: usize = 64 << 10;

/// Runs hooks one after the other, until one fails.
///
/// # Errors
/// A hook cannot be started, fails or takes too long.
pub fn run(kind: &str, hooks: &[Hook], state: &Value) -> Result<()> {
    hooks.iter().enumerate().try_for_each(|(number, hook)| one(kind, number, hook, state, None))
}

/// The same, in the container's network namespace.
///
/// # Errors
/// As [`run`]; or the namespace is gone.
pub fn run_inside(kind: &str, hooks: &[Hook], state: &Value, network: Option<&NamespaceRef>) -> Result<()> {
    if hooks.is_empty() {
        return Ok(());
    }
    let path = network.map(NamespaceRef::path);
    let open = |path| std::fs::File::open(path).context(|| format!("cannot run the {kind} hooks inside"));
    let network = path.map(open).transpose()?;
    let network = network.as_ref().map(AsFd::as_fd);
    hooks.iter().enumerate().try_for_each(|(number, hook)| one(kind, number, hook, state, network))
}

/// Runs all of them, whether those before have worked or not: the container has gone already. Failures are warnings.
pub fn run_all(kind: &str, hooks: &[Hook], state: &Value, log: &Log) {
    for (number, hook) in hooks.iter().enumerate() {
        if let Err(error) = one(kind, number, hook, state, None) {
            log.warn(&error.chain());
        }
    }
}

fn one(kind: &str, number: usize, hook: &Hook, state: &Value, network: Option<BorrowedFd<'_>>) -> Result<()> {
    let what = || format!("{kind} hook #{number} ({}) failed", hook.path.display());
    let mut command = Command::new(&hook.path);
    if let Some((name, arguments)) = hook.args.split_first() {
        command.arg0(name).args(arguments);
    }
    command.env_clear().envs(hook.env.iter().filter_map(|entry| entry.split_once('=')));
    // In a group of its own, so that what it has started can be ended with it.
    let output = null::stdio().context(what)?;
    command.process_group(0).stdin(Stdio::piped()).stdout(output).stderr(Stdio::piped());
    if let Some(network) = network {
        let network = network.try_clone_to_owned().context(what)?;
        let enter = move || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(network.as_fd(), kind).map_err(io::Error::from)
        };
        // SAFETY: between fork and exec it makes one system call, and allocates nothing.
        unsafe { command.pre_exec(enter) };
    }
    let mut child = command.spawn().context(what)?;
    let limit = hook.timeout.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
    let mut said = Vec::new();
    let status = attend(&mut child, state.to_string().as_bytes(), limit, &mut said);
    let how = match status.context(what)? {
        Some(status) if status.success() => return Ok(()),
        Some(status) => status.to_string(),
        None => format!("it was killed after its timeout of {} seconds", limit.unwrap_or_default().as_secs()),
    };
    let said = String::from_utf8_lossy(&said).trim_end().to_owned();
    let said = if said.is_empty() { said } else { format!("; it said: {said}") };
    Err(Error::Usage(format!("{}: {how}{said}", what())))
}

/// Feeds it and listens to it until it ends; what it has started may hold its streams for longer. `None` when it had to be
/// killed. `said` is the end of its words.
fn attend(
    child: &mut Child,
    mut state: &[u8],
    limit: Option<Duration>,
    said: &mut Vec<u8>,
) -> io::Result<Option<ExitStatus>> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let (mut stdin, mut stderr) = (child.stdin.take(), child.stderr.take());
    // It need not read, so nothing here may wait for it to.
    if let (Some(stdin), Some(stderr)) = (&stdin, &stderr) {
        rustix::io::ioctl_fionbio(stdin, true)?;
        rustix::io::ioctl_fionbio(stderr, true)?;
    }
    let deadline = limit.map(|limit| Instant::now() + limit);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
            child.wait()?;
            hear(stderr.as_mut(), said, LAST_WORDS);
            return Ok(None);
        }
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let (ended, hungry, speaks) = {
            let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
            fds.extend(stdin.as_ref().map(|stdin| PollFd::new(stdin, PollFlags::OUT)));
            fds.extend(stderr.as_ref().map(|stderr| PollFd::new(stderr, PollFlags::IN)));
            match poll(&mut fds, left.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            let listens = usize::from(stdin.is_some());
            (ready(0), listens > 0 && ready(1), stderr.is_some() && ready(1 + listens))
        };
        if hungry {
            let written = stdin.as_mut().map_or(Ok(0), |stdin| stdin.write(state));
            match written {
                Ok(count) => state = state.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // It has closed it.
                Err(_) => state = &[],
            }
            if state.is_empty() {
                stdin = None;
            }
        }
        if speaks && !hear(stderr.as_mut(), said, LAST_WORDS) {
            stderr = None;
        }
        if ended {
            hear(stderr.as_mut(), said, LAST_WORDS);
            return child.wait().map(Some);
        }
    }
}

/// Reads what has been said so far, `most` bytes or so of it. Answers whether there may be more.
fn hear(stderr: Option<&mut ChildStderr>, said: &mut Vec<u8>, most: usize) -> bool {
    let Some(stderr) = stderr else { return false };
    let mut buffer = [0; 4096];
    let mut all = 0;
    while all < most {
        match stderr.read(&mut buffer) {
            Ok(0) => return false,
            Ok(count) => {
                all += count;
                said.extend_from_slice(buffer.get(..count).unwrap_or_default());
                said.drain(..said.len().saturating_sub(SHOWN));
            }
            Err(error) => return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let args = ["sh", "-c", script].map(str::to_owned).to_vec();
        Hook { path: "/bin/sh".into(), args, env: vec!["A=b c".into()], timeout }
    }

    #[test]
    fn a_hook_gets_state_and_its_own_environment() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!("/bin/cat >{0}; echo \"$A $HOME\" >>{0}", out.display());
        run("prestart", &[hook(&script, Some(10))], &json!({"id": "x"})).unwrap();
        assert_eq!(std::fs::read_to_string(out).unwrap(), "{\"id\":\"x\"}b c \n");
    }

    #[test]
    fn failure_and_delay_are_told() {
        let error = run("prestart", &[hook("echo why >&2; exit 3", None)], &json!({})).unwrap_err().chain();
        assert!(
            error.contains("prestart hook #0") && error.contains("why") && error.contains('3'),
            "{error}"
        );
        let script = "echo slow >&2; exec /bin/sleep 100";
        let error = run("poststop", &[hook(script, Some(1))], &json!({})).unwrap_err().chain();
        assert!(error.contains("timeout of 1 second") && error.contains("slow"), "{error}");
    }

    /// A state and words of more than a pipe holds, and a child that keeps the streams: none of them may hold us up.
    #[test]
    fn a_hook_that_does_not_listen_or_says_much_hinders_nobody() {
        let state = json!({"annotations": {"large": "x".repeat(1 << 20)}});
        run("prestart", &[hook("exit 0", None)], &state).unwrap();
        let script = "/usr/bin/head -c 1000000 /dev/zero | /usr/bin/tr '\\0' x >&2; echo last >&2; exit 1";
        let error = run("prestart", &[hook(script, None)], &state).unwrap_err().chain();
        assert!(error.len() < 2 * SHOWN && error.ends_with("last"), "{error}");
        let error = run("prestart", &[hook("/bin/sleep 100", Some(1))], &state).unwrap_err().chain();
        assert!(error.contains("timeout"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("/bin/sleep 100 & echo $! >{}", pid.display());
        run("prestart", &[hook(&script, None)], &state).unwrap();
        let pid: i32 = std::fs::read_to_string(pid).unwrap().trim().parse().unwrap();
        rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
}
