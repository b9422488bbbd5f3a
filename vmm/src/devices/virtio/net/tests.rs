//! The device with a driver in front of it and a backend that remembers behind it.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, MAX_FRAME};
use super::header::{self, HEADER_BYTES};
use super::stream::Stream;
use super::{Net, Tap};
use crate::devices::virtio::driver::{DATA, Driver, END, WRITE};

#[derive(Default)]
struct Wire {
    /// To the guest, without headers.
    incoming: VecDeque<Vec<u8>>,
    /// From the guest, with headers.
    outgoing: Vec<Vec<u8>>,
}

struct Memory {
    event: EventFd,
    wire: Arc<Mutex<Wire>>,
}

impl Backend for Memory {
    fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn offloads(&self) -> u64 {
        header::CSUM | header::GUEST_CSUM | header::TSO
    }

    fn use_offloads(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    unsafe fn receive(&mut self, to: &[libc::iovec]) -> io::Result<Option<usize>> {
        let Some(frame) = self.wire.lock().unwrap().incoming.pop_front() else { return Ok(None) };
        let mut packet = [vec![0; HEADER_BYTES], frame].concat();
        let mut done = 0;
        for piece in to {
            let here = piece.iov_len.min(packet.len() - done);
            // SAFETY: `here` bytes fit into the piece, which the device says can be written.
            unsafe { packet.as_mut_ptr().add(done).copy_to(piece.iov_base.cast(), here) };
            done += here;
        }
        Ok(Some(done))
    }

    unsafe fn send(&mut self, packet: &[libc::iovec]) -> io::Result<bool> {
        let mut bytes = Vec::new();
        for piece in packet {
            // SAFETY: the device says that the piece can be read.
            bytes.extend_from_slice(unsafe {
                std::slice::from_raw_parts(piece.iov_base.cast(), piece.iov_len)
            });
        }
        self.wire.lock().unwrap().outgoing.push(bytes);
        Ok(true)
    }
}

fn device(features: u32) -> (Driver, Arc<Mutex<Wire>>, RawFd) {
    let wire = Arc::new(Mutex::new(Wire::default()));
    let memory = Memory { event: EventFd::new(0).unwrap(), wire: Arc::clone(&wire) };
    let fd = memory.fd();
    let device = Net::new("net0", Box::new(memory), Some([2, 0, 0, 0, 0, 1]), 1500);
    (Driver::with_features(Box::new(device), features), wire, fd)
}

const MERGE: u32 = 1 << VIRTIO_NET_F_MRG_RXBUF;

fn frame(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8).collect()
}

#[test]
fn a_short_frame_takes_one_buffer_and_a_long_one_several() {
    let (mut driver, wire, fd) = device(MERGE);
    for i in 0..8 {
        driver.offer(0, i, &[(DATA + u64::from(i) * 1024, 600, WRITE)]);
    }
    driver.kick(0);
    assert_eq!(driver.used(0).0, 0);
    wire.lock().unwrap().incoming.extend([frame(60), frame(1500)]);
    let _ = driver.transport.host_event(fd);
    // 72 bytes in the first; 1512 in the next three.
    assert_eq!(driver.used(0), (4, (3, 1512 - 1200)));
    assert_eq!(driver.get(DATA, 72), [vec![0; 10], vec![1, 0], frame(60)].concat());
    let parts: Vec<u8> = (1..4).flat_map(|i| driver.get(DATA + i * 1024, 600)).collect();
    assert_eq!(parts[..1512], [vec![0; 10], vec![3, 0], frame(1500)].concat());
    assert!(!driver.needs_reset());
}

#[test]
fn frames_wait_until_there_are_buffers() {
    let (mut driver, wire, fd) = device(0);
    wire.lock().unwrap().incoming.extend([frame(60), frame(61)]);
    let _ = driver.transport.host_event(fd);
    assert_eq!(driver.used(0).0, 0);
    driver.offer(0, 0, &[(DATA, 12, WRITE), (DATA + 100, 1600, WRITE)]);
    driver.kick(0);
    assert_eq!(driver.used(0), (1, (0, 72)));
    assert_eq!(driver.get(DATA + 100, 60), frame(60));
    driver.offer(0, 2, &[(DATA, 1600, WRITE)]);
    driver.kick(0);
    assert_eq!(driver.used(0), (2, (2, 73)));
}

#[test]
fn frames_to_send_arrive_with_a_checked_header() {
    let (mut driver, wire, _) = device(1 << VIRTIO_NET_F_CSUM);
    driver.put(DATA, &[1, 0, 9, 9, 9, 9, 34, 0, 16, 0, 7, 7]);
    driver.put(DATA + 4096, &frame(1000));
    driver.offer(1, 0, &[(DATA, 5, 0), (DATA + 5, 7, 0), (DATA + 4096, 400, 0), (DATA + 4496, 600, 0)]);
    driver.kick(1);
    assert_eq!(driver.used(1), (1, (0, 0)));
    let expected = [vec![1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], frame(1000)].concat();
    assert_eq!(wire.lock().unwrap().outgoing, [expected]);
    // Too long, or with a header that lies: dropped, and given back.
    driver.offer(1, 4, &[(DATA, 12, 0), (DATA + 4096, MAX_FRAME as u32 + 1, 0)]);
    driver.put(DATA + 200, &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 16, 0, 0, 0]);
    driver.offer(1, 8, &[(DATA + 200, 12, 0), (DATA + 4096, 60, 0)]);
    driver.kick(1);
    assert_eq!(driver.used(1).0, 3);
    assert_eq!(wire.lock().unwrap().outgoing.len(), 1);
    assert_eq!(driver.transport.metrics().1["tx_invalid"], 2);
    assert!(!driver.needs_reset());
}

