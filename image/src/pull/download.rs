//! One blob off the network, going on after broken connections.

use std::io::{self, Read};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use futures_util::StreamExt as _;
use oci_client::client::BlobResponse;
use oci_client::errors::OciDistributionError;
use oci_spec::image::Descriptor;
use tokio::sync::mpsc;

use super::Remote;
use crate::manifest::digest_of;
use crate::store::MAX_DOCUMENT;
use crate::{Digest, Error, Result};

/// Waits before connecting again; after that many connections in a row that brought nothing, the pull fails.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(3)];
/// Pieces of the network's size (16 KiB or so) between download and conversion.
const CHANNEL: usize = 32;

/// A piece of a blob; without one the blob is complete.
type Piece = Option<Bytes>;

/// The converter's end of a download.
pub(super) struct PieceReader {
    receiver: mpsc::Receiver<Piece>,
    current: Bytes,
    complete: bool,
}

pub(super) fn channel() -> (mpsc::Sender<Piece>, PieceReader) {
    let (sender, receiver) = mpsc::channel(CHANNEL);
    (sender, PieceReader { receiver, current: Bytes::new(), complete: false })
}

/// Blocks; so it must not be read on the runtime's own thread.
impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.complete {
            match self.receiver.blocking_recv() {
                Some(Some(piece)) => self.current = piece,
                Some(None) => self.complete = true,
                // The download failed, which is told elsewhere.
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let count = self.current.len().min(buffer.len());
        if let Some(to) = buffer.get_mut(..count) {
            self.current.copy_to_slice(to);
        }
        Ok(count)
    }
}

impl Remote {
    /// Downloads a blob into a channel. Ends early, without an error, if nobody listens any more.
    pub(super) async fn send_blob(
        &self,
        blob: &Digest,
        size: u64,
        sender: mpsc::Sender<Piece>,
    ) -> Result<()> {
        if self.fetch(blob, size, async |piece| sender.send(Some(piece)).await.is_ok()).await? {
            // The same.
            let _ = sender.send(None).await;
        }
        Ok(())
    }

    /// A blob whole and verified.
    pub(super) async fn small_blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let (blob, size) = (digest_of(descriptor)?, descriptor.size());
        if size > MAX_DOCUMENT {
            let why = format!("its configuration is {size} bytes long; {MAX_DOCUMENT} are the limit");
            return Err(self.error("pull", why));
        }
        let mut bytes = Vec::new();
        self.fetch(&blob, size, async |piece| {
            bytes.extend_from_slice(&piece);
            true
        })
        .await?;
        let actual = Digest::of(&bytes);
        if actual != blob {
            return Err(Error::DigestMismatch {
                what: format!("configuration {blob}"),
                expected: blob,
                actual,
            });
        }
        Ok(bytes)
    }

    /// Gives `size` bytes of a blob to `sink` until that says no. Whether it took all.
    async fn fetch(
        &self,
        blob: &Digest,
        size: u64,
        mut sink: impl AsyncFnMut(Bytes) -> bool,
    ) -> Result<bool> {
        let mut received: u64 = 0;
        let mut pauses = PAUSES.iter();
        while received < size {
            let before = received;
            let failure = match self.open(blob, received).await {
                Ok((mut stream, mut skip)) => loop {
                    if received == size {
                        return Ok(true);
                    }
                    let mut piece = match stream.next().await {
                        Some(Ok(piece)) => piece,
                        Some(Err(error)) => break OciDistributionError::IoError(error),
                        None => break OciDistributionError::IoError(io::ErrorKind::UnexpectedEof.into()),
                    };
                    let skipped = skip.min(piece.len() as u64);
                    skip -= skipped;
                    piece.advance(usize::try_from(skipped).unwrap_or_default());
                    // More than promised is cut off, which the digest check will not forgive.
                    piece.truncate(usize::try_from(size - received).unwrap_or(usize::MAX));
                    received += piece.len() as u64;
                    if !piece.is_empty() && !sink(piece).await {
                        return Ok(false);
                    }
                },
                Err(error) if !is_transient(&error) => return Err(self.explain("fetch a blob of", &error)),
                Err(error) => error,
            };
            if received > before {
                pauses = PAUSES.iter();
            }
            let Some(pause) = pauses.next() else {
                let why = format!("blob {blob} broke off after {received} of {size} bytes, again and again");
                return Err(match self.explain("pull", &failure) {
                    Error::Registry { action, reference, why: cause } => {
                        Error::Registry { action, reference, why: format!("{why}: {cause}") }
                    }
                    other => other,
                });
            };
            tokio::time::sleep(*pause).await;
        }
        Ok(true)
    }

    /// A stream of a blob from `offset`, and how much of it to skip where the registry sends all.
    async fn open(
        &self,
        blob: &Digest,
        offset: u64,
    ) -> Result<(impl futures_util::Stream<Item = io::Result<Bytes>> + Unpin, u64), OciDistributionError>
    {
        let digest = blob.to_string();
        let remote = self.by_digest(blob);
        let response = self.client.pull_blob_stream_partial(&remote, digest.as_str(), offset, None).await?;
        Ok(match response {
            BlobResponse::Full(stream) => (stream, offset),
            BlobResponse::Partial(stream) => (stream, 0),
        })
    }
}

/// Whether trying again may help.
fn is_transient(error: &OciDistributionError) -> bool {
    match error {
        OciDistributionError::RequestError(_) | OciDistributionError::IoError(_) => true,
        OciDistributionError::ServerError { code, .. } => *code >= 500,
        _ => false,
    }
}
