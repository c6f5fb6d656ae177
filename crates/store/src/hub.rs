//! Hands commits to watchers. A watcher pulls: it keeps a position, reads what is after it from a short ring in memory or, when it is
//! further behind, from the backend's history. So a slow watcher costs no memory and can lose nothing silently.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use oblak_model::Revision;
use tokio::sync::watch;

use crate::{Prefix, StoreError, WatchError, WatchEvent, WatchItem, WatchStream};

/// Most commits in the ring.
const RING_EVENTS: usize = 4096;
/// Most bytes of keys and values in the ring.
const RING_BYTES: usize = 4 << 20;
/// Most revisions taken over in one step.
pub(crate) const STEP: usize = 256;

/// Part of the history, filtered by prefix.
pub(crate) struct Chunk {
    pub events: Vec<WatchEvent>,
    /// Last revision looked at.
    pub scanned: u64,
}

/// Where commits that left the ring are read from.
#[async_trait]
pub(crate) trait History: Send + Sync + 'static {
    /// Events of revisions after `after`, about [`STEP`] of them.
    async fn read(&self, prefix: &Prefix, after: u64) -> Result<Chunk, WatchError>;
}

#[derive(Clone, Copy, Debug)]
struct Position {
    head: Revision,
    closed: bool,
}

#[derive(Default)]
struct Ring {
    events: VecDeque<Arc<WatchEvent>>,
    bytes: usize,
}

/// Shared by a store and its watchers.
pub(crate) struct Hub {
    ring: Mutex<Ring>,
    position: watch::Sender<Position>,
    floor: AtomicU64,
    watchers: AtomicU64,
}

