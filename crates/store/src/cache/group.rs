//! Caches that move together: whoever reads several of them sees them all as of one revision.
//!
//! With a watch each, an object could be there while what was committed with it is not yet.

use std::sync::Arc;

use tokio::sync::{OwnedRwLockReadGuard, RwLock};
use tokio::task::JoinHandle;

use super::member::Member;
use super::{Cache, CacheDriver, CacheSource};
use crate::{Result, SharedStore};

/// Collects the caches of a group.
pub struct GroupBuilder {
    store: SharedStore,
    members: Vec<Box<dyn Member>>,
}

impl GroupBuilder {
    /// A group without caches.
    #[must_use]
    pub fn new(store: SharedStore) -> Self {
        Self { store, members: Vec::new() }
    }

    /// One more cache. It is empty until the group starts.
    pub fn add<T: Send + Sync + 'static>(&mut self, source: CacheSource<T>) -> Cache<T> {
        let (cache, member) = Cache::with_member(source);
        self.members.push(member);
        cache
    }

    /// Lists once, then follows in one task of the current tokio runtime.
    ///
    /// # Errors
    /// When the first list fails.
    pub async fn start(self) -> Result<CacheGroup> {
        let mut driver = CacheDriver::new(self.store, self.members);
        let turn = Arc::clone(&driver.turn);
        driver.sync().await?;
        Ok(CacheGroup { turn, task: oblak_platform::task::spawn(driver.run()) })
    }
}

/// Caches that move together. Dropping it stops them.
pub struct CacheGroup {
    turn: Arc<RwLock<()>>,
    task: JoinHandle<()>,
}

impl Drop for CacheGroup {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl CacheGroup {
    /// Holds all caches of the group at one revision until the guard is dropped. Do not wait for a revision meanwhile.
    pub async fn hold(&self) -> OwnedRwLockReadGuard<()> {
        Arc::clone(&self.turn).read_owned().await
    }
}
