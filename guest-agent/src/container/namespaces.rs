//! Forking into namespaces and joining those that exist.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType};

use super::spec::{IdMapping, Linux};
use crate::error::{Context, Error, Result, check};

/// The namespaces of a container: which are made and which are joined.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// `CLONE_NEW…` of those to make.
    pub create: u64,
    /// `CLONE_NEW…` of those that are another's.
    pub joined: u64,
    /// The joined ones, until the container's init is in them.
    join: Vec<(u64, OwnedFd)>,
}

/// Before the id of a container whose namespace is meant, in the place of a path.
const CONTAINER: &str = "container:";

const USER: u64 = libc::CLONE_NEWUSER as u64;
const PID: u64 = libc::CLONE_NEWPID as u64;
const NET: u64 = libc::CLONE_NEWNET as u64;
const MOUNT: u64 = libc::CLONE_NEWNS as u64;
/// `CLONE_INTO_CGROUP`, which libc has in a type too narrow for it.
const INTO_CGROUP: u64 = 1 << 33;
const CGROUP: u64 = libc::CLONE_NEWCGROUP as u64;

impl Namespaces {
    /// Reads `linux.namespaces`. A path is one of the agent's own mount namespace, or `container:ID`; `init_of` knows the
    /// pid of that container's init.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a kind that does not exist, comes twice, or makes no sense; what is joined is not there.
    pub fn from_spec(linux: &Linux, init_of: impl Fn(&str) -> Result<i32>) -> Result<Self> {
        let mut namespaces = Self::default();
        let mut seen = 0;
        for namespace in &linux.namespaces {
            let flag = match namespace.kind.as_str() {
                "pid" => PID,
                "network" => NET,
                "mount" => MOUNT,
                "ipc" => libc::CLONE_NEWIPC as u64,
                "uts" => libc::CLONE_NEWUTS as u64,
                "user" => USER,
                "cgroup" => CGROUP,
                other => {
                    return Err(Error::invalid(format!("not supported: linux.namespaces type {other:?}")));
                }
            };
            if seen & flag != 0 {
                return Err(Error::invalid(format!("linux.namespaces has {} twice", namespace.kind)));
            }
            seen |= flag;
            if namespace.path.is_empty() {
                namespaces.create |= flag;
            } else if flag == MOUNT || flag == USER {
                // A joined mount namespace would be someone else's root; the other would need a second fork.
                return Err(Error::invalid(format!("not supported: joining a {} namespace", namespace.kind)));
            } else {
                let path = match namespace.path.strip_prefix(CONTAINER) {
                    Some(id) => format!("/proc/{}/ns/{}", init_of(id)?, file_name(flag)),
                    None => namespace.path.clone(),
                };
                let file = fs::File::open(&path).context(|| format!("open namespace {path}"))?;
                namespaces.join.push((flag, file.into()));
                namespaces.joined |= flag;
            }
        }
        if namespaces.create & MOUNT == 0 {
            return Err(Error::invalid(
                "linux.namespaces has no mount namespace: a container needs its own root",
            ));
        }
        if namespaces.create & USER != 0 && (linux.uid_mappings.is_empty() || linux.gid_mappings.is_empty()) {
            return Err(Error::invalid("a user namespace needs linux.uidMappings and gidMappings"));
        }
        Ok(namespaces)
    }

    /// Whether the container has a user namespace of its own.
    pub fn has_user(&self) -> bool {
        self.create & USER != 0
    }

    /// Whether the container's processes die with its init.
    pub fn has_pid(&self) -> bool {
        self.create & PID != 0
    }

    /// Whether the container gets a network of its own, whose loopback is still down.
    pub fn has_net(&self) -> bool {
        self.create & NET != 0
    }

    /// Whether the container uses the guest's own network, whose loopback nothing else brings up.
    pub fn shares_net(&self) -> bool {
        (self.create | self.joined) & NET == 0
    }

    /// Whether `/sys/fs/cgroup` starts at the container's own group.
    pub fn has_cgroup(&self) -> bool {
        self.create & CGROUP != 0
    }

