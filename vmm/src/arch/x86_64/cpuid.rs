//! What the processor says about itself: the host's features as KVM offers them, and this machine's topology, with
//! the clock frequencies told so that the guest measures nothing.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use crate::error::{Error, Result};

const KVM_BASE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_TIMING: u32 = 0x4000_0010;
/// The guest may tell the end of an interrupt by a bit in memory, without an exit.
const FEATURES_PV_EOI: u32 = 1 << 6;
/// KVM's local APIC counts in nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;

/// The features KVM offers on this host, before they are made one vCPU's own.
///
/// # Errors
/// When KVM does not tell.
pub fn supported(kvm: &Kvm) -> Result<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("tell the processor features it supports"))
}

/// Gives a vCPU its identification: `supported`, as processor `id` of `count`. Answers what it is.
///
/// # Errors
/// When KVM refuses it.
pub fn set(kvm: &Kvm, vcpu: &VcpuFd, supported: &CpuId, id: u8, count: u8) -> Result<Vec<kvm_cpuid_entry2>> {
    let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let pv_eoi = !host_is_emulated();
    let entries = specialise(supported.as_slice(), Vcpu { id, count, tsc_khz, deadline, pv_eoi });
    let cpuid =
        CpuId::from_entries(&entries).map_err(|_| Error::KvmLacks("room for the processor features"))?;
    vcpu.set_cpuid2(&cpuid).map_err(Error::kvm("set a vCPU's features"))?;
    Ok(entries)
}

/// The extended processor states among `supported`, as bits of XCR0.
pub fn extended_states(supported: &CpuId) -> u64 {
    let leaf = supported.as_slice().iter().find(|entry| entry.function == 0xd && entry.index == 0);
    leaf.map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax))
}

/// Whether this host is itself a machine that QEMU emulates without KVM.
///
/// There the guest must tell the end of every interrupt by an exit. QEMU's `vmrun` leaves an injected interrupt noted
/// as a pending exception until the guest's next exit, and when its instruction budget ends before that, it delivers
/// the interrupt a second time, whatever the guest's interrupt flag says: a guest then waits for ever for a lock that
/// the interrupted code holds (seen in QEMU 7.2 and 11.1; docs/decisions/0008).
pub(super) fn host_is_emulated() -> bool {
    let leaf = core::arch::x86_64::__cpuid(KVM_BASE);
    [leaf.ebx, leaf.ecx, leaf.edx]
        == [u32::from_le_bytes(*b"TCGT"), u32::from_le_bytes(*b"CGTC"), u32::from_le_bytes(*b"GTCG")]
}

/// What makes one vCPU's identification differ from the host's.
#[derive(Debug, Clone, Copy)]
struct Vcpu {
    id: u8,
    count: u8,
    tsc_khz: u32,
    deadline: bool,
    pv_eoi: bool,
}

fn specialise(supported: &[kvm_cpuid_entry2], vcpu: Vcpu) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .iter()
        .copied()
        // The topology leaves are written anew below.
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_001e | KVM_TIMING))
        .collect();
    let (id, count) = (u32::from(vcpu.id), u32::from(vcpu.count));
    let id_bits = count.next_power_of_two().trailing_zeros();
    let (mut amd, mut highest) = (false, 0);
    for entry in &mut entries {
        match entry.function {
            0 => {
                highest = entry.eax;
                amd = entry.ebx == u32::from_le_bytes(*b"Auth") || entry.ebx == u32::from_le_bytes(*b"Hygo");
            }
            1 => {
                entry.ebx = (entry.ebx & 0x0000_ffff) | (id << 24) | ((1 << id_bits) << 16);
                entry.ecx |= LEAF1_ECX_HYPERVISOR;
                set_bit(&mut entry.ecx, LEAF1_ECX_TSC_DEADLINE, vcpu.deadline);
                set_bit(&mut entry.edx, LEAF1_EDX_HTT, count > 1);
            }
            // Cache sharing, Intel and AMD: caches of levels 1 and 2 belong to one processor, higher levels to all.
            4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level < 3 { 0 } else { (1 << id_bits) - 1 };
                entry.eax = (entry.eax & !(0xfff << 14)) | (sharing << 14);
                if entry.function == 4 {
                    entry.eax = (entry.eax & !(0x3f << 26)) | (((1 << id_bits) - 1) << 26);
                }
            }
            // No performance counters: probing them costs the guest's boot dozens of exits.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            KVM_FEATURES if !vcpu.pv_eoi => entry.eax &= !FEATURES_PV_EOI,
            KVM_BASE => entry.eax = entry.eax.max(KVM_TIMING),
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (id_bits << 12) | (count - 1),
            _ => {}
        }
    }
    let leaf = |function, index, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    if highest >= 0xb {
        const THREAD: u32 = 1;
        const CORE: u32 = 2;
        entries.push(leaf(0xb, 0, [0, 1, THREAD << 8, id]));
        entries.push(leaf(0xb, 1, [id_bits, count, CORE << 8 | 1, id]));
        entries.push(leaf(0xb, 2, [0, 0, 2, id]));
    }
    if amd {
        entries.push(leaf(0x8000_001e, 0, [id, id, 0, 0]));
    }
    if vcpu.tsc_khz != 0 {
        let mut timing = leaf(KVM_TIMING, 0, [vcpu.tsc_khz, APIC_BUS_KHZ, 0, 0]);
        timing.flags = 0;
        entries.push(timing);
    }
    entries
}

