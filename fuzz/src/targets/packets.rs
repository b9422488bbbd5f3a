//! vsock: packets that are right in form, so that what they say gets to the streams.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use tempfile::TempDir;
use vmm::devices::virtio::VirtioDevice;
use vmm::devices::virtio::vsock::Vsock;

use crate::bytes::{Bytes, Script};
use crate::guest::{Host, WRITE, op as moves, play};
use crate::{Seed, Target, seed};

/// Streams between guest and host.
pub const VSOCK_STREAMS: Target = Target {
    name: "vsock-streams",
    surface: "vsock packets: streams, credit and their ends, with hosts' programs that come and go",
    run: |data| play(&mut Sockets::new(), Bytes(&translate(Bytes(data)).0)),
    seeds: stream_seeds,
};

const GUEST: u64 = 3;
const HOST: u64 = 2;
/// The port on which a program of the host listens.
const LISTENED: u32 = 1024;
/// The first that the device gives to programs of the host that connect.
const FIRST: u32 = 1 << 30;
/// Header of a packet.
const HEADER: usize = 44;

/// What happens, by the first byte modulo [`word::COUNT`].
mod word {
    /// The guest sends a packet: operation, host's port, guest's port, credit (32, 32), flags (8), length that it claims (16), payload.
    pub const PACKET: u8 = 0;
    /// The guest has a buffer of so many bytes (16) for a packet.
    pub const BUFFER: u8 = 1;
    /// A program of the host connects to the guest's port.
    pub const CONNECT: u8 = 2;
    pub const SAY: u8 = 3;
    pub const TAKE: u8 = 4;
    pub const CLOSE: u8 = 5;
    pub const MOVE: u8 = 6;
    pub const RESET: u8 = 7;
    pub const COUNT: u8 = 8;
}

/// Words as moves of the guest and its host.
fn translate(mut input: Bytes<'_>) -> Script {
    let mut script = Script::new().start(0).chain(0, &[(WRITE, 2000, b"")]);
    while !input.is_empty() {
        script = match input.u8() % word::COUNT {
            word::PACKET => {
                let header = header(&mut input);
                let payload = input.part();
                let payload = &payload[..payload.len().min(2000)];
                script.chain(1, &[(0, HEADER as u16, &header), (0, payload.len() as u16, payload)])
            }
            word::BUFFER => script.chain(0, &[(WRITE, input.u16() % 2048, b"")]),
            word::CONNECT => script.u8(moves::CONNECT).u32(port(&mut input)).host(),
            word::SAY => script.say(input.part()).host(),
            word::TAKE => script.u8(moves::TAKE).u16(input.u16()).host(),
            word::CLOSE => script.u8(moves::CLOSE).host(),
            word::RESET => script.start(input.u32()),
            _ => script.moved(),
        };
    }
    script
}

fn port(input: &mut Bytes<'_>) -> u32 {
    match input.u8() % 4 {
        0 => LISTENED,
        1 => FIRST + u32::from(input.u8() % 4),
        2 => u32::from(input.u8() % 4),
        _ => input.u32(),
    }
}

fn header(input: &mut Bytes<'_>) -> Vec<u8> {
    let (op, host, guest) = (input.u8(), port(input), port(input));
    let (buf_alloc, fwd_cnt, flags, len) = (input.u32(), input.u32(), input.u8(), input.u16());
    // One in eight has a lie in its addresses or type.
    let lie = op >> 5 == 7;
    let source = if lie { u64::from(flags) } else { GUEST };
    Script::new()
        .u64(source)
        .u64(HOST)
        .u32(guest)
        .u32(host)
        .u32(len.into())
        .u16(1)
        .u16(u16::from(op % 16))
        .u32(flags.into())
        .u32(buf_alloc)
        .u32(fwd_cnt)
        .into()
}

fn packet(
    op: u8,
    host: (u8, u32),
    guest: (u8, u32),
    credit: (u32, u32),
    flags: u8,
    payload: &[u8],
) -> Script {
    let port = |script: Script, (kind, number): (u8, u32)| match kind {
        0 => script.u8(0),
        1 | 2 => script.u8(kind).u8(number as u8),
        _ => script.u8(3).u32(number),
    };
    let script = port(port(Script::new().u8(word::PACKET).u8(op), host), guest);
    script.u32(credit.0).u32(credit.1).u8(flags).u16(payload.len() as u16).part(payload)
}

/// The programs of the host: one that listens, and any number that connect.
pub struct Sockets {
    place: TempDir,
    listener: UnixListener,
    streams: Vec<UnixStream>,
    devices: usize,
}

/// Most programs at a time: descriptors are few.
const MAX_STREAMS: usize = 32;

