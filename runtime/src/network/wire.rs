//! The description in the agent's words.

use std::net::IpAddr;

use bulkhead_netlink::{Mac, message::address_bytes};
use bulkhead_protocol::agent;

use super::Network;

impl Network {
    /// What the agent is told, in `Configure` or `ConfigureNetwork`.
    #[must_use]
    pub fn to_message(&self) -> agent::Network {
        let optional = |address: Option<IpAddr>| address.map(address_bytes).unwrap_or_default();
        let interfaces = self.interfaces.iter().map(|interface| agent::NetworkInterface {
            mac: mac_bytes(&interface.mac),
            name: interface.name.clone(),
            mtu: interface.mtu,
            no_arp: interface.no_arp,
            addresses: interface
                .addresses
                .iter()
                .map(|address| agent::NetworkAddress {
                    address: address_bytes(address.address),
                    prefix: address.prefix.into(),
                    peer: optional(address.peer),
                    broadcast: optional(address.broadcast.map(IpAddr::V4)),
                    scope: address.scope.into(),
                })
                .collect(),
            routes: interface
                .routes
                .iter()
                .map(|route| agent::NetworkRoute {
                    destination: address_bytes(route.destination),
                    prefix: route.prefix.into(),
                    gateway: optional(route.gateway),
                    source: optional(route.source),
                    metric: route.metric,
                    mtu: route.mtu,
                    scope: route.scope.into(),
                    on_link: route.on_link,
                })
                .collect(),
            neighbours: interface
                .neighbours
                .iter()
                .map(|neighbour| agent::NetworkNeighbour {
                    address: address_bytes(neighbour.address),
                    mac: mac_bytes(&neighbour.mac),
                })
                .collect(),
        });
        agent::Network { interfaces: interfaces.collect() }
    }
}

/// Six bytes; none for text that is no address, which the agent refuses with words of its own.
fn mac_bytes(text: &str) -> Vec<u8> {
    text.parse().map(|Mac(bytes)| bytes.to_vec()).unwrap_or_default()
}
