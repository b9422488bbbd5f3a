//! Memory that another process can be given.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A file that is nothing but memory, and whose length nobody can change: a process that shares it could otherwise shorten
/// it, and the monitor would die of its next access.
///
/// # Errors
/// Out of descriptors or memory.
pub fn sealed_file(name: &CStr, length: u64) -> io::Result<File> {
    let base = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // Kernels before 6.3 know no NOEXEC_SEAL, later ones complain where it is not used.
    let file = memory_file(name, base | libc::MFD_NOEXEC_SEAL).or_else(|_| memory_file(name, base))?;
    file.set_len(length)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes no pointers.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// A file that is nothing but memory. `flags`: those of memfd_create(2).
///
/// # Errors
/// Out of descriptors or memory.
pub fn memory_file(name: &CStr, flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor just made, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_its_size() {
        let file = sealed_file(c"test", 1 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        assert!(file.set_len(4096).is_err() && file.set_len(2 << 20).is_err());
    }
}
