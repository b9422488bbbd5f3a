//! Understands the guest's requests (section 5.2.6): a header, data, and a status byte to be written.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::VolatileSlice;

use super::disk::SECTOR;
use crate::devices::virtio::GuestError;
use crate::devices::virtio::queue::{self, Buffers, Slices};

const HEADER_BYTES: usize = 16;
const SEGMENT_BYTES: usize = 16;
/// Most segments of a discard or write-zeroes request, as offered in the configuration space.
pub const MAX_RANGES: usize = 16;
/// Most bytes moved by one request. Linux's default is 1.25 MiB.
pub const MAX_TRANSFER: usize = 16 << 20;

/// A request, understood and checked, except whether it lies within the disk.
#[derive(Debug)]
pub struct Request<'m> {
    /// What is asked for.
    pub operation: Operation<'m>,
    /// Where the status byte goes.
    pub status: VolatileSlice<'m>,
}

/// What a request asks for. Positions and lengths are in bytes.
#[derive(Debug)]
pub enum Operation<'m> {
    /// Fill `to` from `offset` on.
    Read { offset: u64, to: Slices<'m> },
    /// Store `from` at `offset`.
    Write { offset: u64, from: Slices<'m> },
    /// Make everything written durable.
    Flush,
    /// These ranges are no longer needed.
    Discard(Vec<Range>),
    /// These ranges become zero; they may lose their space where `unmap` says so.
    WriteZeroes(Vec<Range>),
    /// Tell the disk's name.
    GetId { to: Slices<'m> },
    /// Understood as a request, but not one that is offered.
    Unsupported,
    /// A request of a known kind that makes no sense: answered with an error.
    Invalid,
}

/// A range of a discard or write-zeroes request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// Whether its space may be given back.
    pub unmap: bool,
}

impl<'m> Request<'m> {
    /// Understands the request in `buffers`.
    ///
    /// # Errors
    /// When there is no room for header or status, so that the guest cannot even be told.
    pub fn parse(buffers: Buffers<'m>) -> Result<Self, GuestError> {
        let mut header = [0; HEADER_BYTES];
        queue::read_exact(&buffers.readable, &mut header)
            .ok_or(GuestError::Chain("a block request without a whole header"))?;
        let (_, data_out) = queue::split(&buffers.readable, HEADER_BYTES).unwrap_or_default();
        let writable = queue::total(&buffers.writable);
        let (data_in, status) = writable
            .checked_sub(1)
            .and_then(|at| queue::split(&buffers.writable, at))
            .ok_or(GuestError::Chain("a block request without a status byte"))?;
        let [status] = status[..] else {
            return Err(GuestError::Chain("a block request without a status byte"));
        };
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let offset = u64::from_le_bytes(sector).checked_mul(SECTOR);
        Ok(Self { operation: Operation::new(kind, offset, data_out, data_in), status })
    }
}

impl<'m> Operation<'m> {
    /// Bytes that it moves.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Read { to: data, .. } | Self::Write { from: data, .. } => queue::total(data),
            _ => 0,
        }
    }

    fn new(kind: u32, offset: Option<u64>, data_out: Slices<'m>, data_in: Slices<'m>) -> Self {
        let whole_sectors = |data: &Slices<'_>| matches!(queue::total(data), n if n <= MAX_TRANSFER && n.is_multiple_of(SECTOR as usize));
        match (kind, offset) {
            (VIRTIO_BLK_T_IN, Some(offset)) if whole_sectors(&data_in) => Self::Read { offset, to: data_in },
            (VIRTIO_BLK_T_OUT, Some(offset)) if whole_sectors(&data_out) => {
                Self::Write { offset, from: data_out }
            }
            (VIRTIO_BLK_T_FLUSH, _) => Self::Flush,
            (VIRTIO_BLK_T_GET_ID, _) => Self::GetId { to: data_in },
            (VIRTIO_BLK_T_DISCARD, _) => ranges(&data_out).map_or(Self::Invalid, Self::Discard),
            (VIRTIO_BLK_T_WRITE_ZEROES, _) => ranges(&data_out).map_or(Self::Invalid, Self::WriteZeroes),
            (VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT, _) => Self::Invalid,
            _ => Self::Unsupported,
        }
    }
}

/// The segments of a discard or write-zeroes request: sector (64 bits), number of sectors (32), flags (32).
fn ranges(data: &[VolatileSlice<'_>]) -> Option<Vec<Range>> {
    let length = queue::total(data);
    if length == 0 || !length.is_multiple_of(SEGMENT_BYTES) || length > MAX_RANGES * SEGMENT_BYTES {
        return None;
    }
    let mut bytes = vec![0; length];
    queue::read_exact(data, &mut bytes)?;
    let (segments, _) = bytes.as_chunks::<SEGMENT_BYTES>();
    segments
        .iter()
        .map(|segment| {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = *segment;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u64::from(u32::from_le_bytes([n0, n1, n2, n3]));
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            let range = Range {
                offset: sector.checked_mul(SECTOR)?,
                length: sectors * SECTOR,
                unmap: flags & 1 != 0,
            };
            (flags & !1 == 0).then_some(range)
        })
        .collect()
}
