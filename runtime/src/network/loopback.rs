//! The loopback of a container's network namespace on the host. The guest has a loopback of its own, and those who enter the
//! namespace to reach a port of 127.0.0.1 or ::1 (`kubectl port-forward`, an engine's hook) mean the container's.
//!
//! A BPF program of the namespace's hands every TCP connection to these two addresses to a socket of ours, whatever its
//! port; each is relayed over vsock to the same port of the loopback in the guest. Program and sockets end with this
//! process. The guest cannot have anything connected: it is only ever asked to accept.

mod pass;
mod relay;

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use super::{NamespaceRef, namespace};
use crate::guest::Guest;
use crate::{Context, Result};

/// So many connections at once; those above are reset.
const AT_ONCE: usize = 128;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// Threads of shallow calls; the buffers are on the heap.
const STACK: usize = 128 << 10;

/// Relays what connects to the loopback of the namespace to the guest, for as long as this process lives.
///
/// # Errors
/// The namespace cannot be entered, or the kernel or the caller's rights do not allow such a program.
pub fn serve(namespace: &NamespaceRef, guest: &Guest) -> Result<()> {
    let what = || format!("cannot take connections to the loopback of the {namespace}");
    let guest = guest.clone();
    namespace::within(namespace, || {
        let (listeners, program) = open().context(what)?;
        spawn(move || {
            accept(&listeners, &guest);
            drop(program);
        })
        .context(what)
    })
}

fn spawn(body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name("loopback".into()).stack_size(STACK).spawn(body).map(drop)
}

/// Sockets that listen, and what leads connections to them, in the namespace of this thread.
fn open() -> io::Result<(Vec<TcpListener>, OwnedFd)> {
    let mut listeners = vec![listener(Ipv4Addr::LOCALHOST.into())?];
    // A host can be without IPv6.
    listeners.extend(listener(Ipv6Addr::LOCALHOST.into()));
    let sockets: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
    let namespace = File::open("/proc/thread-self/ns/net")?;
    let program = pass::install(namespace.as_fd(), &sockets)?;
    Ok((listeners, program))
}

