//! The form of a state file: 24 bytes of header, then the state in postcard's encoding (postcard.jamesmunns.com).
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `BLKHSNAP` |
//! | 8 | 4 | version, [`VERSION`] |
//! | 12 | 4 | length of the state |
//! | 16 | 4 | CRC-32 (ISO-HDLC) of the state |
//! | 20 | 4 | CRC-32 of the 20 bytes before |
//!
//! Numbers have their least significant byte first. Any change of what is encoded is a new version, and only files of the
//! monitor's own version are read: a snapshot is as good as the monitor that reads it knows what is meant.

use std::fs::File;
use std::io::{self, Read};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Version of the encoding.
pub const VERSION: u32 = 3;

const MAGIC: [u8; 8] = *b"BLKHSNAP";
const HEADER: usize = 24;
/// Longest file that is read: 32 processors have less than 1 MiB.
const MAX_LENGTH: u64 = 16 << 20;

/// Why bytes are no state.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// It begins with something else.
    #[error("its file `state` is no state of a snapshot")]
    Foreign,
    /// The encoding is another one.
    #[error(
        "its state has version {0}, this monitor reads version {VERSION}: take it anew with this monitor"
    )]
    Version(u32),
    /// It ends early, or goes on.
    #[error("its state is {found} bytes long instead of {wanted}: it was cut off or written over")]
    Length {
        /// Bytes there.
        found: usize,
        /// Bytes there should be.
        wanted: usize,
    },
    /// A checksum does not fit.
    #[error("its state is damaged (the checksum differs)")]
    Checksum,
    /// The bytes are what was written, but mean nothing.
    #[error("its state makes no sense: {0}")]
    Encoding(postcard::Error),
}

/// Puts a state into its form.
///
/// # Errors
/// When it is too long, which none is.
pub fn encode(state: &impl Serialize) -> io::Result<Vec<u8>> {
    let body = postcard::to_stdvec(state).map_err(io::Error::other)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(crc32fast::hash(&body).to_le_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes.extend(body);
    Ok(bytes)
}

/// Reads a state out of its form.
///
/// # Errors
/// When anything about it is not as it was written.
pub fn decode<S: DeserializeOwned>(bytes: &[u8]) -> Result<S, Damage> {
    let word =
        |at: usize| bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes);
    if !bytes.starts_with(&MAGIC) {
        return Err(Damage::Foreign);
    }
    let Some(body) = bytes.get(HEADER..) else {
        return Err(Damage::Length { found: bytes.len(), wanted: HEADER });
    };
    if crc32fast::hash(bytes.get(..20).unwrap_or_default()) != word(20) {
        return Err(Damage::Checksum);
    }
    if word(8) != VERSION {
        return Err(Damage::Version(word(8)));
    }
    if body.len() != word(12) as usize {
        return Err(Damage::Length { found: bytes.len(), wanted: HEADER + word(12) as usize });
    }
    if crc32fast::hash(body) != word(16) {
        return Err(Damage::Checksum);
    }
    match postcard::take_from_bytes(body) {
        Ok((state, [])) => Ok(state),
        Ok(_) => Err(Damage::Encoding(postcard::Error::DeserializeBadEncoding)),
        Err(error) => Err(Damage::Encoding(error)),
    }
}

/// The bytes of a state file.
///
/// # Errors
/// When it cannot be read, or is longer than any state.
pub fn read(file: File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MAX_LENGTH + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_LENGTH {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it is longer than the state of any snapshot",
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn state() -> impl Strategy<Value = (String, Vec<u64>, [u8; 16])> {
        (".{0,40}", proptest::collection::vec(any::<u64>(), 0..40), any::<[u8; 16]>())
    }
    type State = (String, Vec<u64>, [u8; 16]);

    proptest! {
        #[test]
        fn what_was_written_is_read(state in state()) {
            let bytes = encode(&state).unwrap();
            prop_assert_eq!(decode::<State>(&bytes), Ok(state));
        }

        #[test]
        fn no_flipped_bit_goes_unseen(state in state(), bit in 0_u8..8) {
            let bytes = encode(&state).unwrap();
            for at in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                prop_assert!(decode::<State>(&damaged).is_err(), "byte {at}");
            }
        }

        #[test]
        fn no_length_but_its_own_will_do(state in state(), more in 1_usize..40) {
            let bytes = encode(&state).unwrap();
            for length in 0..bytes.len() {
                prop_assert!(decode::<State>(&bytes[..length]).is_err(), "{length} bytes");
            }
            let longer = [bytes, vec![0; more]].concat();
            prop_assert!(decode::<State>(&longer).is_err());
        }

        #[test]
        fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), header in any::<bool>()) {
            let bytes = if header {
                let mut head = MAGIC.to_vec();
                head.extend(VERSION.to_le_bytes());
                head.extend((bytes.len() as u32).to_le_bytes());
                head.extend(crc32fast::hash(&bytes).to_le_bytes());
                head.extend(crc32fast::hash(&head).to_le_bytes());
                [head, bytes].concat()
            } else {
                bytes
            };
            let _ = decode::<State>(&bytes);
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = encode(&1_u8).unwrap();
        bytes[8] = 200;
        let sum = crc32fast::hash(&bytes[..20]).to_le_bytes();
        bytes[20..24].copy_from_slice(&sum);
        let error = decode::<u8>(&bytes).unwrap_err();
        assert_eq!(error, Damage::Version(200));
        assert!(error.to_string().contains("version 200"), "{error}");
    }
}
