//! Namespaces of the monitor's own, and its root directory: nothing of the host's, but the directories of its sockets, in which it
//! can change nothing.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::Confinement;
use super::rights::{check, is_admin};

/// `linux/mount.h`; the numbers are the same everywhere.
const CONFIG_SET_STRING: libc::c_uint = 1;
const CONFIG_CREATE: libc::c_uint = 6;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC as libc::c_uint;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
const MOUNT_ATTR_RDONLY: u64 = 1;
const MOUNT_ATTR_NOSUID: u64 = 2;
const MOUNT_ATTR_NODEV: u64 = 4;
const MOUNT_ATTR_NOEXEC: u64 = 8;
const HARMLESS: u64 = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;

/// `struct mount_attr`, `mount_setattr(2)`.
#[repr(C)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Goes into namespaces of its own, as far as it may.
pub(super) fn enter(reach: &[&Path], confinement: &mut Confinement) {
    // The pid namespace is given by whoever starts the monitor, since only children are in a new one. So is the user namespace
    // of one whose caller has no rights; started by hand it makes its own.
    if !is_admin() && !confinement.note("user namespace", new_user_namespace()) {
        return;
    }
    for (name, flag) in [
        ("network namespace", libc::CLONE_NEWNET),
        ("ipc namespace", libc::CLONE_NEWIPC),
        ("uts namespace", libc::CLONE_NEWUTS),
        ("cgroup namespace", libc::CLONE_NEWCGROUP),
    ] {
        confinement.note(name, unshare(flag));
    }
    if confinement.note("mount namespace", unshare(libc::CLONE_NEWNS)) {
        confinement.note("root directory", empty_root(reach));
    }
}

fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: the process has one thread, which shares nothing with another that this would take from it.
    check(unsafe { libc::unshare(flags) })
}

/// A user namespace in which the process is who it was, with all rights over what belongs to the namespace, until it gives them up.
fn new_user_namespace() -> io::Result<()> {
    // SAFETY: they take no pointers and cannot fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    unshare(libc::CLONE_NEWUSER)?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}

/// Makes a root with nothing in it but `reach`, at their own paths, and lets go of everything else.
fn empty_root(reach: &[&Path]) -> io::Result<()> {
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: null and C strings, as mount(2) takes them.
    check(unsafe {
        libc::mount(std::ptr::null(), c"/".as_ptr(), std::ptr::null(), flags, std::ptr::null())
    })?;
    let trees = reach.iter().map(|path| copy_of(path)).collect::<io::Result<Vec<_>>>()?;
    let root = tmpfs()?;
    move_mount(&root, libc::AT_FDCWD, c"/")?;
    for (path, tree) in reach.iter().zip(&trees) {
        let point = directories(&root, path)?;
        move_mount(tree, root.as_raw_fd(), &point)?;
    }
    set_attributes(&root, HARMLESS | MOUNT_ATTR_RDONLY)?;
    // SAFETY: C strings and a descriptor that is open. The old root is mounted on the new one for a moment, and is taken away
    // from it with all that is below.
    unsafe {
        check(libc::fchdir(root.as_raw_fd()))?;
        let pivoted = libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr());
        if pivoted == 0 {
            check(libc::umount2(c".".as_ptr(), libc::MNT_DETACH))?;
        } else {
            // The kernel's first root (of an initramfs) has nothing that it could be taken from; it is out of sight all the same.
            check(libc::chroot(c".".as_ptr()))?;
        }
        check(libc::chdir(c"/".as_ptr()))
    }
}

/// A tmpfs that holds directories alone.
fn tmpfs() -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string.
    let context = descriptor(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) })?;
    let configure = |command: libc::c_uint, key: *const libc::c_char, value: *const libc::c_char| {
        // SAFETY: key and value are null or C strings.
        done(unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) })
    };
    configure(CONFIG_SET_STRING, c"size".as_ptr(), c"4k".as_ptr())?;
    configure(CONFIG_SET_STRING, c"mode".as_ptr(), c"0555".as_ptr())?;
    configure(CONFIG_CREATE, std::ptr::null(), std::ptr::null())?;
    // SAFETY: takes no pointers.
    descriptor(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, HARMLESS) })
}

/// A copy of what is mounted at `path`, read-only: sockets in it can be connected to.
fn copy_of(path: &Path) -> io::Result<OwnedFd> {
    let path = c_string(path)?;
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC;
    // SAFETY: the path is a C string.
    let tree =
        descriptor(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })?;
    set_attributes(&tree, HARMLESS | MOUNT_ATTR_RDONLY)?;
    Ok(tree)
}

fn set_attributes(mount: &OwnedFd, set: u64) -> io::Result<()> {
    let attributes = Attributes { set, clear: 0, propagation: libc::MS_PRIVATE, user_namespace: 0 };
    // SAFETY: the path is a C string, and the attributes are read only, as many bytes as are given.
    done(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    })
}

fn move_mount(mount: &OwnedFd, directory: RawFd, path: &CStr) -> io::Result<()> {
    // SAFETY: both paths are C strings.
    done(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            directory,
            path.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
}

/// Makes the directories of an absolute path below `root`; answers the path from there.
fn directories(root: &OwnedFd, path: &Path) -> io::Result<CString> {
    let relative = path.strip_prefix("/").map_err(io::Error::other)?;
    let mut all: Vec<_> = relative.ancestors().filter(|part| !part.as_os_str().is_empty()).collect();
    all.reverse();
    for directory in all {
        let directory = c_string(directory)?;
        // SAFETY: the path is a C string.
        match check(unsafe { libc::mkdirat(root.as_raw_fd(), directory.as_ptr(), 0o555) }) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result?,
        }
    }
    c_string(relative)
}

fn c_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

fn done(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What a system call that makes a descriptor has made.
fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    done(result)?;
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: a descriptor just made, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
