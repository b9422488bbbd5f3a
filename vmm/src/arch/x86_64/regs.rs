//! The state in which the boot processor enters the kernel: 64-bit mode, flat segments, the first GiB mapped to itself
//! (Documentation/arch/x86/boot.rst, "64-bit boot protocol").

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;

/// x87, SSE, AVX and AVX-512; not AMX, which processes must be permitted to use.
const XCR0_STATIC: u64 = 0b1110_0111;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Descriptor of a flat 64-bit code segment: present, execute/read, long mode.
const CODE64: u64 = 0x00af_9b00_0000_ffff;
/// Descriptor of a flat data segment: present, read/write.
const DATA: u64 = 0x00cf_9300_0000_ffff;
/// Descriptor of a 64-bit busy task segment with base 0 and limit 0xffff; nobody switches to it.
const TASK: u64 = 0x0000_8b00_0000_ffff;
/// Selectors: `__BOOT_CS` and `__BOOT_DS` are 0x10 and 0x18.
const GDT: [u64; 6] = [0, 0, CODE64, DATA, TASK, 0];

/// Writes descriptor and page tables.
///
/// # Errors
/// When guest memory ends below them.
pub fn write_tables(memory: &GuestMemory) -> Result<()> {
    let write = |words: &[u64], address: u64, what| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(address)).map_err(Error::guest_memory(what))
    };
    write(&GDT, layout::GDT, "descriptor table")?;
    write(&[layout::PDPT | PAGE_PRESENT_WRITABLE], layout::PML4, "page tables")?;
    write(&[layout::PD | PAGE_PRESENT_WRITABLE], layout::PDPT, "page tables")?;
    let pd: Vec<u64> = (0..512).map(|i| (i << 21) | PAGE_LARGE | PAGE_PRESENT_WRITABLE).collect();
    write(&pd, layout::PD, "page tables")
}

/// Sets the boot processor's registers to enter the kernel at `entry`.
///
/// # Errors
/// When KVM refuses them.
pub fn set_boot_registers(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let regs = kvm_regs {
        rip: entry,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::ZERO_PAGE,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(Error::kvm("set the boot processor's registers"))?;
    let sregs = vcpu.get_sregs().map_err(Error::kvm("tell the boot processor's system registers"))?;
    vcpu.set_sregs(&long_mode(sregs)).map_err(Error::kvm("set the boot processor's system registers"))
}

/// System registers for 64-bit mode with the tables of [`write_tables`].
fn long_mode(mut sregs: kvm_sregs) -> kvm_sregs {
    sregs.cs = segment(2);
    let data = segment(3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(4);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = layout::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs
}

/// The cached form of descriptor `index` of the GDT, all of which are flat.
fn segment(index: u16) -> kvm_segment {
    let descriptor = GDT[usize::from(index)];
    let bit = |n: u32| ((descriptor >> n) & 1) as u8;
    let granularity = bit(55);
    kvm_segment {
        base: 0,
        limit: if granularity == 1 { u32::MAX } else { 0xffff },
        selector: index * 8,
        type_: ((descriptor >> 40) & 0xf) as u8,
        present: bit(47),
        dpl: 0,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: granularity,
        avl: bit(52),
        unusable: 0,
        padding: 0,
    }
}

/// Enables the extended processor state (SSE, AVX, …) that the guest will enable anyway. With it KVM does not have to
/// switch XCR0 on every entry and exit until then, and it is right from the start where a nested hypervisor fails to tell
/// KVM of the guest's own switch (QEMU's SVM emulation). Best effort: the guest does not depend on it.
pub fn set_xcr0(vcpu: &VcpuFd, supported: u64) {
    if let Ok(mut xcrs) = vcpu.get_xcrs()
        && let Some(xcr0) = xcrs.xcrs.first_mut().filter(|xcr0| xcr0.xcr == 0)
    {
        xcr0.value |= supported & XCR0_STATIC;
        let _ = vcpu.set_xcrs(&xcrs);
    }
}

/// Model-specific registers that firmware would have set.
///
/// # Errors
/// When KVM refuses them.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<()> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::KvmLacks("room for two MSRs"))?;
    let set = vcpu.set_msrs(&msrs).map_err(Error::kvm("set model-specific registers"))?;
    if set == entries.len() { Ok(()) } else { Err(Error::KvmLacks("the MTRR registers")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_what_long_mode_needs() {
        let sregs = long_mode(kvm_sregs::default());
        let cs = sregs.cs;
        assert_eq!((cs.selector, cs.type_, cs.s, cs.l, cs.db, cs.present), (0x10, 0xb, 1, 1, 0, 1));
        let ds = sregs.ds;
        assert_eq!((ds.selector, ds.type_, ds.s, ds.db, ds.limit), (0x18, 3, 1, 1, u32::MAX));
        assert_eq!((sregs.tr.type_, sregs.tr.s, sregs.tr.limit), (0xb, 0, 0xffff));
    }
}
