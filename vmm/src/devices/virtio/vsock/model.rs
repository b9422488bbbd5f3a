//! Tests of a connection against a model of both ends: a guest that keeps the rules of credit, and a host whose socket
//! takes and gives a little at a time.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::rc::Rc;

use proptest::prelude::*;
use vm_memory::VolatileSlice;

use super::connection::{BUFFER, Connection, Credit, Fate, SHUTDOWN_SEND, op};
use super::stream::HostStream;
use crate::devices::virtio::queue;

const GUEST_BUFFER: u32 = 10_000;

/// A host program's socket: what it got, what it has to say, how much it takes and gives now.
#[derive(Default)]
struct Socket {
    got: Vec<u8>,
    ended: bool,
    to_say: VecDeque<u8>,
    done_saying: bool,
    room: usize,
}

#[derive(Clone, Default)]
struct End(Rc<RefCell<Socket>>);

impl HostStream for End {
    fn read(&mut self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let mut socket = self.0.borrow_mut();
        let length = queue::total(into).min(socket.to_say.len());
        if length == 0 {
            return if socket.done_saying { Ok(0) } else { Err(ErrorKind::WouldBlock.into()) };
        }
        let bytes: Vec<u8> = socket.to_say.drain(..length).collect();
        Ok(queue::write(into, &bytes))
    }

    fn write(&mut self, from: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let mut bytes = vec![0; queue::total(from)];
        queue::read_exact(from, &mut bytes).unwrap();
        self.write_bytes(&bytes)
    }

    fn write_bytes(&mut self, from: &[u8]) -> io::Result<usize> {
        let mut socket = self.0.borrow_mut();
        assert!(!socket.ended, "data after the end");
        let length = from.len().min(socket.room);
        if length == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        socket.room -= length;
        socket.got.extend(&from[..length]);
        Ok(length)
    }

    fn shutdown(&mut self, how: Shutdown) {
        if how != Shutdown::Read {
            self.0.borrow_mut().ended = true;
        }
    }
}

/// A guest's socket that keeps the rules.
#[derive(Default)]
struct Guest {
    sent: u32,
    host_fwd_cnt: u32,
    host_buf_alloc: u32,
    got: Vec<u8>,
    unread: u32,
    ended: bool,
    reset: bool,
}

impl Guest {
    fn credit(&self) -> Credit {
        Credit { buf_alloc: GUEST_BUFFER, fwd_cnt: self.got.len() as u32 - self.unread }
    }

    fn room(&self) -> u32 {
        self.host_buf_alloc - (self.sent - self.host_fwd_cnt)
    }

