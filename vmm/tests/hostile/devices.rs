//! Requests that are right in form and mean harm.

use std::any::Any;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::thread;

use super::common::{Guest, Place};
use super::kit::*;

pub fn acts() -> Vec<Act> {
    [disk(), network(), sockets(), console()].into_iter().flatten().collect()
}

/// A chain at the queue of a device, as often as its queue has room.
fn often(device: Device, queue: u32, chain: &[Descriptor], times: u16) -> Guest {
    let size = device.queues[queue as usize];
    let heads = vec![0; usize::from(size)];
    Guest::new().queue(device.window, queue, chain, &heads, times.min(size))
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// A block request with data of these lengths; `write`: the device writes it.
fn request(kind: u32, sector: u64, data: &[u8], length: u32, write: bool) -> Guest {
    let at = u64::from(DATA);
    let flags = if write { WRITE | NEXT } else { NEXT };
    let chain = [(at, 16, NEXT, 1), (at + 4096, length, flags, 2), (at + 64, 1, WRITE, 0)];
    let place = |guest: Guest| guest.place(DATA, header(kind, sector)).place(DATA + 4096, data);
    place(often(ALL[0], 0, &chain, 1)).set_up(ALL[0]).kick(DISK, 0).wait(DISK, 0)
}

fn disk() -> Vec<Act> {
    let lives = || End::Lives(&[]);
    let ranges = |sector: u64, sectors: u32, flags: u32, count: usize| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat().repeat(count)
    };
    let lie = |kind, data: &[u8]| request(kind, 0, data, data.len() as u32, false);
    let mut acts = vec![
        act("reading beyond the disk", request(0, 2048, &[], 512, true), lives()),
        act("reading at the end of numbers", request(0, u64::MAX, &[], 512, true), lives()),
        act("reading where bytes are too many to count", request(0, u64::MAX / 512, &[], 512, true), lives()),
        act("reading across the end", request(0, 2047, &[], 4096, true), lives()),
        act("writing beyond the disk", request(1, 2048, &[9; 512], 512, false), lives()),
        act("reading half a sector", request(0, 0, &[], 100, true), lives()),
        act("reading 1 GiB at once", request(0, 0, &[], 0x2000_0000, true), lives()),
        act("writing memory that the device is to write", request(1, 0, &[], 512, true), lives()),
        act("requests of no kind", request(0xdead_beef, 0, &[], 512, true), lives()),
        act("discarding beyond the disk", lie(11, &ranges(1 << 40, 8, 0, 1)), lives()),
        act("discarding all numbers", lie(11, &ranges(u64::MAX, u32::MAX, 0, 1)), lives()),
        act("discarding by flags that mean nothing", lie(11, &ranges(0, 8, !0, 1)), lives()),
        act("more ranges than were offered", lie(13, &ranges(0, 8, 0, 17)), lives()),
        act("ranges of 4 KiB and a byte", lie(13, &[7; 4097]), lives()),
        act("no ranges", lie(13, &[]), lives()),
        act("zeroes from the disk's end on", lie(13, &ranges(2048, u32::MAX, 1, 16)), lives()),
    ];
    // 254 times 16 MiB into the same memory, twice: the control socket is asked all the while.
    let at = u64::from(DATA);
    let mut much: Vec<Descriptor> = vec![(at, 16, NEXT, 1)];
    much.extend((2..18).map(|next| (at + 4096, 1 << 20, WRITE | NEXT, next)));
    much.push((at + 64, 1, WRITE, 0));
    let guest = often(ALL[0], 0, &much, 256).place(DATA, header(0, 0)).set_up(ALL[0]).kick(DISK, 0);
    acts.push(act("4 GiB of reading beyond the disk, all at once", guest.wait(DISK, 0), lives()));
    let mut whole: Vec<Descriptor> = vec![(at, 16, NEXT, 1)];
    whole.push((at + 4096, 1 << 20, WRITE | NEXT, 2));
    whole.push((at + 64, 1, WRITE, 0));
    let read = |guest: Guest| guest.place(DATA, header(0, 0)).set_up(ALL[0]).kick(DISK, 0);
    acts.push(act("the whole disk 256 times", read(often(ALL[0], 0, &whole, 256)).wait(DISK, 0), lives()));
    acts.push(act(
        "resets while it reads",
        often(ALL[0], 0, &whole, 256)
            .place(DATA, header(0, 0))
            .times(30, |guest| guest.set_up(ALL[0]).kick(DISK, 0).register(DISK, 0x70, 0)),
        lives(),
    ));
    let flush = [(at, 16, NEXT, 1), (at + 64, 1, WRITE, 0)];
    acts.push(act(
        "256 flushes at once",
        often(ALL[0], 0, &flush, 256).place(DATA, header(4, 0)).set_up(ALL[0]).kick(DISK, 0).wait(DISK, 0),
        lives(),
    ));
    acts
}

