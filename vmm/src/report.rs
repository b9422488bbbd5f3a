//! What is left behind when the machine ends: a JSON report for programs, a crash report for people.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::exit::Outcome;
use crate::memory::GuestMemory;
use crate::timeline::Event;
use crate::vcpu::exit::Cause;

/// Bytes of console output shown with a crash.
pub const CRASH_TAIL: usize = 4096;
/// Longest instruction of the architecture, rounded up.
const INSTRUCTION_BYTES: usize = 16;

/// Everything about a machine that has ended.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// `exited`, `reboot`, `panic`, `crash`, `quit` or `signal`.
    pub outcome: &'static str,
    /// Exit status of the monitor.
    pub exit_status: u8,
    /// What happened when.
    pub timeline: Vec<Event>,
    /// What devices counted.
    pub metrics: serde_json::Value,
    /// Why a vCPU could not go on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crash: Option<Crash>,
    /// What the guest printed last.
    pub console_tail: String,
}

impl Report {
    /// Opens the file for it, which is empty until the machine has ended: by then the monitor can open nothing any more.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(path: &Path) -> io::Result<File> {
        File::options().write(true).create(true).truncate(true).mode(0o600).open(path)
    }

    /// Writes the report.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, mut file: &File) -> io::Result<()> {
        file.write_all(&serde_json::to_vec(self)?)
    }

    /// The words for people when the machine did not end as its guest wished; `None` when it did.
    pub fn complaint(&self, outcome: &Outcome) -> Option<String> {
        let mut text = match (outcome, &self.crash) {
            (Outcome::Panic, None) => "the guest kernel panicked\n".to_owned(),
            (Outcome::Panic, Some(crash)) => format!("the guest kernel panicked\n{crash}"),
            (_, Some(crash)) => crash.to_string(),
            _ => return None,
        };
        if self.console_tail.is_empty() {
            text.push_str("the guest printed nothing\n");
        } else {
            text.push_str("the guest printed last:\n");
            for line in self.console_tail.lines() {
                let _ = writeln!(text, "  | {}", line.trim_end());
            }
        }
        Some(text)
    }
}

/// Why a vCPU could not go on, and its state at that moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Crash {
    /// What happened, in a sentence.
    pub what: String,
    /// What to do about it, if anything is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The vCPU.
    pub vcpu: u8,
    /// KVM's suberror, for internal errors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suberror: Option<u32>,
    /// Instruction pointer.
    pub rip: u64,
    /// The bytes there, in hexadecimal; empty when they cannot be read.
    pub instruction: String,
    /// Names and values of general and control registers.
    pub registers: Vec<(String, u64)>,
}

impl Crash {
    /// Gathers what can be known about vCPU `id`, which stopped because of `cause`.
    pub fn of(id: u8, vcpu: &mut VcpuFd, memory: &GuestMemory, cause: Cause) -> Self {
        let mut instruction = None;
        let mut suberror = None;
        let mut hint = None;
        let what = match cause {
            Cause::TripleFault => {
                "triple fault: the guest could not handle an exception, or reset itself that way (reboot=t)"
                    .to_owned()
            }
            Cause::InternalError => {
                // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, for which KVM fills these unions; all of their
                // fields are plain numbers.
                let failure = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.emulation_failure };
                suberror = Some(failure.suberror);
                if failure.suberror == KVM_INTERNAL_ERROR_EMULATION {
                    hint = Some(EMULATION_HINT.to_owned());
                    let flagged =
                        failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
                    if failure.ndata >= 3 && flagged {
                        // SAFETY: as above; KVM says by the flag that it filled this arm.
                        let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
                        let length = usize::from(bytes.insn_size).min(bytes.insn_bytes.len());
                        instruction = Some(bytes.insn_bytes[..length].to_vec());
                    }
                    "KVM internal error: it cannot emulate an instruction".to_owned()
                } else {
                    format!("KVM internal error, suberror {}", failure.suberror)
                }
            }
            Cause::FailedEntry(reason) => {
                format!("the processor refused to enter the guest, hardware reason {reason:#x}")
            }
            Cause::RunFailed(number) => format!("KVM_RUN failed: {}", io::Error::from_raw_os_error(number)),
            Cause::Unexpected(exit) => format!("unexpected exit from the guest: {exit}"),
        };
        let mut registers = Vec::new();
        let mut rip = 0;
        if let Ok(regs) = vcpu.get_regs() {
            rip = regs.rip;
            let general = [
                ("rax", regs.rax),
                ("rbx", regs.rbx),
                ("rcx", regs.rcx),
                ("rdx", regs.rdx),
                ("rsi", regs.rsi),
                ("rdi", regs.rdi),
                ("rsp", regs.rsp),
                ("rbp", regs.rbp),
                ("rflags", regs.rflags),
            ];
            registers.extend(general.map(|(name, value)| (name.to_owned(), value)));
        }
        if let Ok(sregs) = vcpu.get_sregs() {
            let control = [
                ("cr0", sregs.cr0),
                ("cr2", sregs.cr2),
                ("cr3", sregs.cr3),
                ("cr4", sregs.cr4),
                ("efer", sregs.efer),
            ];
            registers.extend(control.map(|(name, value)| (name.to_owned(), value)));
        }
        let instruction =
            instruction.filter(|bytes| !bytes.is_empty()).unwrap_or_else(|| code_at(vcpu, memory, rip));
        let instruction = instruction.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
        Self { what, hint, vcpu: id, suberror, rip, instruction, registers }
    }
}

const EMULATION_HINT: &str = "this KVM emulates instructions that others let the processor run: it may be unable to run \
     Linux at all; `bulkhead doctor` tests that";

fn code_at(vcpu: &VcpuFd, memory: &GuestMemory, rip: u64) -> Vec<u8> {
    let Ok(translation) = vcpu.translate_gva(rip) else { return Vec::new() };
    let mut bytes = vec![0; INSTRUCTION_BYTES];
    let read = if translation.valid == 0 {
        0
    } else {
        memory.read(&mut bytes, GuestAddress(translation.physical_address)).unwrap_or(0)
    };
    bytes.truncate(read);
    bytes
}

impl std::fmt::Display for Crash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "vCPU {}: {}", self.vcpu, self.what)?;
        writeln!(f, "  rip {:#x}, instruction bytes [{}]", self.rip, self.instruction)?;
        for chunk in self.registers.chunks(3) {
            let words: Vec<_> =
                chunk.iter().map(|(name, value)| format!("{name:>6} {value:#018x}")).collect();
            writeln!(f, "  {}", words.join("  "))?;
        }
        if let Some(hint) = &self.hint {
            writeln!(f, "  {hint}")?;
        }
        Ok(())
    }
}
