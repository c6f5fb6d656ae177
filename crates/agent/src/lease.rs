//! The lease of the node as this agent and the shims of fenced guests see it.
//!
//! Kept in one file, `node/lease.json`, that is replaced after each renewal and read by every shim of a fenced guest at its deadline
//! (`oblak_compute::shim::fence`). So renewing costs the same however many guests there are, and nothing depends on this process being alive.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use oblak_compute::shim::{Fence, Lease};
use oblak_model::wire::Registered;
use oblak_platform::layout::Layout;
use tokio::sync::Notify;

use crate::context::lock;

/// File name below `node/`.
pub const FILE: &str = "lease.json";

#[derive(Debug, Default)]
struct State {
    lease: Lease,
    length: Duration,
    /// Epoch at the time when the world that is known now was asked for.
    synced: u64,
    /// Epoch at the time when the world that is being sent was asked for.
    asked: u64,
}

/// The lease of this node.
#[derive(Debug)]
pub struct Keeper {
    path: PathBuf,
    boot_id: String,
    state: Mutex<State>,
    /// The world has to be asked for again: the lease was interrupted, and what was here may have been moved since.
    pub ask_again: Notify,
}

impl Keeper {
    /// Without a lease.
    #[must_use]
    pub fn new(layout: &Layout, boot_id: &str) -> Self {
        Self {
            path: layout.node().join(FILE),
            boot_id: boot_id.into(),
            state: Mutex::default(),
            ask_again: Notify::new(),
        }
    }

    /// A lease has begun; `before` is when it was asked for.
    pub fn began(&self, registered: &Registered, before: Duration) {
        let old = Lease::read(&self.path).ok().flatten().filter(|old| old.boot_id == self.boot_id);
        // Unbroken: the old one was alive in the commit that began this one, so nothing was moved away in between.
        let unbroken = old.filter(|old| registered.continues == Some(old.epoch));
        let since = unbroken.map_or(registered.epoch, |old| old.since);
        let mut state = lock(&self.state);
        state.length = Duration::from_millis(registered.lease_ms);
        state.lease = Lease { boot_id: self.boot_id.clone(), epoch: registered.epoch, since, deadline_ms: 0 };
        self.extend(&mut state, before);
        if state.asked < since {
            self.ask_again.notify_one();
        }
    }

    /// The lease was renewed; `before` is when that was asked for.
    pub fn renewed(&self, before: Duration) {
        self.extend(&mut lock(&self.state), before);
    }

    fn extend(&self, state: &mut State, before: Duration) {
        let deadline = u64::try_from((before + state.length).as_millis()).unwrap_or(u64::MAX);
        state.lease.deadline_ms = deadline.max(state.lease.deadline_ms);
        if let Err(error) = state.lease.write(&self.path) {
            // Fenced guests will stand still: better than running twice.
            tracing::error!(%error, "the lease cannot be written down");
        }
    }

    /// Whether the lease has not ended yet at `now`.
    #[must_use]
    pub fn is_alive(&self, now: Duration) -> bool {
        now < Duration::from_millis(lock(&self.state).lease.deadline_ms)
    }

    /// The world is asked for, from now on.
    pub fn asking(&self) -> u64 {
        let mut state = lock(&self.state);
        state.asked = state.lease.epoch;
        state.asked
    }

    /// The world is known as it was at some time after it was asked for in `epoch`.
    pub fn synced(&self, epoch: u64) {
        lock(&self.state).synced = epoch;
    }

    /// The fence for guests that the known world gives to this node; none without a lease, and while what is known may be from before an
    /// interruption of the lease. Ask before looking into the world: it only gets newer.
    #[must_use]
    pub fn fence(&self, now: Duration) -> Option<Fence> {
        if !self.is_alive(now) {
            return None;
        }
        let state = lock(&self.state);
        let known = state.synced > 0 && (state.lease.since..=state.lease.epoch).contains(&state.synced);
        known.then(|| Fence { lease: self.path.clone(), epoch: state.synced })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registered(epoch: u64, continues: Option<u64>) -> Registered {
        Registered { name: "n1".into(), epoch, lease_ms: 5000, continues }
    }

    #[test]
    fn a_world_from_before_an_interruption_gives_no_fence() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        std::fs::create_dir_all(layout.node()).unwrap();
        let at = Duration::from_secs(100);
        let keeper = Keeper::new(&layout, "boot");
        assert!(keeper.fence(at).is_none());
        keeper.began(&registered(1, None), at);
        let asked = keeper.asking();
        keeper.synced(asked);
        assert_eq!(keeper.fence(at).unwrap().epoch, 1);
        assert!(keeper.is_alive(at + Duration::from_millis(4999)) && !keeper.is_alive(at + Duration::from_secs(5)));

        // A new lease while the old one lived: what is known still holds.
        keeper.began(&registered(2, Some(1)), at);
        assert_eq!(keeper.fence(at).unwrap().epoch, 1);
        // Another agent of the same node goes on with it, once it knows the world.
        let next = Keeper::new(&layout, "boot");
        next.began(&registered(3, Some(2)), at);
        assert!(next.fence(at).is_none());
        next.synced(next.asking());
        assert_eq!(next.fence(at).unwrap().epoch, 3);
        let file = Lease::read(&layout.node().join(FILE)).unwrap().unwrap();
        assert_eq!((file.since, file.epoch, file.deadline_ms), (1, 3, 105_000));

        // Interrupted: until the world was asked for again nothing is known.
        next.began(&registered(4, None), at);
        assert!(next.fence(at).is_none());
        next.synced(3);
        assert!(next.fence(at).is_none(), "that was asked for before");
        next.synced(next.asking());
        assert_eq!(next.fence(at).unwrap().epoch, 4);
    }
}
