//! The maps of a cache, and how an update changes them.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{CacheStats, Item, Terms};
use crate::{Key, Prefix, Revision};

struct Index<T> {
    name: &'static str,
    terms: Terms<T>,
    found: BTreeMap<String, BTreeMap<Key, Arc<Item<T>>>>,
}

pub(super) struct Mirror<T> {
    items: BTreeMap<Key, Arc<Item<T>>>,
    indexes: Vec<Index<T>>,
    /// Keys whose newest value cannot be decoded, with the reason. The last good value, if there was one, stays in `items`.
    broken: BTreeMap<Key, String>,
    revision: Revision,
    bytes: usize,
    resyncs: u64,
}

impl<T> Mirror<T> {
    pub fn new(indexes: Vec<(&'static str, Terms<T>)>) -> Self {
        let indexes = indexes.into_iter().map(|(name, terms)| Index { name, terms, found: BTreeMap::new() }).collect();
        Self {
            items: BTreeMap::new(),
            indexes,
            broken: BTreeMap::new(),
            revision: Revision::ZERO,
            bytes: 0,
            resyncs: 0,
        }
    }

    pub fn revision(&self) -> Revision {
        self.revision
    }

    pub fn set_revision(&mut self, revision: Revision) {
        self.revision = revision;
    }

    pub fn count_resync(&mut self) {
        self.resyncs += 1;
    }

    pub fn get(&self, key: &str) -> Option<&Arc<Item<T>>> {
        self.items.get(key)
    }

    pub fn items(&self) -> &BTreeMap<Key, Arc<Item<T>>> {
        &self.items
    }

    /// Keys that are there but cannot be read.
    pub fn broken(&self) -> &BTreeMap<Key, String> {
        &self.broken
    }

    pub fn put(&mut self, item: &Arc<Item<T>>) -> Option<Arc<Item<T>>> {
        self.broken.remove(&item.key);
        let old = self.items.insert(item.key.clone(), Arc::clone(item));
        if let Some(old) = &old {
            self.forget(old);
        }
        self.bytes += item.raw.len();
        for index in &mut self.indexes {
            for term in (index.terms)(item) {
                index.found.entry(term).or_default().insert(item.key.clone(), Arc::clone(item));
            }
        }
        old
    }

    pub fn remove(&mut self, key: &Key) -> Option<Arc<Item<T>>> {
        self.broken.remove(key);
        let old = self.items.remove(key)?;
        self.forget(&old);
        Some(old)
    }

    /// Marks an item that is no longer there, and takes it out of the indexes.
    fn forget(&mut self, old: &Item<T>) {
        old.gone.store(true, Ordering::Release);
        self.bytes -= old.raw.len();
        for index in &mut self.indexes {
            for term in (index.terms)(old) {
                if let Some(keys) = index.found.get_mut(&term) {
                    keys.remove(&old.key);
                    if keys.is_empty() {
                        index.found.remove(&term);
                    }
                }
            }
        }
    }

    pub fn mark_broken(&mut self, key: Key, reason: String) {
        self.broken.insert(key, reason);
    }

    pub fn stats(&self) -> CacheStats {
        CacheStats {
            items: self.items.len(),
            bytes: self.bytes,
            revision: self.revision,
            resyncs: self.resyncs,
            broken: self.broken.len(),
        }
    }
}

/// The mirror as of one revision.
pub struct View<'a, T> {
    mirror: &'a Mirror<T>,
}

impl<'a, T> View<'a, T> {
    pub(super) fn new(mirror: &'a Mirror<T>) -> Self {
        Self { mirror }
    }

    /// That revision.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.mirror.revision
    }

    /// The item at `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&'a Arc<Item<T>>> {
        self.mirror.items.get(key)
    }

    /// Items below `prefix` in key order, after the key `after` if given.
    pub fn range(&self, prefix: &Prefix, after: Option<&Key>) -> impl Iterator<Item = &'a Arc<Item<T>>> + use<'a, T> {
        let bounds = crate::page::bounds(prefix, after);
        let items = &self.mirror.items;
        bounds.into_iter().flat_map(move |(start, end)| {
            items
                .range::<str, _>((Bound::Excluded(start.as_str()), Bound::Excluded(end.as_str())))
                .map(|(_, item)| item)
        })
    }

    /// Items that have `term` in the index called `index`, in key order.
    pub fn find(&self, index: &str, term: &str) -> impl Iterator<Item = &'a Arc<Item<T>>> + use<'a, T> {
        let index = self.mirror.indexes.iter().find(|candidate| candidate.name == index);
        index.and_then(|index| index.found.get(term)).into_iter().flat_map(BTreeMap::values)
    }

    /// Keys that exist but whose newest value cannot be decoded, with the reason. Who deletes what seems unused must look here first.
    pub fn broken(&self) -> impl Iterator<Item = (&'a Key, &'a str)> + use<'a, T> {
        self.mirror.broken.iter().map(|(key, reason)| (key, reason.as_str()))
    }

    /// Number of items.
    #[must_use]
    pub fn len(&self) -> usize {
        self.mirror.items.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mirror.items.is_empty()
    }
}
