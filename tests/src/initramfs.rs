//! Writes the guest's initramfs: an uncompressed newc cpio (Documentation/driver-api/early-userspace/buffer-format.rst)
//! with the agent as /init. Uncompressed because the guest kernel would pay for unpacking at every boot.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Writes an initramfs whose /init is `agent`: the program, /dev/console (5:1), and empty /proc, /sys and /run.
///
/// The same agent gives the same bytes.
pub fn write(agent: &[u8], output: &mut dyn Write) -> Result<()> {
    let mut archive = Archive { output, offset: 0, inode: 0 };
    for directory in ["dev", "proc", "sys", "run"] {
        archive.entry(directory, DIRECTORY, (0, 0), &[])?;
    }
    archive.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[])?;
    archive.entry("init", PROGRAM, (0, 0), agent)?;
    archive.entry("TRAILER!!!", 0, (0, 0), &[])?;
    archive.output.flush().context("write the initramfs")
}

/// [`write()`]s to a file, which appears whole, and is left alone when it holds the same bytes already.
pub fn write_file(agent: &[u8], path: &Path) -> Result<()> {
    let mut archive = Vec::new();
    write(agent, &mut archive)?;
    if fs::read(path).is_ok_and(|present| present == archive) {
        return Ok(());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    let mut file = tempfile::NamedTempFile::new_in(parent)?;
    file.write_all(&archive).context("write the initramfs")?;
    file.persist(path).with_context(|| format!("write {}", path.display()))?;
    Ok(())
}

struct Archive<'a> {
    output: &'a mut dyn Write,
    offset: usize,
    inode: u32,
}

impl Archive<'_> {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) -> Result<()> {
        self.inode += 1;
        let size =
            u32::try_from(contents.len()).context("a file of 4 GiB or more does not fit a newc archive")?;
        let name_size = u32::try_from(name.len() + 1)?;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        let header: String = fields.iter().map(|field| format!("{field:08X}")).collect();
        self.put(format!("070701{header}{name}\0").as_bytes())?;
        self.align()?;
        self.put(contents)?;
        self.align()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.offset += bytes.len();
        self.output.write_all(bytes).context("write the initramfs")
    }

    fn align(&mut self) -> Result<()> {
        let padding = self.offset.next_multiple_of(4) - self.offset;
        self.put(&[0; 4][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_reads_it_back() {
        let mut archive = Vec::new();
        write(b"the agent", &mut archive).unwrap();
        assert_eq!(archive.len() % 4, 0);
        let dir = tempfile::tempdir().unwrap();
        let mut cpio = Command::new("cpio")
            .args(["--quiet", "-itv"])
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&archive).unwrap();
        let output = cpio.wait_with_output().unwrap();
        assert!(output.status.success());
        let listing = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = listing.lines().collect();
        assert_eq!(lines.len(), 6, "{listing}");
        assert!(lines[4].starts_with("crw-------") && lines[4].contains("5,   1"), "{listing}");
        assert!(lines[5].starts_with("-rwxr-xr-x") && lines[5].contains(" 9 "), "{listing}");
    }
}
