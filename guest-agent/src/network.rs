//! The guest's network: gives the interfaces that the monitor offers the names, addresses, routes and neighbours that
//! they have on the host.
//!
//! The host's addresses have been checked for duplicates where they come from, so they are used at once (`NODAD`), and
//! the kernel makes up none by itself: a guest whose network has no IPv6 gets none.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bulkhead_netlink::link::Change;
use bulkhead_netlink::{Address, Link, Mac, Neighbour, Route, Socket};
use bulkhead_protocol::agent::{Network, NetworkAddress, NetworkInterface, NetworkNeighbour};

use crate::container::namespaces::loopback_up;
use crate::error::{Context, Error, Result};

/// Configures every interface of `network`.
///
/// # Errors
/// `NOT_FOUND` for an interface that the monitor did not offer, `INVALID_ARGUMENT` for what is no address, or what the
/// kernel says, with the interface's name.
pub fn configure(network: &Network) -> Result<()> {
    loopback_up()?;
    if network.interfaces.is_empty() {
        return Ok(());
    }
    let mut socket = Socket::open().context(|| "open a netlink socket")?;
    let indices = rename(&mut socket, &network.interfaces, &network.interfaces)?;
    for (interface, (index, mac)) in network.interfaces.iter().zip(indices) {
        set_up(&mut socket, interface, index, mac)
            .context(|| format!("configure network interface {}", interface.name))?;
    }
    Ok(())
}

/// Has the interfaces of a guest that went on from a snapshot become those of `network`, where they are other than before. An interface
/// that is the same keeps what the container has changed of it, and its connections; who is behind its neighbours' addresses is
/// asked anew everywhere.
///
/// # Errors
/// `INVALID_ARGUMENT` when there are more or fewer than before, and as [`configure`].
pub fn change(formerly: &Network, network: &Network) -> Result<()> {
    let (before, now) = (&formerly.interfaces, &network.interfaces);
    if before.len() != now.len() {
        return Err(Error::invalid(format!(
            "the guest has {} network interfaces, {} cannot be made of them",
            before.len(),
            now.len()
        )));
    }
    let mut socket = Socket::open().context(|| "open a netlink socket")?;
    let indices = rename(&mut socket, now, before)?;
    for ((before, now), (link, mac)) in before.iter().zip(now).zip(indices) {
        forget_neighbours(&mut socket, link);
        let changed = if before == now {
            routes(now, link).map(|routes| announce(&mut socket, now, &routes))
        } else {
            take_down(&mut socket, before, now, link).and_then(|()| set_up(&mut socket, now, link, mac))
        };
        changed.context(|| format!("change network interface {} to {}", before.name, now.name))?;
    }
    Ok(())
}

/// Another one may have the address now.
fn forget_neighbours(socket: &mut Socket, link: u32) {
    for neighbour in socket.neighbours().unwrap_or_default() {
        if neighbour.link == link && !neighbour.is_permanent() {
            let _ = socket.delete_neighbour(&neighbour);
        }
    }
}

/// Removes what an interface was given before and is not to have now. What the container has removed already is no error.
fn take_down(
    socket: &mut Socket,
    before: &NetworkInterface,
    now: &NetworkInterface,
    link: u32,
) -> Result<()> {
    let wanted = routes(now, link)?;
    for route in routes(before, link)?.iter().filter(|route| !wanted.contains(route)) {
        let _ = socket.delete_route(route);
    }
    for neighbour in before.neighbours.iter().filter(|neighbour| !now.neighbours.contains(neighbour)) {
        let _ = socket.delete_neighbour(&self::neighbour(neighbour, link)?);
    }
    for address in before.addresses.iter().filter(|address| !now.addresses.contains(address)) {
        let _ = socket.delete_address(&address_of(address, link)?);
    }
    Ok(())
}

/// Finds each interface, by what is known of it, and gives it its name; tells their numbers, and the addresses they have.
fn rename(
    socket: &mut Socket,
    interfaces: &[NetworkInterface],
    known: &[NetworkInterface],
) -> Result<Vec<(u32, Option<Mac>)>> {
    let links = socket.links().context(|| "list network interfaces")?;
    let mut found = Vec::with_capacity(interfaces.len());
    for (position, interface) in known.iter().enumerate() {
        found.push(find(&links, interface, position)?);
    }
    // Names can be in use by one another: all that change give theirs up first.
    let changed: Vec<_> =
        found.iter().zip(interfaces).filter(|(link, interface)| link.name != interface.name).collect();
    for (link, _) in &changed {
        let temporary = format!("bulkhead{}", link.index);
        let change = Change { name: Some(&temporary), ..Change::default() };
        socket.change_link(link.index, &change).context(|| format!("rename {}", link.name))?;
    }
    for (link, interface) in &changed {
        let change = Change { name: Some(&interface.name), ..Change::default() };
        socket
            .change_link(link.index, &change)
            .context(|| format!("rename {} to {}", link.name, interface.name))?;
    }
    Ok(found.iter().map(|link| (link.index, link.mac)).collect())
}

/// By its address. A guest that went on from a template found its interfaces when they had none yet: then by their order,
/// which is the monitor's.
fn find<'a>(links: &'a [Link], interface: &NetworkInterface, position: usize) -> Result<&'a Link> {
    let mac = mac(&interface.mac)?;
    let real = || links.iter().filter(|link| link.mac.is_some() && !link.is_loopback());
    real().find(|link| link.mac == Some(mac)).or_else(|| real().nth(position)).ok_or_else(|| {
        Error::not_found(format!("there is no network interface with address {mac} for {}", interface.name))
    })
}

