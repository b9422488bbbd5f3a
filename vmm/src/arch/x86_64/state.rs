//! What KVM knows of a machine and its processors, taken out to be put back into another machine.
//!
//! The orders are KVM's: a register that another one's meaning depends on is set after it (Documentation/virt/kvm/api.rst).

use kvm_bindings::CpuId;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::cpuid;
use crate::error::{Error, Result};

/// Most model-specific registers that KVM takes or gives at once.
const MSRS_AT_ONCE: usize = 256;
/// Time stamp counter: before everything that is counted with it.
const MSR_IA32_TSC: u32 = 0x10;
/// When the local APIC's timer fires, in that counter: after it.
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// How far two hosts' counters may be apart without one being made to run as the other: 250 parts in a million, which is what
/// time keeping corrects.
const TSC_TOLERANCE: u64 = 250;

/// A processor.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: Box<kvm_lapic_state>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// What the processors share.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VmState {
    /// Two interrupt controllers of a PC and the IOAPIC.
    irqchips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

/// The registers that KVM says make up a processor's state.
///
/// # Errors
/// When it does not say.
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>> {
    let list = kvm.get_msr_index_list().map_err(Error::kvm("list its model-specific registers"))?;
    Ok(list.as_slice().to_vec())
}

impl VcpuState {
    /// Takes the state of a processor that stands still and was given the identification `cpuid`. (KVM tells that too, but not
    /// every KVM tells what it was given.)
    ///
    /// # Errors
    /// When KVM does not tell.
    pub fn save(vcpu: &VcpuFd, cpuid: &[kvm_cpuid_entry2], msrs: &[u32]) -> Result<Self> {
        let what = "tell a vCPU's state";
        // First: it settles what is pending.
        let mp_state = vcpu.get_mp_state().map_err(Error::kvm(what))?;
        let xcrs = vcpu.get_xcrs().map_err(Error::kvm(what))?;
        Ok(Self {
            cpuid: cpuid.to_vec(),
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            mp_state,
            regs: vcpu.get_regs().map_err(Error::kvm(what))?,
            sregs: vcpu.get_sregs().map_err(Error::kvm(what))?,
            xsave: Box::new(vcpu.get_xsave().map_err(Error::kvm(what))?),
            xcrs,
            debug: vcpu.get_debug_regs().map_err(Error::kvm(what))?,
            lapic: Box::new(vcpu.get_lapic().map_err(Error::kvm(what))?),
            msrs: get_msrs(vcpu, msrs)?,
            events: vcpu.get_vcpu_events().map_err(Error::kvm(what))?,
        })
    }

    /// Makes a new processor go on where this one stood.
    ///
    /// # Errors
    /// When KVM refuses a part of it.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<()> {
        let what = "take over a vCPU's state";
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| Error::KvmLacks("room for the processor features"))?;
        vcpu.set_cpuid2(&cpuid).map_err(Error::kvm("take over a vCPU's features"))?;
        self.set_tsc_rate(vcpu)?;
        vcpu.set_mp_state(self.mp_state).map_err(Error::kvm(what))?;
        vcpu.set_regs(&self.regs).map_err(Error::kvm(what))?;
        vcpu.set_sregs(&system_registers(self.sregs)).map_err(Error::kvm(what))?;
        // SAFETY: KVM reads 4096 bytes of a kvm_xsave, which has them, unless the process was permitted states that need more
        // (arch_prctl), which the monitor never asks for.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(Error::kvm(what))?;
        vcpu.set_xcrs(&self.xcrs).map_err(Error::kvm(what))?;
        vcpu.set_debug_regs(&self.debug).map_err(Error::kvm(what))?;
        vcpu.set_lapic(&self.lapic).map_err(Error::kvm(what))?;
        set_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(Error::kvm(what))
    }

    /// What it was told that it is.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Processor features that this one has and `supported` lacks, in words.
    pub fn features_missing_from(&self, supported: &[kvm_cpuid_entry2]) -> Vec<String> {
        cpuid::missing(&self.cpuid, supported)
    }

    fn set_tsc_rate(&self, vcpu: &VcpuFd) -> Result<()> {
        let here = vcpu.get_tsc_khz().unwrap_or(0);
        let difference = u64::from(here.abs_diff(self.tsc_khz));
        if self.tsc_khz == 0 || difference * 1_000_000 <= TSC_TOLERANCE * u64::from(self.tsc_khz) {
            return Ok(());
        }
        vcpu.set_tsc_khz(self.tsc_khz).map_err(Error::kvm(
            "run the time stamp counter at the snapshot's rate (this host's processor cannot scale it)",
        ))
    }
}

