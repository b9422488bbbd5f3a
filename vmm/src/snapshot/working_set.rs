//! Which pages of a snapshot a machine writes to soon after it went on, for all that go on after it.
//!
//! A page that is mapped privately from a file and written to by a guest is three faults of the nested page tables: one to
//! read it, one that copies it, and one for the copy, since KVM forgets a page whose content moves. To copy the pages that
//! every machine of a template writes to anyway before it runs is one system call for each run of them, and one fault each
//! is left. (The idea is REAP's: Ustiugov et al., "Benchmarking, analysis, and optimization of serverless function
//! snapshots", ASPLOS 2021.)
//!
//! The record is a hint. One that is missing, damaged or another snapshot's costs time and nothing else, and as guests say
//! what is in it, it is no longer than [`MAX_BYTES`].

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::pages::pagemap;
use super::{Extent, Identity, Snapshot, file, memory};
use crate::arch::layout::PAGE;
use crate::memory::GuestMemory;

/// Name of the record in a snapshot's directory.
pub const WORKING_SET: &str = "working-set";
/// Most memory that a machine is given before it runs. A start of busybox writes to 6 MiB.
pub const MAX_BYTES: u64 = 16 << 20;

/// Entries of /proc/self/pagemap read at once.
const ENTRIES: usize = 8192;
/// Bits of such an entry: in memory; a page of a file (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const OF_FILE: u64 = 1 << 61;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// Of the snapshot.
    identity: Identity,
    /// What was written to, by its place in the memory file.
    extents: Vec<Extent>,
}

/// Notes in `file`, for the snapshot `identity`, what `guest` has written to until now. Answers how many bytes.
///
/// # Errors
/// When the file cannot be written.
pub fn record(guest: &GuestMemory, mut file: &File, identity: Identity) -> io::Result<u64> {
    let record = Record { identity, extents: written(guest)? };
    file.write_all(&file::encode(&record)?)?;
    Ok(record.extents.iter().map(|extent| extent.length).sum())
}

/// What the record in `directory` says of `snapshot`; nothing when there is none that can be used.
pub fn read(directory: &Path, snapshot: &Snapshot) -> Vec<Extent> {
    let record = File::open(directory.join(WORKING_SET)).and_then(file::read);
    let record = record.ok().and_then(|bytes| file::decode(&bytes).ok());
    let Some(Record { identity, extents }) = record else { return Vec::new() };
    let bytes = extents.iter().fold(0_u64, |sum, extent| sum.saturating_add(extent.length));
    let good = identity == snapshot.identity
        && bytes <= MAX_BYTES
        && memory::check_extents(snapshot.memory_bytes, &extents).is_ok();
    if good { extents } else { Vec::new() }
}

/// Gives `guest` pages of its own where `extents` say that it will write. Where that fails (kernels before 5.14 cannot, and
/// memory may be short) the guest's own writes do it, later.
pub fn populate(guest: &GuestMemory, extents: &[Extent]) {
    let mut place = 0;
    for region in guest.iter() {
        let length = region.len();
        let inside = |extent: &&Extent| {
            extent.offset >= place && extent.offset.saturating_add(extent.length) <= place + length
        };
        for extent in extents.iter().filter(inside) {
            let address = region.as_ptr().wrapping_add((extent.offset - place) as usize);
            // SAFETY: the range lies in the region, which is mapped for good; populating changes no content.
            unsafe { libc::madvise(address.cast(), extent.length as usize, libc::MADV_POPULATE_WRITE) };
        }
        place += length;
    }
}

