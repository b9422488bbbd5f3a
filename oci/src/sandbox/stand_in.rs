//! The container's process as the host sees it: the state's pid, the engine's child.
//!
//! It does nothing but stand for the container's first process. It is in the container's network namespace, is the first
//! of a pid namespace and, from `create` on, has the container's root and binds as its root, so that what engines do by
//! the pid (`podman cp`, `nsenter`, `/proc/PID/root`) meets the container's files. Signals sent to it go to the
//! sandbox, which works for it; it ends when the sandbox says so, or has gone.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use bulkhead_runtime::clone::clone3;
use bulkhead_runtime::network::NamespaceRef;
use bulkhead_runtime::supervise::Wire;
use bulkhead_runtime::terminal::Signals;
use bulkhead_runtime::{Context, Result, null};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsmount, fsopen, mount_change, move_mount, open_tree, unmount,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use crate::pod::Partner;

/// Said to it.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// Make this your root.
    Enter(View),
    /// End with this status.
    End(u8),
}

/// What of the host's files the container sees.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct View {
    /// Its root.
    pub rootfs: PathBuf,
    /// Its binds: source, and where it is in the container.
    pub binds: Vec<(PathBuf, PathBuf)>,
}

/// A living stand-in.
pub struct StandIn {
    /// Its pid here.
    pub pid: i32,
    wire: Wire,
}

impl StandIn {
    /// Starts one as a child of our parent, in the network `namespace` and in those of `partners`. It is in namespaces of
    /// its own otherwise, by which it is known when others name them.
    ///
    /// # Errors
    /// The kernel refuses, or a namespace cannot be entered.
    pub fn start(namespace: &NamespaceRef, partners: &[Partner]) -> Result<Self> {
        let path = namespace.path();
        let network = File::open(&path).context(|| format!("cannot open {}", path.display()))?;
        let (ours, theirs) = Wire::pair()?;
        let mut joined = partners.iter().map(Partner::open).collect::<Result<Vec<_>>>()?;
        let what = || "cannot start a process".to_owned();
        let of_pids = joined.iter().position(|(kind, _)| *kind == LinkNameSpaceType::ProcessID);
        let of_pids = of_pids.map(|index| joined.swap_remove(index).1);
        let own = |kind: LinkNameSpaceType, flag: i32| {
            if joined.iter().any(|(joined, _)| *joined == kind) { 0 } else { flag }
        };
        let apart = libc::CLONE_NEWNS
            | own(LinkNameSpaceType::InterProcessCommunication, libc::CLONE_NEWIPC)
            | own(LinkNameSpaceType::HostNameAndNISDomainName, libc::CLONE_NEWUTS);
        joined.push((LinkNameSpaceType::Network, network));
        // Without the right to a mount namespace it stands for the process all the same, with the host's files.
        let pid = match of_pids {
            None => clone(apart | libc::CLONE_NEWPID).or_else(|_| clone(0)),
            Some(pids) => with_pids(&pids, || clone(apart)),
        };
        let pid = pid.context(what)?;
        if pid == 0 {
            drop(ours);
            let status = stand(&theirs, &joined);
            // SAFETY: _exit has no preconditions; the caller's exit handlers are not ours.
            unsafe { libc::_exit(status.into()) }
        }
        Ok(Self { pid, wire: ours })
    }

    /// Gives it the container's files. What cannot be mounted is missing in its view alone.
    pub fn enter(&self, view: View) {
        let _ = self.wire.send(&Order::Enter(view));
    }

    /// A signal that was sent to it. `None`: it has been killed.
    pub fn signal(&self) -> Option<u32> {
        self.wire.receive()
    }

    /// Ends it as the container's process ended. The first process of a pid namespace cannot end itself by a signal;
    /// a status above 128 says the same.
    pub fn end(self, code: u8, signal: i32) {
        if signal == libc::SIGKILL {
            // SAFETY: kill takes integers. The pid is its own: while our end of the wire is open, it lives.
            unsafe { libc::kill(self.pid, signal) };
        } else {
            let _ = self.wire.send(&Order::End(code));
        }
    }
}

impl AsFd for StandIn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wire.0.as_fd()
    }
}

/// Does something whose children are in another pid namespace.
fn with_pids(namespace: &File, fork: impl FnOnce() -> std::io::Result<i32>) -> std::io::Result<i32> {
    let own = File::open("/proc/self/ns/pid")?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
    let pid = fork();
    if !matches!(pid, Ok(0)) {
        move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
    }
    pid
}

fn clone(flags: i32) -> std::io::Result<i32> {
    // SAFETY: this process has one thread, so the child may go on as after fork().
    unsafe { clone3(flags | libc::CLONE_PARENT, 0, None) }
}

/// Its whole life; the answer is its exit status.
fn stand(wire: &Wire, joined: &[(LinkNameSpaceType, File)]) -> u8 {
    const LOST: u8 = 137;
    for (kind, namespace) in joined {
        if move_into_link_name_space(namespace.as_fd(), Some(*kind)).is_err() {
            return LOST;
        }
    }
    // Its copies of mounts must not keep anything on the host in use.
    let _ = mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC);
    // The engine waits for the end of the container's streams, which are the sandbox's to close.
    let_go_of_all_but(wire.0.as_raw_fd());
    let Ok(signals) = Signals::block() else { return LOST };
    loop {
        let mut fds = [PollFd::new(&wire.0, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return LOST,
        }
        if !fds[0].revents().is_empty() {
            match wire.receive() {
                Some(Order::Enter(view)) => drop(enter(&view)),
                Some(Order::End(code)) => return code,
                None => return LOST,
            }
        }
        while let Some(signal) = signals.next() {
            if wire.send(&signal).is_err() {
                return LOST;
            }
        }
    }
}

fn let_go_of_all_but(keep: i32) {
    null::let_go_of_streams();
    let keep = keep.unsigned_abs();
    for (from, to) in [(3, keep.saturating_sub(1)), (keep + 1, u32::MAX)] {
        if from <= to {
            // SAFETY: closes descriptors whose owners, objects of the sandbox, are never used or dropped in this copy of
            // it: it leaves by _exit.
            unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        }
    }
}

/// Makes the container's files this process's root.
fn enter(view: &View) -> rustix::io::Result<()> {
    let sources: Vec<_> = view.binds.iter().map(|(source, at)| (copy_of(source), at)).collect();
    let tree = copy_of(&view.rootfs)?;
    move_mount(&tree, c"", CWD, &view.rootfs, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let root =
        rustix::fs::open(&view.rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    for (source, at) in sources {
        // One that has gone, or that the image leads elsewhere, is not shown.
        if let (Ok(source), Ok(point)) = (source, inside(&root, at)) {
            let _ = put(&source, &point);
        }
    }
    let _ = processes().and_then(|proc| put(&proc, &inside(&root, Path::new("/proc"))?));
    rustix::process::fchdir(&root)?;
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}

fn copy_of(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    open_tree(CWD, path, flags)
}

/// A path in the container, whose links lead nowhere else.
fn inside(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)
}

fn put(tree: &OwnedFd, point: &OwnedFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, c"", point, c"", flags)
}

/// /proc of the pid namespace, in which there is nothing but this process.
fn processes() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)
}
