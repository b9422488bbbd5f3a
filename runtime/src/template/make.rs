//! Makes a template: boots a machine with nothing in it and saves it when its agent is up and has had its rehearsal.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use vmm::config::{Config, DiskConfig, NetworkConfig};
use vmm::control::{Client, ClientError, Method, SnapshotRequest};
use vmm::snapshot::PARTIAL;

use super::rehearse::rehearse;
use super::{Failed, Wanted, empty_share, forget_failure};
use crate::monitor::{Monitor, outline};
use crate::state::{Files, private_dir};
use crate::{Artefacts, Context, Error, Layout, Result, Settings, names};

/// How the directories with the sockets of machines that become templates are called. No longer than those of sandboxes, or
/// their sockets' paths would be too long.
const PREFIX: &str = "template-";

/// Clears away the directories of those that were killed half-way.
fn sweep(layout: &Layout) {
    let Ok(entries) = fs::read_dir(&layout.run) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// The machine to boot.
fn config(artefacts: &Artefacts, files: &Files, wanted: &Wanted<'_>) -> Config {
    let empty_disk = |disk: &DiskConfig| DiskConfig {
        id: disk.id.clone(),
        read_only: disk.read_only,
        empty: true,
        removable: disk.removable,
        ..DiskConfig::default()
    };
    let cable =
        |kind| NetworkConfig { tap: None, fd: None, socket: None, empty: Some(kind), mac: None, mtu: 1500 };
    Config {
        disks: wanted.disks.iter().map(empty_disk).collect(),
        filesystems: wanted.shares.then(empty_share).into_iter().collect(),
        networks: wanted.networks.iter().copied().map(cable).collect(),
        ..outline(artefacts, files, wanted.shape)
    }
}

/// Everything about the machine but where its files are.
pub(super) fn blueprint(settings: &Settings, wanted: &Wanted<'_>) -> Result<String> {
    let nowhere = PathBuf::new;
    let artefacts =
        Artefacts { monitor: nowhere(), kernel: nowhere(), initramfs: nowhere(), settings: settings.clone() };
    let files = Files { dir: nowhere(), run: nowhere() };
    serde_json::to_string(&config(&artefacts, &files, wanted)).context(|| "cannot describe a template".into())
}

/// Makes the template in `directory`, which appears when it is complete. The lock is held.
pub(super) fn make(
    layout: &Layout,
    artefacts: &Artefacts,
    wanted: &Wanted<'_>,
    directory: &Path,
    interrupt: &impl AsFd,
    given_up: impl FnMut() -> bool,
) -> Result<(), Failed> {
    sweep(layout);
    let mut name = [0; 3];
    names::random(&mut name)?;
    let run = layout.run.join(format!("{PREFIX}{}", names::hex(&name)));
    private_dir(&run)?;
    let files = Files { dir: run.clone(), run: run.clone() };
    // Under this name it is half-made to who comes later. It gets its own when nothing else is left of the making: whoever finds a template
    // does not clear away what another has left.
    let mut unfinished = directory.as_os_str().to_owned();
    unfinished.push(".made");
    unfinished.push(PARTIAL);
    let unfinished = PathBuf::from(unfinished);
    let made =
        boot(artefacts, &files, wanted, interrupt, given_up).map_err(Failed::Boot).and_then(|monitor| {
            rehearse(&files, Vec::new())?;
            Ok(save(monitor, &files, &unfinished)?)
        });
    let _ = fs::remove_dir_all(&run);
    made?;
    fs::rename(&unfinished, directory).context(|| format!("cannot create {}", directory.display()))?;
    if let Some(home) = directory.parent() {
        forget_failure(home).context(|| format!("cannot tidy {}", home.display()))?;
    }
    Ok(())
}

fn boot(
    artefacts: &Artefacts,
    files: &Files,
    wanted: &Wanted<'_>,
    interrupt: &impl AsFd,
    given_up: impl FnMut() -> bool,
) -> Result<Monitor> {
    let mut monitor = Monitor::spawn(artefacts, files, config(artefacts, files, wanted), Vec::new())?;
    monitor.wait_ready(interrupt, given_up)?;
    Ok(monitor)
}

fn save(monitor: Monitor, files: &Files, directory: &Path) -> Result<()> {
    let failed = |error: ClientError| Error::Monitor(format!("a template cannot be saved: {error}"));
    // No longer than the host's boot, which is part of its key.
    let wish = SnapshotRequest::new(directory.to_owned(), false);
    Client::connect(&files.control())
        .and_then(|mut client| {
            // It does not go on: what stands still is written as it is, without a child that keeps it.
            client.call(Method::Pause)?;
            client.snapshot(wish, |_| (), |_| Ok(()))
        })
        .map_err(failed)?;
    // Waited for: this process may live as long as a container, and a dead child with it.
    drop(monitor);
    Ok(())
}
