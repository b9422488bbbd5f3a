//! What is said when a thread makes a system call that it may not make. Then the process ends by SIGSYS, as if the kernel had
//! ended it at once.

use std::io;

use syscalls::Sysno;

/// Longest report.
const ROOM: usize = 256;
/// `siginfo_t` of SIGSYS: the call's number follows signal, error, code and the address of the instruction (`sigaction(2)`).
const NUMBER_AT: usize = 24;

/// Has refused calls reported on standard error.
///
/// # Errors
/// When the handler cannot be installed.
pub fn report_to_log() -> io::Result<()> {
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_refusal;
    // SAFETY: a sigaction of zeros is valid: no flags but those set here, an empty mask. The handler does nothing but what is
    // allowed in one.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn on_refusal(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let mut thread = [0_u8; 16];
    // SAFETY: the kernel hands over a siginfo_t of SIGSYS and a ucontext_t, both valid until the handler returns, in which the
    // number and the registers are plain numbers; PR_GET_NAME writes at most 16 bytes.
    let (number, arguments) = unsafe {
        libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr());
        let number = info.cast::<u8>().add(NUMBER_AT).cast::<libc::c_int>().read_unaligned();
        let registers = &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let argument = |register: libc::c_int| registers[register as usize].cast_unsigned();
        (number, [argument(libc::REG_RDI), argument(libc::REG_RSI), argument(libc::REG_RDX)])
    };
    let mut text = Text { bytes: [0; ROOM], length: 0 };
    text.words("bulkhead-vmm: system call ");
    text.decimal(number.unsigned_abs().into());
    text.words(" (");
    text.words(usize::try_from(number).ok().and_then(Sysno::new).map_or("unknown", |call| call.name()));
    text.words(") refused in thread ");
    text.words(thread_name(&thread));
    text.words(", its arguments:");
    for argument in arguments {
        text.words(" 0x");
        text.hexadecimal(argument);
    }
    text.words("; this is either an attack or an error of bulkhead's, see docs/troubleshooting.md\n");
    // SAFETY: as many bytes of the buffer as were filled. What follows is a call that no filter allows: the signal that it brings
    // is blocked in its own handler, for which the kernel ends the process by it. That works for the first process of a
    // pid namespace, too, which no signal of its own could end.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.bytes.as_ptr().cast(), text.length);
        libc::syscall(libc::SYS_personality, 0xffff_ffff_u64);
        libc::_exit(128 + libc::SIGSYS);
    }
}

fn thread_name(bytes: &[u8; 16]) -> &str {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.get(..end).and_then(|name| std::str::from_utf8(name).ok()).unwrap_or("?")
}

/// Text that is put together without allocating.
struct Text {
    bytes: [u8; ROOM],
    length: usize,
}

impl Text {
    fn words(&mut self, words: &str) {
        for byte in words.bytes() {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
    }

    fn decimal(&mut self, number: u64) {
        self.digits(number, 10);
    }

    fn hexadecimal(&mut self, number: u64) {
        self.digits(number, 16);
    }

    fn digits(&mut self, number: u64, base: u64) {
        let mut divisor = 1;
        while number / divisor >= base {
            divisor *= base;
        }
        while divisor > 0 {
            let digit = char::from_digit((number / divisor % base) as u32, base as u32).unwrap_or('?');
            self.words(digit.encode_utf8(&mut [0; 4]));
            divisor /= base;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_they_are_everywhere() {
        for number in [0, 1, 9, 10, 255, 4096, u64::MAX] {
            let mut text = Text { bytes: [0; ROOM], length: 0 };
            text.decimal(number);
            text.words(" ");
            text.hexadecimal(number);
            let text = std::str::from_utf8(&text.bytes[..text.length]).unwrap();
            assert_eq!(text, format!("{number} {number:x}"));
        }
    }

    #[test]
    fn a_report_that_is_too_long_is_cut() {
        let mut text = Text { bytes: [0; ROOM], length: 0 };
        text.words(&"x".repeat(ROOM + 10));
        assert_eq!(text.length, ROOM);
    }
}
