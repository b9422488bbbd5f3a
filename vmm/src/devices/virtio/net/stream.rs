//! A stream socket that carries Ethernet frames, each after its length in four bytes, most significant first: what
//! `passt` speaks, and QEMU's `-netdev stream`.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::backend::{Backend, MAX_FRAME};
use super::header::HEADER_BYTES;

/// Bytes of a frame's length.
const LENGTH_BYTES: usize = 4;
/// Received at once at most: the longest frame, and many short ones.
const BUFFER: usize = 2 * (MAX_FRAME + LENGTH_BYTES);

/// See the module.
#[derive(Debug)]
pub struct Stream {
    socket: UnixStream,
    /// Received and not yet handed on: `start..end` of `input`.
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// What is left of a frame of which the socket took a part.
    unsent: Vec<u8>,
    broken: bool,
}

impl Stream {
    /// Connects to the unix socket `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::new(UnixStream::connect(path)?)
    }

    /// Uses a socket that is connected.
    ///
    /// # Errors
    /// What the host's kernel says.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, input: vec![0; BUFFER], start: 0, end: 0, unsent: Vec::new(), broken: false })
    }

    /// The length of the frame at `start`, when all of it is there.
    fn whole_frame(&self) -> io::Result<Option<usize>> {
        let there = self.input.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = there.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length > MAX_FRAME {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
        }
        Ok((rest.len() >= length).then_some(length))
    }

    /// Receives more; false when there is nothing at the moment.
    fn receive_more(&mut self) -> io::Result<bool> {
        self.input.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        match self.socket.read(self.input.get_mut(self.end..).unwrap_or_default()) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                self.end += count;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Sends pieces: how many bytes the socket took, none when it is full.
    ///
    /// # Safety
    /// The pieces are memory that can be read.
    unsafe fn send_pieces(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: msghdr is plain data, for which zero is valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_ptr().cast_mut();
        message.msg_iovlen = pieces.len();
        // SAFETY: the message names the caller's pieces only, and sendmsg does not write through them.
        let result = unsafe {
            libc::sendmsg(
                self.socket.as_raw_fd(),
                &raw const message,
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
            )
        };
        match usize::try_from(result) {
            Ok(count) => Ok(count),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                error => Err(error),
            },
        }
    }

    /// Sends the rest of a frame that was begun; true when there is none left.
    fn finish_frame(&mut self) -> io::Result<bool> {
        while !self.unsent.is_empty() {
            let piece = libc::iovec { iov_base: self.unsent.as_mut_ptr().cast(), iov_len: self.unsent.len() };
            // SAFETY: `unsent`, which is not changed during the call.
            let sent = unsafe { self.send_pieces(&[piece]) }?;
            if sent == 0 {
                return Ok(false);
            }
            self.unsent.drain(..sent.min(self.unsent.len()));
        }
        Ok(true)
    }

    /// Remembers that there is no use in going on: a stream out of step is lost.
    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && !self.broken
        {
            self.broken = true;
            eprintln!("bulkhead-vmm: the other end of a network's socket is lost: {error}");
        }
        result
    }
}

/// Copies `bytes` to `to` from `skip` on, as far as there is room.
///
/// # Safety
/// `to` is memory that can be written and whose content nobody relies on.
unsafe fn scatter(to: &[libc::iovec], mut skip: usize, mut bytes: &[u8]) {
    for piece in to {
        let before = skip.min(piece.iov_len);
        skip -= before;
        let (now, later) = bytes.split_at(bytes.len().min(piece.iov_len - before));
        // SAFETY: `now` fits into what is left of the piece after `before`, by the two minima above; the caller
        // promises the piece, and `bytes` is not guest memory, so that they do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(now.as_ptr(), piece.iov_base.cast::<u8>().add(before), now.len());
        }
        bytes = later;
    }
}

impl Backend for Stream {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn waits_for_room(&self) -> bool {
        true
    }

    fn offloads(&self) -> u64 {
        0
    }

    fn use_offloads(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self) {
        if !self.broken {
            let result = self.finish_frame();
            // The error is told; packets that come are counted as lost.
            let _ = self.note(result);
        }
    }

    unsafe fn receive(&mut self, to: &[libc::iovec]) -> io::Result<Option<usize>> {
        if self.broken {
            return Ok(None);
        }
        let length = loop {
            let frame = self.whole_frame();
            if let Some(length) = self.note(frame)? {
                break length;
            }
            let more = self.receive_more();
            if !self.note(more)? {
                return Ok(None);
            }
        };
        let frame = self.start + LENGTH_BYTES;
        let bytes = self.input.get(frame..frame + length).unwrap_or_default();
        // SAFETY: the caller's promise.
        unsafe {
            scatter(to, 0, &[0; HEADER_BYTES]);
            scatter(to, HEADER_BYTES, bytes);
        }
        self.start = frame + length;
        let room = to.iter().fold(0_usize, |sum, piece| sum.saturating_add(piece.iov_len));
        Ok(Some(room.min(HEADER_BYTES + length)))
    }

    unsafe fn send(&mut self, packet: &[libc::iovec]) -> io::Result<bool> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let free = self.finish_frame();
        if !self.note(free)? {
            return Ok(false);
        }
        let frame: &[libc::iovec] = packet.get(1..).unwrap_or_default();
        let length: usize = frame.iter().map(|piece| piece.iov_len).sum();
        let mut prefix = (length as u32).to_be_bytes();
        let mut pieces = Vec::with_capacity(packet.len());
        pieces.push(libc::iovec { iov_base: prefix.as_mut_ptr().cast(), iov_len: LENGTH_BYTES });
        pieces.extend_from_slice(frame);
        // SAFETY: the caller's promise, and `prefix`, which outlives the call.
        let sent = unsafe { self.send_pieces(&pieces) };
        let mut sent = self.note(sent)?;
        if sent == 0 {
            return Ok(false);
        }
        for piece in &pieces {
            let skip = sent.min(piece.iov_len);
            sent -= skip;
            // SAFETY: the piece is readable by the caller's promise, and `skip` within it. A guest that changes it
            // meanwhile changes its own packet.
            let rest = unsafe {
                std::slice::from_raw_parts(piece.iov_base.cast::<u8>().add(skip), piece.iov_len - skip)
            };
            self.unsent.extend_from_slice(rest);
        }
        Ok(true)
    }
}
