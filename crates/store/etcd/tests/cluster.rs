//! The store on a real cluster of three, while its servers are killed, frozen and cut off.
#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use oblak_store::conformance::Subject;
use oblak_store::{
    CommitOutcome, Guard, Key, Prefix, Revision, SharedStore, Store, StoreError, Txn, WatchError, WatchItem, list_all,
};
use oblak_store_etcd::testing::Members;
use oblak_store_etcd::{EtcdOptions, EtcdStore};

/// Longest wait for anything after a fault.
const DEADLINE: Duration = Duration::from_secs(40);

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

async fn open(members: &Members, first: usize, prefix: &str) -> SharedStore {
    // Less patient than usual, so that outcomes do stay unknown.
    let patience = Duration::from_secs(4);
    let options = EtcdOptions { prefix: prefix.into(), patience, ..EtcdOptions::new(members.urls(first)) };
    Arc::new(EtcdStore::open(options).await.unwrap())
}

#[test]
fn the_contract_holds_on_three_members() {
    Members::with(3, async |members| {
        let members = &members;
        oblak_store::conformance_tests!(together: async |case: &str| {
            // Leases that a case leaves behind would end, and take a revision, during a later one.
            let mut raw = etcd_client::Client::connect(members.urls(0), None).await.unwrap();
            for lease in raw.leases().await.unwrap().leases() {
                // It may end by itself in between.
                let _ = raw.lease_revoke(lease.id()).await;
            }
            let store = open(members, case.len(), &format!("{case}/")).await;
            Subject { store, ttl: Duration::from_secs(2), keep: Box::new(()) }
        });
    });
}

/// What the writers know for certain.
#[derive(Default)]
struct Ledger {
    /// Keys with the revision at which their creation was acknowledged.
    created: BTreeMap<Key, Revision>,
    /// Keys of commits that a guard refused, or of which the outcome is that they did not happen.
    refused: BTreeSet<Key>,
    increments: u64,
    unknown: u64,
    errors: u64,
}

/// Commits, and finds out what became of it. None: nothing did, and an error said so.
async fn settled(store: &dyn Store, txn: Txn, ledger: &mut Ledger) -> Option<CommitOutcome> {
    let id = txn.id;
    match store.commit(txn).await {
        Ok(CommitOutcome::Unknown(_)) => ledger.unknown += 1,
        Ok(known) => return Some(known),
        Err(error) => {
            assert!(error.is_retryable(), "{error}");
            ledger.errors += 1;
            return None;
        }
    }
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < DEADLINE, "the outcome of {id} stays unknown");
        match store.outcome(id).await {
            Ok(Some(revision)) => return Some(CommitOutcome::Committed(revision)),
            Ok(None) => return None,
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
    }
}

/// Creates keys, adds to a counter that all share, and tries what must be refused, until told to stop.
async fn write(store: SharedStore, name: usize, stop: Arc<AtomicBool>, done: Arc<AtomicU64>) -> Ledger {
    let mut ledger = Ledger::default();
    let counter = key("/storm/counter");
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let mine = key(&format!("/storm/{name}/{n}"));
        match settled(&*store, Txn::random().create(mine.clone(), format!("{n}")), &mut ledger).await {
            Some(CommitOutcome::Committed(revision)) => {
                ledger.created.insert(mine.clone(), revision);
                done.fetch_add(1, Ordering::Relaxed);
                let forbidden = key(&format!("/forbidden/{name}/{n}"));
                let again = Txn::random().create(mine, "again").put(forbidden.clone(), "x");
                if let Some(outcome) = settled(&*store, again, &mut ledger).await {
                    let actual = Some(revision);
                    assert!(
                        matches!(outcome, CommitOutcome::GuardFailed { actual: a, .. } if a == actual),
                        "{outcome:?}"
                    );
                }
                ledger.refused.insert(forbidden);
            }
            Some(other) => panic!("{mine} is ours alone, and yet: {other:?}"),
            None => drop(ledger.refused.insert(mine)),
        }
        let Ok(Some(entry)) = store.get(&counter).await else { continue };
        let sum = std::str::from_utf8(&entry.value).unwrap().parse::<u64>().unwrap() + 1;
        let txn = Txn::random().replace(counter.clone(), entry.revision, sum.to_string());
        if let Some(CommitOutcome::Committed(_)) = settled(&*store, txn, &mut ledger).await {
            ledger.increments += 1;
        }
    }
    ledger
}

