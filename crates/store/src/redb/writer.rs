//! The one thread that writes. It takes everything queued, applies it in order inside one redb transaction, makes that durable with one
//! fsync, and only then answers.
//!
//! After a failed batch nothing in memory is trusted: the file is opened again, as after a crash, and says what became of the batch.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use oblak_model::Revision;
use oblak_platform::clock::SharedClock;
use redb::Database;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Shared;
use super::file::{self, Loaded};
use super::gather::Gather;
pub use super::leases::Leases;
use super::queue::{Queue, Waited};
use super::tables::{self, OpenTables};
use crate::engine::{self, AgeMarks, Applied, HistoryLimits, OWN_TXN, TxnLog};
use crate::memory::lease_id;
use crate::{CommitOutcome, Lease, LeaseId, MAX_TXN_OPS, Result, StoreError, Txn, TxnId, WatchEvent, Write};

/// Most jobs in one batch. Bounds the time that the first of them waits.
const BATCH_JOBS: usize = 512;
/// Most bytes of transactions in one batch; dirty pages beyond redb's cache would be written twice.
const BATCH_BYTES: usize = 4 << 20;
/// Longest sleep while leases are alive: suspend does not count as sleep, but does count for leases.
const LEASE_CHECK: Duration = Duration::from_secs(5);

/// What the writer is asked to do, with where to answer.
pub enum Job {
    Commit(Txn, oneshot::Sender<Result<CommitOutcome>>),
    Outcome(TxnId, oneshot::Sender<Result<Option<Revision>>>),
    Grant(Duration, oneshot::Sender<Result<Lease>>),
    Renew(LeaseId, oneshot::Sender<Result<Lease>>),
    Revoke(LeaseId, oneshot::Sender<Result<()>>),
    Compact(Revision, oneshot::Sender<Result<()>>),
}

/// A job and its share of the queue, given back when the writer takes it.
pub struct Queued {
    pub job: Job,
    pub _permit: OwnedSemaphorePermit,
}

/// An answer that waits for the fsync.
enum Answer {
    Commit(oneshot::Sender<Result<CommitOutcome>>, TxnId, Result<CommitOutcome>),
    Outcome(oneshot::Sender<Result<Option<Revision>>>, Option<Revision>),
    Lease(oneshot::Sender<Result<Lease>>, Result<Lease>),
    Unit(oneshot::Sender<Result<()>>, Result<()>),
}

/// The revisions of a batch, with the transactions that made them.
type Events = Vec<(TxnId, WatchEvent)>;

/// What became of a batch that failed.
enum Fate {
    /// It is in the file after all.
    Kept,
    /// It is not; this is why.
    Lost(Box<dyn Fn() -> StoreError>),
    /// Nobody can tell at the moment.
    Unknown(Box<dyn Fn() -> StoreError>),
}

/// What went into the batch so far.
#[derive(Default)]
struct Taken {
    jobs: usize,
    bytes: usize,
}

impl Taken {
    fn is_full(&self) -> bool {
        self.jobs >= BATCH_JOBS || self.bytes >= BATCH_BYTES
    }
}

pub struct Writer {
    shared: Arc<Shared>,
    queue: Arc<Queue<Queued>>,
    clock: SharedClock,
    limits: HistoryLimits,
    head: Revision,
    floor: u64,
    wanted_floor: u64,
    gather: Gather,
    taken: Taken,
    txns: TxnLog,
    ages: AgeMarks,
    leases: Leases,
    lease_counter: u32,
    /// Who waits for the floor to reach a revision.
    compactions: Vec<(u64, oneshot::Sender<Result<()>>)>,
}

impl Writer {
    pub fn new(
        shared: Arc<Shared>,
        queue: Arc<Queue<Queued>>,
        clock: SharedClock,
        limits: HistoryLimits,
        loaded: Loaded,
    ) -> Self {
        let mut writer = Self {
            shared,
            queue,
            clock,
            limits,
            head: loaded.head,
            floor: loaded.floor,
            wanted_floor: 0,
            gather: Gather::default(),
            taken: Taken::default(),
            txns: TxnLog::default(),
            ages: AgeMarks::default(),
            leases: Leases::default(),
            lease_counter: 0,
            compactions: Vec::new(),
        };
        writer.adopt(loaded);
        writer
    }

    /// Believes the file.
    fn adopt(&mut self, loaded: Loaded) {
        self.head = loaded.head;
        self.floor = loaded.floor;
        self.lease_counter = loaded.lease_counter;
        self.txns = TxnLog::default();
        for (id, revision) in loaded.txns {
            self.txns.insert(id, revision);
        }
        // A restart must not end a lease whose holder was told that it lives, so every life starts anew.
        self.leases = Leases::default();
        self.leases.set_now(self.clock.boottime());
        for (id, ttl) in loaded.leases {
            self.leases.begin(LeaseId(id), Duration::from_millis(ttl));
        }
    }

