//! A store in memory: deterministic, without threads, timers or randomness of its own, for tests and simulation.
//!
//! Leases expire when the store is used or when [`MemoryStore::expire`] is called, so that virtual time works.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use oblak_model::Revision;
use oblak_platform::clock::{self, SharedClock};

use crate::engine::{self, AgeMarks, Applied, Head, HistoryLimits, OWN_TXN, Row, Tables, TxnLog};
use crate::hub::{self, Chunk, History, Hub};
use crate::page;
use crate::{
    CommitOutcome, Entry, Key, Lease, LeaseId, MAX_TXN_OPS, Page, Prefix, Result, Store, StoreError, StoreStats, Txn,
    TxnId, WatchError, WatchEvent, WatchStream, Write,
};

/// What should go wrong with one commit.
#[derive(Default)]
pub struct Fault {
    /// Awaited before the transaction is looked at.
    pub before: Option<BoxFuture<'static, ()>>,
    /// Awaited after it was applied, before the answer.
    pub after: Option<BoxFuture<'static, ()>>,
    /// Whether and how the answer is lost.
    pub lost: Lost,
}

/// How the answer to a commit is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lost {
    /// It is not.
    #[default]
    No,
    /// The request never arrived: `Unknown`, and nothing was committed.
    Request,
    /// The reply never arrived: `Unknown`, though it was decided as usual.
    Reply,
}

/// Decides faults; a simulation seeds it.
pub trait Faults: Send + Sync + 'static {
    /// Called once for each commit.
    fn commit(&self, txn: &Txn) -> Fault;
}

struct NoFaults;

impl Faults for NoFaults {
    fn commit(&self, _: &Txn) -> Fault {
        Fault::default()
    }
}

struct Version {
    head: Head,
    value: Bytes,
}

struct LeaseState {
    ttl: Duration,
    expires: Duration,
    keys: BTreeSet<Key>,
}

struct State {
    head: Revision,
    floor: u64,
    live: BTreeMap<Key, Version>,
    /// Replaced versions by key and revision, with the revision that replaced them.
    superseded: BTreeMap<(Key, u64), (u64, Version)>,
    history: BTreeMap<u64, WatchEvent>,
    txns: TxnLog,
    ages: AgeMarks,
    leases: BTreeMap<LeaseId, LeaseState>,
    lease_counter: u32,
    bytes: u64,
    commits: u64,
    now: Duration,
}

/// The store. Dropping it forgets everything.
pub struct MemoryStore {
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    hub: Arc<Hub>,
    clock: SharedClock,
    limits: HistoryLimits,
    faults: Box<dyn Faults>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// Empty, with the clock of this machine and no faults.
    #[must_use]
    pub fn new() -> Self {
        Self::with(clock::system(), HistoryLimits::default())
    }

    /// Empty, with this clock and history.
    #[must_use]
    pub fn with(clock: SharedClock, limits: HistoryLimits) -> Self {
        Self::with_faults(clock, limits, NoFaults)
    }

    /// Empty, with faults.
    #[must_use]
    pub fn with_faults(clock: SharedClock, limits: HistoryLimits, faults: impl Faults) -> Self {
        let head = Revision::new(1, 0);
        let state = State {
            head,
            floor: 0,
            live: BTreeMap::new(),
            superseded: BTreeMap::new(),
            history: BTreeMap::new(),
            txns: TxnLog::default(),
            ages: AgeMarks::default(),
            leases: BTreeMap::new(),
            lease_counter: 0,
            bytes: 0,
            commits: 0,
            now: clock.boottime(),
        };
        Self {
            inner: Arc::new(Inner {
                state: Mutex::new(state),
                hub: Hub::new(head, 0),
                clock,
                limits,
                faults: Box::new(faults),
            }),
        }
    }

    /// Ends the leases that are over by now and tells watchers. Returns when the next one is due (boot time).
    #[must_use = "the caller should come back at that time"]
    pub fn expire(&self) -> Option<Duration> {
        self.inner.state().leases.values().map(|lease| lease.expires).min()
    }

    /// Behaves as a store restored from a backup of this very moment: the incarnation grows, all earlier revisions are foreign to watches.
    pub fn new_incarnation(&self) -> Revision {
        let mut state = self.inner.state();
        state.head.incarnation += 1;
        state.floor = state.head.n;
        state.history.clear();
        state.superseded.clear();
        state.txns = TxnLog::default();
        self.inner.hub.reset(state.head, state.floor);
        state.head
    }
}

