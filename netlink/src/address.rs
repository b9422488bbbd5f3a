//! Addresses of interfaces.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use libc::{IFA_ADDRESS, IFA_BROADCAST, IFA_LOCAL, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE};
use libc::{RTM_DELADDR, RTM_GETADDR, RTM_NEWADDR};

use crate::Socket;
use crate::message::{Message, Request, family_of, u8_at, u32_at};

/// Bytes of `struct ifaddrmsg`.
const FIXED: usize = 8;
/// `IFA_FLAGS`: all 32 flags, of which the fixed part has eight.
const FLAGS: u16 = 8;

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The interface's number.
    pub link: u32,
    /// The address.
    pub local: IpAddr,
    /// Leading bits of it that name its network.
    pub prefix: u8,
    /// The other end, where the link has two.
    pub peer: Option<IpAddr>,
    /// Address of everybody in the network.
    pub broadcast: Option<Ipv4Addr>,
    /// `RT_SCOPE_…`.
    pub scope: u8,
    /// `IFA_F_…`.
    pub flags: u32,
}

impl Address {
    /// Reads an `RTM_NEWADDR`.
    pub fn parse(message: &Message) -> Option<Self> {
        let attributes = message.attributes(FIXED);
        let address = attributes.address(IFA_ADDRESS);
        // IPv4 has the address in IFA_LOCAL and the peer in IFA_ADDRESS; IPv6 has IFA_LOCAL only where there is a peer.
        let local = attributes.address(IFA_LOCAL).or(address)?;
        let broadcast = match attributes.address(IFA_BROADCAST) {
            Some(IpAddr::V4(broadcast)) => Some(broadcast),
            _ => None,
        };
        Some(Self {
            link: u32_at(&message.payload, 4)?,
            local,
            prefix: u8_at(&message.payload, 1)?,
            peer: address.filter(|address| *address != local),
            broadcast,
            scope: u8_at(&message.payload, 3)?,
            flags: attributes.number(FLAGS).or_else(|| u8_at(&message.payload, 2).map(u32::from))?,
        })
    }

    fn request(&self, kind: u16, flags: i32) -> Request {
        let [a, b, c, d] = self.link.to_ne_bytes();
        let fixed = [family_of(self.local), self.prefix, self.flags as u8, self.scope, a, b, c, d];
        let request = Request::new(kind, NLM_F_ACK | flags, &fixed)
            .address(IFA_LOCAL, self.local)
            .address(IFA_ADDRESS, self.peer.unwrap_or(self.local))
            .number(FLAGS, self.flags);
        match self.broadcast {
            Some(broadcast) => request.address(IFA_BROADCAST, broadcast.into()),
            None => request,
        }
    }
}

impl Socket {
    /// All addresses.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let messages = self.list(&Request::new(RTM_GETADDR, NLM_F_DUMP, &[0; FIXED]))?;
        Ok(messages.iter().filter_map(Address::parse).collect())
    }

    /// Gives an interface an address, which it may have already.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_address(&mut self, address: &Address) -> io::Result<()> {
        self.execute(address.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE))
    }

    /// Takes an address from an interface, and the routes along that the kernel made for it.
    ///
    /// # Errors
    /// What the kernel says; `EADDRNOTAVAIL` when the interface does not have it.
    pub fn delete_address(&mut self, address: &Address) -> io::Result<()> {
        self.execute(address.request(RTM_DELADDR, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::messages;

    #[test]
    fn addresses_are_read_as_written() {
        let v4 = Address {
            link: 3,
            local: "10.88.0.2".parse().unwrap(),
            prefix: 16,
            peer: None,
            broadcast: Some("10.88.255.255".parse().unwrap()),
            scope: 0,
            flags: libc::IFA_F_PERMANENT,
        };
        let peer = Address { peer: Some("10.88.0.1".parse().unwrap()), prefix: 32, ..v4.clone() };
        let v6 = Address {
            local: "fd00::2".parse().unwrap(),
            prefix: 64,
            broadcast: None,
            flags: libc::IFA_F_NODAD,
            ..v4.clone()
        };
        for address in [v4, peer, v6] {
            let bytes = address.request(RTM_NEWADDR, 0).finish(1);
            assert_eq!(Address::parse(&messages(&bytes)[0]), Some(address));
        }
    }
}
