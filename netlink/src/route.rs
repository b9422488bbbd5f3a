//! Routes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use libc::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE};
use libc::{
    RTA_DST, RTA_GATEWAY, RTA_METRICS, RTA_MULTIPATH, RTA_OIF, RTA_PREFSRC, RTA_PRIORITY, RTA_TABLE, RTA_VIA,
};
use libc::{RTM_DELROUTE, RTM_GETROUTE, RTM_NEWROUTE};

use crate::Socket;
use crate::message::{Attributes, Message, Request, address_bytes, address_of, family_of, u8_at, u32_at};

/// Bytes of `struct rtmsg`.
const FIXED: usize = 12;
/// `RTAX_MTU` in `RTA_METRICS`.
const METRIC_MTU: u16 = 2;
/// `RTNH_F_ONLINK`: the gateway is reachable whatever the addresses say.
const ON_LINK: u32 = 4;

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where it leads.
    pub destination: IpAddr,
    /// Leading bits of it that count; 0 is the default route.
    pub prefix: u8,
    /// The next router; none for a network that is on the link.
    pub gateway: Option<IpAddr>,
    /// Number of the interface that it leaves by.
    pub link: Option<u32>,
    /// The address that it is sent from.
    pub source: Option<IpAddr>,
    /// Which of several is better: the lower.
    pub metric: u32,
    /// Largest packet, 0 for the link's.
    pub mtu: u32,
    /// `RT_SCOPE_…`.
    pub scope: u8,
    /// Who made it: `RTPROT_…`.
    pub protocol: u8,
    /// `RTN_…`.
    pub kind: u8,
    /// `RT_TABLE_…`.
    pub table: u32,
    /// The gateway need not be in a network of the link.
    pub on_link: bool,
    /// It has several ways, of which this knows none.
    pub several_ways: bool,
}

impl Route {
    /// Reads an `RTM_NEWROUTE`.
    pub fn parse(message: &Message) -> Option<Self> {
        let at = |index| u8_at(&message.payload, index);
        let attributes = message.attributes(FIXED);
        let unspecified = match i32::from(at(0)?) {
            libc::AF_INET => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            libc::AF_INET6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => return None,
        };
        let via = attributes.get(RTA_VIA).and_then(|via| address_of(via.get(2..)?));
        let metrics = Attributes::of(attributes.get(RTA_METRICS).unwrap_or_default());
        Some(Self {
            destination: attributes.address(RTA_DST).unwrap_or(unspecified),
            prefix: at(1)?,
            gateway: attributes.address(RTA_GATEWAY).or(via),
            link: attributes.number(RTA_OIF),
            source: attributes.address(RTA_PREFSRC),
            metric: attributes.number(RTA_PRIORITY).unwrap_or(0),
            mtu: metrics.number(METRIC_MTU).unwrap_or(0),
            scope: at(6)?,
            protocol: at(5)?,
            kind: at(7)?,
            table: attributes.number(RTA_TABLE).or_else(|| at(4).map(u32::from))?,
            on_link: u32_at(&message.payload, 8)? & ON_LINK != 0,
            several_ways: attributes.get(RTA_MULTIPATH).is_some(),
        })
    }

    fn request(&self, kind: u16, how: i32) -> Request {
        let flags = if self.on_link { ON_LINK } else { 0 };
        let table = u8::try_from(self.table).unwrap_or(0);
        let mut fixed =
            vec![family_of(self.destination), self.prefix, 0, 0, table, self.protocol, self.scope, self.kind];
        fixed.extend(flags.to_ne_bytes());
        let mut request = Request::new(kind, NLM_F_ACK | how, &fixed).number(RTA_TABLE, self.table);
        if self.prefix > 0 {
            request = request.address(RTA_DST, self.destination);
        }
        if let Some(gateway) = self.gateway {
            request = if gateway.is_ipv4() == self.destination.is_ipv4() {
                request.address(RTA_GATEWAY, gateway)
            } else {
                let via =
                    [u16::from(family_of(gateway)).to_ne_bytes().to_vec(), address_bytes(gateway)].concat();
                request.attribute(RTA_VIA, &via)
            };
        }
        if let Some(link) = self.link {
            request = request.number(RTA_OIF, link);
        }
        if let Some(source) = self.source {
            request = request.address(RTA_PREFSRC, source);
        }
        if self.metric != 0 {
            request = request.number(RTA_PRIORITY, self.metric);
        }
        if self.mtu != 0 {
            request = request.nested(RTA_METRICS, |metrics| metrics.number(METRIC_MTU, self.mtu));
        }
        request
    }
}

impl Socket {
    /// All routes of both families and all tables.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn routes(&mut self) -> io::Result<Vec<Route>> {
        let messages = self.list(&Request::new(RTM_GETROUTE, NLM_F_DUMP, &[0; FIXED]))?;
        Ok(messages.iter().filter_map(Route::parse).collect())
    }

    /// Adds a route, or replaces one to the same place with the same metric.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_route(&mut self, route: &Route) -> io::Result<()> {
        self.execute(route.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE))
    }

    /// Removes a route.
    ///
    /// # Errors
    /// What the kernel says; `ESRCH` when there is none.
    pub fn delete_route(&mut self, route: &Route) -> io::Result<()> {
        self.execute(route.request(RTM_DELROUTE, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::messages;

    #[test]
    fn routes_are_read_as_written() {
        let default = Route {
            destination: "0.0.0.0".parse().unwrap(),
            prefix: 0,
            gateway: Some("10.0.0.1".parse().unwrap()),
            link: Some(2),
            source: Some("10.0.0.2".parse().unwrap()),
            metric: 100,
            mtu: 1400,
            scope: 0,
            protocol: 3,
            kind: libc::RTN_UNICAST,
            table: 254,
            on_link: true,
            several_ways: false,
        };
        let v6 = Route {
            destination: "fd01::".parse().unwrap(),
            prefix: 64,
            gateway: Some("fe80::1".parse().unwrap()),
            source: None,
            metric: 1024,
            mtu: 0,
            on_link: false,
            ..default.clone()
        };
        let over_v6 = Route { gateway: Some("fe80::1".parse().unwrap()), ..default.clone() };
        let link = Route {
            destination: "10.1.0.0".parse().unwrap(),
            prefix: 24,
            gateway: None,
            scope: 253,
            on_link: false,
            ..default.clone()
        };
        for route in [default, v6, over_v6, link] {
            let bytes = route.request(RTM_NEWROUTE, 0).finish(1);
            assert_eq!(Route::parse(&messages(&bytes)[0]), Some(route));
        }
    }
}