/// It listens on some port. The address is bound whether the loopback is up yet or not.
fn listener(address: IpAddr) -> io::Result<TcpListener> {
    let (family, flags) = match address {
        IpAddr::V4(_) => (AddressFamily::INET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK),
        IpAddr::V6(_) => (AddressFamily::INET6, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK),
    };
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match address {
        IpAddr::V4(_) => sockopt::set_ip_freebind(&socket, true)?,
        IpAddr::V6(_) => sockopt::set_ipv6_freebind(&socket, true)?,
    }
    bind(&socket, &SocketAddr::new(address, 0))?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn accept(listeners: &[TcpListener], guest: &Guest) {
    let busy = Arc::new(());
    loop {
        let mut fds: Vec<_> = listeners.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        if poll(&mut fds, None).is_err_and(|errno| errno != rustix::io::Errno::INTR) {
            return;
        }
        for listener in listeners {
            let client = match listener.accept() {
                Ok((client, _)) => client,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => {
                    // It has gone already, or there are no descriptors left: not to be asked without a rest.
                    thread::sleep(Duration::from_millis(10));
                    continue;
                }
            };
            if Arc::strong_count(&busy) > AT_ONCE {
                reset(client);
                continue;
            }
            let (busy, guest) = (Arc::clone(&busy), guest.clone());
            // Without a thread it is dropped, and so closed.
            let _ = spawn(move || {
                connect(client, &guest);
                drop(busy);
            });
        }
    }
}

/// Relays one connection to its end.
fn connect(client: TcpStream, guest: &Guest) {
    // The address that was connected to, not the one that the listening socket has.
    let port = client.local_addr().map_err(drop).and_then(|address| guest.port(address).map_err(drop));
    let Ok(port) = port else { return reset(client) };
    let _ = client.set_nodelay(true);
    if relay::run(&client, &port).is_err() {
        reset(client);
    }
}

/// Ends a connection so that its client learns that it was not served.
fn reset(client: TcpStream) {
    let _ = sockopt::set_socket_linger(&client, Some(Duration::ZERO));
    drop(client);
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use bulkhead_protocol::agent::{StreamHello, StreamReply};
    use bulkhead_protocol::stream::{read_message, write_message};

    use super::*;

    /// In a namespace of its own; not where the machine does not allow that.
    #[test]
    fn connections_to_the_loopback_alone_are_taken_whatever_their_port() {
        use bulkhead_netlink::link::Change;
        // SAFETY: the thread is the test's own and shares nothing that depends on its network namespace.
        if unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.is_err() {
            return;
        }
        let (listeners, program) = match open() {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return,
            opened => opened.unwrap(),
        };
        let up = Change { set_flags: libc::IFF_UP.cast_unsigned(), ..Change::default() };
        bulkhead_netlink::Socket::open().unwrap().change_link(1, &up).unwrap();
        for (listener, address) in listeners.iter().zip(["127.0.0.1:80", "[::1]:65535"]) {
            let _client = TcpStream::connect(address).unwrap();
            let served = listener.accept().unwrap().0;
            assert_eq!(served.local_addr().unwrap(), address.parse().unwrap());
        }
        let refused = TcpStream::connect("127.0.0.2:80").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        drop(program);
        let refused = TcpStream::connect("127.0.0.1:80").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    /// Stands for monitor and agent: takes one connection, and answers its port.
    fn answer(listener: &UnixListener, error: &str) -> (std::os::unix::net::UnixStream, StreamHello) {
        let mut host = listener.accept().unwrap().0;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            host.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        assert_eq!(line, b"CONNECT 1025\n");
        host.write_all(b"OK 1\n").unwrap();
        let hello = read_message(&mut host).unwrap();
        write_message(&mut host, &StreamReply { error: error.into() }).unwrap();
        (host, hello)
    }

    #[test]
    fn a_connection_goes_to_the_port_that_was_meant_or_is_reset() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let vsock = UnixListener::bind(&path).unwrap();
        let guest = Guest::new(&path);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        for error in ["", "nobody listens"] {
            let mut client = TcpStream::connect(address).unwrap();
            let (served, guest) = (listener.accept().unwrap().0, guest.clone());
            let serving = thread::spawn(move || connect(served, &guest));
            let (mut agent, hello) = answer(&vsock, error);
            assert_eq!((hello.port, hello.ipv6), (address.port().into(), false));
            if error.is_empty() {
                client.write_all(b"ask").unwrap();
                client.shutdown(std::net::Shutdown::Write).unwrap();
                let mut asked = String::new();
                agent.read_to_string(&mut asked).unwrap();
                agent.write_all(b"answer").unwrap();
                drop(agent);
                let mut said = String::new();
                client.read_to_string(&mut said).unwrap();
                assert_eq!((asked.as_str(), said.as_str()), ("ask", "answer"));
            } else {
                let end = client.read(&mut [0]).unwrap_err();
                assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
            }
            serving.join().unwrap();
        }
    }

    #[test]
    fn connections_above_the_most_are_reset_until_one_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let vsock = UnixListener::bind(&path).unwrap();
        let guest = Guest::new(&path);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        thread::spawn(move || accept(&[listener], &guest));
        let mut held = Vec::new();
        for _ in 0..AT_ONCE {
            held.push((TcpStream::connect(address).unwrap(), answer(&vsock, "")));
        }
        let mut above = TcpStream::connect(address).unwrap();
        assert_eq!(above.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        held.pop();
        // Its place is free when its thread has noticed.
        vsock.set_nonblocking(true).unwrap();
        let mut more = Vec::new();
        while vsock.accept().is_err() {
            more.push(TcpStream::connect(address).unwrap());
            thread::sleep(Duration::from_millis(10));
        }
    }
}
