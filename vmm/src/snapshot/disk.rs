//! Disks' copies in a snapshot. A whole one is the file `disk-ID`, a raw image. One that is compressed, or that has only what
//! differs from the same disk in the snapshot's base, is the file `disk-ID.packed`:
//!
//! | what | bytes |
//! |---|---|
//! | clusters of 64 KiB, in any order, each as it is or as a Zstandard frame | |
//! | an index, in the form of `state` | |
//! | where the index begins | 8, least significant first |
//! | `BLKHDISK` | 8 |

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{DISK, Extent, Opened, file, frame};
use crate::arch::layout::PAGE;
use crate::devices::virtio::block::backup::{self, CLUSTER, Digest, is_zero, read_at};

/// How the names of packed copies end.
pub const PACKED: &str = ".packed";
const MAGIC: [u8; 8] = *b"BLKHDISK";
const FOOTER: u64 = 16;
/// Longest index that is read: a disk of 1 TiB, all of it written, has one of some 200 MiB.
const MAX_INDEX: u64 = 256 << 20;

/// What is in a packed copy.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Index {
    /// Of the disk, in bytes.
    length: u64,
    /// Each cluster is a Zstandard frame.
    compressed: bool,
    /// What is not in it is in the copy of the same disk in the base; otherwise it is zero.
    based: bool,
    /// By number: offset in the file, and length there. No bytes: it is zero.
    clusters: BTreeMap<u64, (u64, u32)>,
}

/// Writes a packed copy, cluster by cluster.
#[derive(Debug)]
pub struct Packer {
    file: File,
    end: u64,
    index: Index,
}

impl Packer {
    /// Begins one of a disk of `length` bytes in the empty `file`.
    pub fn new(file: File, length: u64, compressed: bool, based: bool) -> Self {
        Self { file, end: 0, index: Index { length, compressed, based, clusters: BTreeMap::new() } }
    }

    /// Adds cluster `number`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put(&mut self, number: u64, bytes: &[u8]) -> io::Result<()> {
        let compressed;
        let bytes = match (is_zero(bytes), self.index.compressed) {
            (true, _) => &[],
            (false, true) => {
                compressed = frame::compress(bytes);
                compressed.as_slice()
            }
            (false, false) => bytes,
        };
        if bytes.is_empty() && !self.index.based {
            return Ok(());
        }
        self.file.write_all_at(bytes, self.end)?;
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.index.clusters.insert(number, (self.end, length));
        self.end += u64::from(length);
        Ok(())
    }

    /// Adds the index: it is complete.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(&mut self) -> io::Result<()> {
        let mut tail = file::encode(&self.index)?;
        tail.extend(self.end.to_le_bytes());
        tail.extend(MAGIC);
        self.file.write_all_at(&tail, self.end)
    }

    /// Makes it survive a loss of power.
    ///
    /// # Errors
    /// When the host cannot.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// A disk's copy, opened: one file, or a packed one and those below it.
#[derive(Debug)]
pub struct Saved {
    length: u64,
    /// The topmost first.
    packed: Vec<(File, Index)>,
    /// The lowest, if it is a raw image.
    raw: Option<File>,
}

/// The copy of disk `id` in the base of a snapshot that is to be written. A base without the disk is none for it.
///
/// # Errors
/// As [`Saved::open`], but for one that is not there.
pub fn of_base(base: Option<&Opened>, id: &str) -> io::Result<Option<Saved>> {
    match base.map(|base| Saved::open(base, id)) {
        Some(Err(error)) if error.kind() == ErrorKind::NotFound => Ok(None),
        saved => saved.transpose(),
    }
}