/// What a processor of this host takes for the saved system registers.
///
/// KVM tells of every task segment that it is busy, which is what hardware wants to hear too. QEMU's emulation of SVM lets a
/// program use the I/O ports that the kernel permitted it only while the segment it was given is an available one
/// (`check_io` in target/i386/tcg/seg_helper.c compares its type with 9).
fn system_registers(mut sregs: kvm_sregs) -> kvm_sregs {
    const BUSY: u8 = 0xb;
    const AVAILABLE: u8 = 9;
    if cpuid::host_is_emulated() && sregs.tr.type_ == BUSY {
        sregs.tr.type_ = AVAILABLE;
    }
    sregs
}

/// Reads those of `indices` that can be read.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut wanted: Vec<u32> = indices.to_vec();
    // See the constants.
    wanted.sort_by_key(|index| match *index {
        MSR_IA32_TSC => 0,
        MSR_IA32_TSC_DEADLINE => 2,
        _ => 1,
    });
    let mut all = Vec::with_capacity(wanted.len());
    let mut rest = wanted.as_slice();
    while !rest.is_empty() {
        let chunk: Vec<_> = rest
            .iter()
            .take(MSRS_AT_ONCE)
            .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
            .collect();
        let mut msrs = Msrs::from_entries(&chunk).map_err(|_| Error::KvmLacks("room for so many MSRs"))?;
        let read = vcpu.get_msrs(&mut msrs).map_err(Error::kvm("tell model-specific registers"))?;
        all.extend(msrs.as_slice().iter().take(read));
        // The one at which it stopped is listed, but not there.
        let done = if read < chunk.len() { read + 1 } else { read };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(all)
}

fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<()> {
    let mut rest = entries;
    while !rest.is_empty() {
        let chunk = rest.get(..MSRS_AT_ONCE).unwrap_or(rest);
        let msrs = Msrs::from_entries(chunk).map_err(|_| Error::KvmLacks("room for so many MSRs"))?;
        let set = vcpu.set_msrs(&msrs).map_err(Error::kvm("take over model-specific registers"))?;
        rest = match rest.get(set) {
            // One that is 0 as in every new processor need not be set: KVM lists some that it lets nobody write.
            Some(refused) if set < chunk.len() && refused.data == 0 => {
                rest.get(set + 1..).unwrap_or_default()
            }
            Some(refused) if set < chunk.len() => return Err(Error::Msr { index: refused.index }),
            _ => rest.get(set..).unwrap_or_default(),
        };
    }
    Ok(())
}

impl VmState {
    /// Takes what a machine's processors share while they stand still.
    ///
    /// # Errors
    /// When KVM does not tell.
    pub fn save(vm: &VmFd) -> Result<Self> {
        let irqchips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .into_iter()
            .map(|chip_id| {
                let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                vm.get_irqchip(&mut chip).map_err(Error::kvm("tell the interrupt controllers' state"))?;
                Ok(chip)
            })
            .collect::<Result<_>>()?;
        Ok(Self { irqchips, clock: vm.get_clock().map_err(Error::kvm("tell the guest's clock"))? })
    }

    /// Gives it to a new machine. The guest's clock goes on from where it stood: the time between does not pass for it.
    ///
    /// # Errors
    /// When KVM refuses a part of it.
    pub fn restore(&self, vm: &VmFd) -> Result<()> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip).map_err(Error::kvm("take over the interrupt controllers' state"))?;
        }
        let clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        vm.set_clock(&clock).map_err(Error::kvm("set the guest's clock"))
    }
}
