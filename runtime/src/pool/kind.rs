//! Which containers a machine can be for: a digest of all that it was made of, and that cannot be changed any more.

use std::path::PathBuf;

use bulkhead_image::Image;
use sha2::{Digest, Sha256};
use vmm::config::EmptyNetwork;

use super::Wishes;
use crate::monitor::Shape;
use crate::network::NetworkWish;
use crate::options::{RunOptions, StorageLimit};
use crate::state::RECORD_VERSION;
use crate::supervise::disks;
use crate::template::{self, Wanted};
use crate::{Artefacts, Layout, Result, names};

/// Raised when what is sent to a machine that waits changes its meaning.
const VERSION: u32 = 1;
/// Hexadecimal digits.
const DIGITS: usize = 32;

/// The kind of the machine for a container of `image` with these wishes. `None`: it cannot come from a pool, as the machine
/// would have to know more of it.
///
/// # Errors
/// Kernel, agent or monitor cannot be read.
pub(super) fn of(
    layout: &Layout,
    artefacts: &Artefacts,
    image: &Image,
    options: &RunOptions,
) -> Result<Option<String>> {
    let networks = match options.network {
        NetworkWish::None => Vec::new(),
        NetworkWish::Passt => vec![EmptyNetwork::Stream],
        NetworkWish::Namespace(_) => return Ok(None),
    };
    let limited = options.storage_limit != StorageLimit::default();
    if !options.binds.is_empty() || !options.publish.is_empty() || limited {
        return Ok(None);
    }
    let settings = &artefacts.settings;
    let shape = Shape::new(options.memory, options.milli_cpus, &settings.machine);
    let storage = options.storage.unwrap_or(settings.run.storage.0);
    let disks = disks(&image.layers, (storage > 0).then(PathBuf::new));
    let wanted = Wanted { shape: &shape, disks: &disks, shares: false, networks };
    let mut hasher = Sha256::new();
    let mut add = |part: &[u8]| {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    };
    // All that the template would be of, and what this machine has besides.
    add(template::key(layout, artefacts, &wanted)?.as_bytes());
    add(format!("{VERSION} {RECORD_VERSION} {storage} {}", env!("CARGO_PKG_VERSION")).as_bytes());
    add(image.id.to_string().as_bytes());
    for layer in &image.layers {
        add(layer.as_os_str().as_encoded_bytes());
    }
    let mut digits = names::hex(&hasher.finalize());
    digits.truncate(DIGITS);
    Ok(Some(digits))
}

/// What containers have in common that a pool with these wishes is for.
pub(super) fn options(wishes: &Wishes) -> RunOptions {
    RunOptions {
        memory: wishes.memory,
        milli_cpus: wishes.milli_cpus,
        storage: wishes.storage,
        network: wishes.network.clone(),
        ..RunOptions::default()
    }
}

/// How a machine of this kind is called in the list of those that wait.
pub(super) fn entry(kind: &str, container: &str) -> String {
    format!("{kind}.{container}")
}

/// The container's id in such a name.
pub(super) fn container(entry: &str) -> Option<&str> {
    entry.split_once('.').map(|(_, id)| id)
}
