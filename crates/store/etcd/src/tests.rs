//! What only can be seen from inside: late copies of requests, windows of records, new lives of the store.

use std::sync::Arc;
use std::time::Duration;

use oblak_store::{CommitOutcome, Guard, Key, Prefix, Revision, Store, StoreError, Txn, WatchError, WatchItem};

use crate::commit::{Record, request};
use crate::store::Core;
use crate::tail::{Ended, Tail};
use crate::testing::{Server, Settings, available};
use crate::{EtcdOptions, EtcdStore, janitor};

const DEADLINE: Duration = Duration::from_secs(10);

struct Cloud {
    store: EtcdStore,
    server: Server,
}

async fn cloud() -> Option<Cloud> {
    if !available(&["etcd", "setpriv"]) {
        return None;
    }
    let server = Server::start(&Settings::default());
    let store = EtcdStore::open(EtcdOptions::new([server.url()])).await.unwrap();
    Some(Cloud { store, server })
}

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

async fn put(store: &EtcdStore, name: &str) -> Revision {
    match store.commit(Txn::random().put(key(name), "x")).await.unwrap() {
        CommitOutcome::Committed(revision) => revision,
        other => panic!("{other:?}"),
    }
}

/// Sends a request that was made for `known`, as if it had lain in some queue since; whether its conditions held.
async fn arrives_late(core: &Core, request: etcd_client::Txn) -> bool {
    let answer = core.cluster.attempt(|mut client| async move { client.txn(request).await }).await.unwrap();
    answer.succeeded()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_arrives_after_its_outcome_was_told_does_nothing() {
    let Some(Cloud { store, server: _server }) = cloud().await else { return };
    let core = &store.core;
    let txn = Txn::random().create(key("/late"), "1");
    let late = || request(core, &core.known(), &txn, Record::Absent);
    let first = late();
    assert_eq!(store.outcome(txn.id).await.unwrap(), None);
    assert!(!arrives_late(core, first).await, "nobody expects it any more");
    assert_eq!(store.get(&key("/late")).await.unwrap(), None);
    // Asked for again by somebody who knows that it did not happen.
    let CommitOutcome::Committed(revision) = store.commit(txn.clone()).await.unwrap() else { panic!("not committed") };
    assert!(!arrives_late(core, late()).await);
    assert_eq!(store.get(&key("/late")).await.unwrap().unwrap().revision, revision);
    assert_eq!(store.outcome(txn.id).await.unwrap(), Some(revision));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_are_dropped_only_when_no_request_can_need_them() {
    let Some(Cloud { store, server: _server }) = cloud().await else { return };
    let core = &store.core;
    let txn = Txn::random().put(key("/first"), "1");
    let copy = request(core, &core.known(), &txn, Record::Absent);
    let CommitOutcome::Committed(first) = store.commit(txn.clone()).await.unwrap() else { panic!("not committed") };
    let fill = async |count: usize| {
        for n in 0..count {
            put(&store, &format!("/fill/{n}")).await;
        }
    };
    fill(4).await;
    assert_eq!(janitor::forget_now(core, 10).await.unwrap(), 0, "too few to begin a window");
    assert_eq!(core.known().meta.window, 0);
    fill(10).await;
    assert_eq!(janitor::forget_now(core, 10).await.unwrap(), 0, "there is no window before the first");
    assert_eq!(core.known().meta.window, 1);
    assert_eq!(store.outcome(txn.id).await.unwrap(), Some(first));
    fill(10).await;
    assert_eq!(janitor::forget_now(core, 10).await.unwrap(), 15, "the first window goes when the third begins");
    assert!(!arrives_late(core, copy).await, "its record is gone, and so is the window that it names");
    assert_eq!(store.get(&key("/first")).await.unwrap().unwrap().revision, first);
    let newest = put(&store, "/newest").await;
    assert!(newest > first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_learns_of_a_window_by_trying() {
    let Some(Cloud { store, server }) = cloud().await else { return };
    let other = EtcdStore::open(EtcdOptions::new([server.url()])).await.unwrap();
    for n in 0..3 {
        put(&store, &format!("/a/{n}")).await;
    }
    janitor::forget_now(&store.core, 1).await.unwrap();
    let revision = put(&other, "/b").await;
    assert_eq!(store.get(&key("/b")).await.unwrap().unwrap().revision, revision);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_incarnation_ends_leases_watches_and_old_revisions() {
    let Some(Cloud { store, server }) = cloud().await else { return };
    let other = EtcdStore::open(EtcdOptions::new([server.url()])).await.unwrap();
    let old = put(&store, "/k").await;
    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    let txn = Txn::random().put_leased(key("/leased"), "x", lease.id);
    assert!(store.commit(txn).await.unwrap().revision().is_some());
    let mut watch = other.watch(&Prefix::all(), old).await.unwrap();
    let now = store.new_incarnation().await.unwrap();
    assert_eq!(now.incarnation, old.incarnation + 1);
    let ended = tokio::time::timeout(DEADLINE, async {
        loop {
            match watch.next().await {
                Some(Ok(_)) => {}
                end => break end,
            }
        }
    });
    assert!(matches!(ended.await.unwrap(), Some(Err(WatchError::Compacted { .. }))), "the other server noticed");
    assert!(matches!(other.watch(&Prefix::all(), old).await, Err(WatchError::Compacted { .. })));
    assert!(matches!(other.renew(lease.id).await, Err(StoreError::LeaseGone(_))));
    assert_eq!(other.get(&key("/leased")).await.unwrap(), None);
    let stale = other.commit(Txn::random().replace(key("/k"), old, "2")).await.unwrap();
    assert!(matches!(stale, CommitOutcome::GuardFailed { guard: Guard::Revision(..), .. }), "{stale:?}");
    let entry = other.get(&key("/k")).await.unwrap().unwrap();
    assert_eq!(entry.revision.incarnation, now.incarnation);
    assert!(other.commit(Txn::random().replace(key("/k"), entry.revision, "2")).await.unwrap().revision().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_that_came_from_another_cluster_begin_a_new_incarnation() {
    let Some(Cloud { store, server }) = cloud().await else { return };
    let old = put(&store, "/k").await;
    let known = store.core.known();
    let elsewhere = crate::meta::Meta { cluster: "abc".into(), ..known.meta.clone() };
    crate::meta::replace(&store.core.cluster, &store.core.space, known.modified, &elsewhere).await.unwrap();
    drop(store);
    let store = EtcdStore::open(EtcdOptions::new([server.url()])).await.unwrap();
    assert_eq!(store.revision().await.unwrap().incarnation, old.incarnation + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_write_to_etcd_stalls_nobody() {
    let Some(Cloud { store, server }) = cloud().await else { return };
    let options = EtcdOptions { prefix: "another/".into(), ..EtcdOptions::new([server.url()]) };
    let other = EtcdStore::open(options).await.unwrap();
    let start = put(&store, "/mine").await;
    let mut watch = store.watch(&Prefix::all(), start).await.unwrap();
    for n in 0..5 {
        put(&other, &format!("/theirs/{n}")).await;
    }
    let now = store.revision().await.unwrap();
    assert!(now.n >= start.n + 5);
    let reached = tokio::time::timeout(DEADLINE, async {
        loop {
            match watch.next().await.unwrap().unwrap() {
                WatchItem::Progress(at) if at >= now => break,
                WatchItem::Progress(_) => {}
                WatchItem::Event(event) => panic!("{event:?} is not of this cloud"),
            }
        }
    });
    reached.await.expect("a reader that waits for that revision gets there");
    assert_eq!(store.list(&Prefix::all(), 10, None, None).await.unwrap().entries.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_lists_come_in_pages_of_bounded_size() {
    let Some(Cloud { store, server: _server }) = cloud().await else { return };
    let store = Arc::new(store);
    for n in 0..30 {
        let txn = Txn::random().put(key(&format!("/big/{n:02}")), vec![n; 500_000]);
        assert!(store.commit(txn).await.unwrap().revision().is_some());
    }
    let page = store.list(&Prefix::all(), 10_000, None, None).await.unwrap();
    let bytes: usize = page.entries.iter().map(|entry| entry.value.len()).sum();
    let full = oblak_store::MAX_PAGE_BYTES..oblak_store::MAX_PAGE_BYTES + 500_001;
    assert!(page.more && full.contains(&bytes));
    let (all, _) = oblak_store::list_all(&*store, &Prefix::all(), None).await.unwrap();
    assert_eq!(all.len(), 30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_of_the_log_is_told_when_its_position_is_gone() {
    let Some(Cloud { store, server: _server }) = cloud().await else { return };
    let old = put(&store, "/a").await;
    let floor = put(&store, "/b").await;
    let last = put(&store, "/c").await;
    store.compact(floor).await.unwrap();
    let mut gone = Tail::new(Arc::clone(&store.core), old.n - 1);
    match gone.next().await {
        Err(Ended::Compacted(n)) => assert_eq!(n, floor.n),
        Err(Ended::Failed(failure)) => panic!("{failure:?}"),
        Ok(_) => panic!("read what is gone"),
    }
    let mut kept = Tail::new(Arc::clone(&store.core), floor.n);
    let steps = kept.next().await.ok().unwrap();
    assert_eq!(steps.first().map(|step| step.n), Some(last.n));
}