/// Leaves whose registers are lists of features, one bit each: function, index, which of eax, ebx, ecx, edx, and the bits that
/// say how things are rather than what there is (OSXSAVE, OSPKE, the hypervisor's own).
const FEATURE_WORDS: [(u32, u32, &str, u32); 12] = [
    (1, 0, "ecx", 1 << 27 | LEAF1_ECX_HYPERVISOR | LEAF1_ECX_TSC_DEADLINE),
    (1, 0, "edx", LEAF1_EDX_HTT),
    (7, 0, "ebx", 0),
    (7, 0, "ecx", 1 << 4),
    (7, 0, "edx", 0),
    (7, 1, "eax", 0),
    (0xd, 0, "eax", 0),
    (0xd, 1, "eax", 0),
    (0x8000_0001, 0, "ecx", 0),
    (0x8000_0001, 0, "edx", 0),
    (0x8000_0008, 0, "ebx", 0),
    (KVM_FEATURES, 0, "eax", 0),
];

/// What a processor with the identification `wanted` has that this host cannot offer (`supported`): a guest that has seen it
/// would use it. The maker's name counts, as kernels have their ways with each.
pub fn missing(wanted: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Vec<String> {
    let leaf = |entries: &[kvm_cpuid_entry2], function, index| {
        entries.iter().copied().find(|entry| entry.function == function && entry.index == index)
    };
    let maker = |entries| leaf(entries, 0, 0).map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx]);
    let mut missing = Vec::new();
    if maker(wanted) != maker(supported) {
        missing.push("a processor of the same maker".to_owned());
    }
    for (function, index, register, ignored) in FEATURE_WORDS {
        let word = |entries| {
            leaf(entries, function, index).map_or(0, |leaf| match register {
                "eax" => leaf.eax,
                "ebx" => leaf.ebx,
                "ecx" => leaf.ecx,
                _ => leaf.edx,
            })
        };
        let bits = word(wanted) & !word(supported) & !ignored;
        missing.extend(
            (0..32)
                .filter(|bit| bits & 1 << bit != 0)
                .map(|bit| format!("CPUID {function:#x}.{index} {register} bit {bit}")),
        );
    }
    missing
}

fn set_bit(word: &mut u32, bit: u32, on: bool) {
    *word = if on { *word | bit } else { *word & !bit };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<kvm_cpuid_entry2> {
        let entry = |function, eax, ebx| kvm_cpuid_entry2 { function, eax, ebx, ..Default::default() };
        vec![
            entry(0, 0xd, u32::from_le_bytes(*b"Auth")),
            entry(1, 0, 0x1234_5678),
            entry(0xa, 7, 7),
            entry(0xb, 9, 9),
            entry(KVM_BASE, KVM_BASE + 1, 0),
            entry(KVM_FEATURES, u32::MAX, 0),
            entry(0x8000_0008, 48, 0),
        ]
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|entry| entry.function == function && entry.index == index).unwrap()
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_and_the_whole_topology() {
        for (id, count, bits) in [(0, 1, 0), (1, 2, 1), (2, 3, 2), (31, 32, 5)] {
            let entries =
                specialise(&host(), Vcpu { id, count, tsc_khz: 2_000_000, deadline: true, pv_eoi: true });
            let one = find(&entries, 1, 0);
            assert_eq!(one.ebx >> 24, u32::from(id));
            assert_eq!(one.ebx & 0xffff, 0x5678);
            assert_eq!(one.edx & LEAF1_EDX_HTT != 0, count > 1);
            assert!(one.ecx & LEAF1_ECX_HYPERVISOR != 0 && one.ecx & LEAF1_ECX_TSC_DEADLINE != 0);
            let core = find(&entries, 0xb, 1);
            assert_eq!((core.eax, core.ebx, core.edx), (bits, u32::from(count), u32::from(id)));
            assert_eq!(find(&entries, 0x8000_001e, 0).eax, u32::from(id));
            assert_eq!(find(&entries, 0x8000_0008, 0).ecx, bits << 12 | u32::from(count - 1));
            assert_eq!(find(&entries, 0xa, 0).eax, 0);
        }
    }

    #[test]
    fn what_a_host_lacks_is_named_and_what_it_has_more_is_not() {
        let vcpu = Vcpu { id: 1, count: 2, tsc_khz: 1, deadline: true, pv_eoi: false };
        let guest = specialise(&host(), vcpu);
        assert_eq!(missing(&guest, &host()), Vec::<String>::new());
        let mut poorer = host();
        poorer[5].eax = !(1 << 3);
        assert_eq!(missing(&guest, &poorer), ["CPUID 0x40000001.0 eax bit 3"]);
        let mut other = host();
        other[0].ebx = u32::from_le_bytes(*b"Genu");
        assert_eq!(missing(&guest, &other).len(), 1);
    }

    #[test]
    fn the_guest_is_told_its_clocks() {
        let vcpu = Vcpu { id: 0, count: 1, tsc_khz: 2_000_000, deadline: false, pv_eoi: true };
        let entries = specialise(&host(), vcpu);
        assert_eq!(find(&entries, KVM_TIMING, 0).eax, 2_000_000);
        assert!(find(&entries, KVM_BASE, 0).eax >= KVM_TIMING);
        assert_eq!(find(&entries, 1, 0).ecx & LEAF1_ECX_TSC_DEADLINE, 0);
        let entries = specialise(&host(), Vcpu { tsc_khz: 0, ..vcpu });
        assert!(entries.iter().all(|entry| entry.function != KVM_TIMING));
    }

    #[test]
    fn an_emulated_host_gets_no_paravirtual_end_of_interrupt() {
        let vcpu = Vcpu { id: 0, count: 1, tsc_khz: 0, deadline: true, pv_eoi: true };
        assert_eq!(find(&specialise(&host(), vcpu), KVM_FEATURES, 0).eax, u32::MAX);
        let entries = specialise(&host(), Vcpu { pv_eoi: false, ..vcpu });
        assert_eq!(find(&entries, KVM_FEATURES, 0).eax, !FEATURES_PV_EOI);
    }
}
