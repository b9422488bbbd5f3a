//! fs-verity: the kernel keeps a hash tree beside a file that can never be written again, and checks every page of it when it comes
//! from the disk. Offered by ext4 and f2fs (made or tuned with the feature `verity`) and by btrfs; `linux/Documentation/filesystems/fsverity.rst`.

use std::fs::File;
use std::io;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};

use crate::Digest;

/// `FS_VERITY_HASH_ALG_SHA256`.
const SHA256: u16 = 1;
/// Bytes that a leaf of the tree stands for: what every kernel with fs-verity and pages of 4 KiB can.
const BLOCK: u32 = 4096;

/// `struct fsverity_enable_arg`; no salt, no signature.
#[repr(C)]
#[derive(Default)]
struct Enable {
    version: u32,
    hash_algorithm: u32,
    block_size: u32,
    salt_size: u32,
    salt: u64,
    signature_size: u32,
    reserved: u32,
    signature: u64,
    more: [u64; 11],
}

/// `struct fsverity_digest`, with room for the longest digest.
#[repr(C)]
struct Measured {
    algorithm: u16,
    /// Bytes: first how many there is room for, then how many there are.
    size: u16,
    digest: [u8; 64],
}

/// `FS_IOC_ENABLE_VERITY`.
const ENABLE: Opcode = opcode::write::<Enable>(b'f', 133);
/// `FS_IOC_MEASURE_VERITY`, whose number has the size of the structure without its digest.
const MEASURE: Opcode = opcode::read_write::<[u16; 2]>(b'f', 134);

/// Seals a file for ever, which nobody may have open for writing, and answers its fs-verity digest. None: its file system or this kernel
/// does not offer that, has no room for the tree, or somebody writes to it just now. Costs reading the file once.
///
/// # Errors
/// The file cannot be read, or it was sealed with another kind of hash.
pub fn seal(file: &File) -> io::Result<Option<Digest>> {
    let wish = Enable { version: 1, hash_algorithm: SHA256.into(), block_size: BLOCK, ..Enable::default() };
    // SAFETY: the kernel reads a `struct fsverity_enable_arg` through the pointer, which Enable is (128 bytes, as its number says),
    // and with no salt and no signature follows no pointer in it.
    let sealed = unsafe { ioctl(file, Setter::<ENABLE, Enable>::new(wish)) };
    match sealed {
        // By somebody who loaded the same at the same time.
        Ok(()) | Err(Errno::EXIST) => measure(file),
        Err(
            Errno::OPNOTSUPP
            | Errno::NOTTY
            | Errno::NOSYS
            | Errno::INVAL
            | Errno::NOPKG
            | Errno::NOSPC
            | Errno::DQUOT
            | Errno::BUSY
            | Errno::TXTBSY
            | Errno::ACCESS
            | Errno::PERM
            | Errno::ROFS,
        ) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The fs-verity digest of a file, which costs no reading. None: it is not sealed.
///
/// # Errors
/// It was sealed with another kind of hash.
pub fn measure(file: &File) -> io::Result<Option<Digest>> {
    let mut answer = Measured { algorithm: 0, size: 64, digest: [0; 64] };
    // SAFETY: the kernel writes a `struct fsverity_digest` with at most `size` bytes of digest through the pointer, and there are as many.
    let measured = unsafe { ioctl(file, Updater::<MEASURE, Measured>::new(&mut answer)) };
    match measured {
        Ok(()) => {}
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS | Errno::INVAL) => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    }
    match (answer.algorithm, answer.size, answer.digest.first_chunk()) {
        (SHA256, 32, Some(digest)) => Ok(Some(Digest::from_bytes(*digest))),
        (algorithm, size, _) => Err(io::Error::other(format!(
            "it is sealed with hash {algorithm} of {size} bytes, not with SHA-256"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of `linux/fsverity.h`, which strace shows.
    #[test]
    fn the_calls_are_the_kernels() {
        assert_eq!((ENABLE, MEASURE), (0x4080_6685, 0xc004_6686));
    }

    /// Where it is offered the digest is the file's; where it is not that is no error. tests/cases/verity.rs has a file system with it.
    #[test]
    fn a_file_is_sealed_or_it_is_not() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("file");
        std::fs::write(&path, "content").unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(measure(&file).unwrap(), None);
        let sealed = seal(&file).unwrap();
        assert_eq!(measure(&file).unwrap(), sealed);
        assert_eq!(std::fs::write(&path, "other").is_err(), sealed.is_some());
    }
}
