//! Watches: nothing lost, nothing twice, resumable, bounded.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Subject, delete, event, key, prefix, put};
use crate::{Key, Revision, StoreError, Txn, WatchError, WatchItem};

const WRITERS: u64 = 6;
const COMMITS: u64 = 40;

/// Applies a watch to a map and checks its order, until `last` has been seen.
async fn follow(subject: &Subject, from: Revision, below: &str, last: Revision) -> BTreeMap<Key, (Revision, String)> {
    let mut stream = subject.store.watch(&prefix(below), from).await.unwrap();
    let (mut at, mut state) = (from, BTreeMap::<Key, (Revision, String)>::new());
    while at < last {
        let item = stream.next().await.unwrap().unwrap();
        assert!(item.revision() > at || matches!(item, WatchItem::Progress(now) if now == at), "{item:?} after {at}");
        at = item.revision();
        let WatchItem::Event(event) = item else { continue };
        assert!(!event.changes.is_empty());
        for change in event.changes {
            assert!(change.key.starts_with(below));
            let before = match change.value {
                Some(value) => {
                    let text = String::from_utf8(value.to_vec()).unwrap();
                    state.insert(change.key.clone(), (event.revision, text))
                }
                None => state.remove(&change.key),
            };
            if from == Revision::ZERO {
                assert_eq!(before.map(|(revision, _)| revision), change.prev, "an event of {} is missing", change.key);
            }
        }
    }
    state
}

async fn listed(subject: &Subject, below: &str) -> BTreeMap<Key, (Revision, String)> {
    let page = subject.store.list(&prefix(below), 10_000, None, None).await.unwrap();
    let text = |value: &[u8]| String::from_utf8(value.to_vec()).unwrap();
    page.entries.into_iter().map(|entry| (entry.key, (entry.revision, text(&entry.value)))).collect()
}

/// Watchers that start at any moment of a commit storm all arrive at the state that a list shows.
pub async fn watchers_lose_nothing_and_repeat_nothing(subject: &Subject) {
    let mut writers = Vec::new();
    for writer in 0..WRITERS {
        let store = Arc::clone(&subject.store);
        writers.push(tokio::spawn(async move {
            for n in 0..COMMITS {
                let mine = key(&format!("/w/{writer}/{}", n % 7));
                let shared = key(&format!("/shared/{}", n % 3));
                let txn = Txn::random();
                let txn = if n % 5 == 4 { txn.delete(mine) } else { txn.put(mine, format!("{writer}.{n}")) };
                let txn = if n % 2 == 0 { txn.put(shared, format!("{writer}.{n}")) } else { txn };
                assert!(store.commit(txn).await.unwrap().revision().is_some());
            }
        }));
    }
    let last = put(subject, "/w/first", "x").await;
    let early = follow(subject, Revision::ZERO, "/w", last).await;
    assert!(early.contains_key(&key("/w/first")));
    for writer in writers {
        writer.await.unwrap();
    }
    let last = put(subject, "/other", "end").await;
    for below in ["/w", "/shared", "/"] {
        assert_eq!(follow(subject, Revision::ZERO, below, last).await, listed(subject, below).await);
    }
}

/// A reader that continues from the last revision it saw gets exactly the rest.
pub async fn a_watch_resumes_where_it_stopped(subject: &Subject) {
    let mut stream = subject.store.watch(&prefix("/r"), Revision::ZERO).await.unwrap();
    let mut revisions = Vec::new();
    for n in 0..10 {
        revisions.push(put(subject, &format!("/r/{}", n % 4), format!("{n}")).await);
    }
    for expected in &revisions[..3] {
        assert_eq!(event(&mut stream).await.revision, *expected);
    }
    drop(stream);
    let mut stream = subject.store.watch(&prefix("/r"), revisions[2]).await.unwrap();
    for (n, expected) in revisions.iter().enumerate().skip(3) {
        let event = event(&mut stream).await;
        assert_eq!(event.revision, *expected);
        assert_eq!(
            event.changes[0].value.as_deref(),
            Some(n.to_string().as_bytes()),
            "the value of that revision, not a later one"
        );
    }
    let gone = delete(subject, "/r/1").await;
    let event = event(&mut stream).await;
    assert_eq!(
        (event.revision, event.changes[0].value.clone(), event.changes[0].prev),
        (gone, None, Some(revisions[9]))
    );
    assert_eq!(event.changes[0].created, revisions[1]);
}

