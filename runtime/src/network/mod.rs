//! Joins a microVM to a network namespace that an engine, or a person, has prepared.
//!
//! [`attach`] enters the namespace, reads what its interfaces are (addresses, routes, MTU, neighbours), puts a tap beside
//! each and has the kernel redirect all traffic between the two. The taps go to the monitor, the description to the
//! agent, which makes the same interfaces in the guest: whoever talks to the namespace talks to the guest. [`detach`]
//! takes the taps and redirections out again.
//!
//! Taps end with the last process that has their descriptors. A redirection to a tap that is gone is left when everybody
//! is killed: the next [`attach`] to that namespace removes it.

mod describe;
pub mod loopback;
pub mod names;
mod namespace;
mod passt;
mod resolver;
mod tap;
mod wire;
mod wish;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bulkhead_netlink::link::Change;
use bulkhead_netlink::{Link, Mac, Socket};
use serde::{Deserialize, Serialize};

use crate::{Context, Error, Result};

pub use describe::{Address, Interface, Neighbour, Network, Route};
pub(crate) use passt::Passt;
pub use resolver::{hosts, resolv_conf};
pub use wish::{NetworkWish, Port};

/// How long a sandbox that has just been killed may take to let go of its taps.
const PATIENCE: Duration = Duration::from_secs(2);

/// A network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceRef {
    /// By a file: `/run/netns/NAME`, `/proc/PID/ns/net`.
    Path(PathBuf),
    /// By a process in it.
    Pid(u32),
}

impl NamespaceRef {
    /// The file that stands for it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Path(path) => path.clone(),
            Self::Pid(pid) => format!("/proc/{pid}/ns/net").into(),
        }
    }
}

impl fmt::Display for NamespaceRef {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "network namespace {}", self.path().display())
    }
}

/// Whose taps and redirections they are: part of the taps' names and the redirections' handles, so that one sandbox does
/// not take away another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tag(u32);

impl Tag {
    /// The tag of the sandbox `owner`: any text, its first 8 characters when they are hexadecimal digits, as an id's are.
    fn of(owner: &str) -> Self {
        let number =
            owner.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or_else(|| {
                // FNV-1a: spreads names well enough, and is the same in every build.
                owner
                    .bytes()
                    .fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
            });
        Self(number.max(1))
    }

    /// The name of tap number `number`.
    fn tap(self, number: usize) -> String {
        format!("bh{:08x}-{number}", self.0)
    }

    /// The tag in a tap's name.
    fn of_tap(link: &Link) -> Option<Self> {
        let (digits, number) = link.name.strip_prefix("bh")?.split_once('-')?;
        let well_formed = digits.len() == 8 && !number.is_empty() && link.kind == "tun";
        u32::from_str_radix(digits, 16).ok().filter(|_| well_formed).map(Self)
    }
}

/// What [`attach`] has made.
#[derive(Debug)]
pub struct Attachment {
    /// What the guest is to be given: `network.to_message()` is the agent's form of it.
    pub network: Network,
    /// A tap for each of `network.interfaces`, in that order, for the monitor to inherit. The sandbox has its network for
    /// as long as one process has these open.
    pub taps: Vec<OwnedFd>,
}

/// Joins a sandbox to a network namespace. `owner` is the sandbox's id, which [`detach`] must be told again.
///
/// A namespace with nothing but a loopback interface makes an attachment without interfaces. Interfaces that are down or
/// have no address are left alone. The calling process keeps its own namespace: a thread of short life does all this.
///
/// # Errors
/// There is no such namespace, it is the host's own, another sandbox uses it, it has an interface that cannot be handed to
/// a guest, or the caller lacks `CAP_NET_ADMIN` and `CAP_SYS_ADMIN`. Nothing is left in the namespace then.
pub fn attach(namespace: &NamespaceRef, owner: &str) -> Result<Attachment> {
    let tag = Tag::of(owner);
    namespace::within(namespace, || {
        let result = join(namespace, tag);
        if result.is_err() {
            // What can be taken back is; the error that is told is the first.
            let _ = part(tag);
        }
        result
    })
}

/// Takes what [`attach`] made for `owner` out of the namespace, whether its monitor still runs or not. No error if there is
/// nothing, or if the namespace is gone.
///
/// # Errors
/// The kernel refuses, or the namespace cannot be entered.
pub fn detach(namespace: &NamespaceRef, owner: &str) -> Result<()> {
    if !namespace.path().exists() {
        return Ok(());
    }
    namespace::within(namespace, || part(Tag::of(owner)))
}

fn socket() -> Result<Socket> {
    Socket::open().context(|| "cannot open a netlink socket".into())
}

