//! Files of a snapshot. Their checksums are made right here, or nothing would get behind them.

use std::cell::OnceCell;
use std::path::Path;

use tempfile::TempDir;
use vmm::arch::state::VmState;
use vmm::devices::virtio::mmio::TransportState;
use vmm::snapshot::working_set::{self, WORKING_SET as NAME};
use vmm::snapshot::{Extent, Form, Snapshot, file, memory};

use super::devices::{Cable, Drive, Entropy, Screen};
use super::packets::Sockets;
use crate::bytes::Script;
use crate::guest::{self, Host};
use crate::{Seed, Target, seed};

/// `state`.
pub const STATE: Target =
    Target { name: "snapshot-state", surface: "a snapshot's `state`", run: state, seeds: state_seeds };
/// A device's part of it, put into a device.
pub const DEVICE_STATE: Target = Target {
    name: "device-state",
    surface: "the state of each device in a snapshot, restored and used",
    run: device_state,
    seeds: device_seeds,
};
/// `working-set`.
pub const WORKING_SET: Target = Target {
    name: "working-set",
    surface: "a template's `working-set`",
    run: working_set_of,
    seeds: || {
        let record = |extents: Vec<Extent>| postcard::to_stdvec(&([7_u8; 16], extents)).expect("a record");
        vec![
            seed(
                "three pages",
                record(vec![Extent { offset: 0, length: 4096 }, Extent { offset: 8192, length: 8192 }]),
            ),
            seed(
                "out of order",
                record(vec![Extent { offset: 8192, length: 4096 }, Extent { offset: 0, length: 4096 }]),
            ),
            seed("all there is", record(vec![Extent { offset: u64::MAX - 4095, length: u64::MAX }])),
        ]
    },
};

fn snapshot(devices: Vec<TransportState>) -> Snapshot {
    Snapshot {
        identity: [7; 16],
        form: Form::Plain,
        base: None,
        config: r#"{"boot":{"kernel":"k"}}"#.into(),
        memory_bytes: 64 << 20,
        extents: vec![Extent { offset: 0, length: 4096 }, Extent { offset: 1 << 20, length: 8192 }],
        vm: VmState::default(),
        vcpus: Vec::new(),
        devices,
    }
}

/// The form of the file around a body.
pub(super) fn wrap(body: &[u8]) -> Vec<u8> {
    let script =
        Script::new().raw(b"BLKHSNAP").u32(file::VERSION).u32(body.len() as u32).u32(crc32fast::hash(body));
    let sum = crc32fast::hash(&script.0);
    script.u32(sum).raw(body).0
}

fn state(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    let decoded =
        if kind % 4 == 0 { file::decode::<Snapshot>(rest) } else { file::decode::<Snapshot>(&wrap(rest)) };
    let Ok(snapshot) = decoded else { return };
    if memory::check(&snapshot).is_ok() {
        let bytes: u64 = snapshot.extents.iter().map(|extent| extent.length).sum();
        assert!(bytes <= snapshot.memory_bytes, "more memory than there is");
    }
    for vcpu in &snapshot.vcpus {
        vcpu.features_missing_from(&[]);
    }
    // What can be read can be written, and reads the same.
    let again = file::encode(&snapshot).expect("what was read cannot be written");
    let again: Snapshot = file::decode(&again).expect("what was written cannot be read");
    assert_eq!(postcard::to_stdvec(&again).ok(), postcard::to_stdvec(&snapshot).ok());
}

fn state_seeds() -> Vec<Seed> {
    let states =
        device_seeds().into_iter().filter_map(|one| postcard::from_bytes(&one.bytes[1..]).ok()).collect();
    let body = |snapshot: &Snapshot| postcard::to_stdvec(snapshot).expect("a state");
    let whole = body(&snapshot(states));
    vec![
        seed("a machine with devices", [vec![1], whole.clone()].concat()),
        seed("the same, in its form", [vec![0], wrap(&whole)].concat()),
        seed("cut off", [vec![0], wrap(&whole)[..60].to_vec()].concat()),
        seed("a length of 2^64", [vec![1], vec![7; 16], vec![0xff; 9], vec![1]].concat()),
    ]
}

/// The hosts whose devices' states are tried.
fn host(kind: u8) -> Box<dyn Host> {
    match kind % 5 {
        0 => Box::new(Drive::new()),
        1 => Box::<Cable>::default(),
        2 => Box::new(Entropy),
        3 => Box::<Screen>::default(),
        _ => Box::<Sockets>::default(),
    }
}

fn device_state(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    let Ok(state) = postcard::from_bytes::<TransportState>(rest) else { return };
    let mut host = host(*kind);
    guest::go_on(host.device(), &state);
    host.check();
}

fn device_seeds() -> Vec<Seed> {
    const NAMES: [&str; 5] = ["a disk", "a network", "an entropy device", "a console", "sockets"];
    let state = |kind| guest::saved(host(kind).device());
    let encode = |state: TransportState| postcard::to_stdvec(&state).expect("a state");
    NAMES.iter().zip(0..).map(|(name, kind)| seed(name, [vec![kind], encode(state(kind))].concat())).collect()
}

/// Calls `act` with a directory in memory, the same one each time.
pub(super) fn with_place(act: impl FnOnce(&Path)) {
    thread_local! {
        static PLACE: OnceCell<TempDir> = const { OnceCell::new() };
    }
    PLACE.with(|place| {
        let place = place.get_or_init(|| {
            tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
        });
        act(place.path());
    });
}

fn working_set_of(data: &[u8]) {
    with_place(|place| {
        std::fs::write(place.join(NAME), wrap(data)).expect("a file");
        let of = snapshot(Vec::new());
        let extents = working_set::read(place, &of);
        let bytes: u64 = extents.iter().map(|extent| extent.length).sum();
        assert!(bytes <= working_set::MAX_BYTES, "a hint of {bytes} bytes");
        assert!(memory::check_extents(of.memory_bytes, &extents).is_ok());
    });
}
