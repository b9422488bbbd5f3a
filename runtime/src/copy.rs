//! Files in and out of a running container, as tar archives over a stream of their own.
//!
//! What comes out of a guest is hostile: it is unpacked below the target directory only, with nothing that reaches
//! outside it, no devices, and no owner but the caller.

use std::borrow::Cow;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::agent::stream_hello::Kind;

use crate::guest::{Guest, accepted, limit, stalled};
use crate::state::{Files, Record};
use crate::{Context, Error, Layout, Result, stop};

/// How long nothing of an archive may move before the guest is taken for one that stands still.
const STALLED: Duration = Duration::from_secs(60);

/// Copies a host file or directory into a container, with docker's rules for the target.
///
/// # Errors
/// The source cannot be read, the target's directory does not exist, or the disk in the guest is full.
pub fn into_container(layout: &Layout, record: &Record, from: &Path, to: &str) -> Result<()> {
    stop::running(record)?;
    let guest = Guest::new(&Files::new(layout, &record.id).vsock());
    let metadata = fs::symlink_metadata(from).context(|| format!("cannot read {}", from.display()))?;
    let is_directory = is_directory_in(&guest, record.in_guest(), to);
    let (dir, name) = if is_directory {
        let name = from.file_name().filter(|_| !ends_with_dot(from)).map(PathBuf::from);
        (to.to_owned(), name.unwrap_or_else(|| PathBuf::from(".")))
    } else {
        if to.ends_with('/') {
            return Err(Error::Usage(format!("{to} is not a directory in the container")));
        }
        let path = Path::new(to);
        let dir = path.parent().map_or("/".into(), |dir| dir.to_string_lossy().into_owned());
        (dir, PathBuf::from(path.file_name().unwrap_or_default()))
    };
    let what = || format!("cannot copy {} into the container", from.display());
    let connection = guest.stream(record.in_guest(), "", Kind::ArchiveIn, &dir)?;
    limit(&connection, STALLED).context(what)?;
    let mut archive = tar::Builder::new(io::BufWriter::with_capacity(64 << 10, &connection));
    archive.follow_symlinks(false);
    let written = if metadata.is_dir() {
        archive.append_dir_all(&name, from)
    } else {
        archive.append_path_with_name(from, &name)
    };
    let written = written.and_then(|()| archive.into_inner()?.flush());
    let _ = connection.shutdown(Shutdown::Write);
    let mut connection = connection;
    // The guest's reason is the better one when it has stopped reading.
    accepted(&mut connection).and(written.map_err(|error| stalled(error, STALLED))).context(what)
}

/// Copies a file or directory out of a container, with docker's rules for the target.
///
/// # Errors
/// The source is not there, or the target cannot be written.
pub fn out_of_container(layout: &Layout, record: &Record, from: &str, to: &Path) -> Result<()> {
    stop::running(record)?;
    let guest = Guest::new(&Files::new(layout, &record.id).vsock());
    let what = || format!("cannot copy {from} to {}", to.display());
    let connection = guest.stream(record.in_guest(), "", Kind::ArchiveOut, from)?;
    limit(&connection, STALLED).context(what)?;
    unpack(connection, to, from.ends_with("/.")).map_err(|error| stalled(error, STALLED)).context(what)
}

/// Whether a path in the container is a directory: only a directory takes an archive.
fn is_directory_in(guest: &Guest, container: &str, path: &str) -> bool {
    guest.stream(container, "", Kind::ArchiveIn, path).is_ok_and(|connection: UnixStream| {
        let _ = connection.shutdown(Shutdown::Write);
        true
    })
}

fn ends_with_dot(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(b"/.") || path == Path::new(".")
}

/// Bytes of a block of an archive.
const BLOCK: u64 = 512;
/// Longest name and longest target of a link in an archive, in bytes: what Linux can have.
const MAX_NAME: u64 = 4096;

