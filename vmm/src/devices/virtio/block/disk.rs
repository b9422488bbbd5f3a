//! What is behind a block device: a raw file, or several files one after the other.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::backup::{Backup, Manner};
use super::gpt;
use crate::sync::lock;

/// Unit of all positions in virtio block.
pub const SECTOR: u64 = 512;
/// Layers of a composite disk begin and end at multiples of this.
pub const LAYER_ALIGNMENT: u64 = 4096;
/// Most buffers of one preadv or pwritev.
const MAX_IOVECS: usize = 1024;

/// A disk that can be read, and perhaps written.
#[derive(Debug)]
pub enum Disk {
    /// One file, from its beginning to its end.
    Raw(RawDisk),
    /// Pieces of files and memory, read-only.
    Composite(CompositeDisk),
}

/// See [`Disk::Raw`].
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    length: u64,
    read_only: bool,
    /// Wants to know what is about to be written over.
    backup: Mutex<Option<Arc<Backup>>>,
}

/// See [`Disk::Composite`].
#[derive(Debug)]
pub struct CompositeDisk {
    /// In order, without gaps.
    pieces: Vec<Piece>,
    length: u64,
}

#[derive(Debug)]
struct Piece {
    start: u64,
    length: u64,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Memory(Vec<u8>),
    /// A file, and zeros after its end.
    File(File),
}

impl Disk {
    /// Opens a raw image or block device.
    ///
    /// # Errors
    /// When it cannot be opened that way, or is empty.
    pub fn raw(path: &Path, read_only: bool) -> io::Result<Self> {
        Self::raw_of(open(path, !read_only)?, read_only)
    }

    /// The same of one that is open already.
    ///
    /// # Errors
    /// When it is empty.
    pub fn raw_of(mut file: File, read_only: bool) -> io::Result<Self> {
        // Unlike the file's metadata, this is right for block devices too.
        let length = file.seek(SeekFrom::End(0))? / SECTOR * SECTOR;
        if length == 0 {
            return Err(io::Error::new(ErrorKind::InvalidData, "it holds less than one sector (512 bytes)"));
        }
        Ok(Self::Raw(RawDisk { file, length, read_only, backup: Mutex::default() }))
    }

    /// Shows each of `layers` as a partition of one read-only disk. `id` makes the disk's identifiers.
    ///
    /// # Errors
    /// The path that cannot be opened, and why.
    pub fn composite(id: &str, layers: &[PathBuf]) -> Result<Self, (PathBuf, io::Error)> {
        Self::composite_of(id, layers, |path| open(path, false))
    }

    /// The same of layers that `open` opens.
    ///
    /// # Errors
    /// The path that cannot be opened, and why.
    pub fn composite_of(
        id: &str,
        layers: &[PathBuf],
        mut open: impl FnMut(&Path) -> io::Result<File>,
    ) -> Result<Self, (PathBuf, io::Error)> {
        let mut files = Vec::with_capacity(layers.len());
        for path in layers {
            let mut open = || {
                let mut file = open(path)?;
                let length = file.seek(SeekFrom::End(0))?.next_multiple_of(LAYER_ALIGNMENT);
                if length == 0 {
                    return Err(io::Error::new(ErrorKind::InvalidData, "it is empty"));
                }
                Ok((file, length))
            };
            files.push(open().map_err(|error| (path.clone(), error))?);
        }
        let lengths: Vec<u64> = files.iter().map(|(_, length)| *length).collect();
        let table = gpt::build(id, &lengths);
        let mut pieces = Vec::with_capacity(files.len() + 2);
        let mut start = 0;
        let mut push = |length, source| {
            pieces.push(Piece { start, length, source });
            start += length;
        };
        push(table.primary.len() as u64, Source::Memory(table.primary));
        for (file, length) in files {
            push(length, Source::File(file));
        }
        push(table.backup.len() as u64, Source::Memory(table.backup));
        Ok(Self::Composite(CompositeDisk { pieces, length: start }))
    }

    /// Its size in bytes, a multiple of [`SECTOR`].
    pub fn length(&self) -> u64 {
        match self {
            Self::Raw(disk) => disk.length,
            Self::Composite(disk) => disk.length,
        }
    }

