//! The files by which programs find names: `/etc/resolv.conf` and `/etc/hosts`.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::{NamespaceRef, Network};

/// Where systemd-resolved lists the servers that it asks itself; the host's own file then names only the host's loopback.
const BEHIND_RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

/// The container's `/etc/resolv.conf`: `servers` if there are any, otherwise what the host uses, without servers that can
/// only be reached on the host itself. A namespace with a name can have a file of its own, `/etc/netns/NAME/resolv.conf`,
/// as `ip netns exec` has it.
#[must_use]
pub fn resolv_conf(servers: &[IpAddr], namespace: Option<&NamespaceRef>) -> String {
    let own = namespace.and_then(own_file);
    let candidates = own.into_iter().chain(["/etc/resolv.conf".into(), BEHIND_RESOLVED.into()]);
    let texts: Vec<String> = candidates.filter_map(|path: PathBuf| fs::read_to_string(path).ok()).collect();
    choose(servers, &texts)
}

fn own_file(namespace: &NamespaceRef) -> Option<PathBuf> {
    let NamespaceRef::Path(path) = namespace else { return None };
    let name = ["/run/netns", "/var/run/netns"].iter().find_map(|dir| path.strip_prefix(dir).ok())?;
    Some(Path::new("/etc/netns").join(name).join("resolv.conf"))
}

/// The first of `texts` that names a server which the container can reach.
fn choose(servers: &[IpAddr], texts: &[String]) -> String {
    let rest = |text: &str| -> String {
        let keep = |line: &&str| ["search", "domain", "options"].iter().any(|word| line.starts_with(word));
        text.lines().filter(keep).fold(String::new(), |all, line| all + line + "\n")
    };
    if servers.is_empty() {
        for text in texts {
            let found: Vec<_> =
                text.lines().filter_map(server).filter(|found| !found.0.is_loopback()).collect();
            if !found.is_empty() {
                return found.iter().fold(rest(text), |all, (_, line)| all + line + "\n");
            }
        }
    }
    let mut text = rest(texts.first().map_or("", String::as_str));
    for server in servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    text
}

/// The server that a line names.
fn server(line: &str) -> Option<(IpAddr, &str)> {
    let address = line.strip_prefix("nameserver")?.split_whitespace().next()?;
    // A link-local address says by which interface: fe80::1%eth0.
    let address = address.split('%').next()?.parse().ok()?;
    Some((address, line.trim_end()))
}

/// The container's `/etc/hosts`.
#[must_use]
pub fn hosts(hostname: &str, network: &Network) -> String {
    let addresses: Vec<IpAddr> = network
        .interfaces
        .iter()
        .flat_map(|interface| &interface.addresses)
        // What is only good on one link is no address for a name.
        .filter(|address| address.scope == 0)
        .map(|address| address.address)
        .collect();
    let own = if addresses.is_empty() { format!(" {hostname}") } else { String::new() };
    let mut text = format!("127.0.0.1\tlocalhost{own}\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for address in addresses {
        let _ = writeln!(text, "{address}\t{hostname}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_on_the_hosts_loopback_are_no_use() {
        let stub = "# comment\nnameserver 127.0.0.53\nsearch a.example\n".to_owned();
        let behind =
            "nameserver 192.0.2.1\nnameserver fe80::1%eth0\nsearch b.example\noptions edns0\n".to_owned();
        assert_eq!(
            choose(&[], &[stub.clone(), behind]),
            "search b.example\noptions edns0\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\n"
        );
        assert_eq!(choose(&[], std::slice::from_ref(&stub)), "search a.example\n");
        assert_eq!(
            choose(&["192.0.2.9".parse().unwrap()], &[stub]),
            "search a.example\nnameserver 192.0.2.9\n"
        );
        assert_eq!(choose(&[], &[]), "");
    }

    #[test]
    fn a_namespace_with_a_name_can_have_a_file() {
        let file = |path: &str| own_file(&NamespaceRef::Path(path.into()));
        assert_eq!(file("/run/netns/blue"), Some("/etc/netns/blue/resolv.conf".into()));
        assert_eq!(file("/proc/7/ns/net"), None);
        assert_eq!(own_file(&NamespaceRef::Pid(7)), None);
    }

    #[test]
    fn the_host_name_is_that_of_the_containers_address() {
        assert!(hosts("box", &Network::default()).starts_with("127.0.0.1\tlocalhost box\n"));
    }
}
