//! The packet header (`struct virtio_vsock_hdr`, section 5.10.6) and where a packet's payload is in guest memory.
//!
//! The crate virtio-vsock wants header and payload in one descriptor each; Linux since 6.12.40 sends payloads in several.

use crate::devices::virtio::GuestError;
use crate::devices::virtio::queue::{self, Buffers, Slices};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;

/// The header, in the standard's names except for `type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header as it is in memory.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Writes it as it is in memory.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The next `N` bytes. The fields of a header add up to its length, so that there always are as many.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut field = [0; N];
    if let Some((now, later)) = rest.split_at_checked(N) {
        field.copy_from_slice(now);
        *rest = later;
    }
    field
}

/// Reads a packet from the guest: header, and as much of the chain as the header says is payload.
///
/// # Errors
/// When the chain is shorter than header or payload, or the payload longer than `limit`.
pub fn parse<'m>(buffers: &Buffers<'m>, limit: u32) -> Result<(Header, Slices<'m>), GuestError> {
    let short = GuestError::Chain("a vsock packet shorter than its header says");
    let mut bytes = [0; HEADER_BYTES];
    let Some((_, rest)) = queue::split(&buffers.readable, HEADER_BYTES) else { return Err(short) };
    let Some(()) = queue::read_exact(&buffers.readable, &mut bytes) else { return Err(short) };
    let header = Header::from_bytes(&bytes);
    if header.len > limit {
        return Err(GuestError::Chain("a vsock packet of more than 64 KiB"));
    }
    let (payload, _) = queue::split(&rest, header.len as usize).ok_or(short)?;
    Ok((header, payload))
}

/// The two parts of a receive buffer: for the header, for the payload.
///
/// # Errors
/// When not even a header fits.
pub fn receive_buffer<'m>(buffers: &Buffers<'m>) -> Result<(Slices<'m>, Slices<'m>), GuestError> {
    queue::split(&buffers.writable, HEADER_BYTES)
        .ok_or(GuestError::Chain("a vsock receive buffer with no room for a header"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::VolatileSlice;

    use super::*;

    proptest! {
        #[test]
        fn headers_read_as_they_were_written(bytes in proptest::array::uniform32(any::<u8>()), more in proptest::array::uniform12(any::<u8>())) {
            let mut all = [0; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&more);
            prop_assert_eq!(Header::from_bytes(&all).to_bytes(), all);
        }

        #[test]
        fn packets_are_whole_however_they_are_cut(
            len in 0_u32..3000,
            data in proptest::collection::vec(any::<u8>(), 0..3000),
            cuts in proptest::collection::vec(1_usize..500, 0..20),
        ) {
            let header = Header { len, op: 5, ..Header::default() };
            let mut bytes = [header.to_bytes(), data.clone()].concat();
            let mut rest = bytes.as_mut_slice();
            let mut readable = Vec::new();
            for cut in cuts {
                let (now, later) = rest.split_at_mut(cut.min(rest.len()));
                readable.push(VolatileSlice::from(now));
                rest = later;
            }
            readable.push(VolatileSlice::from(rest));
            let buffers = Buffers { readable, writable: Vec::new() };
            match parse(&buffers, 2048) {
                Ok((parsed, payload)) => {
                    prop_assert_eq!(parsed, header);
                    let mut got = vec![0; len as usize];
                    prop_assert!(queue::read_exact(&payload, &mut got).is_some());
                    prop_assert_eq!(queue::total(&payload), len as usize);
                    prop_assert_eq!(&got[..], &data[..len as usize]);
                }
                Err(_) => prop_assert!(len > 2048 || data.len() < len as usize),
            }
        }
    }
}
