//! Copies a disk as it is at one moment, while the guest goes on writing to it: what it is about to write over is copied first.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::snapshot::disk::{Packer, Saved};
use crate::sync::lock;

/// What is copied at a time, in bytes.
pub const CLUSTER: u64 = 64 << 10;

/// A copy under way. It stands for the disk at the moment it was made.
#[derive(Debug)]
pub struct Backup {
    source: File,
    length: u64,
    /// What only the difference from is copied.
    base: Option<Saved>,
    progress: Mutex<Progress>,
}

/// Where a copy goes.
#[derive(Debug)]
enum Target {
    Raw(File),
    Packed(Packer),
}

/// How a disk is copied.
#[derive(Debug, Default)]
pub struct Manner {
    /// Each cluster is compressed.
    pub compress: bool,
    /// Only what differs from this.
    pub base: Option<Saved>,
}

#[derive(Debug)]
struct Progress {
    target: Target,
    /// A bit for each cluster that is copied, or was found to be zero.
    done: Vec<u64>,
    digest: Digest,
    /// Why the copy is of no use.
    failed: Option<io::Error>,
}

/// Tells a disk's content from any other that came about by accident. It does not depend on the order in which clusters are added, and
/// clusters of zeros count for nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Digest(u64);

impl Digest {
    /// Adds cluster `number`.
    pub fn add(&mut self, number: u64, bytes: &[u8]) {
        if !is_zero(bytes) {
            self.0 = self.0.wrapping_add(xxh3_64_with_seed(bytes, number));
        }
    }

    /// As a number.
    pub fn value(self) -> u64 {
        self.0
    }
}

impl Backup {
    /// Begins a copy of `source`, whose first `length` bytes are the disk, in the file `target`, which is empty. It is packed when
    /// `manner` says anything.
    ///
    /// # Errors
    /// When that cannot be made as long, or the base is of another disk.
    pub fn new(source: File, length: u64, target: File, manner: Manner) -> io::Result<Self> {
        let Manner { compress, base } = manner;
        if base.as_ref().is_some_and(|base| base.length() != length) {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the base's disk has another size"));
        }
        let target = if compress || base.is_some() {
            Target::Packed(Packer::new(target, length, compress, base.is_some()))
        } else {
            target.set_len(length)?;
            Target::Raw(target)
        };
        let words = usize::try_from(length.div_ceil(CLUSTER).div_ceil(64)).map_err(io::Error::other)?;
        let progress = Progress { target, done: vec![0; words], digest: Digest::default(), failed: None };
        Ok(Self { source, length, base, progress: Mutex::new(progress) })
    }

    /// The guest is about to change `length` bytes at `offset`: they are copied first. A copy that fails is no reason to keep it
    /// from writing.
    pub fn preserve(&self, offset: u64, length: u64) {
        if length == 0 {
            return;
        }
        let last = offset.saturating_add(length - 1).min(self.length.saturating_sub(1)) / CLUSTER;
        let mut buffer = Vec::new();
        for number in offset / CLUSTER..=last {
            self.copy(number, &mut buffer);
        }
    }

    /// Copies all that is left. Called once, in a thread of its own. `given_up` is asked again and again.
    ///
    /// # Errors
    /// Why the copy is of no use.
    pub fn run(&self, given_up: impl Fn() -> bool) -> io::Result<Digest> {
        let mut buffer = Vec::new();
        // What the base has may be gone by now.
        for number in self.base.as_ref().map_or_else(|| Ok(Vec::new()), Saved::clusters)? {
            if given_up() {
                return Err(ErrorKind::Interrupted.into());
            }
            self.copy(number, &mut buffer);
        }
        let mut at = 0;
        while at < self.length {
            let start = match self.seek(at, libc::SEEK_DATA) {
                Ok(start) => start,
                // No data after this.
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break,
                Err(error) => return Err(error),
            };
            let end = self.seek(start, libc::SEEK_HOLE)?.min(self.length);
            for number in start / CLUSTER..end.div_ceil(CLUSTER) {
                if given_up() {
                    return Err(ErrorKind::Interrupted.into());
                }
                self.copy(number, &mut buffer);
            }
            at = end.max(start + 1);
        }
        let mut progress = lock(&self.progress);
        // Whatever is written from now on is not part of it.
        progress.done.fill(u64::MAX);
        if let Some(error) = progress.failed.take() {
            return Err(error);
        }
        if let Target::Packed(packer) = &mut progress.target {
            packer.finish()?;
        }
        Ok(progress.digest)
    }

    /// Makes the copy survive a loss of power.
    ///
    /// # Errors
    /// When the host cannot.
    pub fn sync(&self) -> io::Result<()> {
        match &lock(&self.progress).target {
            Target::Raw(file) => file.sync_all(),
            Target::Packed(packer) => packer.sync(),
        }
    }

    fn copy(&self, number: u64, buffer: &mut Vec<u8>) {
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        let mut progress = lock(&self.progress);
        let Some(done) = progress.done.get_mut(word).filter(|done| **done & bit == 0) else { return };
        *done |= bit;
        if progress.failed.is_some() {
            return;
        }
        let offset = number * CLUSTER;
        buffer.resize(CLUSTER.min(self.length.saturating_sub(offset)) as usize, 0);
        let copied = read_at(&self.source, buffer, offset).and_then(|()| match &mut progress.target {
            Target::Raw(_) if is_zero(buffer) => Ok(()),
            Target::Raw(file) => file.write_all_at(buffer, offset),
            Target::Packed(packer) => {
                if let Some(base) = &self.base {
                    let mut before = vec![0; buffer.len()];
                    base.read(number, &mut before)?;
                    if before == *buffer {
                        return Ok(());
                    }
                }
                packer.put(number, buffer)
            }
        });
        match copied {
            Ok(()) => progress.digest.add(number, buffer),
            Err(error) => progress.failed = Some(error),
        }
    }

