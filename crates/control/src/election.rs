//! Which server leads: the one whose lease holds the leader key.
//!
//! ```text
//!            grant lease, register            nobody leads: one commit
//!  (start) ───────────────────► following ───────────────────────────► leading
//!     ▲                             ▲        epoch += 1                   │
//!     │                             └──── the key is another's ───────────┤
//!     └──────────────────────── the lease has ended ──────────────────────┘
//! ```
//!
//! One lease stands for the server: the key that says where it serves and, when it leads, the leader key are attached to it, so both go with
//! it. Whoever leads puts the revision of its leader key as a guard into every commit ([`Fence`]): a leader that was frozen, cut off or
//! replaced commits nothing any more, whatever it still believes. That it also stops planning when its time is over only saves work.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use oblak_model::{ClusterLeader, ClusterServer, Revision};
use oblak_platform::clock::SharedClock;
use oblak_platform::random::{SharedRandom, uuid7};
use oblak_platform::task;
use oblak_store::objects::{decode_value, election_key, encode_value, leader_key, server_key};
use oblak_store::{
    CommitOutcome, Entry, Guard, Key, Lease, LeaseId, Prefix, SharedStore, StoreError, Txn, TxnId, Write,
    commit_settled,
};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// A server that says nothing for so long is dead to the others.
pub const LEASE: Duration = Duration::from_secs(5);
/// Renewed this often: three attempts may fail before the lease ends.
const RENEW: Duration = Duration::from_millis(1200);
/// A leader stops so long before its lease may end.
const MARGIN: Duration = Duration::from_millis(500);
/// A follower looks at least this often; usually the end of the leader key wakes it at once.
const LOOK: Duration = Duration::from_secs(2);
/// Pauses after the store has failed.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(2);
/// How long an orderly end waits for the store.
const FAREWELL: Duration = Duration::from_secs(2);

/// The server that takes part.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// What the others are told of it.
    pub server: ClusterServer,
    /// Nobody else can have the store open, so every leader of before is dead and need not be waited for.
    pub alone: bool,
}

/// Until when a lease lives at least, by the clock of this machine (boot time in microseconds, so that sleep counts too).
#[derive(Debug)]
struct Deadline(AtomicU64);

impl Deadline {
    /// `asked` is the time *before* the grant or renewal was sent: the store began to count later.
    fn new(asked: Duration) -> Self {
        Self(AtomicU64::new(Self::micros(asked)))
    }
    fn renewed(&self, asked: Duration) {
        self.0.store(Self::micros(asked), Ordering::Relaxed);
    }
    fn micros(asked: Duration) -> u64 {
        u64::try_from((asked + LEASE - MARGIN).as_micros()).unwrap_or(u64::MAX)
    }
    fn is_over(&self, now: Duration) -> bool {
        now.as_micros() >= u128::from(self.0.load(Ordering::Relaxed))
    }
}

/// What a leader may do, and for how long.
#[derive(Clone, Debug)]
pub struct Fence {
    guard: Guard,
    /// Number of this term.
    pub epoch: u64,
    deadline: Arc<Deadline>,
    /// Cancelled when the term is over.
    pub over: CancellationToken,
}

impl Fence {
    /// Belongs into every commit of the term.
    #[must_use]
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    /// Whether the leader still may plan. Ends the term when its time is over.
    #[must_use]
    pub fn stands(&self, now: Duration) -> bool {
        if self.deadline.is_over(now) {
            self.over.cancel();
        }
        !self.over.is_cancelled()
    }

    /// Notes that a commit was refused by this guard: somebody else leads.
    pub fn refused_by(&self, guard: &Guard) {
        if *guard == self.guard {
            tracing::warn!(epoch = self.epoch, "another server leads now; what was planned here is not committed");
            self.over.cancel();
        }
    }
}

/// Takes part in elections for one server.
pub struct Election {
    store: SharedStore,
    clock: SharedClock,
    random: SharedRandom,
    candidate: Candidate,
    cancel: CancellationToken,
    /// Leaders that this process may replace at once: those of its own past.
    inherits: bool,
}