    /// What tells its files, or the devices behind their nodes, from all others.
    pub fn identities(&self) -> Vec<(u64, u64)> {
        let of = |file: &File| {
            let about = file.metadata().ok()?;
            let device = about.file_type().is_block_device();
            Some(if device { (u64::MAX, about.rdev()) } else { (about.dev(), about.ino()) })
        };
        match self {
            Self::Raw(disk) => of(&disk.file).into_iter().collect(),
            Self::Composite(disk) => disk
                .pieces
                .iter()
                .filter_map(|piece| match &piece.source {
                    Source::File(file) => of(file),
                    Source::Memory(_) => None,
                })
                .collect(),
        }
    }

    /// Whether it can only be read.
    pub fn read_only(&self) -> bool {
        match self {
            Self::Raw(disk) => disk.read_only,
            Self::Composite(_) => true,
        }
    }

    /// Checks that `length` bytes at `offset` are on the disk.
    ///
    /// # Errors
    /// When they are not.
    pub fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.length() => Ok(()),
            _ => Err(ErrorKind::InvalidInput.into()),
        }
    }

    /// Fills `buffers` from `offset` on.
    ///
    /// # Safety
    /// The buffers must be valid for writing, and nobody may rely on what they hold: guest memory, not the monitor's own.
    ///
    /// # Errors
    /// When the host cannot read, or the range is not on the disk.
    pub unsafe fn read(&self, offset: u64, buffers: Vec<libc::iovec>) -> io::Result<()> {
        let length: usize = buffers.iter().map(|buffer| buffer.iov_len).sum();
        self.check(offset, length as u64)?;
        match self {
            // SAFETY: the caller's promise.
            Self::Raw(disk) => unsafe { transfer(&disk.file, offset, buffers, Direction::Read) },
            // SAFETY: the caller's promise.
            Self::Composite(disk) => unsafe { disk.read(offset, buffers) },
        }
    }

    /// Stores `buffers` at `offset`.
    ///
    /// # Safety
    /// The buffers must be valid for reading.
    ///
    /// # Errors
    /// When the disk is read-only, the host cannot write, or the range is not on the disk.
    pub unsafe fn write(&self, offset: u64, buffers: Vec<libc::iovec>) -> io::Result<()> {
        let length: usize = buffers.iter().map(|buffer| buffer.iov_len).sum();
        self.check(offset, length as u64)?;
        match self {
            Self::Raw(disk) if !disk.read_only => {
                disk.preserve(offset, length as u64);
                // SAFETY: the caller's promise.
                unsafe { transfer(&disk.file, offset, buffers, Direction::Write) }
            }
            _ => Err(ErrorKind::ReadOnlyFilesystem.into()),
        }
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// When the host cannot.
    pub fn flush(&self) -> io::Result<()> {
        match self {
            Self::Raw(disk) if !disk.read_only => disk.file.sync_data(),
            _ => Ok(()),
        }
    }

    /// Makes a range zero; gives its space back to the host's file system if `punch`.
    ///
    /// # Errors
    /// When the disk is read-only, the range is not on it, or the host's file system cannot.
    pub fn zero(&self, offset: u64, length: u64, punch: bool) -> io::Result<()> {
        self.check(offset, length)?;
        let Self::Raw(disk @ RawDisk { file, read_only: false, .. }) = self else {
            return Err(ErrorKind::ReadOnlyFilesystem.into());
        };
        if length == 0 {
            return Ok(());
        }
        disk.preserve(offset, length);
        let (offset, length) = (to_off(offset)?, to_off(length)?);
        let allocate = |mode| {
            let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: plain numbers and a descriptor that is open.
            let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) };
            if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        // Not every file system that can punch holes can zero ranges: tmpfs cannot. A hole reads as zeros too.
        match if punch { allocate(libc::FALLOC_FL_PUNCH_HOLE) } else { allocate(libc::FALLOC_FL_ZERO_RANGE) }
        {
            Err(error) if !punch && error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                allocate(libc::FALLOC_FL_PUNCH_HOLE)
            }
            result => result,
        }
    }
}

impl Disk {
    /// Begins to copy the disk, as it is now, to the file `target`, which is empty: see [`Backup::run`], after which
    /// [`Self::end_backup`] is due.
    ///
    /// # Errors
    /// When the file cannot be made as long, or the disk is one that nobody can write to: there is no need to copy it.
    pub fn backup(&self, target: File, manner: Manner) -> io::Result<Arc<Backup>> {
        let Self::Raw(disk @ RawDisk { read_only: false, .. }) = self else {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the guest cannot write to it"));
        };
        let backup = Arc::new(Backup::new(disk.file.try_clone()?, disk.length, target, manner)?);
        *lock(&disk.backup) = Some(Arc::clone(&backup));
        Ok(backup)
    }