    /// Forks the container's init. The cgroup namespace comes later, by [`Self::enter`]: its root is the group that
    /// the process is in when it is made, and clone3 makes namespaces before it moves the child.
    ///
    /// # Errors
    /// What clone3 says.
    pub fn fork(&self, cgroup: BorrowedFd<'_>) -> Result<Forked> {
        let fork = || fork(self.create & !CGROUP, Some(cgroup));
        match self.join.iter().find(|(flag, _)| *flag == PID) {
            Some((_, namespace)) => {
                let kind = Some(LinkNameSpaceType::ProcessID);
                fork_with_pids(|| rustix::thread::move_into_link_name_space(namespace.as_fd(), kind), fork)
            }
            None => fork(),
        }
    }

    /// What the child needs for [`Self::enter`].
    pub fn files(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.join.iter().map(|(_, file)| file.as_fd())
    }

    /// Lets go of the joined ones, which end with their last process then.
    pub fn let_go(&mut self) {
        self.join.clear();
    }

    /// Child: joins the namespaces of others (that of pids it was forked into), and makes the cgroup namespace.
    ///
    /// # Errors
    /// What was named is no such namespace.
    pub fn enter(&self) -> Result<()> {
        for (flag, file) in self.join.iter().filter(|(flag, _)| *flag != PID) {
            rustix::thread::move_into_link_name_space(file.as_fd(), Some(link_type(*flag)))
                .context(|| format!("join a {} namespace", file_name(*flag)))?;
        }
        if self.has_cgroup() {
            // SAFETY: only the cgroup namespace changes; no memory or descriptor table is unshared.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWCGROUP) }
                .context(|| "make a cgroup namespace")?;
        }
        Ok(())
    }

    /// What an exec joins, by the init's pidfd. Its pid namespace is joined by the agent before it forks.
    pub fn exec_flags(&self) -> ThreadNameSpaceType {
        ThreadNameSpaceType::from_bits_truncate(((self.create | self.joined) & !PID) as u32)
    }
}

fn link_type(flag: u64) -> LinkNameSpaceType {
    match flag {
        NET => LinkNameSpaceType::Network,
        CGROUP => LinkNameSpaceType::ControlGroup,
        flag if flag == libc::CLONE_NEWUTS as u64 => LinkNameSpaceType::HostNameAndNISDomainName,
        _ => LinkNameSpaceType::InterProcessCommunication,
    }
}

/// Its name below `/proc/PID/ns`.
fn file_name(flag: u64) -> &'static str {
    match flag {
        PID => "pid",
        NET => "net",
        CGROUP => "cgroup",
        flag if flag == libc::CLONE_NEWUTS as u64 => "uts",
        _ => "ipc",
    }
}

/// Both sides of a fork.
pub enum Forked {
    /// The agent: the child's pid in the agent's pid namespace, and a descriptor of it.
    Parent { pid: i32, pidfd: OwnedFd },
    /// The child.
    Child,
}

/// Forks, with new namespaces and straight into a cgroup.
///
/// # Errors
/// What clone3 says.
pub fn fork(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Forked> {
    let mut pidfd = -1i32;
    // SAFETY: clone_args is plain integers, for which zero is valid and means "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | libc::CLONE_PIDFD as u64;
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM and with no stack given this is fork: the child has a copy of all memory and goes on
    // here. The agent has one thread, so no lock can be held by another at this moment.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) })
        .context(|| "fork (clone3)")?;
    if pid == 0 {
        return Ok(Forked::Child);
    }
    // SAFETY: the kernel has stored a new descriptor that nobody else knows.
    Ok(Forked::Parent { pid: pid as i32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })
}

/// Forks into the pid namespace of the process behind `init`, and into `cgroup`.
///
/// # Errors
/// The process has ended.
pub fn fork_beside(init: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> Result<Forked> {
    let join = || rustix::thread::move_into_thread_name_spaces(init, ThreadNameSpaceType::PROCESS_ID);
    fork_with_pids(join, || fork(0, Some(cgroup)))
}

/// Forks into the pid namespace that `join` makes that of future children.
fn fork_with_pids(
    join: impl FnOnce() -> rustix::io::Result<()>,
    fork: impl FnOnce() -> Result<Forked>,
) -> Result<Forked> {
    let own = fs::File::open("/proc/self/ns/pid").context(|| "open the agent's pid namespace")?;
    join().context(|| "join the container's pid namespace")?;
    let forked = fork();
    if !matches!(forked, Ok(Forked::Child)) {
        rustix::thread::move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID))
            .context(|| "return to the agent's pid namespace")?;
    }
    forked
}

