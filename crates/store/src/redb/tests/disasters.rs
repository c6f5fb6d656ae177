//! Bad files, full disks, failing disks, restores.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use redb::{Database, ReadableDatabase, ReadableTableMetadata};

use crate::conformance::{key, prefix};
use crate::redb::backend::Meter;
use crate::redb::{RedbOptions, RedbStore, layout, restore};
use crate::{CommitOutcome, Guard, HistoryLimits, Revision, Store, StoreError, Txn, WatchError, WatchItem};

fn open(path: &Path) -> Result<RedbStore, StoreError> {
    RedbStore::open(path, RedbOptions::default())
}

async fn put(store: &RedbStore, name: &str, value: &str) -> Revision {
    store.commit(Txn::random().put(key(name), value.to_owned())).await.unwrap().revision().unwrap()
}

async fn filled(path: &Path) -> Revision {
    let store = open(path).unwrap();
    let mut last = Revision::ZERO;
    for n in 0..200 {
        last = put(&store, &format!("/k/{n}"), &"v".repeat(500)).await;
    }
    last
}

#[tokio::test]
async fn a_second_process_is_told_that_the_database_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    let first = open(&path).unwrap();
    let error = open(&path).err().unwrap();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    assert!(error.to_string().contains("state.redb") && error.to_string().contains("in use"), "{error}");
    put(&first, "/a", "1").await;
    drop(first);
    assert!(open(&path).unwrap().get(&key("/a")).await.unwrap().is_some());
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

/// Whatever is cut off or overwritten: an error that names the file, or, where nothing in use was hit, everything is there.
#[tokio::test]
async fn a_damaged_file_is_an_error_and_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good.redb");
    filled(&good).await;
    let bytes = std::fs::read(&good).unwrap();
    let bad = dir.path().join("bad.redb");
    let mut refused = 0;
    let mut damaged: Vec<Vec<u8>> =
        [0, 1, 64, 511, 4096, 5000, bytes.len() / 2].map(|len| bytes[..len].to_vec()).into();
    damaged.push(b"this is no database at all".repeat(500));
    for at in (0..bytes.len()).step_by(bytes.len() / 40) {
        let mut torn = bytes.clone();
        let end = (at + 700).min(torn.len());
        torn[at..end].fill(0xa5);
        damaged.push(torn);
    }
    for (case, damaged) in damaged.iter().enumerate() {
        std::fs::write(&bad, damaged).unwrap();
        match open(&bad) {
            Err(error) => {
                refused += 1;
                assert!(
                    matches!(error, StoreError::Corrupt { .. } | StoreError::Schema { .. }),
                    "case {case}: {error:?}"
                );
                assert!(error.to_string().contains("bad.redb"), "{error}");
            }
            Ok(store) => {
                let page = store.list(&prefix("/k"), 1000, None, None).await.unwrap();
                assert_eq!(page.entries.len(), 200, "case {case} lost something silently");
                assert!(page.entries.iter().all(|entry| entry.value == "v".repeat(500)), "case {case}");
            }
        }
        std::fs::remove_file(&bad).unwrap();
    }
    assert!(refused >= 10, "{refused} of {}", damaged.len());
}

#[tokio::test]
async fn another_schema_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    filled(&path).await;
    let database = Database::open(&path).unwrap();
    let txn = database.begin_write().unwrap();
    txn.open_table(layout::META).unwrap().insert(layout::META_SCHEMA, 7).unwrap();
    txn.commit().unwrap();
    drop(database);
    let error = open(&path).err().unwrap();
    assert!(matches!(error, StoreError::Schema { found: 7, supported: layout::SCHEMA, .. }), "{error}");
}

#[tokio::test]
async fn a_full_disk_loses_nothing_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    let meter = Arc::new(Meter::default());
    let store = RedbStore::open_metered(&path, RedbOptions::default(), Arc::clone(&meter)).unwrap();
    let lease = store.grant(Duration::from_secs(600)).await.unwrap();
    let before = put(&store, "/a", "1").await;
    let mut stream = store.watch(&prefix("/"), before).await.unwrap();
    meter.fail_writes.store(true, Ordering::Relaxed);
    let txn = Txn::random().put(key("/a"), "2").put(key("/b"), "2");
    let error = store.commit(txn.clone()).await.unwrap_err();
    assert!(matches!(error, StoreError::DiskFull { .. }) && error.is_retryable(), "{error:?}");
    meter.fail_writes.store(false, Ordering::Relaxed);
    assert_eq!(store.outcome(txn.id).await.unwrap(), None);
    assert_eq!(&*store.get(&key("/a")).await.unwrap().unwrap().value, b"1");
    assert!(store.get(&key("/b")).await.unwrap().is_none());
    let guarded = txn.guard(Guard::Revision(key("/a"), before)).guard(Guard::LeaseAlive(lease.id));
    let after = store.commit(guarded).await.unwrap().revision().unwrap();
    loop {
        match stream.next().await.unwrap().unwrap() {
            WatchItem::Event(event) => {
                assert_eq!((event.revision, event.changes.len()), (after, 2));
                break;
            }
            WatchItem::Progress(at) => assert!(at < after),
        }
    }
    drop(store);
    assert_eq!(&*open(&path).unwrap().get(&key("/b")).await.unwrap().unwrap().value, b"2");
}