/// A lease with the task that keeps it.
struct Membership {
    lease: LeaseId,
    deadline: Arc<Deadline>,
    /// Cancelled when the lease has ended.
    ended: CancellationToken,
}

impl Election {
    /// Takes part until cancelled.
    #[must_use]
    pub fn new(
        store: SharedStore,
        clock: SharedClock,
        random: SharedRandom,
        candidate: Candidate,
        cancel: CancellationToken,
    ) -> Self {
        Self { store, clock, random, candidate, cancel, inherits: true }
    }

    /// Registers, campaigns and, for each term, runs `lead` until the term is over. Ends when cancelled: whoever waits may lead at once.
    pub async fn run<F: Future<Output = ()> + Send>(mut self, lead: impl Fn(Fence) -> F + Send + Sync) {
        let mut pause = FIRST_PAUSE;
        while !self.cancel.is_cancelled() {
            let begun = self.clock.boottime();
            if let Err(error) = self.member(&lead).await {
                tracing::warn!(%error, "the store does not answer as it should; registering again");
            }
            // Only failures that follow each other closely make it slower.
            pause = if self.clock.boottime().saturating_sub(begun) > LEASE { FIRST_PAUSE } else { pause };
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// The life of one lease.
    async fn member<F: Future<Output = ()> + Send>(
        &mut self,
        lead: &(impl Fn(Fence) -> F + Send + Sync),
    ) -> Result<(), StoreError> {
        let asked = self.clock.boottime();
        let Lease { id, .. } = self.store.grant(LEASE).await?;
        let membership =
            Membership { lease: id, deadline: Arc::new(Deadline::new(asked)), ended: CancellationToken::new() };
        // A task of its own: a long plan must not delay a renewal. It ends with this future.
        let keeper = AbortOnDropHandle::new(task::spawn(keep(
            self.store.clone(),
            self.clock.clone(),
            id,
            membership.deadline.clone(),
            membership.ended.clone(),
        )));
        let (cancel, ended) = (self.cancel.clone(), membership.ended.clone());
        let outcome = tokio::select! {
            biased;
            () = cancel.cancelled() => Ok(()),
            () = ended.cancelled() => Ok(()),
            outcome = self.take_part(&membership, lead) => outcome,
        };
        drop(keeper);
        membership.ended.cancel();
        // What is attached to it goes at once: an orderly end makes nobody wait.
        let _ = tokio::time::timeout(FAREWELL, self.store.revoke(id)).await;
        outcome
    }

    async fn take_part<F: Future<Output = ()> + Send>(
        &mut self,
        membership: &Membership,
        lead: &(impl Fn(Fence) -> F + Send + Sync),
    ) -> Result<(), StoreError> {
        let server = &self.candidate.server;
        let key = server_key(server.id);
        let txn = self.txn().guard(Guard::LeaseAlive(membership.lease));
        let write = Write::Put { key, value: encode_value(server), lease: Some(membership.lease) };
        if self.commit(txn.write(write)).await?.is_none() {
            return Ok(());
        }
        loop {
            let (leader, from) = self.leader().await?;
            if let Some(leader) = &leader
                && !self.may_replace(leader)
            {
                self.until_changed(from).await;
                continue;
            }
            let Some((revision, epoch)) = self.campaign(membership, leader.as_ref()).await? else { continue };
            self.inherits = false;
            let fence = Fence {
                guard: Guard::Revision(leader_key(), revision),
                epoch,
                deadline: membership.deadline.clone(),
                over: membership.ended.child_token(),
            };
            tracing::info!(epoch, "this server leads");
            let over = fence.over.clone();
            tokio::select! {
                biased;
                () = over.cancelled() => {}
                () = lead(fence) => {}
            }
            tracing::info!(epoch, "this server does not lead any more");
        }
    }

    /// The leader key, and a revision from which on its changes can be watched.
    async fn leader(&self) -> Result<(Option<Entry>, Revision), StoreError> {
        let from = self.store.revision().await?;
        Ok((self.store.get(&leader_key()).await?, from))
    }

    /// A leader of this data directory, or of a store that only we have open, was a process that is dead: its lock is ours now.
    fn may_replace(&self, leader: &Entry) -> bool {
        let of_ours = |leader: ClusterLeader| leader.server == self.candidate.server.id;
        self.inherits && (self.candidate.alone || decode_value(&leader.key, &leader.value).is_ok_and(of_ours))
    }

    /// Revision of the leader key and epoch, when this server was elected.
    async fn campaign(
        &self,
        membership: &Membership,
        leader: Option<&Entry>,
    ) -> Result<Option<(Revision, u64)>, StoreError> {
        let last = self.store.get(&election_key()).await?;
        let epoch = match &last {
            Some(entry) => decode_value::<u64>(&entry.key, &entry.value)? + 1,
            None => 1,
        };
        let at = |key: Key, entry: Option<&Entry>| match entry {
            Some(entry) => Guard::Revision(key, entry.revision),
            None => Guard::Absent(key),
        };
        let value = ClusterLeader { server: self.candidate.server.id, epoch, since: self.clock.now() };
        let txn = self
            .txn()
            .guard(at(leader_key(), leader))
            .guard(at(election_key(), last.as_ref()))
            .guard(Guard::LeaseAlive(membership.lease))
            .write(Write::Put { key: leader_key(), value: encode_value(&value), lease: Some(membership.lease) })
            .put(election_key(), encode_value(&epoch));
        Ok(self.commit(txn).await?.map(|revision| (revision, epoch)))
    }

    fn txn(&self) -> Txn {
        Txn::new(TxnId(uuid7(self.random.as_ref(), self.clock.now())))
    }

    /// The revision; none when a guard did not hold.
    async fn commit(&self, txn: Txn) -> Result<Option<Revision>, StoreError> {
        match commit_settled(self.store.as_ref(), txn).await? {
            CommitOutcome::Committed(revision) => Ok(Some(revision)),
            CommitOutcome::GuardFailed { .. } => Ok(None),
            CommitOutcome::Unknown(id) => self.store.outcome(id).await,
        }
    }

    /// Returns when the leader key has changed, or after a while.
    async fn until_changed(&self, from: Revision) {
        let changed = async {
            let Ok(prefix) = Prefix::new("/leader") else { return };
            // What cannot be watched is looked at again after a while.
            let Ok(mut watch) = self.store.watch(&prefix, from).await else { return std::future::pending().await };
            while let Some(Ok(item)) = watch.next().await {
                if matches!(item, oblak_store::WatchItem::Event(_)) {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(LOOK, changed).await;
    }
}

/// Renews a lease until it cannot be renewed any more.
async fn keep(
    store: SharedStore,
    clock: SharedClock,
    lease: LeaseId,
    deadline: Arc<Deadline>,
    ended: CancellationToken,
) {
    loop {
        tokio::time::sleep(RENEW).await;
        let asked = clock.boottime();
        match tokio::time::timeout(RENEW, store.renew(lease)).await {
            Ok(Ok(_)) => deadline.renewed(asked),
            Ok(Err(StoreError::LeaseGone(_))) => {
                tracing::warn!("the lease of this server has ended; registering again");
                return ended.cancel();
            }
            Ok(Err(error)) => tracing::warn!(%error, "the lease of this server could not be renewed; trying again"),
            Err(_) => tracing::warn!("the store does not answer; the lease of this server could not be renewed"),
        }
        if deadline.is_over(clock.boottime()) {
            tracing::warn!("the lease of this server has not been renewed in time");
            return ended.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_ends_before_its_lease_does() {
        let at = Duration::from_secs(100);
        let fence = Fence {
            guard: Guard::Revision(leader_key(), Revision::new(1, 7)),
            epoch: 3,
            deadline: Arc::new(Deadline::new(at)),
            over: CancellationToken::new(),
        };
        assert!(fence.stands(at + LEASE - MARGIN - Duration::from_millis(1)));
        fence.deadline.renewed(at + Duration::from_secs(1));
        assert!(fence.stands(at + LEASE));
        fence.refused_by(&Guard::Absent(leader_key()));
        assert!(fence.stands(at + LEASE));
        assert!(!fence.stands(at + LEASE + Duration::from_secs(1) - MARGIN));
        fence.deadline.renewed(at + LEASE * 10);
        assert!(!fence.stands(at + LEASE), "what is over stays over");
    }
}