/// A queue and a chain for it: address, length and flags of each descriptor.
type Wrong = (u32, &'static [(u64, u32, u16)]);

#[test]
fn what_no_driver_does_stops_the_device() {
    let chains: [Wrong; 5] = [
        (1, &[(DATA, 11, 0)]),
        (1, &[(DATA, 100, 0), (DATA + 100, 100, WRITE)]),
        (1, &[(END, 100, 0)]),
        (0, &[(DATA, 11, WRITE)]),
        (0, &[(DATA, 100, 0), (DATA + 100, 100, WRITE)]),
    ];
    for (queue, chain) in chains {
        let (mut driver, _, _) = device(MERGE);
        driver.offer(queue, 0, chain);
        driver.kick(queue);
        assert!(driver.needs_reset(), "queue {queue}: {chain:?}");
        driver.start();
        driver.offer(1, 0, &[(DATA, 72, 0)]);
        driver.kick(1);
        assert_eq!(driver.used(1).0, 1);
    }
}

#[test]
fn only_taps_are_taps() {
    let file = std::fs::File::open("/dev/null").unwrap();
    let error = Tap::from_fd(file.into()).unwrap_err();
    assert!(error.to_string().contains("not one of a tap"), "{error}");
    assert!(Tap::open("lo").is_err());
}

/// One packet as the device would hand it over.
fn send(stream: &mut Stream, frame: &mut [u8]) -> bool {
    let mut header = [0_u8; HEADER_BYTES];
    let (first, second) = frame.split_at_mut(frame.len() / 2);
    let piece = |bytes: &mut [u8]| libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let pieces = [piece(&mut header), piece(first), piece(second)];
    // SAFETY: three slices that outlive the call.
    unsafe { stream.send(&pieces) }.unwrap()
}

fn receive(stream: &mut Stream) -> io::Result<Option<Vec<u8>>> {
    let (mut start, mut rest) = (vec![1; 100], vec![1; MAX_FRAME]);
    let piece =
        |bytes: &mut Vec<u8>| libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let pieces = [piece(&mut start), piece(&mut rest)];
    // SAFETY: two vectors that outlive the call.
    let received = unsafe { stream.receive(&pieces) }?;
    Ok(received.map(|length| [start, rest].concat()[..length].to_vec()))
}

#[test]
fn a_stream_out_of_step_is_given_up() {
    let (near, mut far) = UnixStream::pair().unwrap();
    let mut stream = Stream::new(near).unwrap();
    far.write_all(&[0, 0, 0, 14]).unwrap();
    assert!(receive(&mut stream).unwrap().is_none());
    far.write_all(&[5; 14]).unwrap();
    assert_eq!(receive(&mut stream).unwrap().unwrap()[HEADER_BYTES..], [5; 14]);
    far.write_all(&[0xff; 4]).unwrap();
    assert!(receive(&mut stream).is_err());
    assert!(receive(&mut stream).unwrap().is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn streams_carry_frames_whole_and_in_order(lengths in proptest::collection::vec(14_usize..70000, 1..30), bite in 1_usize..9000) {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        let mut stream = Stream::new(near).unwrap();
        let lengths: Vec<usize> = lengths.into_iter().map(|length| length.min(MAX_FRAME)).collect();
        let expected: Vec<u8> = lengths
            .iter()
            .flat_map(|length| [(*length as u32).to_be_bytes().to_vec(), frame(*length)].concat())
            .collect();
        let mut arrived = Vec::new();
        let mut buffer = vec![0; bite];
        for length in &lengths {
            while !send(&mut stream, &mut frame(*length)) {
                let count = far.read(&mut buffer).unwrap();
                arrived.extend_from_slice(&buffer[..count]);
            }
        }
        loop {
            stream.ready();
            match far.read(&mut buffer) {
                Ok(count) => arrived.extend_from_slice(&buffer[..count]),
                Err(error) => {
                    prop_assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        prop_assert!(arrived == expected);
        // The other way, in bites.
        let mut received = Vec::new();
        for part in expected.chunks(bite) {
            far.write_all(part).unwrap();
            while let Some(packet) = receive(&mut stream).unwrap() {
                received.push(packet[HEADER_BYTES..].to_vec());
            }
        }
        prop_assert_eq!(received.iter().map(Vec::len).collect::<Vec<_>>(), lengths);
        prop_assert!(received.iter().all(|one| *one == frame(one.len())));
    }
}

#[test]
fn features_that_do_not_go_together_are_refused() {
    let status = |features: u64| {
        let backend = Memory { event: EventFd::new(libc::EFD_NONBLOCK).unwrap(), wire: Arc::default() };
        let driver = Driver::new(Box::new(Net::new("net0", Box::new(backend), None, 1500)));
        driver.write(0x70, 0);
        driver.write(0x70, 3);
        driver.write(0x24, 1);
        driver.write(0x20, 1);
        driver.write(0x24, 0);
        driver.write(0x20, features as u32);
        driver.write(0x70, 11);
        driver.read(0x70)
    };
    for good in [0, header::CSUM, header::GUEST_CSUM, header::CSUM | header::GUEST_CSUM | header::TSO] {
        assert_eq!(status(good), 11, "{good:#x}");
    }
    for bad in [header::TSO, header::TSO | header::CSUM, header::TSO | header::GUEST_CSUM] {
        assert_eq!(status(bad), 3, "{bad:#x}");
    }
    assert!(!header::go_together(header::ECN) && !header::go_together(header::UFO | header::GUEST_CSUM));
}