/// Agent: writes the id mappings of a child's user namespace.
///
/// # Errors
/// The kernel refuses mappings that overlap or are out of range.
pub fn map_ids(pid: i32, linux: &Linux) -> Result<()> {
    for (file, mappings) in [("uid_map", &linux.uid_mappings), ("gid_map", &linux.gid_mappings)] {
        fs::write(format!("/proc/{pid}/{file}"), id_map(mappings))
            .context(|| format!("write the container's {file} {:?}", id_map(mappings)))?;
    }
    Ok(())
}

fn id_map(mappings: &[IdMapping]) -> String {
    let line = |m: &IdMapping| format!("{} {} {}\n", m.container_id, m.host_id, m.size);
    mappings.iter().map(line).collect()
}

/// Child: brings the loopback interface of its new network up.
///
/// # Errors
/// What the kernel says.
pub fn loopback_up() -> Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .context(|| "open a socket for the loopback interface")?;
    // SAFETY: ifreq is plain data, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which `request` is, and it outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
        .context(|| "bring the loopback interface up")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(json: &str) -> Linux {
        serde_json::from_str(json).unwrap()
    }

    fn nobody(id: &str) -> Result<i32> {
        Err(Error::not_found(format!("container {id} does not exist")))
    }

    #[test]
    fn a_containers_namespace_is_found_by_its_id() {
        let spec = r#"{"namespaces":[{"type":"mount"},{"type":"ipc","path":"container:a"},
            {"type":"pid","path":"container:a"}]}"#;
        assert!(Namespaces::from_spec(&linux(spec), nobody).unwrap_err().to_string().contains("container a"));
        let own = |id: &str| if id == "a" { Ok(std::process::id() as i32) } else { nobody(id) };
        let namespaces = Namespaces::from_spec(&linux(spec), own).unwrap();
        assert!(!namespaces.has_pid() && namespaces.files().count() == 2);
        assert!(namespaces.exec_flags().contains(ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION));
    }

    #[test]
    fn reads_what_to_make_and_what_to_join() {
        let spec = r#"{"namespaces":[{"type":"mount"},{"type":"pid"},{"type":"cgroup"},
            {"type":"network","path":"/proc/self/ns/net"}]}"#;
        let namespaces = Namespaces::from_spec(&linux(spec), nobody).unwrap();
        assert!(
            namespaces.has_pid()
                && namespaces.has_cgroup()
                && !namespaces.has_net()
                && !namespaces.has_user()
        );
        assert!(namespaces.joined == NET && namespaces.files().count() == 1 && !namespaces.shares_net());
        assert!(!namespaces.exec_flags().contains(ThreadNameSpaceType::PROCESS_ID));
        assert!(namespaces.exec_flags().contains(ThreadNameSpaceType::NETWORK));
    }

    #[test]
    fn refuses_what_would_weaken_the_container() {
        for spec in [
            r#"{"namespaces":[]}"#,
            r#"{"namespaces":[{"type":"mount"},{"type":"mount"}]}"#,
            r#"{"namespaces":[{"type":"mount","path":"/proc/1/ns/mnt"}]}"#,
            r#"{"namespaces":[{"type":"mount"},{"type":"user","path":"container:a"}]}"#,
            r#"{"namespaces":[{"type":"mount"},{"type":"wat"}]}"#,
            r#"{"namespaces":[{"type":"mount"},{"type":"user"}]}"#,
        ] {
            assert!(Namespaces::from_spec(&linux(spec), |_| Ok(1)).is_err(), "{spec}");
        }
    }

    #[test]
    fn writes_the_kernels_map_format() {
        let map = [IdMapping { container_id: 0, host_id: 1000, size: 10 }; 2];
        assert_eq!(id_map(&map), "0 1000 10\n0 1000 10\n");
    }
}
