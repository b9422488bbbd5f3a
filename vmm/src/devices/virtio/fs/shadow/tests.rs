//! The queues beside a backend that answers in any order, and beside one that writes anything anywhere.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// Where the guest's answers go, each by itself.
fn request(head: u16, room: usize) -> Request {
    let answer = if room == 0 { vec![] } else { vec![Piece { address: GuestAddress(0x1000), length: room }] };
    Request { head, answer }
}

fn bytes(head: u16, length: usize) -> Vec<u8> {
    (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(head as u8)).collect()
}

fn give(shadow: &mut Shadow, head: u16, asked: usize, room: usize) -> bool {
    let mut question = bytes(head, asked);
    let slice = vm_memory::VolatileSlice::from(question.as_mut_slice());
    // In two pieces, as drivers give them.
    let (first, second) = slice.split_at(asked / 3).unwrap();
    let pieces = [first, second].into_iter().filter(|piece| !piece.is_empty()).collect();
    shadow.give(&pieces, request(head, room)).unwrap()
}

/// What an honest backend does, by the standard: looks for what is available, and answers.
#[derive(Default)]
struct Backend {
    next: u16,
    used: u16,
    has: VecDeque<u16>,
}

impl Backend {
    fn look(&mut self, shadow: &Shadow) {
        let index: u16 = shadow.memory.read_obj(GuestAddress(shadow.available() + INDEX)).unwrap();
        while self.next != index {
            let at = shadow.available() + ELEMENTS + 2 * u64::from(self.next % ENTRIES);
            self.has.push_back(shadow.memory.read_obj(GuestAddress(at)).unwrap());
            self.next = self.next.wrapping_add(1);
        }
    }

    /// The chain's question, and the pieces for the answer.
    fn read(shadow: &Shadow, head: u16) -> (Vec<u8>, Vec<(u64, u32)>) {
        let (mut question, mut room, mut at) = (Vec::new(), Vec::new(), head);
        loop {
            let table = GuestAddress(shadow.descriptors() + 16 * u64::from(at));
            let descriptor: Descriptor = shadow.memory.read_obj(table).unwrap();
            let (address, length) = (descriptor.addr(), descriptor.len());
            if u32::from(descriptor.flags()) & VRING_DESC_F_WRITE != 0 {
                room.push((address.0, length));
            } else {
                assert!(room.is_empty(), "a readable descriptor after a writable one");
                let mut part = vec![0; length as usize];
                shadow.memory.read_slice(&mut part, address).unwrap();
                question.extend(part);
            }
            if u32::from(descriptor.flags()) & VRING_DESC_F_NEXT == 0 {
                return (question, room);
            }
            at = descriptor.next();
        }
    }

    fn answer(&mut self, shadow: &Shadow, head: u16, answer: &[u8]) {
        let (_, room) = Self::read(shadow, head);
        let mut rest = answer;
        for (address, length) in room {
            let (now, later) = rest.split_at(rest.len().min(length as usize));
            shadow.memory.write_slice(now, GuestAddress(address)).unwrap();
            rest = later;
        }
        let at = shadow.used() + ELEMENTS + 8 * u64::from(self.used % ENTRIES);
        shadow.memory.write_obj([u32::from(head), answer.len() as u32], GuestAddress(at)).unwrap();
        self.used = self.used.wrapping_add(1);
        shadow.memory.write_obj(self.used, GuestAddress(shadow.used() + INDEX)).unwrap();
    }
}

fn taken(shadow: &mut Shadow) -> Result<Option<(Request, Vec<u8>)>, Lost> {
    shadow.take(|_, answer| {
        let mut bytes = vec![0; queue::total(answer)];
        queue::read_exact(answer, &mut bytes).unwrap();
        bytes
    })
}

