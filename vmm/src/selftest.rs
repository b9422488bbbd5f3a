//! Can the KVM of this host run Linux? Finds out in a few milliseconds, by running a tiny guest.
//!
//! A /dev/kvm that opens may still be useless: without VMX or SVM under it, some KVMs run the guest's kernel mode in an
//! instruction emulator that was made for a few instructions at boot, and lacks what every Linux kernel uses.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kvm_bindings::{CpuId, KVM_INTERNAL_ERROR_EMULATION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch::{layout, regs};
use crate::error::{Error, Result};
use crate::machine::open_kvm;
use crate::memory::{self, GuestMemory};

/// How long the tiny guest may take. It executes about twenty instructions.
const PATIENCE: Duration = Duration::from_millis(200);
const MEMORY: u64 = 1 << 20;
const CODE: u64 = 0x1_0000;
const IDT: u64 = 0x3_0000;
const IDT_POINTER: u64 = 0x3_0800;
/// The guest writes to this port when it is through.
const DONE_PORT: u16 = 0x80;
const BREAKPOINT: u64 = 3;

/// What was found, in words for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// KVM is there and runs what Linux needs.
    Usable,
    /// It does not.
    Unusable {
        /// What is wrong.
        found: String,
        /// What can be done about it.
        advice: String,
    },
}

impl Verdict {
    /// Whether Linux can run.
    pub fn is_usable(&self) -> bool {
        *self == Self::Usable
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Usable => write!(f, "KVM can run Linux"),
            Self::Unusable { found, advice } => write!(f, "{found}; {advice}"),
        }
    }
}

/// Finds out. Takes a few milliseconds, and a fifth of a second at the very worst.
pub fn run() -> Verdict {
    match open_kvm(None).and_then(|kvm| try_guest(&kvm)) {
        Ok(Ending::Done) => Verdict::Usable,
        Ok(ending) => Verdict::Unusable {
            found: format!("this KVM cannot run Linux: {ending}"),
            advice: ADVICE.to_owned(),
        },
        Err(error @ (Error::KvmOpen { .. } | Error::KvmLacks(_))) => {
            let text = error.to_string();
            // Those errors say themselves what to do, after the first full stop or semicolon.
            let (found, advice) = text.split_once([';', '.']).unwrap_or((&text, ""));
            Verdict::Unusable { found: found.to_owned(), advice: advice.trim().to_owned() }
        }
        Err(error) => {
            let cause = std::error::Error::source(&error).map_or(String::new(), |cause| format!(": {cause}"));
            Verdict::Unusable { found: format!("{error}{cause}"), advice: ADVICE.to_owned() }
        }
    }
}

const ADVICE: &str = "use a host whose processor has VT-x or AMD-V switched on (inside a virtual machine: nested \
     virtualisation), or the emulated KVM host of the tests";

/// How the tiny guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ending {
    Done,
    Emulation(&'static str),
    Hang,
    Other(String),
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Done => write!(f, "it can"),
            Self::Emulation(instruction) => write!(
                f,
                "it runs the guest's kernel in an instruction emulator that lacks `{instruction}`, for want of hardware \
                 virtualisation"
            ),
            Self::Hang => write!(f, "a guest of twenty instructions does not come to its end"),
            Self::Other(what) => write!(f, "a guest of twenty instructions ended with {what}"),
        }
    }
}

/// One instruction that Linux uses, with what it needs around it.
struct Step {
    name: &'static str,
    code: &'static [u8],
}

const fn step(name: &'static str, code: &'static [u8]) -> Step {
    Step { name, code }
}

/// The instructions to try, as far as this processor is said to have them.
fn steps(features: &CpuId) -> Vec<Step> {
    let leaf = |function, index| {
        features.as_slice().iter().find(move |entry| entry.function == function && entry.index == index)
    };
    let one = leaf(1, 0).map_or(0, |entry| entry.ecx);
    let seven = leaf(7, 0).map_or(0, |entry| entry.ebx);
    let mut steps = vec![
        step("fninit", &[0xdb, 0xe3]),
        step("fwait", &[0x9b]),
        step("lidt", &[0x0f, 0x01, 0x1c, 0x25, 0x00, 0x08, 0x03, 0x00]),
    ];
    if one & (1 << 23) != 0 {
        // mov $0xff,%ecx; popcnt %ecx,%eax
        steps.push(step("popcnt", &[0xb9, 0xff, 0, 0, 0, 0xf3, 0x0f, 0xb8, 0xc1]));
    }
    if one & (1 << 26) != 0 {
        // mov %cr4,%rax; or $OSXSAVE,%eax; mov %rax,%cr4
        steps.push(step("mov cr4", &[0x0f, 0x20, 0xe0, 0x0d, 0, 0, 4, 0, 0x0f, 0x22, 0xe0]));
        // xor %ecx,%ecx; xgetbv
        steps.push(step("xgetbv", &[0x31, 0xc9, 0x0f, 0x01, 0xd0]));
        // To 0x31000, which is free.
        steps.push(step("xsave", &[0x0f, 0xae, 0x24, 0x25, 0x00, 0x10, 0x03, 0x00]));
    }
    if seven & (1 << 20) != 0 {
        steps.push(step("clac", &[0x0f, 0x01, 0xca]));
    }
    steps.push(step("int3", &[0xcc]));
    // mov $1,%al; out %al,$0x80
    steps.push(step("out", &[0xb0, 1, 0xe6, DONE_PORT as u8]));
    steps
}

