//! A mirror in memory of some prefixes, kept up by a watch: what lists, gets and reconcilers read.
//!
//! Values are decoded once, when they arrive, and handed out as [`Arc`], so a read copies nothing. A reader that has itself committed waits
//! with [`Cache::wait_for`] until the mirror has caught up with it.
//!
//! ```text
//!   list ──► synced ──watch──► following ──compacted or failed──► list again, compare, announce the difference, follow
//! ```

mod driver;
mod group;
mod member;
mod mirror;
mod subscribe;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;

pub use self::driver::CacheDriver;
pub use self::group::{CacheGroup, GroupBuilder};
use self::member::{Filler, Member};
use self::mirror::Mirror;
pub use self::mirror::View;
pub use self::subscribe::{CacheChange, Notice, Subscription};
use crate::{Entry, Key, Prefix, Result, Revision, SharedStore, StoreError};

/// A subscriber further behind than this is told to read everything again.
const SUBSCRIBER_BUFFER: usize = 1024;

/// A mirrored value.
#[derive(Debug)]
pub struct Item<T> {
    /// The key.
    pub key: Key,
    /// The decoded value.
    pub value: T,
    /// As it lies in the store, schema version included.
    pub raw: Bytes,
    /// When it was last modified.
    pub revision: Revision,
    /// When it came into being.
    pub created: Revision,
    gone: AtomicBool,
}

impl<T> Item<T> {
    /// An entry with what it was decoded to.
    #[must_use]
    pub fn new(entry: Entry, value: T) -> Self {
        let Entry { key, value: raw, revision, created } = entry;
        Self { key, value, raw, revision, created, gone: AtomicBool::new(false) }
    }

    /// Whether the mirror that it came from has no longer this item at its key. Told from the moment on in which reads show the change.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}

/// Turns an entry into a value.
pub type Decode<T> = Box<dyn Fn(&Entry) -> Result<T> + Send + Sync>;
/// Names the terms under which an item is found in an index.
pub type Terms<T> = Box<dyn Fn(&Item<T>) -> Vec<String> + Send + Sync>;

/// What to mirror.
pub struct CacheSource<T> {
    prefixes: Vec<Prefix>,
    decode: Decode<T>,
    indexes: Vec<(&'static str, Terms<T>)>,
}

impl<T> CacheSource<T> {
    /// Mirrors what lies below `prefix`.
    pub fn new(prefix: Prefix, decode: impl Fn(&Entry) -> Result<T> + Send + Sync + 'static) -> Self {
        Self { prefixes: vec![prefix], decode: Box::new(decode), indexes: Vec::new() }
    }

    /// Mirrors what lies below `prefix` too; `decode` must understand it.
    #[must_use]
    pub fn and(mut self, prefix: Prefix) -> Self {
        self.prefixes.push(prefix);
        self
    }

    /// Keeps an index: [`Cache::find`] answers which items have a term.
    #[must_use]
    pub fn index(
        mut self,
        name: &'static str,
        terms: impl Fn(&Item<T>) -> Vec<String> + Send + Sync + 'static,
    ) -> Self {
        self.indexes.push((name, Box::new(terms)));
        self
    }
}

impl<T: serde::de::DeserializeOwned> CacheSource<T> {
    /// Mirrors values written with [`crate::objects::encode_value`], as a [`crate::Collection`] does.
    #[must_use]
    pub fn values(prefix: Prefix) -> Self {
        Self::new(prefix, |entry| crate::objects::decode_value(&entry.key, &entry.value))
    }
}

impl<K: oblak_model::Kind> CacheSource<oblak_model::Object<K>>
where
    oblak_model::Object<K>: Send + Sync,
{
    /// Mirrors all objects of a kind.
    #[must_use]
    pub fn objects() -> Self {
        Self::new(crate::objects::object_prefix::<K>(None), crate::objects::decode::<K>)
    }
}

/// Figures for metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Items mirrored.
    pub items: usize,
    /// Bytes of their raw values.
    pub bytes: usize,
    /// How far the mirror is.
    pub revision: Revision,
    /// Lists after the first, each because history was compacted or the store failed.
    pub resyncs: u64,
    /// Values that could not be decoded.
    pub broken: usize,
}

struct Shared<T> {
    mirror: RwLock<Mirror<T>>,
    at: watch::Sender<Revision>,
    changes: broadcast::Sender<CacheChange<T>>,
}

/// The mirror. Dropping it stops the task that [`Cache::start`] began.
pub struct Cache<T> {
    shared: Arc<Shared<T>>,
    task: Option<JoinHandle<()>>,
}

impl<T> Drop for Cache<T> {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl<T: Send + Sync + 'static> Cache<T> {
    /// An empty mirror and the task that fills it, for those who run tasks themselves. It is a group of one.
    #[must_use]
    pub fn new(store: SharedStore, source: CacheSource<T>) -> (Self, CacheDriver) {
        let (cache, member) = Self::with_member(source);
        (cache, CacheDriver::new(store, vec![member]))
    }

