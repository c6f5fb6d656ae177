//! Which leases live, and until when. Only this process's memory knows the moment; the file knows that they exist.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::{Lease, LeaseId};

struct Life {
    ttl: Duration,
    ends: Duration,
}

/// Leases and the time they are compared with, in boot time.
#[derive(Default)]
pub struct Leases {
    now: Duration,
    lives: BTreeMap<LeaseId, Life>,
    ends: BTreeSet<(Duration, LeaseId)>,
}

impl Leases {
    pub fn set_now(&mut self, now: Duration) {
        self.now = self.now.max(now);
    }

    pub fn alive(&self, id: LeaseId) -> bool {
        self.lives.get(&id).is_some_and(|life| life.ends > self.now)
    }

    /// Starts or restarts a life of `ttl` from now.
    pub fn begin(&mut self, id: LeaseId, ttl: Duration) {
        self.end(id);
        let ends = self.now.saturating_add(ttl);
        self.lives.insert(id, Life { ttl, ends });
        self.ends.insert((ends, id));
    }

    /// Restarts the life of a lease that is alive.
    pub fn renew(&mut self, id: LeaseId) -> Option<Lease> {
        let ttl = self.lives.get(&id).filter(|life| life.ends > self.now)?.ttl;
        self.begin(id, ttl);
        Some(Lease { id, ttl })
    }

    /// Forgets a lease; false when it was not known.
    pub fn end(&mut self, id: LeaseId) -> bool {
        let Some(life) = self.lives.remove(&id) else { return false };
        self.ends.remove(&(life.ends, id))
    }

    /// A lease whose time is over.
    pub fn due(&self) -> Option<LeaseId> {
        self.ends.first().filter(|(ends, _)| *ends <= self.now).map(|(_, id)| *id)
    }

    /// How long until the next lease ends.
    pub fn next(&self) -> Option<Duration> {
        self.ends.first().map(|(ends, _)| ends.saturating_sub(self.now))
    }

    pub fn len(&self) -> usize {
        self.lives.len()
    }
}
