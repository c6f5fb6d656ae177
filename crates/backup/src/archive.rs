//! What is inside: records, each with a type (one byte), a length (u32, little-endian) and content.
//!
//! | type | content |
//! |---|---|
//! | `H` | [`Head`], JSON; the first |
//! | `K` | the keys of the cloud, JSON that this crate does not look into |
//! | `E` | length of a key (u16, little-endian), the key, its value |
//! | `Z` | [`Tail`], JSON; the last |

use std::io::Read;

use bytes::Bytes;
use oblak_model::{Revision, Timestamp};
use oblak_store::{Key, MAX_KEY_BYTES, MAX_TXN_BYTES};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::envelope::{Opener, Sealer};
use crate::{BackupError, Result};

const FORMAT: u32 = 1;
/// No record is longer than the largest value with the longest key.
const MOST_RECORD: usize = MAX_TXN_BYTES + MAX_KEY_BYTES + 1024;

/// Where it comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Version of the records.
    pub format: u32,
    /// Version of the program.
    pub version: String,
    /// `redb` or `etcd`.
    pub backend: String,
    /// The snapshot that was read.
    pub revision: Revision,
    /// When.
    pub at: Timestamp,
}

impl Head {
    /// Of a backup that is made now.
    #[must_use]
    pub fn new(version: &str, backend: &str, revision: Revision, at: Timestamp) -> Self {
        Self { format: FORMAT, version: version.into(), backend: backend.into(), revision, at }
    }
}

/// How much there was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tail {
    /// Number of entries.
    pub entries: u64,
}

/// Writes records.
pub struct Writer {
    sealer: Sealer,
    entries: u64,
}

impl Writer {
    /// Begins.
    ///
    /// # Errors
    /// As [`Sealer::push`].
    pub fn new(mut sealer: Sealer, head: &Head, keys: &serde_json::Value) -> Result<Self> {
        record(&mut sealer, b'H', &[&json(head)?])?;
        record(&mut sealer, b'K', &[&json(keys)?])?;
        Ok(Self { sealer, entries: 0 })
    }

    /// One entry.
    ///
    /// # Errors
    /// As [`Sealer::push`].
    pub fn entry(&mut self, key: &Key, value: &[u8]) -> Result<()> {
        let length = u16::try_from(key.len()).map_err(|_| BackupError::Crypto("a key is too long".into()))?;
        record(&mut self.sealer, b'E', &[&length.to_le_bytes(), key.as_bytes(), value])?;
        self.entries += 1;
        Ok(())
    }

    /// What is ready to be written.
    pub fn take(&mut self) -> Vec<u8> {
        self.sealer.take()
    }

    /// Ends, and gives what is still to be written.
    ///
    /// # Errors
    /// As [`Sealer::push`].
    pub fn finish(mut self) -> Result<Vec<u8>> {
        record(&mut self.sealer, b'Z', &[&json(&Tail { entries: self.entries })?])?;
        self.sealer.finish()
    }
}

fn json(value: &impl Serialize) -> Result<Zeroizing<Vec<u8>>> {
    serde_json::to_vec(value).map(Zeroizing::new).map_err(|e| BackupError::Crypto(e.to_string()))
}

fn record(sealer: &mut Sealer, kind: u8, parts: &[&[u8]]) -> Result<()> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let length = u32::try_from(length).map_err(|_| BackupError::Crypto("a record is too long".into()))?;
    sealer.push(&[kind])?;
    sealer.push(&length.to_le_bytes())?;
    parts.iter().try_for_each(|part| sealer.push(part))
}

/// A whole backup, read and checked to its end.
pub struct Archive {
    /// Where it comes from.
    pub head: Head,
    /// The keys of the cloud.
    pub keys: serde_json::Value,
    /// Every key of the store with its value, in order.
    pub entries: Vec<(Key, Bytes)>,
}

