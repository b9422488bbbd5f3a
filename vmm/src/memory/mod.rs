//! Guest RAM: anonymous private memory of the monitor, nothing of which exists until the guest touches it, and that nobody
//! else can see.

pub mod place;
mod sealed;

use std::io;
use std::ptr;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::arch::layout;
use crate::error::{Error, Result};
pub use sealed::{memory_file, sealed_file};

/// The guest's memory as devices see it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Alignment that lets host kernel and KVM use 2 MiB pages: host and guest addresses agree in their low 21 bits.
const HUGE_PAGE: usize = 2 << 20;
const PROTECTION: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Reserves `bytes` of guest memory. It is never given back: a monitor runs one machine and ends with it, and the
/// devices' threads may use the memory until then.
///
/// # Errors
/// When the address space is too small or the process's limits forbid it.
pub fn create(bytes: u64) -> Result<GuestMemory> {
    let regions = layout::memory_ranges(bytes)
        .into_iter()
        .map(|(start, length)| region(start, length))
        .collect::<io::Result<Vec<_>>>()
        .map_err(Error::os("reserve guest memory"))?;
    GuestMemory::from_regions(regions)
        .map_err(|error| Error::Os { what: "lay out guest memory", source: io::Error::other(error) })
}

fn region(start: u64, length: u64) -> io::Result<GuestRegionMmap> {
    let length = usize::try_from(length).map_err(io::Error::other)?;
    let address = reserve(length)?;
    // SAFETY: the range was just mapped and is ours; the advice changes no content. Failing is harmless: a kernel
    // without transparent huge pages gives small ones, one without DONTDUMP writes larger core files.
    unsafe {
        libc::madvise(address.cast(), length, libc::MADV_HUGEPAGE);
        libc::madvise(address.cast(), length, libc::MADV_DONTDUMP);
    }
    let builder: MmapRegionBuilder<()> =
        MmapRegionBuilder::new(length).with_mmap_prot(PROTECTION).with_mmap_flags(FLAGS);
    // SAFETY: address..address+length lies within a mapping made above, which is never unmapped.
    let mapping: MmapRegion =
        unsafe { builder.with_raw_mmap_pointer(address) }.build().map_err(io::Error::other)?;
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// `length` bytes of anonymous memory, aligned for huge pages.
fn reserve(length: usize) -> io::Result<*mut u8> {
    let reserved = length.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let address = unsafe { libc::mmap(ptr::null_mut(), reserved, PROTECTION, FLAGS, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let address = address.cast::<u8>();
    Ok(address.wrapping_add(address.align_offset(HUGE_PAGE)))
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
        let memory = create((3 << 30) + (1 << 20)).unwrap();
        assert_eq!(memory.num_regions(), 2);
        for region in memory.iter() {
            assert_eq!(region.as_ptr() as usize % HUGE_PAGE, 0);
            assert!(region.file_offset().is_none());
        }
        assert!(memory.read_obj::<u64>(GuestAddress(layout::HOLE_START)).is_err());
        assert_eq!(memory.read_obj::<u64>(GuestAddress(layout::HOLE_END)).unwrap(), 0);
        assert_eq!(memory.last_addr().0, layout::HOLE_END + (1 << 20) - 1);
    }
}
