//! The writable layer: a sparse ext4 disk whose size is the quota.
//!
//! Formatting costs more than booting, so an empty disk of each size is formatted once and kept; a container gets a
//! copy of the few blocks in it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::SeekFrom;

use crate::state::private_dir;
use crate::{Context, Error, Layout, Result};

/// Under this ext4 has hardly room for itself.
const MIN_SIZE: u64 = 4 << 20;

/// What is expected of a scratch disk when its machine has been killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: it is thrown away with its container.
    Once,
    /// That the next machine can use it: it has a journal.
    Kept,
}

/// Makes a container's scratch disk.
///
/// # Errors
/// `mke2fs` is missing or fails, or the disk is full.
pub fn create(layout: &Layout, path: &Path, size: u64, kind: Kind) -> Result<()> {
    if size < MIN_SIZE {
        return Err(Error::Usage(format!(
            "--storage {size}: at least {} MiB, or 0 for memory",
            MIN_SIZE >> 20
        )));
    }
    let template = template(layout, size, kind)?;
    let what = || format!("cannot create the scratch disk {}", path.display());
    copy_sparse(&template, path).inspect_err(|_| drop(fs::remove_file(path))).context(what)
}

fn template(layout: &Layout, size: u64, kind: Kind) -> Result<PathBuf> {
    let dir = layout.scratch_templates();
    let name = match kind {
        Kind::Once => format!("{size}.ext4"),
        Kind::Kept => format!("{size}.journal.ext4"),
    };
    let path = dir.join(&name);
    if path.exists() {
        return Ok(path);
    }
    private_dir(&dir)?;
    let temporary = dir.join(format!(".{name}.{}", std::process::id()));
    let result = format(&temporary, size, kind)
        .and_then(|()| fs::rename(&temporary, &path).context(|| format!("cannot create {}", path.display())));
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result.map(|()| path)
}

fn format(path: &Path, size: u64, kind: Kind) -> Result<()> {
    let what = || format!("cannot format the scratch disk {}", path.display());
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).context(what)?;
    file.set_len(size).context(what)?;
    // Lazy tables: what the guest's kernel can zero when it needs it is not written now. The disk is new and all zeros, so
    // that its journal need not be written either.
    let (features, extended): (_, &[&str]) = match kind {
        Kind::Once => ("^has_journal,^resize_inode,sparse_super2", &[]),
        Kind::Kept => {
            ("has_journal,^resize_inode,sparse_super2", &["-J", "size=4", "-E", "lazy_journal_init=1"])
        }
    };
    let output = Command::new("mke2fs")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-I", "256", "-b", "4096", "-O", features])
        .args(extended)
        .args(["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0,num_backup_sb=0", "-L", "scratch"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Io {
            what: "cannot run mke2fs to format a scratch disk: install e2fsprogs, or use --storage 0".into(),
            source,
        })?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(Error::Io { what: what(), source: io::Error::other(format!("mke2fs: {}", words.trim())) })
}

/// Copies a file's data and leaves its holes as holes.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    let size = source.metadata()?.len();
    target.set_len(size)?;
    let mut at = 0;
    let mut buffer = vec![0; 1 << 16];
    while at < size {
        let start = match rustix::fs::seek(&source, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&source, SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let Some(piece) = buffer.get_mut(..want) else { break };
            source.read_exact_at(piece, at)?;
            target.write_all_at(piece, at)?;
            at += want as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_has_the_same_bytes_and_the_same_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"hello", 5 << 20).unwrap();
        file.write_all_at(&vec![7; 200_000], 40 << 20).unwrap();
        copy_sparse(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn a_scratch_disk_is_sparse_and_made_from_one_template() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path()), &crate::settings::Paths::default()).unwrap();
        let disk = dir.path().join("disk");
        let size = crate::settings::Run::default().storage.0;
        create(&layout, &disk, size, Kind::Once).unwrap();
        let metadata = fs::metadata(&disk).unwrap();
        assert_eq!(metadata.len(), size);
        assert!(metadata.blocks() * 512 < 4 << 20, "{} bytes", metadata.blocks() * 512);
        assert!(create(&layout, &dir.path().join("small"), 1 << 20, Kind::Once).is_err());
        assert_eq!(fs::read_dir(layout.scratch_templates()).unwrap().count(), 1);
        // One with a journal is another one, and no larger.
        let kept = dir.path().join("kept");
        create(&layout, &kept, size, Kind::Kept).unwrap();
        assert!(fs::metadata(&kept).unwrap().blocks() * 512 < 4 << 20);
        assert_eq!(fs::read_dir(layout.scratch_templates()).unwrap().count(), 2);
        // Bit 2 of the compatible features in the superblock: a journal.
        let has_journal = |path: &Path| {
            let mut word = [0; 4];
            File::open(path).unwrap().read_exact_at(&mut word, 1024 + 0x5c).unwrap();
            u32::from_le_bytes(word) & 4 != 0
        };
        assert!(has_journal(&kept) && !has_journal(&disk));
    }
}
