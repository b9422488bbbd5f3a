//! Guest RAM, nothing of which exists until the guest touches it: anonymous private memory of the monitor, or, where
//! another process serves a device's queues, a memory file that is shared with it.

pub mod place;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::arch::layout;
use crate::error::{Error, Result};

/// The guest's memory as devices see it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Alignment that lets host kernel and KVM use 2 MiB pages: host and guest addresses agree in their low 21 bits.
const HUGE_PAGE: usize = 2 << 20;

/// What is behind guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Anonymous memory that nobody else can see.
    Private,
    /// A memory file, which other processes can be given.
    Shared,
}

/// Reserves `bytes` of guest memory. It is never given back: a monitor runs one machine and ends with it, and the
/// devices' threads may use the memory until then.
///
/// # Errors
/// When the address space is too small or the process's limits forbid it.
pub fn create(bytes: u64, backing: Backing) -> Result<GuestMemory> {
    let regions = layout::memory_ranges(bytes)
        .into_iter()
        .map(|(start, length)| region(start, length, backing))
        .collect::<io::Result<Vec<_>>>()
        .map_err(Error::os("reserve guest memory"))?;
    GuestMemory::from_regions(regions)
        .map_err(|error| Error::Os { what: "lay out guest memory", source: io::Error::other(error) })
}

fn region(start: u64, length: u64, backing: Backing) -> io::Result<GuestRegionMmap> {
    let length = usize::try_from(length).map_err(io::Error::other)?;
    let address = reserve(length)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let file = match backing {
        Backing::Private => None,
        Backing::Shared => Some(memory_file(length as u64)?),
    };
    let kind = if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
    let flags = kind | libc::MAP_NORESERVE;
    if let Some(file) = &file {
        // SAFETY: replaces a part of the reservation, which is ours and in which nothing is yet.
        let mapped = unsafe {
            libc::mmap(address.cast(), length, protection, flags | libc::MAP_FIXED, file.as_raw_fd(), 0)
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the range was just mapped and is ours; the advice changes no content. Failing is harmless: a kernel
    // without transparent huge pages (of the kind in question) gives small ones, one without DONTDUMP writes larger core
    // files.
    unsafe {
        libc::madvise(address.cast(), length, libc::MADV_HUGEPAGE);
        libc::madvise(address.cast(), length, libc::MADV_DONTDUMP);
    }
    let builder: MmapRegionBuilder<()> =
        MmapRegionBuilder::new(length).with_mmap_prot(protection).with_mmap_flags(flags);
    // SAFETY: address..address+length lies within a mapping made above, which is never unmapped.
    let builder = unsafe { builder.with_raw_mmap_pointer(address) };
    let builder = match file {
        Some(file) => builder.with_file_offset(FileOffset::new(file, 0)),
        None => builder,
    };
    let mapping: MmapRegion = builder.build().map_err(io::Error::other)?;
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// `length` bytes of anonymous memory, aligned for huge pages.
fn reserve(length: usize) -> io::Result<*mut u8> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let reserved = length.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let address = unsafe { libc::mmap(ptr::null_mut(), reserved, protection, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let address = address.cast::<u8>();
    Ok(address.wrapping_add(address.align_offset(HUGE_PAGE)))
}

/// A file without a name that is nothing but memory.
///
/// A sealed memory file would be the obvious thing, but gets huge pages only where the host's
/// /sys/kernel/mm/transparent_hugepage/shmem_enabled says so, which it does not by default, and a guest on small ones
/// takes twice as long to boot. A tmpfs of our own can ask for them itself; it takes CAP_SYS_ADMIN to have one.
fn memory_file(length: u64) -> io::Result<File> {
    let file = huge_file().or_else(|_| sealed_file(length))?;
    if file.metadata()?.len() != length {
        file.set_len(length)?;
    }
    Ok(file)
}

/// A file on a tmpfs that nobody else can see, and that goes with the file.
fn huge_file() -> io::Result<File> {
    const CREATE: libc::c_uint = 6;
    const SET_STRING: libc::c_uint = 1;
    // SAFETY: the name is a C string.
    let context = descriptor(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 1) })?;
    let configure = |command: libc::c_uint, key: *const libc::c_char, value: *const libc::c_char| {
        // SAFETY: key and value are null or C strings.
        check(unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) })
    };
    // Without a limit: the machine's configuration has it.
    configure(SET_STRING, c"size".as_ptr(), c"0".as_ptr())?;
    configure(SET_STRING, c"huge".as_ptr(), c"advise".as_ptr())?;
    configure(CREATE, ptr::null(), ptr::null())?;
    // SAFETY: takes no pointers.
    let mount = descriptor(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0) })?;
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: the path is a C string.
    let file = unsafe { libc::openat(mount.as_raw_fd(), c".".as_ptr(), flags, 0o600) };
    Ok(descriptor(libc::c_long::from(file))?.into())
}

/// A memory file whose length nobody can change: a process that shares it could otherwise shorten it, and the monitor
/// would die of its next access.
fn sealed_file(length: u64) -> io::Result<File> {
    let base = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string.
    let make = |flags| unsafe { libc::memfd_create(c"guest-memory".as_ptr(), flags) };
    // Kernels before 6.3 know no NOEXEC_SEAL, later ones complain where it is not used.
    let file = descriptor(libc::c_long::from(make(base | libc::MFD_NOEXEC_SEAL)))
        .or_else(|_| descriptor(libc::c_long::from(make(base))))?;
    let file = File::from(file);
    file.set_len(length)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes no pointers.
    check(libc::c_long::from(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }))?;
    Ok(file)
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// What a system call that makes a descriptor has made.
fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(check(result)?).map_err(io::Error::other)?;
    // SAFETY: a descriptor just made, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes the memory the guest's. Done before the interrupt controller exists, since every change of the memory map
/// after it waits for a grace period of several milliseconds.
///
/// # Errors
/// When KVM refuses a region.
pub fn register(vm: &VmFd, memory: &GuestMemory) -> Result<()> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped for the rest of the process's life and belongs to the guest alone.
        unsafe { vm.set_user_memory_region(region) }.map_err(Error::kvm("take guest memory"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_is_zero_aligned_and_has_the_hole() {
        for backing in [Backing::Private, Backing::Shared] {
            let memory = create((3 << 30) + (1 << 20), backing).unwrap();
            assert_eq!(memory.num_regions(), 2);
            for region in memory.iter() {
                assert_eq!(region.as_ptr() as usize % HUGE_PAGE, 0);
                assert_eq!(region.file_offset().is_some(), backing == Backing::Shared);
            }
            assert!(memory.read_obj::<u64>(GuestAddress(layout::HOLE_START)).is_err());
            assert_eq!(memory.read_obj::<u64>(GuestAddress(layout::HOLE_END)).unwrap(), 0);
            assert_eq!(memory.last_addr().0, layout::HOLE_END + (1 << 20) - 1);
        }
    }

    #[test]
    fn shared_memory_is_the_files() {
        use std::os::unix::fs::FileExt;
        let memory = create(1 << 20, Backing::Shared).unwrap();
        memory.write_obj(0x1234_5678_u32, GuestAddress(4096)).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 4096).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), 0x1234_5678);
    }

    #[test]
    fn a_sealed_file_stays_its_size() {
        let file = sealed_file(1 << 20).unwrap();
        assert!(file.set_len(4096).is_err() && file.set_len(2 << 20).is_err());
    }
}
