//! Descriptors and rings: the same for every device, so each act is done to all of them.

use super::common::Guest;
use super::kit::*;

/// All devices.
const EACH: &[&str] = &["disk", "net0", "vsock", "rng", "console"];
/// Those whose requests have a header.
const WITH_HEADERS: &[&str] = &["disk", "net0", "vsock"];
/// The one that must have something to write into: for the others a chain that ends early, or late, is a chain.
const WITH_STATUS: &[&str] = &["disk"];

/// A chain, as far as it matters here.
struct Ring {
    name: &'static str,
    descriptors: Vec<Descriptor>,
    heads: Vec<u16>,
    index: u16,
    stopped: &'static [&'static str],
}

fn ring(name: &'static str, descriptors: &[Descriptor], stopped: &'static [&'static str]) -> Ring {
    Ring { name, descriptors: descriptors.to_vec(), heads: vec![0], index: 1, stopped }
}

pub fn acts() -> Vec<Act> {
    let data = u64::from(DATA);
    // A table of 64 Ki descriptors and others, each of which an indirect descriptor leads to.
    let tables = 0x90_0000_u64;
    let nested = 0xa8_0000_u64;
    let mut rings = vec![
        ring("a chain that is its own next", &[(data, 64, NEXT, 0)], WITH_STATUS),
        ring("a chain of two that goes round", &[(data, 64, NEXT, 1), (data, 64, NEXT, 0)], WITH_STATUS),
        ring("a next beyond the table", &[(data, 64, NEXT, 9999)], WITH_STATUS),
        ring("a buffer where no memory is", &[(0xd000_0000, 64, 0, 0)], EACH),
        ring("a buffer into the hole", &[(HOLE - 16, 64, 0, 0)], EACH),
        ring("a buffer across the hole", &[(HOLE - 16, 0x4000_0100, 0, 0)], EACH),
        ring("a buffer out of the hole", &[(AFTER_HOLE - 16, 64, 0, 0)], EACH),
        ring("a buffer beyond all memory", &[(1 << 40, 64, 0, 0)], EACH),
        ring("a buffer around the end of the address space", &[(u64::MAX - 8, 64, 0, 0)], EACH),
        ring("a buffer of 4 GiB", &[(data, u32::MAX, 0, 0)], EACH),
        ring("buffers of no bytes", &[(data, 0, NEXT, 1), (data, 0, WRITE, 0)], WITH_HEADERS),
        ring("memory to write before memory to read", &[(data, 64, WRITE | NEXT, 1), (data, 64, 0, 0)], EACH),
        ring("memory to write only", &[(data, 64, WRITE, 0)], WITH_HEADERS),
        ring("memory to read only", &[(data, 4, 0, 0)], WITH_HEADERS),
        ring("an indirect table of an odd length", &[(tables, 17, INDIRECT, 0)], WITH_HEADERS),
        ring("an indirect table of no bytes", &[(tables, 0, INDIRECT, 0)], WITH_HEADERS),
        ring("an indirect table where no memory is", &[(0xd000_0000, 160, INDIRECT, 0)], WITH_HEADERS),
        ring("an indirect table in an indirect table", &[(nested, 32, INDIRECT, 0)], WITH_HEADERS),
        ring("an indirect table of 65,535 descriptors", &[(tables, 65_535 * 16, INDIRECT, 0)], EACH),
        ring("an indirect table of 256 MiB", &[(tables, 1 << 28, INDIRECT, 0)], WITH_HEADERS),
        ring("flags that mean nothing", &[(data, 64, 0xfff8, 0)], WITH_STATUS),
    ];
    rings.push(Ring { index: 1000, ..ring("an index far ahead", &[(data, 64, 0, 0)], EACH) });
    rings.push(Ring { heads: vec![60_000], ..ring("a head beyond the table", &[(data, 64, 0, 0)], EACH) });
    let mut acts: Vec<Act> = rings.iter().map(|ring| on_all(ring, tables as u32, nested as u32)).collect();
    acts.extend(places());
    acts
}

fn on_all(ring: &Ring, tables: u32, nested: u32) -> Act {
    let chain: Vec<Descriptor> =
        (1..=1200).map(|next: u16| (u64::from(DATA), 64, if next < 1200 { NEXT } else { 0 }, next)).collect();
    let inner = [(u64::from(nested), 32, INDIRECT | NEXT, 1), (u64::from(DATA), 64, 0, 0)];
    let guest = ALL.iter().fold(Guest::new(), |guest, device| {
        guest
            .queue(device.window, device.queue, &ring.descriptors, &ring.heads, ring.index)
            .set_up(*device)
            .kick(device.window, device.queue)
            .wait(device.window, device.queue)
    });
    let guest = guest.place(tables, table(&chain)).place(nested, table(&inner));
    act(ring.name, guest, End::Lives(ring.stopped))
}

/// Queues where they cannot be, of sizes that they cannot have, over themselves.
fn places() -> Vec<Act> {
    let own = |device: Device, offset: u32| u64::from(queue_at(device.window, device.queue) + offset);
    // Addresses of descriptors, available and used ring by those of a right one; none: its own.
    type Places = fn(u64, u64, u64) -> (u64, u64, u64);
    let somewhere: [(&str, Places, &'static [&'static str]); 9] = [
        ("a used ring where no memory is", |d, a, _| (d, a, 0xd000_0000), EACH),
        ("a used ring across the hole", |d, a, _| (d, a, HOLE - 64), EACH),
        ("descriptors beyond all memory", |_, a, u| (1 << 50, a, u), EACH),
        ("an available ring at the end of memory", |d, _, u| (d, HOLE - 2, u), EACH),
        ("rings around the end of the address space", |d, _, _| (d, u64::MAX - 1, u64::MAX - 3), EACH),
        // Misaligned addresses are not taken: the ring stays at 0, where there are zeros: nothing is available.
        ("rings of odd addresses", |d, a, u| (d + 1, a + 1, u + 1), &[]),
        ("all at one place", |d, _, _| (d, d, d), &[]),
        ("a used ring over the descriptors", |d, a, _| (d, a, d), &[]),
        ("a used ring over the device's own windows", |d, a, _| (d, a, 0xd000_3000), EACH),
    ];
    let right = [(u64::from(DATA), 64, 0, 0)];
    let mut acts = Vec::new();
    for (name, places, stopped) in somewhere {
        let guest = ALL.iter().fold(Guest::new(), |guest, device| {
            let (d, a, u) = places(own(*device, 0), own(*device, AVAILABLE), own(*device, USED));
            guest
                .queue(device.window, device.queue, &right, &[0], 1)
                .negotiate(device.window)
                .set_queue(device.window, device.queue, 16, d, a, u)
                .register(device.window, 0x70, 15)
                .kick(device.window, device.queue)
                .count(2000)
        });
        // Of what a ring over others says by chance nothing is known but that the machine lives.
        acts.push(Act { unknown: stopped.is_empty(), ..act(name, guest, End::Lives(stopped)) });
    }
    for size in [0, 3, 17, 4096, 65_535, 65_536, u32::MAX] {
        let guest = ALL.iter().fold(Guest::new(), |guest, device| {
            let (d, a, u) = (own(*device, 0), own(*device, AVAILABLE), own(*device, USED));
            guest
                .negotiate(device.window)
                .set_queue(device.window, device.queue, size, d, a, u)
                .register(device.window, 0x70, 15)
                .kick(device.window, device.queue)
                .count(2000)
        });
        acts.push(Act { unknown: true, ..act(format!("queues of {size} entries"), guest, End::Lives(&[])) });
    }
    // The device writes into its own rings: entropy over the queue's page, a disk's content over it.
    let over = |device: Device, descriptors: &[Descriptor]| {
        let guest = Guest::new().queue(device.window, device.queue, descriptors, &[0, 0, 0, 0], 4);
        let header = [0; 16];
        guest
            .place(DATA, header)
            .set_up(device)
            .kick(device.window, device.queue)
            .wait(device.window, device.queue)
    };
    let at = |window: u32| u64::from(queue_at(window, 0));
    let random: Vec<Descriptor> = vec![(at(RNG), 0x9000, WRITE, 0)];
    let read: Vec<Descriptor> = vec![
        (u64::from(DATA), 16, NEXT, 1),
        (at(DISK), 0x9000, WRITE | NEXT, 2),
        (u64::from(DATA) + 64, 1, WRITE, 0),
    ];
    for (name, device, descriptors) in [
        ("entropy over its own queue", ALL[3], random),
        ("a disk's content over its own queue", ALL[0], read),
    ] {
        acts.push(Act { unknown: true, ..act(name, over(device, &descriptors), End::Lives(&[])) });
    }
    acts
}
