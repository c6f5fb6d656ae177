//! The contract of [`Store`](crate::Store) as tests. Every backend passes all of them:
//!
//! ```ignore
//! oblak_store::conformance_tests!(async { Subject { store, ttl, _keep } });
//! ```
//!
//! They panic where the contract is broken, and use real time only for leases.
#![allow(clippy::unwrap_used, reason = "these are tests, compiled as a library so that other backends can run them")]

mod basics;
mod leases;
mod lists;
mod watches;

use std::any::Any;
use std::time::Duration;

use bytes::Bytes;

pub use self::basics::*;
pub use self::leases::*;
pub use self::lists::*;
pub use self::watches::*;
use crate::{CommitOutcome, Key, Prefix, Revision, SharedStore, Txn, WatchItem, WatchStream};

/// An empty store to be tested.
pub struct Subject {
    /// The store.
    pub store: SharedStore,
    /// Shortest time to live of a lease that this backend keeps reliably on a busy machine.
    pub ttl: Duration,
    /// Dropped after the test: directories, processes.
    pub keep: Box<dyn Any + Send + Sync>,
}

/// Longest that anything here may take on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Makes a `#[tokio::test]` of each case. `$make` is an expression that gives a future of a new [`Subject`]. With `together:` in front it is
/// an async closure instead, and the macro an expression that runs all cases one after the other, for backends that start slowly.
#[macro_export]
macro_rules! conformance_tests {
    (together: $make:expr) => { $crate::conformance_tests!(@cases together $make) };
    ($make:expr) => { $crate::conformance_tests! { @cases each $make } };
    (@cases $mode:ident $make:expr) => {
        $crate::conformance_tests! { @$mode $make;
            values_are_read_as_written, commits_are_all_or_nothing, guards_mean_what_they_say, limits_are_refused_with_the_count,
            a_transaction_id_commits_once, what_changes_nothing_takes_no_revision, one_of_many_creators_wins, no_increment_is_lost,
            pages_come_from_one_snapshot, prefixes_are_whole_segments, old_snapshots_show_deleted_and_replaced_values,
            foreign_revisions_are_compacted,
            watchers_lose_nothing_and_repeat_nothing, a_watch_resumes_where_it_stopped, a_late_watcher_reads_the_history,
            idle_watchers_learn_how_far_they_are, compaction_sends_readers_back_to_the_list,
            a_lease_takes_its_keys_with_it, renewing_keeps_a_lease_alive, revoking_ends_a_lease, a_key_leaves_its_lease
        }
    };
    (@each $make:expr; $($case:ident),*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $case() {
            let subject: $crate::conformance::Subject = $make.await;
            tokio::time::timeout($crate::conformance::DEADLINE, $crate::conformance::$case(&subject)).await.expect("finished in time");
        }
    )*};
    (@together $make:expr; $($case:ident),*) => {{
        let make = $make;
        $({
            let subject: $crate::conformance::Subject = make(stringify!($case)).await;
            let case = $crate::conformance::$case(&subject);
            tokio::time::timeout($crate::conformance::DEADLINE, case).await.expect(concat!(stringify!($case), " finished in time"));
        })*
    }};
}

pub(crate) fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

pub(crate) fn prefix(text: &str) -> Prefix {
    Prefix::new(text).unwrap()
}

pub(crate) async fn put(subject: &Subject, name: &str, value: impl Into<Bytes>) -> Revision {
    committed(subject.store.commit(Txn::random().put(key(name), value)).await.unwrap())
}

pub(crate) async fn delete(subject: &Subject, name: &str) -> Revision {
    committed(subject.store.commit(Txn::random().delete(key(name))).await.unwrap())
}

pub(crate) fn committed(outcome: CommitOutcome) -> Revision {
    match outcome {
        CommitOutcome::Committed(revision) => revision,
        other => panic!("not committed: {other:?}"),
    }
}

pub(crate) async fn value(subject: &Subject, name: &str) -> Option<String> {
    let entry = subject.store.get(&key(name)).await.unwrap()?;
    Some(String::from_utf8(entry.value.to_vec()).unwrap())
}

/// The next event, passing over progress marks.
pub(crate) async fn event(stream: &mut WatchStream) -> crate::WatchEvent {
    loop {
        if let WatchItem::Event(event) = stream.next().await.unwrap().unwrap() {
            return event;
        }
    }
}
