//! The store of a simulation: the memory store, watched by the checks after every commit, slow and unsure as told, and broken on purpose where a test
//! wants to see that the checks notice.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use oblak_model::Revision;
use oblak_platform::clock::SharedClock;
use oblak_store::memory::{Fault, Faults, Lost};
use oblak_store::{
    CommitOutcome, Entry, Guard, HistoryLimits, Key, Lease, LeaseId, MemoryStore, Page, Prefix, Result, Store,
    StoreError, StoreStats, Txn, TxnId, WatchError, WatchStream, Write,
};

use crate::chance::Dice;
use crate::check::Checks;
use crate::mutation::Mutation;

/// How the store behaves now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mood {
    /// Commits that never arrive and whose fate is unknown, per thousand.
    pub lost_requests: u32,
    /// Commits that happen, but whose fate is unknown, per thousand.
    pub lost_replies: u32,
    /// Longest time before and after a commit.
    pub delay: Duration,
    /// The disk is full: nothing is committed, and whoever commits is told.
    pub full: bool,
}

/// Sets the mood; shared with the store.
#[derive(Clone)]
pub struct Moods(Arc<Mutex<(Mood, Dice)>>);

impl Moods {
    /// A perfect store's.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new((Mood::default(), Dice::new(seed, "store")))))
    }

    fn lock(&self) -> MutexGuard<'_, (Mood, Dice)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes it.
    pub fn set(&self, mood: Mood) {
        self.lock().0 = mood;
    }

    /// Fills the disk of the store, or makes room.
    pub fn fill(&self, full: bool) {
        self.lock().0.full = full;
    }

    fn is_full(&self) -> bool {
        self.lock().0.full
    }
}

impl Faults for Moods {
    fn commit(&self, _: &Txn) -> Fault {
        let mut state = self.lock();
        let mood = state.0;
        let dice = &mut state.1;
        let lost = if dice.permille(mood.lost_requests) {
            Lost::Request
        } else if dice.permille(mood.lost_replies) {
            Lost::Reply
        } else {
            Lost::No
        };
        let mut pause = || {
            // Never none at all: whoever commits must be ready for others to come first.
            let time = dice.between(Duration::from_micros(50), mood.delay.max(Duration::from_millis(1)));
            Some(Box::pin(tokio::time::sleep(time)) as futures_util::future::BoxFuture<'static, ()>)
        };
        Fault { before: pause(), after: pause(), lost }
    }
}

/// The store.
pub struct SimStore {
    inner: MemoryStore,
    moods: Moods,
    checks: Checks,
    mutation: Option<Mutation>,
}

impl SimStore {
    /// An empty store.
    #[must_use]
    pub fn new(clock: SharedClock, moods: Moods, checks: Checks, mutation: Option<Mutation>) -> Self {
        // A short history: who was away for a few minutes must list again, as after a compaction.
        let limits = HistoryLimits { revisions: 2000, age: Duration::from_secs(300) };
        Self { inner: MemoryStore::with_faults(clock, limits, moods.clone()), moods, checks, mutation }
    }

    /// The checks that watch it.
    #[must_use]
    pub fn checks(&self) -> &Checks {
        &self.checks
    }

    /// Shows the checks what happened since they looked last, leases that ended included.
    pub async fn look(&self) {
        let _ = self.inner.expire();
        self.checks.catch_up(&self.inner).await;
    }
}

fn about(key: &Key, kind: &str) -> bool {
    key.segments().next() == Some(kind)
}

/// Breaks a transaction.
fn broken(mut txn: Txn, mutation: Option<Mutation>) -> Txn {
    let drop_revision = |txn: &mut Txn, kind: &str| {
        txn.guards.retain(|guard| !matches!(guard, Guard::Revision(key, _) if about(key, kind)));
    };
    match mutation {
        Some(Mutation::NoAllocationGuard) => drop_revision(&mut txn, "allocation"),
        Some(Mutation::NoInstanceGuard) => drop_revision(&mut txn, "instance"),
        Some(Mutation::NoLeaderGuard) => drop_revision(&mut txn, "leader"),
        Some(Mutation::NoPortWrites) => {
            // Ports that exist already: what placement tells them is forgotten.
            let fresh: Vec<Key> = txn
                .guards
                .iter()
                .filter_map(|guard| if let Guard::Absent(key) = guard { Some(key.clone()) } else { None })
                .collect();
            txn.writes
                .retain(|write| !matches!(write, Write::Put { key, .. } if about(key, "port") && !fresh.contains(key)));
        }
        Some(Mutation::KeepAddresses) => {
            txn.writes.retain(|write| !matches!(write, Write::Delete { key } if about(key, "address")));
        }
        Some(
            Mutation::LeakGuests
            | Mutation::LeakImages
            | Mutation::StartTwice
            | Mutation::NoFencingMargin
            | Mutation::NoFence,
        )
        | None => {}
    }
    txn
}

#[async_trait]
impl Store for SimStore {
    async fn get(&self, key: &Key) -> Result<Option<Entry>> {
        self.inner.get(key).await
    }
    async fn list(
        &self,
        prefix: &Prefix,
        limit: usize,
        start_after: Option<Key>,
        at: Option<Revision>,
    ) -> Result<Page> {
        self.inner.list(prefix, limit, start_after, at).await
    }
    async fn commit(&self, txn: Txn) -> Result<CommitOutcome> {
        if self.moods.is_full() {
            // As the file's store: at the end of a write that took its time, and nothing of the change is kept.
            tokio::time::sleep(Duration::from_millis(1)).await;
            return Err(StoreError::DiskFull { path: "/simulated/store".into() });
        }
        let outcome = self.inner.commit(broken(txn, self.mutation)).await;
        self.look().await;
        outcome
    }
    async fn outcome(&self, id: TxnId) -> Result<Option<Revision>> {
        self.inner.outcome(id).await
    }
    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<WatchStream, WatchError> {
        self.inner.watch(prefix, from).await
    }
    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        self.inner.grant(ttl).await
    }
    async fn renew(&self, id: LeaseId) -> Result<Lease> {
        self.inner.renew(id).await
    }
    async fn revoke(&self, id: LeaseId) -> Result<()> {
        self.inner.revoke(id).await?;
        self.look().await;
        Ok(())
    }
    async fn revision(&self) -> Result<Revision> {
        self.inner.revision().await
    }
    async fn compact(&self, keep_from: Revision) -> Result<()> {
        self.inner.compact(keep_from).await
    }
    async fn stats(&self) -> Result<StoreStats> {
        self.inner.stats().await
    }
}