    /// Works until every handle of the store is gone.
    pub fn run(mut self) {
        let _closing = Closing(Arc::clone(&self.shared), Arc::clone(&self.queue));
        while let Some(jobs) = self.take() {
            self.batch(jobs);
        }
    }

    /// The next batch; empty when only leases or compaction are due, none when the store is closed.
    fn take(&mut self) -> Option<VecDeque<Job>> {
        let wait = if self.compactions.is_empty() {
            self.leases.next().map(|next| next.min(LEASE_CHECK))
        } else {
            Some(Duration::ZERO)
        };
        match self.queue.wait(1, wait.map(|wait| Instant::now() + wait)) {
            Waited::Enough => self.gather.wait(&self.queue),
            Waited::Late => {}
            Waited::Closed => return None,
        }
        self.taken = Taken::default();
        let mut jobs = VecDeque::new();
        self.join(&mut jobs);
        Some(jobs)
    }

    fn next(&mut self, jobs: &mut VecDeque<Job>) -> Option<Job> {
        if jobs.is_empty() {
            self.join(jobs);
        }
        jobs.pop_front()
    }

    /// Takes what waits into the batch, as far as there is room.
    fn join(&mut self, jobs: &mut VecDeque<Job>) {
        let taken = &mut self.taken;
        if taken.is_full() {
            return;
        }
        self.queue.drain(|queued| {
            if let Job::Commit(txn, _) = &queued.job {
                taken.bytes += txn.bytes();
            }
            taken.jobs += 1;
            jobs.push_back(queued.job);
            !taken.is_full()
        });
    }

    fn batch(&mut self, mut jobs: VecDeque<Job>) {
        let started = Instant::now();
        self.leases.set_now(self.clock.boottime());
        let mut answers = Vec::with_capacity(jobs.len());
        let mut events = Vec::new();
        let shared = Arc::clone(&self.shared);
        let headers = shared.meter.header_writes.load(Ordering::Relaxed);
        if !shared.is_open() && !self.try_reopen() {
            let why = shared.why_closed();
            self.refuse(&mut jobs, &mut answers);
            return settle(
                answers,
                &Fate::Lost(Box::new(move || StoreError::Io {
                    action: "reopen",
                    path: shared.path.clone(),
                    source: std::io::Error::other(why.clone()),
                })),
            );
        }
        let done = shared.with_database(|database| self.execute(database, &mut jobs, &mut answers, &mut events));
        match done {
            Err(closed) => {
                self.refuse(&mut jobs, &mut answers);
                tracing::error!(error = %closed, "the database is not open");
                settle(answers, &Fate::Lost(Box::new(|| StoreError::Closed)));
            }
            Ok(Ok(())) => {
                let took = (!events.is_empty()).then(|| started.elapsed());
                self.publish(events);
                self.gather.learn(took, self.taken.jobs, self.queue.len(), BATCH_JOBS);
                settle(answers, &Fate::Kept);
                // Freeing what fell out of the ring can wait until the clients are at work again.
                shared.hub.evict();
            }
            Ok(Err(error)) => {
                self.refuse(&mut jobs, &mut answers);
                let untouched = shared.meter.header_writes.load(Ordering::Relaxed) == headers;
                let fate = self.recover(error, !events.is_empty(), untouched);
                settle(answers, &fate);
            }
        }
    }

    fn publish(&mut self, events: Events) {
        let stats = &self.shared.stats;
        stats.commits.fetch_add(events.len() as u64, Ordering::Relaxed);
        stats.leases.store(self.leases.len() as u64, Ordering::Relaxed);
        self.shared.hub.set_floor(self.floor);
        self.shared.hub.publish(events.into_iter().map(|(_, event)| event));
        let floor = self.floor;
        for (_, waiting) in self.compactions.extract_if(.., |(wanted, _)| *wanted <= floor) {
            let _gone = waiting.send(Ok(()));
        }
    }