    /// Nobody wants to know any more what is about to be written over.
    pub fn end_backup(&self) {
        if let Self::Raw(disk) = self {
            *lock(&disk.backup) = None;
        }
    }
}

impl RawDisk {
    fn preserve(&self, offset: u64, length: u64) {
        let backup = lock(&self.backup).clone();
        if let Some(backup) = backup {
            backup.preserve(offset, length);
        }
    }
}

impl CompositeDisk {
    /// # Safety
    /// As [`Disk::read`].
    unsafe fn read(&self, mut offset: u64, buffers: Vec<libc::iovec>) -> io::Result<()> {
        let mut rest = buffers;
        while !rest.is_empty() {
            let index = self.pieces.partition_point(|piece| piece.start + piece.length <= offset);
            let piece = self.pieces.get(index).ok_or(ErrorKind::InvalidInput)?;
            let within = offset - piece.start;
            let (now, later) = split(rest, piece.length - within);
            let length: usize = now.iter().map(|buffer| buffer.iov_len).sum();
            // SAFETY: parts of the caller's buffers.
            unsafe { piece.source.read(within, now)? };
            offset += length as u64;
            rest = later;
        }
        Ok(())
    }
}

impl Source {
    /// # Safety
    /// As [`Disk::read`].
    unsafe fn read(&self, offset: u64, buffers: Vec<libc::iovec>) -> io::Result<()> {
        match self {
            // SAFETY: the caller's promise.
            Self::File(file) => unsafe { transfer(file, offset, buffers, Direction::Read) },
            Self::Memory(bytes) => {
                let start = usize::try_from(offset).map_err(io::Error::other)?;
                let mut rest = bytes.get(start..).ok_or(ErrorKind::InvalidInput)?;
                for buffer in buffers {
                    let (now, later) =
                        rest.split_at_checked(buffer.iov_len).ok_or(ErrorKind::InvalidInput)?;
                    // SAFETY: as many bytes as the buffer is long, from our memory to the caller's, which is not ours.
                    unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), buffer.iov_base.cast(), now.len()) };
                    rest = later;
                }
                Ok(())
            }
        }
    }
}

/// Opens a file or block device, and nothing that would keep a running machine waiting.
///
/// # Errors
/// When it cannot be opened, or is something else.
pub fn open(path: &Path, write: bool) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(write).custom_flags(libc::O_NONBLOCK).open(path)?;
    check_kind(&file)?;
    Ok(file)
}

/// Checks a descriptor that somebody else has opened for a disk.
///
/// # Errors
/// It is no file or block device, or cannot be used that way.
pub fn check_opened(file: &File, write: bool) -> io::Result<()> {
    check_kind(file)?;
    // SAFETY: F_GETFL touches no memory.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    let wanted = if write { libc::O_RDWR } else { libc::O_RDONLY };
    match flags & (libc::O_ACCMODE | libc::O_PATH) {
        _ if flags < 0 => Err(io::Error::last_os_error()),
        mode if mode == libc::O_RDWR || mode == wanted => Ok(()),
        _ => Err(io::Error::new(ErrorKind::InvalidInput, "its descriptor was not opened for that")),
    }
}

fn check_kind(file: &File) -> io::Result<()> {
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    Err(io::Error::new(ErrorKind::InvalidInput, "it is neither a file nor a block device"))
}

/// Splits buffers after `at` bytes.
fn split(buffers: Vec<libc::iovec>, at: u64) -> (Vec<libc::iovec>, Vec<libc::iovec>) {
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut left = usize::try_from(at).unwrap_or(usize::MAX);
    for buffer in buffers {
        let here = buffer.iov_len.min(left);
        left -= here;
        if here > 0 {
            before.push(libc::iovec { iov_base: buffer.iov_base, iov_len: here });
        }
        if here < buffer.iov_len {
            let iov_base = buffer.iov_base.cast::<u8>().wrapping_add(here).cast();
            after.push(libc::iovec { iov_base, iov_len: buffer.iov_len - here });
        }
    }
    (before, after)
}

#[derive(Debug, Clone, Copy)]
enum Direction {
    Read,
    Write,
}

fn to_off(n: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(n).map_err(io::Error::other)
}

