//! From the kernel's hand-over to listening: as few system calls as will do, each is boot time.

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

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
    // The children set their own; nothing that a container does may choose the agent as the out-of-memory victim.
    fs::write("/proc/self/oom_score_adj", "-1000").context(|| "protect the agent from the OOM killer")
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
