//! Takes snapshots of a running machine, and tells whether one can go on here.
//!
//! The guest stands still only while processors and devices are asked for their state. Its memory is written by a forked child, in which it
//! stays as it was, and its disks are copied by threads that are told of each write before it is made. Memory that is shared with
//! another process cannot be had that way: it is written while the guest stands still.

mod part;

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::RawFd;
use std::path::PathBuf;

use kvm_bindings::CpuId;
use serde::{Deserialize, Serialize};

use super::Running;
use crate::arch::state::{VmState, msr_indices};
use crate::config::MachineConfig;
use crate::devices::virtio::block::backup::Manner;
use crate::error::{Error, Result};
use crate::memory::Backing;
use crate::snapshot::disk::Saved;
use crate::snapshot::{DISK, Draft, Form, Identity, Opened, Snapshot, memory, working_set};
use crate::timeline::now_ns;
use part::{Copied, Part};

/// How and where a machine is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Absolute path of a directory that does not exist.
    pub directory: PathBuf,
    /// Whether the snapshot is to survive a loss of power, for which the host's disk is waited for.
    #[serde(default = "yes")]
    pub durable: bool,
    /// Names of disks to copy into it, as they are at that moment: disk ID becomes the file `disk-ID`.
    #[serde(default)]
    pub disks: Vec<String>,
    /// Whether memory and disks are compressed. They are decompressed whole whenever a machine goes on from it.
    #[serde(default)]
    pub compress: bool,
    /// Absolute path of another snapshot: only what differs from it is written, and both are needed to go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<PathBuf>,
}

impl SnapshotRequest {
    /// A whole snapshot, not compressed, without disks.
    pub fn new(directory: PathBuf, durable: bool) -> Self {
        Self { directory, durable, disks: Vec::new(), compress: false, base: None }
    }
}

fn yes() -> bool {
    true
}

/// What a snapshot cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// How long the guest stood still, in nanoseconds; 0 when it did before.
    pub pause_ns: u64,
    /// Bytes of memory that were not zero.
    pub memory_bytes: u64,
    /// The disks that were copied.
    #[serde(default)]
    pub disks: Vec<SavedDisk>,
}

/// A disk's copy in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDisk {
    /// Its name.
    pub id: String,
    /// See [`crate::devices::virtio::block::backup::Digest`].
    pub digest: u64,
}

/// A snapshot under way. One that is dropped before its end leaves nothing.
#[derive(Debug)]
pub struct Saving {
    // Before the draft, so that nobody writes any more when that is removed.
    parts: Vec<Part>,
    draft: Draft,
    taken: Taken,
}

impl Running {
    /// Begins to save the machine. The guest goes on, if it ran before, when this returns.
    ///
    /// # Errors
    /// When a device cannot be saved, a vCPU does not stop, or the directory cannot be written. The machine goes on, and
    /// nothing is left.
    pub fn save(&self, request: &SnapshotRequest) -> Result<Saving> {
        for path in [Some(&request.directory), request.base.as_ref()].into_iter().flatten() {
            if !path.is_absolute() {
                return Err(Error::Config(format!("the snapshot's directory {path:?} is no absolute path")));
            }
        }
        // Read before the guest stands still.
        let base = request.base.as_deref().map(Opened::open).transpose()?;
        let before =
            base.as_ref().map(|base| base.fits_shape(&self.config.machine).and_then(|()| base.to_base()));
        let before = before.transpose()?;
        let draft = Draft::begin(&request.directory, request.durable)?;
        let taken = Taken { pause_ns: 0, memory_bytes: 0, disks: Vec::new() };
        let mut saving = Saving { parts: Vec::new(), draft, taken };
        let stood = self.vcpus.paused();
        let start = now_ns();
        let begun = if self.vcpus.pause() {
            let begun = self.begin(&mut saving, request, base.as_ref().zip(before.as_ref()), stood);
            self.devices.saved();
            begun
        } else {
            Err(Error::Unsaveable("a vCPU does not stop".to_owned()))
        };
        if !stood {
            self.vcpus.resume();
            saving.taken.pause_ns = now_ns().saturating_sub(start);
        }
        begun.map(|()| saving)
    }

    /// All that has to be done while the guest stands still.
    fn begin(
        &self,
        saving: &mut Saving,
        request: &SnapshotRequest,
        base: Option<(&Opened, &memory::Base)>,
        stood: bool,
    ) -> Result<()> {
        let (base, before) = base.unzip();
        let config = serde_json::to_string(&self.config).map_err(Error::os("encode the configuration"))?;
        let snapshot = Snapshot {
            identity: identity()?,
            form: if request.compress { Form::Zstd } else { Form::Plain },
            base: base.map(|base| saving.draft.difference(base)).transpose()?,
            config,
            memory_bytes: self.config.machine.memory_bytes(),
            extents: Vec::new(),
            devices: self.devices.save()?,
            vcpus: self.vcpus.save(&msr_indices(&self.kvm)?)?,
            // After the vCPUs, whose pending interrupts are settled by being asked.
            vm: VmState::save(&self.vm)?,
        };
        for id in &request.disks {
            let part = self.copy_disk(id, &saving.draft, request.compress, base)?;
            saving.parts.push(part);
        }
        let Saving { draft, .. } = &*saving;
        // Who has the machine standing still anyway saves nothing by a child, and a child nothing where memory is shared.
        let part = if stood || super::backing(&self.config) == Backing::Shared {
            let written = draft.write(snapshot, &self.memory, &self.origin, before);
            Part::done(written.map_err(|source| draft.failed(source))?)
        } else {
            Part::fork(|| draft.write(snapshot, &self.memory, &self.origin, before))
                .map_err(Error::os("fork a child that writes the guest's memory"))?
        };
        saving.parts.push(part);
        Ok(())
    }

