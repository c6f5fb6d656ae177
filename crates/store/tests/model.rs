//! Random operations against a plain map: whatever the order, a backend answers as the map does, now and for every past revision.
#![allow(clippy::unwrap_used, reason = "a test, helpers included")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use oblak_store::{
    CommitOutcome, Guard, Key, LeaseId, MemoryStore, Prefix, RedbOptions, RedbStore, Revision, Store, Txn, WatchItem,
    Write,
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Commit { guards: Vec<(u8, u8)>, writes: Vec<(u8, Option<u8>, bool)> },
    Revoke,
    Compact(u8),
    Page { at: u8, limit: usize, folder: u8 },
    Reopen,
}

fn ops(len: usize) -> impl Strategy<Value = Vec<Op>> {
    let commit = (
        prop::collection::vec((0..4u8, 0..6u8), 0..3),
        prop::collection::vec((0..6u8, prop::option::weighted(0.7, any::<u8>()), prop::bool::weighted(0.2)), 0..4),
    )
        .prop_map(|(guards, writes)| Op::Commit { guards, writes });
    let op = prop_oneof![
        12 => commit,
        1 => Just(Op::Revoke),
        1 => any::<u8>().prop_map(Op::Compact),
        4 => (any::<u8>(), 1..4usize, 0..4u8).prop_map(|(at, limit, folder)| Op::Page { at, limit, folder }),
        1 => Just(Op::Reopen),
    ];
    prop::collection::vec(op, 1..len)
}

fn key(n: u8) -> Key {
    Key::new(["/a/1", "/a/2", "/a/2/x", "/a2/1", "/b/1", "/b/2"][usize::from(n)]).unwrap()
}

type State = BTreeMap<Key, (u8, Revision, Revision, bool)>;

struct Model {
    /// State after each revision, from the compaction floor on.
    states: BTreeMap<Revision, State>,
    lease: LeaseId,
}

impl Model {
    fn now(&self) -> (Revision, &State) {
        let (revision, state) = self.states.last_key_value().unwrap();
        (*revision, state)
    }

    fn nth(&self, n: u8) -> Revision {
        *self.states.keys().nth(usize::from(n) % self.states.len()).unwrap()
    }

    fn holds(&self, guard: &Guard) -> bool {
        let (_, state) = self.now();
        match guard {
            Guard::Revision(key, wanted) => state.get(key).is_some_and(|found| found.1 == *wanted),
            Guard::Absent(key) => !state.contains_key(key),
            Guard::Present(key) => state.contains_key(key),
            Guard::LeaseAlive(id) => *id == self.lease,
        }
    }

    fn guard(&self, kind: u8, n: u8) -> Guard {
        let found = self.now().1.get(&key(n)).map(|found| found.1);
        match kind {
            0 => Guard::Absent(key(n)),
            1 => Guard::Present(key(n)),
            2 => Guard::Revision(
                key(n),
                if n.is_multiple_of(2) { found.unwrap_or(Revision::ZERO) } else { Revision::new(1, u64::from(n)) },
            ),
            _ => Guard::LeaseAlive(if n < 5 { self.lease } else { LeaseId(1) }),
        }
    }

    /// What the writes make of the state; none when they change nothing.
    fn written(&self, writes: &[Write]) -> Option<(Revision, State)> {
        let (revision, state) = self.now();
        let next = Revision::new(revision.incarnation, revision.n + 1);
        let mut after = state.clone();
        for write in writes {
            match write {
                Write::Put { key, value, lease } => {
                    let created = state.get(key).map_or(next, |found| found.2);
                    after.insert(key.clone(), (value[0], next, created, lease.is_some()));
                }
                Write::Delete { key } => drop(after.remove(key)),
            }
        }
        (after != *state).then_some((next, after))
    }
}

async fn check(mut store: Arc<dyn Store>, reopen: &dyn Fn(Arc<dyn Store>) -> Arc<dyn Store>, ops: Vec<Op>) {
    let lease = store.grant(Duration::from_secs(3600)).await.unwrap().id;
    let start = store.revision().await.unwrap();
    let mut model = Model { states: BTreeMap::from([(start, State::new())]), lease };
    for op in ops {
        match op {
            Op::Commit { guards, writes } => commit(&*store, &mut model, &guards, &writes).await,
            Op::Revoke => {
                store.revoke(model.lease).await.unwrap();
                let deletes: Vec<_> = model
                    .now()
                    .1
                    .iter()
                    .filter(|(_, found)| found.3)
                    .map(|(key, _)| Write::Delete { key: key.clone() })
                    .collect();
                if let Some((revision, state)) = model.written(&deletes) {
                    model.states.insert(revision, state);
                }
                model.lease = store.grant(Duration::from_secs(3600)).await.unwrap().id;
            }
            Op::Compact(at) => {
                let keep = model.nth(at);
                store.compact(keep).await.unwrap();
                model.states = model.states.split_off(&keep);
            }
            Op::Page { at, limit, folder } => page(&*store, &model, at, limit, folder).await,
            Op::Reopen => store = reopen(store),
        }
        assert_eq!(store.revision().await.unwrap(), model.now().0);
    }
    for n in 0..6 {
        let found = store.get(&key(n)).await.unwrap().map(|entry| (entry.value[0], entry.revision, entry.created));
        assert_eq!(found, model.now().1.get(&key(n)).map(|found| (found.0, found.1, found.2)));
    }
    replay(&*store, &model).await;
}

