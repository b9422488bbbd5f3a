//! A question to a name server: one connection each, which the guest opens with the transport that it was asked by. The
//! question follows, and the answer comes back, both after their length in two bytes, as DNS has them over TCP.

use std::io::{self, Read, Write};

/// How a question came and is to be passed on: its answer depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A datagram.
    Udp,
    /// A message of a stream.
    Tcp,
}

impl Transport {
    /// The first byte of a connection.
    pub fn byte(self) -> u8 {
        match self {
            Self::Udp => b'u',
            Self::Tcp => b't',
        }
    }

    /// The reverse.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Udp, Self::Tcp].into_iter().find(|transport| transport.byte() == byte)
    }
}

/// Reads a message.
///
/// # Errors
/// The other side has ended before its end.
pub fn read_message(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// Writes a message, all at once: some name servers want it so.
///
/// # Errors
/// It is longer than 65535 bytes, or cannot be written.
pub fn write_message(stream: &mut impl Write, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_whole_or_not_at_all() {
        let mut bytes = Vec::new();
        write_message(&mut bytes, b"question").unwrap();
        assert_eq!(read_message(&mut bytes.as_slice()).unwrap(), b"question");
        bytes.pop();
        assert!(read_message(&mut bytes.as_slice()).is_err());
        assert!(write_message(&mut bytes, &[0; 65536]).is_err());
        assert_eq!(Transport::from_byte(Transport::Tcp.byte()), Some(Transport::Tcp));
        assert_eq!(Transport::from_byte(0), None);
    }
}
