//! Each target on its seeds and on some mutations of them: without libFuzzer, the same every time, some seconds in all.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

use fuzz::{Seed, TARGETS, target};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Mutations of each target, the same every time; `FUZZ_CASES` asks for so many, and others every time.
const CASES: u32 = 150;

/// How bytes are changed.
#[derive(Debug, Clone)]
enum Change {
    Byte(Index, u8),
    Bit(Index, u8),
    /// One that is often the edge of something.
    Edge(Index, usize),
    Insert(Index, Vec<u8>),
    Remove(Index, Index),
    /// A piece comes once more.
    Repeat(Index, Index),
    /// The rest is another seed's.
    Splice(Index, Index),
}

const EDGES: [&[u8]; 8] =
    [&[0], &[0xff], &[0x7f], &[0, 0, 0, 0], &[0xff; 4], &[0xff; 8], &[0, 0, 0, 0x80], &[0, 0, 1, 0]];

fn change() -> impl Strategy<Value = Change> {
    let at = any::<Index>;
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, value)| Change::Byte(at, value)),
        (at(), 0..8_u8).prop_map(|(at, bit)| Change::Bit(at, bit)),
        (at(), 0..EDGES.len()).prop_map(|(at, edge)| Change::Edge(at, edge)),
        (at(), proptest::collection::vec(any::<u8>(), 1..12))
            .prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (at(), at()).prop_map(|(from, to)| Change::Remove(from, to)),
        (at(), at()).prop_map(|(from, to)| Change::Repeat(from, to)),
        (at(), at()).prop_map(|(at, other)| Change::Splice(at, other)),
    ]
}

fn mutate(seeds: &[Seed], first: Index, changes: &[Change]) -> Vec<u8> {
    let mut bytes = first.get(seeds).bytes.clone();
    for change in changes {
        let length = bytes.len() + 1;
        match change {
            Change::Byte(at, value) if length > 1 => bytes[at.index(length - 1)] = *value,
            Change::Bit(at, bit) if length > 1 => bytes[at.index(length - 1)] ^= 1 << bit,
            Change::Edge(at, edge) => {
                let edge = EDGES[*edge];
                let at = at.index(length);
                bytes.splice(at..(at + edge.len()).min(length - 1), edge.iter().copied());
            }
            Change::Insert(at, new) => {
                drop(bytes.splice(at.index(length)..at.index(length), new.iter().copied()))
            }
            Change::Remove(from, to) => {
                let (from, to) = (from.index(length), to.index(length));
                bytes.drain(from.min(to)..from.max(to));
            }
            Change::Repeat(from, to) => {
                let (from, to) = (from.index(length), to.index(length));
                let piece = bytes[from.min(to)..from.max(to)].to_vec();
                bytes.splice(from..from, piece);
            }
            Change::Splice(at, other) => {
                let other = &other.get(seeds).bytes;
                let at = at.index(length);
                bytes.truncate(at);
                bytes.extend(other.get(at..).unwrap_or_default());
            }
            Change::Byte(..) | Change::Bit(..) => {}
        }
    }
    bytes
}

fn run(name: &str) {
    let target = target(name).unwrap();
    let seeds = (target.seeds)();
    for seed in &seeds {
        println!("{name}: {}", seed.name);
        (target.run)(&seed.bytes);
    }
    (target.run)(&[]);
    let asked = std::env::var("FUZZ_CASES").ok().map(|cases| cases.parse().unwrap());
    let config = Config { cases: asked.unwrap_or(CASES), failure_persistence: None, ..Config::default() };
    let mut runner = match asked {
        Some(_) => TestRunner::new(config),
        None => TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha)),
    };
    let inputs = (any::<Index>(), proptest::collection::vec(change(), 1..8));
    runner
        .run(&inputs, |(first, changes)| {
            (target.run)(&mutate(&seeds, first, &changes));
            Ok(())
        })
        .unwrap();
}

/// A test for each, so that they run side by side and say which.
macro_rules! tests {
    ($($test:ident $name:literal)*) => {
        const TESTED: &[&str] = &[$($name),*];
        $(#[test] fn $test() { run($name); })*
    };
}

tests! {
    block "block"
    net "net"
    vsock "vsock"
    rng "rng"
    console "console"
    fs "fs"
    mmio "mmio"
    ports "ports"
    vsock_streams "vsock-streams"
    fs_backend "fs-backend"
    composite_disk "composite-disk"
    snapshot_state "snapshot-state"
    device_state "device-state"
    working_set "working-set"
    memory_frames "memory-frames"
    packed_disk "packed-disk"
    control "control"
    agent_answers "agent-answers"
    agent_streams "agent-streams"
    layer "layer"
    layer_blob "layer-blob"
    erofs "erofs"
    image_archive "image-archive"
    image_documents "image-documents"
    bundle "bundle"
    copy "copy"
    settings "settings"
    container_json "container-json"
}

#[test]
fn every_target_is_tested_and_has_seeds() {
    let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(names, TESTED);
    for target in TARGETS {
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{} has no seeds", target.name);
        assert!(seeds.iter().all(|seed| seed.bytes.len() < 256 << 10), "{} has large seeds", target.name);
    }
}
