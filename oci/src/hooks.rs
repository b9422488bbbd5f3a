//! Runs hooks: the state on standard input, the environment of the hook alone, a limit of time.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_runtime::{Context, Error, Result};
use serde_json::Value;

use crate::store::Hook;

/// How much of what a failed hook said is shown, in bytes.
const SHOWN: u64 = 2048;

/// Runs hooks one after the other, until one fails.
///
/// # Errors
/// A hook cannot be started, fails or takes too long.
pub fn run(kind: &str, hooks: &[Hook], state: &Value) -> Result<()> {
    hooks.iter().enumerate().try_for_each(|(number, hook)| one(kind, number, hook, state))
}

fn one(kind: &str, number: usize, hook: &Hook, state: &Value) -> Result<()> {
    let what = || format!("{kind} hook #{number} ({}) failed", hook.path.display());
    let mut command = Command::new(&hook.path);
    if let Some((name, arguments)) = hook.args.split_first() {
        command.arg0(name).args(arguments);
    }
    command.env_clear().envs(hook.env.iter().filter_map(|entry| entry.split_once('=')));
    // In a group of its own, so that what it has started can be ended with it.
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context(what)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read it.
        let _ = stdin.write_all(state.to_string().as_bytes());
    }
    let limit = hook.timeout.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
    let status = wait(&mut child, limit).context(what)?;
    let Some(status) = status else {
        let seconds = limit.unwrap_or_default().as_secs();
        return Err(Error::Usage(format!(
            "{}: it was killed after its timeout of {seconds} seconds",
            what()
        )));
    };
    if status.success() {
        return Ok(());
    }
    let mut said = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(SHOWN).read_to_end(&mut said);
    }
    let said = String::from_utf8_lossy(&said).trim_end().to_owned();
    Err(Error::Usage(format!("{}: {status}; it said: {said}", what())))
}

/// `None` when it had to be killed.
fn wait(child: &mut Child, limit: Option<Duration>) -> std::io::Result<Option<std::process::ExitStatus>> {
    let Some(limit) = limit else { return child.wait().map(Some) };
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            if let Some(group) = rustix::process::Pid::from_raw(child.id().cast_signed()) {
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
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
        let error = run("poststop", &[hook("exec /bin/sleep 100", Some(1))], &json!({})).unwrap_err().chain();
        assert!(error.contains("timeout of 1 second"), "{error}");
    }
}
