//! `containerd-shim-bulkhead-v2`: between containerd and containers in microVMs.
//!
//! containerd runs it as `start` for each container and talks to the address it answers: a process that stays, one for a
//! container, or for a pod (all containers that name the same sandbox). That process serves containerd's task API
//! ([`service`]), keeps what each task is doing ([`tasks`]) and has `bulkhead-oci` do the work ([`oci`]). It is small on
//! purpose: a container's streams go from containerd's fifos to its sandbox without passing through here.

mod cleanup;
mod events;
mod layers;
mod mounts;
mod oci;
mod reap;
mod sandbox;
mod serve;
mod service;
mod start;
mod stats;
mod stdio;
mod tasks;
mod terminal;

use std::process::ExitCode;

use anyhow::{Result, bail};

/// Name that containerd's configuration and `ctr --runtime` give.
const RUNTIME: &str = "io.containerd.bulkhead.v2";

/// What containerd says on the command line.
#[derive(Debug, Default)]
pub struct Flags {
    /// Of containerd's, which keeps containers apart.
    pub namespace: String,
    /// Of the container.
    pub id: String,
    /// Of containerd's own socket.
    pub address: String,
    /// The bundle, for `delete`.
    pub bundle: String,
    /// `start`, `delete`, or nothing to serve.
    pub action: String,
    version: bool,
    info: bool,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let flags = parse(&std::env::args().skip(1).collect::<Vec<_>>())?;
    if flags.version {
        println!("containerd-shim-bulkhead-v2 {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if flags.info {
        return service::print_info();
    }
    if flags.namespace.is_empty() || flags.id.is_empty() {
        bail!("containerd runs this program; by hand it knows -v (see docs/containerd.md)");
    }
    match flags.action.as_str() {
        "start" => start::start(&flags),
        "delete" => cleanup::delete(&flags),
        "" => serve::serve(&flags),
        other => bail!("unknown action {other:?}: there are start and delete"),
    }
}

/// Go's flags: one dash or two, `-name value` or `-name=value`.
fn parse(args: &[String]) -> Result<Flags> {
    let mut flags = Flags::default();
    let (mut short, mut debug, mut ignored) = (false, false, String::new());
    let rest: Vec<String> = go_flag::parse_args(args, |set| {
        set.add_flag("namespace", &mut flags.namespace);
        set.add_flag("id", &mut flags.id);
        set.add_flag("address", &mut flags.address);
        set.add_flag("bundle", &mut flags.bundle);
        set.add_flag("publish-binary", &mut ignored);
        set.add_flag("debug", &mut debug);
        set.add_flag("v", &mut short);
        set.add_flag("version", &mut flags.version);
        set.add_flag("info", &mut flags.info);
    })?;
    flags.version |= short;
    flags.action = rest.into_iter().next().unwrap_or_default();
    Ok(flags)
}

/// A line for containerd's log, which standard error is. Nobody may be reading.
pub fn log(message: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "containerd-shim-bulkhead-v2: {message}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerds_command_line_is_understood() {
        let line = "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id a -bundle /b delete";
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        let flags = parse(&words).unwrap();
        assert_eq!((flags.namespace.as_str(), flags.id.as_str()), ("k8s.io", "a"));
        assert_eq!((flags.bundle.as_str(), flags.action.as_str()), ("/b", "delete"));
        assert!(parse(&["-v".into()]).unwrap().version);
        assert!(parse(&["-nosuch".into()]).is_err());
    }
}
