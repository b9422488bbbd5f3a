//! Tiny guests, written by hand, and the monitor that runs them.

#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// Where the tiny guests' code is loaded and entered.
pub const ENTRY: u32 = 0x20_0000;

/// Machine code of 64-bit mode, put together piece by piece, and what lies in memory beside it.
#[derive(Default, Clone)]
pub struct Guest {
    code: Vec<u8>,
    data: Vec<(u32, Vec<u8>)>,
}

impl Guest {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn raw(mut self, code: &[u8]) -> Self {
        self.code.extend(code);
        self
    }

    /// Bytes that are in memory at `address` from the beginning.
    pub fn place(mut self, address: u32, bytes: impl Into<Vec<u8>>) -> Self {
        self.data.push((address, bytes.into()));
        self
    }

    /// After it, another one: code goes on, and its data is there, too.
    pub fn then(mut self, other: &Self) -> Self {
        self.data.extend(other.data.iter().cloned());
        self.raw(&other.code)
    }

    /// What `body` adds, so many times. It must leave %ebp alone.
    pub fn times(self, count: u32, body: impl FnOnce(Self) -> Self) -> Self {
        // mov $count,%ebp; 1: body; dec %ebp; jnz 1b
        let head = self.raw(&[0xbd]).raw(&count.to_le_bytes());
        let start = head.code.len();
        let looped = body(head).raw(&[0xff, 0xcd]);
        let back = start as i64 - (looped.code.len() as i64 + 6);
        looped.raw(&[0x0f, 0x85]).raw(&(back as i32).to_le_bytes())
    }

    /// mov $value,%eax
    pub fn eax(self, value: u32) -> Self {
        self.raw(&[0xb8]).raw(&value.to_le_bytes())
    }

    /// mov $port,%edx
    fn port(self, port: u16) -> Self {
        self.raw(&[0xba]).raw(&u32::from(port).to_le_bytes())
    }

    /// out %al,(%dx)
    pub fn out8(self, port: u16, value: u8) -> Self {
        self.port(port).raw(&[0xb0, value, 0xee])
    }

    /// out %eax,(%dx) of what is in %eax
    pub fn out32(self, port: u16) -> Self {
        self.port(port).raw(&[0xef])
    }

    /// in (%dx),%al
    pub fn in8(self, port: u16) -> Self {
        self.port(port).raw(&[0xec])
    }

    /// mov address,%ebx; mov (%rbx),%eax
    pub fn load(self, address: u32) -> Self {
        self.raw(&[0xbb]).raw(&address.to_le_bytes()).raw(&[0x8b, 0x03])
    }

    /// mov address,%ebx; movl value,(%rbx)
    pub fn store(self, address: u32, value: u32) -> Self {
        self.raw(&[0xbb]).raw(&address.to_le_bytes()).raw(&[0xc7, 0x03]).raw(&value.to_le_bytes())
    }

    /// Maps the 2 MiB with the virtio windows, which the boot page tables leave out: PDPT entry 3 to a PD at 0xc000, and
    /// there entry 128 to 0xd0000000, uncached.
    pub fn map_devices(self) -> Self {
        self.store(0xc000 + 128 * 8, 0xd000_0093).store(0xa000 + 3 * 8, 0xc003)
    }

