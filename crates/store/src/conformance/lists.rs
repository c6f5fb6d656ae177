//! Lists: order, pages, snapshots.

use std::sync::Arc;

use super::{Subject, delete, key, prefix, put};
use crate::{Entry, Key, Revision, StoreError, WatchError};

async fn all_pages(subject: &Subject, below: &str, limit: usize, at: Revision) -> Vec<Entry> {
    let (mut entries, mut after): (Vec<Entry>, Option<Key>) = (Vec::new(), None);
    loop {
        let page = subject.store.list(&prefix(below), limit, after, Some(at)).await.unwrap();
        assert!(page.entries.len() <= limit && page.revision == at);
        entries.extend(page.entries);
        after = entries.last().map(|entry| entry.key.clone());
        if !page.more {
            return entries;
        }
    }
}

fn names(entries: &[Entry]) -> Vec<&str> {
    entries.iter().map(|entry| entry.key.as_str()).collect()
}

/// Pages of a list all show the state of the first one, whatever is committed meanwhile.
pub async fn pages_come_from_one_snapshot(subject: &Subject) {
    for n in 0..25 {
        put(subject, &format!("/p/{n:02}"), format!("old {n}")).await;
    }
    let first = subject.store.list(&prefix("/p"), 10, None, None).await.unwrap();
    assert!(first.more && first.entries.len() == 10);
    let store = Arc::clone(&subject.store);
    let writer = tokio::spawn(async move {
        for n in 0..25 {
            let txn = match n % 3 {
                0 => crate::Txn::random().delete(key(&format!("/p/{n:02}"))),
                1 => crate::Txn::random().put(key(&format!("/p/{n:02}")), "new"),
                _ => crate::Txn::random().put(key(&format!("/p/{n:02}x")), "between"),
            };
            assert!(store.commit(txn).await.unwrap().revision().is_some());
        }
    });
    let during = all_pages(subject, "/p", 7, first.revision).await;
    writer.await.unwrap();
    let after = all_pages(subject, "/p", 4, first.revision).await;
    let expected: Vec<_> = (0..25).map(|n| format!("/p/{n:02}")).collect();
    for entries in [&during, &after] {
        assert_eq!(names(entries), expected);
        assert!(entries.iter().enumerate().all(|(n, entry)| entry.value == format!("old {n}")));
    }
    let now = subject.store.list(&prefix("/p"), 1000, None, None).await.unwrap();
    assert_eq!((now.entries.len(), now.more), (25 - 9 + 8, false));
}

/// A prefix matches whole segments; a start beyond it gives an empty page.
pub async fn prefixes_are_whole_segments(subject: &Subject) {
    for name in ["/node", "/node/a", "/node/b/c", "/nodes/x", "/nod/y", "/node.z/1", "/a", "/z"] {
        put(subject, name, name).await;
    }
    let list = |below: &'static str, after: Option<&'static str>| async move {
        let page = subject.store.list(&prefix(below), 100, after.map(key), None).await.unwrap();
        page.entries.into_iter().map(|entry| entry.key.as_str().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(list("/node", None).await, ["/node/a", "/node/b/c"]);
    assert_eq!(list("/node/", Some("/node/a")).await, ["/node/b/c"]);
    assert_eq!(list("/node", Some("/a")).await, ["/node/a", "/node/b/c"]);
    assert!(list("/node", Some("/z")).await.is_empty());
    assert!(list("/none", None).await.is_empty());
    assert_eq!(list("/", None).await.len(), 8);
}

/// A list of the past shows what was there then, not what is there now.
pub async fn old_snapshots_show_deleted_and_replaced_values(subject: &Subject) {
    put(subject, "/s/a", "1").await;
    let both = put(subject, "/s/b", "1").await;
    let changed = put(subject, "/s/a", "2").await;
    let without = delete(subject, "/s/b").await;
    put(subject, "/s/b", "again").await;
    let at = |revision| async move {
        let entries = all_pages(subject, "/s", 1, revision).await;
        entries
            .iter()
            .map(|entry| format!("{}={}", entry.key, String::from_utf8_lossy(&entry.value)))
            .collect::<Vec<_>>()
    };
    assert_eq!(at(both).await, ["/s/a=1", "/s/b=1"]);
    assert_eq!(at(changed).await, ["/s/a=2", "/s/b=1"]);
    assert_eq!(at(without).await, ["/s/a=2"]);
}

/// Revisions of another incarnation, or of the future, are never answered with data.
pub async fn foreign_revisions_are_compacted(subject: &Subject) {
    let now = put(subject, "/f", "1").await;
    for foreign in [Revision::new(now.incarnation + 1, now.n), Revision::new(now.incarnation, now.n + 1)] {
        assert!(matches!(
            subject.store.list(&prefix("/"), 1, None, Some(foreign)).await,
            Err(StoreError::Compacted { .. })
        ));
        assert!(matches!(subject.store.watch(&prefix("/"), foreign).await, Err(WatchError::Compacted { .. })));
    }
}
