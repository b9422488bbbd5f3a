//! Values of the configuration file, and what is allowed for each.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::network::NetworkWish;
use crate::options::parse_size;

/// The longest directory for sockets: `unix(7)` allows 107 bytes for the path of one.
const MAX_SOCKETS: usize = 60;
/// The kernel's command line has 2,047 characters, of which ours are some.
const MAX_PARAMETERS: usize = 1024;

/// Bytes, written like `512m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let units = [("t", 40), ("g", 30), ("m", 20), ("k", 10)];
        let whole = units.iter().find(|(_, shift)| self.0 > 0 && self.0.trailing_zeros() >= *shift);
        let (unit, shift) = whole.copied().unwrap_or(("", 0));
        serializer.serialize_str(&format!("{}{unit}", self.0 >> shift))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        parse_size(&String::deserialize(from)?).map(Self).map_err(|error| D::Error::custom(error.to_string()))
    }
}

fn size<'de, D: Deserializer<'de>>(
    from: D,
    allowed: RangeInclusive<u64>,
    words: &str,
) -> Result<Size, D::Error> {
    let size = Size::deserialize(from)?;
    if allowed.contains(&size.0) { Ok(size) } else { Err(D::Error::custom(words)) }
}

fn number<'de, D, N>(from: D, allowed: RangeInclusive<N>) -> Result<N, D::Error>
where
    D: Deserializer<'de>,
    N: TryFrom<i64> + PartialOrd + Display,
{
    let number = N::try_from(i64::deserialize(from)?).ok().filter(|number| allowed.contains(number));
    number
        .ok_or_else(|| D::Error::custom(format!("from {} to {} is allowed", allowed.start(), allowed.end())))
}

pub(super) fn switch<'de, D: Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
    bool::deserialize(from).map_err(|_| D::Error::custom("true or false is allowed"))
}

pub(super) fn memory<'de, D: Deserializer<'de>>(from: D) -> Result<Size, D::Error> {
    size(from, 128 << 20..=1 << 40, "from 128m to 1t is allowed")
}

pub(super) fn storage<'de, D: Deserializer<'de>>(from: D) -> Result<Size, D::Error> {
    let size =
        size(from, 0..=16 << 40, "from 4m to 16t is allowed, and 0 for a layer in the guest's memory")?;
    if (1..4 << 20).contains(&size.0) {
        return Err(D::Error::custom("from 4m to 16t is allowed, and 0 for a layer in the guest's memory"));
    }
    Ok(size)
}

pub(super) fn vcpus<'de, D: Deserializer<'de>>(from: D) -> Result<u8, D::Error> {
    number(from, 1..=32)
}

pub(super) fn drives<'de, D: Deserializer<'de>>(from: D) -> Result<u8, D::Error> {
    number(from, 0..=8)
}

pub(super) fn seconds<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    number(from, 1..=3600)
}

/// Above system users and all ranges that distributions hand out, and such that none of a range is 2^31 or more, which some
/// programs take for negative.
pub(super) fn first_uid<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    number(from, 65_536..=2_000_000_000)
}

pub(super) fn uids<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    number(from, 1..=1_000_000)
}

pub(super) fn parameters<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let words = String::deserialize(from)?;
    if words.len() > MAX_PARAMETERS || !words.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Err(D::Error::custom(format!(
            "at most {MAX_PARAMETERS} printable ASCII characters are allowed"
        )));
    }
    Ok(words)
}

pub(super) fn network<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    match NetworkWish::parse(&text) {
        Ok(_) => Ok(text),
        Err(error) => Err(D::Error::custom(error.to_string())),
    }
}

/// An absolute path, or nothing.
pub(super) fn file<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() || (text.starts_with('/') && !text.contains('\0')) {
        return Ok(text.into());
    }
    Err(D::Error::custom("an absolute path is allowed, or \"\""))
}

pub(super) fn directory<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let path = file(from)?;
    if path.is_absolute() { Ok(path) } else { Err(D::Error::custom("an absolute path is allowed")) }
}

pub(super) fn sockets<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let path = directory(from)?;
    if path.as_os_str().len() > MAX_SOCKETS {
        return Err(D::Error::custom(format!(
            "an absolute path of at most {MAX_SOCKETS} bytes is allowed: there are sockets below it, whose paths the \
             kernel limits to 107"
        )));
    }
    Ok(path)
}
