//! The tables in the file and how rows are written. All integers little-endian.
//!
//! A live value is stored once. A version that was replaced moves to `superseded`; `history` only names the keys that each batch changed, so a
//! create costs one value and a few bytes of its batch's row. See docs/decisions/0001-store-values.md.

use bytes::Bytes;
use oblak_model::Revision;
use redb::TableDefinition;
use uuid::Uuid;

use crate::engine::Head;
use crate::{Change, Key, LeaseId, TxnId, WatchEvent};

/// Grows when a row or table changes its meaning.
pub const SCHEMA: u32 = 1;

/// Counters by name, see the constants below.
pub const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Live values by key: [`Head`], then the value.
pub const LIVE: TableDefinition<&str, &[u8]> = TableDefinition::new("live");
/// Replaced versions by key and revision: the revision that replaced them (u64), then as in [`LIVE`].
pub const SUPERSEDED: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("superseded");
/// Changes of this incarnation without values: one row for each durable batch, named by its last revision. See [`encode_history`].
pub const HISTORY: TableDefinition<u64, &[u8]> = TableDefinition::new("history");
/// Leases: time to live in milliseconds. When they end is only known in memory: a restart starts every life anew, which is never too early.
pub const LEASES: TableDefinition<u64, u64> = TableDefinition::new("leases");
/// Keys attached to a lease.
pub const LEASE_KEYS: TableDefinition<(u64, &str), ()> = TableDefinition::new("lease_keys");

pub const META_SCHEMA: &str = "schema";
pub const META_INCARNATION: &str = "incarnation";
/// The newest revision when the history table was last emptied.
pub const META_BASE: &str = "base";
/// Oldest revision that a list or watch may name.
pub const META_FLOOR: &str = "floor";
pub const META_LEASES: &str = "lease_counter";

/// Bytes of an encoded [`Head`].
pub const HEAD_BYTES: usize = 32;
const UNTIL_BYTES: usize = 8;

