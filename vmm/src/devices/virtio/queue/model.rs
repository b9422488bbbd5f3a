//! The walk over descriptors and the wish for interrupts, against the standard's own words.

use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

use super::*;

const END: u64 = 1 << 20;
const HIGH: u64 = 4 << 30;
const SIZE: u16 = 16;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Tables that an indirect descriptor can lead to.
const INDIRECT: [u64; 2] = [0x4000, 0x5000];
const INDIRECT_LENGTH: usize = 8;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

fn descriptor(entries: u16) -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![8 => 0x1_0000..0x8_0000_u64, 1 => END - 64..END + 64, 1 => HIGH - 64..HIGH + 64, 1 => any::<u64>()];
    let buffer = (address, prop_oneof![8 => 0..2000_u32, 1 => any::<u32>()], 0..4_u16);
    let table = (0..INDIRECT.len(), 0..=INDIRECT_LENGTH as u32, 0..2_u16)
        .prop_map(|(table, entries, flags)| (INDIRECT[table], entries * 16, flags | F_INDIRECT));
    let next = prop_oneof![6 => 0..entries, 1 => 0..entries + 3, 1 => any::<u16>()];
    (prop_oneof![8 => buffer.boxed(), 1 => table.boxed()], next)
        .prop_map(|((address, length, flags), next)| Descriptor { address, length, flags, next })
}

fn tables() -> impl Strategy<Value = (Vec<Descriptor>, [Vec<Descriptor>; 2])> {
    let indirect = || proptest::collection::vec(descriptor(INDIRECT_LENGTH as u16), INDIRECT_LENGTH);
    (proptest::collection::vec(descriptor(SIZE), usize::from(SIZE)), [indirect(), indirect()])
}

/// What a chain is by sections 2.7.5 and 2.7.5.3: its buffers, or none when it breaks a rule.
fn chain(main: &[Descriptor], indirect: &[Vec<Descriptor>; 2], head: u16) -> Option<Vec<Descriptor>> {
    let (mut table, mut at, mut inside) = (main.to_vec(), head, false);
    let mut buffers: Vec<Descriptor> = Vec::new();
    let mut seen = vec![false; table.len()];
    loop {
        let one = *table.get(usize::from(at))?;
        if std::mem::replace(seen.get_mut(usize::from(at))?, true) {
            return None;
        }
        if one.flags & F_INDIRECT != 0 {
            // No table in a table, none with a next, none that is empty.
            let which = INDIRECT.iter().position(|address| *address == one.address)?;
            if inside || one.flags & F_NEXT != 0 || one.length == 0 {
                return None;
            }
            table = indirect[which][..one.length as usize / 16].to_vec();
            seen = vec![false; table.len()];
            (at, inside) = (0, true);
            continue;
        }
        // What is written comes last, and all of it is memory.
        let written_before = buffers.last().is_some_and(|last| last.flags & F_WRITE != 0);
        let end = one.address.checked_add(one.length.into())?;
        let in_memory = one.length == 0 || end <= END || (one.address >= HIGH && end <= HIGH + END);
        if !in_memory || (written_before && one.flags & F_WRITE == 0) {
            return None;
        }
        buffers.push(one);
        if one.flags & F_NEXT == 0 {
            return Some(buffers);
        }
        at = one.next;
    }
}

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), END as usize), (GuestAddress(HIGH), END as usize)]).unwrap()
}

fn write_table(memory: &GuestMemory, at: u64, table: &[Descriptor]) {
    for (one, number) in table.iter().zip(0..) {
        let at = at + 16 * number;
        memory.write_obj(one.address, GuestAddress(at)).unwrap();
        memory.write_obj(one.length, GuestAddress(at + 8)).unwrap();
        memory.write_obj(one.flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(one.next, GuestAddress(at + 14)).unwrap();
    }
}

fn queue(interrupt: &Arc<Interrupt>, event_idx: bool) -> DeviceQueue {
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(TABLE as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    DeviceQueue::new(queue, 0, interrupt)
}

fn interrupt() -> (Arc<Interrupt>, EventFd) {
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    (Arc::new(Interrupt::new(line.try_clone().unwrap())), line)
}

/// Where pieces are, in the guest's addresses.
fn places(memory: &GuestMemory, slices: &[VolatileSlice<'_>]) -> Vec<(u64, usize)> {
    let host = |address| memory.get_host_address(GuestAddress(address)).unwrap() as u64;
    let (low, high) = (host(0), host(HIGH));
    let guest = |slice: &VolatileSlice<'_>| {
        let at = slice.ptr_guard().as_ptr() as u64;
        if (low..low + END).contains(&at) { at - low } else { at - high + HIGH }
    };
    slices.iter().map(|slice| (guest(slice), slice.len())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn a_chain_is_what_the_standard_says(tables in tables(), head in 0..SIZE) {
        let (main, indirect) = tables;
        let memory = memory();
        write_table(&memory, TABLE, &main);
        for (table, at) in indirect.iter().zip(INDIRECT) {
            write_table(&memory, at, table);
        }
        memory.write_obj(head, GuestAddress(AVAILABLE + 4)).unwrap();
        memory.write_obj(1_u16, GuestAddress(AVAILABLE + 2)).unwrap();
        let mut queue = queue(&interrupt().0, false);
        let taken = queue.pop(&memory).unwrap().unwrap();
        prop_assert_eq!(taken.head_index(), head);
        let buffers = Buffers::of(&memory, taken);
        match chain(&main, &indirect, head) {
            Some(wanted) => {
                let of = |write: u16| -> Vec<(u64, usize)> {
                    let these = wanted.iter().filter(|one| one.flags & F_WRITE == write && one.length > 0);
                    these.map(|one| (one.address, one.length as usize)).collect()
                };
                let buffers = buffers.unwrap();
                prop_assert_eq!(places(&memory, &buffers.readable), of(0));
                prop_assert_eq!(places(&memory, &buffers.writable), of(F_WRITE));
            }
            // One that breaks a rule may be refused, or end early: what is got of it is memory that it names.
            None => if let Ok(buffers) = buffers {
                let named: Vec<(u64, usize)> =
                    main.iter().chain(indirect.iter().flatten()).map(|one| (one.address, one.length as usize)).collect();
                let got = [places(&memory, &buffers.readable), places(&memory, &buffers.writable)].concat();
                prop_assert!(got.len() <= MAX_DESCRIPTORS);
                prop_assert!(got.iter().all(|place| named.contains(place)), "{got:?}");
            }
        }
        // And it can be given back, once.
        queue.push(&memory, head, 7).unwrap();
        prop_assert!(queue.pop(&memory).unwrap().is_none());
    }

    /// Section 2.7.7.2: an interrupt when the entry that the driver named is among those that were given back.
    #[test]
    fn the_driver_is_interrupted_when_it_wants_to_be(start in any::<u16>(), batches in proptest::collection::vec((1..20_u16, -3..25_i32), 1..20)) {
        let memory = memory();
        let (interrupt, line) = interrupt();
        let mut queue = queue(&interrupt, true);
        queue.queue.set_next_used(start);
        let mut next = start;
        for (count, ahead) in batches {
            let event = next.wrapping_add(ahead as u16);
            memory.write_obj(event, GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE))).unwrap();
            for _ in 0..count {
                queue.push(&memory, 0, 0).unwrap();
            }
            queue.notify(&memory).unwrap();
            let wanted = (0..count).any(|number| next.wrapping_add(number) == event);
            prop_assert_eq!(line.read().is_ok(), wanted, "{} after {}, event {}", count, next, event);
            next = next.wrapping_add(count);
            prop_assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), next);
        }
    }
}