impl Inner {
    /// The state, after leases that are over have ended.
    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.now = self.clock.boottime().max(state.now);
        let now = state.now;
        let over: Vec<_> = state.leases.iter().filter(|(_, lease)| lease.expires <= now).map(|(id, _)| *id).collect();
        for id in over {
            self.end_lease(&mut state, id);
        }
        state
    }

    fn end_lease(&self, state: &mut State, id: LeaseId) {
        let Some(lease) = state.leases.remove(&id) else { return };
        let keys: Vec<_> = lease.keys.into_iter().collect();
        for keys in keys.chunks(MAX_TXN_OPS) {
            let writes = keys.iter().map(|key| Write::Delete { key: key.clone() }).collect();
            self.apply(state, &Txn { id: OWN_TXN, guards: Vec::new(), writes });
        }
    }

    fn apply(&self, state: &mut State, txn: &Txn) -> Applied {
        let next = Revision::new(state.head.incarnation, state.head.n + 1);
        let Ok(applied) = engine::apply(state, txn, next);
        if let Applied::Changed(event) = &applied {
            state.head = next;
            state.commits += 1;
            state.txns.insert(txn.id, next);
            state.history.insert(next.n, event.clone());
            let aged = state.ages.note(state.now, next.n, self.limits.age);
            let floor = engine::floor_wanted(next.n, state.floor, self.limits, aged);
            state.trim(floor);
            self.hub.set_floor(state.floor);
            self.hub.publish([event.clone()]);
            self.hub.evict();
        }
        applied
    }

    fn commit(&self, txn: &Txn) -> Result<CommitOutcome> {
        txn.check()?;
        let mut state = self.state();
        if let Some(revision) = state.txns.get(txn.id) {
            return Ok(CommitOutcome::Committed(revision));
        }
        match self.apply(&mut state, txn) {
            Applied::Changed(event) => Ok(CommitOutcome::Committed(event.revision)),
            Applied::Unchanged => Ok(CommitOutcome::Committed(state.head)),
            Applied::GuardFailed(outcome) => Ok(outcome),
            Applied::Refused(error) => Err(error),
        }
    }
}

impl State {
    fn trim(&mut self, floor: u64) {
        if floor <= self.floor {
            return;
        }
        let keep = self.history.split_off(&(floor + 1));
        for event in std::mem::replace(&mut self.history, keep).into_values() {
            for change in event.changes {
                if let Some(prev) = change.prev {
                    self.superseded.remove(&(change.key, prev.n));
                }
            }
        }
        self.floor = floor;
    }

    fn retire(&mut self, key: &Key, until: u64) {
        if let Some(version) = self.live.remove(key) {
            self.bytes -= (key.len() + version.value.len()) as u64;
            self.superseded.insert((key.clone(), version.head.revision.n), (until, version));
        }
    }
}

impl Tables for State {
    type Error = Infallible;

    fn head(&self, key: &Key) -> Result<Option<Head>, Infallible> {
        Ok(self.live.get(key).map(|version| version.head))
    }

    fn lease_alive(&self, id: LeaseId) -> bool {
        self.leases.get(&id).is_some_and(|lease| lease.expires > self.now)
    }

    fn put(&mut self, key: &Key, head: Head, value: &Bytes, _: Option<Head>) -> Result<(), Infallible> {
        self.retire(key, head.revision.n);
        self.bytes += (key.len() + value.len()) as u64;
        self.live.insert(key.clone(), Version { head, value: value.clone() });
        Ok(())
    }

    fn remove(&mut self, key: &Key, _: Head, at: Revision) -> Result<(), Infallible> {
        self.retire(key, at.n);
        Ok(())
    }

    fn attach(&mut self, lease: LeaseId, key: &Key) -> Result<(), Infallible> {
        if let Some(lease) = self.leases.get_mut(&lease) {
            lease.keys.insert(key.clone());
        }
        Ok(())
    }

    fn detach(&mut self, lease: LeaseId, key: &Key) -> Result<(), Infallible> {
        if let Some(lease) = self.leases.get_mut(&lease) {
            lease.keys.remove(key);
        }
        Ok(())
    }
}

