//! The loop around every reconciler: woken by changes and by a sweep, one at a time, slower after failures.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use oblak_model::{Revision, Timestamp};
use oblak_platform::clock::SharedClock;
use oblak_platform::random::{SharedRandom, uuid7};
use oblak_store::{CommitOutcome, Key, SharedStore, StoreError, TxnId, commit_settled};
use tokio::time::Instant;

use crate::caches::Caches;
use crate::change::Change;
use crate::election::Fence;
use crate::lifecycle::{Batch, Recent, event_ops};

/// Changes gathered before a plan is made while many come. Short, because a person may be waiting; long enough to place a burst together.
const GATHER: Duration = Duration::from_millis(1);
/// After so much silence a change is acted upon at once.
const QUIET: Duration = Duration::from_millis(10);
/// When a reconciler found nothing to do it rests so many times as long as it took to see that, so that in a large cloud those who look at
/// everything do not keep the mirrors from moving on for those who work.
const REST: u32 = 8;
/// Longest such rest.
const LONGEST_REST: Duration = Duration::from_millis(250);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Passes in a row without a pause, before somebody else gets a turn.
const PASSES: u32 = 1000;

/// Plans changes from the mirrors alone.
pub trait Reconciler: Send {
    /// For logs.
    fn name(&self) -> &'static str;
    /// How often it plans even when nothing woke it.
    fn sweep(&self) -> Duration;
    /// Whether changes of the mirrors wake it.
    fn is_woken(&self) -> bool {
        true
    }
    /// What is to be done now. Nothing when all is well.
    fn plan(&mut self, caches: &Caches, now: Timestamp) -> Vec<Change>;
    /// More changes that need a look into the store itself.
    fn look(
        &mut self,
        _store: &SharedStore,
        _now: Timestamp,
    ) -> impl Future<Output = Result<Vec<Change>, StoreError>> + Send {
        async { Ok(Vec::new()) }
    }
}

/// Runs reconcilers.
pub struct Driver {
    store: SharedStore,
    caches: Arc<Caches>,
    clock: SharedClock,
    random: SharedRandom,
    fence: Fence,
    recent: Mutex<Recent>,
}

impl Driver {
    /// A driver over these mirrors, for one term of a leader.
    pub fn new(
        store: SharedStore,
        caches: Arc<Caches>,
        clock: SharedClock,
        random: SharedRandom,
        fence: Fence,
    ) -> Self {
        Self { store, caches, clock, random, fence, recent: Mutex::new(Recent::new()) }
    }

    /// Runs one reconciler until the term is over.
    pub async fn run<R: Reconciler>(&self, mut reconciler: R) {
        let mut changes = self.caches.subscribe();
        let mut failures = 0u32;
        let mut passes = 0u32;
        let mut last: Option<Instant> = None;
        while self.fence.stands(self.clock.boottime()) {
            changes.borrow_and_update();
            let outcome = self.pass(&mut reconciler).await;
            let ended = Instant::now();
            let rest = match &outcome {
                Ok(Passed::Idle(looked)) => looked.saturating_mul(REST).min(LONGEST_REST),
                _ => Duration::ZERO,
            };
            let pause = match outcome {
                Ok(Passed::Worked) if passes < PASSES => {
                    passes += 1;
                    failures = 0;
                    continue;
                }
                Ok(Passed::Worked | Passed::Idle(_)) => {
                    failures = 0;
                    reconciler.sweep()
                }
                Ok(Passed::Conflict) => self.pause(&mut failures),
                Err(error) => {
                    tracing::warn!(reconciler = reconciler.name(), %error, "a pass failed; trying again");
                    self.pause(&mut failures)
                }
            };
            passes = 0;
            let woken = async {
                if reconciler.is_woken() && failures == 0 && changes.changed().await.is_ok() {
                    let busy = last.is_some_and(|at| at.elapsed() < QUIET);
                    let gather = if busy { GATHER } else { Duration::ZERO };
                    let wait = gather.max(rest.saturating_sub(ended.elapsed()));
                    if !wait.is_zero() {
                        tokio::time::sleep(wait).await;
                    }
                    last = Some(Instant::now());
                } else {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = woken => {}
                () = tokio::time::sleep(pause) => {}
                () = self.fence.over.cancelled() => return,
            }
        }
    }

    fn pause(&self, failures: &mut u32) -> Duration {
        *failures = failures.saturating_add(1);
        FIRST_PAUSE.saturating_mul(1 << (*failures - 1).min(10)).min(LONGEST_PAUSE)
    }

    async fn pass(&self, reconciler: &mut impl Reconciler) -> Result<Passed, StoreError> {
        let now = self.clock.now();
        let (mut changes, looked) = {
            let _one_revision = self.caches.hold().await;
            let begun = Instant::now();
            (reconciler.plan(&self.caches, now), begun.elapsed())
        };
        changes.extend(reconciler.look(&self.store, now).await?);
        if changes.is_empty() {
            return Ok(Passed::Idle(looked));
        }
        let mut written = Written::default();
        let mut batch = self.batch();
        let mut done = true;
        for change in changes {
            let change = self.with_events(change, now);
            if !batch.has_room_for(&change) {
                done = self.commit(std::mem::replace(&mut batch, self.batch()), now, &mut written).await?;
                if !done {
                    break;
                }
            }
            batch.absorb(change);
        }
        if done {
            done = self.commit(batch, now, &mut written).await?;
        }
        let Some(last) = written.last else { return Ok(if done { Passed::Worked } else { Passed::Conflict }) };
        self.caches.catch_up(last).await;
        // What could not be done is planned anew at once when something was: that others are busy too is no reason to be slow.
        Ok(Passed::Worked)
    }

    fn with_events(&self, change: Change, now: Timestamp) -> crate::lifecycle::Ops {
        let mut ops = change.ops;
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        for event in &change.events {
            let id = uuid7(self.random.as_ref(), now);
            ops.extend(event_ops(&recent.note(id, event, "control", now)));
        }
        ops
    }

    /// An empty commit of this term.
    fn batch(&self) -> Batch {
        let mut batch = Batch::new();
        batch.guard(self.fence.guard().clone());
        batch
    }

    /// Whether it was committed. When it was not, what was planned after it must not be either: it builds on it.
    async fn commit(&self, mut batch: Batch, now: Timestamp, written: &mut Written) -> Result<bool, StoreError> {
        if batch.is_empty() {
            return Ok(true);
        }
        if !self.fence.stands(self.clock.boottime()) {
            return Ok(false);
        }
        batch.follow(&written.at);
        let keys: Vec<Key> = batch.keys().cloned().collect();
        let txn = batch.into_txn(TxnId(uuid7(self.random.as_ref(), now)));
        match commit_settled(self.store.as_ref(), txn).await? {
            CommitOutcome::Committed(revision) => {
                written.last = Some(revision);
                written.at.extend(keys.into_iter().map(|key| (key, revision)));
                Ok(true)
            }
            // Somebody was faster: the next plan sees what they did.
            CommitOutcome::GuardFailed { guard, .. } => {
                self.fence.refused_by(&guard);
                Ok(false)
            }
            CommitOutcome::Unknown(_) => Ok(false),
        }
    }
}

/// What one pass has committed so far. A plan may be larger than one commit and its later changes build on its earlier ones, for example on
/// what is reserved on a node: they must find exactly what this pass wrote.
#[derive(Default)]
struct Written {
    last: Option<Revision>,
    at: BTreeMap<Key, Revision>,
}

enum Passed {
    /// Nothing was to be done; how long it took to see that.
    Idle(Duration),
    Worked,
    Conflict,
}