fn network() -> Vec<Act> {
    let at = u64::from(DATA);
    let send = |bytes: &[u8], length: u32| {
        let guest = often(ALL[1], 1, &[(at, length, 0, 0)], 200).place(DATA, bytes);
        guest.set_up(ALL[1]).kick(NET, 1).wait(NET, 1)
    };
    let flags = |header: [u8; 12]| [&header[..], &[7; 100]].concat();
    vec![
        act("packets of no bytes behind the header", send(&[0; 12], 12), End::Lives(&[])),
        act("packets of 1 MiB", send(&[0; 12], 1 << 20), End::Lives(&[])),
        act(
            "packets whose checksum is elsewhere",
            send(&flags([1, 0, 0, 0, 0, 0, 255, 255, 255, 255, 0, 0]), 112),
            End::Lives(&[]),
        ),
        act(
            "segments that nobody agreed on",
            send(&flags([1, 1, 255, 255, 0, 0, 34, 0, 16, 0, 0, 0]), 112),
            End::Lives(&[]),
        ),
        act("segments of every kind at once", send(&flags([255; 12]), 112), End::Lives(&[])),
        act("packets that nobody takes", send(&[0; 64], 1514), End::Lives(&[])),
        act(
            "buffers to receive that cannot be written",
            often(ALL[1], 0, &[(at, 2000, 0, 0)], 1).set_up(ALL[1]).kick(NET, 0).count(2000),
            End::Lives(&["net0"]),
        ),
    ]
}

fn packet(
    cid: (u64, u64),
    ports: (u32, u32),
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    credit: (u32, u32),
) -> Vec<u8> {
    let (source, destination) = cid;
    let mut bytes = [source.to_le_bytes(), destination.to_le_bytes()].concat();
    for word in [ports.0, ports.1, len] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend([kind.to_le_bytes(), op.to_le_bytes()].concat());
    for word in [flags, credit.0, credit.1] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

/// A program that takes connections and then does nothing with them.
fn deaf(place: &Place) -> Box<dyn Any> {
    let listener = UnixListener::bind(place.path("vsock_1024")).unwrap();
    thread::spawn(move || {
        let mut streams = Vec::new();
        while let Ok((stream, _)) = listener.accept() {
            streams.push(stream);
        }
    });
    Box::new(())
}

/// One that reads all.
fn eager(place: &Place) -> Box<dyn Any> {
    let listener = UnixListener::bind(place.path("vsock_1024")).unwrap();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut buffer = [0; 4096];
            while matches!(stream.read(&mut buffer), Ok(1..)) {}
        }
    });
    Box::new(())
}

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// The headers of packets, 256 bytes apart.
fn packets_at(packets: &[(Vec<u8>, u32)]) -> Guest {
    let mut bytes = Vec::new();
    for (header, _) in packets {
        bytes.extend(header);
        bytes.resize(bytes.len().next_multiple_of(256), 0);
    }
    Guest::new().place(DATA, bytes)
}

/// The packets' descriptors, two for each.
fn chains(packets: &[(Vec<u8>, u32)]) -> Vec<Descriptor> {
    let two = |(number, (_, payload)): (u16, &(Vec<u8>, u32))| {
        let flags = if *payload > 0 { NEXT } else { 0 };
        let header = (u64::from(DATA) + u64::from(number) * 256, 44, flags, number * 2 + 1);
        [header, (u64::from(DATA) + 0x10_0000, *payload, 0, 0)]
    };
    (0..).zip(packets).flat_map(two).collect()
}