/// Bytes of a question and of the room for its answer: mostly small, some of several chunks.
fn sizes() -> impl Strategy<Value = (usize, usize)> {
    let length = || prop_oneof![0..200_usize, Just(CHUNK as usize), 0..80_000_usize];
    (length(), length()).prop_filter("nothing", |(asked, room)| asked + room > 0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn each_answer_comes_to_its_question_in_any_order(steps in proptest::collection::vec((sizes(), any::<u8>(), any::<bool>()), 1..300)) {
        let mut shadows = create(2).unwrap();
        let shadow = &mut shadows[1];
        let mut backend = Backend::default();
        let mut rooms = std::collections::BTreeMap::new();
        for (head, ((asked, room), which, gives)) in (0_u16..).zip(steps) {
            if gives {
                let fits = chunks(asked) + chunks(room) <= shadow.free.len();
                prop_assert_eq!(give(shadow, head, asked, room), fits);
                if fits {
                    rooms.insert(head, (asked, room));
                    continue;
                }
            }
            // There was no room, or it is the backend's turn: it answers one of those it has.
            backend.look(shadow);
            prop_assert_eq!(backend.has.len(), rooms.len());
            if backend.has.is_empty() {
                prop_assert!(shadow.is_idle());
                continue;
            }
            let chain = backend.has.remove(usize::from(which) % backend.has.len()).unwrap();
            let (question, places) = Backend::read(shadow, chain);
            let (head, (asked, room)) =
                rooms.iter().map(|(head, sizes)| (*head, *sizes)).find(|(head, sizes)| question == bytes(*head, sizes.0)
                    && places.iter().map(|(_, length)| *length as usize).sum::<usize>() == sizes.1).unwrap();
            prop_assert_eq!(question.len(), asked);
            // Perhaps not all that there is room for.
            let said = bytes(head ^ 0x55, room * usize::from(which) / 255);
            backend.answer(shadow, chain, &said);
            let (request, answer) = taken(shadow).unwrap().unwrap();
            prop_assert_eq!(rooms.remove(&request.head), Some((asked, room)));
            prop_assert_eq!(answer, said);
            prop_assert!(taken(shadow).unwrap().is_none());
        }
        // What it still has is forgotten.
        shadow.reset().unwrap();
        prop_assert!(shadow.is_idle());
        prop_assert!(give(shadow, 1, 10, 10));
    }

    /// Whatever a backend writes into its memory: no answer is longer than its room, and nothing is answered twice.
    #[test]
    fn no_backend_gets_more_than_its_own_memory(
        asked in proptest::collection::vec(sizes(), 1..20),
        writes in proptest::collection::vec((0..3 * u64::from(ENTRIES) * 8, any::<u32>()), 0..40),
        lies in proptest::collection::vec((0..ENTRIES * 2, any::<u32>()), 0..20),
    ) {
        let mut shadows = create(1).unwrap();
        let shadow = &mut shadows[0];
        let mut left = std::collections::BTreeMap::new();
        for (head, (question, room)) in (0_u16..).zip(asked) {
            if give(shadow, head, question, room) {
                left.insert(head, room);
            }
        }
        for (at, value) in writes {
            shadow.memory.write_obj(value, GuestAddress(at / 4 * 4)).unwrap();
        }
        for (slot, (id, length)) in (0_u64..).zip(&lies) {
            let at = shadow.used() + ELEMENTS + 8 * slot;
            shadow.memory.write_obj([u32::from(*id), *length], GuestAddress(at)).unwrap();
        }
        shadow.memory.write_obj(lies.len() as u16, GuestAddress(shadow.used() + INDEX)).unwrap();
        // It ends: at the latest when nothing is left that could be answered.
        while let Ok(Some((request, answer))) = taken(shadow) {
            let room = left.remove(&request.head);
            prop_assert!(room.is_some_and(|room| answer.len() <= room));
        }
        prop_assert!(shadow.free.len() <= usize::from(ENTRIES));
    }
}

#[test]
fn what_can_never_be_taken_is_known() {
    let all = usize::from(ENTRIES) * CHUNK as usize;
    assert!(Shadow::could_take(all - CHUNK as usize, CHUNK as usize));
    assert!(!Shadow::could_take(all, 1));
    assert!(!Shadow::could_take(usize::MAX / 2, usize::MAX / 2));
}