/// A row is shorter than its format, or holds something impossible.
#[derive(Debug)]
pub struct Malformed(pub &'static str);

impl From<Malformed> for redb::Error {
    fn from(malformed: Malformed) -> Self {
        redb::Error::Corrupted(format!("a row of table {} is malformed", malformed.0))
    }
}

fn put_revision(out: &mut Vec<u8>, revision: Revision) {
    out.extend_from_slice(&revision.incarnation.to_le_bytes());
    out.extend_from_slice(&revision.n.to_le_bytes());
}

/// Writes head and value into `out`, replacing what it held.
pub fn encode_live(out: &mut Vec<u8>, head: Head, value: &[u8]) {
    out.clear();
    put_revision(out, head.revision);
    put_revision(out, head.created);
    out.extend_from_slice(&head.lease.map_or(0, |lease| lease.0).to_le_bytes());
    out.extend_from_slice(value);
}

/// Writes a replaced version into `out`; `live` is the row as it was in [`LIVE`].
pub fn encode_superseded(out: &mut Vec<u8>, until: u64, live: &[u8]) {
    out.clear();
    out.extend_from_slice(&until.to_le_bytes());
    out.extend_from_slice(live);
}

pub fn decode_live(row: &[u8]) -> Result<(Head, &[u8]), Malformed> {
    let mut cursor = Cursor { rest: row, table: "live" };
    let revision = cursor.revision()?;
    let created = cursor.revision()?;
    let lease = cursor.u64()?;
    Ok((Head { revision, created, lease: (lease != 0).then_some(LeaseId(lease)) }, cursor.rest))
}

pub fn decode_superseded(row: &[u8]) -> Result<(u64, Head, &[u8]), Malformed> {
    let until = Cursor { rest: row, table: "superseded" }.u64()?;
    let (head, value) = decode_live(&row[UNTIL_BYTES..])?;
    Ok((until, head, value))
}

const DELETED: u8 = 1;
const HAD_PREV: u8 = 2;

/// The history row of a batch: for each revision, without a gap, transaction id, number of changes, changes.
pub fn encode_history(events: &[(TxnId, WatchEvent)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(events.len() * 128);
    for (id, event) in events {
        out.extend_from_slice(id.0.as_bytes());
        let count = u16::try_from(event.changes.len()).expect("a transaction has at most 100 operations");
        out.extend_from_slice(&count.to_le_bytes());
        event.changes.iter().for_each(|change| encode_change(&mut out, change));
    }
    out
}

fn encode_change(out: &mut Vec<u8>, change: &Change) {
    let deleted = if change.value.is_none() { DELETED } else { 0 };
    out.push(deleted | if change.prev.is_some() { HAD_PREV } else { 0 });
    let len = u16::try_from(change.key.len()).expect("a key has at most 512 bytes");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(change.key.as_bytes());
    if let Some(prev) = change.prev {
        put_revision(out, prev);
        put_revision(out, change.created);
    }
}

/// A revision as history remembers it.
pub struct PastEvent {
    pub n: u64,
    pub id: TxnId,
    pub changes: Vec<PastChange>,
}

/// A change as history remembers it.
pub struct PastChange {
    pub key: Key,
    pub deleted: bool,
    pub prev: Option<Revision>,
    /// Equals the revision of the row when there was no previous one.
    pub created: Option<Revision>,
}

impl PastChange {
    pub fn with_value(self, revision: Revision, value: Option<Bytes>) -> Change {
        Change { key: self.key, value, prev: self.prev, created: self.created.unwrap_or(revision) }
    }
}

/// The revisions of the row named `last`, oldest first.
pub fn decode_history(last: u64, row: &[u8]) -> Result<Vec<PastEvent>, Malformed> {
    let mut cursor = Cursor { rest: row, table: "history" };
    let mut events = Vec::new();
    while !cursor.rest.is_empty() {
        let id = TxnId(Uuid::from_bytes(cursor.array()?));
        let count = u16::from_le_bytes(cursor.array()?);
        let changes = (0..count).map(|_| decode_change(&mut cursor)).collect::<Result<_, _>>()?;
        events.push(PastEvent { n: 0, id, changes });
    }
    let before = last.checked_sub(events.len() as u64).ok_or(Malformed("history"))?;
    for (event, n) in events.iter_mut().zip(before + 1..) {
        event.n = n;
    }
    Ok(events)
}

fn decode_change(cursor: &mut Cursor) -> Result<PastChange, Malformed> {
    let [flags] = cursor.array()?;
    let len = usize::from(u16::from_le_bytes(cursor.array()?));
    let key = Key::trusted(std::str::from_utf8(cursor.take(len)?).map_err(|_| Malformed("history"))?);
    let (mut prev, mut created) = (None, None);
    if flags & HAD_PREV != 0 {
        prev = Some(cursor.revision()?);
        created = Some(cursor.revision()?);
    }
    Ok(PastChange { key, deleted: flags & DELETED != 0, prev, created })
}

struct Cursor<'a> {
    rest: &'a [u8],
    table: &'static str,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Malformed(self.table))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let table = self.table;
        self.take(N)?.try_into().map_err(|_| Malformed(table))
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn revision(&mut self) -> Result<Revision, Malformed> {
        let incarnation = u32::from_le_bytes(self.array()?);
        Ok(Revision::new(incarnation, self.u64()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_written_and_short_rows_are_refused() {
        let head = Head { revision: Revision::new(2, 9), created: Revision::new(1, 3), lease: Some(LeaseId(7)) };
        let mut row = Vec::new();
        encode_live(&mut row, head, b"value");
        assert_eq!(row.len(), HEAD_BYTES + 5);
        assert_eq!(decode_live(&row).unwrap(), (head, &b"value"[..]));
        assert!(decode_live(&row[..HEAD_BYTES - 1]).is_err());
        let mut old = Vec::new();
        encode_superseded(&mut old, 12, &row);
        assert_eq!(decode_superseded(&old).unwrap(), (12, head, &b"value"[..]));
        assert!(decode_superseded(&old[..5]).is_err());
    }

    #[test]
    fn history_rows_come_back_as_written() {
        let key = |text: &str| Key::new(text).unwrap();
        let event = WatchEvent {
            revision: Revision::new(2, 9),
            changes: vec![
                Change { key: key("/a"), value: Some("x".into()), prev: None, created: Revision::new(2, 9) },
                Change { key: key("/b/c"), value: None, prev: Some(Revision::new(1, 4)), created: Revision::new(1, 2) },
            ],
        };
        let (first, second) = (TxnId(Uuid::from_u128(5)), TxnId(Uuid::from_u128(6)));
        let next = WatchEvent { revision: Revision::new(2, 10), changes: event.changes.clone() };
        let row = encode_history(&[(first, event.clone()), (second, next)]);
        let events = decode_history(10, &row).unwrap();
        assert_eq!(events.iter().map(|event| (event.n, event.id)).collect::<Vec<_>>(), [(9, first), (10, second)]);
        let values = [Some(Bytes::from("x")), None];
        let past = events.into_iter().next().unwrap().changes;
        let changes: Vec<_> =
            past.into_iter().zip(values).map(|(change, value)| change.with_value(event.revision, value)).collect();
        assert_eq!(changes, event.changes);
        assert!(decode_history(10, &row[..row.len() - 1]).is_err());
        assert!(decode_history(1, &row).is_err());
    }
}
