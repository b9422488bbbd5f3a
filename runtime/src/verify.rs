//! Kernel, initramfs, monitor and image layers are what they were when they were installed or converted.
//!
//! Each has a SHA-256 digest that was written down then. To read tens or thousands of megabytes at every start is out of the
//! question, so a stamp remembers what was read and found good: device, inode, size and times of all files of a set, and the
//! host's boot. One that is replaced, written to, or not yet read since the host booted is read again.
//!
//! A layer on a file system with fs-verity is sealed when it is converted: a start asks the kernel for its digest, nothing is read,
//! and what the disk gives back later is checked as it is read.
//!
//! This finds damage, halves of an upgrade and files that somebody has replaced. Who may write to them as root may write to the
//! digests, too.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use bulkhead_image::{Digest, Image, LayerProof, verity};

use crate::{Context, Error, Layout, Result, Settings};

/// What `make install` writes: `sha256sum -c` understands it.
pub const MANIFEST: &str = "SHA256SUMS";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Most sets remembered.
const MOST_STAMPS: usize = 512;
/// Some lines, each with a name.
const MAX_MANIFEST: u64 = 64 << 10;

/// A file, and what it is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// For people: `guest kernel`.
    pub what: &'static str,
    /// Where it is.
    pub path: PathBuf,
    /// Of its content.
    pub digest: Digest,
    /// Of a file that is sealed by fs-verity: the kernel checks what it reads of it, so that we need not.
    pub verity: Option<Digest>,
    /// What to do when it is another.
    pub remedy: String,
}

/// What is remembered, in a directory that only its user may write to.
#[derive(Clone, Debug)]
pub struct Stamps(PathBuf);

impl Stamps {
    /// Those of this user.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        let own = std::env::var_os("XDG_RUNTIME_DIR").filter(|_| !rustix::process::geteuid().is_root());
        let run = own.map_or_else(|| settings.paths.run.clone(), |own| Path::new(&own).join("bulkhead"));
        Self(run.join("verified"))
    }

    /// Those of a layout.
    #[must_use]
    pub fn of(layout: &Layout) -> Self {
        Self(layout.run.join("verified"))
    }

    /// Makes sure that all parts are what they are to be. What is remembered is not read.
    ///
    /// # Errors
    /// A part that is damaged, missing or cannot be read.
    pub fn check(&self, parts: &[Part]) -> Result<()> {
        parts.iter().try_for_each(measure)?;
        let Some(stamp) = self.stamp(parts)? else { return Ok(()) };
        if stamp.exists() {
            return Ok(());
        }
        parts.iter().filter(|part| part.verity.is_none()).try_for_each(read)?;
        self.remember(&stamp);
        Ok(())
    }

    /// The same, but all is read.
    ///
    /// # Errors
    /// As [`Stamps::check`].
    pub fn check_again(&self, parts: &[Part]) -> Result<()> {
        parts.iter().try_for_each(measure)?;
        parts.iter().try_for_each(read)?;
        if let Some(stamp) = self.stamp(parts)? {
            self.remember(&stamp);
        }
        Ok(())
    }

    /// Of the parts that have to be read, as they are now and what they are to be. None: there are no such parts.
    fn stamp(&self, parts: &[Part]) -> Result<Option<PathBuf>> {
        let mut text = boot_id()?;
        let mut unsealed = parts.iter().filter(|part| part.verity.is_none()).peekable();
        if unsealed.peek().is_none() {
            return Ok(None);
        }
        for Part { what, path, digest, .. } in unsealed {
            let about =
                fs::metadata(path).context(|| format!("cannot look at the {what} {}", path.display()))?;
            let _ = writeln!(text, "{} {digest}", looks(&about));
        }
        Ok(Some(self.0.join(Digest::of(text.as_bytes()).hex())))
    }

    /// Best effort: what is not remembered is read again.
    fn remember(&self, stamp: &Path) {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        if made.is_err() {
            return;
        }
        if fs::read_dir(&self.0).is_ok_and(|entries| entries.count() >= MOST_STAMPS) {
            for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
                let _ = fs::remove_file(entry.path());
            }
        }
        let _ = File::create(stamp);
    }
}

/// The host's boot, which has a name of its own.
pub(crate) fn boot_id() -> Result<String> {
    fs::read_to_string(BOOT_ID).context(|| format!("cannot read {BOOT_ID}"))
}

/// What a file looks like from outside, which is another when it was replaced or written to.
pub(crate) fn looks(about: &fs::Metadata) -> String {
    let (modified, changed) = ((about.mtime(), about.mtime_nsec()), (about.ctime(), about.ctime_nsec()));
    format!(
        "{} {} {} {}.{} {}.{}",
        about.dev(),
        about.ino(),
        about.len(),
        modified.0,
        modified.1,
        changed.0,
        changed.1
    )
}

/// The digest of a file.
///
/// # Errors
/// It cannot be read.
pub fn digest(path: &Path) -> Result<Digest> {
    let found = File::open(path).and_then(|file| Digest::of_file(&file));
    found.context(|| format!("cannot read {}", path.display()))
}

