//! Memory and disks of a snapshot that are compressed, or only differences.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use vmm::memory::{GuestMemory, create};
use vmm::snapshot::disk::{Packer, Saved};
use vmm::snapshot::{Extent, frame, memory};

use super::snapshot::{with_place, wrap};
use crate::bytes::{Bytes, Script};
use crate::{Seed, Target, seed};

/// `memory.zst`.
pub const MEMORY_FRAMES: Target = Target {
    name: "memory-frames",
    surface: "a snapshot's compressed memory",
    run: memory_frames,
    seeds: || {
        let trailer = frame::compress(&[b"BLKHMEM\0".as_slice(), &IDENTITY].concat());
        let pages = |byte: u8, many: usize| frame::compress(&vec![byte; many * 4096]);
        vec![
            seed("all of it", [pages(1, 1), pages(2, 2), trailer.clone()].concat()),
            seed("one piece", pages(1, 1)),
            seed("too long", [pages(1, 3), trailer].concat()),
            seed("one after the other", [frame::compress(b"a"), frame::compress(&[0; 70_000])].concat()),
        ]
    },
};
/// `disk-ID.packed`.
pub const PACKED_DISK: Target = Target {
    name: "packed-disk",
    surface: "a snapshot's copy of a disk that is compressed or a difference",
    run: packed_disk,
    seeds: packed_seeds,
};

const IDENTITY: [u8; 16] = [7; 16];
/// Longest disk that is made of one.
const MAX_DISK: u64 = 4 << 20;

fn memory_frames(data: &[u8]) {
    let mut rest = data;
    let mut page = [0; 4096];
    while frame::decompress(&mut rest, &mut page).is_ok() {}

    thread_local! {
        // Guest memory is never given back.
        static GUEST: GuestMemory = create(2 << 20).expect("memory");
    }
    with_place(|place| {
        let path = place.join("memory.zst");
        fs::write(&path, data).expect("a file");
        let extents = [Extent { offset: 0, length: 4096 }, Extent { offset: 1 << 20, length: 8192 }];
        let file = File::open(&path).expect("a file");
        let filled = GUEST.with(|guest| memory::fill_compressed(guest, &file, &extents, &IDENTITY));
        if filled.is_ok() {
            // Whatever is taken has a checksum for every byte.
            let all = rest_of(data, &[4096, 8192, 24]);
            assert!(all.is_some_and(<[u8]>::is_empty), "more or less than was saved was taken");
        }
    });
}

/// What follows frames with contents of these lengths.
fn rest_of<'a>(data: &'a [u8], lengths: &[usize]) -> Option<&'a [u8]> {
    let mut rest = data;
    for length in lengths {
        frame::decompress(&mut rest, &mut vec![0; *length]).ok()?;
    }
    Some(rest)
}

/// A length of two bytes, clusters, and an index, around which the rest of the file is made right.
fn packed_disk(data: &[u8]) {
    let mut input = Bytes(data);
    let clusters = input.part();
    let index = wrap(input.0);
    with_place(|place| {
        let path = place.join("packed");
        let mut file = File::create(&path).expect("a file");
        let start = (clusters.len() as u64).to_le_bytes();
        for part in [clusters, &index, &start, b"BLKHDISK"] {
            file.write_all(part).expect("a write");
        }
        let Ok(saved) = Saved::alone(File::open(&path).expect("a file")) else { return };
        let length = saved.length();
        if length > MAX_DISK {
            return;
        }
        for number in saved.clusters().expect("they are in memory") {
            assert!(number << 16 < length, "a cluster beyond the end");
        }
        let to = place.join("disk");
        match saved.copy(&to) {
            Ok(_) => {
                assert_eq!(fs::metadata(&to).expect("the disk").len(), length);
                fs::remove_file(&to).expect("to remove");
            }
            Err(_) => assert!(!to.exists(), "half a disk stays"),
        }
    });
}

fn packed_seeds() -> Vec<Seed> {
    let packed = |compressed: bool, length: u64, clusters: &[(u64, u8)]| {
        let file = tempfile::tempfile().expect("a file");
        let mut packer = Packer::new(file.try_clone().expect("a file"), length, compressed, false);
        for (number, byte) in clusters {
            let size = (length - (number << 16)).min(1 << 16) as usize;
            packer.put(*number, &vec![*byte; size]).expect("a cluster");
        }
        packer.finish().expect("an index");
        let mut all = vec![0; file.metadata().expect("a file").len() as usize];
        file.read_exact_at(&mut all, 0).expect("a file");
        let end = all.len() - 16;
        let start = u64::from_le_bytes(all[end..end + 8].try_into().expect("eight")) as usize;
        // Without the header and the footer, which the target makes.
        let length = u16::try_from(start).expect("a short one");
        Script::new().raw(&length.to_le_bytes()).raw(&all[..start]).raw(&all[start + 24..end]).0
    };
    vec![
        seed("compressed", packed(true, 1 << 20, &[(0, 1), (3, 2), (15, 3)])),
        seed("a short last one", packed(true, (1 << 16) + 512, &[(1, 9)])),
        seed("as it is", packed(false, 512, &[(0, 5)])),
        seed("nothing", packed(false, 4 << 20, &[])),
    ]
}
