//! A socket to the kernel's network configuration of the namespace in which it was opened.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socket_with};

use crate::message::{self, Attributes, HEADER, Message, Request, u32_at};

/// What the kernel sends at once at most.
const BUFFER: usize = 64 << 10;
/// How often a list that changed while it was read is read again.
const RETRIES: usize = 10;
/// `NLMSGERR_ATTR_MSG`: the kernel's own words about an error.
const ERROR_WORDS: u16 = 1;

/// See the module.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open() -> io::Result<Self> {
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None, // 0 is NETLINK_ROUTE
        )?;
        let on: i32 = 1;
        // Without it errors are numbers only, which is no reason to fail.
        // SAFETY: the option's value is an int that outlives the call.
        unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_NETLINK,
                libc::NETLINK_EXT_ACK,
                (&raw const on).cast(),
                size_of_val(&on) as u32,
            );
        }
        Ok(Self { fd, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// Has the kernel do something.
    ///
    /// # Errors
    /// The kernel's refusal, in its own words where it has any.
    pub fn execute(&mut self, request: Request) -> io::Result<()> {
        let mut ignored = Vec::new();
        self.exchange(request, &mut ignored).map(drop)
    }

    /// Asks for a list.
    ///
    /// # Errors
    /// The kernel's refusal, or a list that changes faster than it can be read.
    pub fn list(&mut self, request: &Request) -> io::Result<Vec<Message>> {
        for _ in 0..RETRIES {
            let mut found = Vec::new();
            if self.exchange(request.clone(), &mut found)? {
                return Ok(found);
            }
        }
        Err(io::Error::other("the list changed while it was read, again and again"))
    }

    /// Sends a request and collects answers up to its end. False: they do not belong together.
    fn exchange(&mut self, request: Request, found: &mut Vec<Message>) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        rustix::net::send(&self.fd, &request.finish(self.sequence), SendFlags::empty())?;
        let mut whole = true;
        loop {
            let (_, length) = rustix::net::recv(&self.fd, &mut *self.buffer, RecvFlags::TRUNC)?;
            let received = self.buffer.get(..length).ok_or_else(|| {
                io::Error::other(format!("a netlink message of {length} bytes does not fit"))
            })?;
            for message in message::messages(received) {
                if message.sequence != self.sequence {
                    continue;
                }
                whole &= i32::from(message.flags) & libc::NLM_F_DUMP_INTR == 0;
                match i32::from(message.kind) {
                    libc::NLMSG_ERROR => return outcome(&message).map(|()| whole),
                    libc::NLMSG_DONE => return Ok(whole),
                    _ => found.push(message),
                }
            }
        }
    }
}

/// What an acknowledgement says.
fn outcome(message: &Message) -> io::Result<()> {
    let code = u32_at(&message.payload, 0).ok_or(io::ErrorKind::InvalidData)? as i32;
    if code == 0 {
        return Ok(());
    }
    let error = io::Error::from_raw_os_error(code.wrapping_neg());
    // After the code comes the request's header, and the request itself unless the kernel left it out.
    let capped = i32::from(message.flags) & libc::NLM_F_CAPPED != 0;
    let request = if capped { HEADER } else { u32_at(&message.payload, 4).unwrap_or(0) as usize };
    let attributes = message.payload.get(4_usize.saturating_add(request.next_multiple_of(4))..);
    match Attributes::of(attributes.unwrap_or_default()).text(ERROR_WORDS) {
        Some(words) if i32::from(message.flags) & libc::NLM_F_ACK_TLVS != 0 && !words.is_empty() => {
            Err(io::Error::new(error.kind(), Refusal { words, error }))
        }
        _ => Err(error),
    }
}

/// An error with the kernel's own words.
#[derive(Debug)]
struct Refusal {
    words: String,
    error: io::Error,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}: {}", self.error, self.words)
    }
}

impl std::error::Error for Refusal {}