    fn with_member(source: CacheSource<T>) -> (Self, Box<dyn Member>) {
        let CacheSource { prefixes, decode, indexes } = source;
        let shared = Arc::new(Shared {
            mirror: RwLock::new(Mirror::new(indexes)),
            at: watch::Sender::new(Revision::ZERO),
            changes: broadcast::Sender::new(SUBSCRIBER_BUFFER),
        });
        let member = Box::new(Filler::new(prefixes, decode, Arc::clone(&shared)));
        (Self { shared, task: None }, member)
    }

    /// Lists once, then follows in a task of the current tokio runtime.
    ///
    /// # Errors
    /// When the first list fails.
    pub async fn start(store: SharedStore, source: CacheSource<T>) -> Result<Self> {
        let (mut cache, mut driver) = Self::new(store, source);
        driver.sync().await?;
        cache.task = Some(oblak_platform::task::spawn(driver.run()));
        Ok(cache)
    }

    /// Runs `read` on the mirror as of one revision. It must be quick: updates wait meanwhile.
    pub fn view<R>(&self, read: impl FnOnce(&View<'_, T>) -> R) -> R {
        read(&View::new(&self.shared.mirror.read().unwrap_or_else(PoisonError::into_inner)))
    }

    /// The item at `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Arc<Item<T>>> {
        self.view(|view| view.get(key).cloned())
    }

    /// All items below `prefix`, in key order.
    #[must_use]
    pub fn all(&self, prefix: &Prefix) -> Vec<Arc<Item<T>>> {
        self.view(|view| view.range(prefix, None).cloned().collect())
    }

    /// Items that have `term` in the index called `index`, in key order. Nothing when there is no such index.
    #[must_use]
    pub fn find(&self, index: &str, term: &str) -> Vec<Arc<Item<T>>> {
        self.view(|view| view.find(index, term).cloned().collect())
    }

    /// How far the mirror is.
    #[must_use]
    pub fn revision(&self) -> Revision {
        *self.shared.at.borrow()
    }

    /// Returns once the mirror shows `revision`.
    ///
    /// # Errors
    /// [`StoreError::Behind`] when it does not within `deadline`.
    pub async fn wait_for(&self, revision: Revision, deadline: Duration) -> Result<Revision> {
        if let at = self.revision()
            && at >= revision
        {
            return Ok(at);
        }
        let mut at = self.shared.at.subscribe();
        match tokio::time::timeout(deadline, at.wait_for(|at| *at >= revision)).await {
            Ok(Ok(at)) => Ok(*at),
            _ => Err(StoreError::Behind { at: self.revision(), wanted: revision }),
        }
    }

    /// Changes from now on. Read the mirror after subscribing: then nothing is missed.
    #[must_use]
    pub fn subscribe(&self) -> Subscription<T> {
        let mirror = self.shared.mirror.read().unwrap_or_else(PoisonError::into_inner);
        Subscription::new(self.shared.changes.subscribe(), mirror.revision())
    }

    /// Figures for metrics.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        self.shared.mirror.read().unwrap_or_else(PoisonError::into_inner).stats()
    }
}