/// The layers of an image, as far as their digests are known.
#[must_use]
pub fn layers(image: &Image) -> Vec<Part> {
    let name = image.name.clone().unwrap_or_else(|| image.id.to_string());
    let known = image.layers.iter().zip(&image.proofs);
    let part = |(path, proof): (&PathBuf, &LayerProof)| {
        let remedy = format!(
            "remove the images that have this layer (`bulkhead image rm {name}`) and load or pull them again"
        );
        Some(Part {
            what: "image layer",
            path: path.clone(),
            digest: proof.content?,
            verity: proof.verity,
            remedy,
        })
    };
    known.filter_map(part).collect()
}

/// Whether a part that was sealed is so still, with the same content. Nothing is read.
fn measure(part: &Part) -> Result<()> {
    let Part { what, path, verity: Some(expected), remedy, .. } = part else { return Ok(()) };
    let found = File::open(path).and_then(|file| verity::measure(&file));
    match found.context(|| format!("cannot measure the {what} {}", path.display()))? {
        Some(found) if found == *expected => Ok(()),
        Some(found) => Err(Error::Usage(format!(
            "the {what} {} was replaced: its fs-verity digest is {found}, expected is {expected}; {remedy}",
            path.display()
        ))),
        None => Err(Error::Usage(format!(
            "the {what} {} was replaced: it was sealed with fs-verity and is so no longer; {remedy}",
            path.display()
        ))),
    }
}

fn read(part: &Part) -> Result<()> {
    let Part { what, path, digest, remedy, .. } = part;
    let found = File::open(path).and_then(|file| Digest::of_file(&file));
    let found = found.context(|| format!("cannot read the {what} {}", path.display()))?;
    if found == *digest {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "the {what} {} is damaged or was replaced: its digest is {found}, expected is {digest}; {remedy}",
        path.display()
    )))
}

/// What a directory's [`MANIFEST`] says of a file, which it names `name`. None: it has none, or does not know the file.
///
/// # Errors
/// It cannot be read, or makes no sense.
pub fn in_manifest(directory: &Path, name: &str) -> Result<Option<Digest>> {
    let path = directory.join(MANIFEST);
    let what = || format!("cannot read {}", path.display());
    let about = match fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        about => about.context(what)?,
    };
    if about.len() > MAX_MANIFEST {
        return Err(Error::Usage(format!("{} is too long for a list of digests", path.display())));
    }
    let text = fs::read_to_string(&path).context(what)?;
    for (number, line) in text.lines().enumerate() {
        let wrong = || {
            let number = number + 1;
            Error::Usage(format!("{}:{number}: this is no digest and name: install again", path.display()))
        };
        let (digest, file) = line.split_once("  ").ok_or_else(wrong)?;
        if file == name {
            return format!("sha256:{digest}").parse().map(Some).map_err(|_| wrong());
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(path: &Path, content: &str) -> Part {
        let digest = Digest::of(content.as_bytes());
        Part { what: "guest kernel", path: path.into(), digest, verity: None, remedy: "install again".into() }
    }

    #[test]
    fn a_file_is_read_once_and_again_when_it_has_changed() {
        let place = tempfile::tempdir().unwrap();
        let stamps = Stamps(place.path().join("run/verified"));
        let (a, b) = (place.path().join("a"), place.path().join("b"));
        fs::write(&a, "a").unwrap();
        fs::write(&b, "b").unwrap();
        let parts = [part(&a, "a"), part(&b, "b")];
        stamps.check(&parts).unwrap();
        stamps.check(&parts).unwrap();
        assert_eq!(fs::read_dir(&stamps.0).unwrap().count(), 1);
        // Same length; the times tell.
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(&b, "c").unwrap();
        let error = stamps.check(&parts).unwrap_err().to_string();
        let (found, expected) = (Digest::of(b"c").to_string(), Digest::of(b"b").to_string());
        for words in ["guest kernel", "/b is damaged", &found, &expected, "install again"] {
            assert!(error.contains(words), "{words}: {error}");
        }
        assert!(stamps.check(&parts[..1]).is_ok() && stamps.check(&[]).is_ok());
        fs::remove_file(&b).unwrap();
        assert!(stamps.check(&parts).is_err());
    }

    #[test]
    fn stamps_do_not_pile_up() {
        let place = tempfile::tempdir().unwrap();
        let stamps = Stamps(place.path().join("verified"));
        let file = place.path().join("file");
        for number in 0..MOST_STAMPS + 20 {
            let content = number.to_string();
            fs::write(&file, &content).unwrap();
            stamps.check(&[part(&file, &content)]).unwrap();
        }
        assert!(fs::read_dir(&stamps.0).unwrap().count() <= MOST_STAMPS);
    }

    #[test]
    fn a_manifest_is_what_sha256sum_writes() {
        let place = tempfile::tempdir().unwrap();
        let said = |name: &str| in_manifest(place.path(), name);
        assert_eq!(said("vmlinux").unwrap(), None);
        let digest = Digest::of(b"x");
        fs::write(place.path().join(MANIFEST), format!("{}  vmlinux\n", digest.hex())).unwrap();
        assert_eq!(said("vmlinux").unwrap(), Some(digest));
        assert_eq!(said("other").unwrap(), None);
        for bad in ["x\n", "12  vmlinux\n", "\n"] {
            fs::write(place.path().join(MANIFEST), bad).unwrap();
            assert!(said("vmlinux").unwrap_err().to_string().contains("SHA256SUMS:1"), "{bad:?}");
        }
    }
}
