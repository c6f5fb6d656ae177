//! What runs beside the requests: following the log, cutting it, and dropping records of transactions that nobody can ask for any more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, GetOptions, Txn as EtcdTxn, TxnOp};
use oblak_platform::clock::SharedClock;
use oblak_store::{HistoryLimits, TXN_IDS_KEPT};

use crate::cluster::Cluster;
use crate::failure::{Failure, Kind};
use crate::keys::Space;
use crate::meta::{self, Meta};
use crate::store::Core;
use crate::tail::{Ended, Tail};

/// How long watchers may stay behind a revision that somebody asked for before it is assumed to be somebody else's.
/// Longer than the log lags behind on a busy machine: a needless tick takes a revision.
const NUDGE_AFTER: Duration = Duration::from_millis(1500);
const RETRY: Duration = Duration::from_millis(100);
/// How often the age of the log is looked at.
const COMPACT_EVERY: Duration = Duration::from_secs(30);
/// Marks of age remembered; a revision is kept at most one part in this many longer than asked.
const MARKS: u32 = 32;
/// How often it is looked whether there are many records.
const FORGET_EVERY: Duration = Duration::from_secs(20);
/// Own commits after which it is worth looking.
const FORGET_AFTER: u64 = TXN_IDS_KEPT as u64 / 4;
/// Deletions in one transaction, each with a condition: etcd allows 128.
const FORGET_AT_ONCE: usize = 120;

/// Writes the tick and answers its revision. Moves the log on to where etcd is, whoever moved that.
pub async fn tick(cluster: &Cluster, space: &Space) -> Result<u64, Failure> {
    let key = space.tick();
    let answer = cluster
        .call(|mut client| {
            let key = key.clone();
            async move { client.put(key, "", None).await }
        })
        .await?;
    cluster.note(answer.header())
}

/// Fills the hub from the log, for ever.
pub async fn follow(core: Arc<Core>, mut at: u64) {
    let mut tail = Tail::new(Arc::clone(&core), at);
    loop {
        match tail.next().await {
            Ok(steps) => {
                at = steps.last().map_or(at, |step| step.n);
                core.hub.publish(steps);
            }
            Err(Ended::Compacted(floor)) => {
                tracing::warn!(
                    at,
                    floor,
                    "etcd was out of reach for so long that a part of its log is gone; watchers start over"
                );
                core.hub.raise_floor(floor);
                match tick(&core.cluster, &core.space).await {
                    Ok(now) => {
                        at = now;
                        core.hub.reset(core.at(now));
                        tail = Tail::new(Arc::clone(&core), now);
                    }
                    Err(failure) => pause_after(&failure).await,
                }
            }
            Err(Ended::Failed(failure)) => pause_after(&failure).await,
        }
    }
}

async fn pause_after(failure: &Failure) {
    if failure.is_transient() {
        tracing::info!(failure = failure.detail, "the watch on etcd broke; it goes on where it stopped");
        tokio::time::sleep(RETRY).await;
    } else {
        tracing::error!(failure = failure.detail, "etcd refuses the watch");
        tokio::time::sleep(RETRY * 50).await;
    }
}

/// Where others write to etcd too, its revision can be one that is not in our log. A reader that waits for it gets a tick.
pub async fn nudge(core: Arc<Core>) {
    let mut wanted = core.hub.wanted();
    while wanted.changed().await.is_ok() {
        let n = *wanted.borrow_and_update();
        let mut changes = core.hub.changes();
        let reached = async { while core.hub.head() < n && changes.changed().await.is_ok() {} };
        if tokio::time::timeout(NUDGE_AFTER, reached).await.is_err()
            && let Err(failure) = tick(&core.cluster, &core.space).await
        {
            tracing::debug!(failure = failure.detail, "cannot move the log on");
        }
    }
}

/// Forgets what was superseded before `n`.
pub async fn compact_to(core: &Core, n: u64) -> Result<(), Failure> {
    if n > 0 && n > core.hub.floor() {
        let at = i64::try_from(n).unwrap_or(i64::MAX);
        let answer = core.cluster.call(|mut client| async move { client.compact(at, None).await }).await?;
        core.cluster.note(answer.header())?;
        core.hub.raise_floor(n);
    }
    Ok(())
}

