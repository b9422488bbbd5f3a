//! The memory of a snapshot: one file as long as guest memory and a page, in which only pages that are not zero take space; or a file of
//! Zstandard frames ([`frame`]) with the same pieces in the same order, no longer than [`frame::MAX_CONTENT`] each, and the trailer.
//!
//! A snapshot that has only the difference from another has the pages that are not as they are there.
//!
//! The ranges of guest memory follow each other in it. The last page says which snapshot it belongs to. A machine that goes on
//! from it maps what it holds privately: nothing is read or copied that the guest does not touch, and all such machines share
//! the host's page cache.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::pages::pagemap;
use super::{Form, Identity, Snapshot, frame};
use crate::arch::layout::{self, PAGE};
use crate::memory::GuestMemory;
use crate::memory::place::{Placement, Way, place};

const MAGIC: [u8; 8] = *b"BLKHMEM\0";
const TRAILER: usize = 24;
/// Zero pages between two others that are mapped with them: each piece is a mapping of its own later.
const GAP: u64 = 16 * PAGE;
/// Most pieces; a process can have 65,530 mappings. With more, larger gaps are closed.
const MAX_EXTENTS: usize = 8192;
/// Entries of /proc/self/pagemap read at once.
const ENTRIES: usize = 8192;
/// Bits of such an entry: in memory, or swapped out.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

/// A piece of memory, by its place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First byte, a multiple of the page size.
    pub offset: u64,
    /// Bytes, likewise.
    pub length: u64,
}