    fn seek(&self, from: u64, whence: libc::c_int) -> io::Result<u64> {
        let from = libc::off_t::try_from(from).map_err(io::Error::other)?;
        // SAFETY: takes no pointers. The position in the file is used by nobody: all else gives its own.
        let at = unsafe { libc::lseek(self.source.as_raw_fd(), from, whence) };
        match u64::try_from(at) {
            Ok(at) => Ok(at),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

/// Copies a disk of `length` bytes to the new file `to`, holes and all, and answers the digest of what was copied.
///
/// # Errors
/// When one cannot be read or the other not written; it is removed then.
pub fn copy_file(source: File, length: u64, to: &Path) -> io::Result<Digest> {
    let target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    let backup = Backup::new(source, length, target, Manner::default())
        .inspect_err(|_| drop(std::fs::remove_file(to)))?;
    backup.run(|| false).inspect_err(|_| drop(std::fs::remove_file(to)))
}

/// Fills `buffer` from `offset` on; after the file's end with zeros.
pub(crate) fn read_at(file: &File, buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    let mut rest = buffer;
    while !rest.is_empty() {
        match file.read_at(rest, offset) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(count) => {
                offset += count as u64;
                rest = rest.split_at_mut(count).1;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: any eight bytes are a number.
    let (head, words, tail) = unsafe { bytes.align_to::<u64>() };
    head.iter().chain(tail).all(|byte| *byte == 0) && words.iter().all(|word| *word == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    fn copy(from: &Path, to: &Path) -> io::Result<Digest> {
        let source = File::open(from)?;
        let length = source.metadata()?.len();
        copy_file(source, length, to)
    }

    fn disk(directory: &Path, clusters: u64) -> (File, std::path::PathBuf) {
        let path = directory.join("disk");
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(clusters * CLUSTER + 512).unwrap();
        (file, path)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever is written when: the copy is the disk as it was, and its digest that of a copy taken at rest.
        #[test]
        fn what_is_written_meanwhile_is_not_in_it(
            before in prop::collection::vec((0_u64..40 * CLUSTER, 1_u64..3 * CLUSTER, any::<u8>()), 0..8),
            during in prop::collection::vec((0_u64..40 * CLUSTER, 1_u64..3 * CLUSTER, any::<u8>()), 0..8),
            split in 0_usize..8,
        ) {
            let place = tempfile::tempdir().unwrap();
            let (file, path) = disk(place.path(), 40);
            let length = file.metadata().unwrap().len();
            let write = |(offset, count, value): &(u64, u64, u8)| {
                let count = (*count).min(length - offset);
                file.write_all_at(&vec![*value; count as usize], *offset).unwrap();
            };
            before.iter().for_each(write);
            let still = std::fs::read(&path).unwrap();
            let expected = copy(&path, &place.path().join("at rest")).unwrap();

            let target = place.path().join("copy");
            let to = File::create(&target).unwrap();
            let backup = Backup::new(File::open(&path).unwrap(), length, to, Manner::default()).unwrap();
            let (early, late) = during.split_at(split.min(during.len()));
            for change in early {
                backup.preserve(change.0, change.1);
                write(change);
            }
            let digest = backup.run(|| false).unwrap();
            for change in late {
                backup.preserve(change.0, change.1);
                write(change);
            }
            prop_assert!(std::fs::read(&target).unwrap() == still);
            prop_assert_eq!(digest, expected);
        }
    }

    #[test]
    fn holes_stay_holes_and_one_changed_byte_is_another_digest() {
        let place = tempfile::tempdir().unwrap();
        let (file, path) = disk(place.path(), 1000);
        file.write_all_at(b"word", 500 * CLUSTER + 9).unwrap();
        // Zeros that are written out take no space in the copy.
        file.write_all_at(&vec![0; 8 * CLUSTER as usize], 10 * CLUSTER).unwrap();
        let target = place.path().join("copy");
        let digest = copy(&path, &target).unwrap();
        assert!(std::fs::read(&path).unwrap() == std::fs::read(&target).unwrap());
        assert!(std::fs::metadata(&target).unwrap().blocks() * 512 <= 2 * CLUSTER);
        assert_ne!(digest, Digest::default());
        file.write_all_at(b"w0rd", 500 * CLUSTER + 9).unwrap();
        assert_ne!(copy(&path, &place.path().join("other")).unwrap(), digest);
        assert!(copy(&path, &target).is_err(), "what is there is not written over");
    }

    #[test]
    fn a_copy_that_is_given_up_or_fails_says_so_and_lets_the_guest_write() {
        let place = tempfile::tempdir().unwrap();
        let (file, path) = disk(place.path(), 4);
        file.write_all_at(&[1; 4096], 0).unwrap();
        let length = file.metadata().unwrap().len();
        let open = || File::open(&path).unwrap();
        let to = File::create(place.path().join("a")).unwrap();
        let backup = Backup::new(open(), length, to, Manner::default()).unwrap();
        assert_eq!(backup.run(|| true).unwrap_err().kind(), ErrorKind::Interrupted);

        let full = Backup {
            source: open(),
            length,
            base: None,
            progress: Mutex::new(Progress {
                target: Target::Raw(OpenOptions::new().write(true).open("/dev/full").unwrap()),
                done: vec![0; 1],
                digest: Digest::default(),
                failed: None,
            }),
        };
        full.preserve(0, 512);
        full.preserve(length - 1, u64::MAX);
        assert_eq!(full.run(|| false).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }
}
