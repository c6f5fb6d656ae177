//! Tells others what changed in a cache.

use std::sync::Arc;

use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

use super::Item;
use crate::{Key, Revision};

/// One item changed.
#[derive(Debug)]
pub struct CacheChange<T> {
    /// In which revision. Differences found by a new list carry the revision of that list.
    pub revision: Revision,
    /// Which key.
    pub key: Key,
    /// Before; none when it is new.
    pub old: Option<Arc<Item<T>>>,
    /// After; none when it was deleted.
    pub new: Option<Arc<Item<T>>>,
}

impl<T> Clone for CacheChange<T> {
    fn clone(&self) -> Self {
        Self { revision: self.revision, key: self.key.clone(), old: self.old.clone(), new: self.new.clone() }
    }
}

/// What a subscriber hears.
#[derive(Debug)]
pub enum Notice<T> {
    /// A change.
    Change(CacheChange<T>),
    /// Changes were missed because the subscriber was slow: read the cache again.
    Resync,
}

/// Changes of a cache, in order.
pub struct Subscription<T> {
    changes: Receiver<CacheChange<T>>,
    since: Revision,
}

impl<T> Subscription<T> {
    pub(super) fn new(changes: Receiver<CacheChange<T>>, since: Revision) -> Self {
        Self { changes, since }
    }

    /// The next notice; none when the cache is gone. Cancel-safe.
    pub async fn next(&mut self) -> Option<Notice<T>> {
        loop {
            match self.changes.recv().await {
                // Already visible when the subscription began.
                Ok(change) if change.revision <= self.since => {}
                Ok(change) => return Some(Notice::Change(change)),
                Err(RecvError::Lagged(_)) => return Some(Notice::Resync),
                Err(RecvError::Closed) => return None,
            }
        }
    }

    /// The next notice that is there already; none when there is none yet, or the cache is gone.
    ///
    /// While a group is held ([`super::CacheGroup::hold`]) everything up to its revision is there.
    pub fn try_next(&mut self) -> Option<Notice<T>> {
        loop {
            match self.changes.try_recv() {
                Ok(change) if change.revision <= self.since => {}
                Ok(change) => return Some(Notice::Change(change)),
                Err(TryRecvError::Lagged(_)) => return Some(Notice::Resync),
                Err(TryRecvError::Empty | TryRecvError::Closed) => return None,
            }
        }
    }
}
