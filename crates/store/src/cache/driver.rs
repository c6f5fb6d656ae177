//! The task that fills caches: one, or several that move together.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::RwLock;

use super::member::Member;
use crate::{Prefix, Result, Revision, SharedStore, StoreError, WatchError, WatchItem, WatchStream};

const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// How often a list starts over because its snapshot was compacted meanwhile.
const SNAPSHOT_ATTEMPTS: usize = 5;
/// Changes taken over in one step, about; well below what a subscriber may be behind.
const STEP_CHANGES: usize = super::SUBSCRIBER_BUFFER / 4;

/// Fills caches until it is dropped or its task ended.
pub struct CacheDriver {
    store: SharedStore,
    members: Vec<Box<dyn Member>>,
    at: Revision,
    /// Held while the caches move from one revision to the next.
    pub(super) turn: Arc<RwLock<()>>,
}

impl CacheDriver {
    pub(super) fn new(store: SharedStore, members: Vec<Box<dyn Member>>) -> Self {
        Self { store, members, at: Revision::ZERO, turn: Arc::default() }
    }

    /// Follows the store for ever, listing again when the watch cannot go on and waiting longer each time the store fails.
    pub async fn run(mut self) {
        let mut retry = FIRST_RETRY;
        loop {
            let ended = match self.follow(&mut retry).await {
                WatchError::Compacted { .. } => self.sync().await,
                WatchError::Store(error) => Err(error),
            };
            if let Err(error) = ended {
                tracing::warn!(%error, retry_in_ms = retry.as_millis(), "the cache lost its store");
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(LAST_RETRY);
            }
        }
    }

    /// Applies the watch from the current revision until it ends.
    async fn follow(&mut self, retry: &mut Duration) -> WatchError {
        if self.at == Revision::ZERO {
            // Nothing was listed yet; the history of a store may begin later than its contents.
            return WatchError::Compacted { oldest: self.at };
        }
        let mut stream = match self.store.watch(&self.prefix(), self.at).await {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        loop {
            let (items, ended) = step(&mut stream).await;
            if let Some(last) = items.last() {
                *retry = FIRST_RETRY;
                let _turn = self.turn.write().await;
                for member in &mut self.members {
                    member.accept(&items);
                }
                self.at = last.revision();
            }
            if let Some(error) = ended {
                return error;
            }
        }
    }

    /// What must be watched.
    fn prefix(&self) -> Prefix {
        let mut prefixes = self.members.iter().flat_map(|member| member.prefixes());
        match (prefixes.next(), prefixes.next()) {
            (Some(one), None) => one.clone(),
            _ => Prefix::all(),
        }
    }

    /// Lists everything from one snapshot, keeps what did not change, and announces the difference, deletions included.
    ///
    /// # Errors
    /// When the store cannot be listed; the caches stay as they are.
    pub async fn sync(&mut self) -> Result<()> {
        let mut attempt = 0;
        let (at, lists) = 'again: loop {
            let at = self.store.revision().await?;
            let mut lists = Vec::with_capacity(self.members.len());
            for member in &self.members {
                match member.list_at(&self.store, at).await {
                    Ok(entries) => lists.push(entries),
                    Err(StoreError::Compacted { .. }) if attempt < SNAPSHOT_ATTEMPTS => {
                        attempt += 1;
                        continue 'again;
                    }
                    Err(error) => return Err(error),
                }
            }
            break (at, lists);
        };
        let _turn = self.turn.write().await;
        for (member, entries) in self.members.iter_mut().zip(lists) {
            member.replace(entries, at);
        }
        self.at = at;
        Ok(())
    }
}

/// Waits for the next item and takes what else is there already: readers are then woken once for all of it.
async fn step(stream: &mut WatchStream) -> (Vec<WatchItem>, Option<WatchError>) {
    let (mut items, mut changes) = (Vec::new(), 0);
    let mut next = stream.next().await;
    loop {
        match next {
            Some(Ok(item)) => {
                changes += match &item {
                    WatchItem::Event(event) => event.changes.len(),
                    WatchItem::Progress(_) => 0,
                };
                items.push(item);
            }
            Some(Err(error)) => return (items, Some(error)),
            None => return (items, Some(StoreError::Closed.into())),
        }
        if changes >= STEP_CHANGES {
            return (items, None);
        }
        next = match stream.next().now_or_never() {
            Some(next) => next,
            None => return (items, None),
        };
    }
}