/// In the namespace: everything of [`attach`].
fn join(namespace: &NamespaceRef, tag: Tag) -> Result<Attachment> {
    let mut socket = socket()?;
    let links = free_links(&mut socket, namespace)?;
    let (interfaces, links) = describe::read(&mut socket, &links)?;
    let mut taps = Vec::with_capacity(links.len());
    for (link, number) in links.iter().zip(0..) {
        let what = || format!("cannot join a tap and {} of {namespace}", link.name);
        let (tap, index) = tap::create(&tag.tap(number)).context(what)?;
        let change = Change {
            mtu: Some(link.mtu),
            // An address of its own would answer to the guest.
            no_generated_addresses: true,
            set_flags: libc::IFF_UP.unsigned_abs(),
            ..Change::default()
        };
        // The IPv6 part fails where the host has no IPv6; then there is nothing to turn off.
        socket
            .change_link(index, &change)
            .or_else(|_| socket.change_link(index, &Change { no_generated_addresses: false, ..change }))
            .context(what)?;
        for (from, to) in [(index, link.index), (link.index, index)] {
            socket.add_ingress(from).context(what)?;
            socket.redirect(from, to, tag.0).context(|| {
                format!("{} (are the kernel modules cls_matchall and act_mirred there?)", what())
            })?;
        }
        taps.push(tap);
    }
    Ok(Attachment { network: Network { interfaces }, taps })
}

/// The namespace's interfaces, once no other sandbox uses it and what dead ones have left is removed.
fn free_links(socket: &mut Socket, namespace: &NamespaceRef) -> Result<Vec<Link>> {
    let deadline = Instant::now() + PATIENCE;
    let links = loop {
        let links = socket.links().context(|| format!("cannot list the interfaces of {namespace}"))?;
        match links.iter().find(|link| Tag::of_tap(link).is_some()) {
            None => break links,
            Some(tap) if Instant::now() > deadline => {
                return Err(Error::Usage(format!(
                    "another sandbox uses {namespace} (its tap is {}): containers that share a network must share \
                     a sandbox",
                    tap.name
                )));
            }
            Some(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let what = || format!("cannot look at the traffic control of {namespace}");
    for qdisc in socket.qdiscs().context(what)?.iter().filter(|qdisc| qdisc.is_ingress()) {
        let filters = socket.ingress_filters(qdisc).context(what)?;
        let link = links.iter().find(|link| link.index == qdisc.link);
        if filters.iter().any(|filter| !filter.is_ours()) || qdisc.kind != "ingress" {
            let name = link.map_or("?", |link| &link.name);
            return Err(Error::Usage(format!(
                "interface {name} of {namespace} has a traffic-control qdisc {:?} of somebody else's (`tc filter show \
                 dev {name} ingress` shows its filters), in whose place the sandbox's redirection would have to be",
                qdisc.kind
            )));
        }
        // All that is left of a sandbox whose taps are gone.
        if !filters.is_empty() {
            socket.delete_ingress(qdisc.link).context(what)?;
        }
    }
    Ok(links)
}

/// In the namespace: everything of [`detach`].
fn part(tag: Tag) -> Result<()> {
    let mut socket = socket()?;
    let what = || "cannot remove a sandbox's redirections".to_owned();
    for qdisc in socket.qdiscs().context(what)?.iter().filter(|qdisc| qdisc.is_ingress()) {
        let filters = socket.ingress_filters(qdisc).context(what)?;
        if !filters.is_empty() && filters.iter().all(|filter| filter.is_ours() && filter.tag == tag.0) {
            ignore_absence(socket.delete_ingress(qdisc.link)).context(what)?;
        }
    }
    for link in socket.links().context(what)?.iter().filter(|link| Tag::of_tap(link) == Some(tag)) {
        ignore_absence(socket.delete_link(link.index)).context(what)?;
    }
    Ok(())
}

/// Interfaces go by themselves when their descriptors are closed, and take their qdiscs along.
fn ignore_absence(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if is_absence(&error) => Ok(()),
        other => other,
    }
}

fn is_absence(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
        || [libc::ENODEV, libc::EINVAL, libc::ENOENT].iter().any(|errno| error.raw_os_error() == Some(*errno))
}

/// Whether an address is one that a single interface can have.
fn is_unicast(mac: Mac) -> bool {
    let Mac([first, ..]) = mac;
    first & 1 == 0 && mac != Mac([0; 6])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_in_taps_names() {
        let tag = Tag::of("0123abcdef");
        assert_eq!(tag, Tag(0x0123_abcd));
        let mut link = Link {
            index: 1,
            name: tag.tap(3),
            hardware: 1,
            flags: 0,
            mac: None,
            mtu: 1500,
            kind: "tun".into(),
        };
        assert_eq!(link.name, "bh0123abcd-3");
        assert_eq!(Tag::of_tap(&link), Some(tag));
        assert!(tag.tap(999).len() < libc::IFNAMSIZ);
        link.kind = "veth".into();
        assert_eq!(Tag::of_tap(&link), None);
        // Names that are no ids have tags, too, and different ones.
        assert_ne!(Tag::of("web"), Tag::of("db"));
        assert_ne!(Tag::of("00000000"), Tag(0));
    }

    #[test]
    fn a_namespace_that_is_none_is_an_error_that_names_it() {
        let missing = attach(&NamespaceRef::Path("/run/netns/no-such".into()), "0").unwrap_err();
        assert!(missing.chain().contains("/run/netns/no-such"), "{}", missing.chain());
        let own = attach(&NamespaceRef::Pid(std::process::id()), "0").unwrap_err();
        assert!(own.chain().contains("host's"), "{}", own.chain());
        let file = attach(&NamespaceRef::Path("/etc/passwd".into()), "0").unwrap_err();
        assert!(file.chain().contains("not a network namespace"), "{}", file.chain());
        assert!(detach(&NamespaceRef::Path("/run/netns/no-such".into()), "0").is_ok());
    }
}
