//! User-mode networking: the program passt makes the guest's connections as connections of its own, so that neither
//! rights nor changes to the host are needed.
//!
//! passt gets one end of a socket pair and the monitor the other. When the monitor ends, so does passt.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::describe::{Address, Interface, Network, Route};
use super::wish::Port;
use crate::{Context, Error, Result};

/// The guest's side: an address that no container network commonly has.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// What is asked here is asked of the host's own name server.
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const PREFIX: u8 = 24;
const MAC: &str = "52:54:00:12:34:56";
/// The largest that passt takes: fewer, longer packets.
const MTU: u32 = 65520;

/// A network through passt.
#[derive(Debug)]
pub(crate) struct Passt {
    /// For the guest.
    pub network: Network,
    /// For the monitor.
    pub socket: OwnedFd,
}

impl Passt {
    /// Starts passt, an empty path being that in PATH, with these ports published. It is ready when this returns.
    ///
    /// # Errors
    /// passt is not installed, a port is in use, the host has no network.
    pub(crate) fn start(ports: &[Port], program: &Path) -> Result<Self> {
        let program = if program.as_os_str().is_empty() { Path::new("passt") } else { program };
        let what = || format!("cannot start {}", program.display());
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).context(what)?;
        let fd = theirs.as_raw_fd();
        let mut command = Command::new(program);
        command.args(["--fd", &fd.to_string(), "--quiet", "--ipv4-only"]);
        command.args(["--address", &GUEST.to_string(), "--netmask", &PREFIX.to_string()]);
        command.args(["--gateway", &GATEWAY.to_string(), "--mtu", &MTU.to_string()]);
        command.args(["--dns-forward", &NAME_SERVER.to_string()]);
        // The guest is told all this by the agent. And the host's loopback is the host's own.
        command.args(["--no-dhcp", "--no-map-gw"]);
        for (flag, udp) in [("--tcp-ports", false), ("--udp-ports", true)] {
            let wanted: Vec<_> = ports.iter().filter(|port| port.udp == udp).map(published).collect();
            if wanted.is_empty() {
                command.args([flag, "none"]);
            }
            for port in wanted {
                command.args([flag, &port]);
            }
        }
        inherit(&mut command, vec![fd]);
        let output = command.stdin(Stdio::null()).output().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::Usage(format!(
                "--network passt needs the program {}, which is not there (apt-get install passt)",
                program.display()
            )),
            _ => Error::Io { what: what(), source },
        })?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            return Err(Error::Usage(format!("passt does not start ({}): {}", output.status, words.trim())));
        }
        Ok(Self { network: network(), socket: ours })
    }

    /// The servers for `/etc/resolv.conf` when the person names none.
    pub(crate) fn name_servers() -> Vec<IpAddr> {
        vec![NAME_SERVER.into()]
    }
}

/// A port in passt's notation.
fn published(port: &Port) -> String {
    let address = port.address.map(|address| format!("{address}/")).unwrap_or_default();
    format!("{address}{}:{}", port.host, port.container)
}

fn network() -> Network {
    let address = Address { address: GUEST.into(), prefix: PREFIX, peer: None, broadcast: None, scope: 0 };
    let default = Route {
        destination: Ipv4Addr::UNSPECIFIED.into(),
        prefix: 0,
        gateway: Some(GATEWAY.into()),
        source: None,
        metric: 0,
        mtu: 0,
        scope: 0,
        on_link: false,
    };
    let interface = Interface {
        name: "eth0".into(),
        mac: MAC.into(),
        mtu: MTU,
        no_arp: false,
        addresses: vec![address],
        routes: vec![default],
        neighbours: Vec::new(),
    };
    Network { interfaces: vec![interface] }
}

/// Lets the program inherit these descriptors under their own numbers.
fn inherit(command: &mut Command, fds: Vec<RawFd>) {
    if fds.is_empty() {
        return;
    }
    let keep = move || {
        for fd in &fds {
            // SAFETY: F_SETFD takes flags and touches no memory.
            if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only fcntl is called, which is async-signal-safe, and memory is only read.
    unsafe { command.pre_exec(keep) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_as_passt_reads_them() {
        let shown = |text: &str| published(&Port::parse(text).unwrap());
        assert_eq!(shown("8080:80"), "8080:80");
        assert_eq!(shown("127.0.0.1:8080:80"), "127.0.0.1/8080:80");
        assert_eq!(shown("[::1]:53:5353/udp"), "::1/53:5353");
    }
}
