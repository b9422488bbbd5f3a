//! Detached mounts: made by ordinary code with ordinary errors, and put in place by a process between fork and execve.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

/// `struct mount_attr`, `mount_setattr(2)`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

const READ_ONLY: u64 = 1;

/// A small tmpfs for mount points. The guest must not be able to fill the host's memory with files in it.
pub(super) fn staging(points: usize) -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // The root is an inode too, and directories take a page's worth of accounting on some kernels.
    fsconfig_set_string(context.as_fd(), "nr_inodes", (points + 16).to_string().as_str())?;
    fsconfig_set_string(context.as_fd(), "size", "64k")?;
    fsconfig_set_string(context.as_fd(), "mode", "0755")?;
    fsconfig_create(context.as_fd())?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)
}

/// What is at `path`, links followed, and where that is. Nobody can make another thing of it any more.
pub(super) fn find(path: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let place = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
    Ok((found, place))
}

/// A detached copy of what is mounted at and below what was found.
pub(super) fn take(found: &OwnedFd, read_only: bool) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(found, "", flags)?;
    // What is mounted or unmounted on the host later is none of the sandbox's business, nor the other way round.
    let attributes = Attributes {
        set: if read_only { READ_ONLY } else { 0 },
        propagation: libc::MS_PRIVATE,
        ..Attributes::default()
    };
    set(tree.as_raw_fd(), true, &attributes)?;
    Ok(tree)
}

/// Makes the mount point `name` of the kind that `tree` needs.
pub(super) fn point(staging: &OwnedFd, name: &str, tree: &OwnedFd) -> rustix::io::Result<()> {
    if FileType::from_raw_mode(rustix::fs::fstat(tree)?.st_mode).is_dir() {
        rustix::fs::mkdirat(staging, name, Mode::from_raw_mode(0o755))
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        rustix::fs::openat(staging, name, flags, Mode::from_raw_mode(0o644)).map(drop)
    }
}

/// A detached copy of one mount, writable though the mount is not.
pub(super) fn writable(path: &Path) -> io::Result<OwnedFd> {
    let copy = open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    set(copy.as_raw_fd(), false, &Attributes { clear: READ_ONLY, ..Attributes::default() })?;
    Ok(copy)
}

/// In a new mount namespace: makes it one into which the host's changes come and from which none go out.
pub(super) fn seclude() -> io::Result<()> {
    rustix::mount::mount_change(
        c"/",
        rustix::mount::MountPropagationFlags::DOWNSTREAM | rustix::mount::MountPropagationFlags::REC,
    )?;
    Ok(())
}

/// Attaches a detached mount.
pub(super) fn put(tree: BorrowedFd<'_>, directory: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    move_mount(tree, c"", directory, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

/// Makes one mount, not those on it, read-only.
pub(super) fn close(mount: BorrowedFd<'_>) -> io::Result<()> {
    set(mount.as_raw_fd(), false, &Attributes { set: READ_ONLY, ..Attributes::default() })
}

fn set(mount: i32, recursive: bool, attributes: &Attributes) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, and the attributes are read only, as many bytes as are given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount,
            c"".as_ptr(),
            flags,
            &raw const *attributes,
            size_of::<Attributes>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOSYS) => io::Error::new(
                io::ErrorKind::Unsupported,
                "the host's kernel has no mount_setattr: Linux 5.12 or later is needed",
            ),
            error => error,
        }),
    }
}
