//! The name server of dockerd, which listens on the loopback of each container's network namespace and knows the names of
//! the containers of its networks. A guest has a loopback of its own, so its agent listens there in the server's place and
//! has each question asked here, in the namespace.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bulkhead_protocol::names::{Transport, read_message, write_message};

use super::{NamespaceRef, namespace};
use crate::{Context, Result};

/// Where dockerd's server is, in every namespace of a network that somebody has made.
const SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
const PORT: u16 = 53;
/// How long a server may take; those who ask give up and ask again sooner.
const PATIENCE: Duration = Duration::from_secs(20);
/// So many questions at once; a guest that asks more has to wait.
const AT_ONCE: usize = 32;
/// Threads of shallow calls.
const STACK: usize = 128 << 10;

/// The server that `resolv_conf` names and that has to be asked in the namespace.
#[must_use]
pub fn server_in(resolv_conf: &str) -> Option<Ipv4Addr> {
    let servers = resolv_conf.lines().filter_map(|line| line.strip_prefix("nameserver"));
    servers.filter_map(|server| server.trim().parse().ok()).find(|server| *server == SERVER)
}

/// Passes the questions that come to `socket` on to `server` in the namespace, for as long as this process lives.
///
/// # Errors
/// The namespace cannot be entered, or `socket` not be made.
pub fn serve(namespace: &NamespaceRef, server: Ipv4Addr, socket: &Path) -> Result<()> {
    let listener = UnixListener::bind(socket).context(|| format!("cannot listen on {}", socket.display()))?;
    // A thread is where the thread was that started it.
    namespace::within(namespace, || {
        let started = spawn(move || accept(&listener, (server, PORT).into()));
        started.context(|| "cannot start passing questions to a name server on".into())
    })
}

fn spawn(body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name("names".into()).stack_size(STACK).spawn(body).map(drop)
}

fn accept(listener: &UnixListener, server: SocketAddr) {
    let asked = Arc::new(());
    loop {
        while Arc::strong_count(&asked) > AT_ONCE {
            thread::sleep(Duration::from_millis(10));
        }
        let Ok((guest, _)) = listener.accept() else { return };
        let asking = Arc::clone(&asked);
        // Without an answer the connection is closed, and who asked asks again.
        let _ = spawn(move || {
            let _ = pass_on(guest, server);
            drop(asking);
        });
    }
}

fn pass_on(mut guest: UnixStream, server: SocketAddr) -> io::Result<()> {
    guest.set_read_timeout(Some(PATIENCE))?;
    let mut transport = [0];
    guest.read_exact(&mut transport)?;
    let question = read_message(&mut guest)?;
    let answer = match Transport::from_byte(transport[0]).ok_or(io::ErrorKind::InvalidData)? {
        Transport::Udp => {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect(server)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send(&question)?;
            let mut answer = vec![0; 65535];
            let length = socket.recv(&mut answer)?;
            answer.truncate(length);
            answer
        }
        Transport::Tcp => {
            let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            write_message(&mut stream, &question)?;
            read_message(&mut stream)?
        }
    };
    write_message(&mut guest, &answer)?;
    guest.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dockers_server_is_one() {
        assert_eq!(server_in("search a\nnameserver 127.0.0.11\noptions ndots:0\n"), Some(SERVER));
        assert_eq!(server_in("nameserver 127.0.0.1\nnameserver 192.0.2.1\n#nameserver 127.0.0.11\n"), None);
    }

    #[test]
    fn a_question_is_passed_on_by_either_transport() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let listener = std::net::TcpListener::bind(address).unwrap();
        thread::spawn(move || {
            let mut question = [0; 100];
            let (length, from) = server.recv_from(&mut question).unwrap();
            server.send_to(&[&question[..length], b"!"].concat(), from).unwrap();
            let mut stream = listener.accept().unwrap().0;
            let question = read_message(&mut stream).unwrap();
            write_message(&mut stream, &[question.as_slice(), b"?"].concat()).unwrap();
        });
        for (transport, expected) in [(Transport::Udp, b"who!"), (Transport::Tcp, b"who?")] {
            let (mut guest, host) = UnixStream::pair().unwrap();
            guest.write_all(&[transport.byte()]).unwrap();
            write_message(&mut guest, b"who").unwrap();
            pass_on(host, address).unwrap();
            assert_eq!(read_message(&mut guest).unwrap(), expected);
        }
    }
}
