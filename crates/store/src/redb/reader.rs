//! Reads, each from one redb snapshot, on threads that may block.

use std::ops::Bound;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use oblak_model::Revision;
use redb::{
    AccessGuard, Database, ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable, ReadableTableMetadata,
};
use tokio::sync::Semaphore;

use super::layout::{self, HEAD_BYTES, HISTORY, LIVE, META, SUPERSEDED};
use super::{Shared, file};
use crate::engine::{self, Row};
use crate::hub::{Chunk, History, STEP};
use crate::{Change, Entry, Key, Page, Prefix, Result, StoreError, WatchError, WatchEvent, memory, page};

/// Reads at a time: they are CPU work once the pages are cached, so more would not be faster.
const READERS: usize = 16;

pub struct Reader {
    shared: Arc<Shared>,
    slots: Arc<Semaphore>,
}

impl Reader {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, slots: Arc::new(Semaphore::new(READERS)) }
    }

    /// Runs `work` on a blocking thread. Dropping the future lets it finish unheard.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database, &Shared) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let slot = Arc::clone(&self.slots).acquire_owned().await.map_err(|_| StoreError::Closed)?;
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || {
            let _slot = slot;
            shared.with_database(|database| work(database, &shared))?
        })
        .await
        .map_err(|_| StoreError::Closed)?
    }

    async fn snapshot<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ReadTransaction) -> Result<T, Failed> + Send + 'static,
    ) -> Result<T> {
        self.run(move |database, shared| {
            let read = || work(&database.begin_read()?);
            read().map_err(|failed| match failed {
                Failed::Store(error) => error,
                Failed::Redb(error) => file::explain("read", &shared.path, error),
            })
        })
        .await
    }

    pub async fn get(&self, key: &Key) -> Result<Option<Entry>> {
        let key = key.clone();
        self.snapshot(move |txn| {
            let live = txn.open_table(LIVE)?;
            let Some(row) = live.get(key.as_str())? else { return Ok(None) };
            let (head, value) = layout::decode_live(row.value())?;
            let value = Bytes::copy_from_slice(value);
            Ok(Some(Entry { key, value, revision: head.revision, created: head.created }))
        })
        .await
    }

    pub async fn list(
        &self,
        prefix: &Prefix,
        limit: usize,
        start_after: Option<Key>,
        at: Option<Revision>,
    ) -> Result<Page> {
        let bounds = page::bounds(prefix, start_after.as_ref());
        self.snapshot(move |txn| {
            let (head, floor) = position(txn)?;
            let at = memory::snapshot(at, head, floor).map_err(Failed::Store)?;
            match bounds {
                None => Ok(page::empty(at)),
                Some((from, end)) => list(txn, (&from, &end), limit, at, head),
            }
        })
        .await
    }

    /// Live keys, and bytes of the file.
    pub async fn size(&self) -> Result<(u64, u64)> {
        self.run(|database, shared| {
            let keys = (|| Ok::<_, redb::Error>(database.begin_read()?.open_table(LIVE)?.len()?))();
            let keys = keys.map_err(|error| file::explain("read", &shared.path, error))?;
            let meta = std::fs::metadata(&shared.path)
                .map_err(|source| file::explain_io("read", shared.path.clone(), source))?;
            Ok((keys, meta.len()))
        })
        .await
    }
}

enum Failed {
    Store(StoreError),
    Redb(redb::Error),
}

impl<E: Into<redb::Error>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::Redb(error.into())
    }
}

/// Newest and oldest revision of the snapshot.
fn position(txn: &ReadTransaction) -> Result<(Revision, u64), redb::Error> {
    let meta = txn.open_table(META)?;
    let number = |name: &str| Ok::<_, redb::Error>(meta.get(name)?.map_or(0, |value| value.value()));
    let newest = txn.open_table(HISTORY)?.last()?.map_or(0, |(n, _)| n.value());
    let incarnation = u32::try_from(number(layout::META_INCARNATION)?).unwrap_or(u32::MAX);
    Ok((Revision::new(incarnation, number(layout::META_BASE)?.max(newest)), number(layout::META_FLOOR)?))
}

type Rows<K> = ReadOnlyTable<K, &'static [u8]>;
type Value = (AccessGuard<'static, &'static [u8]>, usize);