/// Follows everything below `/storm` from `from` until `last`, checking that each event connects to what was known of its key. Drops and
/// resumes the watch after every `resume` events, and when the store fails.
async fn follow(
    store: SharedStore,
    from: Revision,
    last: Arc<AtomicU64>,
    resume: usize,
) -> (BTreeMap<Key, Revision>, usize) {
    let below = Prefix::new("/storm").unwrap();
    let (mut state, mut at, mut events): (BTreeMap<Key, Revision>, _, _) = (BTreeMap::new(), from, 0);
    'watch: loop {
        let mut stream = match store.watch(&below, at).await {
            Ok(stream) => stream,
            Err(WatchError::Compacted { oldest }) => panic!("compacted to {oldest}, though nobody did"),
            Err(WatchError::Store(_)) => continue,
        };
        let mut got = 0;
        loop {
            let end = last.load(Ordering::Relaxed);
            if end > 0 && at.n >= end {
                return (state, events);
            }
            let item = match tokio::time::timeout(Duration::from_millis(200), stream.next()).await {
                Ok(Some(Ok(item))) => item,
                Ok(Some(Err(WatchError::Compacted { oldest }))) => panic!("compacted to {oldest}, though nobody did"),
                Ok(_) => continue 'watch,
                Err(_) => continue,
            };
            assert!(item.revision() >= at, "{item:?} after {at}");
            let WatchItem::Event(event) = item else {
                at = item.revision();
                continue;
            };
            assert!(event.revision > at, "{event:?} again after {at}");
            at = event.revision;
            for change in event.changes {
                assert_eq!(state.insert(change.key.clone(), at), change.prev, "an event of {} is missing", change.key);
            }
            events += 1;
            got += 1;
            if got == resume {
                continue 'watch;
            }
        }
    }
}

