//! The tables of one open write transaction, as the engine sees them.

use bytes::Bytes;
use oblak_model::Revision;
use redb::{ReadableTable, Table, WriteTransaction};

use super::layout::{self, HISTORY, LEASE_KEYS, LEASES, LIVE, META, SUPERSEDED};
use super::writer::Leases;
use crate::engine::{Head, Tables};
use crate::{Key, LeaseId, TXN_IDS_KEPT, TxnId, WatchEvent};

pub type Result<T, E = redb::Error> = std::result::Result<T, E>;

/// Most revisions trimmed beside one batch, so that trimming never holds up commits for long.
const TRIM_REVISIONS: u64 = 512;

type Superseded<'t> = Table<'t, (&'static str, u64), &'static [u8]>;

pub struct OpenTables<'t> {
    txn: &'t WriteTransaction,
    live: Table<'t, &'static str, &'static [u8]>,
    /// Opened when the first value is replaced: a batch of creates never needs it.
    superseded: Option<Superseded<'t>>,
    leases: &'t Leases,
    row: Vec<u8>,
}

impl<'t> OpenTables<'t> {
    pub fn open(txn: &'t WriteTransaction, leases: &'t Leases) -> Result<Self> {
        Ok(Self { txn, live: txn.open_table(LIVE)?, superseded: None, leases, row: Vec::new() })
    }

    fn supersede(&mut self, key: &Key, prev: Head, row: &[u8]) -> Result<()> {
        let superseded = match &mut self.superseded {
            Some(superseded) => superseded,
            unopened => unopened.insert(self.txn.open_table(SUPERSEDED)?),
        };
        superseded.insert((key.as_str(), prev.revision.n), row)?;
        Ok(())
    }
}

impl Tables for OpenTables<'_> {
    type Error = redb::Error;

    fn head(&self, key: &Key) -> Result<Option<Head>> {
        match self.live.get(key.as_str())? {
            None => Ok(None),
            Some(row) => Ok(Some(layout::decode_live(row.value())?.0)),
        }
    }

    fn lease_alive(&self, id: LeaseId) -> bool {
        self.leases.alive(id)
    }

    fn put(&mut self, key: &Key, head: Head, value: &Bytes, prev: Option<Head>) -> Result<()> {
        layout::encode_live(&mut self.row, head, value);
        let old = self.live.insert(key.as_str(), &*self.row)?.map(|old| superseded_row(head.revision.n, old.value()));
        if let (Some(prev), Some(old)) = (prev, old) {
            self.supersede(key, prev, &old)?;
        }
        Ok(())
    }

    fn remove(&mut self, key: &Key, prev: Head, at: Revision) -> Result<()> {
        let old = self.live.remove(key.as_str())?.map(|old| superseded_row(at.n, old.value()));
        if let Some(old) = old {
            self.supersede(key, prev, &old)?;
        }
        Ok(())
    }

    fn attach(&mut self, lease: LeaseId, key: &Key) -> Result<()> {
        self.txn.open_table(LEASE_KEYS)?.insert((lease.0, key.as_str()), ())?;
        Ok(())
    }

    fn detach(&mut self, lease: LeaseId, key: &Key) -> Result<()> {
        self.txn.open_table(LEASE_KEYS)?.remove((lease.0, key.as_str()))?;
        Ok(())
    }
}

fn superseded_row(until: u64, live: &[u8]) -> Vec<u8> {
    let mut row = Vec::with_capacity(live.len() + 8);
    layout::encode_superseded(&mut row, until, live);
    row
}

/// Adds the row of a batch.
pub fn store_history(txn: &WriteTransaction, events: &[(TxnId, WatchEvent)]) -> Result<()> {
    if let Some((_, last)) = events.last() {
        txn.open_table(HISTORY)?.insert(last.revision.n, &*layout::encode_history(events))?;
    }
    Ok(())
}

/// Moves the floor up to `wanted`, as far as one batch may go; returns where it is now.
pub fn trim(txn: &WriteTransaction, floor: u64, wanted: u64, head: u64) -> Result<u64> {
    let to = wanted.min(floor + TRIM_REVISIONS);
    let mut history = txn.open_table(HISTORY)?;
    if to > floor {
        let mut superseded = txn.open_table(SUPERSEDED)?;
        for row in history.range(floor + 1..)? {
            let (last, row) = row?;
            let events = layout::decode_history(last.value(), row.value())?;
            for event in events.into_iter().filter(|event| (floor + 1..=to).contains(&event.n)) {
                for change in event.changes {
                    if let Some(prev) = change.prev {
                        superseded.remove((change.key.as_str(), prev.n))?;
                    }
                }
            }
            if last.value() >= to {
                break;
            }
        }
        txn.open_table(META)?.insert(layout::META_FLOOR, to)?;
    }
    // Rows live on below the floor as long as their transaction ids must be remembered.
    let forget = to.min(head.saturating_sub(TXN_IDS_KEPT as u64));
    for _ in 0..TRIM_REVISIONS {
        let first = history.first()?.map(|(last, _)| last.value());
        let Some(first) = first.filter(|last| *last <= forget) else { break };
        history.remove(first)?;
    }
    Ok(to)
}

/// Keys attached to a lease, in order.
pub fn lease_keys(txn: &WriteTransaction, id: LeaseId) -> Result<Vec<Key>> {
    let table = txn.open_table(LEASE_KEYS)?;
    let mut keys = Vec::new();
    for row in table.range((id.0, "")..)? {
        let (at, ()) = row.map(|(at, _)| (at, ()))?;
        let (lease, key) = at.value();
        if lease != id.0 {
            break;
        }
        keys.push(Key::trusted(key));
    }
    Ok(keys)
}

/// Stores new leases with the counter that named them.
pub fn store_lease(txn: &WriteTransaction, id: LeaseId, ttl_ms: u64, counter: u32) -> Result<()> {
    txn.open_table(LEASES)?.insert(id.0, ttl_ms)?;
    txn.open_table(META)?.insert(layout::META_LEASES, u64::from(counter))?;
    Ok(())
}

pub fn remove_lease(txn: &WriteTransaction, id: LeaseId) -> Result<()> {
    txn.open_table(LEASES)?.remove(id.0)?;
    Ok(())
}
