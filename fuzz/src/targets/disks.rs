//! The composite disk: layers as partitions, read through a partition table of ours by a reader of the standard.

use std::fs::File;
use std::path::PathBuf;

use vmm::devices::virtio::block::disk::{Disk, LAYER_ALIGNMENT};

use super::devices::memory_file;
use crate::bytes::{Bytes, Script};
use crate::{Target, seed};

/// See the module.
pub const COMPOSITE: Target = Target {
    name: "composite-disk",
    surface: "lengths of layers and positions of reads, against a reader of GPT",
    run: composite,
    seeds: || {
        let layers = |lengths: &[u16]| {
            lengths
                .iter()
                .fold(Script::new().u8(lengths.len() as u8 - 1), |script, length| script.u16(*length))
        };
        vec![
            seed("three layers", layers(&[1, 4096, 5000]).u64(0).u16(1024).u64(20480).u16(9000)),
            seed("more than fit in a page", layers(&[10; 25]).u64(0).u16(65535)),
            seed("across the end", layers(&[100]).u64(u64::MAX - 100).u16(512).u64(45055).u16(2)),
        ]
    },
};

const MAX_LAYERS: u8 = 40;

fn composite(data: &[u8]) {
    let mut input = Bytes(data);
    let count = input.u8() % MAX_LAYERS + 1;
    let mut files: Vec<(File, PathBuf)> = Vec::new();
    let mut layers: Vec<Vec<u8>> = Vec::new();
    for number in 0..count {
        let length = usize::from(input.u16() % 20_000).max(1);
        let layer: Vec<u8> = (0..length).map(|at| (at as u8).wrapping_mul(7).wrapping_add(number)).collect();
        files.push(memory_file(&layer));
        layers.push(layer);
    }
    let paths: Vec<PathBuf> = files.iter().map(|(_, path)| path.clone()).collect();
    let disk = Disk::composite("fuzz", &paths).expect("a disk of files");
    let all = read(&disk, 0, disk.length() as usize).expect("a disk that can be read");
    check(&all, &layers);
    while !input.is_empty() {
        let (offset, length) = (input.u64() % (disk.length() * 2), usize::from(input.u16()));
        let found = read(&disk, offset, length);
        let wanted = usize::try_from(offset).ok().and_then(|at| all.get(at..at.checked_add(length)?));
        assert_eq!(found.as_deref(), wanted, "{length} bytes at {offset}");
    }
}

/// In pieces of odd lengths.
fn read(disk: &Disk, offset: u64, length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0xee; length];
    let pieces = bytes
        .chunks_mut(1000 + length % 77)
        .map(|piece| libc::iovec { iov_base: piece.as_mut_ptr().cast(), iov_len: piece.len() })
        .collect();
    // SAFETY: the pieces are parts of `bytes`, which lives across the call.
    unsafe { disk.read(offset, pieces) }.ok().map(|()| bytes)
}

/// Both tables lead to all layers, and nothing else is on the disk (UEFI specification 2.10, 5.3).
fn check(disk: &[u8], layers: &[Vec<u8>]) {
    assert_eq!(disk.len() as u64 % LAYER_ALIGNMENT, 0);
    let last = disk.len() as u64 / 512 - 1;
    assert_eq!(disk[510..512], [0x55, 0xaa]);
    for (own, other) in [(1, last), (last, 1)] {
        let header = &disk[own as usize * 512..][..512];
        let long = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        assert_eq!((&header[..8], word(12)), (&b"EFI PART"[..], 92));
        assert_eq!((long(24), long(32)), (own, other));
        let mut summed = header[..92].to_vec();
        summed[16..20].fill(0);
        assert_eq!(crc32fast::hash(&summed), word(16), "sum of a header");
        let entries = &disk[long(72) as usize * 512..][..word(80) as usize * word(84) as usize];
        assert_eq!(crc32fast::hash(entries), word(88), "sum of the entries");
        let mut end = long(40);
        for (number, entry) in entries.chunks(word(84) as usize).enumerate() {
            let long = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().expect("eight bytes"));
            let Some(layer) = layers.get(number) else {
                assert!(entry.iter().all(|byte| *byte == 0), "an entry too many");
                continue;
            };
            let (first, until) = (long(32), long(40));
            assert!(
                first >= end && first % 8 == 0 && until <= last_usable(header),
                "a partition out of place"
            );
            let content = &disk[first as usize * 512..(until + 1) as usize * 512];
            assert_eq!(content[..layer.len()], layer[..]);
            assert!(content[layer.len()..].iter().all(|byte| *byte == 0));
            end = until + 1;
        }
    }
}

fn last_usable(header: &[u8]) -> u64 {
    u64::from_le_bytes(header[48..56].try_into().expect("eight bytes"))
}
