//! One watch: from the ring where it reaches back far enough, from the log in etcd where it does not.

use std::collections::VecDeque;
use std::sync::Arc;

use oblak_store::{Prefix, Revision, StoreError, WatchError, WatchEvent, WatchItem, WatchStream};
use tokio::sync::watch;

use crate::hub::{Look, Presence};
use crate::store::Core;
use crate::tail::{Ended, Step, Tail};

struct Watcher {
    core: Arc<Core>,
    _presence: Presence,
    wake: watch::Receiver<bool>,
    prefix: Prefix,
    incarnation: u32,
    cursor: u64,
    /// Open while the position is before the ring.
    tail: Option<Tail>,
    ready: VecDeque<WatchItem>,
    greeted: bool,
}

/// A watch after `from`, which exists and is kept.
pub fn watch(core: Arc<Core>, prefix: &Prefix, from: Revision) -> WatchStream {
    let (presence, wake) = core.hub.enter();
    let watcher = Watcher {
        core,
        _presence: presence,
        wake,
        prefix: prefix.clone(),
        incarnation: from.incarnation,
        cursor: from.n,
        tail: None,
        ready: VecDeque::new(),
        greeted: false,
    };
    WatchStream::new(futures_util::stream::unfold(Some(watcher), |watcher| async {
        let mut watcher = watcher?;
        match watcher.next().await {
            Ok(item) => Some((Ok(item), Some(watcher))),
            Err(error) => Some((Err(error), None)),
        }
    }))
}

impl Watcher {
    async fn next(&mut self) -> Result<WatchItem, WatchError> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                return Ok(item);
            }
            if *self.wake.borrow_and_update() {
                return Err(StoreError::Closed.into());
            }
            match self.core.hub.look(self.incarnation, self.cursor) {
                Look::OtherLife => return Err(self.compacted(0)),
                Look::Behind => self.catch_up().await?,
                Look::Events { events, upto } => {
                    self.tail = None;
                    if upto > self.cursor {
                        self.take(events.iter().map(|event| (event.revision.n, Some(&**event))), upto);
                    } else if !self.greeted {
                        self.greeted = true;
                        return Ok(WatchItem::Progress(self.here()));
                    } else if self.wake.changed().await.is_err() {
                        return Err(StoreError::Closed.into());
                    }
                }
            }
        }
    }

    fn here(&self) -> Revision {
        Revision::new(self.incarnation, self.cursor)
    }

    fn compacted(&self, floor: u64) -> WatchError {
        self.core.hub.raise_floor(floor);
        WatchError::Compacted { oldest: self.core.oldest() }
    }

    /// Makes items of events; progress when the last of them does not say how far the reader is.
    fn take<'e>(&mut self, events: impl Iterator<Item = (u64, Option<&'e WatchEvent>)>, upto: u64) {
        let mut told = None;
        for (n, event) in events {
            if let Some(event) = event.and_then(|event| filtered(event, &self.prefix)) {
                self.ready.push_back(WatchItem::Event(event));
                told = Some(n);
            }
        }
        self.cursor = upto;
        self.greeted = true;
        if told != Some(upto) {
            self.ready.push_back(WatchItem::Progress(self.here()));
        }
    }

    async fn catch_up(&mut self) -> Result<(), WatchError> {
        let tail = self.tail.get_or_insert_with(|| Tail::new(Arc::clone(&self.core), self.cursor));
        let mut pauses = self.core.cluster.pauses();
        loop {
            match tail.next().await {
                Ok(steps) => {
                    let Some(upto) = steps.last().map(|step: &Step| step.n) else { continue };
                    if self.core.known().meta.incarnation != self.incarnation {
                        return Err(self.compacted(0));
                    }
                    self.take(steps.iter().map(|step| (step.n, step.event.as_ref())), upto);
                    return Ok(());
                }
                Err(Ended::Compacted(floor)) => return Err(self.compacted(floor)),
                Err(Ended::Failed(failure)) => {
                    if !failure.is_transient() || !pauses.pause().await {
                        return Err(failure.into_store_error().into());
                    }
                }
            }
        }
    }
}

/// The part of `event` below `prefix`, if any.
fn filtered(event: &WatchEvent, prefix: &Prefix) -> Option<WatchEvent> {
    let changes: Vec<_> = event.changes.iter().filter(|change| prefix.contains(&change.key)).cloned().collect();
    (!changes.is_empty()).then_some(WatchEvent { revision: event.revision, changes })
}
