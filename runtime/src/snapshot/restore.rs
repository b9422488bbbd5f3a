//! Makes a container that goes on where another was saved.

use std::path::Path;

use bulkhead_image::Store;

use super::Saved;
use crate::launch::{Launched, admit, launch, share};
use crate::network::{NetworkWish, Port};
use crate::relay::Ends;
use crate::state::{Record, Reservation, Status, now_ns, private_dir, remove_files};
use crate::supervise::{Copy, Plan, Wire};
use crate::terminal::{self, DEFAULT_DETACH_KEYS, DetachKeys};
use crate::{Artefacts, Error, Layout, Result, Settings};

/// What may be different from the container that was saved.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// Run in the background.
    pub detach: bool,
    /// Remove everything when it has ended.
    pub auto_remove: bool,
    /// Name of the container.
    pub name: Option<String>,
    /// Ports to publish; `None`: as before.
    pub publish: Option<Vec<Port>>,
    /// The network namespace to be in; `None`: the one of before.
    pub network: Option<NetworkWish>,
    /// What typing detaches.
    pub detach_keys: Option<String>,
}

/// Makes a container from the snapshot in `directory` and runs it. The snapshot stays as it is, for any number of others.
///
/// Must be called before the process has made a thread: the supervisor is a fork of it.
///
/// # Errors
/// The snapshot is damaged, of another version or processor, its image is not here or is damaged, the host's policy forbids
/// it, or what [`crate::launch::run`] can say. Nothing is
/// left.
pub fn restore(
    layout: &Layout,
    store: &Store,
    directory: &Path,
    wishes: &Wishes,
    settings: &Settings,
) -> Result<Launched> {
    let saved = Saved::load(directory)?;
    let artefacts = Artefacts::find(settings)?;
    let image = store.resolve(&saved.record.image_id).map_err(|error| match error {
        bulkhead_image::Error::NotFound { .. } => Error::Usage(format!(
            "the snapshot {} is of a container of the image {} ({}), which is not here: load or pull that first",
            directory.display(),
            saved.record.image,
            saved.record.image_id
        )),
        error => error.into(),
    })?;
    admit(layout, &image, &saved.record.options, settings)?;
    let mut options = saved.record.options.clone();
    (options.detach, options.auto_remove) = (wishes.detach, wishes.auto_remove);
    options.hostname = Some(saved.hostname.clone());
    options.detach_keys = wishes.detach_keys.clone().or(options.detach_keys);
    if let Some(publish) = &wishes.publish {
        if !publish.is_empty() && options.network != NetworkWish::Passt {
            return Err(Error::Usage("-p: the container that was saved has no network of passt".into()));
        }
        options.publish.clone_from(publish);
    }
    if let Some(network) = &wishes.network {
        let both = (network, &options.network);
        if !matches!(both, (NetworkWish::Namespace(_), NetworkWish::Namespace(_))) {
            return Err(Error::Usage(
                "--network: a container that was saved in a network namespace can go on in another one (ns:PATH); the \
                 others keep the network that they had"
                    .into(),
            ));
        }
        options.network.clone_from(network);
    }
    let keys = DetachKeys::parse(options.detach_keys.as_deref().unwrap_or(DEFAULT_DETACH_KEYS))?;
    if options.tty && !options.detach && options.interactive && !terminal::stdin_is_terminal() {
        return Err(Error::Usage(
            "the container that was saved has a terminal: give it one on standard input, or add -d".into(),
        ));
    }
    let directory = std::path::absolute(directory)
        .map_err(|source| Error::Io { what: "cannot find the snapshot".into(), source })?;
    let reservation = Reservation::make(layout, wishes.name.as_deref())?;
    let (files, name) = (reservation.files.clone(), reservation.name.clone());
    let record = Record {
        id: reservation.id.clone(),
        name: name.clone(),
        status: Status::Created,
        exit: None,
        created_ns: now_ns(),
        started_ns: 0,
        finished_ns: 0,
        supervisor_pid: 0,
        monitor_pid: 0,
        guest_id: saved.record.in_guest().to_owned(),
        options,
        ..saved.record.clone()
    };
    let prepare = || {
        private_dir(&files.run)?;
        // In the same order, by which the guest knows them.
        let (shares, _) = share(&files, &record.options, &artefacts.settings)?;
        record.save(&files)?;
        let options = &record.options;
        let mut ends = if options.detach { Ends::default() } else { Ends::own(options.interactive)? };
        ends.detach_keys = options.tty.then_some(keys);
        let terminal = (options.tty && !options.detach).then(terminal::size).flatten();
        let (wire, caller) = Wire::pair()?;
        let plan = Plan {
            layout: layout.clone(),
            lock: reservation.into_lock(),
            artefacts,
            layers: image.layers.clone(),
            hostname: saved.hostname.clone(),
            files: files.clone(),
            spec: serde_json::Value::Null,
            seccomp: None,
            ends,
            caller,
            shares,
            copy: Some(Copy { directory, saved, terminal }),
            record,
        };
        Ok((plan, wire))
    };
    match prepare() {
        Ok((plan, wire)) => launch(plan, wire),
        Err(error) => {
            let _ = remove_files(layout, &files, &name);
            Err(error)
        }
    }
}
