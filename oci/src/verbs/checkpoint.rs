//! `checkpoint`; `restore` is `create` and `start` with an image to go on from.

use std::path::{Path, PathBuf};

use bulkhead_runtime::snapshot::{Draft, Machine, Then};
use bulkhead_runtime::state::now_ns;
use bulkhead_runtime::{Context as _, Error, Result};

use super::{create, guest, in_state, life};
use crate::args::{self, Create, Criu, Restore, Run};
use crate::checkpoint::{CONTAINER, Saved};
use crate::store::{Container, Status};
use crate::{Context, pod};

/// Where runc keeps images when nobody says where.
const DEFAULT: &str = "checkpoint";

fn image_path(flags: &Criu) -> PathBuf {
    flags.image_path.clone().unwrap_or_else(|| DEFAULT.into())
}

/// Saves a container. It is ended and removed afterwards, unless it is to be left running.
///
/// # Errors
/// It is in another state, it has what cannot be saved, or the image cannot be written. It runs on then, and nothing is left.
pub fn checkpoint(context: &Context, wish: &args::Checkpoint) -> Result<()> {
    let pages = [(wish.pre_dump, "--pre-dump"), (wish.status_fd >= 0, "--status-fd")];
    refuse_flags(&wish.criu, &pages)?;
    let container = in_state(context, &wish.id, &[Status::Running, Status::Paused], "checkpoint")?;
    refuse_shared(context, &container)?;
    let what = format!("container {}", container.id);
    let image = image_path(&wish.criu);
    let mut machine = Machine::reach(&container.control(), &guest(&container), &what)?;
    refuse_disks(&container, &machine)?;
    let fittings = container.fittings.clone().ok_or_else(|| {
        Error::Usage(format!(
            "{what} was made by an older bulkhead-oci, which has not noted what it is to be saved with"
        ))
    })?;
    let draft = Draft::fill(&image)?;
    refuse_small(&container, &image)?;
    let then = if wish.leave_running { Then::GoOn } else { Then::StandStill };
    let taken = machine.save(draft.request(true, Vec::new()), then, true)?;
    let saved = Saved {
        taken_ns: now_ns(),
        guest_id: container.in_guest(),
        terminal: container.has_terminal(),
        paused: container.status() == Status::Paused,
        vcpus: taken.shape.vcpus,
        memory_mib: taken.shape.memory_mib,
        fittings,
    };
    draft.finish(CONTAINER, &saved.seal()?, true)?;
    let cost = &taken.summary;
    context.log.debug(&format!(
        "{what} is saved in {}: it stood still for {:.1} ms, its machine for {:.1} ms; {:.1} MiB of memory",
        image.display(),
        cost.pause.as_secs_f64() * 1e3,
        cost.machine_pause_ns as f64 / 1e6,
        cost.memory_bytes as f64 / f64::from(1 << 20)
    ));
    if wish.leave_running {
        return Ok(());
    }
    machine.end();
    life::delete(context, &container.id, true)
}

/// Makes a container that goes on from a checkpoint, as `run` makes one that begins.
///
/// # Errors
/// The image is damaged or does not fit the bundle, or as [`create::run`]; nothing is left then.
pub fn restore(context: &Context, wish: &Restore) -> Result<u8> {
    refuse_flags(&wish.criu, &[])?;
    let labels = [(&wish.lsm_profile, "--lsm-profile"), (&wish.lsm_mount_context, "--lsm-mount-context")];
    for (label, flag) in labels {
        if label.is_some() {
            context.log.debug(&format!("{flag} has no effect: the guest has no such security module"));
        }
    }
    let create = Create {
        image_path: Some(image_path(&wish.criu)),
        bundle: wish.bundle.clone(),
        console_socket: wish.console_socket.clone(),
        pidfd_socket: None,
        pid_file: wish.pid_file.clone(),
        no_pivot: wish.no_pivot,
        no_new_keyring: false,
        preserve_fds: 0,
        root_disk: None,
        id: wish.id.clone(),
    };
    create::run(context, &Run { create, detach: wish.detach, keep: false, no_subreaper: wish.no_subreaper })
}

/// What CRIU can do with the memory of processes, and a machine cannot.
fn refuse_flags(flags: &Criu, more: &[(bool, &str)]) -> Result<()> {
    let common = [
        (flags.lazy_pages, "--lazy-pages"),
        (!flags.page_server.is_empty(), "--page-server"),
        (!flags.parent_path.is_empty(), "--parent-path"),
    ];
    if let Some((_, flag)) = common.iter().chain(more).find(|(given, _)| *given) {
        return Err(Error::Usage(format!(
            "{flag}: a machine is saved and restored as a whole, in one image; there are no earlier or later parts of it"
        )));
    }
    if let Some(other) = flags.empty_ns.iter().find(|kind| *kind != "network") {
        return Err(Error::Usage(format!("--empty-ns {other}: of the network alone there is a new one")));
    }
    Ok(())
}

/// A machine is saved with all that is in it.
fn refuse_shared(context: &Context, container: &Container) -> Result<()> {
    let id = &container.id;
    if let Some(pod) = &container.pod {
        return Err(Error::Usage(format!(
            "container {id} runs in the microVM of container {}: a checkpoint is of a whole microVM, and only of one with a \
             single container",
            pod.owner
        )));
    }
    let others = pod::guests_of(&context.root, id)?;
    if others.is_empty() {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "other containers run in the microVM of container {id}: {}. A checkpoint is of a whole microVM, and only of one with a \
         single container",
        others.join(", ")
    )))
}

/// What is on a disk has to stay as the guest remembers it.
fn refuse_disks(container: &Container, machine: &Machine) -> Result<()> {
    if machine.disks().len() <= machine.empty_drives() {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "container {} has disks (its root file system is on one, or block devices of the host): they would have to be saved \
         with it, which is not done yet. One whose files are shared by a directory can be saved",
        container.id
    )))
}

/// The monitor writes the image, and it is in the container's cgroup: what lies in memory counts against the container's own
/// limit, and the host would kill it for that.
fn refuse_small(container: &Container, image: &Path) -> Result<()> {
    let Some((used, limit)) = container.cgroup.as_ref().and_then(crate::cgroup::Cgroup::memory) else {
        return Ok(());
    };
    let most = used.min(u64::from(container.machine_mib) << 20);
    let place = image.ancestors().find(|place| place.exists() && !place.as_os_str().is_empty());
    let place = place.unwrap_or(Path::new("."));
    let in_memory = crate::config::is_tmpfs(place).context(|| format!("cannot use {}", place.display()))?;
    if !in_memory || used.saturating_add(most) <= limit {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "{} is in memory (a tmpfs), where a checkpoint counts against the limit of the container: of {} MiB, {} are in use. \
         Give --image-path a directory on a disk, or the container more memory",
        image.display(),
        limit >> 20,
        used >> 20
    )))
}