fn sockets() -> Vec<Act> {
    let at = u64::from(DATA);
    let right = (3, 2);
    let credit = (1 << 18, 0);
    // Packets, each with its header and as much behind it; then buffers for answers.
    let say = |packets: &[(Vec<u8>, u32)]| {
        let heads: Vec<u16> = (0..packets.len() as u16).map(|number| number * 2).collect();
        packets_at(packets)
            .queue(VSOCK, 1, &chains(packets), &heads, packets.len() as u16)
            .queue(VSOCK, 0, &[(at + 0x20_0000, 4096, WRITE, 0)], &[0; 128], 128)
            .set_up(ALL[2])
            .kick(VSOCK, 0)
            .kick(VSOCK, 1)
            .wait(VSOCK, 1)
    };
    let one = |packet: Vec<u8>, payload: u32| say(&[(packet, payload)]);
    let to = |op, port: u32| packet(right, (5000, port), 0, 1, op, 0, credit);
    let lives = || End::Lives(&[]);
    let stops = || End::Lives(&["vsock"]);
    let mut acts = vec![
        act(
            "packets from somebody else",
            one(packet((9, 2), (1, 1024), 0, 1, REQUEST, 0, credit), 0),
            lives(),
        ),
        act(
            "packets to somebody else",
            one(packet((3, 77), (1, 1024), 0, 1, REQUEST, 0, credit), 0),
            lives(),
        ),
        act("packets of another type", one(packet(right, (1, 1024), 0, 2, REQUEST, 0, credit), 0), lives()),
        act(
            "an operation that does not exist",
            one(packet(right, (1, 1024), 0, 1, 0xffff, 0, credit), 0),
            lives(),
        ),
        act(
            "a header that is longer than its packet",
            one(packet(right, (1, 1024), 5000, 1, RW, 0, credit), 100),
            stops(),
        ),
        act("a payload of 4 GiB", one(packet(right, (1, 1024), u32::MAX, 1, RW, 0, credit), 100), stops()),
        act("data without a stream", one(packet(right, (1, 1024), 100, 1, RW, 0, credit), 100), lives()),
        act(
            "requests to 60 ports where nobody listens",
            say(&(0..60).map(|port| (to(REQUEST, port * 100), 0)).collect::<Vec<_>>()),
            lives(),
        ),
        act(
            "answers to what nobody asked",
            say(&[RESPONSE, RST, SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST].map(|op| (to(op, 1024), 0))),
            lives(),
        ),
        act(
            "half a header",
            {
                let guest = Guest::new().queue(VSOCK, 1, &[(at, 20, 0, 0)], &[0], 1);
                guest.set_up(ALL[2]).kick(VSOCK, 1).wait(VSOCK, 1)
            },
            stops(),
        ),
    ];
    let stream = |packets: &[(u16, u32, u32, (u32, u32))]| {
        let all = packets.iter().map(|(op, length, flags, credit)| {
            (packet(right, (5000, 1024), *length, 1, *op, *flags, *credit), *length)
        });
        say(&all.collect::<Vec<_>>())
    };
    let mut with = |name: &str, host: fn(&Place) -> Box<dyn Any>, guest: Guest| {
        acts.push(Act { host, ..act(name, guest, End::Lives(&[])) });
    };
    let open = (REQUEST, 0, 0, credit);
    with("credit that claims everything", eager, {
        stream(&[open, (CREDIT_UPDATE, 0, 0, (u32::MAX, 0)), (CREDIT_UPDATE, 0, 0, (u32::MAX, u32::MAX))])
    });
    with("credit that goes backwards", eager, {
        stream(&[open, (CREDIT_UPDATE, 0, 0, (0, 0x8000_0000)), (CREDIT_REQUEST, 0, 0, (0, 7))])
    });
    with("the same stream twice", eager, stream(&[open, open, open]));
    with("data after the end", eager, {
        stream(&[
            open,
            (SHUTDOWN, 0, 3, credit),
            (RW, 100, 0, credit),
            (RST, 0, 0, credit),
            (RW, 100, 0, credit),
        ])
    });
    with(
        "ends of ends",
        eager,
        stream(&[open, (SHUTDOWN, 0, u32::MAX, credit), (SHUTDOWN, 0, 0, credit), (RST, 0, 0, credit)]),
    );
    with("more than was credited, to who does not read", deaf, {
        let burst = [vec![open], vec![(RW, 65_536, 0, credit); 60]].concat();
        stream(&burst)
    });
    // Streams by the hundred to somebody who reads none of them, each with as much as it is given credit for: the guest changes
    // the port in the header, and the packets go out again.
    let flood = |streams: u32| {
        let bodies = 7; // of 64 KiB: what a socket takes, and the credit
        let packets: Vec<(Vec<u8>, u32)> =
            std::iter::once((packet(right, (1, 1024), 0, 1, REQUEST, 0, credit), 0))
                .chain((0..bodies).map(|_| (packet(right, (1, 1024), 65_536, 1, RW, 0, credit), 65_536)))
                .collect();
        let count = packets.len() as u32;
        let index = queue_at(VSOCK, 1) + AVAILABLE;
        // All 128 entries of the ring lead to the same packets, one after the other.
        let heads: Vec<u16> = (0..128).map(|number| number % count as u16 * 2).collect();
        let guest = packets_at(&packets).queue(VSOCK, 1, &chains(&packets), &heads, 0);
        let guest = guest.queue(VSOCK, 0, &[(at + 0x20_0000, 4096, WRITE, 0)], &[0; 128], 128).set_up(ALL[2]);
        guest.times(streams, |guest| {
            let next = |guest: Guest, number: u32| {
                // mov $header+16,%ebx; incl (%rbx): the guest's port
                guest.raw(&[0xbb]).raw(&(DATA + number * 256 + 16).to_le_bytes()).raw(&[0xff, 0x03])
            };
            let guest = (0..count).fold(guest, next);
            // The index goes on by a stream's packets, and with it where the device begins to read: mov $index,%ebx; addw $9,2(%rbx)
            guest
                .raw(&[0xbb])
                .raw(&index.to_le_bytes())
                .raw(&[0x66, 0x83, 0x43, 0x02, count as u8])
                .kick(VSOCK, 1)
                // mov $index,%ebx; mov $used,%esi; 1: mov (%rsi),%cx; cmp 2(%rbx),%cx; jne 1b
                .raw(&[0xbb])
                .raw(&index.to_le_bytes())
                .raw(&[0xbe])
                .raw(&(queue_at(VSOCK, 1) + USED + 2).to_le_bytes())
                .raw(&[0x66, 0x8b, 0x0e, 0x66, 0x3b, 0x4b, 0x02, 0x75, 0xf7])
        })
    };
    with("1,500 streams to who does not read, each full", deaf, flood(1500));
    with("400 streams to nobody", |_| Box::new(()), flood(400));
    acts
}