/// Keeps the log within its limits, for ever. Several servers may do so at the same time.
pub async fn compact(core: Arc<Core>, limits: HistoryLimits, clock: SharedClock) {
    let mut marks: VecDeque<(Duration, u64)> = VecDeque::new();
    let every = COMPACT_EVERY.min(limits.age / MARKS).max(Duration::from_millis(100));
    loop {
        tokio::time::sleep(every).await;
        let (now, head) = (clock.boottime(), core.hub.head());
        if marks.back().is_none_or(|(last, _)| now >= *last + limits.age / MARKS) {
            marks.push_back((now, head));
        }
        let mut wanted = head.saturating_sub(limits.revisions);
        while let Some((when, n)) = marks.front()
            && now.saturating_sub(*when) > limits.age
        {
            wanted = wanted.max(*n);
            marks.pop_front();
        }
        match compact_to(&core, wanted.min(head)).await {
            Err(failure) if failure.kind == Kind::Compacted => core.hub.raise_floor(wanted.min(head)),
            Err(failure) => tracing::warn!(failure = failure.detail, "cannot compact etcd"),
            Ok(()) => {}
        }
    }
}

/// Drops records of transactions, for ever: at least the newest [`TXN_IDS_KEPT`] stay.
pub async fn forget(core: Arc<Core>) {
    let mut looked = 0;
    loop {
        tokio::time::sleep(FORGET_EVERY).await;
        if core.commits().saturating_sub(looked) < FORGET_AFTER {
            continue;
        }
        looked = core.commits();
        match forget_now(&core, TXN_IDS_KEPT).await {
            Ok(0) => {}
            Ok(dropped) => tracing::debug!(dropped, "dropped old records of transactions"),
            Err(failure) => tracing::warn!(failure = failure.detail, "cannot drop old records of transactions"),
        }
    }
}

/// Begins a new window when the current one has at least `keep` records, and drops the windows before the current one.
pub async fn forget_now(core: &Core, keep: usize) -> Result<usize, Failure> {
    let known = core.known();
    if records(core, |options| options.with_min_mod_revision(known.meta.since.cast_signed() + 1)).await?.len() < keep {
        return Ok(0);
    }
    // From here on no request of earlier windows can be carried out, so their records serve nobody.
    let head = records_head(core).await?;
    let next = Meta { window: known.meta.window + 1, since: head, ..known.meta.clone() };
    let now = meta::replace(&core.cluster, &core.space, known.modified, &next).await?;
    let won = now.meta == next;
    core.adopt(now);
    if !won {
        return Ok(0);
    }
    let bound = known.meta.since.cast_signed();
    let old =
        if bound == 0 { Vec::new() } else { records(core, |options| options.with_max_mod_revision(bound)).await? };
    for keys in old.chunks(FORGET_AT_ONCE) {
        // A void record may have been made a commit since.
        let unchanged = |key: &Vec<u8>| Compare::mod_revision(key.clone(), CompareOp::Less, bound + 1);
        let txn = EtcdTxn::new()
            .when(keys.iter().map(unchanged).collect::<Vec<_>>())
            .and_then(keys.iter().map(|key| TxnOp::delete(key.clone(), None)).collect::<Vec<_>>());
        let answer = core
            .cluster
            .call(|mut client| {
                let txn = txn.clone();
                async move { client.txn(txn).await }
            })
            .await?;
        core.cluster.note(answer.header())?;
    }
    Ok(old.len())
}

async fn records_head(core: &Core) -> Result<u64, Failure> {
    let key = core.space.meta();
    let answer = core
        .cluster
        .call(|mut client| {
            let key = key.clone();
            async move { client.get(key, Some(GetOptions::new().with_count_only())).await }
        })
        .await?;
    core.cluster.note(answer.header())
}

/// Keys of records that `which` lets through.
async fn records(core: &Core, which: impl Fn(GetOptions) -> GetOptions) -> Result<Vec<Vec<u8>>, Failure> {
    let (start, end) = core.space.txns();
    let options = which(GetOptions::new().with_range(end).with_keys_only());
    let mut answer = core
        .cluster
        .call(|client| {
            let (start, options) = (start.clone(), options.clone());
            async move { client.kv_client().max_decoding_message_size(RECORDS_BYTES).get(start, Some(options)).await }
        })
        .await?;
    core.cluster.note(answer.header())?;
    Ok(answer.take_kvs().into_iter().map(|kv| kv.into_key_value().0).collect())
}

/// Largest answer with records: a million of them.
const RECORDS_BYTES: usize = 128 << 20;
