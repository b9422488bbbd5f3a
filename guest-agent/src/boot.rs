//! From the kernel's hand-over to listening: as few system calls as will do, each is boot time.

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use bulkhead_protocol::{AGENT_PORT, STREAM_PORT, mark};
use rustix::mount::MountFlags;

use crate::agent::Agent;
use crate::error::{Context, Result, check};
use crate::hw;

/// The host's CID on every vsock.
const HOST_CID: u32 = 2;

/// Where the kernel's file systems go in the agent's own mount namespace. sysfs is left out: nothing here reads it.
const MOUNTS: [(&str, &str, MountFlags); 3] = [
    ("proc", "/proc", MountFlags::empty()),
    ("devtmpfs", "/dev", MountFlags::empty()),
    ("cgroup2", "/sys/fs/cgroup", MountFlags::empty()),
];

/// Prepares the machine and tells the host that it is ready.
///
/// # Errors
/// Whatever is missing; the machine is of no use then.
#[cfg_attr(feature = "unix-sockets", allow(dead_code))]
pub fn start() -> Result<Agent> {
    prepare()?;
    let rpc = vsock_listen(AGENT_PORT)?;
    let streams = vsock_listen(STREAM_PORT)?;
    let agent = Agent::new(rpc, streams)?;
    announce()?;
    hw::mark(mark::AGENT_READY);
    Ok(agent)
}

/// The same without a monitor, for `tests/in_guest.rs`.
///
/// # Errors
/// The same.
#[cfg(feature = "unix-sockets")]
pub fn start_on_unix_sockets() -> Result<Agent> {
    let directory = std::env::args().nth(1).unwrap_or_else(|| "/run/agent".to_owned());
    let listen = |name: &str| -> Result<OwnedFd> {
        let listener = std::os::unix::net::UnixListener::bind(format!("{directory}/{name}"))?;
        listener.set_nonblocking(true)?;
        Ok(listener.into())
    };
    let (rpc, streams) = (listen("agent")?, listen("streams")?);
    prepare()?;
    Agent::new(rpc, streams)
}

/// Mounts, and what protects the agent.
fn prepare() -> Result<()> {
    let _ = rustix::process::umask(rustix::fs::Mode::empty());
    leave_initial_root()?;
    for (fstype, target, flags) in MOUNTS {
        fs::create_dir_all(target).context(|| format!("create {target}"))?;
        rustix::mount::mount(fstype, target, fstype, flags, None)
            .context(|| format!("mount {fstype} on {target} (is it in the guest kernel?)"))?;
    }
    harden()?;
    // The children set their own; nothing that a container does may choose the agent as the out-of-memory victim.
    fs::write("/proc/self/oom_score_adj", "-1000").context(|| "protect the agent from the OOM killer")
}

/// What keeps processes of one container from each other, as a distribution's init has it: the kernel's own defaults are older than the
/// attacks. What can be configured when the kernel is built is (`kernel-config/base.config`), as each of these is boot time.
const SYSCTLS: [(&str, &str); 6] = [
    // In directories like /tmp: no link, fifo or file of somebody else's is opened for who did not expect one.
    ("fs/protected_symlinks", "1"),
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_fifos", "1"),
    ("fs/protected_regular", "1"),
    // Constants in programs of the unprivileged are no instructions to jump into.
    ("net/core/bpf_jit_harden", "1"),
    // Addresses of the kernel's are for those with CAP_SYSLOG.
    ("kernel/kptr_restrict", "1"),
];

fn harden() -> Result<()> {
    for (name, value) in SYSCTLS {
        match fs::write(format!("/proc/sys/{name}"), value) {
            // Another kernel than ours may lack it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            written => written.context(|| format!("set sysctl {name}"))?,
        }
    }
    // No core file, no /proc/PID/exe to write to, nothing to trace: also for a child until it executes its program, in a container
    // whose root may already see it.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .context(|| "make the agent's memory its own")
}