/// After a failed fsync nobody can know, so the store says `Unknown` and stops rather than guess.
#[tokio::test]
async fn a_failed_sync_is_unknown_and_stops_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let meter = Arc::new(Meter::default());
    let store =
        RedbStore::open_metered(&dir.path().join("state.redb"), RedbOptions::default(), Arc::clone(&meter)).unwrap();
    let at = put(&store, "/a", "1").await;
    let mut stream = store.watch(&prefix("/"), at).await.unwrap();
    meter.fail_syncs.store(true, Ordering::Relaxed);
    let txn = Txn::random().put(key("/a"), "2");
    assert_eq!(store.commit(txn.clone()).await.unwrap(), CommitOutcome::Unknown(txn.id));
    meter.fail_syncs.store(false, Ordering::Relaxed);
    for _ in 0..2 {
        let error = store.commit(Txn::random().put(key("/a"), "3")).await.unwrap_err();
        assert!(matches!(error, StoreError::Io { .. }), "{error:?}");
    }
    assert!(store.get(&key("/a")).await.is_err());
    let ended = loop {
        match stream.next().await.unwrap() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(ended, WatchError::Store(StoreError::Closed)), "{ended:?}");
}

#[tokio::test]
async fn a_lease_survives_a_restart_and_then_still_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    let ttl = Duration::from_secs(1);
    let store = open(&path).unwrap();
    let lease = store.grant(ttl).await.unwrap();
    store.commit(Txn::random().put_leased(key("/mine"), "x", lease.id)).await.unwrap().revision().unwrap();
    drop(store);
    let opened = Instant::now();
    let store = open(&path).unwrap();
    let at = store.revision().await.unwrap();
    assert_eq!(store.renew(lease.id).await.unwrap(), lease);
    let mut stream = store.watch(&prefix("/"), at).await.unwrap();
    // Nobody asks anything: the writer must wake by itself.
    let gone = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            if let WatchItem::Event(event) = stream.next().await.unwrap().unwrap() {
                break event;
            }
        }
    });
    assert_eq!(gone.await.unwrap().changes[0].key.as_str(), "/mine");
    assert!(opened.elapsed() >= ttl);
    drop(store);
    let store = open(&path).unwrap();
    assert!(matches!(store.renew(lease.id).await, Err(StoreError::LeaseGone(_))));
    assert_ne!(store.grant(ttl).await.unwrap().id, lease.id);
}

#[tokio::test]
async fn history_is_bounded_without_anybody_asking() {
    let dir = tempfile::tempdir().unwrap();
    let history = HistoryLimits { revisions: 80, ..HistoryLimits::default() };
    let path = dir.path().join("state.redb");
    let store = RedbStore::open(&path, RedbOptions { history, ..RedbOptions::default() }).unwrap();
    let mut last = Revision::ZERO;
    for n in 0..300 {
        last = put(&store, &format!("/k/{}", n % 10), &n.to_string()).await;
    }
    let stats = store.stats().await.unwrap();
    let kept = last.n - stats.oldest.n;
    assert!((80..=92).contains(&kept), "{kept} revisions are kept");
    assert_eq!((stats.keys, stats.commits, stats.revision), (10, 300, last));
    let old = store.list(&prefix("/k"), 100, None, Some(stats.oldest)).await.unwrap();
    assert!(old.entries.iter().all(|entry| entry.revision <= stats.oldest) && old.entries.len() == 10);
    drop(store);
    let rows =
        Database::open(&path).unwrap().begin_read().unwrap().open_table(layout::SUPERSEDED).unwrap().len().unwrap();
    assert!(rows <= kept, "{rows} old versions are kept for {kept} revisions");
}

#[tokio::test]
async fn a_restored_backup_is_another_incarnation() {
    let dir = tempfile::tempdir().unwrap();
    let (path, backup, restored) =
        (dir.path().join("state.redb"), dir.path().join("backup.redb"), dir.path().join("new/state.redb"));
    let store = open(&path).unwrap();
    let lease = store.grant(Duration::from_secs(600)).await.unwrap();
    store.commit(Txn::random().put_leased(key("/leased"), "x", lease.id)).await.unwrap().revision().unwrap();
    let kept = put(&store, "/kept", "1").await;
    assert_eq!(store.backup(&backup).await.unwrap(), kept);
    let later = put(&store, "/later", "1").await;
    let head = restore(&backup, &restored, Some(9)).unwrap();
    assert_eq!(head, Revision::new(9, kept.n));
    assert!(restore(&backup, &restored, None).is_err(), "an existing database is never replaced");
    drop(store);
    let store = open(&restored).unwrap();
    assert_eq!(store.revision().await.unwrap(), head);
    assert_eq!(store.get(&key("/kept")).await.unwrap().unwrap().revision, kept);
    for gone in ["/leased", "/later"] {
        assert!(store.get(&key(gone)).await.unwrap().is_none(), "{gone}");
    }
    for foreign in [kept, later, Revision::ZERO] {
        assert!(
            matches!(store.watch(&prefix("/"), foreign).await, Err(WatchError::Compacted { oldest }) if oldest == head)
        );
    }
    assert!(store.renew(lease.id).await.is_err());
    let update = Txn::random().replace(key("/kept"), kept, "2");
    let next = store.commit(update).await.unwrap().revision().unwrap();
    assert_eq!(next, Revision::new(9, kept.n + 1));
    let old = store.list(&prefix("/"), 10, None, Some(head)).await.unwrap();
    assert_eq!((old.entries.len(), &*old.entries[0].value), (1, &b"1"[..]));
    // A plain copy of a stopped database is a backup too.
    drop(store);
    let again = dir.path().join("again.redb");
    assert_eq!(restore(&restored, &again, None).unwrap(), Revision::new(10, next.n));
}
