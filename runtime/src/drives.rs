//! Disks of containers that come into a machine that runs: they are put into drives that the machine has been given empty, and
//! taken out when the container has gone.

use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_protocol::agent::{Disk, Empty, ReleaseDiskRequest};
use bulkhead_protocol::wire::Code;
use serde::{Deserialize, Serialize};
use vmm::config::DiskConfig;
use vmm::control::{Client, ClientError, EjectRequest, InsertRequest, Inserted, Method};

use crate::guest::Agent;
use crate::{Error, Result};

/// How long the guest may take to let go of the disks of a container that has gone: its kernel unmounts on its own time.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// How long it may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
const MOMENT: Duration = Duration::from_millis(2);

/// A disk in a drive of a machine that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// The monitor's name for it.
    name: String,
    /// Which of the guest's disks it is, from 0.
    number: usize,
    /// Size of the disk.
    bytes: u64,
    /// Tells this disk from those that come into the drive later.
    insertion: u64,
}

/// Empty drives for a machine that has these disks of its own: as many as are wished for and fit.
#[must_use]
pub fn spare(wished: u8, disks: usize, other_devices: usize) -> Vec<DiskConfig> {
    let room = (vmm::config::MAX_DISKS.saturating_sub(disks))
        .min(vmm::config::MAX_DEVICES.saturating_sub(disks + other_devices));
    let drive = |number| DiskConfig {
        id: format!("spare{number}"),
        empty: true,
        removable: true,
        ..DiskConfig::default()
    };
    (0..room.min(wished.into())).map(drive).collect()
}

/// The guest's name of one of its disks: Linux gives them letters in their order.
///
/// # Errors
/// No machine has so many.
pub fn device(number: usize) -> Result<String> {
    let letter =
        u8::try_from(number).ok().filter(|number| *number < 26).map(|number| char::from(b'a' + number));
    letter.map(|letter| format!("/dev/vd{letter}")).ok_or_else(|| {
        Error::Monitor(format!("the monitor says that a disk is number {number}, which no machine has"))
    })
}

/// Puts a disk into a drive of the machine with this control socket. `None`: a disk is in every one.
///
/// # Errors
/// The machine has gone, or its monitor cannot open the disk.
pub fn insert(control: &Path, disk: DiskConfig) -> Result<Option<Drive>> {
    let DiskConfig { path, layers, read_only, id, .. } = disk;
    let failed = |why: &dyn std::fmt::Display| {
        Error::Monitor(format!("cannot put the disk {id:?} into the microVM: {why}"))
    };
    let mut client = Client::connect(control).map_err(|error| failed(&error))?;
    match client.call(Method::InsertDisk(InsertRequest { path, layers, read_only })) {
        Ok(answer) => {
            let inserted: Inserted = serde_json::from_value(answer).map_err(|error| failed(&error))?;
            let Inserted { drive: name, number, bytes, insertion } = inserted;
            Ok(Some(Drive { name, number, bytes, insertion }))
        }
        Err(ClientError::Refused(_)) if client.status().is_ok_and(|status| status.empty_drives == 0) => {
            Ok(None)
        }
        Err(error) => Err(failed(&error)),
    }
}

impl Drive {
    /// Its name in the guest.
    ///
    /// # Errors
    /// No machine has so many.
    pub fn device(&self) -> Result<String> {
        device(self.number)
    }

    /// For the agent, to wait for.
    ///
    /// # Errors
    /// As [`Self::device`].
    pub fn to_message(&self) -> Result<Disk> {
        Ok(Disk { source: self.device()?, bytes: self.bytes })
    }

    /// Asks the guest to let go of the disk, again and again until `deadline`. Answers whether it says that it has.
    pub fn release(&self, agent: &mut Agent, deadline: Instant) -> bool {
        let Ok(source) = self.device() else { return false };
        // A guest may say nothing, and nobody has to wait for it.
        let _ = agent.stream().set_read_timeout(Some(ANSWER));
        let request = ReleaseDiskRequest { source };
        loop {
            match agent.call::<Empty>("ReleaseDisk", &request) {
                Ok(Empty {}) => return true,
                Err(error) if error.code() == Some(Code::FailedPrecondition) && Instant::now() < deadline => {
                    std::thread::sleep(MOMENT);
                }
                Err(_) => return false,
            }
        }
    }

    /// Takes the disk out. If the guest has not let go of it, what it still has to write fails, and the drive is not used any
    /// more: the next disk would get it.
    ///
    /// # Errors
    /// The machine has gone, or another disk is in the drive already.
    pub fn eject(&self, control: &Path, released: bool) -> Result<()> {
        let drive = self.name.clone();
        let wish = EjectRequest { drive, insertion: Some(self.insertion), retire: !released };
        let ejected = Client::connect(control).and_then(|mut client| client.call(Method::EjectDisk(wish)));
        ejected.map(drop).map_err(|error| {
            Error::Monitor(format!("cannot take the disk out of drive {}: {error}", self.name))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spare_drives_take_what_room_there_is() {
        let count = |wished, disks, others| spare(wished, disks, others).len();
        assert_eq!((count(4, 0, 0), count(4, 1, 2), count(0, 0, 0)), (4, 4, 0));
        // Twelve disks, and sixteen devices in all.
        assert_eq!((count(8, 9, 0), count(8, 12, 0), count(8, 13, 0)), (3, 0, 0));
        assert_eq!((count(8, 4, 8), count(8, 8, 8), count(8, 9, 9)), (4, 0, 0));
        let drives = spare(2, 1, 1);
        assert!(drives.iter().all(|drive| drive.empty && drive.removable));
        assert_ne!(drives[0].id, drives[1].id);
    }

    #[test]
    fn a_number_is_a_letter() {
        assert_eq!(device(0).unwrap(), "/dev/vda");
        assert_eq!(device(25).unwrap(), "/dev/vdz");
        assert!(device(26).is_err() && device(usize::MAX).is_err());
    }
}