    /// Takes everything the connection has for it, as far as there are receive buffers.
    fn receive(&mut self, connection: &mut Connection<End>, buffers: usize) {
        for _ in 0..buffers {
            if !connection.wants_to_send() {
                return;
            }
            let mut memory = vec![0; 1500];
            let Some(packet) = connection.next(&[VolatileSlice::from(memory.as_mut_slice())]) else { return };
            self.host_fwd_cnt = packet.credit.fwd_cnt;
            self.host_buf_alloc = packet.credit.buf_alloc;
            assert!(!self.reset, "a packet after the end");
            match packet.op {
                op::RW => {
                    assert!(!self.ended, "data after the end");
                    self.unread += packet.length;
                    assert!(self.unread <= GUEST_BUFFER, "more data than the guest has credit for");
                    self.got.extend(&memory[..packet.length as usize]);
                }
                op::SHUTDOWN => self.ended |= packet.flags & SHUTDOWN_SEND != 0,
                op::RST => self.reset = true,
                op::CREDIT_REQUEST => connection.on_credit(self.credit()),
                _ => {}
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Move {
    GuestSends(u32),
    GuestReads(u32),
    GuestReceives(usize),
    HostTakes(usize),
    HostSays(usize),
    HostEnds,
    GuestEnds,
    GuestAsksCredit,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        6 => (1_u32..70_000).prop_map(Move::GuestSends),
        4 => (1_u32..12_000).prop_map(Move::GuestReads),
        6 => (1_usize..20).prop_map(Move::GuestReceives),
        4 => (1_usize..100_000).prop_map(Move::HostTakes),
        4 => (1_usize..30_000).prop_map(Move::HostSays),
        1 => Just(Move::HostEnds),
        1 => Just(Move::GuestEnds),
        1 => Just(Move::GuestAsksCredit),
    ];
    proptest::collection::vec(one, 1..60)
}

/// Byte `n` of every stream.
fn byte(n: usize) -> u8 {
    (n % 251) as u8
}

proptest! {
    #[test]
    fn every_byte_arrives_once_in_order_and_then_the_end(moves in moves(), window in proptest::sample::select(vec![BUFFER, BUFFER / 4, BUFFER / 16])) {
        let end = End::default();
        let mut guest = Guest { host_buf_alloc: window, ..Guest::default() };
        let mut connection = Connection::accept(end.clone(), guest.credit(), window);
        let (mut said, mut guest_ended, mut host_ended) = (0, false, false);
        for one in &moves {
            match *one {
                Move::GuestSends(wanted) if !guest_ended => {
                    let length = wanted.min(guest.room()).min(64 * 1024);
                    let mut data: Vec<u8> = (0..length as usize).map(|i| byte(guest.sent as usize + i)).collect();
                    guest.sent += length;
                    if length > 0 {
                        let (one, two) = data.split_at_mut(length as usize / 2);
                        connection.on_credit(guest.credit());
                        connection.on_data(&[VolatileSlice::from(one), VolatileSlice::from(two)]);
                    }
                }
                Move::GuestReads(wanted) => {
                    guest.unread -= wanted.min(guest.unread);
                    connection.on_credit(guest.credit());
                }
                Move::GuestReceives(buffers) => guest.receive(&mut connection, buffers),
                Move::HostTakes(room) => {
                    end.0.borrow_mut().room = room;
                    connection.on_host_writable();
                }
                Move::HostSays(length) if !host_ended => {
                    end.0.borrow_mut().to_say.extend((0..length).map(|i| byte(said + i)));
                    said += length;
                    connection.on_host_readable(false);
                }
                Move::HostEnds => {
                    host_ended = true;
                    end.0.borrow_mut().done_saying = true;
                    connection.on_host_readable(false);
                }
                Move::GuestEnds => {
                    guest_ended = true;
                    connection.on_shutdown(SHUTDOWN_SEND);
                }
                Move::GuestAsksCredit => connection.on_credit_request(),
                Move::GuestSends(_) | Move::HostSays(_) => {}
            }
            prop_assert!(connection.buffered() <= window as usize);
            prop_assert_eq!(connection.fate(), Fate::Alive);
        }
        // In the end both take everything.
        for _ in 0..100 + said / 1000 {
            end.0.borrow_mut().room = usize::MAX;
            connection.on_host_writable();
            guest.receive(&mut connection, 100);
            guest.unread = 0;
            connection.on_credit(guest.credit());
        }
        let socket = end.0.borrow();
        prop_assert_eq!(socket.got.len(), guest.sent as usize);
        prop_assert!(socket.got.iter().enumerate().all(|(n, got)| *got == byte(n)));
        prop_assert_eq!(socket.ended, guest_ended);
        prop_assert_eq!(guest.got.len(), said);
        prop_assert!(guest.got.iter().enumerate().all(|(n, got)| *got == byte(n)));
        prop_assert_eq!(guest.ended, host_ended);
        prop_assert!(guest.room() >= window / 2, "credit was lost: {}", guest.room());
    }

    #[test]
    fn a_guest_that_vanishes_loses_nothing_it_had_sent(length in 1_u32..60_000, room in 0_usize..60_000, polite: bool) {
        let end = End::default();
        let mut connection = Connection::accept(end.clone(), Credit { buf_alloc: 0, fwd_cnt: 0 }, BUFFER);
        end.0.borrow_mut().room = room;
        let mut data: Vec<u8> = (0..length as usize).map(byte).collect();
        connection.on_data(&[VolatileSlice::from(data.as_mut_slice())]);
        if polite {
            connection.on_shutdown(3);
        } else {
            connection.on_reset();
        }
        while connection.buffered() > 0 {
            prop_assert!(!end.0.borrow().ended);
            prop_assert_ne!(connection.fate(), Fate::Finished);
            end.0.borrow_mut().room = 777;
            connection.on_host_writable();
        }
        prop_assert!(end.0.borrow().ended);
        prop_assert_eq!(&end.0.borrow().got, &data);
        if polite {
            prop_assert_eq!(connection.next(&[]).map(|packet| packet.op), Some(op::RST));
        }
        prop_assert_eq!(connection.fate(), Fate::Finished);
    }

    #[test]
    fn a_guest_without_credit_is_cut_off(over in 1_u32..1000) {
        let mut connection = Connection::accept(End::default(), Credit { buf_alloc: 0, fwd_cnt: 0 }, BUFFER);
        let mut data = vec![0; 64 * 1024];
        for _ in 0..BUFFER / (64 * 1024) {
            connection.on_data(&[VolatileSlice::from(data.as_mut_slice())]);
        }
        prop_assert_eq!(connection.next(&[]).map(|packet| packet.op), Some(op::RESPONSE));
        connection.on_data(&[VolatileSlice::from(&mut data[..over as usize])]);
        prop_assert_eq!(connection.next(&[]).map(|packet| packet.op), Some(op::RST));
        prop_assert!(connection.buffered() <= BUFFER as usize);
    }
}