impl Extent {
    fn end(self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// Checks that the pieces of memory lie in memory, in order, none across two ranges.
///
/// # Errors
/// What is wrong.
pub fn check(snapshot: &Snapshot) -> Result<(), String> {
    let bytes = snapshot.memory_bytes;
    if bytes == 0 || !bytes.is_multiple_of(1 << 20) || bytes >> 20 > layout::MAX_MEMORY_MIB {
        return Err(format!("its memory of {bytes} bytes is none that a machine can have"));
    }
    check_extents(bytes, &snapshot.extents)?;
    if snapshot.extents.len() > MAX_EXTENTS {
        Err("it has too many pieces of memory".to_owned())
    } else {
        Ok(())
    }
}

/// Checks that `extents` lie in `bytes` of memory, in order, none across two ranges.
///
/// # Errors
/// That they do not.
pub fn check_extents(bytes: u64, extents: &[Extent]) -> Result<(), String> {
    let ranges = places(bytes);
    let mut end = 0;
    for extent in extents {
        let aligned = extent.offset.is_multiple_of(PAGE) && extent.length.is_multiple_of(PAGE);
        let inside = |(start, length): &(u64, u64)| extent.offset >= *start && extent.end() <= start + length;
        if !aligned || extent.length == 0 || extent.offset < end || !ranges.iter().any(inside) {
            return Err("its pieces of memory do not lie in memory".to_owned());
        }
        end = extent.end();
    }
    Ok(())
}

/// Checks that `file` is the memory of `snapshot`.
///
/// # Errors
/// What is wrong.
pub fn check_file(file: &File, snapshot: &Snapshot) -> Result<(), String> {
    if snapshot.form == Form::Zstd {
        // Its checksums are looked at as it is read.
        return Ok(());
    }
    let wanted = snapshot.memory_bytes + PAGE;
    let found = file.metadata().map_err(|error| format!("its memory cannot be looked at: {error}"))?.len();
    if found != wanted {
        return Err(format!(
            "its memory is {found} bytes long instead of {wanted}: it was cut off or written over"
        ));
    }
    let mut trailer = [0; TRAILER];
    file.read_exact_at(&mut trailer, snapshot.memory_bytes)
        .map_err(|error| format!("its memory cannot be read: {error}"))?;
    if trailer != trailer_of(&snapshot.identity) {
        return Err("its memory is not the one that was saved with its state".to_owned());
    }
    Ok(())
}

fn trailer_of(identity: &Identity) -> [u8; TRAILER] {
    let mut trailer = [0; TRAILER];
    for (to, from) in trailer.iter_mut().zip(MAGIC.iter().chain(identity)) {
        *to = *from;
    }
    trailer
}

/// Where each range of `bytes` of guest memory is in the file: (offset, length).
fn places(bytes: u64) -> Vec<(u64, u64)> {
    let mut offset = 0;
    layout::memory_ranges(bytes)
        .into_iter()
        .map(|(_, length)| {
            let place = (offset, length);
            offset += length;
            place
        })
        .collect()
}

/// Gives `guest`, which is new or has what is below this already, what `file` holds of it.
///
/// # Errors
/// When the file cannot be mapped.
pub fn fill(guest: &GuestMemory, file: &File, extents: &[Extent]) -> io::Result<()> {
    each(guest, extents, |extent, address| {
        let part = Placement { offset: extent.offset, length: extent.length, address };
        place(guest, file, part, Way::Map)
    })
}

/// The same of a file of frames, which are read to their end; `identity` is the snapshot's.
///
/// # Errors
/// When the file is damaged, cannot be read, or is another snapshot's.
pub fn fill_compressed(
    guest: &GuestMemory,
    file: &File,
    extents: &[Extent],
    identity: &Identity,
) -> io::Result<()> {
    let mut source = io::BufReader::with_capacity(frame::MAX_CONTENT, file);
    each(guest, extents, |extent, address| {
        let mut done = 0;
        while done < extent.length {
            let length = (extent.length - done).min(frame::MAX_CONTENT as u64);
            let slice = guest
                .get_slice(GuestAddress(address + done), length as usize)
                .map_err(|error| io::Error::other(error.to_string()))?;
            // SAFETY: the slice is guest memory, which is mapped for good; no vCPU runs yet, so that nothing else reads or
            // writes it.
            let into =
                unsafe { std::slice::from_raw_parts_mut(slice.ptr_guard_mut().as_ptr(), length as usize) };
            frame::decompress(&mut source, into)?;
            done += length;
        }
        Ok(())
    })?;
    let mut trailer = [0; TRAILER];
    frame::decompress(&mut source, &mut trailer)?;
    let end = source.read(&mut [0])? == 0;
    if trailer == trailer_of(identity) && end {
        return Ok(());
    }
    Err(io::Error::new(ErrorKind::InvalidData, "its memory is not the one that was saved with its state"))
}

/// Calls `act` with each piece and its address in the guest.
fn each(
    guest: &GuestMemory,
    extents: &[Extent],
    mut act: impl FnMut(&Extent, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut place_in_file = 0;
    let mut rest = extents;
    for region in guest.iter() {
        let end = place_in_file + region.len();
        while let Some((extent, others)) = rest.split_first().filter(|(extent, _)| extent.offset < end) {
            act(extent, region.start_addr().0 + (extent.offset - place_in_file))?;
            rest = others;
        }
        place_in_file = end;
    }
    Ok(())
}

/// What memory is compared with: that of another snapshot, of which only the difference is written.
#[derive(Debug)]
pub struct Base {
    /// As that snapshot has it.
    pub memory: GuestMemory,
    /// Where anything but zeros can be in it.
    pub extents: Vec<Extent>,
}

/// Writes what of `guest` is not zero, or differs from `base`, into `file`, and tells what that was. `origin`: what of it was mapped
/// from a file and may have been touched by nobody. The guest must stand still.
///
/// # Errors
/// When the file cannot be written.
pub fn write(
    guest: &GuestMemory,
    origin: &[Extent],
    base: Option<&Base>,
    form: Form,
    file: &File,
    identity: &Identity,
) -> io::Result<Vec<Extent>> {
    let mut written = Vec::new();
    let mut offset = 0;
    for (number, region) in guest.iter().enumerate() {
        let length = region.len();
        // SAFETY: the region is mapped for good, and neither the guest nor a device writes to it meanwhile: processors stand
        // still and devices work in this thread.
        let bytes = unsafe { std::slice::from_raw_parts(region.as_ptr(), length as usize) };
        let mut candidates = touched(bytes, origin, offset)?;
        let below =
            base.and_then(|base| base.memory.iter().nth(number)).filter(|below| below.len() == length);
        let found = match (below, base) {
            (Some(below), Some(base)) => {
                // SAFETY: mapped for as long as `base` lives, and nobody writes to it: no guest was ever in it.
                let below = unsafe { std::slice::from_raw_parts(below.as_ptr(), length as usize) };
                candidates.extend(within(&base.extents, offset, length));
                candidates.sort_by_key(|extent| extent.offset);
                pieces(&candidates, |page| page_of(bytes, page) != page_of(below, page))
            }
            _ => pieces(&candidates, |page| !is_zero(bytes, page)),
        };
        written.extend(found.into_iter().map(|piece| Extent { offset: offset + piece.offset, ..piece }));
        offset += length;
    }
    // Of gaps between pages that are written nothing is, but they are mapped with them: what is in a gap is zero, as in the base.
    let mut extents = written.clone();
    if base.is_none() {
        close_gaps(&mut extents, GAP, &places(offset));
    }
    merge(&mut extents, &places(offset));
    // A difference has all pages of its pieces, those of gaps too.
    let written = if form == Form::Plain && base.is_none() { &written } else { &extents };
    let mut start = 0;
    for (region, (place, length)) in guest.iter().zip(places(offset)) {
        // SAFETY: as above.
        let bytes = unsafe { std::slice::from_raw_parts(region.as_ptr(), length as usize) };
        while let Some(extent) = written.get(start).filter(|extent| extent.offset < place + length) {
            let from = (extent.offset - place) as usize;
            let piece = bytes.get(from..from + extent.length as usize).unwrap_or_default();
            match form {
                Form::Plain if base.is_some() => write_what_is_not_zero(file, piece, extent.offset)?,
                Form::Plain => file.write_all_at(piece, extent.offset)?,
                Form::Zstd => write_frames(file, piece)?,
            }
            start += 1;
        }
    }
    match form {
        Form::Plain => {
            file.set_len(offset + PAGE)?;
            file.write_all_at(&trailer_of(identity), offset)?;
        }
        Form::Zstd => write_frames(file, &trailer_of(identity))?,
    }
    Ok(extents)
}

fn write_frames(mut file: &File, bytes: &[u8]) -> io::Result<()> {
    bytes.chunks(frame::MAX_CONTENT).try_for_each(|chunk| file.write_all(&frame::compress(chunk)))
}

/// What was not zero before may be now: such pages are listed, and holes.
fn write_what_is_not_zero(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let all = [Extent { offset: 0, length: bytes.len() as u64 }];
    pieces(&all, |page| !is_zero(bytes, page)).iter().try_for_each(|piece| {
        let (from, to) = (piece.offset as usize, piece.end() as usize);
        file.write_all_at(bytes.get(from..to).unwrap_or_default(), offset + piece.offset)
    })
}

/// Those of `extents` that lie in the range of `length` bytes at `place`, by their place in it.
fn within(extents: &[Extent], place: u64, length: u64) -> impl Iterator<Item = Extent> {
    let here = move |extent: &&Extent| extent.offset >= place && extent.end() <= place + length;
    extents.iter().filter(here).map(move |extent| Extent { offset: extent.offset - place, ..*extent })
}

/// What of `bytes`, private memory at `place`, can be anything but zeros: pages that the process has, and `origin`.
fn touched(bytes: &[u8], origin: &[Extent], place: u64) -> io::Result<Vec<Extent>> {
    let pagemap = pagemap()?;
    let first = bytes.as_ptr() as u64 / PAGE;
    let pages = bytes.len() as u64 / PAGE;
    let mut found = Vec::new();
    let mut buffer = vec![0; ENTRIES * 8];
    let mut page = 0;
    while page < pages {
        let count = ENTRIES.min((pages - page) as usize);
        let entries = buffer.get_mut(..count * 8).unwrap_or_default();
        pagemap.read_exact_at(entries, (first + page) * 8)?;
        for (entry, number) in entries.chunks_exact(8).zip(page..) {
            let entry = <[u8; 8]>::try_from(entry).map_or(0, u64::from_ne_bytes);
            if entry & (PRESENT | SWAPPED) != 0 {
                found.push(Extent { offset: number * PAGE, length: PAGE });
            }
        }
        page += count as u64;
    }
    found.extend(within(origin, place, bytes.len() as u64));
    found.sort_by_key(|extent| extent.offset);
    Ok(found)
}

/// The runs of those pages among `candidates` (sorted, perhaps overlapping) that `keep` wants.
fn pieces(candidates: &[Extent], keep: impl Fn(u64) -> bool) -> Vec<Extent> {
    let mut pieces: Vec<Extent> = Vec::new();
    let mut next = 0;
    for candidate in candidates {
        let mut page = candidate.offset.max(next);
        while page < candidate.end() {
            if keep(page) {
                match pieces.last_mut() {
                    Some(last) if page == last.end() => last.length = page + PAGE - last.offset,
                    _ => pieces.push(Extent { offset: page, length: PAGE }),
                }
            }
            page += PAGE;
        }
        next = next.max(candidate.end());
    }
    pieces
}

fn page_of(bytes: &[u8], page: u64) -> &[u8] {
    let start = page as usize;
    bytes.get(start..start + PAGE as usize).unwrap_or_default()
}

fn is_zero(bytes: &[u8], page: u64) -> bool {
    // SAFETY: any eight bytes are a number.
    let (head, words, tail) = unsafe { page_of(bytes, page).align_to::<u64>() };
    head.iter().chain(tail).all(|byte| *byte == 0) && words.iter().all(|word| *word == 0)
}

/// Makes `extents` few enough by closing the smallest gaps.
fn merge(extents: &mut Vec<Extent>, ranges: &[(u64, u64)]) {
    let mut gap = GAP;
    while extents.len() > MAX_EXTENTS {
        gap *= 2;
        close_gaps(extents, gap, ranges);
    }
}

/// Joins those of `extents` with no more than `gap` bytes between them, never across two ranges.
fn close_gaps(extents: &mut Vec<Extent>, gap: u64, ranges: &[(u64, u64)]) {
    let range = |offset| ranges.iter().rposition(|(start, _)| *start <= offset);
    let mut closed: Vec<Extent> = Vec::new();
    for extent in extents.iter() {
        match closed.last_mut() {
            Some(last) if range(last.offset) == range(extent.offset) && extent.offset - last.end() <= gap => {
                last.length = extent.end() - last.offset;
            }
            _ => closed.push(*extent),
        }
    }
    *extents = closed;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::create;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    const IDENTITY: Identity = *b"0123456789abcdef";

    fn addresses() -> impl Strategy<Value = Vec<(u64, u8)>> {
        let top = (3 << 30) + (2 << 20);
        let offset = prop_oneof![0_u64..4 << 20, (3_u64 << 30) - (1 << 20)..top, 0..top];
        proptest::collection::vec((offset, any::<u8>()), 0..30)
    }

    fn address(offset: u64) -> GuestAddress {
        if offset < layout::HOLE_START { GuestAddress(offset) } else { GuestAddress(offset + (1 << 30)) }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn memory_comes_back_and_again(writes in addresses(), later in addresses()) {
            let bytes = (3 << 30) + (2 << 20);
            let guest = create(bytes).unwrap();
            for (offset, value) in &writes {
                guest.write_obj(*value, address(*offset)).unwrap();
            }
            let file = tempfile::tempfile().unwrap();
            let extents = write(&guest, &[], None, Form::Plain, &file, &IDENTITY).unwrap();
            prop_assert_eq!(file.metadata().unwrap().len(), bytes + PAGE);

            // Of what goes on from it, a snapshot again: what nobody touched since must be in it too.
            let copy = create(bytes).unwrap();
            fill(&copy, &file, &extents).unwrap();
            for (offset, value) in &later {
                copy.write_obj(*value, address(*offset)).unwrap();
            }
            let again = tempfile::tempfile().unwrap();
            let extents = write(&copy, &extents, None, Form::Plain, &again, &IDENTITY).unwrap();
            let last = create(bytes).unwrap();
            fill(&last, &again, &extents).unwrap();
            let mut model = std::collections::BTreeMap::new();
            model.extend(writes.iter().chain(&later).copied());
            for (offset, value) in model {
                prop_assert_eq!(last.read_obj::<u8>(address(offset)).unwrap(), value);
            }
            // And only what was not zero, or close to it, takes space.
            let kept: u64 = extents.iter().map(|extent| extent.length).sum();
            prop_assert!(kept <= (writes.len() + later.len()) as u64 * (GAP + PAGE), "{kept}");
        }

        /// A chain of differences, each plain or compressed, gives what the last machine had; zeros that came later too.
        #[test]
        fn differences_add_up(
            first in addresses(),
            steps in proptest::collection::vec((addresses(), any::<bool>(), any::<bool>()), 1..4),
        ) {
            let bytes = (3 << 30) + (2 << 20);
            let guest = create(bytes).unwrap();
            let mut model = std::collections::BTreeMap::new();
            let put = |model: &mut std::collections::BTreeMap<u64, u8>, writes: &[(u64, u8)]| {
                for (offset, value) in writes {
                    guest.write_obj(*value, address(*offset)).unwrap();
                    model.insert(*offset, *value);
                }
            };
            put(&mut model, &first);
            let mut chain: Vec<(File, Vec<Extent>, Form)> = Vec::new();
            let restored = |chain: &[(File, Vec<Extent>, Form)]| {
                let memory = create(bytes).unwrap();
                for (file, extents, form) in chain {
                    match form {
                        Form::Plain => fill(&memory, file, extents).unwrap(),
                        Form::Zstd => {
                            use std::io::Seek;
                            (&*file).rewind().unwrap();
                            fill_compressed(&memory, file, extents, &IDENTITY).unwrap();
                        }
                    }
                }
                let extents = chain.iter().flat_map(|(_, extents, _)| extents.iter().copied()).collect();
                Base { memory, extents }
            };
            let file = tempfile::tempfile().unwrap();
            let extents = write(&guest, &[], None, Form::Plain, &file, &IDENTITY).unwrap();
            chain.push((file, extents, Form::Plain));
            for (writes, back, compressed) in steps {
                put(&mut model, &writes);
                if back {
                    // Everything of the first is zero again.
                    let zeros: Vec<_> = first.iter().map(|(offset, _)| (*offset, 0)).collect();
                    put(&mut model, &zeros);
                }
                let base = restored(&chain);
                let form = if compressed { Form::Zstd } else { Form::Plain };
                let file = tempfile::tempfile().unwrap();
                let extents = write(&guest, &[], Some(&base), form, &file, &IDENTITY).unwrap();
                let pages: u64 = extents.iter().map(|extent| extent.length / PAGE).sum();
                prop_assert!(pages <= (writes.len() + first.len()) as u64, "{pages} pages");
                chain.push((file, extents, form));
                let last = restored(&chain);
                for (offset, value) in &model {
                    prop_assert_eq!(last.memory.read_obj::<u8>(address(*offset)).unwrap(), *value);
                }
            }
        }

        #[test]
        fn few_pieces_remain_and_all_are_in_them(count in MAX_EXTENTS..3 * MAX_EXTENTS, step in 17_u64..40) {
            let ranges = places(8_u64 << 30);
            let all: Vec<_> = (0..count as u64)
                .map(|i| Extent { offset: i * step * PAGE, length: PAGE })
                .collect();
            let mut merged = all.clone();
            merge(&mut merged, &ranges);
            prop_assert!(merged.len() <= MAX_EXTENTS);
            for extent in &all {
                prop_assert!(merged.iter().any(|m| m.offset <= extent.offset && extent.end() <= m.end()));
            }
            for extent in &merged {
                prop_assert!(extent.offset >= 3 << 30 || extent.end() <= 3 << 30);
            }
        }
    }

    #[test]
    fn a_file_of_another_snapshot_or_length_is_refused() {
        let guest = create(1 << 20).unwrap();
        let file = tempfile::tempfile().unwrap();
        let extents = write(&guest, &[], None, Form::Plain, &file, &IDENTITY).unwrap();
        assert_eq!(extents, []);
        let mut snapshot = crate::snapshot::tests::snapshot(1 << 20, extents);
        assert!(check_file(&file, &snapshot).unwrap_err().contains("not the one"));
        snapshot.identity = IDENTITY;
        assert_eq!(check_file(&file, &snapshot), Ok(()));
        file.set_len(1 << 20).unwrap();
        assert!(check_file(&file, &snapshot).unwrap_err().contains("cut off"));
    }

    #[test]
    fn pieces_that_do_not_lie_in_memory_are_refused() {
        let extent = |offset, length| vec![Extent { offset, length }];
        for (bad, extents) in [
            (false, extent(0, PAGE)),
            (false, extent((1 << 20) - PAGE, PAGE)),
            (true, extent(0, 0)),
            (true, extent(1, PAGE)),
            (true, extent(0, 100)),
            (true, extent(1 << 20, PAGE)),
            (true, extent(u64::MAX - PAGE + 1, PAGE)),
            (true, [extent(0, 2 * PAGE), extent(PAGE, PAGE)].concat()),
        ] {
            let result = check(&crate::snapshot::tests::snapshot(1 << 20, extents.clone()));
            assert_eq!(result.is_err(), bad, "{extents:?}");
        }
        assert!(check(&crate::snapshot::tests::snapshot(100, Vec::new())).is_err());
    }
}
