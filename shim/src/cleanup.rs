//! `delete`: what containerd runs when the process that served a container has gone without removing it.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};

use crate::events::timestamp;
use crate::oci::Oci;
use crate::reap::Reaper;
use crate::start::SOCKETS;
use crate::{Flags, serve};

/// Status of a container whose end nobody has seen: as killed.
const KILLED: u32 = 137;

/// Removes the socket of the process that served the bundle, if that has gone: one that is killed leaves it.
fn forget_socket(bundle: &Path) {
    let Ok(address) = fs::read_to_string(bundle.join("address")) else { return };
    let path = Path::new(address.trim().trim_start_matches("unix://"));
    // Others of the pod may have one still, or a new one.
    if path.starts_with(SOCKETS) && UnixStream::connect(path).is_err() {
        let _ = fs::remove_file(path);
    }
}

/// Ends the container, removes what is left of it and tells containerd.
///
/// # Errors
/// Something is left.
pub fn delete(flags: &Flags) -> Result<()> {
    ensure!(!flags.bundle.is_empty(), "delete needs -bundle");
    let reaper = Arc::new(Reaper::default());
    serve::collect(&reaper)?;
    Oci::new(&flags.namespace, reaper)?.clean_up(&flags.id, Path::new(&flags.bundle))?;
    forget_socket(Path::new(&flags.bundle));
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..DeleteResponse::default()
    };
    let bytes = response.write_to_bytes().context("encode the answer")?;
    std::io::stdout().write_all(&bytes).context("answer containerd")
}
