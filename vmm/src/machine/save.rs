//! Takes snapshots of a running machine, and tells whether one can go on here.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use kvm_bindings::CpuId;
use serde::{Deserialize, Serialize};

use super::Running;
use crate::arch::state::{VmState, msr_indices};
use crate::config::MachineConfig;
use crate::error::{Error, Result};
use crate::snapshot::{self, Identity, Opened, Snapshot, working_set};
use crate::timeline::now_ns;

/// What a snapshot cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// How long the guest stood still, in nanoseconds; 0 when it did before.
    pub pause_ns: u64,
    /// Bytes of memory that were not zero.
    pub memory_bytes: u64,
}

impl Running {
    /// Saves the machine to `directory`, with `durable` such that it survives a loss of power. The guest stands still meanwhile, and goes on if it ran before.
    ///
    /// # Errors
    /// When a device cannot be saved, a vCPU does not stop, or the directory cannot be written. The machine goes on, and
    /// nothing is left.
    pub fn save(&self, directory: &Path, durable: bool) -> Result<Taken> {
        if !directory.is_absolute() {
            return Err(Error::Config(format!("the snapshot's directory {directory:?} is no absolute path")));
        }
        let stood = self.vcpus.paused();
        let start = now_ns();
        let written = if self.vcpus.pause() {
            self.write(directory, durable)
        } else {
            Err(Error::Unsaveable("a vCPU does not stop".to_owned()))
        };
        if !stood {
            self.vcpus.resume();
        }
        let pause_ns = if stood { 0 } else { now_ns().saturating_sub(start) };
        Ok(Taken { pause_ns, memory_bytes: written? })
    }

    fn write(&self, directory: &Path, durable: bool) -> Result<u64> {
        let config = serde_json::to_string(&self.config).map_err(Error::os("encode the configuration"))?;
        let snapshot = Snapshot {
            identity: identity()?,
            config,
            memory_bytes: self.config.machine.memory_bytes(),
            extents: Vec::new(),
            devices: self.devices.save()?,
            vcpus: self.vcpus.save(&msr_indices(&self.kvm)?)?,
            // After the vCPUs, whose pending interrupts are settled by being asked.
            vm: VmState::save(&self.vm)?,
        };
        snapshot::write(directory, snapshot, &self.memory, &self.base, durable)
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