impl Hub {
    pub fn new(head: Revision, floor: u64) -> Arc<Self> {
        Arc::new(Self {
            ring: Mutex::default(),
            position: watch::Sender::new(Position { head, closed: false }),
            floor: AtomicU64::new(floor),
            watchers: AtomicU64::new(0),
        })
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn head(&self) -> Revision {
        self.position.borrow().head
    }

    pub fn floor(&self) -> u64 {
        self.floor.load(Ordering::Acquire)
    }

    pub fn oldest(&self) -> Revision {
        Revision::new(self.head().incarnation, self.floor())
    }

    pub fn watchers(&self) -> u64 {
        self.watchers.load(Ordering::Relaxed)
    }

    /// Announces durable commits, in order and without a gap. Wakes each watcher once.
    pub fn publish(&self, events: impl IntoIterator<Item = WatchEvent>) {
        let mut ring = self.ring();
        let mut head = None;
        for event in events {
            head = Some(event.revision);
            ring.bytes += size(&event);
            ring.events.push_back(Arc::new(event));
        }
        drop(ring);
        if let Some(head) = head {
            self.position.send_modify(|position| position.head = head);
        }
    }

    /// Cuts the ring to its limits. To be called after each [`Hub::publish`], when nobody waits.
    pub fn evict(&self) {
        let mut old = Vec::new();
        let mut ring = self.ring();
        while ring.events.len() > RING_EVENTS || ring.bytes > RING_BYTES {
            let Some(event) = ring.events.pop_front() else { break };
            ring.bytes -= size(&event);
            old.push(event);
        }
        drop(ring);
        drop(old);
    }

    /// History up to here is gone.
    pub fn set_floor(&self, floor: u64) {
        self.floor.store(floor, Ordering::Release);
    }

    /// The store was reopened or restored: the ring no longer connects to what follows.
    pub fn reset(&self, head: Revision, floor: u64) {
        *self.ring() = Ring::default();
        self.set_floor(floor);
        self.position.send_modify(|position| position.head = head);
    }

    pub fn close(&self) {
        self.position.send_modify(|position| position.closed = true);
    }

    /// Commits after `after`, or none when the ring does not reach back that far.
    fn after(&self, after: u64) -> Option<Vec<Arc<WatchEvent>>> {
        let ring = self.ring();
        let first = ring.events.front()?.revision.n;
        let skip = usize::try_from((after + 1).checked_sub(first)?).unwrap_or(usize::MAX);
        Some(ring.events.iter().skip(skip).take(STEP).cloned().collect())
    }
}

fn size(event: &WatchEvent) -> usize {
    event.changes.iter().map(|change| change.key.len() + change.value.as_ref().map_or(0, bytes::Bytes::len) + 64).sum()
}

/// The part of `event` below `prefix`, if any.
pub(crate) fn filtered(event: &WatchEvent, prefix: &Prefix) -> Option<WatchEvent> {
    let changes: Vec<_> = event.changes.iter().filter(|change| prefix.contains(&change.key)).cloned().collect();
    (!changes.is_empty()).then_some(WatchEvent { revision: event.revision, changes })
}

struct Watcher {
    hub: Arc<Hub>,
    history: Arc<dyn History>,
    positions: watch::Receiver<Position>,
    prefix: Prefix,
    incarnation: u32,
    cursor: u64,
    ready: VecDeque<WatchItem>,
    greeted: bool,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.hub.watchers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Opens a watch strictly after `from`.
pub(crate) fn watch(
    hub: &Arc<Hub>,
    history: Arc<dyn History>,
    prefix: &Prefix,
    from: Revision,
) -> Result<WatchStream, WatchError> {
    let positions = hub.position.subscribe();
    let Position { head, closed } = *positions.borrow();
    if closed {
        return Err(StoreError::Closed.into());
    }
    let known = from == Revision::ZERO || from.incarnation == head.incarnation;
    if !known || from.n < hub.floor() || from.n > head.n {
        return Err(WatchError::Compacted { oldest: hub.oldest() });
    }
    hub.watchers.fetch_add(1, Ordering::Relaxed);
    let watcher = Watcher {
        hub: Arc::clone(hub),
        history,
        positions,
        prefix: prefix.clone(),
        incarnation: head.incarnation,
        cursor: from.n,
        ready: VecDeque::new(),
        greeted: false,
    };
    Ok(WatchStream::new(futures_util::stream::unfold(Some(watcher), |watcher| async {
        let mut watcher = watcher?;
        match watcher.next().await {
            Ok(item) => Some((Ok(item), Some(watcher))),
            Err(error) => Some((Err(error), None)),
        }
    })))
}

impl Watcher {
    async fn next(&mut self) -> Result<WatchItem, WatchError> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                return Ok(item);
            }
            let Position { head, closed } = *self.positions.borrow_and_update();
            if head.incarnation != self.incarnation || head.n < self.cursor {
                return Err(WatchError::Compacted { oldest: self.hub.oldest() });
            }
            if self.cursor < head.n {
                self.advance(head).await?;
            } else if !self.greeted {
                self.greeted = true;
                return Ok(WatchItem::Progress(head));
            } else if closed || self.positions.changed().await.is_err() {
                return Err(StoreError::Closed.into());
            }
        }
    }

    async fn advance(&mut self, head: Revision) -> Result<(), WatchError> {
        let (events, scanned) = match self.hub.after(self.cursor) {
            Some(events) if !events.is_empty() => {
                let scanned = events.last().map_or(self.cursor, |event| event.revision.n);
                (events.iter().filter_map(|event| filtered(event, &self.prefix)).collect(), scanned)
            }
            _ => {
                let chunk = self.history.read(&self.prefix, self.cursor).await?;
                (chunk.events, chunk.scanned)
            }
        };
        if scanned <= self.cursor {
            // The store says it is further, yet has nothing after our position: the history was cut under us.
            return Err(WatchError::Compacted { oldest: self.hub.oldest() });
        }
        self.cursor = scanned;
        self.greeted = true;
        let idle = events.last().is_none_or(|event| event.revision.n < scanned);
        self.ready.extend(events.into_iter().map(WatchItem::Event));
        if idle && scanned >= head.n {
            self.ready.push_back(WatchItem::Progress(Revision::new(head.incarnation, scanned)));
        }
        Ok(())
    }
}
