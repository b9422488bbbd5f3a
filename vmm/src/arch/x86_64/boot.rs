//! Hands kernel, initramfs, command line, memory map and a random seed to the boot processor: the "zero page" of
//! Documentation/arch/x86/zero-page.rst.

use std::fs::File;
use std::path::Path;

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::Cmdline;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::kernel::Kernel;
use super::{layout, mptable, regs};
use crate::config::BootConfig;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::memory::place::{Placement, Way, place};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// "Some other boot loader".
const LOADER_TYPE: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;
/// `setup_data` type 9.
const SETUP_RNG_SEED: u32 = 9;
const SEED_BYTES: usize = 32;
/// What a kernel of our configuration needs to get to user space, besides itself and its initramfs.
const WORKING_MEMORY: u64 = 8 << 20;

/// `struct setup_data` carrying a seed.
#[repr(C, packed)]
#[derive(Debug, Clone, Copy)]
struct SeedData {
    next: u64,
    kind: u32,
    length: u32,
    seed: [u8; SEED_BYTES],
}

// SAFETY: plain old data without padding (packed), valid for any bit pattern.
unsafe impl ByteValued for SeedData {}

/// Kernel and initramfs in guest memory, and what the boot parameters say of them.
pub struct Loaded {
    entry: u64,
    params: boot_params,
}

/// Loads the files that `boot` names. It needs no virtual machine: it can be done while one is made.
///
/// # Errors
/// When a file is missing or wrong, or memory is too small.
pub fn load(memory: &GuestMemory, bytes: u64, boot: &BootConfig) -> Result<Loaded> {
    let mut kernel = Kernel::open(&boot.kernel)?;
    let initramfs = boot.initramfs.as_deref().map(open_initramfs).transpose()?;
    let initramfs_length = initramfs.as_ref().map_or(0, |(_, length)| *length);

    // Unpacking takes as much again as the archive.
    let needed = kernel.end() + 2 * initramfs_length.next_multiple_of(layout::PAGE) + WORKING_MEMORY;
    if needed > layout::low_end(bytes) {
        let (memory_mib, needed_mib) = (bytes >> 20, needed.div_ceil(1 << 20));
        return Err(Error::MemoryTooSmall { memory_mib, needed_mib });
    }
    let entry = kernel.load(memory, &boot.kernel, WAY)?;

    let mut params = boot_params::default();
    if let Some(header) = kernel.setup_header() {
        params.hdr = header;
    } else {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    }
    params.hdr.type_of_loader = LOADER_TYPE;
    if let (Some((file, length)), Some(path)) = (&initramfs, &boot.initramfs) {
        let limit = layout::low_end(bytes).min(kernel.initramfs_limit() + 1);
        let address = (limit - length) / layout::PAGE * layout::PAGE;
        let part = Placement { offset: 0, length: *length, address };
        place(memory, file, part, WAY).map_err(|source| Error::Input {
            what: "initramfs",
            path: path.clone(),
            source,
        })?;
        // Below the hole, hence below 4 GiB.
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = *length as u32;
    }
    Ok(Loaded { entry, params })
}

impl Loaded {
    /// Writes the command line and the boot tables. Returns the kernel's entry point.
    ///
    /// # Errors
    /// When they do not fit, or the host gives no random bytes.
    pub fn finish(mut self, memory: &GuestMemory, bytes: u64, vcpus: u8, cmdline: &Cmdline) -> Result<u64> {
        write_cmdline(memory, cmdline)?;
        self.params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
        self.params.hdr.cmdline_size = layout::CMDLINE_MAX as u32 - 1;
        write_seed(memory)?;
        self.params.hdr.setup_data = layout::RNG_SEED;
        write_memory_map(&mut self.params, bytes);
        memory
            .write_obj(self.params, GuestAddress(layout::ZERO_PAGE))
            .map_err(Error::guest_memory("boot parameters"))?;
        mptable::write(memory, vcpus)?;
        regs::write_tables(memory)?;
        Ok(self.entry)
    }
}

/// Copying 13 MiB of kernel takes 17 ms in the emulated host (2 ns per instruction), mapping it 0.5 ms; but then the boot
/// takes 93 ms longer, for thousands of faults of 4 KiB where 22 of 2 MiB do. Without huge pages it is 45 ms more still.
const WAY: Way = Way::Copy;

fn open_initramfs(path: &Path) -> Result<(File, u64)> {
    let open = || {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok((file, length))
    };
    open().map_err(|source| Error::Input { what: "initramfs", path: path.to_owned(), source })
}

fn write_cmdline(memory: &GuestMemory, cmdline: &Cmdline) -> Result<()> {
    let too_long = |length| Error::CmdlineTooLong { length, limit: layout::CMDLINE_MAX - 1 };
    let text = cmdline.as_cstring().map_err(|_| too_long(layout::CMDLINE_MAX))?;
    memory
        .write_slice(text.as_bytes_with_nul(), GuestAddress(layout::CMDLINE))
        .map_err(Error::guest_memory("command line"))
}

/// A seed from the host, so that the guest has good random numbers from its first moment.
fn write_seed(memory: &GuestMemory) -> Result<()> {
    let mut data =
        SeedData { next: 0, kind: SETUP_RNG_SEED, length: SEED_BYTES as u32, seed: [0; SEED_BYTES] };
    fill_random(&mut data.seed).map_err(Error::os("get random bytes"))?;
    memory.write_obj(data, GuestAddress(layout::RNG_SEED)).map_err(Error::guest_memory("random seed"))
}

fn fill_random(buffer: &mut [u8; SEED_BYTES]) -> std::io::Result<()> {
    // SAFETY: the pointer and length are those of a buffer that lives across the call.
    let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    // Requests of up to 256 bytes are never answered in part.
    if got == SEED_BYTES as isize { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn write_memory_map(params: &mut boot_params, bytes: u64) {
    let low_end = layout::low_end(bytes);
    let mut map = vec![
        (0, layout::LOW_MEMORY_END, E820_RAM),
        (layout::LOW_MEMORY_END, layout::HIGH_MEMORY - layout::LOW_MEMORY_END, E820_RESERVED),
        (layout::HIGH_MEMORY, low_end - layout::HIGH_MEMORY, E820_RAM),
    ];
    if bytes > low_end {
        map.push((layout::HOLE_END, bytes - low_end, E820_RAM));
    }
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: *addr, size: *size, r#type: *kind };
    }
    params.e820_entries = map.len() as u8;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_covers_all_memory_once() {
        for bytes in [64 << 20, 3 << 30, 5_u64 << 30] {
            let mut params = boot_params::default();
            write_memory_map(&mut params, bytes);
            let entries = &params.e820_table[..usize::from(params.e820_entries)];
            let total: u64 = entries.iter().map(|entry| entry.size).sum();
            assert_eq!(total, bytes);
            let mut last_end = 0;
            for entry in entries {
                let (start, size) = (entry.addr, entry.size);
                assert!(
                    start >= last_end && (start + size <= layout::HOLE_START || start >= layout::HOLE_END)
                );
                last_end = start + size;
            }
        }
    }
}
