//! A tar stream, entry by entry, in bounded memory.
//!
//! The header's fields are read by the `tar` crate. Its own iterator is not used: it reads long names and pax headers
//! whole whatever their size, and takes pax records apart at newlines, which binary attributes contain.

use std::io::{self, Read};

use super::Fault;
use crate::erofs::{Metadata, Xattr};

const BLOCK: u64 = 512;
/// Bytes of a pax header. Linux allows 64 KiB of attributes for a file.
const MAX_PAX: u64 = 1 << 20;
/// Bytes of a GNU long name; longer than any path that may be used.
const MAX_LONG_NAME: u64 = 64 << 10;

/// Input that can pass over bytes, perhaps without reading them.
pub(crate) trait Skip: Read + Sized {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let skipped = io::copy(&mut Read::take(self.by_ref(), count), &mut io::sink())?;
        if skipped == count { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// One member of the archive.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// As it stands there: it may be absolute and have any bytes.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
    /// Bytes of content that follow.
    pub(crate) size: u64,
    pub(crate) metadata: Metadata,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    Directory,
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
    /// Of a type that means nothing to us.
    Unknown(u8),
}

/// Reads entries. After [`Archive::next`] the entry's content can be read from the archive itself.
pub(crate) struct Archive<R> {
    input: R,
    /// Bytes of the current entry not read yet, and of the padding behind them.
    left: u64,
    padding: u64,
}

/// What pax headers and GNU long names say about the entry that follows them.
#[derive(Default)]
struct Overrides {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<Xattr>,
}

impl<R: Skip> Archive<R> {
    pub(crate) fn new(input: R) -> Self {
        Self { input, left: 0, padding: 0 }
    }

    /// The input, at the start of the current entry's content as long as nothing of that was read.
    pub(crate) fn input(&self) -> &R {
        &self.input
    }

    /// The next entry; none at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, Fault> {
        let mut overrides = Overrides::default();
        loop {
            self.input.skip(self.left.saturating_add(self.padding))?;
            (self.left, self.padding) = (0, 0);
            let Some(block) = self.header()? else { return Ok(None) };
            let header = tar::Header::from_byte_slice(&block);
            let type_byte = header.entry_type().as_byte();
            let plain_size =
                number(&block, SIZE, header.entry_size()).ok_or_else(|| bad("a header has a broken size"))?;
            match type_byte {
                b'x' => {
                    let records = self.document(plain_size, MAX_PAX)?;
                    overrides.read_pax(&records)?;
                }
                // Defaults for all that follows; engines ignore it too.
                b'g' => self.begin(plain_size)?,
                b'L' => overrides.path = Some(until_nul(self.document(plain_size, MAX_LONG_NAME)?)),
                b'K' => overrides.link = Some(until_nul(self.document(plain_size, MAX_LONG_NAME)?)),
                b'S' => return Err(bad("it has GNU sparse files; build it without --sparse")),
                _ => return self.entry(&block, overrides, type_byte, plain_size).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        block: &[u8; BLOCK as usize],
        overrides: Overrides,
        type_byte: u8,
        plain_size: u64,
    ) -> Result<Entry, Fault> {
        let header = tar::Header::from_byte_slice(block);
        let path = overrides.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = overrides
            .link
            .unwrap_or_else(|| header.link_name_bytes().map(|link| link.into_owned()).unwrap_or_default());
        let device = || {
            let part = |field, part: io::Result<Option<u32>>| {
                let part = number(block, field, part.map(|part| part.unwrap_or_default().into()));
                part.and_then(|part| u32::try_from(part).ok())
                    .ok_or_else(|| named(&path, "has a broken device number"))
            };
            Ok::<_, Fault>((part(MAJOR, header.device_major())?, part(MINOR, header.device_minor())?))
        };
        let kind = match type_byte {
            0 if path.ends_with(b"/") => EntryKind::Directory,
            0 | b'0' | b'7' => EntryKind::File,
            b'1' => EntryKind::HardLink(link),
            b'2' => EntryKind::Symlink(link),
            b'3' => device().map(|(major, minor)| EntryKind::CharDevice(major, minor))?,
            b'4' => device().map(|(major, minor)| EntryKind::BlockDevice(major, minor))?,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => EntryKind::Unknown(other),
        };
        // The others have no content, whatever their header says.
        let size = match kind {
            EntryKind::File | EntryKind::Unknown(_) => overrides.size.unwrap_or(plain_size),
            _ => 0,
        };
        self.begin(size)?;
        let id = |pax: Option<u64>, field, plain| {
            let id = pax.or_else(|| number(block, field, plain)).and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| named(&path, "has a broken owner or group"))
        };
        let (mtime, mtime_nsec) = match overrides.mtime {
            Some(mtime) => mtime,
            None => {
                let seconds = number(block, MTIME, header.mtime());
                (seconds.ok_or_else(|| named(&path, "has a broken time"))?.cast_signed(), 0)
            }
        };
        let mode = number(block, MODE, header.mode().map(u64::from));
        let permissions = mode.ok_or_else(|| named(&path, "has a broken mode"))? & 0o7777;
        let metadata = Metadata {
            permissions: u16::try_from(permissions).unwrap_or_default(),
            uid: id(overrides.uid, UID, header.uid())?,
            gid: id(overrides.gid, GID, header.gid())?,
            mtime,
            mtime_nsec,
            xattrs: overrides.xattrs,
        };
        Ok(Entry { path, kind, size, metadata })
    }

