//! Commits: atomicity, guards, limits, ids, races.

use std::sync::Arc;

use super::{Subject, committed, delete, key, prefix, put, value};
use crate::{CommitOutcome, Guard, LeaseId, MAX_TXN_BYTES, MAX_TXN_OPS, Revision, StoreError, Txn};

/// Get returns the newest value with the revisions of its creation and last change.
pub async fn values_are_read_as_written(subject: &Subject) {
    let store = &subject.store;
    assert_eq!(store.get(&key("/a/1")).await.unwrap(), None);
    let before = store.revision().await.unwrap();
    let first = put(subject, "/a/1", "one").await;
    assert!(first > before);
    let second = put(subject, "/a/1", "two").await;
    assert!(second > first);
    assert_eq!(store.revision().await.unwrap(), second);
    let entry = store.get(&key("/a/1")).await.unwrap().unwrap();
    assert_eq!((&*entry.value, entry.created, entry.revision), (&b"two"[..], first, second));
    let gone = delete(subject, "/a/1").await;
    assert!(gone > second);
    assert_eq!(store.get(&key("/a/1")).await.unwrap(), None);
    let again = put(subject, "/a/1", "").await;
    let entry = store.get(&key("/a/1")).await.unwrap().unwrap();
    assert_eq!(
        (entry.value.len(), entry.created),
        (0, again),
        "an empty value is a value, and a new life has a new creation"
    );
}

/// All writes of a transaction share one revision; a failed guard leaves nothing behind.
pub async fn commits_are_all_or_nothing(subject: &Subject) {
    let store = &subject.store;
    put(subject, "/quota/p", "1").await;
    let txn = Txn::random().put(key("/quota/p"), "2").create(key("/name/web"), "id").put(key("/instance/id"), "{}");
    let revision = committed(store.commit(txn.clone()).await.unwrap());
    for name in ["/quota/p", "/name/web", "/instance/id"] {
        assert_eq!(store.get(&key(name)).await.unwrap().unwrap().revision, revision);
    }
    let txn =
        Txn::random().put(key("/quota/p"), "3").put(key("/instance/other"), "{}").create(key("/name/web"), "other");
    let outcome = store.commit(txn).await.unwrap();
    let expected =
        CommitOutcome::GuardFailed { index: 0, guard: Guard::Absent(key("/name/web")), actual: Some(revision) };
    assert_eq!(outcome, expected);
    assert_eq!(value(subject, "/quota/p").await.unwrap(), "2");
    assert_eq!(value(subject, "/instance/other").await, None);
    assert_eq!(store.revision().await.unwrap(), revision);
}

/// Each kind of guard holds and fails when it should, and the first that fails is named.
pub async fn guards_mean_what_they_say(subject: &Subject) {
    let store = &subject.store;
    let old = put(subject, "/g/k", "1").await;
    let now = put(subject, "/g/k", "2").await;
    let lease = store.grant(subject.ttl * 20).await.unwrap().id;
    let (there, not) = (key("/g/k"), key("/g/none"));
    let holding = [
        Guard::Revision(there.clone(), now),
        Guard::Present(there.clone()),
        Guard::Absent(not.clone()),
        Guard::LeaseAlive(lease),
    ];
    let failing = [
        (Guard::Revision(there.clone(), old), Some(now)),
        (Guard::Revision(not.clone(), now), None),
        (Guard::Present(not.clone()), None),
        (Guard::Absent(there.clone()), Some(now)),
        (Guard::LeaseAlive(LeaseId(u64::MAX)), None),
    ];
    for (guard, actual) in failing {
        let mut txn = Txn::random().put(key("/g/out"), "x");
        txn.guards = holding.to_vec();
        txn.guards.push(guard.clone());
        txn.guards.push(Guard::Present(not.clone()));
        let outcome = store.commit(txn).await.unwrap();
        assert_eq!(outcome, CommitOutcome::GuardFailed { index: holding.len(), guard, actual });
        assert_eq!(value(subject, "/g/out").await, None);
    }
    let mut txn = Txn::random().put(key("/g/out"), "x");
    txn.guards = holding.to_vec();
    committed(store.commit(txn).await.unwrap());
    assert_eq!(value(subject, "/g/out").await.unwrap(), "x");
}