    /// Maps the GiB after the first, with which the boot page tables end: PDPT entry 1 to a PD at 0xc000 with pages of 2 MiB.
    pub fn map_second_gib(self) -> Self {
        // mov $0xc000,%ebx; mov $0x40000083,%eax; mov $512,%ecx
        self.raw(&[0xbb, 0, 0xc0, 0, 0, 0xb8, 0x83, 0, 0, 0x40, 0xb9, 0, 2, 0, 0])
            // 1: mov %eax,(%rbx); movl $0,4(%rbx); add $8,%ebx; add $0x200000,%eax; dec %ecx; jnz 1b
            .raw(&[0x89, 0x03, 0xc7, 0x43, 4, 0, 0, 0, 0, 0x83, 0xc3, 8, 5, 0, 0, 0x20, 0])
            .raw(&[0xff, 0xc9, 0x75, 0xeb])
            .store(0xa008, 0xc003)
    }

    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |guest, byte| guest.out8(0x3f8, byte))
    }

    pub fn mark(self, value: u8) -> Self {
        self.out8(0xb40, value)
    }

    /// Ends with this status.
    pub fn exit(self, status: u32) -> Self {
        self.eax(status).exit_with_eax()
    }

    pub fn exit_with_eax(self) -> Self {
        self.out32(0xb44).spin()
    }

    /// Ends as a kernel with reboot=k reboots.
    pub fn reboot(self) -> Self {
        self.out8(0x64, 0xfe).spin()
    }

    /// Writes ones to this many bytes: mov address,%edi; mov count,%ecx; mov $-1,%eax; rep stosq
    pub fn fill(self, address: u32, bytes: u32) -> Self {
        self.raw(&[0xbf])
            .raw(&address.to_le_bytes())
            .raw(&[0xb9])
            .raw(&(bytes / 8).to_le_bytes())
            .eax(u32::MAX)
            .raw(&[0xf3, 0x48, 0xab])
    }

    /// mov $times,%ecx; loop .
    pub fn count(self, times: u32) -> Self {
        self.raw(&[0xb9]).raw(&times.to_le_bytes()).raw(&[0xe2, 0xfe])
    }

    /// Writes a byte of each of so many pages of 4 KiB from `address` on.
    pub fn touch(self, address: u32, pages: u32) -> Self {
        // mov address,%ebx; mov pages,%ecx; 1: mov %cl,(%rbx); add $4096,%ebx; dec %ecx; jnz 1b
        self.raw(&[0xbb])
            .raw(&address.to_le_bytes())
            .raw(&[0xb9])
            .raw(&pages.to_le_bytes())
            .raw(&[0x88, 0x0b, 0x81, 0xc3, 0, 0x10, 0, 0, 0xff, 0xc9, 0x75, 0xf4])
    }

    /// jmp .
    pub fn spin(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    /// 1: hlt; jmp 1b
    pub fn halt(self) -> Self {
        self.raw(&[0xf4, 0xeb, 0xfd])
    }

    /// An exception with no handlers: an empty interrupt table (it is loaded from the zeros at 0x3000), then ud2.
    pub fn triple_fault(self) -> Self {
        self.raw(&[0x0f, 0x01, 0x1c, 0x25, 0x00, 0x30, 0, 0]).raw(&[0x0f, 0x0b]).spin()
    }

    /// An ELF file: a segment of code, and one for each piece of data.
    pub fn elf(&self) -> Vec<u8> {
        // Code may use a page after its end.
        let code = (ENTRY, &self.code, self.code.len() + 4096);
        let data = self.data.iter().map(|(address, bytes)| (*address, bytes, bytes.len()));
        let segments: Vec<_> = std::iter::once(code).chain(data).collect();
        let mut elf = Vec::new();
        elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        elf.extend(2_u16.to_le_bytes());
        elf.extend(62_u16.to_le_bytes());
        elf.extend(1_u32.to_le_bytes());
        elf.extend(u64::from(ENTRY).to_le_bytes());
        elf.extend(64_u64.to_le_bytes());
        elf.extend(0_u64.to_le_bytes());
        elf.extend(0_u32.to_le_bytes());
        for half in [64_u16, 56, segments.len() as u16, 0, 0, 0] {
            elf.extend(half.to_le_bytes());
        }
        let mut offset = (64 + 56 * segments.len() as u64).next_multiple_of(4096);
        let mut content = Vec::new();
        for (address, bytes, in_memory) in segments {
            elf.extend(1_u32.to_le_bytes());
            elf.extend(7_u32.to_le_bytes());
            let (address, length) = (u64::from(address), bytes.len() as u64);
            for word in [offset, address, address, length, in_memory as u64, 4096] {
                elf.extend(word.to_le_bytes());
            }
            content.resize(content.len().next_multiple_of(4096), 0);
            content.extend(bytes);
            offset += length.next_multiple_of(4096);
        }
        elf.resize(elf.len().next_multiple_of(4096), 0);
        elf.extend(content);
        elf
    }
}

/// A place for one test's files.
pub struct Place(TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// The monitor, with this guest as its kernel and a report.
    pub fn monitor(&self, guest: &Guest) -> Command {
        let kernel = self.write("kernel", guest.elf());
        let mut command = monitor();
        command.arg("--kernel").arg(kernel).arg("--report").arg(self.path("report"));
        command
    }

    pub fn report(&self) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.path("report")).unwrap()).unwrap()
    }
}

pub fn monitor() -> Command {
    Command::new(env!("CARGO_BIN_EXE_bulkhead-vmm"))
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Whether guests can run here at all. Tests that need it say so when they are skipped.
pub fn kvm() -> bool {
    let there = Path::new("/dev/kvm").exists() && kvm_ioctls::Kvm::new().is_ok();
    if !there {
        eprintln!("SKIPPED: /dev/kvm cannot be opened here");
    }
    there
}