fn console() -> Vec<Act> {
    let at = u64::from(DATA);
    let text = b"\x1b[2J\x1b]0;owned\x07 Kernel panic - not syncing\xff\xfe\0 ".repeat(20);
    let print = |length: u32, times: u16| {
        let guest = often(ALL[4], 1, &[(at, length, 0, 0)], times).place(DATA, text.clone());
        guest.set_up(ALL[4]).kick(CONSOLE, 1).wait(CONSOLE, 1)
    };
    vec![
        act("a line of 1 MiB, 64 times", print(1 << 20, 64), End::Lives(&[])),
        act(
            "what a terminal would obey, and a panic that is none",
            print(text.len() as u32, 1),
            End::Lives(&[]),
        ),
        act(
            "32 KiB by the serial port",
            {
                // mov $DATA,%esi; mov $0x8000,%ecx; mov $0x3f8,%edx; cld; rep outsb
                Guest::new()
                    .raw(&[0xbe])
                    .raw(&DATA.to_le_bytes())
                    .raw(&[0xb9, 0, 0x80, 0, 0, 0xba, 0xf8, 3, 0, 0, 0xfc, 0xf3, 0x6e])
            },
            End::Lives(&[]),
        ),
        act(
            "randomness without end",
            {
                let guest = often(ALL[3], 0, &[(at, 0x1000_0000, WRITE, 0)], 16).set_up(ALL[3]);
                guest.times(50, |guest| guest.kick(RNG, 0))
            },
            End::Lives(&[]),
        ),
    ]
}
