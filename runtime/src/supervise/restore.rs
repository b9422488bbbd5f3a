//! A container that goes on in a copy of another's machine.

use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{Empty, ResizeTerminalRequest, Stdio};
use vmm::snapshot::{DISK, Opened, disk};

use super::Supervisor;
use crate::guest::{self, Agent};
use crate::network::{Network, NetworkWish};
use crate::relay::{Ends, Relay, Streams};
use crate::snapshot::{MACHINE, Saved};
use crate::{Context, Error, Result, logs, trace};

/// What a container goes on from.
#[derive(Debug)]
pub(crate) struct Copy {
    /// The snapshot.
    pub directory: PathBuf,
    /// What is in it.
    pub saved: Saved,
    /// Rows and columns of the terminal that it is shown on now.
    pub terminal: Option<(u16, u16)>,
}

impl Copy {
    /// The monitor's part.
    pub fn machine(&self) -> PathBuf {
        self.directory.join(MACHINE)
    }

    /// Makes the container's scratch disk from the snapshot's. False when it has none.
    pub fn scratch(&self, path: &Path) -> Result<bool> {
        let Some(saved) = self.saved.disks.iter().find(|disk| disk.id == "scratch") else {
            return Ok(false);
        };
        let from = self.machine().join(format!("{DISK}scratch"));
        let opened = Opened::open(&self.machine()).map_err(|source| Error::Other {
            what: format!("cannot go on from the snapshot {}", self.directory.display()),
            source: source.into(),
        })?;
        let digest = disk::Saved::open(&opened, "scratch")
            .and_then(|disk| disk.copy(path))
            .context(|| format!("cannot copy the disk {}", from.display()))?;
        if digest.value() == saved.digest {
            return Ok(true);
        }
        let _ = fs::remove_file(path);
        Err(Error::Usage(format!(
            "the disk {} is not as it was when its machine was saved: it has been changed or damaged, and would not fit \
             what the guest remembers of it",
            from.display()
        )))
    }
}

impl Supervisor {
    /// Makes the guest itself rather than a copy, gives the container its streams, and lets it go on.
    pub(super) fn go_on(&mut self, agent: &mut Agent, copy: &Copy) -> Result<Relay> {
        // Entropy and clock, before anything of the container runs. Its host name is as it was.
        match &self.plan.record.options.network {
            NetworkWish::Namespace(_) => {
                guest::reconfigure(agent, &copy.saved.record.given, &self.network, Vec::new())?;
            }
            // passt gives it the addresses that it had.
            NetworkWish::None | NetworkWish::Passt => {
                guest::reconfigure(agent, &Network::default(), &Network::default(), Vec::new())?;
            }
        }
        let super::Plan { record, files, ends, .. } = &mut self.plan;
        let options = &record.options;
        let stdio = Stdio { stdin: options.interactive, stdout: true, stderr: !options.tty };
        let streams = Streams::reconnect(&self.guest, record.in_guest(), &stdio, options.tty);
        trace::mark("streams connected");
        if let Some((rows, columns)) = copy.terminal {
            let request = ResizeTerminalRequest {
                container: record.in_guest().to_owned(),
                exec: String::new(),
                rows: rows.into(),
                columns: columns.into(),
            };
            // A container that has closed its terminal has none to resize.
            let _ = agent.call::<Empty>("ResizeTerminal", &request);
        }
        let ends = Ends { log: Some(logs::Writer::create(&files.log())?), ..std::mem::take(ends) };
        let relay = Relay::start(streams, ends)?;
        let _: Empty = agent
            .call("Resume", &Empty {})
            .map_err(|source| Error::Agent { what: "cannot let the container go on".into(), source })?;
        Ok(relay)
    }
}
