//! Transactions: guards that must hold, writes that then all happen, and what became of them.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use oblak_model::Revision;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Key, Result, StoreError};

/// Most guards plus writes in one transaction, on every backend (etcd's default is 128).
pub const MAX_TXN_OPS: usize = 100;
/// Most bytes of keys and values in one transaction, on every backend (etcd's default is 1.5 MiB).
pub const MAX_TXN_BYTES: usize = 1 << 20;

/// Names one attempt to commit. Committing the same id again answers what the first attempt did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TxnId(pub Uuid);

impl fmt::Display for TxnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Names a lease. Never used twice, restores included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl FromStr for LeaseId {
    type Err = std::num::ParseIntError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u64::from_str_radix(text, 16).map(Self)
    }
}

/// A condition at the moment of the commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guard {
    /// The key exists and was last modified at exactly this revision.
    Revision(Key, Revision),
    /// The key does not exist.
    Absent(Key),
    /// The key exists, whatever its revision.
    Present(Key),
    /// The lease has neither expired nor been revoked.
    LeaseAlive(LeaseId),
}

impl Guard {
    fn bytes(&self) -> usize {
        match self {
            Self::Revision(key, _) | Self::Absent(key) | Self::Present(key) => key.len() + 12,
            Self::LeaseAlive(_) => 8,
        }
    }
}

/// A change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Creates or replaces. With a lease the key disappears when the lease does; without one it is detached from any lease it had.
    Put {
        /// Which key.
        key: Key,
        /// New value.
        value: Bytes,
        /// Lease to live and die with.
        lease: Option<LeaseId>,
    },
    /// Removes; removing what is not there succeeds and changes nothing.
    Delete {
        /// Which key.
        key: Key,
    },
}

impl Write {
    /// The key written.
    #[must_use]
    pub fn key(&self) -> &Key {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Put { key, value, .. } => key.len() + value.len(),
            Self::Delete { key } => key.len(),
        }
    }
}

/// Guards and writes that happen together or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Txn {
    /// Name of the attempt.
    pub id: TxnId,
    /// All must hold.
    pub guards: Vec<Guard>,
    /// Applied when they do; each key at most once.
    pub writes: Vec<Write>,
}

impl Txn {
    /// An empty transaction under this name. Take the id from `oblak_platform::random` so that a simulation stays deterministic.
    #[must_use]
    pub fn new(id: TxnId) -> Self {
        Self { id, guards: Vec::new(), writes: Vec::new() }
    }

    /// An empty transaction with a fresh random name from the operating system.
    #[must_use]
    pub fn random() -> Self {
        Self::new(TxnId(Uuid::now_v7()))
    }

    /// Adds a condition.
    #[must_use]
    pub fn guard(mut self, guard: Guard) -> Self {
        self.guards.push(guard);
        self
    }

    /// Adds a write.
    #[must_use]
    pub fn write(mut self, write: Write) -> Self {
        self.writes.push(write);
        self
    }

    /// Adds a put without lease.
    #[must_use]
    pub fn put(self, key: Key, value: impl Into<Bytes>) -> Self {
        self.write(Write::Put { key, value: value.into(), lease: None })
    }

    /// Adds a put that is deleted with its lease.
    #[must_use]
    pub fn put_leased(self, key: Key, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        self.write(Write::Put { key, value: value.into(), lease: Some(lease) })
    }

    /// Adds a put that only succeeds when the key does not exist yet.
    #[must_use]
    pub fn create(self, key: Key, value: impl Into<Bytes>) -> Self {
        self.guard(Guard::Absent(key.clone())).put(key, value)
    }

    /// Adds a put that only succeeds when the key is still at `revision`.
    #[must_use]
    pub fn replace(self, key: Key, revision: Revision, value: impl Into<Bytes>) -> Self {
        self.guard(Guard::Revision(key.clone(), revision)).put(key, value)
    }

    /// Adds a deletion.
    #[must_use]
    pub fn delete(self, key: Key) -> Self {
        self.write(Write::Delete { key })
    }

    /// Adds a deletion that only succeeds when the key is still at `revision`.
    #[must_use]
    pub fn delete_at(self, key: Key, revision: Revision) -> Self {
        self.guard(Guard::Revision(key.clone(), revision)).delete(key)
    }

    /// Number of operations that count towards [`MAX_TXN_OPS`].
    #[must_use]
    pub fn ops(&self) -> usize {
        self.guards.len() + self.writes.len()
    }

    /// Bytes that count towards [`MAX_TXN_BYTES`].
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.guards.iter().map(Guard::bytes).sum::<usize>() + self.writes.iter().map(Write::bytes).sum::<usize>()
    }

    /// What every backend checks before anything else.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] or [`StoreError::DuplicateWrite`].
    pub fn check(&self) -> Result<()> {
        let (ops, bytes) = (self.ops(), self.bytes());
        if ops > MAX_TXN_OPS || bytes > MAX_TXN_BYTES {
            return Err(StoreError::TooLarge { ops, bytes });
        }
        if self.writes.len() < 2 {
            return Ok(());
        }
        let mut seen = BTreeSet::new();
        match self.writes.iter().map(Write::key).find(|key| !seen.insert(*key)) {
            None => Ok(()),
            Some(key) => Err(StoreError::DuplicateWrite { key: key.clone() }),
        }
    }
}

/// What became of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a commit may have been refused by a guard or have an unknown outcome"]
pub enum CommitOutcome {
    /// Durable. Every written key now has this revision; without any effective write it is the current revision.
    Committed(Revision),
    /// Nothing was written.
    GuardFailed {
        /// Which of `Txn::guards`.
        index: usize,
        /// That guard.
        guard: Guard,
        /// The revision the key really has; none when it is absent or the guard is about a lease.
        actual: Option<Revision>,
    },
    /// The answer was lost. Ask [`crate::Store::outcome`], or commit the same id again.
    Unknown(TxnId),
}

impl CommitOutcome {
    /// The revision, when it is known to be committed.
    #[must_use]
    pub fn revision(&self) -> Option<Revision> {
        match self {
            Self::Committed(revision) => Some(*revision),
            _ => None,
        }
    }
}