async fn commit(store: &dyn Store, model: &mut Model, guards: &[(u8, u8)], writes: &[(u8, Option<u8>, bool)]) {
    let mut txn = Txn::random();
    txn.guards = guards.iter().map(|(kind, n)| model.guard(*kind, *n)).collect();
    let mut seen = std::collections::BTreeSet::new();
    for (n, value, leased) in writes.iter().filter(|(n, ..)| seen.insert(*n)) {
        txn = match value {
            Some(value) => {
                txn.write(Write::Put { key: key(*n), value: vec![*value].into(), lease: leased.then_some(model.lease) })
            }
            None => txn.delete(key(*n)),
        };
    }
    let failing = txn.guards.iter().position(|guard| !model.holds(guard));
    let expected = match failing {
        Some(index) => {
            let guard = txn.guards[index].clone();
            let actual = match &guard {
                Guard::Revision(key, _) | Guard::Absent(key) | Guard::Present(key) => {
                    model.now().1.get(key).map(|found| found.1)
                }
                Guard::LeaseAlive(_) => None,
            };
            CommitOutcome::GuardFailed { index, guard, actual }
        }
        None => {
            if let Some((revision, state)) = model.written(&txn.writes) {
                model.states.insert(revision, state);
            }
            CommitOutcome::Committed(model.now().0)
        }
    };
    assert_eq!(store.commit(txn).await.unwrap(), expected);
}

async fn page(store: &dyn Store, model: &Model, at: u8, limit: usize, folder: u8) {
    let at = model.nth(at);
    let prefix = Prefix::new(["/", "/a", "/b", "/a/2"][usize::from(folder)]).unwrap();
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = store.list(&prefix, limit, after, Some(at)).await.unwrap();
        assert!(page.entries.len() <= limit && page.revision == at);
        found.extend(
            page.entries.iter().map(|entry| (entry.key.clone(), entry.value[0], entry.revision, entry.created)),
        );
        after = found.last().map(|entry| entry.0.clone());
        if !page.more {
            break;
        }
    }
    let expected: Vec<_> = model.states[&at]
        .iter()
        .filter(|(key, _)| prefix.contains(key))
        .map(|(key, state)| (key.clone(), state.0, state.1, state.2))
        .collect();
    assert_eq!(found, expected, "below {prefix} at {at}");
}

/// The watch from the floor leads through every later state.
async fn replay(store: &dyn Store, model: &Model) {
    let (floor, mut state) =
        model.states.first_key_value().map(|(revision, state)| (*revision, state.clone())).unwrap();
    let mut stream = store.watch(&Prefix::all(), floor).await.unwrap();
    for (revision, expected) in model.states.iter().skip(1) {
        let WatchItem::Event(event) = stream.next().await.unwrap().unwrap() else { panic!("{revision} is missing") };
        assert_eq!(event.revision, *revision);
        for change in event.changes {
            assert_eq!(change.prev, state.get(&change.key).map(|found| found.1));
            match change.value {
                Some(value) => {
                    let leased = expected.get(&change.key).is_some_and(|found| found.3);
                    state.insert(change.key, (value[0], event.revision, change.created, leased));
                }
                None => drop(state.remove(&change.key)),
            }
        }
        assert_eq!(state, *expected, "at {revision}");
    }
}

fn block_on(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(30), future).await.expect("finished in time") });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn memory_answers_as_a_map_would(ops in ops(60)) {
        block_on(check(Arc::new(MemoryStore::new()), &|store| store, ops));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn redb_answers_as_a_map_would_across_restarts(ops in ops(60)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        let open = || -> Arc<dyn Store> { Arc::new(RedbStore::open(&path, RedbOptions::default()).unwrap()) };
        block_on(check(open(), &|store| { drop(store); open() }, ops));
    }
}