    /// Runs the jobs in one redb transaction and makes it durable if it changed anything.
    fn execute(
        &mut self,
        database: &Database,
        jobs: &mut VecDeque<Job>,
        answers: &mut Vec<Answer>,
        events: &mut Events,
    ) -> Result<(), redb::Error> {
        if jobs.iter().all(Job::is_read) && self.leases.due().is_none() && self.compactions.is_empty() {
            while let Some(job) = jobs.pop_front() {
                answers.push(self.read(job));
            }
            return Ok(());
        }
        let txn = database.begin_write()?;
        let mut dirty = false;
        while let Some(id) = self.leases.due() {
            dirty |= self.end_lease(&txn, id, events)?;
        }
        // Tables are opened once for a run of commits; the rarer jobs open what they need by themselves. Who comes while the batch is
        // applied need not wait for the next one.
        while let Some(job) = self.next(jobs) {
            match job {
                Job::Commit(first, reply) => {
                    jobs.push_front(Job::Commit(first, reply));
                    dirty |= self.commits(&txn, jobs, answers, events)?;
                }
                Job::Grant(ttl, reply) => {
                    self.lease_counter += 1;
                    let id = lease_id(self.head.incarnation, self.lease_counter);
                    let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1);
                    answers.push(Answer::Lease(reply, Ok(Lease { id, ttl })));
                    tables::store_lease(&txn, id, ttl_ms, self.lease_counter)?;
                    self.leases.begin(id, ttl);
                    dirty = true;
                }
                Job::Revoke(id, reply) => {
                    answers.push(Answer::Unit(reply, Ok(())));
                    dirty |= self.end_lease(&txn, id, events)?;
                }
                Job::Compact(keep_from, reply) => match crate::memory::compact_floor(keep_from, self.head) {
                    Ok(floor) => {
                        self.wanted_floor = self.wanted_floor.max(floor);
                        self.compactions.push((floor, reply));
                    }
                    Err(error) => answers.push(Answer::Unit(reply, Err(error))),
                },
                job @ (Job::Outcome(..) | Job::Renew(..)) => answers.push(self.read(job)),
            }
        }
        tables::store_history(&txn, events)?;
        dirty |= self.trim(&txn)?;
        if !dirty {
            return Ok(txn.abort()?);
        }
        txn.commit()?;
        self.shared.stats.batches.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn read(&mut self, job: Job) -> Answer {
        match job {
            Job::Outcome(id, reply) => Answer::Outcome(reply, self.txns.get(id)),
            Job::Renew(id, reply) => Answer::Lease(reply, self.leases.renew(id).ok_or(StoreError::LeaseGone(id))),
            Job::Commit(txn, reply) => Answer::Commit(reply, txn.id, Err(StoreError::Closed)),
            Job::Grant(_, reply) => Answer::Lease(reply, Err(StoreError::Closed)),
            Job::Revoke(_, reply) | Job::Compact(_, reply) => Answer::Unit(reply, Err(StoreError::Closed)),
        }
    }

    /// All commits at the front of the queue.
    fn commits(
        &mut self,
        txn: &redb::WriteTransaction,
        jobs: &mut VecDeque<Job>,
        answers: &mut Vec<Answer>,
        events: &mut Events,
    ) -> Result<bool, redb::Error> {
        let before = self.head;
        let mut open = OpenTables::open(txn, &self.leases)?;
        while let Some(job) = jobs.pop_front() {
            let (wanted, reply) = match job {
                Job::Commit(wanted, reply) => (wanted, reply),
                other => {
                    jobs.push_front(other);
                    break;
                }
            };
            if let Some(revision) = self.txns.get(wanted.id) {
                answers.push(Answer::Commit(reply, wanted.id, Ok(CommitOutcome::Committed(revision))));
                continue;
            }
            let next = Revision::new(self.head.incarnation, self.head.n + 1);
            // Registered before it is tried, so that a failure of the batch finds it and answers.
            answers.push(Answer::Commit(reply, wanted.id, Ok(CommitOutcome::Unknown(wanted.id))));
            let outcome = match engine::apply(&mut open, &wanted, next)? {
                Applied::Changed(event) => {
                    self.head = next;
                    self.txns.insert(wanted.id, next);
                    events.push((wanted.id, event));
                    Ok(CommitOutcome::Committed(next))
                }
                Applied::Unchanged => Ok(CommitOutcome::Committed(self.head)),
                Applied::GuardFailed(outcome) => Ok(outcome),
                Applied::Refused(error) => Err(error),
            };
            if let Some(Answer::Commit(_, _, answer)) = answers.last_mut() {
                *answer = outcome;
            }
        }
        Ok(self.head != before)
    }

    /// Deletes the keys of a lease, then the lease. False when there is no such lease.
    fn end_lease(
        &mut self,
        txn: &redb::WriteTransaction,
        id: LeaseId,
        events: &mut Events,
    ) -> Result<bool, redb::Error> {
        if !self.leases.end(id) {
            return Ok(false);
        }
        let keys = tables::lease_keys(txn, id)?;
        let mut open = OpenTables::open(txn, &self.leases)?;
        for keys in keys.chunks(MAX_TXN_OPS) {
            let writes = keys.iter().map(|key| Write::Delete { key: key.clone() }).collect();
            let next = Revision::new(self.head.incarnation, self.head.n + 1);
            if let Applied::Changed(event) =
                engine::apply(&mut open, &Txn { id: OWN_TXN, guards: Vec::new(), writes }, next)?
            {
                self.head = next;
                events.push((OWN_TXN, event));
            }
        }
        drop(open);
        tables::remove_lease(txn, id)?;
        Ok(true)
    }

