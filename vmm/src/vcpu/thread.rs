//! The threads in which vCPUs run.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::exit::{Next, dispatch};
use super::gate::{Gate, Sample};
use crate::arch::state::VcpuState;
use crate::bus::Bus;
use crate::error::{Error, Result};
use crate::exit::{ExitRequest, Outcome};
use crate::jail::{self, Kind};
use crate::memory::GuestMemory;
use crate::report::Crash;
use crate::sync::lock;
use crate::timeline::Timeline;

/// One vCPU before it runs, and what its exits need.
pub struct Vcpu {
    /// APIC id; 0 is the boot processor.
    pub id: u8,
    /// KVM's vCPU.
    pub fd: VcpuFd,
    /// What it was told that it is.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// I/O ports.
    pub ports: Arc<Bus>,
    /// Memory-mapped registers.
    pub mmio: Arc<Bus>,
    /// Guest memory, to read the instruction that failed.
    pub memory: Arc<GuestMemory>,
    /// Ends the machine.
    pub exit: ExitRequest,
    /// Notes the first entry into the guest.
    pub timeline: Arc<Timeline>,
}

/// All vCPU threads of the machine.
pub struct Vcpus {
    gate: Arc<Gate<VcpuFd>>,
    handles: Vec<Handle>,
}

struct Handle {
    thread: JoinHandle<()>,
    immediate_exit: ImmediateExit,
    cpuid: Arc<[kvm_cpuid_entry2]>,
}

/// The byte in KVM's shared page that makes the next entry return at once. With it, a signal that comes just before the
/// entry is not lost.
#[derive(Clone, Copy)]
struct ImmediateExit(*mut u8);

// SAFETY: only accessed atomically, see `byte`.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn of(vcpu: &mut VcpuFd) -> Self {
        Self(&raw mut vcpu.get_kvm_run().immediate_exit)
    }

    fn byte(&self) -> &AtomicU8 {
        // SAFETY: the page is mapped as long as the `VcpuFd`, which its thread owns and which is never dropped (see
        // `Vcpu::run`). KVM itself only reads the byte.
        unsafe { AtomicU8::from_ptr(self.0) }
    }
}

impl Vcpus {
    /// Starts the threads; the guest runs from here on.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn start(vcpus: Vec<Vcpu>) -> Result<Self> {
        register_signal_handler(SIGRTMIN(), ignore).map_err(Error::os("handle the vCPU signal"))?;
        let gate = Arc::new(Gate::new(vcpus.len()));
        let mut handles = Vec::with_capacity(vcpus.len());
        for mut vcpu in vcpus {
            let immediate_exit = ImmediateExit::of(&mut vcpu.fd);
            let gate = Arc::clone(&gate);
            let cpuid = std::mem::take(&mut vcpu.cpuid).into();
            let thread = thread::Builder::new()
                .name(format!("vcpu{}", vcpu.id))
                .spawn(move || vcpu.run(&gate))
                .map_err(Error::os("start a vCPU thread"))?;
            handles.push(Handle { thread, immediate_exit, cpuid });
        }
        Ok(Self { gate, handles })
    }

    /// Makes all stand still. False when one did not in time; it will as soon as it can.
    pub fn pause(&self) -> bool {
        self.gate.pause(|| self.kick())
    }

    /// Lets all run again.
    pub fn resume(&self) {
        self.gate.resume();
    }

    /// Whether they are made to stand still.
    pub fn paused(&self) -> bool {
        self.gate.paused()
    }

    /// Where each of them is.
    pub fn samples(&self) -> Vec<Sample> {
        self.gate.samples(|| self.kick())
    }

    /// The state of each, in order. They must stand still.
    ///
    /// # Errors
    /// When one does not answer in time, or KVM does not tell.
    pub fn save(&self, msrs: &[u32]) -> Result<Vec<VcpuState>> {
        let saved: Arc<Mutex<Vec<_>>> = Arc::new(Mutex::new(self.handles.iter().map(|_| None).collect()));
        let errand = {
            let (saved, msrs) = (Arc::clone(&saved), msrs.to_vec());
            let cpuids: Vec<_> = self.handles.iter().map(|handle| Arc::clone(&handle.cpuid)).collect();
            Arc::new(move |index: usize, fd: &VcpuFd| {
                if let (Some(slot), Some(cpuid)) = (lock(&saved).get_mut(index), cpuids.get(index)) {
                    *slot = Some(VcpuState::save(fd, cpuid, &msrs));
                }
            })
        };
        self.gate.send(errand, || self.kick());
        let mut saved = lock(&saved);
        let silent = || Error::Unsaveable("a vCPU does not answer".to_owned());
        saved.iter_mut().map(|slot| slot.take().ok_or_else(silent)?).collect()
    }

    /// Interrupts all.
    fn kick(&self) {
        for handle in &self.handles {
            handle.immediate_exit.byte().store(1, Ordering::SeqCst);
            // Fails only for a thread that has ended.
            let _ = handle.thread.kill(SIGRTMIN());
            // For one that stands still because its guest cannot go on.
            handle.thread.thread().unpark();
        }
    }
}

/// Interrupting KVM_RUN is all the signal is for.
extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpu {
    fn run(mut self, gate: &Gate<VcpuFd>) {
        let immediate_exit = ImmediateExit::of(&mut self.fd);
        if let Err(error) = jail::confine(Kind::Vcpu) {
            eprintln!("bulkhead-vmm: the system calls of vCPU {} cannot be restricted: {error}", self.id);
            return self.exit.request(Outcome::DeviceLost);
        }
        if self.id == 0 {
            self.timeline.mark("first-run");
        }
        let state = loop {
            match dispatch(self.fd.run(), &self.ports, &self.mmio) {
                // What the guest just did may have been to end the machine.
                Next::Enter if self.exit.outcome().is_some() => break "ended",
                Next::Enter => {}
                Next::Interrupted => {
                    immediate_exit.byte().store(0, Ordering::SeqCst);
                    gate.pass(usize::from(self.id), &self.fd, || self.sample());
                }
                Next::Crash(cause) => {
                    let crash = Crash::of(self.id, &mut self.fd, &self.memory, cause);
                    self.exit.crash(crash);
                    break "crashed";
                }
            }
        };
        // The process ends soon. Until then others may want to know, or kick: the page must stay.
        loop {
            let sample = || Sample { state: state.to_owned(), ..self.sample() };
            gate.pass(usize::from(self.id), &self.fd, sample);
            thread::park();
        }
    }

    fn sample(&self) -> Sample {
        let state = match self.fd.get_mp_state().map(|state| state.mp_state) {
            Ok(kvm_bindings::KVM_MP_STATE_RUNNABLE) => "running",
            Ok(kvm_bindings::KVM_MP_STATE_HALTED) => "halted",
            Ok(_) => "waiting",
            Err(_) => "unknown",
        };
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        Sample { state: state.to_owned(), rip }
    }
}
