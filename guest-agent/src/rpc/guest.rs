//! The guest as a whole: its identity, and its end.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_protocol::agent::{ConfigureRequest, GuestInfo, ShutdownRequest};
use bulkhead_protocol::{PROTOCOL_VERSION, SHARES};
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use rustix::time::{ClockId, Timespec};

use crate::agent::Agent;
use crate::container::cgroup::Machine;
use crate::error::{Context, Error, Result, check};
use crate::hw;
use crate::{names, network};

/// More entropy than this is of no use.
const MAX_ENTROPY: usize = 1024;
/// `RNDADDENTROPY` and `RNDRESEEDCRNG`.
const ADD_ENTROPY: libc::c_ulong = 0x4008_5203;
const RESEED: libc::c_ulong = 0x5207;
/// How long a shutdown waits for killed containers before it unmounts under them.
const PATIENCE: Duration = Duration::from_secs(2);

/// `struct rand_pool_info` with its bytes.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    size: i32,
    bytes: [u8; MAX_ENTROPY],
}

/// Makes this guest itself and no copy of another.
///
/// # Errors
/// What the kernel says.
pub fn configure(request: &ConfigureRequest) -> Result<GuestInfo> {
    if !request.entropy.is_empty() {
        add_entropy(&request.entropy)?;
    }
    if !request.hostname.is_empty() {
        rustix::system::sethostname(request.hostname.as_bytes())
            .context(|| format!("set hostname {}", request.hostname))?;
    }
    if request.realtime_ns != 0 {
        let time = Timespec {
            tv_sec: request.realtime_ns.div_euclid(1_000_000_000),
            tv_nsec: request.realtime_ns.rem_euclid(1_000_000_000),
        };
        rustix::time::clock_settime(ClockId::Realtime, time).context(|| "set the clock")?;
    }
    request.shares.iter().try_for_each(|tag| mount_share(tag))?;
    match (&request.network, &request.formerly) {
        (Some(network), None) => network::configure(network)?,
        (Some(network), Some(formerly)) => network::change(formerly, network)?,
        (None, _) => {}
    }
    if !request.name_server.is_empty() {
        names::start(&request.name_server)?;
    }
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32);
    Ok(GuestInfo {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
        protocol: PROTOCOL_VERSION,
        memory_bytes: Machine::this().memory,
        cpus,
    })
}

/// Mounts a directory of the host. Nothing is masked by flags here: each container's mounts bring their own.
fn mount_share(tag: &str) -> Result<()> {
    if tag.is_empty() || tag.contains('/') || tag.starts_with('.') {
        return Err(Error::invalid(format!("{tag:?} is no name for a share")));
    }
    let target = Path::new(SHARES).join(tag);
    let what = || format!("mount the host's directories ({tag}) by virtio-fs");
    fs::create_dir_all(&target).context(what)?;
    rustix::mount::mount(tag, &target, "virtiofs", MountFlags::empty(), None).context(what)
}

fn add_entropy(entropy: &[u8]) -> Result<()> {
    if entropy.len() > MAX_ENTROPY {
        return Err(Error::invalid(format!("{} bytes of entropy, over {MAX_ENTROPY}", entropy.len())));
    }
    let mut info = PoolInfo {
        entropy_bits: entropy.len() as i32 * 8,
        size: entropy.len() as i32,
        bytes: [0; MAX_ENTROPY],
    };
    for (to, from) in info.bytes.iter_mut().zip(entropy) {
        *to = *from;
    }
    let random = rustix::fs::open("/dev/urandom", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .context(|| "open /dev/urandom")?;
    // SAFETY: RNDADDENTROPY reads a rand_pool_info whose `size` bytes lie within `info`, alive during the call.
    check(unsafe { libc::ioctl(random.as_raw_fd(), ADD_ENTROPY, &raw const info) })
        .context(|| "add entropy")?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RESEED) })
        .context(|| "reseed the random number generator")?;
    Ok(())
}

impl Agent {
    /// Ends the machine. The answer has been sent already.
    ///
    /// # Errors
    /// A status that no process can have.
    pub fn shut_down(&mut self, request: &ShutdownRequest) -> Result<()> {
        let status = u8::try_from(request.status)
            .map_err(|_| Error::invalid(format!("exit status {} is over 255", request.status)))?;
        if request.sync {
            self.settle();
        }
        hw::exit(status)
    }

    /// Leaves every file system clean.
    fn settle(&mut self) {
        for container in self.containers.values() {
            let _ = container.cgroup.kill();
        }
        let deadline = Instant::now() + PATIENCE;
        while self.containers.values().any(|c| c.cgroup.is_populated()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        for container in self.containers.values_mut() {
            let _ = container.rootfs.unmount(&mut self.layers);
        }
        rustix::fs::sync();
    }
}
