//! An image as one stream: a tar of its record and its blobs, made on the fly and the same every time, so it can be read from any offset.

use std::collections::VecDeque;
use std::io::SeekFrom;
use std::path::PathBuf;

use bytes::Bytes;
use futures_util::stream;
use oblak_platform::driver::BoxRead;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::StreamReader;

use crate::archive::RECORD;
use crate::blobs::CHUNK;
use crate::error::{Context, ImageError, Result};
use crate::record::StoredRecord;
use crate::store::Inner;

const BLOCK: u64 = 512;

#[derive(Clone)]
enum Segment {
    Bytes(Bytes),
    File { path: PathBuf, length: u64 },
}

impl Segment {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { length, .. } => *length,
        }
    }
}

/// An image ready to be sent.
#[derive(Clone)]
pub struct Export {
    segments: Vec<Segment>,
    length: u64,
}

struct Reading {
    rest: VecDeque<Segment>,
    file: Option<(tokio::fs::File, u64)>,
    skip: u64,
}

impl Export {
    pub(crate) fn of(inner: &Inner, record: &StoredRecord) -> Result<Self> {
        // Who holds the image here is nobody's business there.
        let sent = StoredRecord { holders: std::collections::BTreeSet::new(), ..record.clone() };
        let json = serde_json::to_vec(&sent).map_err(|e| ImageError::io("cannot export", &e.into()))?;
        let mut segments = vec![header(RECORD, json.len() as u64)?];
        pad(&mut segments, Segment::Bytes(json.into()));
        let mut blobs = record.payload.blobs();
        blobs.sort();
        blobs.dedup();
        for digest in blobs {
            let path = inner.blobs.path(&digest);
            let length =
                std::fs::metadata(&path).context(|| format!("image {} has lost blob {digest}", record.id))?.len();
            segments.push(header(&format!("blobs/sha256/{}", digest.hex()), length)?);
            pad(&mut segments, Segment::File { path, length });
        }
        segments.push(Segment::Bytes(Bytes::from_static(&[0; 2 * BLOCK as usize])));
        let length = segments.iter().map(Segment::len).sum();
        Ok(Self { segments, length })
    }

    /// Bytes of the whole stream.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Never: even an image without blobs has a record.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The stream from `offset`; empty behind its end.
    #[must_use]
    pub fn reader(&self, offset: u64) -> BoxRead {
        let start = Reading { rest: self.segments.clone().into(), file: None, skip: offset };
        let pieces = stream::try_unfold(start, |mut reading| async move {
            let piece = reading.next().await?;
            Ok::<_, std::io::Error>(piece.map(|piece| (piece, reading)))
        });
        Box::new(StreamReader::new(Box::pin(pieces)))
    }
}

impl Reading {
    async fn next(&mut self) -> std::io::Result<Option<Bytes>> {
        loop {
            if let Some((file, left)) = self.file.as_mut().filter(|(_, left)| *left > 0) {
                let mut buffer = vec![0; CHUNK.min(usize::try_from(*left).unwrap_or(CHUNK))];
                let n = file.read(&mut buffer).await?;
                if n == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                *left -= n as u64;
                buffer.truncate(n);
                return Ok(Some(buffer.into()));
            }
            self.file = None;
            let Some(segment) = self.rest.pop_front() else { return Ok(None) };
            if self.skip >= segment.len() {
                self.skip -= segment.len();
                continue;
            }
            let skip = std::mem::take(&mut self.skip);
            match segment {
                Segment::Bytes(bytes) => return Ok(Some(bytes.slice(usize::try_from(skip).unwrap_or(0)..))),
                Segment::File { path, length } => {
                    let mut file = tokio::fs::File::open(&path).await?;
                    file.seek(SeekFrom::Start(skip)).await?;
                    self.file = Some((file, length - skip));
                }
            }
        }
    }
}

fn header(name: &str, length: u64) -> Result<Segment> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).context(|| "cannot export".into())?;
    header.set_size(length);
    header.set_mode(0o644);
    header.set_cksum();
    Ok(Segment::Bytes(Bytes::copy_from_slice(header.as_bytes())))
}

fn pad(segments: &mut Vec<Segment>, content: Segment) {
    let gap = content.len().next_multiple_of(BLOCK) - content.len();
    segments.push(content);
    if gap > 0 {
        segments.push(Segment::Bytes(vec![0; usize::try_from(gap).unwrap_or(0)].into()));
    }
}