impl Saved {
    /// Opens the copy of disk `id` in a snapshot.
    ///
    /// # Errors
    /// There is none, it is damaged, or what it is a difference from is not there.
    pub fn open(snapshot: &Opened, id: &str) -> io::Result<Self> {
        let mut saved = Self { length: 0, packed: Vec::new(), raw: None };
        let mut at = Some(snapshot);
        while let Some(snapshot) = at {
            let raw = format!("{DISK}{id}");
            match snapshot.file(&raw) {
                Ok(file) => {
                    saved.fits(file.metadata()?.len())?;
                    saved.raw = Some(file);
                    return Ok(saved);
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            let packed = format!("{raw}{PACKED}");
            let named = |error: io::Error| {
                let path = snapshot.directory.join(&packed);
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            };
            let file = snapshot.file(&packed).map_err(named)?;
            let index = read_index(&file).map_err(named)?;
            saved.fits(index.length)?;
            let based = index.based;
            saved.packed.push((file, index));
            if !based {
                return Ok(saved);
            }
            at = snapshot.below.as_deref();
        }
        Err(damaged("a disk's copy has only a part of it, and the snapshot no base"))
    }

    /// A packed copy alone, for what wants to see how it is read.
    ///
    /// # Errors
    /// It is damaged, or a difference from another.
    #[doc(hidden)]
    pub fn alone(file: File) -> io::Result<Self> {
        let index = read_index(&file)?;
        if index.based {
            return Err(damaged("it is a difference"));
        }
        Ok(Self { length: index.length, packed: vec![(file, index)], raw: None })
    }

    fn fits(&mut self, length: u64) -> io::Result<()> {
        if !self.packed.is_empty() && length != self.length {
            return Err(damaged("a disk's copy has another length than the one in the base"));
        }
        self.length = length;
        Ok(())
    }

    /// Size of the disk in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Numbers of the clusters that may be anything but zeros, in order.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn clusters(&self) -> io::Result<Vec<u64>> {
        let mut numbers: Vec<u64> =
            self.packed.iter().flat_map(|(_, index)| index.clusters.keys().copied()).collect();
        if let Some(raw) = &self.raw {
            for extent in data_of(raw, self.length)? {
                numbers.extend(extent.offset / CLUSTER..(extent.offset + extent.length).div_ceil(CLUSTER));
            }
        }
        numbers.sort_unstable();
        numbers.dedup();
        numbers.retain(|number| *number < self.length.div_ceil(CLUSTER));
        Ok(numbers)
    }

    /// Fills `buffer` with cluster `number`, of which it must have the length.
    ///
    /// # Errors
    /// When it cannot be read, or is damaged.
    pub fn read(&self, number: u64, buffer: &mut [u8]) -> io::Result<()> {
        for (file, index) in &self.packed {
            match index.clusters.get(&number) {
                None => {}
                Some((_, 0)) => {
                    buffer.fill(0);
                    return Ok(());
                }
                Some((offset, length)) if index.compressed => {
                    let mut packed = vec![0; *length as usize];
                    file.read_exact_at(&mut packed, *offset)?;
                    return frame::decompress(&mut packed.as_slice(), buffer);
                }
                Some((offset, _)) => return file.read_exact_at(buffer, *offset),
            }
        }
        match &self.raw {
            Some(raw) => read_at(raw, buffer, number.saturating_mul(CLUSTER)),
            None => {
                buffer.fill(0);
                Ok(())
            }
        }
    }

    /// Makes the disk anew in the new file `to`, holes and all; answers the digest of what is in it.
    ///
    /// # Errors
    /// When one cannot be read or the other not written; it is removed then.
    pub fn copy(self, to: &Path) -> io::Result<Digest> {
        match self {
            Self { length, packed, raw: Some(raw) } if packed.is_empty() => {
                backup::copy_file(raw, length, to)
            }
            saved => saved.unpack(to).inspect_err(|_| drop(std::fs::remove_file(to))),
        }
    }

    fn unpack(&self, to: &Path) -> io::Result<Digest> {
        let target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
        target.set_len(self.length)?;
        let mut digest = Digest::default();
        let mut buffer = Vec::new();
        for number in self.clusters()? {
            let offset = number * CLUSTER;
            buffer.resize(CLUSTER.min(self.length.saturating_sub(offset)) as usize, 0);
            self.read(number, &mut buffer)?;
            if !is_zero(&buffer) {
                target.write_all_at(&buffer, offset)?;
                digest.add(number, &buffer);
            }
        }
        Ok(digest)
    }
}

/// What of a raw copy of `length` bytes is there.
fn data_of(file: &File, length: u64) -> io::Result<Vec<Extent>> {
    let seek = |from: u64, whence| {
        let from = libc::off_t::try_from(from).map_err(io::Error::other)?;
        // SAFETY: takes no pointers. Nobody else uses the file's position.
        let at = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
        u64::try_from(at).map_err(|_| io::Error::last_os_error())
    };
    let mut found = Vec::new();
    let mut position = 0;
    while position < length {
        let start = match seek(position, libc::SEEK_DATA) {
            Ok(start) => start / PAGE * PAGE,
            // No data after this.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break,
            Err(error) => return Err(error),
        };
        let end = seek(start, libc::SEEK_HOLE)?.next_multiple_of(PAGE).min(length);
        if end <= start {
            return Err(io::Error::new(ErrorKind::InvalidData, "the disk's holes are not where they were"));
        }
        found.push(Extent { offset: start, length: end - start });
        position = end;
    }
    Ok(found)
}

fn read_index(file: &File) -> io::Result<Index> {
    let length = file.metadata()?.len();
    let tail = length.checked_sub(FOOTER).ok_or_else(|| damaged("it is cut off"))?;
    let mut footer = [0; FOOTER as usize];
    file.read_exact_at(&mut footer, tail)?;
    let (start, magic) = footer.split_at(8);
    let start = <[u8; 8]>::try_from(start).map_or(0, u64::from_le_bytes);
    let size = tail.checked_sub(start).filter(|size| magic == MAGIC && *size <= MAX_INDEX);
    let size = size.ok_or_else(|| damaged("it is cut off, or no disk's copy"))?;
    let mut text = vec![0; usize::try_from(size).map_err(io::Error::other)?];
    file.read_exact_at(&mut text, start)?;
    let index: Index = file::decode(&text).map_err(|error| damaged(&format!("its index: {error}")))?;
    let most = 2 * CLUSTER;
    let good = |(number, (offset, length)): (&u64, &(u64, u32))| {
        let length = u64::from(*length);
        let whole = CLUSTER.min(index.length.saturating_sub(number.saturating_mul(CLUSTER)));
        let fits = length == 0 || if index.compressed { length <= most } else { length == whole };
        whole > 0 && fits && offset.checked_add(length).is_some_and(|end| end <= start)
    };
    if index.clusters.iter().all(good) { Ok(index) } else { Err(damaged("its index makes no sense")) }
}

fn damaged(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}
