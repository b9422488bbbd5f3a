//! Files in and out of a running container, as tar archives over a stream of their own.
//!
//! What comes out of a guest is hostile: it is unpacked below the target directory only, with nothing that reaches
//! outside it, no devices, and no owner but the caller.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::agent::stream_hello::Kind;

use crate::guest::{Guest, accepted};
use crate::state::{Files, Record};
use crate::{Context, Error, Layout, Result, stop};

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
    accepted(&mut connection).and(written).context(what)
}

/// Copies a file or directory out of a container, with docker's rules for the target.
///
/// # Errors
/// The source is not there, or the target cannot be written.
pub fn out_of_container(layout: &Layout, record: &Record, from: &str, to: &Path) -> Result<()> {
    stop::running(record)?;
    let guest = Guest::new(&Files::new(layout, &record.id).vsock());
    let connection = guest.stream(record.in_guest(), "", Kind::ArchiveOut, from)?;
    unpack(connection, to, from.ends_with("/.")).context(|| format!("cannot copy {from} to {}", to.display()))
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

/// Unpacks a guest's archive. Its first entry is the thing itself; what follows lies below it.
pub(crate) fn unpack(stream: impl Read, to: &Path, contents_only: bool) -> io::Result<()> {
    let mut archive = tar::Archive::new(stream);
    let mut root: Option<(PathBuf, PathBuf)> = None; // the first entry's name, and what it becomes here
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = plain(&entry.path()?)?;
        let kind = entry.header().entry_type();
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
            let link = entry.link_name()?.ok_or_else(|| odd("a link to nothing"))?;
            let _ = fs::remove_file(&target);
            std::os::unix::fs::symlink(link, &target)?;
        } else if kind.is_hard_link() {
            let link = plain(&entry.link_name()?.ok_or_else(|| odd("a link to nothing"))?)?;
            let below = link.strip_prefix(first).map_err(|_| odd("a hard link out of what was asked for"))?;
            let source = place.join(below);
            no_links_below(place, &source)?;
            let _ = fs::remove_file(&target);
            fs::hard_link(&source, &target)?;
        }
        // Devices, fifos and sockets of a guest have no business on the host.
    }
    if root.is_none() { Err(odd("the container's archive is empty")) } else { Ok(()) }
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
