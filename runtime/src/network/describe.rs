//! What a namespace's network looks like, to be made again in a guest.

use std::net::{IpAddr, Ipv4Addr};

use bulkhead_netlink::{Link, Mac, Socket};
use serde::{Deserialize, Serialize};

use super::{NamespaceRef, is_unicast};
use crate::{Context, Error, Result};

/// A guest's network. As JSON it is what `inspect` shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its interfaces, other than loopback.
    pub interfaces: Vec<Interface>,
}

impl Network {
    /// Whether a machine that was saved with the network `before` can have this one, which is that of `namespace`: the cables can be
    /// plugged into other interfaces, but there are as many as there were.
    ///
    /// # Errors
    /// There are more or fewer.
    pub fn can_follow(&self, before: &Self, namespace: &NamespaceRef) -> Result<()> {
        let names = |network: &Self| {
            let names: Vec<_> = network.interfaces.iter().map(|interface| interface.name.as_str()).collect();
            if names.is_empty() { "none".to_owned() } else { names.join(", ") }
        };
        if self.interfaces.len() == before.interfaces.len() {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "the container was saved with these network interfaces: {}; those of the {namespace} are: {}. There have to be as \
             many as there were, up and with addresses; they may have other names and addresses",
            names(before),
            names(self)
        )))
    }
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name in the namespace and in the guest.
    pub name: String,
    /// Its link-layer address, like `02:00:00:00:00:01`.
    pub mac: String,
    /// Largest packet, without link-layer header.
    pub mtu: u32,
    /// There are no neighbours to ask for, as on `ipvlan` of mode `l3`.
    #[serde(default)]
    pub no_arp: bool,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// Routes that leave by it, those left out that the kernel makes for addresses.
    pub routes: Vec<Route>,
    /// Neighbours that somebody put there to stay.
    pub neighbours: Vec<Neighbour>,
}

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Leading bits of it that name its network.
    pub prefix: u8,
    /// The other end, where the link has two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<IpAddr>,
    /// Address of everybody in the network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broadcast: Option<Ipv4Addr>,
    /// `RT_SCOPE_…`: 0 everywhere, 253 on the link.
    #[serde(default)]
    pub scope: u8,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where it leads.
    pub destination: IpAddr,
    /// Leading bits of it that count, 0 for the default route.
    pub prefix: u8,
    /// The next router, none for what is on the link; IPv4 destinations can have one of IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Address to send from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    /// The lower is the better of two.
    #[serde(default)]
    pub metric: u32,
    /// Largest packet, 0 for the link's.
    #[serde(default)]
    pub mtu: u32,
    /// `RT_SCOPE_…`.
    #[serde(default)]
    pub scope: u8,
    /// The gateway need not be in a network of the link.
    #[serde(default)]
    pub on_link: bool,
}

/// A neighbour.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its link-layer address.
    pub mac: String,
}

/// Most interfaces that a monitor takes.
const MAX_INTERFACES: usize = vmm::config::MAX_NETWORKS;

/// Describes those of `links` that are configured; answers them, too, in the same order.
///
/// # Errors
/// One of them is nothing that a guest can be given.
pub(super) fn read(socket: &mut Socket, links: &[Link]) -> Result<(Vec<Interface>, Vec<Link>)> {
    let addresses = socket.addresses().context(|| "cannot list addresses".into())?;
    let routes = socket.routes().context(|| "cannot list routes".into())?;
    let neighbours = socket.neighbours().context(|| "cannot list neighbours".into())?;
    let mut found: (Vec<Interface>, Vec<Link>) = (Vec::new(), Vec::new());
    for link in links {
        let of_link: Vec<_> = addresses.iter().filter(|address| address.link == link.index).collect();
        // As other runtimes: what is down or has no address is not (or not yet) meant to be used.
        if link.is_loopback() || !link.is_up() || of_link.is_empty() {
            continue;
        }
        let mac = ethernet(link)?;
        if found.0.iter().any(|other| other.mac == mac.to_string()) {
            return Err(Error::Usage(format!(
                "two interfaces have the address {mac}, by which the guest tells them apart; {} is one of them",
                link.name
            )));
        }
        found.0.push(Interface {
            name: link.name.clone(),
            mac: mac.to_string(),
            mtu: link.mtu,
            no_arp: link.flags & libc::IFF_NOARP.unsigned_abs() != 0,
            addresses: of_link
                .iter()
                .map(|address| Address {
                    address: address.local,
                    prefix: address.prefix,
                    peer: address.peer,
                    broadcast: address.broadcast,
                    scope: address.scope,
                })
                .collect(),
            routes: routes.iter().filter_map(|route| of(link, route)).collect(),
            neighbours: neighbours
                .iter()
                .filter(|neighbour| neighbour.link == link.index && neighbour.is_permanent())
                .filter(|neighbour| is_unicast(neighbour.mac))
                .map(|neighbour| Neighbour { address: neighbour.address, mac: neighbour.mac.to_string() })
                .collect(),
        });
        found.1.push(link.clone());
    }
    if let Some(route) = routes.iter().find(|route| {
        route.several_ways && route.table == u32::from(libc::RT_TABLE_MAIN) && route.kind == libc::RTN_UNICAST
    }) {
        return Err(Error::Usage(format!(
            "the route to {}/{} goes several ways at once, which is not supported",
            route.destination, route.prefix
        )));
    }
    if found.0.len() > MAX_INTERFACES {
        return Err(Error::Usage(format!(
            "there are {} network interfaces, but a sandbox can have {MAX_INTERFACES}",
            found.0.len()
        )));
    }
    Ok(found)
}