/// Waits until commits succeed again.
async fn until_writing(done: &AtomicU64, what: &str) {
    let (before, start) = (done.load(Ordering::Relaxed), Instant::now());
    while done.load(Ordering::Relaxed) < before + 40 {
        assert!(start.elapsed() < DEADLINE, "no commits after: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eprintln!("{what}: 40 creates later after {:?}", start.elapsed());
}

async fn leader(members: &Members) -> usize {
    let start = Instant::now();
    loop {
        if let Some(leader) = members.leader().await {
            return leader;
        }
        assert!(start.elapsed() < DEADLINE, "the cluster elects nobody");
    }
}

/// The faults, one after the other; after each the writers must get on while it lasts, and again when it is over.
async fn torment(members: &mut Members, done: &AtomicU64) {
    until_writing(done, "nothing").await;
    let victim = leader(members).await;
    members.kill(victim);
    until_writing(done, "the leader was killed").await;
    members.restart(victim);
    until_writing(done, "it came back").await;
    let victim = (leader(members).await + 1) % 3;
    members.cut(victim);
    until_writing(done, "a follower was cut off").await;
    members.mend(victim);
    let victim = leader(members).await;
    members.cut(victim);
    until_writing(done, "the leader was cut off").await;
    members.mend(victim);
    until_writing(done, "it was connected again").await;
    let victim = leader(members).await;
    members.freeze(victim);
    until_writing(done, "the leader was frozen").await;
    members.thaw(victim);
    until_writing(done, "it goes on with what it had received").await;
    // Without a majority nothing is committed, and nothing is lost.
    let victim = leader(members).await;
    members.kill((victim + 1) % 3);
    members.kill((victim + 2) % 3);
    tokio::time::sleep(Duration::from_secs(6)).await;
    members.restart((victim + 1) % 3);
    members.restart((victim + 2) % 3);
    until_writing(done, "two of three were killed and came back").await;
}

#[test]
fn a_commit_storm_survives_the_loss_of_members_leaders_and_links() {
    Members::with(3, async |mut members| {
        let stores =
            [open(&members, 0, "storm/").await, open(&members, 1, "storm/").await, open(&members, 2, "storm/").await];
        let start = stores[0].revision().await.unwrap();
        let first = stores[0].commit(Txn::random().put(key("/storm/counter"), "0")).await.unwrap();
        assert!(first.revision().is_some());
        let (stop, done, last) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let writers: Vec<_> = (0..6)
            .map(|n| tokio::spawn(write(Arc::clone(&stores[n % 3]), n, Arc::clone(&stop), Arc::clone(&done))))
            .collect();
        let watchers: Vec<_> = (0..6)
            .map(|n| {
                let resume = if n < 3 { usize::MAX } else { 50 };
                tokio::spawn(follow(Arc::clone(&stores[n % 3]), start, Arc::clone(&last), resume))
            })
            .collect();
        torment(&mut members, &done).await;
        stop.store(true, Ordering::Relaxed);
        let mut ledgers = Vec::new();
        for writer in writers {
            ledgers.push(writer.await.unwrap());
        }
        let end = stores[0].commit(Txn::random().put(key("/storm/end"), "")).await.unwrap().revision().unwrap();
        last.store(end.n, Ordering::Relaxed);
        let (entries, _) = list_all(&*stores[1], &Prefix::all(), None).await.unwrap();
        let listed: BTreeMap<_, _> = entries.iter().map(|entry| (entry.key.clone(), entry.revision)).collect();
        check(&ledgers, &listed, &entries);
        let storm: BTreeMap<_, _> = listed.into_iter().filter(|(key, _)| key.starts_with("/storm/")).collect();
        for watcher in watchers {
            let (state, _) = tokio::time::timeout(DEADLINE, watcher).await.expect("watchers arrive").unwrap();
            assert_eq!(state, storm);
        }
    });
}

fn check(ledgers: &[Ledger], listed: &BTreeMap<Key, Revision>, entries: &[oblak_store::Entry]) {
    let mut increments = 0;
    for ledger in ledgers {
        for (key, revision) in &ledger.created {
            assert_eq!(listed.get(key), Some(revision), "{key} was acknowledged");
        }
        for key in &ledger.refused {
            assert_eq!(listed.get(key), None, "{key} was reported as not done");
        }
        increments += ledger.increments;
    }
    let created: usize = ledgers.iter().map(|ledger| ledger.created.len()).sum();
    assert_eq!(listed.len(), created + 2, "what nobody acknowledged is not there");
    let counter = entries.iter().find(|entry| *entry.key == *"/storm/counter").unwrap();
    assert_eq!(std::str::from_utf8(&counter.value).unwrap(), increments.to_string());
    let (unknown, errors) = ledgers.iter().fold((0, 0), |sum, ledger| (sum.0 + ledger.unknown, sum.1 + ledger.errors));
    eprintln!(
        "{created} created, {increments} added, {unknown} unknown and resolved, {errors} refused for lack of servers"
    );
}

#[test]
fn a_renewed_lease_outlives_its_leader_and_one_that_is_not_renewed_ends() {
    Members::with(3, async |mut members| {
        let store = open(&members, 0, "leases/").await;
        let ttl = Duration::from_secs(5);
        let (kept, left) = (store.grant(ttl).await.unwrap(), store.grant(ttl).await.unwrap());
        let asked = Instant::now();
        let victim = leader(&members).await;
        members.kill(victim);
        let alive = |id| Txn::random().guard(Guard::LeaseAlive(id));
        let start = Instant::now();
        while start.elapsed() < ttl * 3 {
            match store.renew(kept.id).await {
                Ok(lease) => assert_eq!(lease, kept),
                Err(error) => assert!(error.is_retryable(), "{error}"),
            }
            let outcome = store.commit(alive(left.id)).await.unwrap();
            if !matches!(outcome, CommitOutcome::Committed(_)) {
                assert!(asked.elapsed() >= ttl, "it ended early: {outcome:?}");
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert!(matches!(store.renew(left.id).await, Err(StoreError::LeaseGone(_))));
        assert!(matches!(store.commit(alive(kept.id)).await.unwrap(), CommitOutcome::Committed(_)));
    });
}
