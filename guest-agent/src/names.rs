//! A name server on this guest's loopback that stands for one on the loopback of the container's network namespace on the
//! host (dockerd's, 127.0.0.11).
//!
//! It is a process of its own ([`serve`]), because the agent has one thread and nothing in it may wait. As dockerd's it
//! listens on some high port, and who asks port 53 of its address is sent there: a container may well be a name server
//! itself, on port 53 of every address. dockerd has that done by the namespace's iptables; here three small BPF programs
//! change the port, and the container finds no rules that it did not make.

use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bulkhead_bpf::{self as bpf, CONNECT4, Hook, Instruction, RECVMSG4, SENDMSG4, op};
use bulkhead_protocol::NAMES_PORT;
use bulkhead_protocol::names::{Transport, read_message, write_message};

use crate::boot;
use crate::error::{Context, Error, Result};

/// The agent's first argument when it is to be the name server.
pub const WORD: &str = "name-server";
/// Where everybody asks.
const PORT: u16 = 53;
/// So many are answered at once, what more there is has to be asked again.
const AT_ONCE: usize = 32;
/// How long a connection may say nothing.
const PATIENCE: Duration = Duration::from_secs(10);
/// Threads of shallow calls.
const STACK: usize = 64 << 10;

/// Starts the name server.
///
/// # Errors
/// `INVALID_ARGUMENT` for what is no address of the loopback, or what the kernel says.
pub fn start(address: &[u8]) -> Result<()> {
    let octets = <[u8; 4]>::try_from(address).ok().filter(|octets| octets.starts_with(&[127]));
    let address = octets.map(Ipv4Addr::from);
    let address =
        address.ok_or_else(|| Error::invalid("the name server's address is not on the loopback"))?;
    let what = || format!("stand for the name server {address}");
    let udp = UdpSocket::bind((address, 0)).context(what)?;
    let port = udp.local_addr().context(what)?.port();
    let tcp = TcpListener::bind((address, port)).context(what)?;
    let root = File::open("/sys/fs/cgroup").context(what)?;
    for (hook, from, to) in [(CONNECT4, PORT, port), (SENDMSG4, PORT, port), (RECVMSG4, port, PORT)] {
        redirect(&root, hook, address, from, to).context(what)?;
    }
    let mut server = Command::new("/proc/self/exe");
    server.arg(WORD).stdin(OwnedFd::from(udp)).stdout(OwnedFd::from(tcp)).stderr(Stdio::null());
    // It ends with the machine; as PID 1, the agent waits for whatever ends.
    server.spawn().context(what)?;
    Ok(())
}

fn redirect(cgroup: impl AsFd, hook: Hook, address: Ipv4Addr, from: u16, to: u16) -> std::io::Result<()> {
    let program = bpf::load(hook, &program(address, from, to))?;
    bpf::attach_to_cgroup(cgroup.as_fd(), &program, hook)
}

/// Changes the port `from` of `address` to `to`, in the guest's own network alone: a container's own namespaces have
/// loopbacks of their own, and perhaps a dockerd.
fn program(address: Ipv4Addr, from: u16, to: u16) -> [Instruction; 14] {
    const LOAD_WORD: u8 = 0x61;
    const STORE_WORD: u8 = 0x63;
    const MOVE_64: u8 = 0xbf;
    const MOVE_IMMEDIATE_64: u8 = 0xb7;
    const CALL: u8 = 0x85;
    const JUMP_NE: u8 = 0x5d;
    const JUMP_NE_IMMEDIATE: u8 = 0x55;
    const EXIT: u8 = 0x95;
    const GET_NETNS_COOKIE: i32 = 122;
    // Of `struct bpf_sock_addr`; both are in network order.
    const ADDRESS: i16 = 4;
    const PORT: i16 = 24;
    let network = |port: u16| i32::from(port.to_be());
    [
        op(MOVE_64, 6, 1, 0, 0),
        op(CALL, 0, 0, 0, GET_NETNS_COOKIE),
        op(MOVE_64, 7, 0, 0, 0),
        // Without a context it answers for the first namespace.
        op(MOVE_IMMEDIATE_64, 1, 0, 0, 0),
        op(CALL, 0, 0, 0, GET_NETNS_COOKIE),
        op(JUMP_NE, 0, 7, 6, 0),
        op(LOAD_WORD, 2, 6, ADDRESS, 0),
        op(JUMP_NE_IMMEDIATE, 2, 0, 4, i32::from_ne_bytes(address.octets())),
        op(LOAD_WORD, 2, 6, PORT, 0),
        op(JUMP_NE_IMMEDIATE, 2, 0, 2, network(from)),
        op(MOVE_IMMEDIATE_64, 2, 0, 0, network(to)),
        op(STORE_WORD, 6, 2, PORT, 0),
        op(MOVE_IMMEDIATE_64, 0, 0, 0, 1),
        op(EXIT, 0, 0, 0, 0),
    ]
}

/// The name server's process: its sockets are its standard input and output.
pub fn serve() {
    // SAFETY: `start` has put these two there, and nothing else here uses standard input or output.
    let (udp, tcp) = unsafe { (UdpSocket::from_raw_fd(0), TcpListener::from_raw_fd(1)) };
    let udp = Arc::new(udp);
    let busy = Arc::new(());
    let for_streams = Arc::clone(&busy);
    let streams = move || {
        for stream in tcp.incoming().flatten() {
            answer(&for_streams, move || answer_stream(stream));
        }
    };
    let _ = thread::Builder::new().stack_size(STACK).spawn(streams);
    let mut question = vec![0; 65535];
    while let Ok((length, from)) = udp.recv_from(&mut question) {
        let (udp, question) = (Arc::clone(&udp), question.get(..length).unwrap_or_default().to_vec());
        answer(&busy, move || {
            let answer = ask(Transport::Udp, &question)?;
            udp.send_to(&answer, from).map(drop).context(|| "answer")
        });
    }
}

/// In a thread. There is nobody to tell of a failure: who asked asks again.
fn answer(busy: &Arc<()>, body: impl FnOnce() -> Result<()> + Send + 'static) {
    // The sockets' own two count too.
    if Arc::strong_count(busy) > AT_ONCE + 2 {
        return;
    }
    let busy = Arc::clone(busy);
    let _ = thread::Builder::new().stack_size(STACK).spawn(move || {
        let _ = body();
        drop(busy);
    });
}

fn answer_stream(mut stream: TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    loop {
        let question = read_message(&mut stream)?;
        write_message(&mut stream, &ask(Transport::Tcp, &question)?)?;
    }
}

/// Has the host ask; it closes the connection when it gets no answer.
fn ask(transport: Transport, question: &[u8]) -> Result<Vec<u8>> {
    let mut host = File::from(boot::connect_to_host(NAMES_PORT)?);
    host.write_all(&[transport.byte()])?;
    write_message(&mut host, question)?;
    Ok(read_message(&mut host)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_address_of_the_loopback_is_one() {
        for bad in [&[][..], &[10, 0, 0, 1], &[127], &[0; 16]] {
            assert!(start(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn every_jump_of_the_program_ends_at_the_answer() {
        let program = program(Ipv4Addr::new(127, 0, 0, 11), 53, 40000);
        for (at, instruction) in program.iter().enumerate().filter(|(_, one)| one.offset > 0) {
            if instruction.code & 7 == 5 {
                assert_eq!(at + 1 + instruction.offset as usize, program.len() - 2);
            }
        }
    }
}
