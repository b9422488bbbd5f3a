//! Disks that come and go while the machine runs: a drive that the configuration calls removable is there from the start, and
//! what is in it changes.
//!
//! The guest finds another capacity, and is interrupted to look. Requests and changes are worked off by one thread, so that
//! each request meets one disk: within the bounds of that one, or not at all.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Running;
use crate::config::DiskConfig;
use crate::control::{EjectRequest, Files, InsertRequest};
use crate::devices::virtio::block::disk::{Disk, check_opened};
use crate::error::{Error, Result};
use crate::timeline::now_ns;

/// Where a disk is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inserted {
    /// The drive's name, which is also the serial number that the guest reads.
    pub drive: String,
    /// Its place among the machine's disks, from 0: 2 is `vdc` to Linux.
    pub number: usize,
    /// The disk's size in bytes, by which the guest can tell that it sees this one.
    pub bytes: u64,
    /// A number that no other disk gets which is put into a drive on this host before its next boot.
    pub insertion: u64,
}

impl Running {
    /// Puts a disk, whose files came with the request, into the first removable drive that is empty.
    ///
    /// # Errors
    /// There is none, the disk's files did not come or are none, or another drive has it and one of both may be written to. Nothing has
    /// changed then.
    pub fn insert_disk(&mut self, wish: InsertRequest, files: &mut Files) -> Result<Inserted> {
        let InsertRequest { path, layers, read_only } = wish;
        if let Some(path) = path.iter().chain(&layers).find(|path| !path.is_absolute()) {
            return Err(Error::Drive(format!("the disk {path:?} is no absolute path")));
        }
        let free = |disk: &&DiskConfig| disk.removable && disk.empty;
        let number = self.config.disks.iter().position(|disk| free(&disk)).ok_or_else(|| {
            let all = self.config.disks.iter().filter(|disk| disk.removable).count();
            Error::Drive(format!(
                "no drive is empty: the machine has {all} removable ones, and a disk is in each; eject one, or give the \
                 machine more drives"
            ))
        })?;
        let id = self.config.disks.get(number).map(|disk| disk.id.clone()).unwrap_or_default();
        let read_only = read_only || !layers.is_empty();
        let disk = DiskConfig { id, path, layers, read_only, empty: false, removable: true, limit: None };
        disk.check()?;
        let content = opened(&disk, files)?;
        self.check_alone(&disk, &content)?;
        let inserted =
            Inserted { drive: disk.id.clone(), number, bytes: content.length(), insertion: now_ns() };
        self.insertions.insert(number, inserted.insertion);
        self.devices.change_disk(number, Some(content));
        if let Some(drive) = self.config.disks.get_mut(number) {
            *drive = disk;
        }
        Ok(inserted)
    }

    /// Takes the disk out of a removable drive. What the guest still asks of it fails.
    ///
    /// # Errors
    /// There is no such drive, or none that is removable, or nothing is in it, or another disk than was meant.
    pub fn eject_disk(&mut self, wish: &EjectRequest) -> Result<()> {
        let found = self.config.disks.iter_mut().zip(0..).find(|(disk, _)| disk.id == wish.drive);
        let (disk, number) =
            found.ok_or_else(|| Error::Drive(format!("the machine has no drive {:?}", wish.drive)))?;
        if !disk.removable {
            return Err(Error::Drive(format!("the disk of drive {:?} cannot be taken out", wish.drive)));
        }
        if disk.empty {
            return Err(Error::Drive(format!("drive {:?} is empty already", wish.drive)));
        }
        let current = self.insertions.get(&number).copied();
        if wish.insertion.is_some() && wish.insertion != current {
            return Err(Error::Drive(format!("another disk is in drive {:?} by now", wish.drive)));
        }
        self.insertions.remove(&number);
        let id = disk.id.clone();
        *disk = DiskConfig { id, empty: true, removable: !wish.retire, ..DiskConfig::default() };
        self.devices.change_disk(number, None);
        Ok(())
    }

    /// One that is written to has no other drive: the guest's file systems would destroy each other.
    fn check_alone(&self, wanted: &DiskConfig, content: &Disk) -> Result<()> {
        let files = content.identities();
        // They come first of all devices.
        for (other, device) in self.config.disks.iter().zip(&self.devices.virtio) {
            let Some((_, disk)) = device.drive().filter(|_| !other.read_only || !wanted.read_only) else {
                continue;
            };
            if disk.identities().iter().any(|file| files.contains(file)) {
                let paths: Vec<_> = wanted.path.iter().chain(&wanted.layers).collect();
                return Err(Error::Drive(format!(
                    "the disk {paths:?} is in drive {:?} already, and is written to",
                    other.id
                )));
            }
        }
        Ok(())
    }
}

/// The disk of `files`, which are called by their paths.
fn opened(disk: &DiskConfig, files: &mut Files) -> Result<Disk> {
    let mut take = |path: &Path| {
        let file = files.take(&path.to_string_lossy())?;
        check_opened(&file, !disk.read_only)?;
        Ok(file)
    };
    let content = match &disk.path {
        Some(path) => take(path)
            .and_then(|file| Disk::raw_of(file, disk.read_only))
            .map_err(|error| (path.clone(), error)),
        None => Disk::composite_of(&disk.id, &disk.layers, take),
    };
    content.map_err(|(path, source)| Error::Input { what: "disk", path, source })
}
