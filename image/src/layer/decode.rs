//! Decompression, told by the first bytes and not by what a manifest claims.

use std::fmt;
use std::io::{self, BufRead, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

/// Undoes gzip or zstd, or passes plain bytes through.
///
/// # Errors
/// Other compressions; reading failed.
pub(crate) fn decode<'a, R: BufRead + 'a>(mut input: R) -> io::Result<Box<dyn Read + 'a>> {
    let mut magic = [0; 6];
    let mut count = 0;
    while let Some(rest) = magic.get_mut(count..).filter(|rest| !rest.is_empty()) {
        match input.read(rest) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let head = magic.get(..count).unwrap_or_default().to_vec();
    let unsupported =
        |what| Err(io::Error::new(io::ErrorKind::Unsupported, format!("{what} is not supported")));
    match magic {
        [0x1f, 0x8b, ..] => Ok(Box::new(MultiGzDecoder::new(Cursor::new(head).chain(input)))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            Ok(Box::new(Zstd::Between(Cursor::new(head).chain(input))))
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0] => unsupported("xz compression"),
        [b'B', b'Z', b'h', ..] => unsupported("bzip2 compression"),
        _ => Ok(Box::new(Cursor::new(head).chain(input))),
    }
}

type Frame<R> = StreamingDecoder<Chain<Cursor<Vec<u8>>, R>, FrameDecoder>;

/// Any number of zstd frames, one after the other, and skippable ones between.
enum Zstd<R: BufRead> {
    Between(R),
    Inside(Box<Frame<R>>),
    Ended,
}

impl<R: BufRead> Zstd<R> {
    /// Enters the next frame; stays in between at the end of the input.
    fn enter(mut input: R) -> io::Result<Self> {
        loop {
            if input.fill_buf()?.is_empty() {
                return Ok(Self::Ended);
            }
            let mut magic = [0; 4];
            input.read_exact(&mut magic)?;
            if !matches!(magic, [0x50..=0x5f, 0x2a, 0x4d, 0x18]) {
                let frame =
                    StreamingDecoder::new(Cursor::new(magic.to_vec()).chain(input)).map_err(invalid)?;
                return Ok(Self::Inside(Box::new(frame)));
            }
            let mut length = [0; 4];
            input.read_exact(&mut length)?;
            let length = u64::from(u32::from_le_bytes(length));
            if io::copy(&mut (&mut input).take(length), &mut io::sink())? != length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            *self = match std::mem::replace(self, Self::Ended) {
                Self::Between(input) => Self::enter(input)?,
                Self::Inside(mut frame) => {
                    let count = frame.read(buffer)?;
                    if count > 0 {
                        *self = Self::Inside(frame);
                        return Ok(count);
                    }
                    let (_, input) = frame.into_inner().into_inner();
                    Self::Between(input)
                }
                Self::Ended => return Ok(0),
            }
        }
    }
}

fn invalid(error: impl fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

/// More came out of a decompressor than is allowed.
#[derive(Debug)]
pub(crate) struct CapReached(pub(crate) u64);

impl fmt::Display for CapReached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expands to more than {} bytes", self.0)
    }
}

impl std::error::Error for CapReached {}

/// Passes up to a number of bytes, then fails.
pub(crate) struct Capped<R> {
    inner: R,
    left: u64,
    limit: u64,
}

impl<R> Capped<R> {
    pub(crate) fn new(inner: R, limit: u64) -> Self {
        Self { inner, left: limit, limit }
    }
}

impl<R: Read> Read for Capped<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left =
            self.left.checked_sub(count as u64).ok_or_else(|| io::Error::other(CapReached(self.limit)))?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        compress_to_vec(bytes, CompressionLevel::Fastest)
    }

    fn all(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Capped::new(decode(bytes)?, 1 << 20).read_to_end(&mut out).map(|_| out)
    }

    #[test]
    fn several_members_and_frames_are_one_stream() {
        assert_eq!(all(&[gzip(b"hello "), gzip(b"world")].concat()).unwrap(), b"hello world");
        let skippable = [&[0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let frames =
            [skippable.clone(), zstd(b"hello "), skippable.clone(), zstd(b"world"), skippable].concat();
        assert_eq!(all(&frames).unwrap(), b"hello world");
        assert_eq!(all(b"plain").unwrap(), b"plain");
        assert_eq!(all(b"").unwrap(), b"");
    }

    #[test]
    fn truncation_and_bombs_are_errors() {
        let noise: Vec<u8> =
            (0..5000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        for packed in [gzip(&noise), zstd(&noise)] {
            assert!(all(&packed[..packed.len() - 20]).is_err());
        }
        for bomb in [gzip(&vec![0; 2 << 20]), zstd(&vec![0; 2 << 20])] {
            let error = all(&bomb).unwrap_err();
            assert!(error.get_ref().is_some_and(|inner| inner.is::<CapReached>()), "{error}");
        }
        assert_eq!(all(b"\xfd7zXZ\0rest").unwrap_err().kind(), io::ErrorKind::Unsupported);
    }

    proptest! {
        #[test]
        fn damaged_input_never_panics(
            content in proptest::collection::vec(any::<u8>(), 0..3000),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            use_zstd: bool,
        ) {
            let mut packed = if use_zstd { zstd(&content) } else { gzip(&content) };
            for (index, value) in &changes {
                let at = index.index(packed.len());
                packed[at] = *value;
            }
            let result = all(&packed);
            if changes.is_empty() {
                prop_assert_eq!(result.unwrap(), content);
            }
        }
    }
}