impl Sockets {
    /// Nobody has connected.
    pub fn new() -> Self {
        let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
        let listener = UnixListener::bind(place.path().join(format!("socket_{LISTENED}"))).expect("a socket");
        listener.set_nonblocking(true).expect("a socket");
        Self { place, listener, streams: Vec::new(), devices: 0 }
    }

    fn keep(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).expect("a socket");
        if self.streams.len() < MAX_STREAMS {
            self.streams.push(stream);
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            self.keep(stream);
        }
    }
}

impl Default for Sockets {
    fn default() -> Self {
        Self::new()
    }
}

impl Host for Sockets {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        // One that is moved has its successor beside it for a moment, under another name.
        self.devices += 1;
        let name = if self.devices % 2 == 1 { "socket" } else { "other" };
        let path = self.place.path().join(name);
        let _ = std::fs::remove_file(&path);
        Box::new(Vsock::new(GUEST as u32, &path).expect("a socket"))
    }

    fn say(&mut self, bytes: &[u8]) {
        self.accept();
        for stream in &mut self.streams {
            let _ = stream.write(bytes);
        }
    }

    fn take(&mut self, most: usize) {
        self.accept();
        let mut buffer = vec![0; most];
        for stream in &mut self.streams {
            let _ = stream.read(&mut buffer);
        }
    }

    fn connect(&mut self, port: u32) {
        for name in ["socket", "other"] {
            if let Ok(mut stream) = UnixStream::connect(self.place.path().join(name)) {
                let _ = stream.write_all(format!("CONNECT {port}\n").as_bytes());
                self.keep(stream);
            }
        }
    }

    fn close(&mut self) {
        self.accept();
        if !self.streams.is_empty() {
            self.streams.remove(0);
        }
    }
}

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const RST: u8 = 3;
const SHUTDOWN: u8 = 4;
const RW: u8 = 5;
const CREDIT_REQUEST: u8 = 7;

fn stream_seeds() -> Vec<Seed> {
    let listened = (0, 0);
    let mine = (2, 1);
    let credit = (60_000, 0);
    let guest = |op, credit, flags, payload: &[u8]| packet(op, listened, mine, credit, flags, payload).0;
    let buffer = || Script::new().u8(word::BUFFER).u16(1500).0;
    let word = |word: u8| vec![word];
    let take = || Script::new().u8(word::TAKE).u16(4000).0;
    let say = |bytes: &[u8]| Script::new().u8(word::SAY).part(bytes).0;
    let connect = || Script::new().u8(word::CONNECT).u8(0).0;
    let answer = |op, payload: &[u8]| packet(op, (1, 0), listened, credit, 0, payload).0;
    vec![
        seed("the guest's stream", {
            let talk =
                [guest(REQUEST, credit, 0, b""), buffer(), guest(RW, credit, 0, b"hello"), take()].concat();
            [talk, say(b"world"), buffer(), guest(SHUTDOWN, credit, 3, b""), buffer()].concat()
        }),
        seed("the host's stream", {
            let talk = [connect(), buffer(), answer(RESPONSE, b""), say(b"question"), buffer()].concat();
            [talk, answer(RW, b"answer"), take(), word(word::CLOSE), buffer()].concat()
        }),
        seed("credit that is a lie", {
            let lie = (u32::MAX, u32::MAX - 5);
            let talk = [guest(REQUEST, lie, 0, b""), buffer(), say(&[7; 3000]), buffer(), buffer()].concat();
            [talk, guest(CREDIT_REQUEST, (0, 77), 0, b""), buffer(), say(&[8; 300]), buffer()].concat()
        }),
        seed("much at once", {
            let burst: Vec<u8> = (0..20).flat_map(|_| guest(RW, credit, 0, &[1; 2000])).collect();
            [guest(REQUEST, credit, 0, b""), buffer(), burst, buffer(), buffer()].concat()
        }),
        seed("packets of streams that are not", {
            [guest(RW, credit, 0, b"x"), guest(RST, credit, 0, b""), answer(RESPONSE, b""), buffer()].concat()
        }),
        seed("an acceptance that nobody waits for", {
            [guest(REQUEST, credit, 0, b""), buffer(), guest(RESPONSE, credit, 0, b""), buffer()].concat()
        }),
        seed("a move in the middle", {
            let talk = [guest(REQUEST, credit, 0, b""), buffer(), guest(RW, credit, 0, b"hello")].concat();
            [talk, word(word::MOVE), buffer(), guest(RW, credit, 0, b"lost"), buffer()].concat()
        }),
    ]
}

/// For the queues' own target: the same as moves, so that mutations break their form, too.
pub fn queue_seeds() -> Vec<Seed> {
    stream_seeds().into_iter().map(|one| seed(one.name, translate(Bytes(&one.bytes)))).collect()
}
