//! Disks that were put into their drives after this guest had looked into them: one that goes on from a template finds all
//! drives empty, and hears by an interrupt that one has something in it now.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Context, Result, check};

/// `BLKRRPART`: read the partition table again. `BLKGETSIZE64`: the size in bytes.
const READ_PARTITIONS: libc::c_ulong = 0x125f;
const SIZE: libc::c_ulong = 0x8008_1272;
/// How long the interrupt may take.
const PATIENCE: Duration = Duration::from_secs(5);
const MOMENT: Duration = Duration::from_micros(100);

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
    let deadline = Instant::now() + PATIENCE;
    while size(&file).context(what)? == 0 && Instant::now() < deadline {
        std::thread::sleep(MOMENT);
    }
    if partition {
        // SAFETY: BLKRRPART takes no argument.
        check(unsafe { libc::ioctl(file.as_raw_fd(), READ_PARTITIONS) })
            .context(|| format!("read the partitions of {disk}"))?;
    }
    Ok(())
}

/// The disk of `/dev/vda` or `/dev/vda1`, and whether it is a partition that is meant.
fn parse(source: &str) -> Option<(&str, bool)> {
    let disk = source.trim_end_matches(|c: char| c.is_ascii_digit());
    let letters = disk.strip_prefix("/dev/vd")?;
    let good = !letters.is_empty() && letters.bytes().all(|byte| byte.is_ascii_lowercase());
    good.then_some((disk, disk.len() < source.len()))
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
}
