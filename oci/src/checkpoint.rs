//! What `checkpoint` makes and `restore` goes on from: a directory with the machine as its monitor saves it, and what of the container
//! the machine does not know.
//!
//! | name | what |
//! |---|---|
//! | `checkpoint.json` | [`Saved`] with its version and checksum |
//! | `machine/` | the monitor's snapshot: `state`, `memory` |
//!
//! Files of the host (root and binds) are not in it: as with CRIU, they are to be there again when it goes on.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use bulkhead_runtime::monitor::Shape;
use bulkhead_runtime::network::Network;
use bulkhead_runtime::snapshot::MACHINE;
use bulkhead_runtime::{Context, Error, Result};
use serde::{Deserialize, Serialize};

use crate::config::Bundle;

/// Name of the container's part.
pub const CONTAINER: &str = "checkpoint.json";
/// Version of it that this build writes and reads.
const VERSION: u32 = 1;
/// Some KiB are usual.
const MAX_BYTES: u64 = 1 << 20;

/// What a machine was made with, and a machine that goes on from it has to have, too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fittings {
    /// Where in the container the host's files are, in the order in which the guest knows them; `/` is its root.
    pub shares: Vec<PathBuf>,
    /// The network that the guest was given.
    pub network: Network,
    /// Its agent stands for a name server of the namespace's.
    pub name_server: bool,
    /// Drives that wait for disks of containers that join it.
    pub drives: u8,
}

/// A container that was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Saved {
    /// When, in nanoseconds since the epoch.
    pub taken_ns: u64,
    /// The agent's name for it.
    pub guest_id: String,
    /// Its process has a terminal.
    pub terminal: bool,
    /// It was suspended by `pause`.
    pub paused: bool,
    /// Virtual processors.
    pub vcpus: u8,
    /// MiB.
    pub memory_mib: u32,
    /// Of its machine.
    pub fittings: Fittings,
}

/// The form of the file.
#[derive(Debug, Serialize, Deserialize)]
pub struct Sealed {
    version: u32,
    crc32: u32,
    container: Saved,
}

/// What every version of the file has.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// A checkpoint to go on from.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Where it is.
    pub directory: PathBuf,
    /// What it is of.
    pub saved: Saved,
}

impl Saved {
    /// In the form that is written.
    ///
    /// # Errors
    /// It cannot be encoded, which is an error of this program's.
    pub fn seal(self) -> Result<Sealed> {
        Ok(Sealed { version: VERSION, crc32: self.checksum()?, container: self })
    }

    /// Of what it means, however that is written.
    fn checksum(&self) -> Result<u32> {
        let text = serde_json::to_vec(self).context(|| "cannot encode a checkpoint".into())?;
        Ok(crc32fast::hash(&text))
    }

    /// The machine's.
    pub fn shape(&self) -> Shape {
        Shape { vcpus: self.vcpus, memory_mib: self.memory_mib }
    }
}