impl std::fmt::Debug for Archive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Archive({:?}, {} entries)", self.head, self.entries.len())
    }
}

/// Reads all of a backup into memory.
///
/// # Errors
/// Anything that is wrong with it; nothing of it is given out then.
pub fn read(passphrase: &str, from: impl Read) -> Result<Archive> {
    let damaged = |what: &str| BackupError::Damaged(what.into());
    let mut records = Records { opener: Opener::new(passphrase, from)?, buffer: Zeroizing::new(Vec::new()) };
    let parse = |what: &str, bytes: &[u8]| -> Result<serde_json::Value> {
        serde_json::from_slice(bytes).map_err(|e| BackupError::Damaged(format!("its {what} cannot be read: {e}")))
    };
    let head: Head = match records.next()? {
        Some((b'H', bytes)) => {
            serde_json::from_value(parse("head", &bytes)?).map_err(|e| BackupError::Damaged(e.to_string()))?
        }
        _ => return Err(damaged("it has no head")),
    };
    if head.format != FORMAT {
        return Err(BackupError::Format { found: head.format, known: FORMAT });
    }
    let keys = match records.next()? {
        Some((b'K', bytes)) => parse("keys", &bytes)?,
        _ => return Err(damaged("it has no keys")),
    };
    let mut entries: Vec<(Key, Bytes)> = Vec::new();
    loop {
        match records.next()? {
            Some((b'E', bytes)) => {
                let entry = entry(&bytes)?;
                if entries.last().is_some_and(|(last, _)| *last >= entry.0) {
                    return Err(damaged("its entries are not in order"));
                }
                entries.push(entry);
            }
            Some((b'Z', bytes)) => {
                let tail: Tail =
                    serde_json::from_value(parse("end", &bytes)?).map_err(|e| BackupError::Damaged(e.to_string()))?;
                if tail.entries != entries.len() as u64 || records.next()?.is_some() {
                    return Err(damaged("its end does not fit what comes before"));
                }
                return Ok(Archive { head, keys, entries });
            }
            _ => return Err(damaged("it has no end")),
        }
    }
}

fn entry(bytes: &[u8]) -> Result<(Key, Bytes)> {
    let damaged = || BackupError::Damaged("an entry cannot be read".into());
    let (length, rest) = bytes.split_first_chunk::<2>().ok_or_else(damaged)?;
    let (key, value) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length))).ok_or_else(damaged)?;
    let key = std::str::from_utf8(key).ok().and_then(|text| Key::new(text).ok()).ok_or_else(damaged)?;
    Ok((key, Bytes::copy_from_slice(value)))
}

struct Records<R> {
    opener: Opener<R>,
    buffer: Zeroizing<Vec<u8>>,
}

impl<R: Read> Records<R> {
    /// The next record, or the end.
    fn next(&mut self) -> Result<Option<(u8, Zeroizing<Vec<u8>>)>> {
        const HEAD: usize = 5;
        if !self.fill(HEAD)? {
            return if self.buffer.is_empty() {
                Ok(None)
            } else {
                Err(BackupError::Damaged("it ends too early".into()))
            };
        }
        let length = u32::from_le_bytes([self.buffer[1], self.buffer[2], self.buffer[3], self.buffer[4]]) as usize;
        if length > MOST_RECORD {
            return Err(BackupError::Damaged("a record is too long".into()));
        }
        if !self.fill(HEAD + length)? {
            return Err(BackupError::Damaged("it ends too early".into()));
        }
        let kind = self.buffer[0];
        let content = Zeroizing::new(self.buffer[HEAD..HEAD + length].to_vec());
        self.buffer.drain(..HEAD + length);
        Ok(Some((kind, content)))
    }

    fn fill(&mut self, wanted: usize) -> Result<bool> {
        while self.buffer.len() < wanted {
            match self.opener.next_piece()? {
                Some(piece) => self.buffer.extend_from_slice(&piece),
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}