fn list(
    txn: &ReadTransaction,
    (from, end): (&str, &str),
    limit: usize,
    at: Revision,
    head: Revision,
) -> Result<Page, Failed> {
    let live = txn.open_table(LIVE)?.range::<&str>((Bound::Excluded(from), Bound::Excluded(end)))?.filter_map(|row| {
        let read = || -> Result<Option<Row<Value>>, redb::Error> {
            let (key, value) = row?;
            let (head, _) = layout::decode_live(value.value())?;
            Ok((head.revision.n <= at.n).then(|| Row {
                key: Key::trusted(key.value()),
                head,
                value: (value, HEAD_BYTES),
            }))
        };
        read().transpose()
    });
    // At the newest revision nothing that was superseded can be visible.
    let last = if at == head { from } else { end };
    let old = txn.open_table(SUPERSEDED)?;
    let old = old
        .range::<(&str, u64)>((Bound::Excluded((from, u64::MAX)), Bound::Included((last, u64::MAX))))?
        .filter_map(|row| {
            let read = || -> Result<Option<Row<Value>>, redb::Error> {
                let (key, value) = row?;
                let (until, head, _) = layout::decode_superseded(value.value())?;
                let visible = head.revision.n <= at.n && at.n < until;
                Ok(visible.then(|| Row { key: Key::trusted(key.value().0), head, value: (value, HEAD_BYTES + 8) }))
            };
            read().transpose()
        });
    Ok(page::collect(engine::merge(live, old), limit, at, |(row, skip)| Bytes::copy_from_slice(&row.value()[skip..]))?)
}

#[async_trait]
impl History for Reader {
    async fn read(&self, prefix: &Prefix, after: u64) -> Result<Chunk, WatchError> {
        let prefix = prefix.clone();
        let hub = Arc::clone(&self.shared.hub);
        let chunk = self
            .snapshot(move |txn| {
                let (head, floor) = position(txn)?;
                if after < floor { Ok(None) } else { Ok(Some(replay(txn, &prefix, after, head.incarnation)?)) }
            })
            .await?;
        chunk.ok_or_else(|| WatchError::Compacted { oldest: hub.oldest() })
    }
}

fn replay(txn: &ReadTransaction, prefix: &Prefix, after: u64, incarnation: u32) -> Result<Chunk, redb::Error> {
    let mut chunk = Chunk { events: Vec::new(), scanned: after };
    let (live, superseded) = (txn.open_table(LIVE)?, txn.open_table(SUPERSEDED)?);
    for row in txn.open_table(HISTORY)?.range(after + 1..)? {
        let (last, row) = row?;
        // The row of a batch may begin before our position.
        let events = layout::decode_history(last.value(), row.value())?.into_iter().filter(|event| event.n > after);
        for event in events {
            let revision = Revision::new(incarnation, event.n);
            let mut changes: Vec<Change> = Vec::new();
            for change in event.changes.into_iter().filter(|change| prefix.contains(&change.key)) {
                let value =
                    if change.deleted { None } else { Some(value_at(&live, &superseded, &change.key, revision.n)?) };
                changes.push(change.with_value(revision, value));
            }
            if !changes.is_empty() {
                chunk.events.push(WatchEvent { revision, changes });
            }
        }
        chunk.scanned = last.value();
        if chunk.scanned - after >= STEP as u64 {
            break;
        }
    }
    Ok(chunk)
}

/// The value that revision `n` gave to `key`: the live one, or one replaced since.
fn value_at(
    live: &Rows<&'static str>,
    superseded: &Rows<(&'static str, u64)>,
    key: &Key,
    n: u64,
) -> Result<Bytes, redb::Error> {
    if let Some(row) = live.get(key.as_str())? {
        let (head, value) = layout::decode_live(row.value())?;
        if head.revision.n == n {
            return Ok(Bytes::copy_from_slice(value));
        }
    }
    match superseded.get((key.as_str(), n))? {
        Some(row) => Ok(Bytes::copy_from_slice(layout::decode_superseded(row.value())?.2)),
        None => Err(redb::Error::Corrupted(format!("the version {n} of {key} is missing"))),
    }
}
