//! Where everything is in the guest's physical address space.
//!
//! ```text
//! 0x0000_0000  low memory: boot tables, command line, MP table at its top end
//! 0x0010_0000  high memory: kernel upwards, initramfs downwards from the end
//! 0xc000_0000  no memory up to 4 GiB: virtio-mmio windows, IOAPIC, LAPIC, KVM's own pages
//! 0x1_0000_0000  the rest of the memory
//! ```

/// Global descriptor table, as the 64-bit boot protocol wants it.
pub const GDT: u64 = 0x500;
/// The "zero page": `struct boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// `struct setup_data` with the seed of the kernel's random number generator.
pub const RNG_SEED: u64 = 0x8000;
/// Page tables: one page each of PML4, PDPT and PD, mapping the first GiB to itself.
pub const PML4: u64 = 0x9000;
/// See [`PML4`].
pub const PDPT: u64 = 0xa000;
/// See [`PML4`].
pub const PD: u64 = 0xb000;
/// Initial stack pointer; the kernel sets its own at once.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line including its final zero (COMMAND_LINE_SIZE of x86).
pub const CMDLINE_MAX: usize = 2048;
/// MP table: in the last KiB of base memory, one of the places where the kernel looks for it.
pub const MPTABLE: u64 = 0x9_fc00;
/// End of what the memory map calls usable below 1 MiB.
pub const LOW_MEMORY_END: u64 = MPTABLE;
/// Start of the memory above the ISA hole.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Start of the address range without memory below 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the address range without memory.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// First virtio-mmio window.
pub const MMIO_START: u64 = 0xd000_0000;
/// Size of each virtio-mmio window.
pub const MMIO_SIZE: u64 = 0x1000;
/// First interrupt line for virtio devices; those below belong to legacy devices.
pub const FIRST_IRQ: u32 = 5;
/// Last interrupt line: the in-kernel IOAPIC has 24 pins.
pub const LAST_IRQ: u32 = 23;
/// Interrupt line of the first serial port.
pub const SERIAL_IRQ: u32 = 4;
/// IOAPIC registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel processors.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page that KVM needs on Intel processors without unrestricted guests.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Page size.
pub const PAGE: u64 = 4096;
/// Most memory a machine can have: what fits under the smallest physical address width in use (39 bits), less the hole.
pub const MAX_MEMORY_MIB: u64 = (1 << (39 - 20)) - 1024;

/// The address ranges of `bytes` of guest memory, as (start, length).
pub fn memory_ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= HOLE_START { vec![(0, bytes)] } else { vec![(0, HOLE_START), (HOLE_END, bytes - HOLE_START)] }
}

/// End of the memory below the hole.
pub fn low_end(bytes: u64) -> u64 {
    bytes.min(HOLE_START)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_leaves_the_hole_free() {
        assert_eq!(memory_ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(memory_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(memory_ranges(4 << 30), [(0, 3 << 30), (4 << 30, 1 << 30)]);
    }
}