    /// The next header block; none at the end of the archive.
    fn header(&mut self) -> Result<Option<[u8; BLOCK as usize]>, Fault> {
        let Some(block) = self.block()? else { return Ok(None) };
        if block.iter().any(|byte| *byte != 0) {
            let header = tar::Header::from_byte_slice(&block);
            // The checksum counts its own field as spaces.
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            let own: u32 = block.get(148..156).unwrap_or_default().iter().map(|byte| u32::from(*byte)).sum();
            if header.cksum().ok() != Some(sum - own + 8 * u32::from(b' ')) {
                return Err(bad("a header has a wrong checksum: not a tar archive, or damaged"));
            }
            return Ok(Some(block));
        }
        match self.block()? {
            Some(block) if block.iter().any(|byte| *byte != 0) => Err(bad("something follows an end mark")),
            _ => Ok(None),
        }
    }

    /// 512 bytes, or none if the input ends right here.
    fn block(&mut self) -> Result<Option<[u8; BLOCK as usize]>, Fault> {
        let mut block = [0; BLOCK as usize];
        let mut filled = 0;
        while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.input.read(rest) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(Fault::Input(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(block))
    }

    fn begin(&mut self, size: u64) -> Result<(), Fault> {
        self.padding = size.checked_next_multiple_of(BLOCK).ok_or_else(|| bad("a size is absurd"))? - size;
        self.left = size;
        Ok(())
    }

    /// Content that belongs to the archive's own structure.
    fn document(&mut self, size: u64, limit: u64) -> Result<Vec<u8>, Fault> {
        if size > limit {
            return Err(Fault::Over { what: "the size of an extended header", limit });
        }
        self.begin(size)?;
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// The content of the current entry. Its early end is an error.
impl<R: Skip> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        let count = self.input.read(buffer.get_mut(..want).unwrap_or_default())?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }
}

impl Overrides {
    fn read_pax(&mut self, mut records: &[u8]) -> Result<(), Fault> {
        while !records.is_empty() {
            let (key, value, rest) = pax_record(records).ok_or_else(|| bad("a pax header is broken"))?;
            records = rest;
            let number = || {
                let text = std::str::from_utf8(value).ok();
                text.and_then(|text| text.parse().ok()).ok_or_else(|| bad("a pax header has a broken number"))
            };
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.size = Some(number()?),
                b"uid" => self.uid = Some(number()?),
                b"gid" => self.gid = Some(number()?),
                b"mtime" => {
                    let time = parse_time(value).ok_or_else(|| bad("a pax header has a broken time"))?;
                    self.mtime = Some(time);
                }
                _ => {
                    if key.starts_with(b"GNU.sparse.") {
                        return Err(bad("it has GNU sparse files; build it without --sparse"));
                    }
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        self.xattrs.retain(|xattr| xattr.name != name);
                        self.xattrs.push(Xattr { name: name.to_vec(), value: value.to_vec() });
                    }
                }
            }
        }
        Ok(())
    }
}

/// `"<length> <key>=<value>\n"`, where the length counts all of it; also what follows.
fn pax_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(bytes.get(..space)?).ok()?.parse().ok()?;
    let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((record.get(..equals)?, record.get(equals + 1..)?, bytes.get(length..)?))
}

/// Seconds with an optional fraction, as pax writes them; before 1970 too.
fn parse_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = fraction.bytes().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}

/// Where a header has its numbers.
type Field = std::ops::Range<usize>;
const MODE: Field = 100..108;
const UID: Field = 108..116;
const GID: Field = 116..124;
const SIZE: Field = 124..136;
const MTIME: Field = 136..148;
const MAJOR: Field = 329..337;
const MINOR: Field = 337..345;

/// A number as the `tar` crate read it; but a blank field is 0, as for everybody else.
fn number(block: &[u8; BLOCK as usize], field: Field, parsed: io::Result<u64>) -> Option<u64> {
    let blank = || block.get(field)?.iter().all(|byte| matches!(byte, 0 | b' ')).then_some(0);
    parsed.ok().or_else(blank)
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

fn bad(why: &str) -> Fault {
    Fault::Bad(why.to_owned())
}

/// A fault of one entry.
pub(super) fn named(path: &[u8], why: &str) -> Fault {
    let shown: String = String::from_utf8_lossy(path).chars().take(200).collect();
    Fault::Bad(format!("`{}` {why}", shown.escape_debug()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_records_may_have_newlines_and_nothing_else_wrong() {
        assert_eq!(pax_record(b"13 key=a\nb=c\nrest"), Some((&b"key"[..], &b"a\nb=c"[..], &b"rest"[..])));
        for broken in
            [&b"13 key=a\nb=c"[..], b"", b"x a=b\n", b"99 a=b\n", b"2 a=b\n", b"0 \n", b"6 abc\n", b"5"]
        {
            assert_eq!(pax_record(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(parse_time(b"12"), Some((12, 0)));
        assert_eq!(parse_time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(parse_time(b"12.0000000019"), Some((12, 1)));
        assert_eq!(parse_time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(parse_time(b"-0.5"), Some((-1, 500_000_000)));
        for broken in [&b""[..], b"a", b"1.x", b"1e5", b"99999999999999999999", b"-9223372036854775808.5"] {
            assert_eq!(parse_time(broken), None, "{broken:?}");
        }
    }
}
