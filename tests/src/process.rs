//! Programs under test: start them, talk to them, say what they should have done.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// A command to be run.
#[derive(Debug)]
pub struct Program {
    words: Vec<OsString>,
    command: Command,
    stdin: Input,
}

#[derive(Debug)]
enum Input {
    Nothing,
    Bytes(Vec<u8>),
    Open,
}

impl Program {
    /// A command of these words. Its stdin is /dev/null.
    pub fn new<W: Into<OsString>>(words: impl IntoIterator<Item = W>) -> Self {
        let words: Vec<OsString> = words.into_iter().map(Into::into).collect();
        let mut command = Command::new(words.first().cloned().unwrap_or_default());
        command.args(words.iter().skip(1));
        Self { words, command, stdin: Input::Nothing }
    }

    /// More words.
    pub fn args<W: Into<OsString>>(mut self, words: impl IntoIterator<Item = W>) -> Self {
        for word in words {
            let word = word.into();
            self.command.arg(&word);
            self.words.push(word);
        }
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.command.env(name, value.into());
        self
    }

    /// Starts it in this directory.
    pub fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Gives it these bytes on stdin, then end of file.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Input::Bytes(bytes.into());
        self
    }

    /// Keeps its stdin open, for [`Running::send`].
    pub fn open_stdin(mut self) -> Self {
        self.stdin = Input::Open;
        self
    }

    /// Runs it to its end and to the end of its output.
    pub fn run(self) -> Result<Finished> {
        self.spawn()?.wait()
    }

    /// Starts it.
    pub fn spawn(mut self) -> Result<Running> {
        let shown = self.shown();
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        self.command.stdin(if matches!(self.stdin, Input::Nothing) { Stdio::null() } else { Stdio::piped() });
        let started = Instant::now();
        let mut child = self.command.spawn().with_context(|| format!("start {shown}"))?;
        let stdout = Collector::of(child.stdout.take().context("no stdout")?);
        let stderr = Collector::of(child.stderr.take().context("no stderr")?);
        let mut input: Option<Box<dyn Write + Send>> = None;
        if let Some(mut stdin) = child.stdin.take() {
            if let Input::Bytes(bytes) = self.stdin {
                // It may end without reading all of it.
                std::thread::spawn(move || drop(stdin.write_all(&bytes)));
            } else {
                input = Some(Box::new(stdin));
            }
        }
        Ok(Running { shown, child, input, stdout, stderr: Some(stderr), terminal: None, started })
    }

    /// Starts it on a terminal of its own, of this many rows and columns.
    pub fn terminal(mut self, rows: u16, columns: u16) -> Result<Running> {
        let shown = self.shown();
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let controller = openpt(flags).context("open a terminal")?;
        grantpt(&controller)?;
        unlockpt(&controller)?;
        let terminal = File::from(ioctl_tiocgptpeer(&controller, flags)?);
        let controller = File::from(controller);
        resize(&controller, rows, columns)?;
        // util-linux' setsid makes the terminal the controlling one, as a login would.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg("--wait").args(&self.words);
        command.envs(self.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        if let Some(dir) = self.command.get_current_dir() {
            command.current_dir(dir);
        }
        command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal);
        self.command = command;
        let started = Instant::now();
        let child = self.command.spawn().with_context(|| format!("start {shown}"))?;
        // The command holds copies of our end of the terminal; end of file comes when they are gone.
        drop(self.command);
        let stdout = Collector::of(controller.try_clone()?);
        let input: Box<dyn Write + Send> = Box::new(controller.try_clone()?);
        Ok(Running {
            shown,
            child,
            input: Some(input),
            stdout,
            stderr: None,
            terminal: Some(controller),
            started,
        })
    }

    /// Replaces this process by it; answers only when that failed.
    pub fn exec(mut self) -> anyhow::Error {
        anyhow::Error::from(self.command.exec()).context(format!("start {}", self.shown()))
    }

    fn shown(&self) -> String {
        let words: Vec<String> = self
            .words
            .iter()
            .map(|word| {
                let word = word.to_string_lossy();
                let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./=:,@+%".contains(letter);
                if word.is_empty() || !word.chars().all(plain) {
                    format!("{word:?}")
                } else {
                    word.into_owned()
                }
            })
            .collect();
        words.join(" ")
    }
}

