//! Drops what nobody needs any more: old events and idempotency records, keys whose owner is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use oblak_model::{Event, EventKind, Kind, Timestamp};
use oblak_store::objects::{self, decode_value};
use oblak_store::{Entry, Guard, Key, Prefix, SharedStore, StoreError, list_all};
use uuid::Uuid;

use crate::caches::Caches;
use crate::change::Change;
use crate::drive::Reconciler;
use crate::lifecycle::{IDEMPOTENCY_LIFE, IdempotencyRecord, Ops, idempotency_prefix};

/// Events older than this are dropped.
const EVENT_LIFE: Duration = Duration::from_secs(24 * 3600);
/// More events than this in one project: the oldest are dropped.
const EVENTS_PER_PROJECT: usize = 5_000;
/// A key without an owner is only dropped after this long: its owner may be in a commit that we have not seen.
const ORPHAN_AGE: Duration = Duration::from_secs(600);
/// Deletions in one pass.
const PER_PASS: usize = 2_000;

/// The reconciler.
#[derive(Debug, Default)]
pub struct Garbage {
    /// Keys without an owner, and since when they are seen so.
    orphans: BTreeMap<Key, Timestamp>,
}

impl Reconciler for Garbage {
    fn name(&self) -> &'static str {
        "garbage"
    }
    fn sweep(&self) -> Duration {
        Duration::from_secs(60)
    }
    fn is_woken(&self) -> bool {
        false
    }
    fn plan(&mut self, _caches: &Caches, _now: Timestamp) -> Vec<Change> {
        Vec::new()
    }
    async fn look(&mut self, store: &SharedStore, now: Timestamp) -> Result<Vec<Change>, StoreError> {
        let mut drop: Vec<Change> = Vec::new();
        let (events, _) = list_all(store.as_ref(), &objects::object_prefix::<EventKind>(None), None).await?;
        drop.extend(old_events(&events, now).into_iter().map(removal));
        let (records, _) = list_all(store.as_ref(), &idempotency_prefix(), None).await?;
        drop.extend(records.iter().filter(|e| is_old_record(e, now)).map(removal));
        drop.extend(self.orphans(store, now).await?);
        drop.truncate(PER_PASS);
        Ok(drop)
    }
}

/// Removes a key if it is still what was seen.
fn removal(entry: &Entry) -> Change {
    let mut ops = Ops::new();
    ops.guard(Guard::Revision(entry.key.clone(), entry.revision));
    ops.delete(entry.key.clone());
    Change { ops, events: Vec::new() }
}

fn is_old_record(entry: &Entry, now: Timestamp) -> bool {
    decode_value::<IdempotencyRecord>(&entry.key, &entry.value).map_or(true, |r| now.since(r.at) > IDEMPOTENCY_LIFE)
}

fn old_events(events: &[Entry], now: Timestamp) -> Vec<&Entry> {
    let mut by_project: BTreeMap<String, Vec<(Timestamp, &Entry)>> = BTreeMap::new();
    let mut old = Vec::new();
    for entry in events {
        let Ok(event) = objects::decode::<EventKind>(entry) else { continue };
        let event: Event = event;
        if now.since(event.spec.last_at) > EVENT_LIFE {
            old.push(entry);
        } else {
            by_project.entry(event.scope_key().into()).or_default().push((event.spec.last_at, entry));
        }
    }
    for list in by_project.values_mut().filter(|l| l.len() > EVENTS_PER_PROJECT) {
        list.sort_by_key(|(at, _)| *at);
        let extra = list.len() - EVENTS_PER_PROJECT;
        old.extend(list.iter().take(extra).map(|(_, entry)| *entry));
    }
    old
}

/// What is left on nodes that were removed from the cloud is nobody's task any more.
async fn left_on_removed(store: &SharedStore, owners: &BTreeSet<Uuid>) -> Result<Vec<Entry>, StoreError> {
    let (mut left, _) = list_all(store.as_ref(), &Prefix::new("/superseded")?, None).await?;
    let node = |e: &Entry| e.key.segments().nth(1).and_then(|id| id.parse::<Uuid>().ok());
    left.retain(|e| node(e).is_some_and(|node| !owners.contains(&node)));
    Ok(left)
}

impl Garbage {
    /// Names, addresses, host ports and numbers of networks whose owner does not exist. There should be none: each is logged as a defect.
    async fn orphans(&mut self, store: &SharedStore, now: Timestamp) -> Result<Vec<Change>, StoreError> {
        let mut owners: BTreeSet<Uuid> = BTreeSet::new();
        macro_rules! kinds { ($($kind:ty),*) => { [$(<$kind>::KIND),*] } }
        let kinds = oblak_model::for_each_kind!(kinds);
        let mut suspects: Vec<Entry> = Vec::new();
        let mut drop = Vec::new();
        // Owned keys first: an owner that comes into being meanwhile is then seen, never the other way round.
        for prefix in ["/name", "/address", "/hostport", "/vni"] {
            suspects.extend(list_all(store.as_ref(), &Prefix::new(prefix)?, None).await?.0);
        }
        for kind in kinds {
            let (entries, _) = list_all(store.as_ref(), &Prefix::new(&format!("/{kind}"))?, None).await?;
            owners.extend(entries.iter().filter_map(|e| e.key.last().parse::<Uuid>().ok()));
        }
        suspects.retain(|e| decode_value::<Uuid>(&e.key, &e.value).is_ok_and(|owner| !owners.contains(&owner)));
        drop.extend(left_on_removed(store, &owners).await?.iter().map(removal));
        self.orphans.retain(|key, _| suspects.iter().any(|e| e.key == *key));
        for entry in &suspects {
            let since = *self.orphans.entry(entry.key.clone()).or_insert(now);
            if now.since(since) > ORPHAN_AGE {
                tracing::error!(key = %entry.key, "a key has lost its owner; this is a defect; removing it");
                drop.push(removal(entry));
            }
        }
        Ok(drop)
    }
}
