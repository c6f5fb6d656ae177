//! Hands the log of etcd to watchers. One stream per process fills a ring in memory; a watcher pulls from it at its own pace, so a slow one
//! costs no memory. Who is further behind than the ring reads the log itself (`watcher`).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oblak_store::{Revision, WatchEvent};
use tokio::sync::watch;

use crate::tail::Step;

/// Most commits in the ring.
const RING_EVENTS: usize = 4096;
/// Most bytes of keys and values in the ring.
const RING_BYTES: usize = 8 << 20;
/// Most events taken over in one step.
const STEP: usize = 256;

struct Ring {
    incarnation: u32,
    /// All events after this revision are in the ring.
    base: u64,
    /// The log is known up to here.
    head: u64,
    events: VecDeque<Arc<WatchEvent>>,
    bytes: usize,
}

/// What the ring holds for a watcher.
pub enum Look {
    /// The events after its position; with them it has everything up to `upto`.
    Events { events: Vec<Arc<WatchEvent>>, upto: u64 },
    /// The ring begins later.
    Behind,
    /// The store began a new life since.
    OtherLife,
}

/// Shared by a store and its watchers.
pub struct Hub {
    ring: Mutex<Ring>,
    /// Woken at each change of the ring; true when the store is closed.
    wake: watch::Sender<bool>,
    /// Oldest revision that lists and watches may name, as far as is known here.
    floor: AtomicU64,
    /// A revision that somebody will wait for.
    wanted: watch::Sender<u64>,
    watchers: AtomicU64,
}

/// Counts as one watcher until dropped.
pub struct Presence(Arc<Hub>);

impl Drop for Presence {
    fn drop(&mut self) {
        self.0.watchers.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Hub {
    pub fn new(incarnation: u32, base: u64) -> Arc<Self> {
        let ring = Ring { incarnation, base, head: base, events: VecDeque::new(), bytes: 0 };
        Arc::new(Self {
            ring: Mutex::new(ring),
            wake: watch::Sender::new(false),
            floor: AtomicU64::new(0),
            wanted: watch::Sender::new(0),
            watchers: AtomicU64::new(0),
        })
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn head(&self) -> u64 {
        self.ring().head
    }

    pub fn floor(&self) -> u64 {
        self.floor.load(Ordering::Acquire)
    }

    pub fn raise_floor(&self, floor: u64) {
        self.floor.fetch_max(floor, Ordering::AcqRel);
    }

    pub fn watchers(&self) -> u64 {
        self.watchers.load(Ordering::Relaxed)
    }

    /// Whether a watcher can go on at `n` from the ring alone.
    pub fn covers(&self, n: u64) -> bool {
        let ring = self.ring();
        n >= ring.base && n <= ring.head && n >= self.floor()
    }

    pub fn enter(self: &Arc<Self>) -> (Presence, watch::Receiver<bool>) {
        self.watchers.fetch_add(1, Ordering::Relaxed);
        (Presence(Arc::clone(self)), self.wake.subscribe())
    }

    /// Adds what was read of the log, in order.
    pub fn publish(&self, steps: Vec<Step>) {
        let mut old = Vec::new();
        let mut ring = self.ring();
        for step in steps {
            if step.n <= ring.head {
                continue;
            }
            ring.head = step.n;
            if let Some(event) = step.event
                && event.revision.incarnation == ring.incarnation
            {
                ring.bytes += size(&event);
                ring.events.push_back(Arc::new(event));
            }
        }
        while ring.events.len() > RING_EVENTS || ring.bytes > RING_BYTES {
            let Some(event) = ring.events.pop_front() else { break };
            ring.bytes -= size(&event);
            ring.base = event.revision.n;
            old.push(event);
        }
        drop(ring);
        self.wake.send_replace(false);
        drop(old);
    }

    /// The log cannot be followed from where the ring ends: it goes on after `at`.
    pub fn reset(&self, at: Revision) {
        let mut ring = self.ring();
        let head = at.n.max(ring.head);
        *ring = Ring { incarnation: at.incarnation, base: head, head, events: VecDeque::new(), bytes: 0 };
        drop(ring);
        self.wake.send_replace(false);
    }

    pub fn close(&self) {
        self.wake.send_replace(true);
    }

    /// Somebody will wait until watchers are at `n`.
    pub fn want(&self, n: u64) {
        if n > self.head() {
            self.wanted.send_if_modified(|wanted| {
                let more = n > *wanted;
                *wanted = n.max(*wanted);
                more
            });
        }
    }

    pub fn wanted(&self) -> watch::Receiver<u64> {
        self.wanted.subscribe()
    }

    pub fn changes(&self) -> watch::Receiver<bool> {
        self.wake.subscribe()
    }

    pub fn look(&self, incarnation: u32, after: u64) -> Look {
        let ring = self.ring();
        if ring.incarnation != incarnation {
            return Look::OtherLife;
        }
        if after < ring.base {
            return Look::Behind;
        }
        let first = ring.events.partition_point(|event| event.revision.n <= after);
        let events: Vec<_> = ring.events.iter().skip(first).take(STEP).cloned().collect();
        let upto = match events.last() {
            Some(last) if events.len() == STEP => last.revision.n,
            _ => ring.head,
        };
        Look::Events { events, upto }
    }
}

fn size(event: &WatchEvent) -> usize {
    event.changes.iter().map(|change| change.key.len() + change.value.as_ref().map_or(0, bytes::Bytes::len) + 64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_store::{Change, Key};

    fn step(n: u64, bytes: usize) -> Step {
        let revision = Revision::new(1, n);
        let value = Some(vec![0; bytes].into());
        let change = Change { key: Key::new("/a/b").unwrap(), value, prev: None, created: revision };
        Step { n, event: (bytes > 0).then(|| WatchEvent { revision, changes: vec![change] }) }
    }

    #[test]
    fn the_ring_is_bounded_and_says_where_it_begins() {
        let hub = Hub::new(1, 10);
        hub.publish((11..21).map(|n| step(n, 1 << 20)).collect());
        assert!(matches!(hub.look(1, 10), Look::Behind), "the oldest were dropped");
        let Look::Events { events, upto } = hub.look(1, 15) else { panic!("the newest are there") };
        assert_eq!((events[0].revision.n, events.len(), upto), (16, 5, 20));
        hub.publish(vec![step(20, 1), step(25, 0)]);
        let Look::Events { events, upto } = hub.look(1, 20) else { panic!() };
        assert_eq!((events.len(), upto), (0, 25), "gaps are progress, and what is known is not taken twice");
        assert!(hub.covers(25) && !hub.covers(26) && !hub.covers(11));
        hub.raise_floor(22);
        assert!(!hub.covers(21));
        hub.reset(Revision::new(2, 30));
        assert!(matches!(hub.look(1, 25), Look::OtherLife));
    }
}
