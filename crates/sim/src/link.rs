//! How one server reaches the store, and what time it believes it is: both can be taken from it, as when its machine is paused.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use oblak_model::{Revision, ServerId, Timestamp};
use oblak_platform::clock::{Clock, SharedClock};
use oblak_store::{
    CommitOutcome, Entry, Key, Lease, LeaseId, Page, Prefix, Result, Store, StoreError, StoreStats, Txn, TxnId,
    WatchError, WatchStream,
};
use tokio::sync::watch;

use crate::store::SimStore;

/// The pauses of one server's machine. Clones are the same one.
#[derive(Clone)]
pub struct Pause {
    paused: Arc<watch::Sender<bool>>,
    clock: SharedClock,
    lost: Arc<Mutex<Lost>>,
}

/// Time that its clock did not see.
#[derive(Default)]
struct Lost {
    total: Duration,
    since: Option<Duration>,
}

impl Pause {
    /// Not paused.
    #[must_use]
    pub fn new(clock: SharedClock) -> Self {
        Self { paused: Arc::new(watch::Sender::new(false)), clock, lost: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Lost> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing reaches the store, and the clock of boot time stands still.
    pub fn begin(&self) {
        self.lock().since.get_or_insert(self.clock.boottime());
        self.paused.send_replace(true);
    }

    /// Goes on as if nothing had happened.
    pub fn end(&self) {
        let mut lost = self.lock();
        if let Some(since) = lost.since.take() {
            lost.total += self.clock.boottime().saturating_sub(since);
        }
        drop(lost);
        self.paused.send_replace(false);
    }

    async fn over(&self) {
        // The sender lives as long as this value.
        let _ = self.paused.subscribe().wait_for(|paused| !paused).await;
    }
}

impl Clock for Pause {
    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    fn boottime(&self) -> Duration {
        let lost = self.lock();
        lost.since.unwrap_or_else(|| self.clock.boottime()).saturating_sub(lost.total)
    }
}

/// The store as one server reaches it.
pub struct StoreLink {
    store: Arc<SimStore>,
    pause: Pause,
    /// Whether the commits are those of a leader, and whose.
    leader: Option<ServerId>,
}

impl StoreLink {
    /// For the api of a server; for its reconcilers, when `leader` names it.
    #[must_use]
    pub fn new(store: Arc<SimStore>, pause: Pause, leader: Option<ServerId>) -> Self {
        Self { store, pause, leader }
    }
}

/// Elections are not what a leader does.
fn is_election(txn: &Txn) -> bool {
    txn.writes.iter().all(|w| matches!(w.key().segments().next(), Some("server" | "leader" | "election")))
}

#[async_trait]
impl Store for StoreLink {
    async fn get(&self, key: &Key) -> Result<Option<Entry>> {
        self.pause.over().await;
        self.store.get(key).await
    }
    async fn list(
        &self,
        prefix: &Prefix,
        limit: usize,
        start_after: Option<Key>,
        at: Option<Revision>,
    ) -> Result<Page> {
        self.pause.over().await;
        self.store.list(prefix, limit, start_after, at).await
    }
    async fn commit(&self, txn: Txn) -> Result<CommitOutcome> {
        self.pause.over().await;
        let (leads, id) = (self.leader.filter(|_| !is_election(&txn)), txn.id);
        let store = self.store.clone();
        // What is on its way is nobody's any more: it arrives although whoever sent it has given up since, or was killed.
        let sent = tokio::spawn(async move {
            let outcome = store.commit(txn).await;
            if let (Some(server), Ok(CommitOutcome::Committed(at))) = (leads, &outcome) {
                store.checks().leader_commits(server, *at);
            }
            outcome
        });
        let outcome = sent.await;
        self.pause.over().await;
        outcome.unwrap_or(Ok(CommitOutcome::Unknown(id)))
    }
    async fn outcome(&self, id: TxnId) -> Result<Option<Revision>> {
        self.pause.over().await;
        self.store.outcome(id).await
    }
    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<WatchStream, WatchError> {
        self.pause.over().await;
        self.store.watch(prefix, from).await
    }
    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        self.pause.over().await;
        self.store.grant(ttl).await
    }
    async fn renew(&self, id: LeaseId) -> Result<Lease> {
        self.pause.over().await;
        self.store.renew(id).await
    }
    async fn revoke(&self, id: LeaseId) -> Result<(), StoreError> {
        self.pause.over().await;
        self.store.revoke(id).await
    }
    async fn revision(&self) -> Result<Revision> {
        self.pause.over().await;
        self.store.revision().await
    }
    async fn compact(&self, keep_from: Revision) -> Result<()> {
        self.pause.over().await;
        self.store.compact(keep_from).await
    }
    async fn stats(&self) -> Result<StoreStats> {
        self.store.stats().await
    }
}