/// The runs of pages of private memory that are copies of what was mapped, or were never mapped from a file.
fn written(guest: &GuestMemory) -> io::Result<Vec<Extent>> {
    let pagemap = pagemap()?;
    let mut extents: Vec<Extent> = Vec::new();
    let mut buffer = vec![0; ENTRIES * 8];
    let (mut offset, mut bytes) = (0, 0);
    for region in guest.iter() {
        let end = offset + region.len();
        let mut page = region.as_ptr() as u64 / PAGE;
        let mut run: Option<Extent> = None;
        while offset < end {
            let count = ENTRIES.min(((end - offset) / PAGE) as usize);
            let entries = buffer.get_mut(..count * 8).unwrap_or_default();
            pagemap.read_exact_at(entries, page * 8)?;
            for entry in entries.chunks_exact(8) {
                let entry = <[u8; 8]>::try_from(entry).map_or(0, u64::from_ne_bytes);
                let own = entry & (PRESENT | OF_FILE) == PRESENT && bytes < MAX_BYTES;
                match &mut run {
                    Some(run) if own => run.length += PAGE,
                    None if own => run = Some(Extent { offset, length: PAGE }),
                    _ => extents.extend(run.take()),
                }
                bytes += u64::from(own) * PAGE;
                offset += PAGE;
            }
            page += count as u64;
        }
        extents.extend(run);
        offset = end;
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::create;
    use crate::snapshot::tests::snapshot;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    const PAGES: u64 = 512;

    /// A guest of 2 MiB that was mapped from a file of ones, and its snapshot.
    fn mapped() -> (GuestMemory, Snapshot) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![1; 2 << 20], 0).unwrap();
        let all = vec![Extent { offset: 0, length: 2 << 20 }];
        let guest = create(2 << 20).unwrap();
        memory::fill(&guest, &file, &all).unwrap();
        (guest, snapshot(2 << 20, all))
    }

    fn pages(extents: &[Extent]) -> Vec<u64> {
        let of = |extent: &Extent| extent.offset / PAGE..(extent.offset + extent.length) / PAGE;
        extents.iter().flat_map(of).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn what_was_written_to_is_the_next_ones_own(writes in proptest::collection::btree_set(0..PAGES, 0..60), reads in 0..PAGES) {
            let place = tempfile::tempdir().unwrap();
            let (first, snapshot) = mapped();
            first.read_obj::<u8>(GuestAddress(reads * PAGE)).unwrap();
            for page in &writes {
                first.write_obj(2_u8, GuestAddress(page * PAGE)).unwrap();
            }
            let file = File::create(place.path().join(WORKING_SET)).unwrap();
            let bytes = record(&first, &file, snapshot.identity).unwrap();
            prop_assert_eq!(bytes, writes.len() as u64 * PAGE);
            let extents = read(place.path(), &snapshot);
            let wanted: Vec<u64> = writes.into_iter().collect();
            prop_assert_eq!(&pages(&extents), &wanted);

            let (second, _) = mapped();
            prop_assert_eq!(written(&second).unwrap(), Vec::new());
            populate(&second, &extents);
            prop_assert_eq!(&pages(&written(&second).unwrap()), &wanted);
            for page in 0..PAGES {
                prop_assert_eq!(second.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap(), 1);
            }
        }

        #[test]
        fn no_bytes_make_it_anything_but_a_hint(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let place = tempfile::tempdir().unwrap();
            std::fs::write(place.path().join(WORKING_SET), bytes).unwrap();
            prop_assert_eq!(read(place.path(), &snapshot(2 << 20, Vec::new())), Vec::new());
        }
    }

    #[test]
    fn a_record_that_cannot_be_true_is_none() {
        let place = tempfile::tempdir().unwrap();
        let extent = |offset, length| Extent { offset, length };
        let big = MAX_BYTES + PAGE;
        for (good, identity, extents) in [
            (true, [7; 16], vec![extent(0, PAGE), extent(4 * PAGE, MAX_BYTES - PAGE)]),
            (false, [8; 16], vec![extent(0, PAGE)]),
            (false, [7; 16], vec![extent(0, big)]),
            (false, [7; 16], vec![extent(1, PAGE)]),
            (false, [7; 16], vec![extent(64 << 20, PAGE)]),
            (false, [7; 16], vec![extent(PAGE, PAGE), extent(0, PAGE)]),
        ] {
            let bytes = file::encode(&Record { identity, extents: extents.clone() }).unwrap();
            std::fs::write(place.path().join(WORKING_SET), bytes).unwrap();
            let wanted = if good { extents } else { Vec::new() };
            assert_eq!(read(place.path(), &snapshot(64 << 20, Vec::new())), wanted);
        }
    }

    #[test]
    fn a_record_ends_where_it_would_be_too_long() {
        let guest = create(2 * MAX_BYTES).unwrap();
        for page in 0..2 * MAX_BYTES / PAGE {
            guest.write_obj(1_u8, GuestAddress(page * PAGE)).unwrap();
        }
        let bytes: u64 = written(&guest).unwrap().iter().map(|extent| extent.length).sum();
        assert_eq!(bytes, MAX_BYTES);
    }
}
