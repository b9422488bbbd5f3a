//! Network interfaces.

use std::fmt;
use std::io;
use std::str::FromStr;

use libc::{
    IFLA_ADDRESS, IFLA_AF_SPEC, IFLA_IFNAME, IFLA_INFO_KIND, IFLA_LINKINFO, IFLA_MTU, NLM_F_ACK, NLM_F_DUMP,
    RTM_DELLINK, RTM_GETLINK, RTM_NEWLINK,
};

use crate::Socket;
use crate::message::{Attributes, Message, Request, u16_at, u32_at};

/// Bytes of `struct ifinfomsg`.
const FIXED: usize = 16;
/// `IFLA_INET6_ADDR_GEN_MODE` and its value for "none".
const ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_NONE: u8 = 1;

/// A link-layer address of Ethernet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a MAC address: write it like 02:00:00:00:00:01");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it speaks: `ARPHRD_…`.
    pub hardware: u16,
    /// `IFF_…`.
    pub flags: u32,
    /// Its link-layer address, if it is one of Ethernet.
    pub mac: Option<Mac>,
    /// Largest packet, without link-layer header.
    pub mtu: u32,
    /// What made it: `veth`, `macvlan`, `tun`, …; empty for a device.
    pub kind: String,
}

impl Link {
    /// Reads an `RTM_NEWLINK`.
    pub fn parse(message: &Message) -> Option<Self> {
        let attributes = message.attributes(FIXED);
        let info = Attributes::of(attributes.get(IFLA_LINKINFO).unwrap_or_default());
        Some(Self {
            index: u32_at(&message.payload, 4)?,
            hardware: u16_at(&message.payload, 2)?,
            flags: u32_at(&message.payload, 8)?,
            name: attributes.text(IFLA_IFNAME)?,
            mac: attributes.get(IFLA_ADDRESS).and_then(|bytes| bytes.try_into().ok()).map(Mac),
            mtu: attributes.number(IFLA_MTU).unwrap_or(0),
            kind: info.text(IFLA_INFO_KIND).unwrap_or_default(),
        })
    }

    /// Whether it is up.
    pub fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP as u32 != 0
    }

    /// Whether it is a loopback interface.
    pub fn is_loopback(&self) -> bool {
        self.flags & libc::IFF_LOOPBACK as u32 != 0
    }
}

/// What to change of an interface; what is `None` stays.
#[derive(Debug, Clone, Default)]
pub struct Change<'a> {
    /// New name. The interface must be down, before Linux 6.2.
    pub name: Option<&'a str>,
    /// New MTU.
    pub mtu: Option<u32>,
    /// New link-layer address.
    pub mac: Option<Mac>,
    /// Do not make up IPv6 addresses.
    pub no_generated_addresses: bool,
    /// `IFF_…` to set.
    pub set_flags: u32,
}

/// `struct ifinfomsg` of interface `index`.
fn fixed(index: u32, flags: u32) -> [u8; FIXED] {
    let mut fixed = [0; FIXED];
    let parts = [(4, index), (8, flags), (12, flags)];
    for (at, value) in parts {
        for (to, from) in fixed.iter_mut().skip(at).zip(value.to_ne_bytes()) {
            *to = from;
        }
    }
    fixed
}

impl Socket {
    /// All interfaces.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let messages = self.list(&Request::new(RTM_GETLINK, NLM_F_DUMP, &[0; FIXED]))?;
        Ok(messages.iter().filter_map(Link::parse).collect())
    }

    /// Changes interface `index`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn change_link(&mut self, index: u32, change: &Change<'_>) -> io::Result<()> {
        let mut request = Request::new(RTM_NEWLINK, NLM_F_ACK, &fixed(index, change.set_flags));
        if let Some(name) = change.name {
            request = request.text(IFLA_IFNAME, name);
        }
        if let Some(mtu) = change.mtu {
            request = request.number(IFLA_MTU, mtu);
        }
        if let Some(mac) = change.mac {
            request = request.attribute(IFLA_ADDRESS, &mac.0);
        }
        if change.no_generated_addresses {
            request = request.nested(IFLA_AF_SPEC, |families| {
                families
                    .nested(libc::AF_INET6 as u16, |inet6| inet6.attribute(ADDR_GEN_MODE, &[ADDR_GEN_NONE]))
            });
        }
        self.execute(request)
    }

    /// Removes interface `index`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn delete_link(&mut self, index: u32) -> io::Result<()> {
        self.execute(Request::new(RTM_DELLINK, NLM_F_ACK, &fixed(index, 0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::messages;

    #[test]
    fn mac_addresses_are_read_as_written() {
        let mac: Mac = "02:00:00:0a:0B:ff".parse().unwrap();
        assert_eq!(mac, Mac([2, 0, 0, 10, 11, 255]));
        assert_eq!(mac.to_string(), "02:00:00:0a:0b:ff");
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "2:0:0:0:0:0",
            "02:00:00:00:00:0g",
            "+2:00:00:00:00:00x",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn links_are_read() {
        let request = Request::new(RTM_NEWLINK, 0, &fixed(7, libc::IFF_UP as u32))
            .text(IFLA_IFNAME, "eth0")
            .attribute(IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1])
            .number(IFLA_MTU, 9000)
            .nested(IFLA_LINKINFO, |info| info.text(IFLA_INFO_KIND, "veth"));
        let bytes = request.finish(1);
        let link = Link::parse(&messages(&bytes)[0]).unwrap();
        assert_eq!((link.index, link.name.as_str(), link.mtu, link.kind.as_str()), (7, "eth0", 9000, "veth"));
        assert!(link.is_up() && !link.is_loopback());
        assert_eq!(link.mac, Some(Mac([2, 0, 0, 0, 0, 1])));
    }

    #[test]
    fn this_machine_has_a_loopback_interface() {
        let links = Socket::open().and_then(|mut socket| socket.links()).unwrap();
        assert!(links.iter().any(|link| link.is_loopback() && link.name == "lo"), "{links:?}");
        // Refused: there is no such interface, and the kernel says so.
        assert!(Socket::open().unwrap().delete_link(0x7fff_fff0).is_err());
    }
}