/// Moves all bytes between `file` and `buffers`. After the file's end, reading gives zeros.
///
/// # Safety
/// The buffers must be valid for the direction.
unsafe fn transfer(
    file: &File,
    mut offset: u64,
    mut buffers: Vec<libc::iovec>,
    direction: Direction,
) -> io::Result<()> {
    while !buffers.is_empty() {
        let count = buffers.len().min(MAX_IOVECS) as libc::c_int;
        let (fd, position) = (file.as_raw_fd(), to_off(offset)?);
        // SAFETY: `count` valid buffers, by the caller's promise.
        let moved = unsafe {
            match direction {
                Direction::Read => libc::preadv(fd, buffers.as_ptr(), count, position),
                Direction::Write => libc::pwritev(fd, buffers.as_ptr(), count, position),
            }
        };
        match (moved, direction) {
            (1.., _) => {
                offset += moved as u64;
                buffers = split(buffers, moved as u64).1;
            }
            (0, Direction::Read) => {
                for buffer in &buffers {
                    // SAFETY: the caller's promise.
                    unsafe { std::ptr::write_bytes(buffer.iov_base.cast::<u8>(), 0, buffer.iov_len) };
                }
                return Ok(());
            }
            (0, Direction::Write) => return Err(ErrorKind::WriteZero.into()),
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn read(disk: &Disk, offset: u64, lengths: &[usize]) -> io::Result<Vec<u8>> {
        let mut parts: Vec<Vec<u8>> = lengths.iter().map(|length| vec![0xee; *length]).collect();
        let iovecs = parts
            .iter_mut()
            .map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() })
            .collect();
        // SAFETY: the buffers live until the end of this function.
        unsafe { disk.read(offset, iovecs)? };
        Ok(parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_composite_disk_is_its_layers(
            layers in proptest::collection::vec(1_usize..20_000, 1..5),
            reads in proptest::collection::vec((0_u64..100, proptest::collection::vec(1_usize..9000, 1..4)), 1..20),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut expected = Vec::new();
            let mut paths = Vec::new();
            for (i, length) in layers.iter().enumerate() {
                let content: Vec<u8> = (0..*length).map(|n| (n * (i + 3) % 255) as u8).collect();
                let path = dir.path().join(i.to_string());
                File::create(&path).unwrap().write_all(&content).unwrap();
                expected.extend(content);
                expected.resize(expected.len().next_multiple_of(LAYER_ALIGNMENT as usize), 0);
                paths.push(path);
            }
            let disk = Disk::composite("test", &paths).unwrap();
            let start = gpt::build("test", &[4096]).primary.len() as u64;
            for (sector, lengths) in reads {
                let total: usize = lengths.iter().sum();
                let from = (sector * SECTOR) as usize;
                if from + total <= expected.len() {
                    prop_assert_eq!(&read(&disk, start + sector * SECTOR, &lengths).unwrap(), &expected[from..from + total]);
                }
            }
            let length = disk.length();
            prop_assert!(read(&disk, length - 1, &[2]).is_err());
            prop_assert!(read(&disk, u64::MAX, &[2]).is_err());
            let all = read(&disk, 0, &[length as usize]).unwrap();
            prop_assert_eq!(&all[start as usize..start as usize + expected.len()], &expected[..]);
            prop_assert_eq!(&all[512..520], b"EFI PART");
            let backup = length as usize - 512;
            prop_assert_eq!(&all[backup..backup + 8], b"EFI PART");
        }
    }

    #[test]
    fn raw_disks_store_zero_and_stay_within_themselves() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(8192 + 100).unwrap();
        let disk = Disk::raw(&path, false).unwrap();
        assert_eq!(disk.length(), 8192);
        let mut data = vec![7_u8; 4096];
        let iovec = |data: &mut Vec<u8>| {
            vec![libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() }]
        };
        // SAFETY: the buffer outlives the calls.
        unsafe {
            disk.write(4096, iovec(&mut data)).unwrap();
            assert!(disk.write(4608, iovec(&mut data)).is_err());
        }
        disk.flush().unwrap();
        assert_eq!(read(&disk, 4096, &[1000, 3096]).unwrap(), data);
        disk.zero(4096, 4096, true).unwrap();
        assert_eq!(read(&disk, 4096, &[4096]).unwrap(), vec![0; 4096]);
        assert!(disk.zero(4096, 8192, true).is_err());

        let disk = Disk::raw(&path, true).unwrap();
        // SAFETY: as above.
        assert!(unsafe { disk.write(0, iovec(&mut data)) }.is_err());
        assert!(disk.zero(0, 512, true).is_err());
        assert!(Disk::raw(&dir.path().join("missing"), true).is_err());
    }
}
