//! Disks that were put into their drives after this guest had looked into them, and that go again. A guest that goes on from a
//! template finds all drives empty, and hears by an interrupt that one has something in it now; some drives get a disk when a
//! container comes that has one, and lose it with that.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use crate::error::{Context, Error, Result, check};

/// `BLKRRPART`: read the partition table again. `BLKGETSIZE64`: the size in bytes. `BLKFLSBUF`: write what is cached of the
/// disk, and forget it.
const READ_PARTITIONS: libc::c_ulong = 0x125f;
const SIZE: libc::c_ulong = 0x8008_1272;
const FLUSH: libc::c_ulong = 0x1261;
/// `BLKPG`, and its operation that makes the kernel forget one partition.
const PARTITION: libc::c_ulong = 0x1269;
const DELETE: i32 = 2;
/// Most partitions that Linux has of a virtio disk: its minor numbers come 16 a disk, the others are extended ones.
const MOST_PARTITIONS: i32 = 256;
/// How long the interrupt may take.
const PATIENCE: Duration = Duration::from_secs(5);
const MOMENT: Duration = Duration::from_micros(100);

/// `struct blkpg_ioctl_arg`
#[repr(C)]
struct PartitionRequest {
    operation: i32,
    flags: i32,
    length: i32,
    partition: *const Partition,
}

/// `struct blkpg_partition`
#[repr(C)]
struct Partition {
    start: i64,
    length: i64,
    number: i32,
    names: [u8; 128],
}

/// Waits until the disk, or the partition of one, called `source` is there; other names are none of its business. One that
/// does not come is for mount(2) to complain about.
///
/// # Errors
/// What the kernel says of the disk.
pub fn wait_for(source: &str) -> Result<()> {
    let Some((disk, partition)) = parse(source) else { return Ok(()) };
    if partition && Path::new(source).exists() {
        return Ok(());
    }
    let what = || format!("look at the disk {disk}");
    let file = File::open(disk).context(what)?;
    wait(&file, |size| size != 0).context(what)?;
    if partition {
        // SAFETY: BLKRRPART takes no argument.
        check(unsafe { libc::ioctl(file.as_raw_fd(), READ_PARTITIONS) })
            .context(|| format!("read the partitions of {disk}"))?;
    }
    Ok(())
}

/// Waits until the disk `source` has this size: until then its drive is empty, or has another.
///
/// # Errors
/// It is no disk of the machine's, or another than it should be.
pub fn wait_for_size(source: &str, bytes: u64) -> Result<()> {
    let disk = whole(source)?;
    let what = || format!("look at the disk {disk}");
    let file = File::open(disk).context(what)?;
    match wait(&file, |size| size == bytes).context(what)? {
        size if size == bytes => Ok(()),
        size => {
            Err(Error::internal(format!("the disk {disk} has {size} bytes, not the {bytes} that it should")))
        }
    }
}

/// Lets go of the disk `source`, if nothing uses it: all that was written is on it then.
///
/// # Errors
/// `FAILED_PRECONDITION` while it, or a partition of it, is mounted.
pub fn release(source: &str) -> Result<()> {
    let disk = whole(source)?;
    // A file system holds its disk, or the one its partition is on, in the same way.
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    let file = match rustix::fs::open(disk, flags, Mode::empty()) {
        Err(rustix::io::Errno::BUSY) => {
            return Err(Error::precondition(format!("the disk {disk} is still mounted")));
        }
        opened => opened.context(|| format!("open the disk {disk}"))?,
    };
    // SAFETY: BLKFLSBUF takes no argument.
    check(unsafe { libc::ioctl(file.as_raw_fd(), FLUSH) }).context(|| format!("flush the disk {disk}"))?;
    // Or those of the next disk would be taken to be there already.
    for number in (1..=MOST_PARTITIONS).take_while(|number| Path::new(&format!("{disk}{number}")).exists()) {
        let partition = Partition { start: 0, length: 0, number, names: [0; 128] };
        let length = size_of::<Partition>() as i32;
        let request =
            PartitionRequest { operation: DELETE, flags: 0, length, partition: &raw const partition };
        // SAFETY: BLKPG reads the request and, of the length that it says, the partition; both are alive during the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), PARTITION, &raw const request) })
            .context(|| format!("forget the partition {disk}{number}"))?;
    }
    Ok(())
}

/// Waits for a size that will do. Answers the last one.
fn wait(file: &File, will_do: impl Fn(u64) -> bool) -> Result<u64> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let size = size(file)?;
        if will_do(size) || Instant::now() >= deadline {
            return Ok(size);
        }
        std::thread::sleep(MOMENT);
    }
}

/// The disk of `/dev/vda` or `/dev/vda1`, and whether it is a partition that is meant.
fn parse(source: &str) -> Option<(&str, bool)> {
    let disk = source.trim_end_matches(|c: char| c.is_ascii_digit());
    let letters = disk.strip_prefix("/dev/vd")?;
    let good = !letters.is_empty() && letters.bytes().all(|byte| byte.is_ascii_lowercase());
    good.then_some((disk, disk.len() < source.len()))
}

/// A disk, and no partition of one.
fn whole(source: &str) -> Result<&str> {
    match parse(source) {
        Some((disk, false)) => Ok(disk),
        _ => Err(Error::invalid(format!("{source:?} is no disk of this machine"))),
    }
}

fn size(file: &File) -> Result<u64> {
    let mut bytes = 0_u64;
    // SAFETY: BLKGETSIZE64 writes 64 bits, which `bytes` has, alive during the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), SIZE, &raw mut bytes) })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_virtio_disks_are_waited_for() {
        assert_eq!(parse("/dev/vda1"), Some(("/dev/vda", true)));
        assert_eq!(parse("/dev/vda128"), Some(("/dev/vda", true)));
        assert_eq!(parse("/dev/vdb"), Some(("/dev/vdb", false)));
        for other in ["tmpfs", "/dev/sda1", "/dev/vd", "/dev/vd1", "/dev/vd../x", "", "/dev/vdA"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn only_whole_disks_are_let_go() {
        for bad in ["/dev/vda1", "/dev/sda", "/etc/passwd", "/dev/vd", ""] {
            assert!(release(bad).unwrap_err().message.contains("no disk"), "{bad}");
            assert!(wait_for_size(bad, 0).is_err(), "{bad}");
        }
    }
}
