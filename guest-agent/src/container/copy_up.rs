//! `tmpcopyup`: a tmpfs that starts with the files that the image has at its mount point.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use crate::error::{Context, Error, Result};

/// Deeper trees are refused: each level holds descriptors and stack.
const MAX_DEPTH: u32 = 64;

/// Copies a directory's contents, with owners, modes, times and links; hard links become files of their own.
///
/// # Errors
/// What the kernel says, the tmpfs being full for one.
pub fn copy(from: &OwnedFd, to: &OwnedFd) -> Result<()> {
    copy_directory(from.as_fd(), to.as_fd(), 0)
}

fn copy_directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: u32) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::invalid(format!("the tree is deeper than {MAX_DEPTH}")));
    }
    for entry in rustix::fs::Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(from, to, name, depth).context(|| name.to_string_lossy())?;
        }
    }
    let stat = rustix::fs::fstat(from)?;
    rustix::fs::fchown(
        to,
        Some(rustix::fs::Uid::from_raw(stat.st_uid)),
        Some(rustix::fs::Gid::from_raw(stat.st_gid)),
    )?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
    Ok(())
}

fn copy_entry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, depth: u32) -> Result<()> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let mode = Mode::from_raw_mode(stat.st_mode);
    let base = OFlags::CLOEXEC | OFlags::NOFOLLOW;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, Mode::RWXU)?;
            let source = rustix::fs::openat(from, name, base | OFlags::DIRECTORY, Mode::empty())?;
            let target = rustix::fs::openat(to, name, base | OFlags::DIRECTORY, Mode::empty())?;
            return copy_directory(source.as_fd(), target.as_fd(), depth + 1);
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(target.as_c_str(), to, name)?;
        }
        FileType::RegularFile => {
            let source = rustix::fs::openat(from, name, base | OFlags::RDONLY, Mode::empty())?;
            let target = rustix::fs::openat(
                to,
                name,
                base | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL,
                Mode::RWXU,
            )?;
            let (mut source, mut target) = (std::fs::File::from(source), std::fs::File::from(target));
            std::io::copy(&mut source, &mut target)?;
        }
        kind => rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?,
    }
    let (uid, gid) = (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if !FileType::from_raw_mode(stat.st_mode).is_symlink() {
        rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
    }
    Ok(())
}