fn set_up(socket: &mut Socket, interface: &NetworkInterface, link: u32, has: Option<Mac>) -> Result<()> {
    let no_arp = if interface.no_arp { libc::IFF_NOARP as u32 } else { 0 };
    let mtu = (interface.mtu != 0).then_some(interface.mtu);
    let wanted = mac(&interface.mac)?;
    let mac = (has != Some(wanted)).then_some(wanted);
    let change = Change { mtu, mac, no_generated_addresses: true, set_flags: no_arp, ..Change::default() };
    socket
        .change_link(link, &change)
        .context(|| format!("set its address and its MTU, which is to be {}", interface.mtu))?;
    socket
        .change_link(link, &Change { set_flags: libc::IFF_UP as u32, ..Change::default() })
        .context(|| "bring it up")?;
    for one in &interface.addresses {
        let address = address_of(one, link)?;
        socket
            .add_address(&address)
            .context(|| format!("add address {}/{}", address.local, address.prefix))?;
    }
    for one in &interface.neighbours {
        let neighbour = neighbour(one, link)?;
        socket.add_neighbour(&neighbour).context(|| format!("add neighbour {}", neighbour.address))?;
    }
    let mut routes = routes(interface, link)?;
    // A gateway must be reachable when the route over it is made.
    routes.sort_by_key(|route| route.gateway.is_some());
    for route in &routes {
        socket.add_route(route).context(|| format!("add route {}/{}", route.destination, route.prefix))?;
    }
    announce(socket, interface, &routes);
    Ok(())
}

fn address_of(one: &NetworkAddress, link: u32) -> Result<Address> {
    Ok(Address {
        link,
        local: address(&one.address)?,
        prefix: byte(one.prefix)?,
        peer: optional(&one.peer)?,
        broadcast: match optional(&one.broadcast)? {
            Some(IpAddr::V4(broadcast)) => Some(broadcast),
            _ => None,
        },
        scope: byte(one.scope)?,
        flags: libc::IFA_F_PERMANENT | libc::IFA_F_NODAD,
    })
}

fn neighbour(one: &NetworkNeighbour, link: u32) -> Result<Neighbour> {
    Ok(Neighbour { link, address: address(&one.address)?, mac: mac(&one.mac)?, state: libc::NUD_PERMANENT })
}

/// Asks for the gateways, so that they, and every bridge on the way, have heard of this guest before anybody wants to reach
/// it: passt learns its guest's address from what it sends. That this fails is no reason to.
fn announce(socket: &mut Socket, interface: &NetworkInterface, routes: &[Route]) {
    let known =
        |gateway: &IpAddr| interface.neighbours.iter().any(|n| address(&n.address).as_ref() == Ok(gateway));
    for route in routes {
        if let (Some(gateway), Some(link), false) = (route.gateway, route.link, interface.no_arp)
            && !known(&gateway)
        {
            let _ = socket.ask_for(link, gateway);
        }
    }
}

fn routes(interface: &NetworkInterface, link: u32) -> Result<Vec<Route>> {
    let route = |one: &bulkhead_protocol::agent::NetworkRoute| {
        Ok(Route {
            destination: address(&one.destination)?,
            prefix: byte(one.prefix)?,
            gateway: optional(&one.gateway)?,
            link: Some(link),
            source: optional(&one.source)?,
            metric: one.metric,
            mtu: one.mtu,
            scope: byte(one.scope)?,
            protocol: libc::RTPROT_BOOT,
            kind: libc::RTN_UNICAST,
            table: libc::RT_TABLE_MAIN.into(),
            on_link: one.on_link,
            several_ways: false,
        })
    };
    interface.routes.iter().map(route).collect()
}

fn byte(number: u32) -> Result<u8> {
    u8::try_from(number).map_err(|_| Error::invalid(format!("{number} is no prefix length or scope")))
}

fn mac(bytes: &[u8]) -> Result<Mac> {
    bytes.try_into().map(Mac).map_err(|_| Error::invalid(format!("{bytes:?} is no link-layer address")))
}

fn address(bytes: &[u8]) -> Result<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(octets).into());
    }
    let octets = <[u8; 16]>::try_from(bytes)
        .map_err(|_| Error::invalid(format!("{bytes:?} is no internet address")))?;
    Ok(Ipv6Addr::from(octets).into())
}

fn optional(bytes: &[u8]) -> Result<Option<IpAddr>> {
    if bytes.is_empty() { Ok(None) } else { address(bytes).map(Some) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_4_or_16_bytes() {
        assert_eq!(address(&[10, 0, 0, 1]).unwrap(), "10.0.0.1".parse::<IpAddr>().unwrap());
        assert!(address(&[0; 16]).unwrap().is_ipv6());
        assert!(address(&[]).is_err() && address(&[1; 5]).is_err() && mac(&[1; 5]).is_err());
        assert_eq!(optional(&[]).unwrap(), None);
    }

    #[test]
    fn an_interface_that_is_not_there_is_named() {
        let interface =
            NetworkInterface { mac: vec![2, 0, 0, 0, 0, 9], name: "eth7".into(), ..Default::default() };
        let error = find(&[], &interface, 0).unwrap_err();
        assert!(error.message.contains("02:00:00:00:00:09") && error.message.contains("eth7"), "{error}");
    }
}
