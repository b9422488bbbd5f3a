//! Which template is the right one: a digest of everything that is in it or that it depends on.
//!
//! Files count by their content, which is read once (as XXH3 with 128 bits, which tells files apart but is no proof against
//! somebody who makes them alike; whoever may write them owns this host's containers anyway): a stamp (device, inode, size, times) remembers the digest of a file that
//! has not changed since. The host counts by its boot: kernel, KVM and processor are the same until the next one.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3Default;

use super::{Wanted, make};
use crate::names::hex;
use crate::{Artefacts, Context, Result, verify};

/// Most stamps kept.
const MOST_STAMPS: usize = 64;
const HEX_DIGITS: usize = 64;

/// The template's name.
pub(super) fn of(home: &Path, artefacts: &Artefacts, wanted: &Wanted<'_>) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut add = |part: &str| {
        hasher.update(part);
        hasher.update([0]);
    };
    add(&vmm::snapshot::file::VERSION.to_string());
    for file in [&artefacts.monitor, &artefacts.kernel, &artefacts.initramfs] {
        add(&digest(home, file)?);
    }
    add(&verify::boot_id()?);
    add(&make::blueprint(&artefacts.settings, wanted)?);
    Ok(hex(&hasher.finalize()))
}

/// Whether a file of this name may be a template.
pub(super) fn is_key(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.len() == HEX_DIGITS && name.iter().all(u8::is_ascii_hexdigit)
}

/// The digest of a file's content.
fn digest(home: &Path, path: &Path) -> Result<String> {
    let what = || format!("cannot read {}", path.display());
    let file = File::open(path).context(what)?;
    let stat = file.metadata().context(what)?;
    let stamp = verify::looks(&stat);
    let stamps = home.join("stamps");
    let remembered = stamps.join(hex(&Sha256::digest(&stamp)));
    if let Ok(digest) = fs::read_to_string(&remembered)
        && digest.len() == HEX_DIGITS / 2
    {
        return Ok(digest);
    }
    let mut hasher = Xxh3Default::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match (&file).read(&mut buffer).context(what)? {
            0 => break,
            read => hasher.update(buffer.get(..read).unwrap_or_default()),
        }
    }
    let digest = hex(&hasher.digest128().to_be_bytes());
    remember(&stamps, &remembered, &digest);
    Ok(digest)
}

/// Best effort: what is not remembered is read again.
fn remember(stamps: &Path, path: &Path, digest: &str) {
    if crate::state::private_dir(stamps).is_err() {
        return;
    }
    if fs::read_dir(stamps).is_ok_and(|entries| entries.count() >= MOST_STAMPS) {
        let _ = fs::remove_dir_all(stamps);
        let _ = crate::state::private_dir(stamps);
    }
    let temporary = path.with_extension(std::process::id().to_string());
    if fs::write(&temporary, digest).and_then(|()| fs::rename(&temporary, path)).is_err() {
        let _ = fs::remove_file(&temporary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::Shape;
    use vmm::config::{DiskConfig, EmptyNetwork};

    fn artefacts(home: &Path) -> Artefacts {
        let file = |name: &str| {
            let path = home.join(name);
            fs::write(&path, name).unwrap();
            path
        };
        let settings = crate::Settings::default();
        Artefacts { monitor: file("monitor"), kernel: file("kernel"), initramfs: file("initramfs"), settings }
    }

    #[test]
    fn everything_that_makes_a_difference_does() {
        let place = tempfile::tempdir().unwrap();
        let artefacts = artefacts(place.path());
        let shape = Shape { vcpus: 1, memory_mib: 512 };
        let (more_vcpus, more_memory) = (Shape { vcpus: 2, ..shape }, Shape { memory_mib: 513, ..shape });
        fn wanted(shape: &Shape) -> Wanted<'_> {
            Wanted { shape, disks: &[], shares: false, networks: Vec::new() }
        }
        let key = |wanted: &Wanted<'_>| of(place.path(), &artefacts, wanted).unwrap();
        let first = key(&wanted(&shape));
        assert!(is_key(OsStr::new(&first)));
        assert_eq!(first, key(&wanted(&shape)));

        let disk = |id: &str, read_only| DiskConfig { id: id.into(), read_only, ..DiskConfig::default() };
        let (written, read) = ([disk("a", false)], [disk("a", true)]);
        let mut all = vec![
            first.clone(),
            key(&wanted(&more_vcpus)),
            key(&wanted(&more_memory)),
            key(&Wanted { shares: true, ..wanted(&shape) }),
            key(&Wanted { disks: &written, ..wanted(&shape) }),
            key(&Wanted { disks: &read, ..wanted(&shape) }),
            key(&Wanted { networks: vec![EmptyNetwork::Tap], ..wanted(&shape) }),
            key(&Wanted { networks: vec![EmptyNetwork::Stream], ..wanted(&shape) }),
            key(&Wanted { networks: vec![EmptyNetwork::Tap; 2], ..wanted(&shape) }),
        ];
        // What is in a drive makes none.
        let full = [DiskConfig { path: Some("/x".into()), ..disk("a", false) }];
        assert_eq!(key(&Wanted { disks: &full, ..wanted(&shape) }), all[4]);
        // A file counts by its content: the same in a new file is the same, another in the old one is not.
        fs::remove_file(&artefacts.kernel).unwrap();
        fs::write(&artefacts.kernel, "kernel").unwrap();
        assert_eq!(key(&wanted(&shape)), first);
        for file in [&artefacts.kernel, &artefacts.initramfs, &artefacts.monitor] {
            let before = fs::read(file).unwrap();
            fs::write(file, "another").unwrap();
            all.push(key(&wanted(&shape)));
            fs::write(file, before).unwrap();
        }
        assert_eq!(key(&wanted(&shape)), first);
        let mut other = artefacts.clone();
        other.settings.machine.kernel_parameters = "debug".into();
        all.push(of(place.path(), &other, &wanted(&shape)).unwrap());
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn stamps_do_not_pile_up() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("file");
        for number in 0..3 * MOST_STAMPS {
            fs::write(&file, number.to_string()).unwrap();
            digest(place.path(), &file).unwrap();
        }
        assert!(fs::read_dir(place.path().join("stamps")).unwrap().count() <= MOST_STAMPS);
    }
}
