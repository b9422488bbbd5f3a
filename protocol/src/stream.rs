//! Length-delimited messages at the head of a stdio stream.

use std::io::{self, Read, Write};

use prost::Message;

/// Longest hello or reply, in bytes.
pub const MAX_HELLO: usize = 16 << 10;

/// Writes one message with its varint length before it.
///
/// # Errors
/// What the stream says.
pub fn write_message(stream: &mut impl Write, message: &impl Message) -> io::Result<()> {
    stream.write_all(&message.encode_length_delimited_to_vec())
}

/// Reads one message and not a byte beyond it: what follows are raw bytes.
///
/// # Errors
/// The stream's own, `InvalidData` for one that does not decode or is over [`MAX_HELLO`].
pub fn read_message<M: Message + Default>(stream: &mut impl Read) -> io::Result<M> {
    let mut length = 0usize;
    for shift in [0, 7, 14] {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        length |= usize::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            if length > MAX_HELLO {
                break;
            }
            let mut payload = vec![0; length];
            stream.read_exact(&mut payload)?;
            return M::decode(payload.as_slice()).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e));
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message of over {MAX_HELLO} bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::StreamHello;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn reads_what_was_written_and_nothing_more(container in ".{0,300}", rest in prop::collection::vec(any::<u8>(), 0..50)) {
            let hello = StreamHello { container, ..Default::default() };
            let mut bytes = Vec::new();
            write_message(&mut bytes, &hello).unwrap();
            bytes.extend_from_slice(&rest);
            let mut reader = bytes.as_slice();
            prop_assert_eq!(read_message::<StreamHello>(&mut reader).unwrap(), hello);
            prop_assert_eq!(reader, rest.as_slice());
        }

        #[test]
        fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = read_message::<StreamHello>(&mut bytes.as_slice());
        }
    }
}
