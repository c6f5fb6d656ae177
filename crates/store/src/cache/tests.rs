use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::{Collection, MemoryStore, Store, Txn};

const DEADLINE: Duration = Duration::from_secs(10);

fn prefix(text: &str) -> Prefix {
    Prefix::new(text).unwrap()
}

fn source() -> CacheSource<u32> {
    CacheSource::values(prefix("/n"))
        .index("parity", |item| vec![if item.value % 2 == 0 { "even".into() } else { "odd".into() }])
}

fn names(items: &[Arc<Item<u32>>]) -> Vec<(String, u32)> {
    items.iter().map(|item| (item.key.last().to_owned(), item.value)).collect()
}

async fn changed(changes: &mut Subscription<u32>) -> CacheChange<u32> {
    match tokio::time::timeout(DEADLINE, changes.next()).await.expect("a change in time") {
        Some(Notice::Change(change)) => change,
        other => panic!("{other:?}"),
    }
}

async fn fill(store: &Arc<MemoryStore>, count: u32) -> Collection<u32> {
    let shared: SharedStore = Arc::<MemoryStore>::clone(store);
    let numbers = Collection::new(shared, prefix("/n"));
    for n in 0..count {
        assert!(numbers.create(&format!("{n:05}"), &n).await.unwrap().revision().is_some());
    }
    numbers
}

#[tokio::test]
async fn a_reader_sees_its_own_write_after_waiting() {
    let store = Arc::new(MemoryStore::new());
    let numbers = fill(&store, 5).await;
    let cache = Cache::start(Arc::<MemoryStore>::clone(&store), source()).await.unwrap();
    assert_eq!(cache.all(&prefix("/n")).len(), 5);
    assert_eq!(names(&cache.find("parity", "odd")), [("00001".into(), 1), ("00003".into(), 3)]);
    let mut read = numbers.get("00003").await.unwrap().unwrap();
    read.value = 30;
    let revision = numbers.replace(&read).await.unwrap().revision().unwrap();
    cache.wait_for(revision, DEADLINE).await.unwrap();
    let item = cache.get("/n/00003").unwrap();
    assert_eq!((item.value, item.revision, item.created), (30, revision, read.created));
    assert_eq!(&item.raw[1..], b"30");
    assert_eq!(names(&cache.find("parity", "odd")), [("00001".into(), 1)]);
    let other = store.commit(Txn::random().put(Key::new("/other").unwrap(), "x")).await.unwrap().revision().unwrap();
    cache.wait_for(other, DEADLINE).await.unwrap();
    let future = Revision::new(other.incarnation, other.n + 1);
    let late = cache.wait_for(future, Duration::from_millis(20)).await;
    assert!(matches!(late, Err(StoreError::Behind { wanted, .. }) if wanted == future));
}

#[tokio::test]
async fn items_say_when_they_are_gone() {
    let store = Arc::new(MemoryStore::new());
    let numbers = fill(&store, 3).await;
    let cache = Cache::start(Arc::<MemoryStore>::clone(&store), source()).await.unwrap();
    let [kept, changed, removed] = ["00000", "00001", "00002"].map(|n| cache.get(&format!("/n/{n}")).unwrap());
    let mut read = numbers.get("00001").await.unwrap().unwrap();
    read.value = 7;
    assert!(numbers.replace(&read).await.unwrap().revision().is_some());
    let read = numbers.get("00002").await.unwrap().unwrap();
    let last = numbers.delete(&read).await.unwrap().revision().unwrap();
    assert!(!kept.is_gone());
    cache.wait_for(last, DEADLINE).await.unwrap();
    assert_eq!([&kept, &changed, &removed].map(|item| item.is_gone()), [false, true, true]);
    assert!(!cache.get("/n/00001").unwrap().is_gone());
}

#[tokio::test]
async fn subscribers_hear_every_change_with_both_values() {
    let store = Arc::new(MemoryStore::new());
    let numbers = fill(&store, 2).await;
    let cache = Cache::start(Arc::<MemoryStore>::clone(&store), source()).await.unwrap();
    let mut changes = cache.subscribe();
    assert!(numbers.create("new", &7).await.unwrap().revision().is_some());
    let read = numbers.get("00000").await.unwrap().unwrap();
    assert!(numbers.delete(&read).await.unwrap().revision().is_some());
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let change = changed(&mut changes).await;
        seen.push((change.key.last().to_owned(), change.old.map(|item| item.value), change.new.map(|item| item.value)));
    }
    assert_eq!(seen, [("new".into(), None, Some(7)), ("00000".into(), Some(0), None)]);
}

#[tokio::test]
async fn a_slow_subscriber_is_told_to_read_again() {
    let store = Arc::new(MemoryStore::new());
    let numbers = fill(&store, 1).await;
    let cache = Cache::start(Arc::<MemoryStore>::clone(&store), source()).await.unwrap();
    let mut slow = cache.subscribe();
    let mut last = Revision::ZERO;
    for n in 0..=SUBSCRIBER_BUFFER {
        last = numbers.create(&format!("x{n}"), &1).await.unwrap().revision().unwrap();
    }
    cache.wait_for(last, DEADLINE).await.unwrap();
    assert!(matches!(slow.next().await, Some(Notice::Resync)));
    assert!(matches!(slow.next().await, Some(Notice::Change(_))));
}

