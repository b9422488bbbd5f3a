//! Both directions of one connection, each with a buffer and an end of its own.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

const BUFFER: usize = 32 << 10;
/// How long one side may say nothing when the other has ended: who has ended may have gone altogether, which cannot be told
/// from that.
const PATIENCE: Timespec = Timespec { tv_sec: 300, tv_nsec: 0 };

/// One direction.
struct Way {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Nothing more comes.
    ended: bool,
    /// Its end has been passed on.
    over: bool,
}

/// What a direction waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wants {
    Read,
    Write,
    Nothing,
}

impl Way {
    fn new() -> Self {
        Self { buffer: vec![0; BUFFER].into(), start: 0, end: 0, ended: false, over: false }
    }

    fn wants(&self) -> Wants {
        match (self.over, self.start < self.end) {
            (true, _) => Wants::Nothing,
            (false, true) => Wants::Write,
            (false, false) => Wants::Read,
        }
    }

    /// Moves what can be moved at once; true when the end has been.
    ///
    /// # Errors
    /// Of either side.
    fn pump(&mut self, from: impl AsFd, to: impl AsFd) -> Result<bool, Failed> {
        if self.over {
            return Ok(false);
        }
        loop {
            while let Some(rest) = self.buffer.get(self.start..self.end).filter(|rest| !rest.is_empty()) {
                match send(&to, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                    Ok(count) => self.start += count,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return Ok(false),
                    Err(errno) => return Err(Failed::Writing(errno)),
                }
            }
            if self.ended {
                self.over = true;
                return Ok(true);
            }
            (self.start, self.end) = (0, 0);
            match rustix::io::read(&from, &mut *self.buffer) {
                Ok(0) => self.ended = true,
                Ok(count) => self.end = count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(Failed::Reading(errno)),
            }
        }
    }
}

enum Failed {
    Reading(Errno),
    Writing(Errno),
}

impl From<Failed> for io::Error {
    fn from(failed: Failed) -> Self {
        let (Failed::Reading(errno) | Failed::Writing(errno)) = failed;
        errno.into()
    }
}

/// Relays until both directions have ended.
///
/// # Errors
/// One side is lost: the other should learn that what it has is not all.
pub(super) fn run(client: &TcpStream, guest: &UnixStream) -> io::Result<()> {
    client.set_nonblocking(true)?;
    guest.set_nonblocking(true)?;
    let (mut inward, mut outward) = (Way::new(), Way::new());
    loop {
        match inward.pump(client, guest) {
            Ok(true) => guest.shutdown(Shutdown::Write)?,
            Ok(false) => {}
            // It takes no more, but may have said something.
            Err(Failed::Writing(_)) => inward.over = true,
            Err(failed) => return Err(failed.into()),
        }
        if outward.pump(guest, client)? {
            client.shutdown(Shutdown::Write)?;
        }
        if inward.over && outward.over {
            return Ok(());
        }
        // Who is not waited for is not watched: that it has gone would be told again and again.
        let mut fds = Vec::with_capacity(4);
        for (way, from, to) in
            [(&inward, client.as_fd(), guest.as_fd()), (&outward, guest.as_fd(), client.as_fd())]
        {
            match way.wants() {
                Wants::Read => fds.push(PollFd::from_borrowed_fd(from, PollFlags::IN)),
                Wants::Write => fds.push(PollFd::from_borrowed_fd(to, PollFlags::OUT)),
                Wants::Nothing => {}
            }
        }
        match poll(&mut fds, (inward.over || outward.over).then_some(&PATIENCE)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    struct Ends {
        client: TcpStream,
        agent: UnixStream,
        relay: thread::JoinHandle<io::Result<()>>,
    }

    fn start() -> Ends {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let served = listener.accept().unwrap().0;
        let (agent, guest) = UnixStream::pair().unwrap();
        Ends { client, agent, relay: thread::spawn(move || run(&served, &guest)) }
    }

    #[test]
    fn both_directions_at_once_and_nothing_is_lost() {
        let Ends { mut client, mut agent, relay } = start();
        let data: Vec<u8> = (0..5_000_000u32).map(|n| (n % 251) as u8).collect();
        let sent = data.clone();
        let (mut writer, mut reader) = (client.try_clone().unwrap(), agent.try_clone().unwrap());
        let typing = thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        // The guest's side echoes what it hears, and ends when that has ended.
        let echo = thread::spawn(move || {
            io::copy(&mut reader, &mut agent).unwrap();
            agent.shutdown(Shutdown::Write).unwrap();
        });
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        typing.join().unwrap();
        echo.join().unwrap();
        assert!(all == data);
        relay.join().unwrap().unwrap();
    }

    #[test]
    fn a_slow_reader_stops_the_writer() {
        let Ends { mut client, agent, relay } = start();
        client.set_nonblocking(true).unwrap();
        let mut taken = 0;
        let mut idle = 0;
        while idle < 50 {
            match client.write(&[0; 64 << 10]) {
                Ok(count) => (taken, idle) = (taken + count, 0),
                Err(_) => idle += 1,
            }
            thread::sleep(std::time::Duration::from_millis(1));
        }
        // The kernel's buffers and one of ours, and no more however long one writes.
        assert!(taken < 32 << 20, "{taken}");
        drop((client, agent));
        let _ = relay.join().unwrap();
    }

    #[test]
    fn a_client_that_is_lost_ends_the_guests_connection() {
        let Ends { client, mut agent, relay } = start();
        rustix::net::sockopt::set_socket_linger(&client, Some(std::time::Duration::ZERO)).unwrap();
        drop(client);
        assert_eq!(agent.read(&mut [0]).unwrap(), 0);
        assert!(relay.join().unwrap().is_err());
        assert!(agent.write_all(b"x").is_err());
    }

    #[test]
    fn a_guest_that_ends_is_the_end_though_the_client_goes_on() {
        let Ends { mut client, agent, relay } = start();
        drop(agent);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        while client.write_all(&[0; 4096]).is_ok() {}
        let _ = relay.join().unwrap();
    }
}
