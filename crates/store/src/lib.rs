//! The store: revisioned keys and values with guarded atomic commits, watches and leases, kept in memory or in one redb file.
//!
//! Invariant: what was acknowledged survives any crash, what was not is absent or whole, and a watch neither loses nor repeats an event.
//! A backend never looks into values; what they mean is the typed layer ([`objects`], [`Collection`], [`Cache`]), which uses a backend only
//! through [`Store`].
//!
//! Start reading at [`Store`] (the contract) and [`Txn`]; `conformance` is the contract as tests.

#[cfg(feature = "bench")]
pub mod bench;
pub mod cache;
mod collection;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
mod engine;
mod error;
mod hub;
mod key;
pub mod memory;
pub mod objects;
mod page;
pub mod redb;
mod store;
mod txn;
mod watch;

pub use self::redb::{RedbOptions, RedbStore};
pub use cache::{Cache, CacheSource};
pub use collection::{Collection, Stored, commit_settled, list_all};
pub use engine::HistoryLimits;
pub use error::{Result, StoreError};
pub use key::{Key, MAX_KEY_BYTES, Prefix};
pub use memory::MemoryStore;
pub use oblak_model::Revision;
pub use store::{Entry, Lease, MAX_PAGE, MAX_PAGE_BYTES, Page, SharedStore, Store, StoreStats};
pub use txn::{CommitOutcome, Guard, LeaseId, MAX_TXN_BYTES, MAX_TXN_OPS, Txn, TxnId, Write};
pub use watch::{Change, WatchError, WatchEvent, WatchItem, WatchStream};

/// How many of the newest transaction ids [`Store::outcome`] remembers at least.
pub const TXN_IDS_KEPT: usize = 16_384;