/// More than a commit may hold is refused before anything is written, with the numbers.
pub async fn limits_are_refused_with_the_count(subject: &Subject) {
    let store = &subject.store;
    let many = |count: usize| (0..count).fold(Txn::random(), |txn, n| txn.put(key(&format!("/many/{n:03}")), "v"));
    match store.commit(many(MAX_TXN_OPS + 1)).await {
        Err(StoreError::TooLarge { ops, .. }) => assert_eq!(ops, MAX_TXN_OPS + 1),
        other => panic!("{other:?}"),
    }
    match store.commit(Txn::random().put(key("/big"), vec![0; MAX_TXN_BYTES])).await {
        Err(StoreError::TooLarge { bytes, .. }) => assert_eq!(bytes, MAX_TXN_BYTES + "/big".len()),
        other => panic!("{other:?}"),
    }
    let twice = Txn::random().put(key("/twice"), "1").delete(key("/twice"));
    assert!(matches!(store.commit(twice).await, Err(StoreError::DuplicateWrite { .. })));
    assert!(store.list(&prefix("/"), 10, None, None).await.unwrap().entries.is_empty());
    committed(store.commit(many(MAX_TXN_OPS)).await.unwrap());
    committed(store.commit(Txn::random().put(key("/big"), vec![7; MAX_TXN_BYTES - "/big".len()])).await.unwrap());
    assert_eq!(store.list(&prefix("/many"), 1000, None, None).await.unwrap().entries.len(), MAX_TXN_OPS);
    assert!(store.get(&key("/big")).await.unwrap().unwrap().value.iter().all(|byte| *byte == 7));
}

/// Committing the same id again answers the same and writes nothing; `outcome` knows committed ids and only those.
pub async fn a_transaction_id_commits_once(subject: &Subject) {
    let store = &subject.store;
    let txn = Txn::random().create(key("/once"), "1");
    assert_eq!(store.outcome(txn.id).await.unwrap(), None);
    let first = committed(store.commit(txn.clone()).await.unwrap());
    put(subject, "/once", "2").await;
    assert_eq!(
        committed(store.commit(txn.clone()).await.unwrap()),
        first,
        "the guard would fail now, yet the id is known"
    );
    assert_eq!(value(subject, "/once").await.unwrap(), "2");
    assert_eq!(store.outcome(txn.id).await.unwrap(), Some(first));
    let failed = Txn::random().create(key("/once"), "3");
    assert!(store.commit(failed.clone()).await.unwrap().revision().is_none());
    assert_eq!(store.outcome(failed.id).await.unwrap(), None);
    let mut retried = Vec::new();
    let same = Txn::random().put(key("/same"), "x");
    for _ in 0..8 {
        let (store, same) = (Arc::clone(store), same.clone());
        retried.push(tokio::spawn(async move { committed(store.commit(same).await.unwrap()) }));
    }
    let mut revisions = Vec::new();
    for task in retried {
        revisions.push(task.await.unwrap());
    }
    revisions.dedup();
    assert_eq!(revisions.len(), 1, "eight copies of one request committed once");
}

/// Deleting what is not there, or only checking guards, succeeds without a new revision.
pub async fn what_changes_nothing_takes_no_revision(subject: &Subject) {
    let store = &subject.store;
    let now = put(subject, "/n", "1").await;
    assert_eq!(delete(subject, "/missing").await, now);
    let check = Txn::random().guard(Guard::Present(key("/n")));
    assert_eq!(committed(store.commit(check).await.unwrap()), now);
    assert_eq!(store.revision().await.unwrap(), now);
}

/// Of many that create the same key at once exactly one succeeds, and the others learn its revision.
pub async fn one_of_many_creators_wins(subject: &Subject) {
    let mut tasks = Vec::new();
    for n in 0..16 {
        let store = Arc::clone(&subject.store);
        tasks.push(tokio::spawn(async move {
            store.commit(Txn::random().create(key("/race"), format!("{n}"))).await.unwrap()
        }));
    }
    let (mut won, mut seen) = (Vec::new(), Vec::new());
    for task in tasks {
        match task.await.unwrap() {
            CommitOutcome::Committed(revision) => won.push(revision),
            CommitOutcome::GuardFailed { actual, .. } => seen.push(actual),
            CommitOutcome::Unknown(id) => panic!("{id} unknown"),
        }
    }
    assert_eq!((won.len(), seen.len()), (1, 15));
    assert!(seen.iter().all(|actual| *actual == Some(won[0])));
}

/// Read, add one, write guarded by the revision, from many tasks: the sum is exact.
pub async fn no_increment_is_lost(subject: &Subject) {
    put(subject, "/counter", "0").await;
    let mut tasks = Vec::new();
    for _ in 0..8 {
        let store = Arc::clone(&subject.store);
        tasks.push(tokio::spawn(async move {
            let mut last = Revision::ZERO;
            for _ in 0..10 {
                loop {
                    let entry = store.get(&key("/counter")).await.unwrap().unwrap();
                    assert!(entry.revision >= last, "a read went back in time");
                    let next = std::str::from_utf8(&entry.value).unwrap().parse::<u32>().unwrap() + 1;
                    let txn = Txn::random().replace(key("/counter"), entry.revision, next.to_string());
                    if let Some(revision) = store.commit(txn).await.unwrap().revision() {
                        last = revision;
                        break;
                    }
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(value(subject, "/counter").await.unwrap(), "80");
}