/// A watch reaches back further than any buffer in memory.
pub async fn a_late_watcher_reads_the_history(subject: &Subject) {
    let big = "x".repeat(200_000);
    let start = subject.store.revision().await.unwrap();
    let mut waiting = subject.store.watch(&prefix("/h"), start).await.unwrap();
    for n in 0..60 {
        put(subject, &format!("/h/{}", n % 5), format!("{n} {big}")).await;
    }
    let mut late = subject.store.watch(&prefix("/h"), start).await.unwrap();
    for stream in [&mut waiting, &mut late] {
        for n in 0..60 {
            let event = event(stream).await;
            let value = event.changes[0].value.clone().unwrap();
            assert!(value.starts_with(format!("{n} ").as_bytes()), "value {n} comes in its turn");
        }
    }
}

/// A watcher of a quiet prefix learns how far the store is.
pub async fn idle_watchers_learn_how_far_they_are(subject: &Subject) {
    let start = put(subject, "/busy/0", "x").await;
    let mut stream = subject.store.watch(&prefix("/quiet"), start).await.unwrap();
    for n in 1..20 {
        let revision = put(subject, &format!("/busy/{n}"), "x").await;
        loop {
            match stream.next().await.unwrap().unwrap() {
                WatchItem::Progress(at) if at >= revision => break,
                WatchItem::Progress(_) => {}
                WatchItem::Event(event) => panic!("{event:?}"),
            }
        }
    }
    let revision = put(subject, "/quiet/1", "x").await;
    assert_eq!(event(&mut stream).await.revision, revision);
}

/// After compaction old positions are refused and the ones that were to be kept still work.
pub async fn compaction_sends_readers_back_to_the_list(subject: &Subject) {
    let store = &subject.store;
    let mut revisions = Vec::new();
    for n in 0..12 {
        revisions.push(put(subject, &format!("/c/{}", n % 3), format!("{n}")).await);
    }
    let mut open = store.watch(&prefix("/c"), revisions[10]).await.unwrap();
    store.compact(revisions[8]).await.unwrap();
    for old in [Revision::ZERO, revisions[0], revisions[7]] {
        match store.watch(&prefix("/c"), old).await {
            Err(WatchError::Compacted { oldest }) => assert_eq!(oldest, revisions[8]),
            other => panic!("{other:?}"),
        }
        let list = store.list(&prefix("/c"), 1, None, Some(old)).await;
        assert!(matches!(list, Err(StoreError::Compacted { oldest }) if oldest == revisions[8]), "{list:?}");
    }
    let kept = store.list(&prefix("/c"), 10, None, Some(revisions[8])).await.unwrap();
    let values: Vec<_> = kept.entries.iter().map(|entry| String::from_utf8_lossy(&entry.value).into_owned()).collect();
    assert_eq!(values, ["6", "7", "8"]);
    let mut stream = store.watch(&prefix("/c"), revisions[8]).await.unwrap();
    for expected in &revisions[9..] {
        assert_eq!(event(&mut stream).await.revision, *expected);
    }
    assert_eq!(event(&mut open).await.revision, revisions[11]);
    assert_eq!(store.stats().await.unwrap().oldest, revisions[8]);
    store.compact(revisions[2]).await.unwrap();
    assert_eq!(store.stats().await.unwrap().oldest, revisions[8], "compaction never goes back");
    assert_eq!(listed(subject, "/c").await.len(), 3);
}
