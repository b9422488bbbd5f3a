//! The MP table (Intel MultiProcessor Specification 1.4): tells a kernel without ACPI its processors, its IOAPIC and
//! how the interrupt lines reach it.

use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;

const SPEC_REVISION: u8 = 4;
/// Version that xAPICs integrated in processors report.
const APIC_VERSION: u8 = 0x14;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// Family 6, as the kernel only prints it.
const CPU_STEPPING: u32 = 0x600;
/// FPU and APIC on chip.
const CPU_FEATURES: u32 = 0x201;

const ENTRY_CPU: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;
const ALL_APICS: u8 = 0xff;

/// Writes the MP table for `vcpus` processors with APIC ids 0, 1, ….
///
/// # Errors
/// When guest memory ends below it.
pub fn write(memory: &GuestMemory, vcpus: u8) -> Result<()> {
    memory.write_slice(&build(vcpus), GuestAddress(layout::MPTABLE)).map_err(Error::guest_memory("MP table"))
}

/// Floating pointer structure, header and entries.
fn build(vcpus: u8) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOT } else { 0 };
        let mut cpu = vec![ENTRY_CPU, id, APIC_VERSION, flags];
        cpu.extend(CPU_STEPPING.to_le_bytes());
        cpu.extend(CPU_FEATURES.to_le_bytes());
        cpu.extend([0; 8]);
        entry(&cpu);
    }
    entry(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut ioapic = vec![ENTRY_IOAPIC, ioapic_id, 0x11, CPU_ENABLED];
    ioapic.extend(layout::IOAPIC.to_le_bytes());
    entry(&ioapic);
    for irq in 0..=layout::LAST_IRQ as u8 {
        entry(&[ENTRY_IO_INTERRUPT, INTERRUPT_VECTORED, 0, 0, 0, irq, ioapic_id, irq]);
    }
    entry(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTERNAL, 0, 0, 0, 0, 0, 0]);
    entry(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, 0, 0, ALL_APICS, 1]);

    let header_length = 44;
    let length = (header_length + entries.len()) as u16;
    let mut table = Vec::with_capacity(usize::from(length));
    table.extend(b"PCMP");
    table.extend(length.to_le_bytes());
    table.extend([SPEC_REVISION, 0]);
    table.extend(b"BULKHEADMICROVM     ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(layout::LAPIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(&entries);
    table[7] = checksum(&table);

    let mut all = Vec::with_capacity(16 + table.len());
    all.extend(b"_MP_");
    all.extend((layout::MPTABLE as u32 + 16).to_le_bytes());
    all.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    all[10] = checksum(&all);
    all.extend(table);
    all
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_the_largest_table_fits() {
        for vcpus in [1, 2, 32] {
            let all = build(vcpus);
            assert_eq!(checksum(&all[..16]), 0);
            assert_eq!(checksum(&all[16..]), 0);
            assert_eq!(all.len() - 16, usize::from(u16::from_le_bytes([all[20], all[21]])));
            assert!(all.len() <= 1024, "{} bytes for {vcpus} vCPUs", all.len());
        }
    }

    #[test]
    fn every_processor_and_line_has_an_entry() {
        let all = build(4);
        let count = u16::from_le_bytes([all[16 + 34], all[16 + 35]]);
        assert_eq!(count, 4 + 1 + 1 + 24 + 2);
    }
}
