//! Messages as they are on the wire: a header, a fixed part, attributes. All numbers are in the machine's byte order.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Bytes of a message's header (`struct nlmsghdr`).
pub const HEADER: usize = 16;
/// Bytes of an attribute's header (`struct nlattr`).
const ATTRIBUTE_HEADER: usize = 4;
/// Flag of an attribute that holds attributes.
const NESTED: u16 = 1 << 15;
/// The bits of an attribute's type that are its type.
const TYPE_MASK: u16 = 0x3fff;

/// A request under construction.
#[derive(Debug, Clone)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A request of this type (`RTM_…`) with these flags besides `NLM_F_REQUEST`, and its fixed part.
    pub fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        put(&mut bytes, 4, &kind.to_ne_bytes());
        // Flags are 16 bits on the wire; libc has them as c_int.
        put(&mut bytes, 6, &((flags | libc::NLM_F_REQUEST) as u16).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        pad(&mut bytes);
        Self { bytes }
    }

    /// Adds an attribute.
    #[must_use]
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.push(kind, value);
        self
    }

    /// Adds an attribute that is a 32-bit number.
    #[must_use]
    pub fn number(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// Adds an attribute that is text, with the zero at its end that the kernel wants.
    #[must_use]
    pub fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// Adds an attribute that is an address.
    #[must_use]
    pub fn address(self, kind: u16, value: IpAddr) -> Self {
        self.attribute(kind, &address_bytes(value))
    }

    /// Adds an attribute that holds those that `fill` adds.
    #[must_use]
    pub fn nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.push(kind | NESTED, &[]);
        let mut filled = fill(self);
        let length = u16::try_from(filled.bytes.len() - start).unwrap_or(u16::MAX);
        put(&mut filled.bytes, start, &length.to_ne_bytes());
        filled
    }

    fn push(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        pad(&mut self.bytes);
    }

    /// The whole message, numbered.
    pub fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        put(&mut self.bytes, 0, &length.to_ne_bytes());
        put(&mut self.bytes, 8, &sequence.to_ne_bytes());
        self.bytes
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// An address as it is on the wire.
pub fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The address of these bytes: 4 or 16.
pub fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(octets).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|octets| Ipv6Addr::from(octets).into())
}

/// `AF_INET` or `AF_INET6`.
pub fn family_of(address: IpAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

/// A message from the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// `RTM_…` or `NLMSG_…`.
    pub kind: u16,
    /// `NLM_F_…`.
    pub flags: u16,
    /// The request it answers.
    pub sequence: u32,
    /// Fixed part and attributes.
    pub payload: Vec<u8>,
}

/// Cuts what was received into messages; stops at one that makes no sense.
pub fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let mut found = Vec::new();
    while let (Some(length), Some(kind), Some(flags), Some(sequence)) =
        (u32_at(bytes, 0), u16_at(bytes, 4), u16_at(bytes, 6), u32_at(bytes, 8))
    {
        let length = length as usize;
        let Some(payload) = bytes.get(HEADER..length) else { break };
        found.push(Message { kind, flags, sequence, payload: payload.to_vec() });
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

impl Message {
    /// The attributes after a fixed part of `fixed` bytes.
    pub fn attributes(&self, fixed: usize) -> Attributes<'_> {
        Attributes { rest: self.payload.get(fixed.next_multiple_of(4)..).unwrap_or_default() }
    }
}

/// Attributes one after the other: type without its flags, and value.
#[derive(Debug, Clone)]
pub struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Attributes<'a> {
    /// The attributes inside of an attribute's value.
    pub fn of(value: &'a [u8]) -> Self {
        Self { rest: value }
    }

    /// The value of the first attribute of this type.
    pub fn get(&self, kind: u16) -> Option<&'a [u8]> {
        self.clone().find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    /// The same as a 32-bit number.
    pub fn number(&self, kind: u16) -> Option<u32> {
        u32_at(self.get(kind)?, 0)
    }

    /// The same as an address.
    pub fn address(&self, kind: u16) -> Option<IpAddr> {
        address_of(self.get(kind)?)
    }

    /// The same as text.
    pub fn text(&self, kind: u16) -> Option<String> {
        let bytes = self.get(kind)?;
        Some(String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned())
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16_at(self.rest, 0)?);
        let kind = u16_at(self.rest, 2)? & TYPE_MASK;
        let value = self.rest.get(ATTRIBUTE_HEADER..length)?;
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

/// The byte at `at`.
pub fn u8_at(bytes: &[u8], at: usize) -> Option<u8> {
    bytes.get(at).copied()
}

/// The 16-bit number at `at`.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// The 32-bit number at `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let request = Request::new(16, 0, &[1, 2, 3, 4])
            .text(3, "eth0")
            .number(4, 1500)
            .nested(18, |inner| inner.text(1, "veth"))
            .address(5, "10.0.0.1".parse().unwrap());
        let bytes = request.finish(7);
        let [message] = &messages(&bytes)[..] else { panic!("one message") };
        assert_eq!((message.kind, message.sequence), (16, 7));
        let attributes = message.attributes(4);
        assert_eq!(attributes.text(3).unwrap(), "eth0");
        assert_eq!(attributes.number(4), Some(1500));
        assert_eq!(Attributes::of(attributes.get(18).unwrap()).text(1).unwrap(), "veth");
        assert_eq!(attributes.address(5), Some("10.0.0.1".parse().unwrap()));
        assert_eq!(attributes.clone().count(), 4);
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(any::<u8>(), 0..200), length in 0_u32..200) {
            let mut framed = bytes.clone();
            if framed.len() >= 4 {
                framed[..4].copy_from_slice(&length.to_ne_bytes());
            }
            for bytes in [&bytes, &framed] {
                for message in messages(bytes) {
                    for (_, value) in message.attributes(8) {
                        let _ = Attributes::of(value).count();
                    }
                }
            }
        }
    }
}