fn try_guest(kvm: &Kvm) -> Result<Ending> {
    let vm = kvm.create_vm().map_err(Error::kvm("create a virtual machine"))?;
    let memory = memory::create(MEMORY)?;
    memory::register(&vm, &memory)?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(Error::kvm("place its identity map"))?;
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(Error::kvm("place its task segment"))?;
    let features = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("tell its features"))?;
    let steps = steps(&features);
    write_guest(&memory, &steps)?;

    let vcpu = vm.create_vcpu(0).map_err(Error::kvm("create a vCPU"))?;
    vcpu.set_cpuid2(&features).map_err(Error::kvm("set a vCPU's features"))?;
    regs::set_boot_registers(&vcpu, CODE)?;
    run_guest(vcpu, steps)
}

/// Tables as for Linux, the steps one after the other, and a handler that returns from the breakpoint.
fn write_guest(memory: &GuestMemory, steps: &[Step]) -> Result<()> {
    regs::write_tables(memory)?;
    let mut code: Vec<u8> = steps.iter().flat_map(|step| step.code).copied().collect();
    // Nobody gets here: hlt.
    code.push(0xf4);
    let handler = CODE + code.len() as u64;
    // iretq
    code.extend([0x48, 0xcf]);
    // Interrupt gate of 64-bit mode to the boot code segment: offset 15..0, selector, present, offset 63..16.
    let gate = (handler & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    let mut pointer = vec![0xff, 0x0f];
    pointer.extend(IDT.to_le_bytes());
    for (bytes, address) in
        [(code, CODE), (gate.to_le_bytes().to_vec(), IDT + 16 * BREAKPOINT), (pointer, IDT_POINTER)]
    {
        memory.write_slice(&bytes, GuestAddress(address)).map_err(Error::guest_memory("self-test"))?;
    }
    Ok(())
}

/// Runs it in a thread of its own, which can be interrupted.
fn run_guest(mut vcpu: VcpuFd, steps: Vec<Step>) -> Result<Ending> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), ignore).map_err(Error::os("handle the vCPU signal"))?;
    let (sender, receiver) = mpsc::channel();
    let thread = thread::Builder::new()
        .name("kvm-self-test".to_owned())
        .spawn(move || {
            // The other end waits, or has given up.
            let _ = sender.send(ending(&mut vcpu, &steps));
        })
        .map_err(Error::os("start a thread"))?;
    match receiver.recv_timeout(PATIENCE) {
        Ok(ending) => {
            // It has nothing left to do.
            let _ = thread.join();
            Ok(ending)
        }
        Err(_) => {
            // Should even this fail to stop it, it ends with the process.
            let _ = thread.kill(SIGRTMIN());
            Ok(Ending::Hang)
        }
    }
}

fn ending(vcpu: &mut VcpuFd, steps: &[Step]) -> Ending {
    match vcpu.run() {
        Ok(VcpuExit::InternalError) => {}
        Ok(VcpuExit::IoOut(DONE_PORT, [1])) => return Ending::Done,
        Ok(exit) => return Ending::Other(format!("{exit:?}")),
        Err(error) if error.errno() == libc::EINTR => return Ending::Hang,
        Err(error) => return Ending::Other(format!("{error}")),
    }
    // SAFETY: the exit reason was an internal error, for which KVM fills this member; it is a plain number.
    let suberror = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
    let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
    if suberror == KVM_INTERNAL_ERROR_EMULATION {
        Ending::Emulation(at(steps, rip))
    } else {
        Ending::Other(format!("KVM internal error {suberror}"))
    }
}

/// The step that has its code at `rip`.
fn at(steps: &[Step], rip: u64) -> &'static str {
    let mut end = CODE;
    for step in steps {
        end += step.code.len() as u64;
        if rip < end {
            return step.name;
        }
    }
    "iretq"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_comes_quickly_and_has_words() {
        let start = std::time::Instant::now();
        let verdict = run();
        let took = start.elapsed();
        eprintln!("{verdict} ({took:?})");
        assert!(took < PATIENCE, "{took:?}");
        if let Verdict::Unusable { found, advice } = verdict {
            assert!(!found.is_empty() && !advice.is_empty());
        }
    }

    #[test]
    fn the_failing_step_is_named() {
        let steps = [step("a", &[1, 2]), step("b", &[3])];
        assert_eq!(at(&steps, CODE), "a");
        assert_eq!(at(&steps, CODE + 1), "a");
        assert_eq!(at(&steps, CODE + 2), "b");
        assert_eq!(at(&steps, CODE + 3), "iretq");
    }
}
