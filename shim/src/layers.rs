//! A root file system that is an overlay of EROFS mounts, as containerd's erofs snapshotter describes it: the files behind the
//! mounts, for the guest to have as disks.

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::mounts::Mount;

/// The host's mounts, of this process.
const MOUNTS: &str = "/proc/self/mountinfo";
/// The most that is read of it.
const MAX_MOUNTS: u64 = 16 << 20;
/// The most layers that one disk can have.
const MAX_LAYERS: usize = 128;
/// The disk that is written to, in the overlay's work directory: it goes with the snapshot, and nobody else has use for it.
const WRITABLE: &str = "bulkhead.ext4";

/// The mount as `bulkhead-oci` takes it (`--root-disk`), if it is an overlay with nothing but EROFS below.
pub fn as_disk(mounts: &[Mount]) -> Option<String> {
    let [mount] = mounts else { return None };
    let overlay = Overlay::of(mount)?;
    let mut table = String::new();
    fs::File::open(MOUNTS).ok()?.take(MAX_MOUNTS).read_to_string(&mut table).ok()?;
    // The topmost comes first in the mount, and last on the disk.
    let files = overlay.lower.iter().rev().map(|lower| file_of(Path::new("/"), &table, lower));
    let layers = files.collect::<Option<Vec<_>>>()?;
    let otherwise = json!({"type": mount.kind, "source": mount.source, "options": mount.options});
    let writable = Path::new(overlay.work).join(WRITABLE);
    let upper = overlay.upper;
    Some(json!({"layers": layers, "upper": upper, "writable": writable, "otherwise": otherwise}).to_string())
}

/// The directories of an overlay that has no say in how it works.
#[derive(Debug, PartialEq, Eq)]
struct Overlay<'a> {
    /// The topmost first.
    lower: Vec<&'a str>,
    upper: &'a str,
    work: &'a str,
}

impl<'a> Overlay<'a> {
    fn of(mount: &'a Mount) -> Option<Self> {
        if mount.kind != "overlay" {
            return None;
        }
        let (mut lower, mut upper, mut work) = (None, None, None);
        for option in &mount.options {
            match option.split_once('=') {
                Some(("lowerdir", layers)) => lower = Some(layers),
                Some(("upperdir", directory)) => upper = Some(directory),
                Some(("workdir", directory)) => work = Some(directory),
                Some(("index", "off")) => {}
                None if matches!(option.as_str(), "rw" | "defaults") => {}
                // Whatever it means, it is meant.
                _ => return None,
            }
        }
        let (lower, upper, work) = (lower?.split(':').collect::<Vec<_>>(), upper?, work?);
        // An overlay's own words for directories with a colon in their names.
        let plain = |path: &&str| path.starts_with('/') && !path.contains('\\');
        let known = (1..=MAX_LAYERS).contains(&lower.len()) && lower.iter().chain([&upper, &work]).all(plain);
        known.then_some(Self { lower, upper, work })
    }
}

/// The file or block device that is mounted as EROFS on a directory, as `table` (mountinfo) has it.
fn file_of(root: &Path, table: &str, directory: &str) -> Option<PathBuf> {
    // Of several mounts on one directory the last is seen.
    let entry = table.lines().filter_map(Entry::parse).rfind(|entry| entry.point == directory)?;
    if entry.kind != "erofs" || entry.inside != "/" || !entry.is_one_file() {
        return None;
    }
    let source = PathBuf::from(&entry.source);
    let kind = fs::metadata(root.join(source.strip_prefix("/").ok()?)).ok()?.file_type();
    if kind.is_file() {
        return Some(source);
    }
    // Read past the loop device, whose pages would be in the host's memory once more.
    let backing = || {
        let about = root.join("sys/dev/block").join(&entry.device).join("loop");
        let read = |name: &str| fs::read_to_string(about.join(name)).ok();
        let whole = read("offset")?.trim() == "0" && read("sizelimit")?.trim() == "0";
        let file = PathBuf::from(read("backing_file")?.strip_suffix('\n')?);
        (whole && root.join(file.strip_prefix("/").ok()?).is_file()).then_some(file)
    };
    backing().or_else(|| kind.is_block_device().then_some(source))
}

/// A line of proc_pid_mountinfo(5).
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    device: String,
    /// What of the file system is mounted.
    inside: String,
    point: String,
    kind: String,
    source: String,
    options: String,
}

impl Entry {
    fn parse(line: &str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(2);
        let (device, inside, point) = (before.next()?, before.next()?, before.next()?);
        let mut after = after.split(' ');
        let (kind, source, options) = (after.next()?, after.next()?, after.next()?);
        Some(Self {
            device: device.to_owned(),
            inside: unescape(inside)?,
            point: unescape(point)?,
            kind: kind.to_owned(),
            source: unescape(source)?,
            options: options.to_owned(),
        })
    }