/// The link-layer address of an interface that speaks Ethernet.
fn ethernet(link: &Link) -> Result<Mac> {
    match link.mac {
        Some(mac) if link.hardware == libc::ARPHRD_ETHER && is_unicast(mac) && link.mtu <= 65535 => Ok(mac),
        _ => Err(Error::Usage(format!(
            "interface {} ({}, hardware type {}, MTU {}) cannot be handed to a guest: only Ethernet interfaces with an \
             MTU of up to 65535 can. Take it down if the container does not need it",
            link.name,
            if link.kind.is_empty() { "a device" } else { &link.kind },
            link.hardware,
            link.mtu
        ))),
    }
}

/// A route that somebody made and that leaves by `link`.
fn of(link: &Link, route: &bulkhead_netlink::Route) -> Option<Route> {
    let wanted = route.link == Some(link.index)
        && route.table == u32::from(libc::RT_TABLE_MAIN)
        && route.kind == libc::RTN_UNICAST
        // The guest's kernel makes these for addresses, as this one did.
        && route.protocol != libc::RTPROT_KERNEL;
    wanted.then_some(Route {
        destination: route.destination,
        prefix: route.prefix,
        gateway: route.gateway,
        source: route.source,
        metric: route.metric,
        mtu: route.mtu,
        scope: route.scope,
        on_link: route.on_link,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str) -> Link {
        Link {
            index: 2,
            name: name.into(),
            hardware: libc::ARPHRD_ETHER,
            flags: libc::IFF_UP.unsigned_abs(),
            mac: Some(Mac([2, 0, 0, 0, 0, 1])),
            mtu: 1500,
            kind: "veth".into(),
        }
    }

    #[test]
    fn what_is_not_ethernet_is_refused_by_name() {
        assert_eq!(ethernet(&link("eth0")).unwrap().to_string(), "02:00:00:00:00:01");
        let wireguard = Link { hardware: 65534, mac: None, kind: "wireguard".into(), ..link("wg0") };
        let error = ethernet(&wireguard).unwrap_err().to_string();
        assert!(error.contains("wg0") && error.contains("wireguard"), "{error}");
    }

    #[test]
    fn the_kernels_own_routes_are_left_out() {
        let route = bulkhead_netlink::Route {
            destination: "10.0.0.0".parse().unwrap(),
            prefix: 24,
            gateway: None,
            link: Some(2),
            source: None,
            metric: 0,
            mtu: 0,
            scope: 253,
            protocol: libc::RTPROT_STATIC,
            kind: libc::RTN_UNICAST,
            table: 254,
            on_link: false,
            several_ways: false,
        };
        let link = link("eth0");
        assert!(of(&link, &route).is_some());
        assert!(
            of(&link, &bulkhead_netlink::Route { protocol: libc::RTPROT_KERNEL, ..route.clone() }).is_none()
        );
        assert!(of(&link, &bulkhead_netlink::Route { table: 255, ..route.clone() }).is_none());
        assert!(of(&link, &bulkhead_netlink::Route { link: Some(3), ..route }).is_none());
    }
}
