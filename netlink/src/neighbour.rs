//! Neighbours: which link-layer address an address has.

use std::io;
use std::net::IpAddr;

use libc::{NDA_DST, NDA_LLADDR, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NUD_PERMANENT};
use libc::{RTM_DELNEIGH, RTM_GETNEIGH, RTM_NEWNEIGH};

use crate::message::{Message, Request, family_of, u16_at, u32_at};
use crate::{Mac, Socket};

/// Bytes of `struct ndmsg`.
const FIXED: usize = 12;

/// A neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Number of the interface on which it is.
    pub link: u32,
    /// Its address.
    pub address: IpAddr,
    /// Its link-layer address.
    pub mac: Mac,
    /// `NUD_…`.
    pub state: u16,
}

impl Neighbour {
    /// Reads an `RTM_NEWNEIGH` of an Ethernet neighbour.
    pub fn parse(message: &Message) -> Option<Self> {
        let attributes = message.attributes(FIXED);
        Some(Self {
            link: u32_at(&message.payload, 4)?,
            address: attributes.address(NDA_DST)?,
            mac: attributes.get(NDA_LLADDR)?.try_into().ok().map(Mac)?,
            state: u16_at(&message.payload, 8)?,
        })
    }

    /// Whether somebody put it there to stay.
    pub fn is_permanent(&self) -> bool {
        self.state & NUD_PERMANENT != 0
    }

    fn request(&self, kind: u16, flags: i32) -> Request {
        let mut fixed = vec![family_of(self.address), 0, 0, 0];
        fixed.extend(self.link.to_ne_bytes());
        fixed.extend(self.state.to_ne_bytes());
        fixed.extend([0, 0]);
        Request::new(kind, NLM_F_ACK | flags, &fixed)
            .address(NDA_DST, self.address)
            .attribute(NDA_LLADDR, &self.mac.0)
    }
}

impl Socket {
    /// All neighbours of both families.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn neighbours(&mut self) -> io::Result<Vec<Neighbour>> {
        let messages = self.list(&Request::new(RTM_GETNEIGH, NLM_F_DUMP, &[0; FIXED]))?;
        Ok(messages.iter().filter_map(Neighbour::parse).collect())
    }

    /// Adds a neighbour, or replaces the one of that address.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_neighbour(&mut self, neighbour: &Neighbour) -> io::Result<()> {
        self.execute(neighbour.request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE))
    }

    /// Forgets a neighbour.
    ///
    /// # Errors
    /// What the kernel says; `ENOENT` when it knows none of that address.
    pub fn delete_neighbour(&mut self, neighbour: &Neighbour) -> io::Result<()> {
        self.execute(neighbour.request(RTM_DELNEIGH, 0))
    }

    /// Has the kernel ask for an address's link-layer address, without waiting for an answer.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn ask_for(&mut self, link: u32, address: IpAddr) -> io::Result<()> {
        let mut fixed = vec![family_of(address), 0, 0, 0];
        fixed.extend(link.to_ne_bytes());
        fixed.extend([0, 0, libc::NTF_USE, 0]);
        self.execute(Request::new(RTM_NEWNEIGH, NLM_F_ACK | NLM_F_CREATE, &fixed).address(NDA_DST, address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::messages;

    #[test]
    fn neighbours_are_read_as_written() {
        for address in ["10.0.0.1", "fe80::1"] {
            let neighbour = Neighbour {
                link: 2,
                address: address.parse().unwrap(),
                mac: Mac([2, 0, 0, 0, 0, 9]),
                state: NUD_PERMANENT,
            };
            let bytes = neighbour.request(RTM_NEWNEIGH, 0).finish(1);
            let read = Neighbour::parse(&messages(&bytes)[0]).unwrap();
            assert!(read.is_permanent());
            assert_eq!(read, neighbour);
        }
    }
}