pub(crate) fn resize(terminal: &File, rows: u16, columns: u16) -> Result<()> {
    tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })
        .context("resize the terminal")
}

/// Reads a stream to its end in a thread of its own.
#[derive(Debug)]
pub(crate) struct Collector {
    state: Arc<(Mutex<Collected>, Condvar)>,
    thread: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Collected {
    bytes: Vec<u8>,
    ended: bool,
}

impl Collector {
    pub(crate) fn of(mut source: impl Read + Send + 'static) -> Self {
        let state = Arc::new((Mutex::new(Collected::default()), Condvar::new()));
        let shared = Arc::clone(&state);
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 65536];
            loop {
                // A terminal whose other end was closed answers EIO: its end of file.
                let count = source.read(&mut buffer).unwrap_or(0);
                let mut collected = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
                collected.bytes.extend_from_slice(buffer.get(..count).unwrap_or_default());
                collected.ended = count == 0;
                shared.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        Self { state, thread }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner).bytes.clone()
    }

    pub(crate) fn wait_for(&self, text: &str, patience: Duration) -> bool {
        let lacks = |collected: &mut Collected| !collected.ended && !contains(&collected.bytes, text);
        let locked = self.state.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.state.1.wait_timeout_while(locked, patience, lacks);
        contains(&waited.unwrap_or_else(PoisonError::into_inner).0.bytes, text)
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        // A thread that panicked has collected what it could.
        let _ = self.thread.join();
        let mut collected = self.state.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut collected.bytes)
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    text.is_empty() || bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// A program that was started.
pub struct Running {
    shown: String,
    child: Child,
    input: Option<Box<dyn Write + Send>>,
    stdout: Collector,
    stderr: Option<Collector>,
    terminal: Option<File>,
    started: Instant,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its stdin or types on its terminal.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> Result<()> {
        let input = self.input.as_mut().with_context(|| format!("{} has no open stdin", self.shown))?;
        input
            .write_all(bytes.as_ref())
            .and_then(|()| input.flush())
            .with_context(|| format!("write to {}", self.shown))
    }

    /// Ends its stdin.
    pub fn close_stdin(&mut self) {
        self.input = None;
    }

    /// Changes the size of its terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        resize(
            self.terminal.as_ref().with_context(|| format!("{} has no terminal", self.shown))?,
            rows,
            columns,
        )
    }

    /// Waits until it has printed `text` on stdout.
    pub fn wait_for(&self, text: &str, patience: Duration) -> Result<()> {
        if self.stdout.wait_for(text, patience) {
            return Ok(());
        }
        let stderr = self.stderr.as_ref().map(Collector::bytes).unwrap_or_default();
        bail!(
            "{} did not print {text:?} within {patience:?}\nstdout: {}\nstderr: {}",
            self.shown,
            tail(&self.stdout.bytes()),
            tail(&stderr)
        )
    }

    /// What it has printed on stdout so far.
    pub fn stdout_so_far(&self) -> String {
        String::from_utf8_lossy(&self.stdout.bytes()).into_owned()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("it has no pid")?;
        kill_process(pid, signal).with_context(|| format!("signal {}", self.shown))
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for its end and the end of its output. An open stdin stays open until then.
    pub fn wait(mut self) -> Result<Finished> {
        let status = self.child.wait().with_context(|| format!("wait for {}", self.shown))?;
        let took = self.started.elapsed();
        drop(self.input);
        let stdout = self.stdout.finish();
        let stderr = self.stderr.map(Collector::finish).unwrap_or_default();
        Ok(Finished { shown: self.shown, status: shell_status(status), stdout, stderr, took })
    }
}