/// Unpacks a guest's archive. Its first entry is the thing itself; what follows lies below it.
///
/// The agent writes archives as GNU tar has them. Long names are read here and not by the `tar` crate, which reads them whole,
/// however long a guest says that they are.
pub(crate) fn unpack(stream: impl Read, to: &Path, contents_only: bool) -> io::Result<()> {
    let mut count = 0;
    let mut archive = tar::Archive::new(Counting { stream, count: &mut count });
    let mut root: Option<(PathBuf, PathBuf)> = None; // the first entry's name, and what it becomes here
    let (mut long_name, mut long_link) = (None, None);
    let mut end = 0;
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        end = entry.raw_file_position().saturating_add(entry.size().next_multiple_of(BLOCK));
        if kind.is_gnu_longname() {
            long_name = Some(long(&mut entry)?);
            continue;
        }
        if kind.is_gnu_longlink() {
            long_link = Some(long(&mut entry)?);
            continue;
        }
        if kind.is_pax_local_extensions() || kind.is_pax_global_extensions() {
            return Err(odd("an archive with pax headers, which no agent writes"));
        }
        let name = plain(&long_name.take().map_or_else(|| entry.path().map(Cow::into_owned), Ok)?)?;
        let mut link = || -> io::Result<PathBuf> {
            let link = match long_link.take() {
                Some(link) => Some(link),
                None => entry.link_name()?.map(Cow::into_owned),
            };
            link.ok_or_else(|| odd("a link to nothing"))
        };
        let (first, place) = match &root {
            Some(root) => root,
            None => {
                let place = if to.is_dir() && !contents_only {
                    to.join(name.file_name().ok_or_else(|| odd("an archive of nothing"))?)
                } else {
                    to.to_owned()
                };
                if kind.is_dir() && place.is_file() {
                    return Err(odd("the source is a directory, the target a file"));
                }
                if to.as_os_str().as_encoded_bytes().ends_with(b"/") && !to.is_dir() && !kind.is_dir() {
                    return Err(odd("the target directory does not exist"));
                }
                root.insert((name.clone(), place))
            }
        };
        let below = name.strip_prefix(first).map_err(|_| odd("an entry outside of what was asked for"))?;
        let target = if below.as_os_str().is_empty() { place.clone() } else { place.join(below) };
        no_links_below(place, &target)?;
        if kind.is_dir() {
            match fs::create_dir(&target) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && target.is_dir() => {}
                other => other?,
            }
        } else if kind.is_file() {
            let _ = fs::remove_file(&target);
            let mut file = fs::OpenOptions::new().write(true).create_new(true).open(&target)?;
            io::copy(&mut entry, &mut file)?;
            set_mode(&file, entry.header().mode()?)?;
        } else if kind.is_symlink() {
            let link = link()?;
            let _ = fs::remove_file(&target);
            std::os::unix::fs::symlink(link, &target)?;
        } else if kind.is_hard_link() {
            let link = plain(&link()?)?;
            let below = link.strip_prefix(first).map_err(|_| odd("a hard link out of what was asked for"))?;
            let source = place.join(below);
            no_links_below(place, &source)?;
            let _ = fs::remove_file(&target);
            fs::hard_link(&source, &target)?;
        }
        // Devices, fifos and sockets of a guest have no business on the host.
    }
    drop(archive);
    if root.is_none() {
        return Err(odd("the container's archive is empty"));
    }
    // The mark of an archive's end is two blocks, of which the first is read. An agent that could not go on leaves it out.
    if count < end.saturating_add(BLOCK) {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the container's archive breaks off: not all of it was copied",
        ));
    }
    Ok(())
}

/// Counts what is read.
struct Counting<'a, R> {
    stream: R,
    count: &'a mut u64,
}

impl<R: Read> Read for Counting<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.stream.read(buffer)?;
        *self.count += length as u64;
        Ok(length)
    }
}

/// A name that has an entry of its own.
fn long<R: Read>(entry: &mut tar::Entry<'_, R>) -> io::Result<PathBuf> {
    if entry.size() > MAX_NAME + 1 {
        return Err(odd("a name of over 4096 bytes"));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes)?;
    bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    Ok(OsString::from_vec(bytes).into())
}

/// A relative path without `..`.
fn plain(path: &Path) -> io::Result<PathBuf> {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => plain.push(part),
            Component::CurDir | Component::RootDir => {}
            _ => return Err(odd("a path with `..`")),
        }
    }
    Ok(plain)
}

