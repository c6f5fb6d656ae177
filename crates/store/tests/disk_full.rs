//! A really full file system: a clear error, nothing half written, and work goes on once there is space again.
#![allow(clippy::unwrap_used, reason = "a test, helpers included")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use oblak_store::{CommitOutcome, Key, Prefix, RedbOptions, RedbStore, Store, StoreError, Txn};

const DIR: &str = "OBLAK_STORE_FULL_DIR";

/// Not a test by itself: runs on a small file system in a mount namespace of its own.
#[test]
fn on_a_small_disk() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let dir = Path::new(&dir);
    // Filled before the database is opened: enough for it to start, too little to grow far.
    std::fs::write(dir.join("filler"), vec![0; 8 << 20]).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(fill_up(dir));
}

async fn fill_up(dir: &Path) {
    let path = dir.join("state.redb");
    let store = RedbStore::open(&path, RedbOptions::default()).unwrap();
    let key = |n: u32| Key::new(format!("/k/{n:05}")).unwrap();
    let value = vec![7u8; 100_000];
    let mut acked = 0;
    let error = loop {
        let txn = Txn::random().put(key(acked), value.clone());
        match store.commit(txn.clone()).await {
            Ok(CommitOutcome::Committed(_)) => acked += 1,
            Ok(other) => panic!("{other:?} after {acked}"),
            Err(error) => {
                assert_eq!(store.outcome(txn.id).await.ok().flatten(), None);
                break error;
            }
        }
        assert!(acked < 1000, "the disk never filled up");
    };
    assert!(matches!(error, StoreError::DiskFull { .. }), "{error:?}");
    assert!(error.to_string().contains("full"), "{error}");
    println!("full after {acked} values: {error}");
    std::fs::remove_file(dir.join("filler")).unwrap();
    let start = Instant::now();
    while store.commit(Txn::random().put(key(acked), value.clone())).await.is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "it did not heal");
    }
    acked += 1;
    let page = store.list(&Prefix::all(), 10_000, None, None).await.unwrap();
    assert_eq!(page.entries.len(), acked as usize);
    assert!(page.entries.iter().all(|entry| entry.value == value));
    drop(store);
    let again = RedbStore::open(&path, RedbOptions::default()).unwrap();
    assert_eq!(again.stats().await.unwrap().keys, u64::from(acked));
}

#[test]
fn a_full_disk_is_said_and_survived() {
    let dir = tempfile::tempdir().unwrap();
    // The mount lives and dies with the namespace of the child.
    let script =
        r#"mount -t tmpfs -o size=14m none "$1" 2>/dev/null || exit 77; exec "$2" --exact on_a_small_disk --nocapture"#;
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .env(DIR, dir.path());
    let status = match command.status() {
        Ok(status) => status,
        Err(error) => {
            println!("skipped: cannot run unshare: {error}");
            return;
        }
    };
    // 1 is unshare itself refusing; the child uses 77 for mount and 101 for a failed test.
    if matches!(status.code(), Some(1 | 77)) {
        println!("skipped: mount namespaces are not permitted here");
        return;
    }
    assert!(status.success(), "{status}");
}