/// A process's end as a shell tells it: its exit status, or 128 and the number of the signal.
pub fn shell_status(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// A program that has ended. Its checks answer itself, so that they can be strung together.
#[derive(Debug)]
pub struct Finished {
    shown: String,
    /// Exit status as a shell tells it.
    pub status: i32,
    /// All it printed on stdout, or on its terminal.
    pub stdout: Vec<u8>,
    /// All it printed on stderr.
    pub stderr: Vec<u8>,
    /// From its start to its end.
    pub took: Duration,
}

impl Finished {
    /// stdout as text.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// stderr as text.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    fn check(self, holds: bool, expected: impl fmt::Display) -> Result<Self> {
        if holds {
            return Ok(self);
        }
        bail!("expected {expected}\n{self}")
    }

    /// It succeeded.
    pub fn ok(self) -> Result<Self> {
        self.status_is(0)
    }

    /// It ended with this status.
    pub fn status_is(self, status: i32) -> Result<Self> {
        let holds = self.status == status;
        self.check(holds, format_args!("status {status}"))
    }

    /// It ended with a status other than 0, and not by a signal or a panic of ours (101).
    pub fn failed(self) -> Result<Self> {
        let holds = (1..=127).contains(&self.status) && self.status != 101;
        self.check(holds, "an error, told by an exit status")
    }

    /// stdout is exactly this.
    pub fn stdout_is(self, text: &str) -> Result<Self> {
        let holds = self.stdout == text.as_bytes();
        self.check(holds, format_args!("stdout to be {text:?}"))
    }

    /// stdout has this in it.
    pub fn stdout_has(self, text: &str) -> Result<Self> {
        let holds = contains(&self.stdout, text);
        self.check(holds, format_args!("stdout to have {text:?} in it"))
    }

    /// stdout has not this in it.
    pub fn stdout_lacks(self, text: &str) -> Result<Self> {
        let holds = !contains(&self.stdout, text);
        self.check(holds, format_args!("stdout not to have {text:?} in it"))
    }

    /// stderr has this in it, whatever the case of its letters.
    pub fn stderr_has(self, text: &str) -> Result<Self> {
        let holds = self.stderr().to_lowercase().contains(&text.to_lowercase());
        self.check(holds, format_args!("stderr to have {text:?} in it"))
    }

    /// stderr is exactly this.
    pub fn stderr_is(self, text: &str) -> Result<Self> {
        let holds = self.stderr == text.as_bytes();
        self.check(holds, format_args!("stderr to be {text:?}"))
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "$ {}", self.shown)?;
        writeln!(out, "status {}, after {:.3} s", self.status, self.took.as_secs_f64())?;
        writeln!(out, "stdout: {}", tail(&self.stdout))?;
        write!(out, "stderr: {}", tail(&self.stderr))
    }
}

/// The end of some output, for a message.
pub(crate) fn tail(bytes: &[u8]) -> String {
    const MOST: usize = 4000;
    let start = bytes.len().saturating_sub(MOST);
    let text = String::from_utf8_lossy(bytes.get(start..).unwrap_or_default());
    match start {
        0 if text.is_empty() => "(nothing)".to_string(),
        0 => text.trim_end().to_string(),
        _ => format!("({} bytes, the last of them) …{}", bytes.len(), text.trim_end()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_run_with_input_and_its_end_is_told() -> Result<()> {
        let cat = Program::new(["sh", "-c", "cat; echo bad >&2; exit 7"]).stdin("abc").run()?;
        assert!(cat.status_is(7)?.stdout_is("abc")?.stderr_has("BAD")?.ok().is_err());
        let killed = Program::new(["sh", "-c", "kill -9 $$"]).run()?;
        assert_eq!(killed.status, 137);
        assert!(killed.failed().is_err());
        assert!(Program::new(["/no/such/program"]).run().is_err());
        Ok(())
    }

    #[test]
    fn a_terminal_is_a_terminal_and_can_be_resized() -> Result<()> {
        let mut shell = Program::new(["sh", "-c", "tty; read a; stty size; read b; echo got-$b; exit 5"])
            .terminal(24, 80)?;
        shell.wait_for("/dev/pts/", Duration::from_secs(10))?;
        shell.resize(33, 99)?;
        shell.send("x\n")?;
        shell.wait_for("33 99", Duration::from_secs(10))?;
        shell.send("y\n")?;
        shell.wait()?.status_is(5)?.stdout_has("got-y")?;
        Ok(())
    }

    #[test]
    fn waiting_for_words_that_never_come_ends() -> Result<()> {
        let mut cat = Program::new(["cat"]).open_stdin().spawn()?;
        cat.send("one\n")?;
        cat.wait_for("one", Duration::from_secs(10))?;
        assert!(cat.wait_for("two", Duration::from_millis(20)).is_err());
        cat.close_stdin();
        cat.wait()?.ok()?;
        Ok(())
    }
}