impl Checkpoint {
    /// Reads the checkpoint in `directory`. Its machine is looked at when that is to go on.
    ///
    /// # Errors
    /// There is none, it is damaged, or of another version.
    pub fn load(directory: &Path) -> Result<Self> {
        let directory = std::path::absolute(directory).context(|| "cannot find the checkpoint".into())?;
        let path = directory.join(CONTAINER);
        let shown = directory.display();
        let mut text = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut text))
            .context(|| format!("{shown} is no checkpoint of bulkhead-oci's"))?;
        let damaged = || format!("the checkpoint {shown} is damaged ({CONTAINER})");
        let version = serde_json::from_slice::<Version>(&text).context(damaged)?.version;
        if version != VERSION {
            return Err(Error::Usage(format!(
                "the checkpoint {shown} is of version {version}, this program reads version {VERSION}: restore it with the \
                 program that made it"
            )));
        }
        let Sealed { crc32, container, .. } = serde_json::from_slice(&text).context(damaged)?;
        if crc32 != container.checksum()? {
            return Err(Error::Usage(format!("{}: the checksum differs", damaged())));
        }
        Ok(Self { directory, saved: container })
    }

    /// The monitor's part.
    pub fn machine(&self) -> PathBuf {
        self.directory.join(MACHINE)
    }

    /// Whether the container can go on with this bundle.
    ///
    /// # Errors
    /// What is different that may not be.
    pub fn fits(&self, bundle: &Bundle) -> Result<()> {
        let bad = |why: String| {
            Err(Error::Usage(format!("the checkpoint {} does not fit: {why}", self.directory.display())))
        };
        if !bundle.disks().is_empty() {
            return bad("the container is to have disks, and none was saved".into());
        }
        let with = |terminal: bool| if terminal { "with a terminal" } else { "without a terminal" };
        if bundle.terminal != self.saved.terminal {
            return bad(format!(
                "the container was saved {}, process.terminal says {}",
                with(self.saved.terminal),
                bundle.terminal
            ));
        }
        let (shares, before) = (bundle.shares(), &self.saved.fittings.shares);
        if shares != *before {
            let list = |paths: &[PathBuf]| {
                paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
            };
            return bad(format!(
                "the container was saved with files of the host on {}; with config.json they are on {}. The same places are \
                 needed, in the same order",
                list(before),
                list(&shares)
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn saved() -> Saved {
        let fittings = Fittings {
            shares: vec!["/".into(), "/etc/hosts".into()],
            network: Network::default(),
            name_server: false,
            drives: 0,
        };
        Saved {
            taken_ns: 1,
            guest_id: "a".into(),
            terminal: false,
            paused: false,
            vcpus: 1,
            memory_mib: 128,
            fittings,
        }
    }

    fn write(text: &[u8]) -> (tempfile::TempDir, Result<Checkpoint>) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONTAINER), text).unwrap();
        let loaded = Checkpoint::load(dir.path());
        (dir, loaded)
    }

    #[test]
    fn it_is_read_as_written_and_no_flipped_bit_changes_what_it_means() {
        let text = serde_json::to_vec_pretty(&saved().seal().unwrap()).unwrap();
        assert_eq!(write(&text).1.unwrap().saved, saved());
        let dir = tempfile::tempdir().unwrap();
        for at in 0..text.len() {
            for bit in 0..8 {
                let mut damaged = text.clone();
                damaged[at] ^= 1 << bit;
                fs::write(dir.path().join(CONTAINER), &damaged).unwrap();
                if let Ok(read) = Checkpoint::load(dir.path()) {
                    assert_eq!(read.saved, saved(), "byte {at}, bit {bit}");
                }
            }
            assert!(write(&text[..at]).1.is_err(), "{at} bytes");
        }
    }

    #[test]
    fn another_version_and_nothing_at_all_are_named() {
        let text = String::from_utf8(serde_json::to_vec_pretty(&saved().seal().unwrap()).unwrap()).unwrap();
        let newer = text.replacen("\"version\": 1", "\"version\": 2", 1);
        let error = write(newer.as_bytes()).1.unwrap_err().chain();
        assert!(error.contains("of version 2"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        let error = Checkpoint::load(dir.path()).unwrap_err().chain();
        assert!(error.contains("no checkpoint"), "{error}");
    }

    #[test]
    fn a_bundle_with_other_files_or_another_terminal_does_not_fit() {
        let bundle = crate::config::tests::bundle(crate::config::tests::GOOD).unwrap();
        let mut one = saved();
        one.fittings.shares = vec!["/".into()];
        let fits = |saved: Saved| Checkpoint { directory: "/x".into(), saved }.fits(&bundle);
        fits(one.clone()).unwrap();
        let error = fits(saved()).unwrap_err().to_string();
        assert!(error.contains("/etc/hosts"), "{error}");
        let error = fits(Saved { terminal: true, ..one }).unwrap_err().to_string();
        assert!(error.contains("terminal"), "{error}");
    }
}
