//! Leases: life, death, and what dies with them.

use std::time::{Duration, Instant};

use super::{DEADLINE, Subject, committed, key, prefix, put, value};
use crate::{Guard, LeaseId, Revision, StoreError, Txn, WatchItem};

async fn put_leased(subject: &Subject, name: &str, lease: LeaseId) -> Revision {
    committed(subject.store.commit(Txn::random().put_leased(key(name), "leased", lease)).await.unwrap())
}

async fn alive(subject: &Subject, lease: LeaseId) -> bool {
    subject.store.commit(Txn::random().guard(Guard::LeaseAlive(lease))).await.unwrap().revision().is_some()
}

async fn until_gone(subject: &Subject, name: &str) {
    let start = Instant::now();
    while value(subject, name).await.is_some() {
        assert!(start.elapsed() < DEADLINE, "{name} outlived its lease");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// An expired lease is gone for guards and renewal, and all its keys are deleted, more than fit one transaction too.
pub async fn a_lease_takes_its_keys_with_it(subject: &Subject) {
    let store = &subject.store;
    let start = put(subject, "/stays", "x").await;
    let granted = Instant::now();
    let lease = store.grant(subject.ttl).await.unwrap();
    assert_eq!(lease.ttl, subject.ttl);
    for half in 0..2 {
        let range = half * 80..(half + 1) * 80;
        let txn = range.fold(Txn::random(), |txn, n| txn.put_leased(key(&format!("/leased/{n:03}")), "x", lease.id));
        committed(store.commit(txn).await.unwrap());
    }
    until_gone(subject, "/leased/159").await;
    assert!(granted.elapsed() >= subject.ttl, "the lease ended early");
    assert!(!alive(subject, lease.id).await);
    assert!(matches!(store.renew(lease.id).await, Err(StoreError::LeaseGone(id)) if id == lease.id));
    let late = store.commit(Txn::random().put_leased(key("/late"), "x", lease.id)).await;
    assert!(matches!(late, Err(StoreError::LeaseGone(_))), "{late:?}");
    assert_eq!((value(subject, "/late").await, value(subject, "/stays").await.as_deref()), (None, Some("x")));
    assert!(store.list(&prefix("/leased"), 1, None, None).await.unwrap().entries.is_empty());
    let (mut deleted, mut stream) = (0, store.watch(&prefix("/leased"), start).await.unwrap());
    while deleted < 160 {
        if let WatchItem::Event(event) = stream.next().await.unwrap().unwrap() {
            deleted += event.changes.iter().filter(|change| change.value.is_none()).count();
        }
    }
    assert_eq!(store.stats().await.unwrap().leases, 0);
}

/// Renewal starts the life anew, as often as wanted.
pub async fn renewing_keeps_a_lease_alive(subject: &Subject) {
    let lease = subject.store.grant(subject.ttl).await.unwrap();
    put_leased(subject, "/renewed", lease.id).await;
    let start = Instant::now();
    while start.elapsed() < subject.ttl * 2 {
        assert_eq!(subject.store.renew(lease.id).await.unwrap(), lease);
        assert!(alive(subject, lease.id).await);
        tokio::time::sleep(subject.ttl / 10).await;
    }
    assert!(value(subject, "/renewed").await.is_some());
    until_gone(subject, "/renewed").await;
}

/// Revocation acts at once; revoking twice is harmless; names are not used again.
pub async fn revoking_ends_a_lease(subject: &Subject) {
    let lease = subject.store.grant(DEADLINE * 10).await.unwrap();
    let other = subject.store.grant(DEADLINE * 10).await.unwrap();
    assert_ne!(lease.id, other.id);
    put_leased(subject, "/revoked", lease.id).await;
    put_leased(subject, "/kept", other.id).await;
    for _ in 0..2 {
        subject.store.revoke(lease.id).await.unwrap();
    }
    assert_eq!(value(subject, "/revoked").await, None);
    assert!(!alive(subject, lease.id).await && alive(subject, other.id).await);
    assert!(value(subject, "/kept").await.is_some());
}

/// A put without lease frees the key; a put with another lease moves it.
pub async fn a_key_leaves_its_lease(subject: &Subject) {
    let first = subject.store.grant(DEADLINE * 10).await.unwrap();
    let second = subject.store.grant(DEADLINE * 10).await.unwrap();
    for name in ["/freed", "/moved", "/deleted"] {
        put_leased(subject, name, first.id).await;
    }
    put(subject, "/freed", "free").await;
    put_leased(subject, "/moved", second.id).await;
    committed(subject.store.commit(Txn::random().delete(key("/deleted"))).await.unwrap());
    put(subject, "/deleted", "new life").await;
    subject.store.revoke(first.id).await.unwrap();
    for name in ["/freed", "/moved", "/deleted"] {
        assert!(value(subject, name).await.is_some(), "{name}");
    }
    subject.store.revoke(second.id).await.unwrap();
    assert_eq!(value(subject, "/moved").await, None);
}