/// Refuses to go through a symbolic link that the archive itself may have made.
fn no_links_below(place: &Path, target: &Path) -> io::Result<()> {
    let Ok(below) = target.strip_prefix(place) else { return Err(odd("a path outside the target")) };
    let mut at = place.to_owned();
    let depth = below.components().count();
    for (number, part) in below.components().enumerate() {
        if number > 0 || depth > 0 {
            let is_link =
                |path: &Path| fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_symlink());
            if is_link(&at) {
                return Err(odd("a path through a symbolic link"));
            }
        }
        at.push(part);
    }
    Ok(())
}

fn set_mode(file: &fs::File, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    // No set-user-id from a guest.
    file.set_permissions(fs::Permissions::from_mode(mode & 0o777))
}

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn archive(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o4755);
            let link = kind.is_symlink() || kind.is_hard_link();
            if link {
                header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
            }
            let data = if link { "" } else { content };
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    use tar::EntryType::{Directory, Link, Regular, Symlink};

    #[test]
    fn a_tree_arrives_without_set_user_id() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let bytes = archive(&[
            ("d", Directory, ""),
            ("d/f", Regular, "hi"),
            ("d/l", Symlink, "f"),
            ("d/h", Link, "d/f"),
        ]);
        unpack(bytes.as_slice(), dir.path(), false).unwrap();
        assert_eq!(fs::read(dir.path().join("d/l")).unwrap(), b"hi");
        assert_eq!(fs::metadata(dir.path().join("d/f")).unwrap().permissions().mode() & 0o7777, 0o755);
    }

    #[test]
    fn long_names_arrive_and_absurd_ones_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let name = format!("d/{}", "n".repeat(200));
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_data(&mut header(Directory, 0), "d", &b""[..]).unwrap();
        builder.append_data(&mut header(Regular, 2), &name, &b"hi"[..]).unwrap();
        builder.append_link(&mut header(Symlink, 0), "d/l", "t".repeat(300)).unwrap();
        unpack(builder.into_inner().unwrap().as_slice(), dir.path(), false).unwrap();
        assert_eq!(fs::read(dir.path().join(name)).unwrap(), b"hi");
        assert_eq!(fs::read_link(dir.path().join("d/l")).unwrap().as_os_str().len(), 300);

        // A name without end: nothing is kept of it.
        let absurd = header(tar::EntryType::GNULongName, 1 << 40);
        let endless = absurd.as_bytes().chain(io::repeat(b'x'));
        assert!(unpack(endless, dir.path(), false).unwrap_err().to_string().contains("4096"));
        let pax = header(tar::EntryType::XHeader, 1 << 40);
        assert!(unpack(pax.as_bytes().chain(io::repeat(b'x')), dir.path(), false).is_err());
    }

    fn header(kind: tar::EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(size);
        header.set_cksum();
        header
    }

    #[test]
    fn an_archive_that_breaks_off_is_an_error_wherever_it_does() {
        let bytes = archive(&[("d", Directory, ""), ("d/f", Regular, "hi"), ("d/g", Regular, "there")]);
        for length in (0..bytes.len() - 512).step_by(256) {
            let dir = tempfile::tempdir().unwrap();
            assert!(unpack(&bytes[..length], dir.path(), false).is_err(), "{length} of {}", bytes.len());
        }
    }

    #[test]
    fn nothing_leaves_the_target() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        fs::create_dir(&target).unwrap();
        for bad in [
            archive(&[("d", Directory, ""), ("d/../../x", Regular, "x")]),
            archive(&[("d", Directory, ""), ("x", Regular, "x")]),
            archive(&[("d", Directory, ""), ("d/l", Symlink, "../.."), ("d/l/x", Regular, "x")]),
            archive(&[("l", Symlink, ".."), ("l/x", Regular, "x")]),
            archive(&[("d", Directory, ""), ("d/h", Link, "../secret")]),
            archive(&[("d", Directory, ""), ("d/l", Symlink, ".."), ("d/h", Link, "d/l/secret")]),
        ] {
            fs::write(dir.path().join("secret"), "s").unwrap();
            assert!(unpack(bad.as_slice(), &target, false).is_err());
            let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert_eq!(names.len(), 2, "{names:?}");
        }
    }

    proptest! {
        #[test]
        fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let dir = tempfile::tempdir().unwrap();
            let _ = unpack(bytes.as_slice(), dir.path(), false);
        }
    }
}
