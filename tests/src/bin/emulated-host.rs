//! Runs a command in a freshly resumed emulated KVM host: `emulated-host [--share DIR] SCRIPT-or-COMMAND…`.

use std::io::{IsTerminal, stderr, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bulkhead_tests::emulated::{Clock, Options, State, run};
use clap::Parser;

/// Runs a command in a fresh copy of the emulated KVM host and ends with its exit status.
///
/// The first use builds and boots the host (about half a minute); later ones take a fraction of a second to start.
/// The host has /dev/kvm, busybox, runc, crun, iproute2, e2fsprogs, util-linux and strace.
/// Nothing of a run is kept, except what it writes to the shared folder.
#[derive(Parser)]
struct Arguments {
    /// Folder of this machine to see on /host, the command's working directory then
    #[arg(long)]
    share: Option<PathBuf>,
    /// Let idle time pass at its usual pace instead of skipping it
    #[arg(long)]
    steady: bool,
    /// With podman, dockerd and containerd
    #[arg(long)]
    engines: bool,
    /// With no cgroup hierarchy mounted
    #[arg(long)]
    no_cgroups: bool,
    /// Real seconds after which the host is ended
    #[arg(long, default_value_t = 300)]
    timeout: u64,
    /// Print the host kernel's messages too
    #[arg(long)]
    console: bool,
    /// Command and arguments; a single word with spaces is given to the shell as it is
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let share = match &arguments.share {
        Some(share) => Some(share.canonicalize().with_context(|| format!("share {}", share.display()))?),
        None => None,
    };
    let command = match arguments.command.as_slice() {
        [line] => line.replace('\n', "; "),
        words => words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "),
    };
    let command = if share.is_some() { format!("cd /host; {command}") } else { command };
    let mut state = if arguments.no_cgroups { State::booted_without_cgroups()? } else { State::booted()? };
    if arguments.engines {
        state = state.with_engines()?;
    }
    let start = Instant::now();
    let options = Options {
        clock: if arguments.steady { Clock::Steady } else { Clock::Leaping },
        share: share.as_deref(),
        backstop: Duration::from_secs(arguments.timeout),
    };
    let outcome = run(&state, &command, &options, &mut stdout().lock())?;
    if arguments.console {
        eprintln!("--- the host's kernel log\n{}", outcome.console);
    }
    if stderr().is_terminal() {
        eprintln!("--- status {}, {:.1} s", outcome.status, start.elapsed().as_secs_f64());
    }
    Ok(ExitCode::from(u8::try_from(outcome.status).unwrap_or(255)))
}

/// A word as the shell must see it to take it literally.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
