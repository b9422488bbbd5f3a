//! A blob becomes a layer of the store, verified on the way.

use std::fs::File;
use std::io::{self, BufReader, Read};

use super::decode::{Capped, decode};
use super::tree::convert_tar;
use super::{Fault, Limits};
use crate::digest::HashingReader;
use crate::progress::Task;
use crate::store::{LayerRecord, TempFile};
use crate::{Digest, Error, LayerProof, Progress, Result, Store, verity};

const BUFFER: usize = 256 * 1024;

/// What a layer must turn out to be.
pub(crate) struct Expected {
    /// Of the blob as it comes; absent in docker archives.
    pub(crate) blob: Option<Digest>,
    /// Of the tar stream in it.
    pub(crate) diff_id: Digest,
    /// Bytes of the blob.
    pub(crate) size: u64,
}

/// Converts `input` and adds it to the store. Under the store's lock.
pub(crate) fn add_layer(
    store: &Store,
    input: &mut dyn Read,
    expected: &Expected,
    progress: &dyn Progress,
    task: &dyn Task,
) -> Result<LayerRecord> {
    let diff_id = expected.diff_id;
    let temp = TempFile::create(store)?;
    let tails = TempFile::create(store)?.into_anonymous()?;
    let input = Counting { inner: input, task };
    let (size, notes) = convert(input, &temp, tails, expected, store.limits(), &|written, source| {
        // The layer will take about as much as is known of it already, plainly packed or not.
        store.write_error(
            &format!("layer {diff_id}"),
            expected.size.max(written.saturating_add(4096)),
            source,
        )
    })?;
    for note in notes {
        progress.note(&format!("layer {}: {note}", diff_id.short()));
    }
    let path = store.layer_path(&diff_id);
    // What was written a moment ago is still in memory.
    let content = Digest::of_file(temp.file()).map_err(|error| Error::io("read", &path)(error))?;
    let mut proof = LayerProof { content: Some(content), verity: None };
    store.write_proof(&diff_id, &proof)?;
    let published = temp.publish(&path);
    published.map_err(|error| store.write_error(&format!("layer {diff_id}"), size, error))?;
    // It is complete, and nobody has it open to write to it: `publish` has taken the only such descriptor.
    let sealed = File::open(&path).and_then(|file| verity::seal(&file));
    proof.verity = sealed.map_err(|error| Error::io("seal", &path)(error))?;
    if proof.verity.is_some() {
        store.write_proof(&diff_id, &proof)?;
    }
    Ok(LayerRecord { diff_id, size, proof })
}

fn convert(
    input: impl Read,
    temp: &TempFile,
    tails: File,
    expected: &Expected,
    limits: &Limits,
    output_error: &dyn Fn(u64, io::Error) -> Error,
) -> Result<Converted> {
    // Where the blob is the tar stream itself, once is enough.
    let blob_digest = expected.blob.filter(|blob| *blob != expected.diff_id);
    let mut blob = Maybe::new(input, blob_digest.is_some());
    let result = convert_blob(&mut blob, temp, tails, expected, limits);
    // A damaged blob makes the decompressor or tar stumble; that it is damaged says more than how it showed.
    if let Some(wanted) = blob_digest
        && !matches!(result, Err(Fault::Output(_) | Fault::Over { .. }))
    {
        let what = || format!("layer blob {wanted}");
        let (actual, _) =
            blob.finish().map_err(|source| Error::Input { what: what(), source })?.unwrap_or((wanted, 0));
        if actual != wanted {
            return Err(Error::DigestMismatch { what: what(), expected: wanted, actual });
        }
    }
    let written = || temp.file().metadata().map_or(0, |metadata| metadata.len());
    let ((size, notes), actual) =
        result.map_err(|fault| fault.of_layer(&expected.diff_id, |error| output_error(written(), error)))?;
    if actual != expected.diff_id {
        let what = format!("layer {} (uncompressed)", expected.diff_id);
        return Err(Error::DigestMismatch { what, expected: expected.diff_id, actual });
    }
    Ok((size, notes))
}

type Converted = (u64, Vec<String>);

/// Also gives the digest of the tar stream.
fn convert_blob(
    blob: &mut impl Read,
    temp: &TempFile,
    tails: File,
    expected: &Expected,
    limits: &Limits,
) -> Result<(Converted, Digest), Fault> {
    let expanded = Capped::new(decode(BufReader::with_capacity(BUFFER, blob))?, limits.layer_bytes);
    let mut stream = BufReader::with_capacity(BUFFER, HashingReader::new(expanded));
    let mut uuid = [0; 16];
    uuid.iter_mut().zip(expected.diff_id.as_bytes()).for_each(|(to, from)| *to = *from);
    let result = convert_tar(&mut stream, temp.file(), tails, limits, uuid);
    if matches!(result, Err(Fault::Output(_) | Fault::Over { .. })) {
        return result.map(|converted| (converted, expected.diff_id));
    }
    match (result, stream.into_inner().finish()) {
        // As above: what tar stumbled over is not worth telling.
        (Err(_), Ok((actual, _))) if actual != expected.diff_id => Ok(((0, Vec::new()), actual)),
        (result, drained) => Ok((result?, drained?.0)),
    }
}

/// Hashes where that is wanted.
enum Maybe<R> {
    Hashing(HashingReader<R>),
    Plain(R),
}

impl<R: Read> Maybe<R> {
    fn new(inner: R, hash: bool) -> Self {
        if hash { Self::Hashing(HashingReader::new(inner)) } else { Self::Plain(inner) }
    }

    fn finish(self) -> io::Result<Option<(Digest, u64)>> {
        match self {
            Self::Hashing(reader) => reader.finish().map(Some),
            Self::Plain(_) => Ok(None),
        }
    }
}

impl<R: Read> Read for Maybe<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Hashing(reader) => reader.read(buffer),
            Self::Plain(reader) => reader.read(buffer),
        }
    }
}

struct Counting<'a> {
    inner: &'a mut dyn Read,
    task: &'a dyn Task,
}

impl Read for Counting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.task.inc(count as u64);
        Ok(count)
    }
}
