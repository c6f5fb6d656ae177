//! The contract that every backend keeps; `crate::conformance` checks it.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use oblak_model::Revision;

use crate::{CommitOutcome, Key, LeaseId, Prefix, Result, Txn, TxnId, WatchError, WatchStream};

/// Most entries in one page; a larger limit is cut to this.
pub const MAX_PAGE: usize = 10_000;
/// A page ends early after this many bytes of values.
pub const MAX_PAGE_BYTES: usize = 8 << 20;

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: Key,
    /// Its value.
    pub value: Bytes,
    /// When it was last modified.
    pub revision: Revision,
    /// When it came into being; survives updates, not a delete and re-create.
    pub created: Revision,
}

/// Part of a list, in key order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The entries.
    pub entries: Vec<Entry>,
    /// The snapshot they were read from. Pass it as `at` for the next page, and as `from` to a watch that continues the list.
    pub revision: Revision,
    /// Whether more entries follow the last one.
    pub more: bool,
}

/// A right that ends by itself unless renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Name.
    pub id: LeaseId,
    /// Life after each renewal. A holder counts from *before* it sent the request.
    pub ttl: Duration,
}

/// Figures for metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Name of the backend.
    pub backend: &'static str,
    /// Live keys.
    pub keys: u64,
    /// Size of the file, or of keys and values in memory, in bytes.
    pub bytes: u64,
    /// Transactions committed since start.
    pub commits: u64,
    /// Durable batches since start; `commits / batches` is the gain of group commit.
    pub batches: u64,
    /// Calls of fdatasync(2) since start.
    pub fsyncs: u64,
    /// Open watches.
    pub watchers: u64,
    /// Live leases.
    pub leases: u64,
    /// Current revision.
    pub revision: Revision,
    /// Oldest revision that a list or watch may name.
    pub oldest: Revision,
}

/// A revisioned key-value store.
///
/// Order is total: revisions grow by commit, a read sees everything acknowledged before it started, and every commit is atomic for
/// readers, watchers and crashes alike. A dropped `commit` future may still commit.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The newest value of `key`.
    async fn get(&self, key: &Key) -> Result<Option<Entry>>;

    /// Entries below `prefix` in key order, at most `limit` (and [`MAX_PAGE`], [`MAX_PAGE_BYTES`]), after `start_after`, as of `at` or now.
    ///
    /// # Errors
    /// [`crate::StoreError::Compacted`] when `at` is too old, of another incarnation, or has not happened.
    async fn list(&self, prefix: &Prefix, limit: usize, start_after: Option<Key>, at: Option<Revision>)
    -> Result<Page>;

    /// Applies all writes when all guards hold. Committing an id again that was committed answers the first revision and writes nothing.
    ///
    /// # Errors
    /// After an error nothing of the transaction was, or will be, written.
    async fn commit(&self, txn: Txn) -> Result<CommitOutcome>;

    /// The revision at which a transaction was committed, to resolve [`CommitOutcome::Unknown`]. None: it was not, and is not on its way.
    /// At least the last [`crate::TXN_IDS_KEPT`] ids are remembered.
    async fn outcome(&self, id: TxnId) -> Result<Option<Revision>>;

    /// Changes below `prefix` strictly after `from`. [`Revision::ZERO`] asks for everything since the empty store.
    ///
    /// # Errors
    /// [`WatchError::Compacted`] when they are not kept any more, here or later in the stream when the reader is too slow.
    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<WatchStream, WatchError>;

    /// A new lease.
    async fn grant(&self, ttl: Duration) -> Result<Lease>;

    /// Starts the life of a lease anew.
    ///
    /// # Errors
    /// [`crate::StoreError::LeaseGone`] when it has expired or was revoked.
    async fn renew(&self, id: LeaseId) -> Result<Lease>;

    /// Ends a lease and deletes the keys attached to it. Revoking what is gone succeeds.
    async fn revoke(&self, id: LeaseId) -> Result<()>;

    /// The newest revision.
    async fn revision(&self) -> Result<Revision>;

    /// Forgets what was superseded before `keep_from`: lists and watches from `keep_from` on still work, older ones are told to start over.
    async fn compact(&self, keep_from: Revision) -> Result<()>;

    /// Figures for metrics.
    async fn stats(&self) -> Result<StoreStats>;
}

/// A store shared between tasks.
pub type SharedStore = std::sync::Arc<dyn Store>;