    /// Whether it is all in its source, and not also on other devices or in a cache.
    fn is_one_file(&self) -> bool {
        !self.options.split(',').any(|option| {
            ["device=", "fsid=", "domain_id=", "fsoffset="].iter().any(|word| option.starts_with(word))
        })
    }
}

/// Takes back what the kernel does to blanks: `\040`.
fn unescape(text: &str) -> Option<String> {
    let mut parts = text.split('\\');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(3)?;
        bytes.push(u8::from_str_radix(digits, 8).ok()?);
        bytes.extend(rest.as_bytes());
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn overlay(options: &[&str]) -> Mount {
        let options = options.iter().map(|&option| option.to_owned()).collect();
        Mount { kind: "overlay".into(), source: "overlay".into(), options }
    }

    #[test]
    fn an_overlay_is_taken_apart() {
        let mount =
            overlay(&["workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs", "index=off"]);
        let known = Overlay::of(&mount).unwrap();
        assert_eq!(known, Overlay { lower: vec!["/s/2/fs", "/s/1/fs"], upper: "/s/3/fs", work: "/s/3/work" });
        for other in [
            &["lowerdir=/a:/b"][..],
            &["workdir=/w", "upperdir=/u"],
            &["workdir=/w", "upperdir=/u", "lowerdir=a"],
            &["workdir=/w", "upperdir=/u", "lowerdir=/a\\:b"],
            &["workdir=/w", "upperdir=/u", "lowerdir=/a", "metacopy=on"],
            &["workdir=/w", "upperdir=/u", "lowerdir=/a", "userxattr"],
        ] {
            assert_eq!(Overlay::of(&overlay(other)), None, "{other:?}");
        }
        let bind = Mount { kind: "bind".into(), ..mount };
        assert_eq!(Overlay::of(&bind), None);
    }

    #[test]
    fn the_file_behind_a_mount_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        for directory in ["s", "dev", "sys/dev/block/7:0/loop"] {
            fs::create_dir_all(at(directory)).unwrap();
        }
        for file in ["s/a file", "s/layer", "dev/loop0"] {
            fs::write(at(file), "").unwrap();
        }
        std::os::unix::fs::symlink("/dev/null", at("dev/loop1")).unwrap();
        let about =
            |name: &str, text: &str| fs::write(at("sys/dev/block/7:0/loop").join(name), text).unwrap();
        about("offset", "0\n");
        about("sizelimit", "0\n");
        about("backing_file", "/s/layer\n");
        let line = |inside: &str, point: &str, kind: &str, source: &str, options: &str| {
            format!("32 22 7:0 {inside} {point} ro,relatime shared:7 - {kind} {source} ro{options}\n")
        };
        let of = |table: &str| file_of(dir.path(), table, "/m");
        // Mounted from the file itself, as newer kernels can; or from a loop device.
        assert_eq!(of(&line("/", "/m", "erofs", "/s/a\\040file", "")), Some("/s/a file".into()));
        assert_eq!(of(&line("/", "/m", "erofs", "/dev/loop1", ",acl")), Some("/s/layer".into()));
        // A piece of a file is no disk; neither is what is on several.
        about("offset", "4096\n");
        assert_eq!(of(&line("/", "/m", "erofs", "/dev/loop1", "")), None);
        assert_eq!(of(&line("/", "/m", "erofs", "/s/layer", ",device=/dev/loop3")), None);
        assert_eq!(of(&line("/sub", "/m", "erofs", "/s/layer", "")), None);
        assert_eq!(of(&line("/", "/m", "ext4", "/s/layer", "")), None);
        assert_eq!(of(&line("/", "/n", "erofs", "/s/layer", "")), None);
        assert_eq!(of(&line("/", "/m", "erofs", "/s/gone", "")), None);
        // What lies on it is seen.
        let two = line("/", "/m", "erofs", "/s/layer", "") + &line("/", "/m", "tmpfs", "tmpfs", "");
        assert_eq!(of(&two), None);
    }

    proptest! {
        #[test]
        fn a_name_comes_back_as_it_was(name in "[ \\n\\\\a-zä]{1,20}") {
            let one = |c: char| match c {
                ' ' | '\n' | '\\' => format!("\\{:03o}", u32::from(c)),
                c => c.to_string(),
            };
            let escaped: String = name.chars().map(one).collect();
            prop_assert_eq!(unescape(&escaped), Some(name));
        }

        #[test]
        fn nothing_panics(line in "\\PC{0,60}", words in prop::collection::vec("[-/a-z\\\\0-9]{0,6}", 0..14)) {
            let _ = (Entry::parse(&line), Entry::parse(&words.join(" ")), unescape(&line));
            let _ = Overlay::of(&overlay(&words.iter().map(String::as_str).collect::<Vec<_>>()));
        }
    }
}
