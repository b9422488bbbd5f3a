//! Connections to the loopback of the guest's own network, which the host relays for those who connect to the loopback of
//! the container's network namespace there (`kubectl port-forward`).
//!
//! Each direction has an end of its own, as the two of a TCP connection have.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_protocol::agent::StreamHello;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, connect, getpeername, send, shutdown,
    socket_with, sockopt,
};

use crate::agent::{Agent, Source};
use crate::error::{Code, Context, Error, Result};
use crate::streams::{Flow, Pace};

/// A connection to a port.
pub struct Port {
    local: OwnedFd,
    address: SocketAddr,
    /// Where it is tried when nobody listens at `address`.
    then: Option<SocketAddr>,
    flows: Flows,
}

/// Both directions; each until its end has been passed on.
enum Flows {
    /// Nobody has answered yet.
    Connecting,
    Open {
        inward: Option<Flow>,
        outward: Option<Flow>,
    },
}

/// What is to be done next.
enum Step {
    Wait,
    /// It has had its turn.
    Again,
    /// The host is to be told.
    Connected,
    Failed(Errno),
    Close,
}

impl Port {
    fn connect(address: SocketAddr, then: Option<SocketAddr>) -> Result<Self> {
        let what = || format!("connect to {address}");
        let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let local = socket_with(family, SocketType::STREAM, flags, None).context(what)?;
        match connect(&local, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(Self { local, address, then, flows: Flows::Connecting }),
            Err(errno) => Err(Error::new(Code::Unavailable, errno.to_string())).context(what),
        }
    }

    /// Whichever of the addresses can be tried.
    fn try_each(first: SocketAddr, then: Option<SocketAddr>) -> Result<Self> {
        let tried = Self::connect(first, then);
        match then {
            Some(second) => tried.or_else(|_| Self::connect(second, None)),
            None => tried,
        }
    }

    fn step(&mut self, host: BorrowedFd<'_>) -> Step {
        let local = self.local.as_fd();
        let Flows::Open { inward, outward } = &mut self.flows else {
            return match sockopt::socket_error(local) {
                Ok(Ok(())) => match getpeername(local) {
                    Ok(_) => {
                        self.flows = Flows::Open { inward: Some(Flow::new()), outward: Some(Flow::new()) };
                        Step::Connected
                    }
                    Err(_) => Step::Wait,
                },
                Ok(Err(errno)) | Err(errno) => Step::Failed(errno),
            };
        };
        let (inwards, outwards) = (pump(inward, host, local), pump(outward, local, host));
        if matches!(outwards, Some(Pace::Refused | Pace::Lost)) || (inward.is_none() && outward.is_none()) {
            return Step::Close;
        }
        if inward.is_none() && has_gone(host) {
            return Step::Close;
        }
        if inwards == Some(Pace::Unfinished) || outwards == Some(Pace::Unfinished) {
            return Step::Again;
        }
        Step::Wait
    }
}

