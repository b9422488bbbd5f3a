//! Takes snapshots of a running machine, and tells whether one can go on here.
//!
//! The guest stands still only while processors and devices are asked for their state. Its memory is written by a forked child, in which it
//! stays as it was, and its disks are copied by threads that are told of each write before it is made.

mod part;

use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;

use kvm_bindings::CpuId;
use serde::{Deserialize, Serialize};

use super::Running;
use crate::arch::state::{VmState, msr_indices};
use crate::config::MachineConfig;
use crate::control::Files;
use crate::devices::virtio::block::backup::Manner;
use crate::error::{Error, Result};
use crate::random;
use crate::snapshot::{
    DISK, Form, Identity, Opened, Snapshot, Target, disk, memory, pages, unwritten, working_set,
};
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

/// A snapshot under way. When it is dropped before its end, nobody writes any more.
#[derive(Debug)]
pub struct Saving {
    parts: Vec<Part>,
    directory: PathBuf,
    taken: Taken,
}

impl Running {
    /// Begins to save the machine in `files`. The guest goes on, if it ran before, when this returns.
    ///
    /// # Errors
    /// When a device cannot be saved, a vCPU does not stop, or a file is missing or cannot be written. The machine goes on.
    pub fn save(&self, request: &SnapshotRequest, mut files: Files) -> Result<Saving> {
        let taken = Taken { pause_ns: 0, memory_bytes: 0, disks: Vec::new() };
        let mut saving = Saving { parts: Vec::new(), directory: request.directory.clone(), taken };
        let target = Target::of(&mut files, request.durable)
            .map_err(|source| unwritten(&request.directory, source))?;
        // Read before the guest stands still.
        let base = request.base.as_deref().map(|base| Opened::sent(base, files.take_below())).transpose()?;
        let before =
            base.as_ref().map(|base| base.fits_shape(&self.config.machine).and_then(|()| base.to_base()));
        let before = before.transpose()?;
        let base = base.as_ref().zip(before.as_ref());
        let stood = self.vcpus.paused();
        let start = now_ns();
        let begun = if self.vcpus.pause() {
            let begun = self.begin(&mut saving, request, target, &mut files, base, stood);
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
        target: Target,
        files: &mut Files,
        base: Option<(&Opened, &memory::Base)>,
        stood: bool,
    ) -> Result<()> {
        let (base, before) = base.unzip();
        let config = serde_json::to_string(&self.config).map_err(Error::os("encode the configuration"))?;
        let snapshot = Snapshot {
            identity: identity()?,
            form: Form::of(request.compress),
            base: base.map(|base| base.difference(&request.directory)).transpose()?,
            config,
            memory_bytes: self.config.machine.memory_bytes(),
            extents: Vec::new(),
            devices: self.devices.save()?,
            vcpus: self.vcpus.save(&msr_indices(&self.kvm)?)?,
            // After the vCPUs, whose pending interrupts are settled by being asked.
            vm: VmState::save(&self.vm)?,
        };
        for id in &request.disks {
            saving.parts.push(self.copy_disk(id, files, request, base)?);
        }
        // Who has the machine standing still anyway saves nothing by a child.
        let part = if stood {
            let written = target.write(snapshot, &self.memory, &self.mapped, before);
            Part::done(written.map_err(|source| unwritten(&request.directory, source))?)
        } else {
            let pagemap = pages::pagemap().map_err(Error::os("open /proc/self/pagemap"))?;
            let [memory, state] = target.fds();
            let own = [memory, state, pagemap.as_raw_fd()];
            Part::fork(&own, || target.write(snapshot, &self.memory, &self.mapped, before))
                .map_err(Error::os("fork a child that writes the guest's memory"))?
        };
        saving.parts.push(part);
        Ok(())
    }

    fn copy_disk(
        &self,
        id: &str,
        files: &mut Files,
        request: &SnapshotRequest,
        base: Option<&Opened>,
    ) -> Result<Part> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let drives = self.devices.virtio.iter().filter_map(|device| device.drive());
        let found = drives.into_iter().find(|(name, _)| name == id && name.chars().all(plain));
        let (_, disk) =
            found.ok_or_else(|| Error::Config(format!("the machine has no disk {id:?} to copy")))?;
        let failed = |source| Error::Input { what: "disk to copy", path: id.into(), source };
        let target = files.take(&format!("{DISK}{id}")).map_err(failed)?;
        let base = disk::of_base(base, id).map_err(failed)?;
        let backup = disk.backup(target, Manner { compress: request.compress, base }).map_err(failed)?;
        Part::copy(id, disk, backup, request.durable).map_err(Error::os("start a thread that copies a disk"))
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
            part.collect().map_err(|why| Error::Snapshot { directory: self.directory.clone(), why })?;
        }
        Ok(self.fds().is_empty())
    }

    /// Tells what it cost. Only when all is collected.
    ///
    /// # Errors
    /// When it is not.
    pub fn finish(self) -> Result<Taken> {
        let Self { parts, mut taken, .. } = self;
        for part in parts {
            match part.into_result() {
                Some(Copied::Memory { bytes }) => taken.memory_bytes = bytes,
                Some(Copied::Disk(disk)) => taken.disks.push(disk),
                None => return Err(Error::Unsaveable("a part of the snapshot is not written".to_owned())),
            }
        }
        Ok(taken)
    }
}

impl Running {
    /// Notes in a file for the snapshot from which the machine went on what it has written to until now: see [`working_set`].
    /// Answers how many bytes.
    ///
    /// # Errors
    /// When it has booted, or the file did not come or cannot be written to.
    pub fn record_working_set(&self, files: &mut Files) -> Result<u64> {
        let Some(identity) = self.origin else {
            return Err(Error::Unsaveable("it has booted: no snapshot wants to know its working set".into()));
        };
        let recorded = files
            .take(working_set::WORKING_SET)
            .and_then(|file| working_set::record(&self.memory, &file, identity));
        recorded.map_err(Error::os("note a working set"))
    }
}

fn identity() -> Result<Identity> {
    let mut identity = Identity::default();
    random::fill(&mut identity).map_err(Error::os("get random bytes"))?;
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