    fn copy_disk(&self, id: &str, draft: &Draft, compress: bool, base: Option<&Opened>) -> Result<Part> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let drives = self.devices.virtio.iter().filter_map(|device| device.drive());
        let found = drives.into_iter().find(|(name, _)| name == id && name.chars().all(plain));
        let (_, disk) =
            found.ok_or_else(|| Error::Config(format!("the machine has no disk {id:?} to copy")))?;
        let source = |source| Error::Input { what: "disk to copy", path: draft.path(id), source };
        // A base without the disk is none for it.
        let base = match base.map(|base| Saved::open(base, id)) {
            Some(Err(error)) if error.kind() == ErrorKind::NotFound => None,
            base => base.transpose().map_err(source)?,
        };
        let manner = Manner { compress, base };
        let backup = disk.backup(&draft.path(&format!("{DISK}{id}")), manner).map_err(source)?;
        Part::copy(id, disk, backup, draft.durable()).map_err(Error::os("start a thread that copies a disk"))
    }
}

impl Saving {
    /// How long the guest stood still, in nanoseconds; 0 when it did before.
    pub fn pause_ns(&self) -> u64 {
        self.taken.pause_ns
    }

    /// Readable when something of it is done; then [`Self::collect`] is due.
    pub fn fds(&self) -> Vec<RawFd> {
        self.parts.iter().filter_map(Part::fd).collect()
    }

    /// Takes the result of the part behind `fd`. True when it was the last.
    ///
    /// # Errors
    /// What went wrong: the snapshot cannot be finished.
    pub fn collect(&mut self, fd: RawFd) -> Result<bool> {
        if let Some(part) = self.parts.iter_mut().find(|part| part.fd() == Some(fd)) {
            part.collect()
                .map_err(|why| Error::Snapshot { directory: self.draft.directory().to_owned(), why })?;
        }
        Ok(self.fds().is_empty())
    }

    /// Gives the snapshot its name. Only when all is collected.
    ///
    /// # Errors
    /// When that is impossible; nothing is left then.
    pub fn finish(self) -> Result<Taken> {
        let Self { parts, draft, mut taken } = self;
        for part in parts {
            match part.into_result() {
                Some(Copied::Memory { bytes }) => taken.memory_bytes = bytes,
                Some(Copied::Disk(disk)) => taken.disks.push(disk),
                None => return Err(Error::Unsaveable("a part of the snapshot is not written".to_owned())),
            }
        }
        draft.finish()?;
        Ok(taken)
    }
}

impl Running {
    /// Notes in the snapshot from which the machine went on what it has written to until now: see [`working_set`]. Answers how
    /// many bytes.
    ///
    /// # Errors
    /// When it has booted, or the snapshot is not there any more or cannot be written to.
    pub fn record_working_set(&self) -> Result<u64> {
        let Some(directory) = &self.config.restore else {
            return Err(Error::Unsaveable("it has booted: no snapshot wants to know its working set".into()));
        };
        let identity = Opened::open(directory)?.snapshot.identity;
        let what = "snapshot, to note a working set in";
        working_set::record(&self.memory, directory, identity).map_err(|source| Error::Input {
            what,
            path: directory.clone(),
            source,
        })
    }
}

fn identity() -> Result<Identity> {
    let mut identity = Identity::default();
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut identity))
        .map_err(Error::os("read /dev/urandom"))?;
    Ok(identity)
}

impl Opened {
    /// Whether a machine of this shape can go on from the snapshot.
    ///
    /// # Errors
    /// What does not fit.
    pub fn fits_shape(&self, machine: &MachineConfig) -> Result<()> {
        let Snapshot { vcpus, memory_bytes, .. } = &self.snapshot;
        if vcpus.len() == usize::from(machine.vcpus) && *memory_bytes == machine.memory_bytes() {
            return Ok(());
        }
        self.unfit(format!(
            "it is of a machine with {} vCPUs and {} MiB, the configuration says {} and {} MiB",
            vcpus.len(),
            memory_bytes >> 20,
            machine.vcpus,
            machine.memory_mib
        ))
    }

    /// Whether its guest can go on on a host whose KVM supports these features.
    ///
    /// # Errors
    /// What this host lacks.
    pub fn fits_features(&self, supported: &CpuId) -> Result<()> {
        let first = self.snapshot.vcpus.first();
        let missing = first.map_or_else(Vec::new, |vcpu| vcpu.features_missing_from(supported.as_slice()));
        if missing.is_empty() {
            return Ok(());
        }
        self.unfit(format!(
            "its guest uses what this host's processor or KVM does not have: {}",
            missing.join(", ")
        ))
    }

    fn unfit(&self, why: String) -> Result<()> {
        Err(Error::Snapshot { directory: self.directory.clone(), why })
    }
}