/// Moves what can be moved, and passes an end on. Who takes no more may still have something to say.
fn pump(flow: &mut Option<Flow>, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Option<Pace> {
    let pace = flow.as_mut().map(|flow| flow.pump(from, to, false))?;
    if matches!(pace, Pace::Ended | Pace::Refused | Pace::Lost) {
        *flow = None;
        let _ = shutdown(to, Shutdown::Write);
    }
    Some(pace)
}

/// Whether the host would take nothing more: a write of nothing says so.
fn has_gone(host: BorrowedFd<'_>) -> bool {
    send(host, &[], SendFlags::NOSIGNAL).is_err_and(|errno| errno != Errno::AGAIN && errno != Errno::INTR)
}

impl Agent {
    /// Connects a stream to the port that it asks for.
    ///
    /// # Errors
    /// There is no such port, or nobody can be asked for it.
    pub fn connect_port(&mut self, id: u32, hello: &StreamHello) -> Result<()> {
        let port = u16::try_from(hello.port).ok().filter(|&port| port != 0);
        let port = port.ok_or_else(|| Error::invalid(format!("{} is no port", hello.port)))?;
        let (four, six) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
        let (first, second) = if hello.ipv6 { (six, four) } else { (four, six) };
        self.try_port(id, (first, port).into(), Some((second, port).into()))
    }

    fn try_port(&mut self, id: u32, first: SocketAddr, then: Option<SocketAddr>) -> Result<()> {
        let port = Port::try_each(first, then)?;
        self.watch(&port.local, Source::Stream(id))?;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.carry(port);
        }
        self.go_on_with_port(id);
        Ok(())
    }

    /// Goes on with a connection to a port, one of whose ends is ready.
    pub fn go_on_with_port(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let Some((host, port)) = stream.port() else { return };
        match port.step(host) {
            Step::Wait => {}
            Step::Again => self.unfinished.push(id),
            Step::Connected => {
                if stream.reply("") {
                    self.unfinished.push(id);
                } else {
                    self.streams.remove(&id);
                }
            }
            Step::Failed(errno) => {
                let (address, then) = (port.address, port.then);
                let failed = Err(Error::new(Code::Unavailable, errno.to_string()));
                let outcome = match then {
                    Some(then) => self.try_port(id, then, None),
                    None => failed.context(|| format!("connect to {address}")),
                };
                if let (Err(error), Some(stream)) = (outcome, self.streams.get(&id)) {
                    stream.reply(&error.message);
                    self.streams.remove(&id);
                }
            }
            Step::Close => drop(self.streams.remove(&id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use bulkhead_protocol::agent::stream_hello::Kind;
    use bulkhead_protocol::agent::{StreamHello, StreamReply};
    use bulkhead_protocol::stream::{read_message, write_message};

    use crate::rpc::tests::with_agent;

    fn ask(directory: &str, port: u32, ipv6: bool) -> (UnixStream, String) {
        let mut host = UnixStream::connect(format!("{directory}/streams")).unwrap();
        let hello = StreamHello { kind: Kind::Port.into(), port, ipv6, ..StreamHello::default() };
        write_message(&mut host, &hello).unwrap();
        let reply: StreamReply = read_message(&mut host).unwrap();
        (host, reply.error)
    }

    fn connected(directory: &str, listener: &TcpListener, ipv6: bool) -> (UnixStream, TcpStream) {
        let (host, error) = ask(directory, listener.local_addr().unwrap().port().into(), ipv6);
        assert_eq!(error, "");
        (host, listener.accept().unwrap().0)
    }

    #[test]
    fn each_direction_ends_by_itself_and_nothing_is_lost() {
        with_agent(|directory| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let (mut host, mut local) = connected(directory, &listener, false);
            let data: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
            let sent = data.clone();
            let sender = std::thread::spawn(move || {
                host.write_all(&sent).unwrap();
                host.shutdown(std::net::Shutdown::Write).unwrap();
                let mut answer = Vec::new();
                host.read_to_end(&mut answer).unwrap();
                answer
            });
            let mut seen = Vec::new();
            local.read_to_end(&mut seen).unwrap();
            assert!(seen == data);
            local.write_all(&data).unwrap();
            drop(local);
            assert!(sender.join().unwrap() == data);
        });
    }

    #[test]
    fn the_other_loopback_is_tried_too() {
        with_agent(|directory| {
            let four = TcpListener::bind("127.0.0.1:0").unwrap();
            let (mut host, mut local) = connected(directory, &four, true);
            local.write_all(b"four").unwrap();
            let mut word = [0; 4];
            host.read_exact(&mut word).unwrap();
            assert_eq!(&word, b"four");
            // Where IPv6 is switched off there is no ::1 to listen at.
            if let Ok(six) = TcpListener::bind("[::1]:0") {
                let (_host, local) = connected(directory, &six, false);
                assert!(local.peer_addr().unwrap().is_ipv6());
            }
        });
    }

    #[test]
    fn where_nobody_listens_the_host_is_told() {
        with_agent(|directory| {
            let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            for (port, why) in [(u32::from(free), "connect to"), (0, "is no port"), (1 << 16, "is no port")] {
                let (mut host, error) = ask(directory, port, false);
                assert!(error.contains(why), "{error}");
                assert_eq!(host.read(&mut [0]).unwrap(), 0);
            }
        });
    }

    #[test]
    fn who_goes_takes_the_other_along() {
        with_agent(|directory| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let (host, mut local) = connected(directory, &listener, false);
            drop(host);
            assert_eq!(local.read(&mut [0]).unwrap(), 0);
            // Nobody is left to take it: sooner or later it cannot be written.
            while local.write_all(&[0; 4096]).is_ok() {}
        });
    }
}