/// The cache is stopped while keys change and the history is cut: the new list must announce deletions too.
#[tokio::test]
async fn deletions_survive_compaction() {
    let store = Arc::new(MemoryStore::new());
    let numbers = fill(&store, 10).await;
    let (cache, mut driver) = Cache::new(Arc::<MemoryStore>::clone(&store), source());
    driver.sync().await.unwrap();
    let mut changes = cache.subscribe();
    for name in ["00002", "00004"] {
        let read = numbers.get(name).await.unwrap().unwrap();
        assert!(numbers.delete(&read).await.unwrap().revision().is_some());
    }
    assert!(numbers.create("00002", &200).await.unwrap().revision().is_some());
    let last = numbers.create("new", &1).await.unwrap().revision().unwrap();
    store.compact(last).await.unwrap();
    let running = tokio::spawn(driver.run());
    cache.wait_for(last, DEADLINE).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let change = changed(&mut changes).await;
        seen.push((change.key.last().to_owned(), change.old.map(|item| item.value), change.new.map(|item| item.value)));
    }
    assert_eq!(
        seen,
        [("00004".into(), Some(4), None), ("00002".into(), Some(2), Some(200)), ("new".into(), None, Some(1))]
    );
    assert_eq!((cache.stats().resyncs, cache.stats().items), (1, 10));
    let restored = store.new_incarnation();
    cache.wait_for(restored, DEADLINE).await.unwrap();
    let after = numbers.create("after", &1).await.unwrap().revision().unwrap();
    cache.wait_for(after, DEADLINE).await.unwrap();
    assert_eq!(cache.stats().resyncs, 2);
    running.abort();
}

#[tokio::test]
async fn a_value_that_does_not_decode_hides_nothing() {
    let store = Arc::new(MemoryStore::new());
    fill(&store, 3).await;
    let cache = Cache::start(Arc::<MemoryStore>::clone(&store), source()).await.unwrap();
    let key = Key::new("/n/00001").unwrap();
    let bad = store.commit(Txn::random().put(key.clone(), "9{}")).await.unwrap().revision().unwrap();
    cache.wait_for(bad, DEADLINE).await.unwrap();
    assert_eq!(cache.get(&key).unwrap().value, 1, "the last good value stays");
    assert!(cache.view(|view| view.broken().any(|(at, reason)| *at == key && reason.contains("schema"))));
    let fresh = Cache::start(Arc::<MemoryStore>::clone(&store), source()).await.unwrap();
    assert_eq!((fresh.stats().items, fresh.stats().broken), (2, 1));
    let good = store.commit(Txn::random().put(key.clone(), "15")).await.unwrap().revision().unwrap();
    for cache in [&cache, &fresh] {
        cache.wait_for(good, DEADLINE).await.unwrap();
        assert_eq!((cache.get(&key).unwrap().value, cache.stats().broken), (5, 0));
    }
}

#[tokio::test]
async fn several_prefixes_and_many_values_share_what_they_hold() {
    let store = Arc::new(MemoryStore::new());
    fill(&store, 12_000).await;
    store.commit(Txn::random().put(Key::new("/m/a").unwrap(), "11")).await.unwrap().revision().unwrap();
    store.commit(Txn::random().put(Key::new("/k/a").unwrap(), "no number")).await.unwrap().revision().unwrap();
    let source = CacheSource::values(prefix("/n")).and(prefix("/m"));
    let cache: Cache<u32> = Cache::start(Arc::<MemoryStore>::clone(&store), source).await.unwrap();
    assert_eq!((cache.stats().items, cache.stats().broken), (12_001, 0));
    let (first, second) = (cache.get("/n/00042").unwrap(), cache.get("/n/00042").unwrap());
    assert!(Arc::ptr_eq(&first, &second));
    let after = Key::new("/n/11997").unwrap();
    let page: Vec<_> =
        cache.view(|view| view.range(&prefix("/n"), Some(&after)).take(10).map(|item| item.value).collect());
    assert_eq!(page, [11_998, 11_999]);
    assert_eq!(cache.view(|view| view.range(&prefix("/m"), Some(&after)).count()), 0);
    assert!(cache.all(&prefix("/nn")).is_empty());
    let start = Instant::now();
    assert_eq!(cache.all(&Prefix::all()).len(), 12_001);
    assert!(start.elapsed() < Duration::from_secs(1));
    let last = store.commit(Txn::random().put(Key::new("/m/b").unwrap(), "12")).await.unwrap().revision().unwrap();
    cache.wait_for(last, DEADLINE).await.unwrap();
    assert_eq!(cache.all(&prefix("/m")).len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_shows_what_was_committed_together_together() {
    let store = Arc::new(MemoryStore::new());
    let shared: SharedStore = Arc::<MemoryStore>::clone(&store);
    let mut group = GroupBuilder::new(shared);
    let (left, right) =
        (group.add(CacheSource::<u32>::values(prefix("/l"))), group.add(CacheSource::<u32>::values(prefix("/r"))));
    let group = group.start().await.unwrap();
    let value = |n: u32| crate::objects::encode_value(&n);
    let writer = tokio::spawn(async move {
        let mut last = Revision::ZERO;
        for n in 0..300u32 {
            let txn = Txn::random().put(Key::new("/l/a").unwrap(), value(n)).put(Key::new("/r/a").unwrap(), value(n));
            last = store.commit(txn).await.unwrap().revision().unwrap();
        }
        last
    });
    let read = |cache: &Cache<u32>, key: &str| cache.get(key).map(|item| (item.value, item.revision));
    while !writer.is_finished() {
        let _held = group.hold().await;
        assert_eq!(left.revision(), right.revision());
        let before = read(&left, "/l/a");
        tokio::task::yield_now().await;
        assert_eq!((before, read(&left, "/l/a")), (read(&right, "/r/a"), before));
    }
    let last = writer.await.unwrap();
    right.wait_for(last, DEADLINE).await.unwrap();
    assert_eq!(read(&left, "/l/a").unwrap(), (299, last));
}