    fn trim(&mut self, txn: &redb::WriteTransaction) -> Result<bool, redb::Error> {
        let aged = self.ages.note(self.clock.boottime(), self.head.n, self.limits.age);
        self.wanted_floor = self.wanted_floor.max(engine::floor_wanted(self.head.n, self.floor, self.limits, aged));
        if self.wanted_floor <= self.floor {
            return Ok(false);
        }
        self.floor = tables::trim(txn, self.floor, self.wanted_floor, self.head.n)?;
        Ok(true)
    }

    /// Finds out what the file holds after a failed batch. `untouched`: the batch failed before it could have been committed.
    fn recover(&mut self, error: redb::Error, changed: bool, untouched: bool) -> Fate {
        let target = self.head;
        let shared = Arc::clone(&self.shared);
        tracing::error!(%error, path = %shared.path.display(), "a batch of commits failed; opening the database again");
        let text = error.to_string();
        let cause = file::explain("write", &shared.path, error);
        let full = matches!(cause, StoreError::DiskFull { .. });
        shared.close(&text);
        let path = shared.path.clone();
        let why = move || {
            if full {
                StoreError::DiskFull { path: path.clone() }
            } else {
                StoreError::Io { action: "write", path: path.clone(), source: std::io::Error::other(text.clone()) }
            }
        };
        match self.try_reopen() {
            false if untouched => return Fate::Lost(Box::new(why)),
            false => return Fate::Unknown(Box::new(why)),
            true => {}
        }
        if changed && self.head >= target { Fate::Kept } else { Fate::Lost(Box::new(why)) }
    }

    /// Opens the file again after a failure; never after a failed fsync, whose damage only an operator can judge.
    fn try_reopen(&mut self) -> bool {
        if self.shared.meter.sync_failed.load(Ordering::Relaxed) {
            self.shared.hub.close();
            return false;
        }
        match file::open(&self.shared.path, self.shared.cache_bytes, &self.shared.meter) {
            Ok((database, loaded)) => {
                self.adopt(loaded);
                self.shared.reopened(database);
                self.shared.hub.reset(self.head, self.floor);
                true
            }
            Err(error) => {
                tracing::error!(%error, "cannot open the database again");
                self.shared.close(&error.to_string());
                false
            }
        }
    }

    /// Turns jobs that were not started into answers.
    fn refuse(&mut self, jobs: &mut VecDeque<Job>, answers: &mut Vec<Answer>) {
        answers.extend(self.compactions.drain(..).map(|(_, reply)| Answer::Unit(reply, Err(StoreError::Closed))));
        while let Some(job) = jobs.pop_front() {
            answers.push(match job {
                Job::Commit(txn, reply) => Answer::Commit(reply, txn.id, Err(StoreError::Closed)),
                other => self.read(other),
            });
        }
    }
}

impl Job {
    fn is_read(&self) -> bool {
        matches!(self, Job::Outcome(..) | Job::Renew(..))
    }
}

/// Sends the answers. An asker that went away is no concern of ours.
fn settle(answers: Vec<Answer>, fate: &Fate) {
    for answer in answers {
        match answer {
            Answer::Commit(to, id, outcome) => drop(to.send(match (fate, outcome) {
                (Fate::Kept, outcome) => outcome,
                // It was not even started.
                (Fate::Unknown(why), Err(_)) | (Fate::Lost(why), _) => Err(why()),
                (Fate::Unknown(_), Ok(_)) => Ok(CommitOutcome::Unknown(id)),
            })),
            Answer::Outcome(to, found) => drop(to.send(fate.judge(Ok(found)))),
            Answer::Lease(to, lease) => drop(to.send(fate.judge(lease))),
            Answer::Unit(to, unit) => drop(to.send(fate.judge(unit))),
        }
    }
}

impl Fate {
    fn judge<T>(&self, answer: Result<T>) -> Result<T> {
        match self {
            Fate::Kept => answer,
            Fate::Lost(why) | Fate::Unknown(why) => Err(why()),
        }
    }
}

/// Closes the store when the thread ends, by panic too, so that nobody waits for it.
struct Closing(Arc<Shared>, Arc<Queue<Queued>>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close("the store was closed");
        self.0.hub.close();
        self.1.close();
        // Dropping a job tells its caller.
        self.1.drain(|_| true);
    }
}
