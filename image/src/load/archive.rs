//! An archive's members, whether in a tar file or a directory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::layer::{Archive, Capped, EntryKind, Skip, decode};
use crate::store::{MAX_DOCUMENT, TempFile};
use crate::{Digest, Error, Limits, Progress, Result, Store};

/// No archive of images has more members.
const MAX_MEMBERS: usize = 200_000;
/// Links in an archive that refer to links.
const MAX_LINKS: u32 = 8;

/// Where members are.
pub(super) enum Members {
    Tar { file: File, index: HashMap<String, Member> },
    Directory(PathBuf),
}

pub(super) enum Member {
    File { offset: u64, size: u64 },
    Link(String),
}

impl Members {
    /// Opens a file or directory. A compressed archive, or one from a pipe, is first spooled into the store.
    pub(super) fn open(store: &Store, path: &Path, progress: &dyn Progress) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if metadata.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        let mut magic = [0; 6];
        if metadata.is_file() {
            let count = file.read_at(&mut magic, 0).map_err(Error::io("read", path))?;
            let packed = matches!(magic, [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd, ..]);
            let unknown = matches!(magic, [0xfd, b'7', b'z', ..] | [b'B', b'Z', b'h', ..]);
            if !packed && !unknown {
                if count == 0 {
                    return Err(bad(&path.display().to_string(), "it is empty"));
                }
                return Self::index(file, &path.display().to_string());
            }
        }
        Self::spool(store, &mut file, &path.display().to_string(), progress)
    }

    pub(super) fn spool(
        store: &Store,
        input: &mut dyn Read,
        what: &str,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let Limits { archive_bytes, .. } = *store.limits();
        let mut file = TempFile::create(store)?.into_anonymous()?;
        let task = progress.start("reading archive", None);
        let failed = |source| Error::Input { what: what.to_owned(), source };
        let mut input =
            Capped::new(decode(BufReader::with_capacity(256 * 1024, input)).map_err(failed)?, archive_bytes);
        let mut buffer = vec![0; 256 * 1024];
        let mut total: u64 = 0;
        loop {
            let count = match input.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(error)),
            };
            let written = file.write_all(buffer.get(..count).unwrap_or_default());
            total = total.saturating_add(count as u64);
            written.map_err(|error| store.write_error("the unpacked archive", total, error))?;
            task.inc(count as u64);
        }
        task.finish("done");
        if total == 0 {
            return Err(bad(what, "it is empty"));
        }
        Self::index(file, what)
    }

    fn index(file: File, what: &str) -> Result<Self> {
        let failed = |source| Error::Input { what: what.to_owned(), source };
        let end = (&file).seek(SeekFrom::End(0)).map_err(failed)?;
        let mut archive = Archive::new(Section { file: &file, offset: 0, end });
        let mut index = HashMap::new();
        loop {
            let entry = archive.next().map_err(|fault| match fault {
                crate::layer::Fault::Input(source) => failed(source),
                other => bad(what, &other.to_string()),
            })?;
            let Some(entry) = entry else { break };
            let name = clean(&String::from_utf8_lossy(&entry.path));
            let member = match entry.kind {
                EntryKind::File => {
                    let offset = archive.input().offset;
                    if entry.size > end.saturating_sub(offset) {
                        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
                    }
                    Member::File { offset, size: entry.size }
                }
                // Old docker versions write equal layers once.
                EntryKind::Symlink(target) => {
                    let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent);
                    Member::Link(clean(&format!("{parent}/{}", String::from_utf8_lossy(&target))))
                }
                EntryKind::HardLink(target) => Member::Link(clean(&String::from_utf8_lossy(&target))),
                _ => continue,
            };
            if index.len() >= MAX_MEMBERS {
                return Err(bad(what, "it has too many members"));
            }
            index.insert(name, member);
        }
        Ok(Self::Tar { file, index })
    }

    /// A member's content and size; none if there is no such member.
    pub(super) fn open_member(&self, name: &str) -> Result<Option<(Box<dyn Read + Send + '_>, u64)>> {
        match self {
            Self::Directory(directory) => {
                let path = directory.join(clean(name));
                let file = match File::open(&path) {
                    Ok(file) => file,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(Error::io("open", &path)(error)),
                };
                let size = file.metadata().map_err(Error::io("read", &path))?.len();
                Ok(Some((Box::new(file), size)))
            }
            Self::Tar { file, index } => {
                let mut name = clean(name);
                for _ in 0..MAX_LINKS {
                    match index.get(&name) {
                        Some(Member::Link(target)) => name.clone_from(target),
                        Some(Member::File { offset, size }) => {
                            let section =
                                Section { file, offset: *offset, end: offset.saturating_add(*size) };
                            return Ok(Some((Box::new(section), *size)));
                        }
                        None => return Ok(None),
                    }
                }
                Ok(None)
            }
        }
    }

    /// A small member whole; none if there is no such member.
    pub(super) fn read_member(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some((reader, size)) = self.open_member(name)? else { return Ok(None) };
        if size > MAX_DOCUMENT {
            return Err(bad(
                name,
                &format!("it is {size} bytes long; {MAX_DOCUMENT} are the limit for its kind"),
            ));
        }
        let mut bytes = Vec::new();
        let failed = |source| Error::Input { what: name.to_owned(), source };
        reader.take(MAX_DOCUMENT).read_to_end(&mut bytes).map_err(failed)?;
        Ok(Some(bytes))
    }

    /// A blob of an OCI layout, small and verified.
    pub(super) fn read_blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        let name = blob_path(digest);
        let bytes = self.read_member(&name)?.ok_or_else(|| bad(&name, "it is missing from the archive"))?;
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(Error::DigestMismatch { what: format!("blob {digest}"), expected: *digest, actual });
        }
        Ok(bytes)
    }
}

/// Where an OCI layout keeps a blob.
pub(super) fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

pub(super) fn bad(what: &str, why: &str) -> Error {
    Error::BadImage { what: what.to_owned(), why: why.to_owned() }
}

/// A path below the archive's root, whatever it was.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// A part of a file, read without moving the file's own position.
struct Section<'a> {
    file: &'a File,
    offset: u64,
    end: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.offset)).unwrap_or(usize::MAX);
        let want = left.min(buffer.len());
        let count = self.file.read_at(buffer.get_mut(..want).unwrap_or_default(), self.offset)?;
        if count == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset = self.offset.saturating_add(count as u64);
        Ok(count)
    }
}

impl Skip for Section<'_> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        self.offset = self.offset.saturating_add(count);
        // The padding of the last member may be cut off.
        if self.offset > self.end.next_multiple_of(512) {
            Err(io::ErrorKind::UnexpectedEof.into())
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::clean;

    #[test]
    fn member_names_stay_inside() {
        assert_eq!(clean("./a//b/"), "a/b");
        assert_eq!(clean("a/../../../etc/passwd"), "etc/passwd");
        assert_eq!(clean("/"), "");
    }
}
