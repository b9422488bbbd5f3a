//! Pieces of a snapshot that are compressed: each is a Zstandard frame of its own, with a checksum. A file of such frames, one after
//! the other, is what `zstd -d` reads, too.
//!
//! Both directions are in safe Rust, as for images: a snapshot may come from elsewhere.

use std::io::{self, ErrorKind, Read};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

/// Most bytes in one frame: as much as is held twice at a time.
pub const MAX_CONTENT: usize = 1 << 20;
/// Largest window of a frame that is read.
const MAX_WINDOW: u64 = 8 << 20;

/// Compresses bytes to a frame.
pub fn compress(bytes: &[u8]) -> Vec<u8> {
    compress_to_vec(bytes, CompressionLevel::Fastest)
}

/// Reads one frame, whose content must be as long as `into`, and leaves what follows it.
///
/// # Errors
/// It is cut off, damaged, or of another length; or the source cannot be read.
pub fn decompress(source: &mut impl Read, into: &mut [u8]) -> io::Result<()> {
    let damaged = |why: &dyn std::fmt::Display| io::Error::new(ErrorKind::InvalidData, why.to_string());
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(MAX_WINDOW);
    let mut reader = StreamingDecoder::new_with_decoder(source, decoder).map_err(|error| damaged(&error))?;
    reader.read_exact(into).map_err(|error| damaged(&format!("a compressed piece is damaged: {error}")))?;
    // To the very end of the frame, where its checksum is.
    if reader.read(&mut [0]).map_err(|error| damaged(&error))? != 0 {
        return Err(damaged(&"a compressed piece is longer than it was"));
    }
    let decoder = reader.into_frame_decoder();
    match (decoder.get_checksum_from_data(), decoder.get_calculated_checksum()) {
        (Some(written), Some(calculated)) if written == calculated => Ok(()),
        (None, _) => Err(damaged(&"a compressed piece is damaged (it has no checksum)")),
        _ => Err(damaged(&"a compressed piece is damaged (the checksum differs)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn content() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 1..3000),
            prop::collection::vec(0_u8..3, 1..3000),
            (1_usize..200_000).prop_map(|length| vec![0; length]),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn frames_come_back_one_after_the_other(first in content(), second in content()) {
            let file = [compress(&first), compress(&second)].concat();
            let mut source = file.as_slice();
            for wanted in [&first, &second] {
                let mut got = vec![1; wanted.len()];
                decompress(&mut source, &mut got).unwrap();
                prop_assert_eq!(&got, wanted);
            }
            prop_assert!(source.is_empty());
        }

        #[test]
        fn what_is_damaged_is_an_error(content in content(), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let frame = compress(&content);
            let mut got = vec![0; content.len()];
            let mut damaged = frame.clone();
            let at = at.index(frame.len());
            damaged[at] ^= 1 << bit;
            // Either it is found, or the change means nothing (unused bits of a header).
            if decompress(&mut damaged.as_slice(), &mut got).is_ok() {
                prop_assert_eq!(&got, &content);
            }
            prop_assert!(decompress(&mut &frame[..at], &mut got).is_err());
            let mut other = vec![0; content.len() + 1];
            prop_assert!(decompress(&mut frame.as_slice(), &mut other).is_err());
            prop_assert!(decompress(&mut frame.as_slice(), &mut got[1..]).is_err());
        }

        #[test]
        fn nothing_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), magic in any::<bool>()) {
            let bytes = if magic { [&[0x28, 0xb5, 0x2f, 0xfd][..], &bytes].concat() } else { bytes };
            let _ = decompress(&mut bytes.as_slice(), &mut [0; 100]);
        }
    }
}