#[async_trait]
impl History for Inner {
    async fn read(&self, prefix: &Prefix, after: u64) -> Result<Chunk, WatchError> {
        let state = self.state();
        if after < state.floor {
            return Err(WatchError::Compacted { oldest: Revision::new(state.head.incarnation, state.floor) });
        }
        let mut chunk = Chunk { events: Vec::new(), scanned: after };
        for (n, event) in state.history.range(after + 1..).take(hub::STEP) {
            chunk.scanned = *n;
            chunk.events.extend(hub::filtered(event, prefix));
        }
        Ok(chunk)
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(&self, key: &Key) -> Result<Option<Entry>> {
        let state = self.inner.state();
        Ok(state.live.get(key).map(|version| Entry {
            key: key.clone(),
            value: version.value.clone(),
            revision: version.head.revision,
            created: version.head.created,
        }))
    }

    async fn list(
        &self,
        prefix: &Prefix,
        limit: usize,
        start_after: Option<Key>,
        at: Option<Revision>,
    ) -> Result<Page> {
        let state = self.inner.state();
        let at = snapshot(at, state.head, state.floor)?;
        let Some((from, end)) = page::bounds(prefix, start_after.as_ref()) else { return Ok(page::empty(at)) };
        let row = |key: &Key, version: &Version| {
            Ok::<_, StoreError>(Row { key: key.clone(), head: version.head, value: version.value.clone() })
        };
        let live = state
            .live
            .range::<str, _>((Bound::Excluded(&*from), Bound::Excluded(&*end)))
            .filter(|(_, version)| version.head.revision.n <= at.n)
            .map(|(key, version)| row(key, version));
        let first = (Key::trusted(&from), u64::MAX);
        let superseded = state
            .superseded
            .range((Bound::Excluded(first), Bound::Unbounded))
            .take_while(|((key, _), _)| at < state.head && key.as_str() < end.as_str())
            .filter(|((_, n), (until, _))| *n <= at.n && at.n < *until)
            .map(|((key, _), (_, version))| row(key, version));
        page::collect(engine::merge(live, superseded), limit, at, |value| value)
    }

    async fn commit(&self, txn: Txn) -> Result<CommitOutcome> {
        let fault = self.inner.faults.commit(&txn);
        if let Some(before) = fault.before {
            before.await;
        }
        if fault.lost == Lost::Request {
            return Ok(CommitOutcome::Unknown(txn.id));
        }
        let outcome = self.inner.commit(&txn);
        if let Some(after) = fault.after {
            after.await;
        }
        if fault.lost == Lost::Reply { Ok(CommitOutcome::Unknown(txn.id)) } else { outcome }
    }

    async fn outcome(&self, id: TxnId) -> Result<Option<Revision>> {
        Ok(self.inner.state().txns.get(id))
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<WatchStream, WatchError> {
        let history: Arc<dyn History> = Arc::<Inner>::clone(&self.inner);
        hub::watch(&self.inner.hub, history, prefix, from)
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        let mut state = self.inner.state();
        state.lease_counter += 1;
        let id = lease_id(state.head.incarnation, state.lease_counter);
        let expires = state.now.saturating_add(ttl);
        state.leases.insert(id, LeaseState { ttl, expires, keys: BTreeSet::new() });
        Ok(Lease { id, ttl })
    }

    async fn renew(&self, id: LeaseId) -> Result<Lease> {
        let mut state = self.inner.state();
        let now = state.now;
        let lease = state.leases.get_mut(&id).ok_or(StoreError::LeaseGone(id))?;
        lease.expires = now.saturating_add(lease.ttl);
        Ok(Lease { id, ttl: lease.ttl })
    }

    async fn revoke(&self, id: LeaseId) -> Result<()> {
        let mut state = self.inner.state();
        self.inner.end_lease(&mut state, id);
        Ok(())
    }

    async fn revision(&self) -> Result<Revision> {
        Ok(self.inner.state().head)
    }

    async fn compact(&self, keep_from: Revision) -> Result<()> {
        let mut state = self.inner.state();
        let floor = compact_floor(keep_from, state.head)?;
        state.trim(floor);
        self.inner.hub.set_floor(state.floor);
        Ok(())
    }

    async fn stats(&self) -> Result<StoreStats> {
        let state = self.inner.state();
        Ok(StoreStats {
            backend: "memory",
            keys: state.live.len() as u64,
            bytes: state.bytes,
            commits: state.commits,
            batches: state.commits,
            fsyncs: 0,
            watchers: self.inner.hub.watchers(),
            leases: state.leases.len() as u64,
            revision: state.head,
            oldest: Revision::new(state.head.incarnation, state.floor),
        })
    }
}

/// Lease names carry the incarnation, so a restored store never gives out a name again.
pub(crate) fn lease_id(incarnation: u32, counter: u32) -> LeaseId {
    LeaseId(u64::from(incarnation) << 32 | u64::from(counter))
}

/// The snapshot to list, or that it is gone.
pub(crate) fn snapshot(at: Option<Revision>, head: Revision, floor: u64) -> Result<Revision> {
    let at = at.unwrap_or(head);
    if at.incarnation == head.incarnation && (floor..=head.n).contains(&at.n) {
        return Ok(at);
    }
    Err(StoreError::Compacted { oldest: Revision::new(head.incarnation, floor) })
}

/// The floor that keeps `keep_from` readable; the future is cut to now, another incarnation is refused.
pub(crate) fn compact_floor(keep_from: Revision, head: Revision) -> Result<u64> {
    if keep_from.incarnation == head.incarnation {
        return Ok(keep_from.n.min(head.n));
    }
    Err(StoreError::Compacted { oldest: head })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::Subject;

    async fn subject() -> Subject {
        Subject { store: Arc::new(MemoryStore::new()), ttl: Duration::from_secs(1), keep: Box::new(()) }
    }

    crate::conformance_tests!(subject());
}
