//! Loads the kernel: an ELF vmlinux segment by segment, a bzImage with linux-loader.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::bootparam::setup_header;
use linux_loader::elf;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress};

use super::layout;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::memory::place::{Placement, Way, place};

/// Program headers beyond this number are no kernel.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// Offset of the setup header in a bzImage and in the zero page.
const SETUP_HEADER: u64 = 0x1f1;
/// "HdrS".
const BZIMAGE_MAGIC: u32 = 0x5372_6448;
/// Flag of a bzImage that has a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// Where a bzImage's 64-bit entry point is.
const BZIMAGE_ENTRY_64: u64 = 0x200;

/// A kernel file that was understood, not yet loaded.
#[derive(Debug)]
pub struct Kernel {
    file: File,
    format: Format,
}

#[derive(Debug)]
enum Format {
    Elf { entry: u64, segments: Vec<Placement>, end: u64 },
    BzImage { header: setup_header },
}

impl Kernel {
    /// Opens and understands the kernel file `path`.
    ///
    /// # Errors
    /// When it cannot be read or is neither an x86-64 ELF vmlinux nor a 64-bit bzImage.
    pub fn open(path: &Path) -> Result<Self> {
        let input = |source| Error::Input { what: "kernel", path: path.to_owned(), source };
        let bad = |reason: String| Error::BadKernel { path: path.to_owned(), reason };
        let file = File::open(path).map_err(input)?;
        let mut magic = [0; 4];
        file.read_exact_at(&mut magic, 0).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => bad("the file is empty or only a few bytes long".to_owned()),
            _ => input(source),
        })?;
        let format = if magic == *b"\x7fELF" {
            parse_elf(&file).map_err(bad)?
        } else {
            parse_bzimage(&file).map_err(bad)?
        };
        Ok(Self { file, format })
    }

    /// First guest physical address after the kernel, its uninitialised data included.
    pub fn end(&self) -> u64 {
        match &self.format {
            Format::Elf { end, .. } => *end,
            Format::BzImage { header } => {
                u64::from(header.code32_start).max(header.pref_address) + u64::from(header.init_size)
            }
        }
    }

    /// Highest address at which the kernel accepts the last byte of an initramfs.
    pub fn initramfs_limit(&self) -> u64 {
        match &self.format {
            Format::Elf { .. } => u64::from(u32::MAX),
            Format::BzImage { header } => u64::from(header.initrd_addr_max),
        }
    }

    /// The setup header for the zero page; an ELF kernel has none.
    pub fn setup_header(&self) -> Option<setup_header> {
        match &self.format {
            Format::Elf { .. } => None,
            Format::BzImage { header } => Some(*header),
        }
    }

    /// Puts the kernel into memory and tells its 64-bit entry point.
    ///
    /// # Errors
    /// When the file is cut short or does not fit.
    pub fn load(&mut self, memory: &GuestMemory, path: &Path, way: Way) -> Result<u64> {
        match &self.format {
            Format::Elf { entry, segments, .. } => {
                for segment in segments {
                    place(memory, &self.file, *segment, way).map_err(|source| Error::BadKernel {
                        path: path.to_owned(),
                        reason: format!("its segment for {:#x} cannot be loaded: {source}", segment.address),
                    })?;
                }
                Ok(*entry)
            }
            Format::BzImage { .. } => {
                let high = Some(GuestAddress(layout::HIGH_MEMORY));
                let loaded = BzImage::load(memory, None, &mut self.file, high)
                    .map_err(|error| Error::BadKernel { path: path.to_owned(), reason: error.to_string() })?;
                Ok(loaded.kernel_load.0 + BZIMAGE_ENTRY_64)
            }
        }
    }
}

fn parse_elf(file: &File) -> Result<Format, String> {
    const CUT: &str = "it is an ELF file, but cut short";
    let mut header = elf::Elf64_Ehdr::default();
    file.read_exact_at(header.as_mut_slice(), 0).map_err(|_| CUT)?;
    if header.e_ident[elf::EI_CLASS] != elf::ELFCLASS64
        || header.e_ident[elf::EI_DATA] != elf::ELFDATA2LSB
        || header.e_machine != elf::EM_X86_64
    {
        return Err("it is an ELF file, but not for 64-bit x86".to_owned());
    }
    if usize::from(header.e_phentsize) != size_of::<elf::Elf64_Phdr>() || header.e_phnum > MAX_PROGRAM_HEADERS
    {
        return Err("it is an ELF file, but its program headers are no kernel's".to_owned());
    }
    let (mut segments, mut end) = (Vec::new(), 0);
    for index in 0..u64::from(header.e_phnum) {
        let mut segment = elf::Elf64_Phdr::default();
        let offset = index * size_of::<elf::Elf64_Phdr>() as u64;
        let offset = header.e_phoff.checked_add(offset).ok_or(CUT)?;
        file.read_exact_at(segment.as_mut_slice(), offset).map_err(|_| CUT)?;
        if segment.p_type != elf::PT_LOAD || segment.p_memsz == 0 {
            continue;
        }
        let last = segment.p_paddr.checked_add(segment.p_memsz);
        match last {
            Some(last) if last <= layout::HOLE_START && segment.p_filesz <= segment.p_memsz => {
                end = end.max(last);
            }
            _ => return Err(format!("a segment of it wants to be at {:#x}", segment.p_paddr)),
        }
        if segment.p_paddr < layout::HIGH_MEMORY {
            return Err(format!(
                "a segment of it wants to be at {:#x}, below 1 MiB: it is a program for users, or not linked as a kernel",
                segment.p_paddr
            ));
        }
        segments.push(Placement {
            offset: segment.p_offset,
            length: segment.p_filesz,
            address: segment.p_paddr,
        });
    }
    if segments.is_empty() || header.e_entry < layout::HIGH_MEMORY || header.e_entry >= end {
        return Err("it is an ELF file, but has no entry point in what it loads: not a vmlinux".to_owned());
    }
    Ok(Format::Elf { entry: header.e_entry, segments, end })
}

fn parse_bzimage(file: &File) -> Result<Format, String> {
    const NEITHER: &str = "it is neither an ELF vmlinux nor a bzImage";
    let mut header = setup_header::default();
    file.read_exact_at(header.as_mut_slice(), SETUP_HEADER).map_err(|_| NEITHER)?;
    let (magic, version, flags) = (header.header, header.version, header.xloadflags);
    if magic != BZIMAGE_MAGIC {
        return Err(NEITHER.to_owned());
    }
    if version < 0x20c || flags & XLF_KERNEL_64 == 0 {
        return Err("it is a bzImage without a 64-bit entry point".to_owned());
    }
    Ok(Format::BzImage { header })
}
