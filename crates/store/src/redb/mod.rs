//! The store in one redb file: one writer with group commit, any number of readers.
//!
//! Reading order: [`layout`] (what is in the file), [`writer`] (how a commit becomes durable), [`reader`].

mod backend;
mod file;
mod gather;
mod layout;
mod leases;
mod queue;
mod reader;
mod tables;
#[cfg(test)]
mod tests;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use oblak_model::Revision;
use oblak_platform::clock::{self, SharedClock};
use redb::Database;
use tokio::sync::{Semaphore, oneshot};

use self::backend::Meter;
pub use self::file::restore;
use self::queue::Queue;
use self::reader::Reader;
use self::writer::{Job, Queued, Writer};
use crate::hub::{self, History, Hub};
use crate::{
    CommitOutcome, Entry, HistoryLimits, Key, Lease, LeaseId, Page, Prefix, Result, Store, StoreError, StoreStats, Txn,
    TxnId, WatchError, WatchStream,
};

/// redb's page cache; the system's page cache holds the rest.
const CACHE_BYTES: usize = 8 << 20;
/// The queue in front of the writer is measured in units of this many bytes, at least one for each job.
const QUEUE_UNIT: usize = 4096;
/// Units of the queue: at most this many jobs or 32 MiB wait; further callers wait outside.
const QUEUE_UNITS: usize = 8192;

/// How to open a store.
#[derive(Clone)]
pub struct RedbOptions {
    /// How much past is kept.
    pub history: HistoryLimits,
    /// Time for leases and ages.
    pub clock: SharedClock,
    /// Size of redb's page cache in bytes.
    pub cache_bytes: usize,
}

impl Default for RedbOptions {
    fn default() -> Self {
        Self { history: HistoryLimits::default(), clock: clock::system(), cache_bytes: CACHE_BYTES }
    }
}

#[derive(Default)]
struct Counters {
    commits: AtomicU64,
    batches: AtomicU64,
    leases: AtomicU64,
}

/// What the handle, the writer and the readers have in common.
struct Shared {
    path: PathBuf,
    cache_bytes: usize,
    /// The open file, or why it is closed. Held for writing only to close and reopen.
    database: RwLock<Result<Database, String>>,
    meter: Arc<Meter>,
    hub: Arc<Hub>,
    stats: Counters,
}

impl Shared {
    /// Uses the file while nobody can close it. Blocks.
    fn with_database<T>(&self, work: impl FnOnce(&Database) -> T) -> Result<T> {
        match &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
            Ok(database) => Ok(work(database)),
            Err(why) => Err(StoreError::Io {
                action: "use",
                path: self.path.clone(),
                source: std::io::Error::other(why.clone()),
            }),
        }
    }

    fn is_open(&self) -> bool {
        self.database.read().unwrap_or_else(PoisonError::into_inner).is_ok()
    }

    fn why_closed(&self) -> String {
        self.database.read().unwrap_or_else(PoisonError::into_inner).as_ref().err().cloned().unwrap_or_default()
    }

    /// Waits for readers, then closes the file.
    fn close(&self, why: &str) {
        *self.database.write().unwrap_or_else(PoisonError::into_inner) = Err(why.to_owned());
    }

    fn reopened(&self, database: Database) {
        *self.database.write().unwrap_or_else(PoisonError::into_inner) = Ok(database);
    }
}

/// The store. When the last handle is dropped, queued work is finished and the file is closed and unlocked.
pub struct RedbStore {
    shared: Arc<Shared>,
    reader: Arc<Reader>,
    queue: Arc<Queue<Queued>>,
    room: Arc<Semaphore>,
    thread: Option<JoinHandle<()>>,
}

impl RedbStore {
    /// Opens the database at `path`, creating it (mode 0600) when there is none, and checks all of it. Blocks while it reads the file.
    ///
    /// # Errors
    /// [`StoreError::Locked`], [`StoreError::Corrupt`], [`StoreError::Schema`], [`StoreError::DiskFull`], [`StoreError::Io`].
    pub fn open(path: &Path, options: RedbOptions) -> Result<Self> {
        Self::open_metered(path, options, Arc::default())
    }

