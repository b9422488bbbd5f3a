//! vhost-user: what the process that serves a shared directory says to the monitor.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vmm::devices::virtio::VirtioDevice;

use super::devices::shared;
use crate::bytes::{Bytes, Script};
use crate::guest::{Host, play};
use crate::{Target, seed};

/// The answers of virtiofsd.
pub const FS_BACKEND: Target = Target {
    name: "fs-backend",
    surface: "vhost-user answers of virtiofsd, which a guest may have taken over",
    run: |data| {
        play(
            &mut Says { words: data, far: Vec::new() },
            Bytes(&Script::new().start(0xffff_ffff).moved().start(0).0),
        )
    },
    seeds: || {
        let lacking = [reply(GET_FEATURES, 1 << 32), reply(GET_PROTOCOL_FEATURES, 0)].concat();
        let proud =
            [reply(GET_FEATURES, u64::MAX), reply(GET_PROTOCOL_FEATURES, u64::MAX), reply(GET_QUEUE_NUM, 9)];
        vec![
            seed("yes to all", yes(4)),
            seed("lacks all", lacking),
            seed(
                "claims all",
                [proud.concat(), reply(SET_MEM_TABLE, 0), reply(SET_VRING_ENABLE, 0)].concat(),
            ),
            seed("says no", [proud.concat(), reply(SET_MEM_TABLE, 1)].concat()),
            seed("half a header", vec![1, 0, 0, 0, 5]),
            seed("a length of 4 GiB", Script::new().u32(GET_FEATURES).u32(5).u32(u32::MAX)),
        ]
    },
};

const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
/// Version 1, and a reply.
const REPLY: u32 = 1 | 4;
/// Indirect descriptors, event index, version 1, protocol features.
const FEATURES: u64 = 1 << 28 | 1 << 29 | 1 << 32 | 1 << 30;
const MULTI_QUEUE: u64 = 1;

fn reply(request: u32, value: u64) -> Vec<u8> {
    Script::new().u32(request).u32(REPLY).u32(8).u64(value).into()
}

/// A server that agrees, and gives its two queues back so many times.
pub(super) fn yes(stops: usize) -> Vec<u8> {
    let head =
        [reply(GET_FEATURES, FEATURES), reply(GET_PROTOCOL_FEATURES, MULTI_QUEUE), reply(GET_QUEUE_NUM, 2)];
    let stop = [reply(GET_VRING_BASE, 0), reply(GET_VRING_BASE, 1)].concat();
    [head.concat(), stop.repeat(stops)].concat()
}

struct Says<'a> {
    words: &'a [u8],
    /// What the monitor says has to go somewhere.
    far: Vec<UnixStream>,
}

impl Host for Says<'_> {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (near, mut far) = UnixStream::pair().expect("out of descriptors");
        far.write_all(&self.words[..self.words.len().min(64 << 10)]).expect("a socket that is full");
        far.shutdown(Shutdown::Write).expect("a socket");
        self.far.push(far);
        Box::new(shared(near))
    }

    fn can_be_saved(&self) -> bool {
        false
    }
}