/// A user namespace may mount only what its parent sees in full: sysfs must be somewhere then, once.
///
/// # Errors
/// What the kernel says.
pub fn mount_sysfs() -> Result<()> {
    const TARGET: &str = "/run/sysfs";
    if fs::exists(TARGET)? {
        return Ok(());
    }
    fs::create_dir(TARGET).context(|| format!("create {TARGET}"))?;
    rustix::mount::mount("sysfs", TARGET, "sysfs", MountFlags::empty(), None).context(|| "mount sysfs")
}

/// Makes `/` a mount that pivot_root accepts: the kernel's initial root is one that can never be left, and every
/// container would carry it under its own root.
fn leave_initial_root() -> Result<()> {
    let what = || "move off the initial root";
    rustix::mount::mount_bind("/", "/run").context(what)?;
    rustix::process::chdir("/run").context(what)?;
    rustix::mount::mount_move(".", "/").context(what)?;
    rustix::process::chroot(".").context(what)
}

/// Prints a line where a person may see it.
pub fn console(line: &str) {
    let opened = fs::OpenOptions::new().write(true).open("/dev/console");
    if let Ok(mut console) = opened {
        let _ = writeln!(console, "{line}");
    } else {
        eprintln!("{line}");
    }
}

/// A panic of PID 1 would be a kernel panic that hides its reason.
pub fn end_machine_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        console(&format!("bulkhead agent: {info}"));
        hw::exit(crate::EXIT_SOFTWARE);
    }));
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as libc::sa_family_t,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: cid,
        svm_zero: [0; 4],
    }
}

fn vsock_socket(flags: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd =
        check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | flags, 0) })
            .context(|| "create a vsock socket (does the monitor offer the device?)")?;
    // SAFETY: a descriptor the kernel has just made and nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn vsock_listen(port: u32) -> Result<OwnedFd> {
    let socket = vsock_socket(libc::SOCK_NONBLOCK)?;
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: `address` is a valid sockaddr_vm of the length given and outlives the call.
    check(unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32)
    })
    .context(|| format!("bind vsock port {port}"))?;
    rustix::net::listen(&socket, 64).context(|| format!("listen on vsock port {port}"))?;
    Ok(socket)
}

/// Connects to what listens on the host.
///
/// # Errors
/// Nothing does.
pub fn connect_to_host(port: u32) -> std::io::Result<OwnedFd> {
    let socket = vsock_socket(0).map_err(std::io::Error::other)?;
    let address = vsock_address(HOST_CID, port);
    // SAFETY: `address` is a valid sockaddr_vm of the length given and outlives the call.
    check(unsafe {
        libc::connect(socket.as_fd().as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32)
    })?;
    Ok(socket)
}

/// Whether the other end of a connection is the host. Of a guest's own kernel a container could have a vsock that leads back into
/// the guest; ours has no such transport, and another kernel may.
#[cfg_attr(any(test, feature = "unix-sockets"), allow(unused_variables))]
pub fn is_host(connection: BorrowedFd<'_>) -> bool {
    #[cfg(any(test, feature = "unix-sockets"))]
    return true;
    #[cfg(not(any(test, feature = "unix-sockets")))]
    {
        let mut peer = vsock_address(0, 0);
        let mut length = size_of_val(&peer) as libc::socklen_t;
        // SAFETY: `peer` has room for the `length` bytes of an address, and both outlive the call.
        let known =
            unsafe { libc::getpeername(connection.as_raw_fd(), (&raw mut peer).cast(), &raw mut length) };
        known == 0 && libc::c_int::from(peer.svm_family) == libc::AF_VSOCK && peer.svm_cid == HOST_CID
    }
}

/// Connects to the host once. That nobody listens there is the host's business.
fn announce() -> Result<()> {
    if let Err(error) = connect_to_host(AGENT_PORT) {
        let refused = [libc::ECONNRESET, libc::ECONNREFUSED];
        if !error.raw_os_error().is_some_and(|errno| refused.contains(&errno)) {
            return Err(error).context(|| "tell the host that the agent is ready");
        }
    }
    Ok(())
}
