//! What a transaction means, the same for every backend: guards in order, then writes, then one revision.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use oblak_model::Revision;

use crate::{Change, CommitOutcome, Guard, Key, LeaseId, StoreError, TXN_IDS_KEPT, Txn, TxnId, WatchEvent, Write};

/// How much of the past is kept for watches that resume and for lists of an old snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryLimits {
    /// Most revisions.
    pub revisions: u64,
    /// Longest time.
    pub age: Duration,
}

impl Default for HistoryLimits {
    /// 50,000 revisions or half an hour, whichever is less: an agent that was away longer lists again.
    fn default() -> Self {
        Self { revisions: 50_000, age: Duration::from_secs(1800) }
    }
}

/// What is known of a live key without its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub revision: Revision,
    pub created: Revision,
    pub lease: Option<LeaseId>,
}

/// A backend inside one open write transaction. `Error` means the whole batch is lost. Recording the event in the history is left to the
/// caller, who may do so for several at once.
pub(crate) trait Tables {
    type Error;
    fn head(&self, key: &Key) -> Result<Option<Head>, Self::Error>;
    fn lease_alive(&self, id: LeaseId) -> bool;
    /// Stores a version; the one it replaces stays readable until `head.revision`.
    fn put(&mut self, key: &Key, head: Head, value: &Bytes, prev: Option<Head>) -> Result<(), Self::Error>;
    /// Removes the live version; it stays readable until `at`.
    fn remove(&mut self, key: &Key, prev: Head, at: Revision) -> Result<(), Self::Error>;
    fn attach(&mut self, lease: LeaseId, key: &Key) -> Result<(), Self::Error>;
    fn detach(&mut self, lease: LeaseId, key: &Key) -> Result<(), Self::Error>;
}

/// What applying a transaction did.
#[derive(Debug)]
pub(crate) enum Applied {
    /// It took the revision `next`.
    Changed(WatchEvent),
    /// All guards held and there was nothing to change.
    Unchanged,
    GuardFailed(CommitOutcome),
    Refused(StoreError),
}

/// Applies `txn`, which passed [`Txn::check`], as revision `next`, or leaves the tables untouched.
pub(crate) fn apply<T: Tables>(tables: &mut T, txn: &Txn, next: Revision) -> Result<Applied, T::Error> {
    let mut looked_up = Vec::with_capacity(txn.guards.len());
    for (index, guard) in txn.guards.iter().enumerate() {
        let (holds, actual) = test(tables, guard, &mut looked_up)?;
        if !holds {
            return Ok(Applied::GuardFailed(CommitOutcome::GuardFailed { index, guard: guard.clone(), actual }));
        }
    }
    for write in &txn.writes {
        if let Write::Put { lease: Some(lease), .. } = write
            && !tables.lease_alive(*lease)
        {
            return Ok(Applied::Refused(StoreError::LeaseGone(*lease)));
        }
    }
    let mut changes = Vec::with_capacity(txn.writes.len());
    for write in &txn.writes {
        changes.extend(change(tables, write, next, &looked_up)?);
    }
    if changes.is_empty() {
        return Ok(Applied::Unchanged);
    }
    Ok(Applied::Changed(WatchEvent { revision: next, changes }))
}

/// What guards found, so that a write of the same key need not look again.
type LookedUp<'t> = Vec<(&'t Key, Option<Head>)>;

fn test<'t, T: Tables>(
    tables: &T,
    guard: &'t Guard,
    looked_up: &mut LookedUp<'t>,
) -> Result<(bool, Option<Revision>), T::Error> {
    let key = match guard {
        Guard::Revision(key, _) | Guard::Absent(key) | Guard::Present(key) => key,
        Guard::LeaseAlive(id) => return Ok((tables.lease_alive(*id), None)),
    };
    let head = tables.head(key)?;
    looked_up.push((key, head));
    let actual = head.map(|head| head.revision);
    let holds = match guard {
        Guard::Revision(_, wanted) => actual == Some(*wanted),
        Guard::Absent(_) => actual.is_none(),
        Guard::Present(_) | Guard::LeaseAlive(_) => actual.is_some(),
    };
    Ok((holds, actual))
}

fn change<T: Tables>(
    tables: &mut T,
    write: &Write,
    next: Revision,
    looked_up: &LookedUp,
) -> Result<Option<Change>, T::Error> {
    let prev = match looked_up.iter().find(|(key, _)| *key == write.key()) {
        Some((_, head)) => *head,
        None => tables.head(write.key())?,
    };
    match write {
        Write::Put { key, value, lease } => {
            let created = prev.map_or(next, |prev| prev.created);
            tables.put(key, Head { revision: next, created, lease: *lease }, value, prev)?;
            let before = prev.and_then(|prev| prev.lease);
            if before != *lease {
                if let Some(before) = before {
                    tables.detach(before, key)?;
                }
                if let Some(lease) = lease {
                    tables.attach(*lease, key)?;
                }
            }
            Ok(Some(Change {
                key: key.clone(),
                value: Some(value.clone()),
                prev: prev.map(|prev| prev.revision),
                created,
            }))
        }
        Write::Delete { key } => {
            let Some(prev) = prev else { return Ok(None) };
            tables.remove(key, prev, next)?;
            if let Some(lease) = prev.lease {
                tables.detach(lease, key)?;
            }
            Ok(Some(Change { key: key.clone(), value: None, prev: Some(prev.revision), created: prev.created }))
        }
    }
}

