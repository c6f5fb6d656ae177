//! How one cache takes over what its driver read.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLockWriteGuard};

use async_trait::async_trait;

use super::mirror::Mirror;
use super::{CacheChange, Decode, Item, Shared};
use crate::{Entry, Key, Prefix, Result, Revision, SharedStore, WatchItem, list_all};

/// One cache of a driver, whatever it holds.
#[async_trait]
pub(super) trait Member: Send + Sync {
    /// What it mirrors.
    fn prefixes(&self) -> &[Prefix];
    /// What lies below the prefixes as of `at`.
    async fn list_at(&self, store: &SharedStore, at: Revision) -> Result<Vec<Entry>>;
    /// Takes over a whole list: keeps what did not change, and announces the difference, deletions included.
    fn replace(&mut self, entries: Vec<Entry>, revision: Revision);
    /// Takes over items of a watch in one step: readers see all of them or none.
    fn accept(&mut self, items: &[WatchItem]);
}

/// Fills one cache.
pub(super) struct Filler<T> {
    prefixes: Vec<Prefix>,
    decode: Decode<T>,
    shared: Arc<Shared<T>>,
    listed: bool,
}

/// An item, or why there is none.
type Decoded<T> = Result<Arc<Item<T>>, String>;

impl<T> Filler<T> {
    pub fn new(prefixes: Vec<Prefix>, decode: Decode<T>, shared: Arc<Shared<T>>) -> Self {
        Self { prefixes, decode, shared, listed: false }
    }

    fn item(&self, entry: Entry) -> Decoded<T> {
        let value = (self.decode)(&entry).map_err(|error| error.to_string())?;
        Ok(Arc::new(Item::new(entry, value)))
    }

    fn lock(&self) -> RwLockWriteGuard<'_, Mirror<T>> {
        self.shared.mirror.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What concerns this cache, decoded; none for a deletion.
    fn decoded(&self, items: &[WatchItem]) -> Vec<(Revision, Key, Option<Decoded<T>>)> {
        let mut decoded = Vec::new();
        for item in items {
            let WatchItem::Event(event) = item else { continue };
            for change in &event.changes {
                if !self.prefixes.iter().any(|prefix| prefix.contains(&change.key)) {
                    continue;
                }
                let (key, revision, created) = (change.key.clone(), event.revision, change.created);
                let entry = change.value.clone().map(|value| Entry { key: key.clone(), value, revision, created });
                decoded.push((revision, key, entry.map(|entry| self.item(entry))));
            }
        }
        decoded
    }

    /// Makes an update visible, then tells those who wait.
    fn finish(&self, mut mirror: RwLockWriteGuard<'_, Mirror<T>>, revision: Revision, changes: Vec<CacheChange<T>>) {
        mirror.set_revision(revision);
        drop(mirror);
        self.shared.at.send_replace(revision);
        for change in changes {
            // Nobody may be listening.
            let _ = self.shared.changes.send(change);
        }
    }
}

#[async_trait]
impl<T: Send + Sync + 'static> Member for Filler<T> {
    fn prefixes(&self) -> &[Prefix] {
        &self.prefixes
    }

    async fn list_at(&self, store: &SharedStore, at: Revision) -> Result<Vec<Entry>> {
        let mut all = Vec::new();
        for prefix in &self.prefixes {
            all.extend(list_all(store.as_ref(), prefix, Some(at)).await?.0);
        }
        Ok(all)
    }

    fn replace(&mut self, entries: Vec<Entry>, revision: Revision) {
        let listed: BTreeSet<_> = entries.iter().map(|entry| entry.key.clone()).collect();
        let mut fresh = Vec::new();
        {
            let mirror = self.shared.mirror.read().unwrap_or_else(PoisonError::into_inner);
            for entry in entries {
                if mirror.get(&entry.key).is_none_or(|item| item.revision != entry.revision) {
                    fresh.push(entry);
                }
            }
        }
        let fresh: Vec<_> = fresh.into_iter().map(|entry| (entry.key.clone(), self.item(entry))).collect();
        let mut mirror = self.lock();
        let mut changes = Vec::new();
        let gone: Vec<_> =
            mirror.items().keys().chain(mirror.broken().keys()).filter(|key| !listed.contains(*key)).cloned().collect();
        for key in gone {
            if let Some(old) = mirror.remove(&key) {
                changes.push(CacheChange { revision, key, old: Some(old), new: None });
            }
        }
        for (key, item) in fresh {
            changes.extend(change(&mut mirror, revision, key, Some(item)));
        }
        if self.listed {
            mirror.count_resync();
        }
        self.finish(mirror, revision, changes);
        self.listed = true;
    }

    fn accept(&mut self, items: &[WatchItem]) {
        let Some(last) = items.last() else { return };
        // Decoding happens before the lock, so that readers wait only for the maps.
        let decoded = self.decoded(items);
        let mut mirror = self.lock();
        let mut changes = Vec::with_capacity(decoded.len());
        for (revision, key, item) in decoded {
            changes.extend(change(&mut mirror, revision, key, item));
        }
        self.finish(mirror, last.revision(), changes);
    }
}

/// Puts or removes one item; what there is to announce.
fn change<T>(mirror: &mut Mirror<T>, revision: Revision, key: Key, item: Option<Decoded<T>>) -> Option<CacheChange<T>> {
    let (old, new) = match item {
        Some(Ok(item)) => (mirror.put(&item), Some(item)),
        Some(Err(reason)) => {
            tracing::error!(%key, reason, "a value cannot be decoded; its last good version stays in use");
            mirror.mark_broken(key, reason);
            return None;
        }
        None => (mirror.remove(&key), None),
    };
    (old.is_some() || new.is_some()).then_some(CacheChange { revision, key, old, new })
}
