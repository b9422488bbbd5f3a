//! The process that stays: serves containerd's calls until the last task is gone.

use std::collections::HashMap;
use std::env;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use anyhow::{Context, Result, anyhow};
use containerd_shim_protos::sandbox_sync::create_sandbox;
use containerd_shim_protos::shim_sync::{Task, create_task};
use containerd_shim_protos::ttrpc::Server;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::Flags;
use crate::events::Publisher;
use crate::oci::Oci;
use crate::reap::Reaper;
use crate::sandbox::{self, Slot};
use crate::service::Service;
use crate::start::LISTENER;
use crate::tasks::Tasks;

/// Where containerd takes events.
const ADDRESS: &str = "TTRPC_ADDRESS";
/// The service that containerd 1.6, 1.7 and 2 all ask for when a shim answers `start` with a bare address; the library
/// knows it by its new name, messages and methods being the same.
const SERVICE: &str = "containerd.task.v2.Task";
const NEW_NAME: &str = "containerd.task.v3.Task";

/// Serves on the inherited socket.
///
/// # Errors
/// There is none.
pub fn serve(flags: &Flags) -> Result<()> {
    // SAFETY: `start` has put the socket there, and nobody else in this process knows of it.
    let socket = unsafe { UnixListener::from_raw_fd(LISTENER) };
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)
        .context("descriptor 3 is no socket: containerd runs this program")?;
    let path = socket.local_addr().ok().and_then(|address| address.as_pathname().map(Path::to_owned));
    let events = env::var(ADDRESS).ok().filter(|address| !address.is_empty());
    let events = events.unwrap_or_else(|| format!("{}.ttrpc", flags.address));
    // SAFETY: the process has one thread so far. What it starts is not to be told of containerd.
    unsafe { env::remove_var(ADDRESS) };

    let reaper = Arc::new(Reaper::default());
    collect(&reaper)?;
    let publisher = Publisher::start(events, flags.namespace.clone());
    let oci = Oci::new(&flags.namespace, reaper)?;
    let pod = Arc::new(Slot::default());
    let itself = Arc::clone(&pod);
    let tasks = Tasks::new(oci, move |event| {
        if !itself.is(event.id()) {
            publisher.publish(event);
        }
    });
    let (done, end) = channel();
    let sandbox = sandbox::Service::new(Arc::clone(&pod), Arc::clone(&tasks), done.clone());
    let task: Arc<dyn Task + Send + Sync> = Arc::new(Service::new(tasks, pod, done));
    let methods = create_task(task).into_iter();
    let methods: HashMap<_, _> =
        methods.map(|(path, method)| (path.replace(NEW_NAME, SERVICE), method)).collect();
    let mut server = Server::new()
        .add_listener(socket.into_raw_fd())
        .map_err(|error| anyhow!("cannot serve: {error}"))?
        .register_service(methods)
        .register_service(create_sandbox(Arc::new(sandbox)));
    server.start().map_err(|error| anyhow!("cannot serve: {error}"))?;
    let _ = end.recv();
    // The answer to the call that has ended this is on its way in another thread.
    std::thread::sleep(std::time::Duration::from_millis(20));
    if let Some(path) = path {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// Becomes the parent of all that its children leave behind, and collects whatever ends.
///
/// # Errors
/// The kernel refuses.
pub fn collect(reaper: &Arc<Reaper>) -> Result<()> {
    // SAFETY: prctl with integers only.
    let result = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    if result < 0 {
        return Err(std::io::Error::last_os_error()).context("become the parent of orphans");
    }
    // The others are caught so that they end nothing: containers are ended by containerd's calls.
    let mut signals = Signals::new([SIGCHLD, SIGTERM, SIGINT, SIGHUP]).context("catch signals")?;
    let reaper = Arc::clone(reaper);
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if signal == SIGCHLD {
                reaper.reap();
            }
        }
    });
    Ok(())
}
