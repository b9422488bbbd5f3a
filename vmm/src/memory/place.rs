//! Gets parts of files (kernel, initramfs) into guest memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::GuestMemory;
use crate::arch::layout::PAGE;

/// Where a part of a file goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// First byte in the file.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// Guest physical address of the first byte.
    pub address: u64,
}

/// How a file gets into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Read into anonymous memory. Huge pages can back it, so that the guest takes few faults.
    Copy,
    /// Whole pages are mapped privately from the file.
    /// Machines share the page cache; every page the guest touches is a fault.
    Map,
}

/// Puts a part of `file` into guest memory.
///
/// # Errors
/// When the file ends early, cannot be read, or the memory does not reach that far.
pub fn place(memory: &GuestMemory, file: &File, part: Placement, way: Way) -> io::Result<()> {
    let aligned = part.offset.is_multiple_of(PAGE) && part.address.is_multiple_of(PAGE);
    let mapped = if way == Way::Map && aligned { part.length - part.length % PAGE } else { 0 };
    if mapped > 0 {
        map(memory, file, Placement { length: mapped, ..part })?;
    }
    // The rest, at most a page when mapping: what follows it in the file must not follow it in memory.
    copy(
        memory,
        file,
        Placement {
            offset: part.offset + mapped,
            length: part.length - mapped,
            address: part.address + mapped,
        },
    )
}

fn host_range(memory: &GuestMemory, part: Placement) -> io::Result<(*mut u8, usize)> {
    let length = usize::try_from(part.length).map_err(io::Error::other)?;
    let slice = memory.get_slice(GuestAddress(part.address), length).map_err(io::Error::other)?;
    Ok((slice.ptr_guard_mut().as_ptr(), length))
}

fn copy(memory: &GuestMemory, file: &File, part: Placement) -> io::Result<()> {
    if part.length == 0 {
        return Ok(());
    }
    let (address, length) = host_range(memory, part)?;
    // SAFETY: the range was checked to be guest memory, which is mapped for good; no vCPU runs yet, so that nothing
    // else reads or writes it.
    let buffer = unsafe { std::slice::from_raw_parts_mut(address, length) };
    file.read_exact_at(buffer, part.offset)
}

fn map(memory: &GuestMemory, file: &File, part: Placement) -> io::Result<()> {
    if file.metadata()?.len() < part.offset.saturating_add(part.length) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let (address, length) = host_range(memory, part)?;
    let offset = libc::off_t::try_from(part.offset).map_err(io::Error::other)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range was checked to be guest memory and is page aligned: replacing its mapping replaces nothing
    // of the monitor's own. It is before the machine runs, so nobody sees the memory change.
    let mapped = unsafe { libc::mmap(address.cast(), length, protection, flags, file.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    #[test]
    fn both_ways_give_the_same_bytes_and_zeros_after_them() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..40_000_u32).map(|i| (i % 251) as u8 + 1).collect();
        file.write_all(&content).unwrap();
        for way in [Way::Copy, Way::Map] {
            for (offset, length) in
                [(0, 10_000), (4096, 8192), (4096, 8193), (4096, 35_904), (100, 5000), (0, 0)]
            {
                let memory = crate::memory::create(1 << 20).unwrap();
                place(&memory, &file, Placement { offset, length, address: 0x1_0000 }, way).unwrap();
                let mut got = vec![0; length as usize + 5000];
                memory.read_slice(&mut got, GuestAddress(0x1_0000)).unwrap();
                assert_eq!(got[..length as usize], content[offset as usize..(offset + length) as usize]);
                assert!(got[length as usize..].iter().all(|byte| *byte == 0), "{way:?} {offset} {length}");
            }
        }
    }

    #[test]
    fn short_files_and_short_memory_are_errors() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let memory = crate::memory::create(1 << 20).unwrap();
        for way in [Way::Copy, Way::Map] {
            let part = Placement { offset: 0, length: 8193, address: 0 };
            assert!(place(&memory, &file, part, way).is_err());
            let part = Placement { offset: 0, length: 8192, address: (1 << 20) - 4096 };
            assert!(place(&memory, &file, part, way).is_err());
            let part = Placement { offset: 4096, length: 8192, address: 0 };
            assert!(place(&memory, &file, part, way).is_err());
        }
    }
}
