//! Files that come with a request, and how they are sent.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Most descriptors of one request; the kernel takes no more in one message (`SCM_MAX_FD`).
pub const MAX_FILES: usize = 253;

/// Files by the names that the request gives them.
#[derive(Debug, Default)]
pub struct Files(Vec<(String, File)>);

impl Files {
    /// The files that came as `descriptors`, which are called `names`.
    ///
    /// # Errors
    /// There are more of one than of the other: in words for the client.
    pub fn new(names: Vec<String>, descriptors: Vec<OwnedFd>) -> Result<Self, String> {
        if names.len() != descriptors.len() {
            return Err(format!(
                "{} files are named, but {} descriptors came with the request",
                names.len(),
                descriptors.len()
            ));
        }
        Ok(Self(names.into_iter().zip(descriptors.into_iter().map(File::from)).collect()))
    }

    /// Adds one.
    pub fn push(&mut self, name: String, file: File) {
        self.0.push((name, file));
    }

    /// Takes out the one of this name.
    ///
    /// # Errors
    /// It did not come.
    pub fn take(&mut self, name: &str) -> io::Result<File> {
        let found = self.0.iter().position(|(known, _)| known == name);
        found.map(|index| self.0.remove(index).1).ok_or_else(|| {
            let words = format!(
                "no descriptor of {name:?} came with the request, and the monitor opens no files by itself"
            );
            io::Error::new(io::ErrorKind::NotFound, words)
        })
    }

    /// Takes out those whose names are paths: they belong to what a snapshot is a difference from.
    pub fn take_below(&mut self) -> Self {
        let (below, own) = std::mem::take(&mut self.0).into_iter().partition(|(name, _)| name.contains('/'));
        self.0 = own;
        Self(below)
    }

    /// The one of this name, once more.
    ///
    /// # Errors
    /// It did not come, or no descriptor is left.
    pub fn get(&self, name: &str) -> io::Result<File> {
        let found = self.0.iter().find(|(known, _)| known == name);
        found.map_or_else(|| Err(io::ErrorKind::NotFound.into()), |(_, file)| file.try_clone())
    }

    /// Their names, in order.
    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }

    fn descriptors(&self) -> Vec<RawFd> {
        self.0.iter().map(|(_, file)| file.as_raw_fd()).collect()
    }
}

/// Sends all of `text`, with the files at its beginning.
pub(super) fn send(stream: &mut UnixStream, text: &[u8], files: &Files) -> io::Result<()> {
    let descriptors = files.descriptors();
    if descriptors.len() > MAX_FILES {
        return Err(io::Error::other(format!("more than {MAX_FILES} files in one request")));
    }
    let sent = if descriptors.is_empty() { 0 } else { stream.send_with_fds(&[text], &descriptors)? };
    io::Write::write_all(stream, text.get(sent..).unwrap_or_default())
}

/// Reads some bytes, and takes what descriptors come with them.
pub(super) fn receive(stream: &UnixStream, buffer: &mut [u8], into: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut fds = [-1; MAX_FILES];
    let mut iovecs = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    // SAFETY: the one entry is a buffer that lives across the call.
    let (length, count) = unsafe { stream.recv_with_fds(&mut iovecs, &mut fds) }?;
    for fd in fds.into_iter().take(count) {
        // SAFETY: the kernel has just made it for us.
        into.push(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) });
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    #[test]
    fn files_arrive_under_their_names_and_in_their_order() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut files = Files::default();
        for name in ["one", "two"] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(name.as_bytes()).unwrap();
            file.rewind().unwrap();
            files.push(name.to_owned(), file);
        }
        send(&mut ours, b"request\n", &files).unwrap();
        let (mut buffer, mut descriptors) = ([0; 100], Vec::new());
        let length = receive(&theirs, &mut buffer, &mut descriptors).unwrap();
        assert_eq!(&buffer[..length], b"request\n");
        let mut received = Files::new(files.names(), descriptors).unwrap();
        for name in ["two", "one"] {
            let mut text = String::new();
            received.take(name).unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, name);
            assert!(received.take(name).unwrap_err().to_string().contains(name));
        }
        assert!(Files::new(vec!["one".into()], Vec::new()).unwrap_err().contains("0 descriptors"));
    }
}
