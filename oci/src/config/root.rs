//! A root file system that is no directory of the host's.

use std::fs::File;
use std::path::Path;

use bulkhead_protocol::agent::Rootfs;
use bulkhead_runtime::monitor::DiskConfig;
use bulkhead_runtime::{Result, Settings};

use super::disk::RootDisk;
use super::layers::RootLayers;

/// What `--root-disk` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// One disk with a file system on it.
    Disk(RootDisk),
    /// Layers of an image.
    Layers(RootLayers),
}

impl Root {
    /// Parses and checks it.
    ///
    /// # Errors
    /// It is malformed, or something is missing.
    pub fn parse(text: &str) -> Result<Self> {
        let value: serde_json::Value = super::disk::from_json(text)?;
        match value.get("layers") {
            None => RootDisk::parse(text).map(Self::Disk),
            Some(_) => RootLayers::parse(text).map(Self::Layers),
        }
    }

    /// Makes what is not there yet.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn prepare(&self, settings: &Settings) -> Result<()> {
        match self {
            Self::Disk(_) => Ok(()),
            Self::Layers(layers) => layers.prepare(settings),
        }
    }

    /// Its disks, for the monitor.
    pub fn configs(&self) -> Vec<DiskConfig> {
        match self {
            Self::Disk(disk) => vec![disk.config()],
            Self::Layers(layers) => layers.configs(),
        }
    }

    /// For the agent; `devices` are the guest's names of [`Self::configs`].
    pub fn in_guest(&self, devices: &[String]) -> Rootfs {
        match self {
            Self::Disk(disk) => {
                let device = devices.first().map(String::as_str).unwrap_or_default();
                Rootfs { root: Some(disk.in_guest(device)), ..Rootfs::default() }
            }
            Self::Layers(layers) => layers.in_guest(devices),
        }
    }

    /// Takes what is written to for the machine alone, until the file is closed.
    ///
    /// # Errors
    /// The host has it mounted, or another machine has it.
    pub fn hold(&self) -> Result<File> {
        match self {
            Self::Disk(disk) => disk.hold(),
            Self::Layers(layers) => layers.hold(),
        }
    }

    /// Mounts it on the host, for a container that joins a machine which has no drive left.
    ///
    /// # Errors
    /// mount(8)'s.
    pub fn mount(&self, target: &Path) -> Result<()> {
        match self {
            Self::Disk(disk) => disk.mount(target),
            Self::Layers(layers) => layers.mount(target),
        }
    }
}