/// The id under which the store commits its own changes, such as the end of a lease. Never remembered.
pub(crate) const OWN_TXN: TxnId = TxnId(uuid::Uuid::nil());

/// The newest transaction ids and what became of them. Only looked up, never iterated, so its hash order shows nowhere.
#[derive(Debug, Default)]
pub(crate) struct TxnLog {
    order: VecDeque<TxnId>,
    revisions: HashMap<TxnId, Revision>,
}

impl TxnLog {
    pub fn get(&self, id: TxnId) -> Option<Revision> {
        self.revisions.get(&id).copied()
    }

    pub fn insert(&mut self, id: TxnId, revision: Revision) {
        if id == OWN_TXN || self.revisions.insert(id, revision).is_some() {
            return;
        }
        self.order.push_back(id);
        if self.order.len() > TXN_IDS_KEPT
            && let Some(oldest) = self.order.pop_front()
        {
            self.revisions.remove(&oldest);
        }
    }
}

/// Remembers when revisions were made, coarsely, to say which are too old to keep. Ages count from the start of the process.
#[derive(Debug, Default)]
pub(crate) struct AgeMarks {
    marks: VecDeque<(Duration, u64)>,
}

/// Marks per age limit: a revision is kept at most 1/32 longer than asked.
const MARKS_PER_AGE: u32 = 32;

impl AgeMarks {
    /// Notes that `n` was the newest revision at `now`; returns the newest revision older than `age`.
    pub fn note(&mut self, now: Duration, n: u64, age: Duration) -> Option<u64> {
        if self.marks.back().is_none_or(|(last, _)| now >= *last + age / MARKS_PER_AGE) {
            self.marks.push_back((now, n));
        }
        let mut old = None;
        while let Some((when, n)) = self.marks.front()
            && now.saturating_sub(*when) > age
        {
            old = Some(*n);
            self.marks.pop_front();
        }
        old
    }
}

/// Up to which revision history should be dropped now. Trimming waits for an eighth of excess, so that it happens in runs.
pub(crate) fn floor_wanted(head: u64, floor: u64, limits: HistoryLimits, aged: Option<u64>) -> u64 {
    let by_count = if head.saturating_sub(floor) > limits.revisions.saturating_add(limits.revisions / 8) {
        head - limits.revisions
    } else {
        floor
    };
    by_count.max(aged.unwrap_or(0)).min(head)
}

/// One version of a key as a list sees it: live from its revision until another replaced it.
pub(crate) struct Row<V> {
    pub key: Key,
    pub head: Head,
    pub value: V,
}

/// Merges two sources that are each in key order, and hold at most one version per key between them.
pub(crate) fn merge<V, E>(
    live: impl Iterator<Item = Result<Row<V>, E>>,
    superseded: impl Iterator<Item = Result<Row<V>, E>>,
) -> impl Iterator<Item = Result<Row<V>, E>> {
    let mut live = live.peekable();
    let mut superseded = superseded.peekable();
    std::iter::from_fn(move || match (live.peek(), superseded.peek()) {
        (Some(Ok(a)), Some(Ok(b))) if b.key < a.key => superseded.next(),
        (None, Some(_)) | (Some(Ok(_)), Some(Err(_))) => superseded.next(),
        _ => live.next(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_revisions_are_found_by_age_and_count() {
        let mut marks = AgeMarks::default();
        let age = Duration::from_secs(32);
        assert_eq!(marks.note(Duration::from_secs(0), 5, age), None);
        assert_eq!(marks.note(Duration::from_secs(10), 50, age), None);
        assert_eq!(marks.note(Duration::from_secs(33), 60, age), Some(5));
        assert_eq!(marks.note(Duration::from_secs(43), 60, age), Some(50));
        let limits = HistoryLimits { revisions: 80, age };
        assert_eq!(floor_wanted(90, 0, limits, None), 0);
        assert_eq!(floor_wanted(91, 0, limits, None), 11);
        assert_eq!(floor_wanted(91, 0, limits, Some(40)), 40);
    }

    #[test]
    fn the_log_of_ids_is_bounded() {
        let mut log = TxnLog::default();
        let id = |n: usize| TxnId(uuid::Uuid::from_u128(n as u128 + 1));
        for n in 0..TXN_IDS_KEPT + 10 {
            log.insert(id(n), Revision::new(1, n as u64));
        }
        assert_eq!(log.get(id(9)), None);
        assert_eq!(log.get(id(10)), Some(Revision::new(1, 10)));
        assert_eq!(log.revisions.len(), TXN_IDS_KEPT);
    }
}
