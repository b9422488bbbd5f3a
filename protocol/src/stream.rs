//! Length-delimited messages at the head of a stdio stream.

use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use prost::Message;

/// Longest hello or reply, in bytes.
pub const MAX_HELLO: usize = 16 << 10;

/// How long a message may take from its first byte to its last: a peer that gives a byte now and then does not keep anybody
/// waiting for ever, whatever the stream's own limit for a single read is.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Fills `buffer` as `read_exact` does, but not for longer than [`PATIENCE`] after `begun`, or after its own first byte.
pub(crate) fn read_within(
    stream: &mut impl Read,
    buffer: &mut [u8],
    begun: &mut Option<Instant>,
) -> io::Result<()> {
    read_until(stream, buffer, begun, PATIENCE)
}

fn read_until(
    stream: &mut impl Read,
    buffer: &mut [u8],
    begun: &mut Option<Instant>,
    patience: Duration,
) -> io::Result<()> {
    let mut rest = buffer;
    while !rest.is_empty() {
        let length = match stream.read(rest) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        rest = rest.get_mut(length..).unwrap_or_default();
        if begun.get_or_insert_with(Instant::now).elapsed() > patience {
            let why = "a message that takes too long: its sender is stuck, or does not mean well";
            return Err(io::Error::new(ErrorKind::TimedOut, why));
        }
    }
    Ok(())
}

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
    let mut begun = None;
    for shift in [0, 7, 14] {
        let mut byte = [0];
        read_within(stream, &mut byte, &mut begun)?;
        length |= usize::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            if length > MAX_HELLO {
                break;
            }
            let mut payload = vec![0; length];
            read_within(stream, &mut payload, &mut begun)?;
            return M::decode(payload.as_slice()).map_err(|e| io::Error::new(ErrorKind::InvalidData, e));
        }
    }
    Err(io::Error::new(ErrorKind::InvalidData, format!("a message of over {MAX_HELLO} bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::StreamHello;
    use proptest::prelude::*;

    /// Gives a byte at a time, and takes its time for each.
    struct Drip;

    impl Read for Drip {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            std::thread::sleep(Duration::from_millis(1));
            buffer[0] = 7;
            Ok(1)
        }
    }

    #[test]
    fn who_drips_is_not_listened_to_for_ever() {
        let patience = Duration::from_millis(20);
        let error = read_until(&mut Drip, &mut [0; 1 << 20], &mut None, patience).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        // The time before the first byte is not the message's.
        read_until(&mut Drip, &mut [0; 2], &mut None, Duration::from_secs(60)).unwrap();
    }

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