    fn open_metered(path: &Path, options: RedbOptions, meter: Arc<Meter>) -> Result<Self> {
        let (database, loaded) = file::open_or_create(path, options.cache_bytes, &meter)?;
        let hub = Hub::new(loaded.head, loaded.floor);
        let shared = Arc::new(Shared {
            path: path.to_path_buf(),
            cache_bytes: options.cache_bytes,
            database: RwLock::new(Ok(database)),
            meter,
            hub,
            stats: Counters { leases: AtomicU64::new(loaded.leases.len() as u64), ..Counters::default() },
        });
        let queue = Arc::<Queue<Queued>>::default();
        let writer = Writer::new(Arc::clone(&shared), Arc::clone(&queue), options.clock, options.history, loaded);
        let thread = std::thread::Builder::new()
            .name("oblak-store".into())
            .spawn(move || writer.run())
            .map_err(|source| file::explain_io("start the writer of", path.to_path_buf(), source))?;
        Ok(Self {
            reader: Arc::new(Reader::new(Arc::clone(&shared))),
            shared,
            queue,
            room: Arc::new(Semaphore::new(QUEUE_UNITS)),
            thread: Some(thread),
        })
    }

    /// Writes a compact copy of everything live to a new file at `path` while the store stays in use. [`restore`] makes a database of it.
    ///
    /// # Errors
    /// When `path` exists or cannot be written.
    pub async fn backup(&self, path: &Path) -> Result<Revision> {
        let path = path.to_path_buf();
        self.reader.run(move |database, shared| file::backup(database, &path, shared.cache_bytes)).await
    }

    /// Queues a job and waits for its answer; none when the writer died before it gave one.
    async fn ask<T>(&self, bytes: usize, job: impl FnOnce(oneshot::Sender<T>) -> Job) -> Result<Option<T>> {
        let units = u32::try_from(1 + bytes / QUEUE_UNIT).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.room).acquire_many_owned(units).await.map_err(|_| StoreError::Closed)?;
        let (reply, answer) = oneshot::channel();
        self.queue.push(Queued { job: job(reply), _permit: permit }).map_err(|_| StoreError::Closed)?;
        Ok(answer.await.ok())
    }
}

impl Drop for RedbStore {
    fn drop(&mut self) {
        self.queue.close();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the writer of the store had panicked");
        }
    }
}

#[async_trait]
impl Store for RedbStore {
    async fn get(&self, key: &Key) -> Result<Option<Entry>> {
        self.reader.get(key).await
    }

    async fn list(
        &self,
        prefix: &Prefix,
        limit: usize,
        start_after: Option<Key>,
        at: Option<Revision>,
    ) -> Result<Page> {
        self.reader.list(prefix, limit, start_after, at).await
    }

    async fn commit(&self, txn: Txn) -> Result<CommitOutcome> {
        txn.check()?;
        let id = txn.id;
        let answer = self.ask(txn.bytes(), |reply| Job::Commit(txn, reply)).await?;
        answer.unwrap_or(Ok(CommitOutcome::Unknown(id)))
    }

    async fn outcome(&self, id: TxnId) -> Result<Option<Revision>> {
        // Through the queue: whatever was sent before has been decided by then.
        self.ask(0, |reply| Job::Outcome(id, reply)).await?.unwrap_or(Err(StoreError::Closed))
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<WatchStream, WatchError> {
        let history: Arc<dyn History> = Arc::<Reader>::clone(&self.reader);
        hub::watch(&self.shared.hub, history, prefix, from)
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        self.ask(0, |reply| Job::Grant(ttl, reply)).await?.unwrap_or(Err(StoreError::Closed))
    }

    async fn renew(&self, id: LeaseId) -> Result<Lease> {
        self.ask(0, |reply| Job::Renew(id, reply)).await?.unwrap_or(Err(StoreError::Closed))
    }

    async fn revoke(&self, id: LeaseId) -> Result<()> {
        self.ask(0, |reply| Job::Revoke(id, reply)).await?.unwrap_or(Err(StoreError::Closed))
    }

    async fn revision(&self) -> Result<Revision> {
        Ok(self.shared.hub.head())
    }

    async fn compact(&self, keep_from: Revision) -> Result<()> {
        self.ask(0, |reply| Job::Compact(keep_from, reply)).await?.unwrap_or(Err(StoreError::Closed))
    }

    async fn stats(&self) -> Result<StoreStats> {
        let (keys, bytes) = self.reader.size().await?;
        let shared = &self.shared;
        Ok(StoreStats {
            backend: "redb",
            keys,
            bytes,
            commits: shared.stats.commits.load(Ordering::Relaxed),
            batches: shared.stats.batches.load(Ordering::Relaxed),
            fsyncs: shared.meter.syncs.load(Ordering::Relaxed),
            watchers: shared.hub.watchers(),
            leases: shared.stats.leases.load(Ordering::Relaxed),
            revision: shared.hub.head(),
            oldest: shared.hub.oldest(),
        })
    }
}
