//! SIGKILL in the middle of a commit storm, again and again on the same file: what was acknowledged is there, the rest is absent or whole.
#![allow(clippy::unwrap_used, reason = "a test, helpers included")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use oblak_store::{Guard, HistoryLimits, Key, Prefix, RedbOptions, RedbStore, Revision, Store, Txn, TxnId, WatchItem};
use uuid::Uuid;

const ROUNDS: u32 = 18;
const WRITERS: u64 = 12;
const DIR: &str = "OBLAK_STORE_STORM_DIR";

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn open(dir: &Path) -> RedbStore {
    // Little history, so that trimming is killed too.
    let history = HistoryLimits { revisions: 400, ..HistoryLimits::default() };
    RedbStore::open(&dir.join("state.redb"), RedbOptions { history, ..RedbOptions::default() }).unwrap()
}

fn txn_id(writer: u64, n: u64) -> TxnId {
    TxnId(Uuid::from_u64_pair(writer + 1, n))
}

/// Not a test: the process that is killed. Writer `w` counts `n` up; commit `n` sets two halves and its own row, and removes an old row.
#[test]
fn storm() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let store = Arc::new(open(Path::new(&dir)));
    let out = Arc::new(Mutex::new(std::io::stdout()));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut tasks = Vec::new();
        for writer in 0..WRITERS {
            let (store, out) = (Arc::clone(&store), Arc::clone(&out));
            tasks.push(tokio::spawn(async move {
                let (left, right) = (key(&format!("/left/{writer}")), key(&format!("/right/{writer}")));
                let mut n = count(&*store, &left).await;
                let mut last = store.get(&left).await.unwrap().map(|entry| entry.revision);
                loop {
                    n += 1;
                    let guard =
                        last.map_or(Guard::Absent(left.clone()), |revision| Guard::Revision(left.clone(), revision));
                    let mut txn = Txn::new(txn_id(writer, n)).guard(guard);
                    txn = txn.put(left.clone(), n.to_string()).put(right.clone(), n.to_string());
                    txn = txn.put(key(&format!("/row/{writer}/{n:08}")), format!("{n} {}", "x".repeat(700)));
                    if n > 50 {
                        txn = txn.delete(key(&format!("/row/{writer}/{:08}", n - 50)));
                    }
                    let revision = store.commit(txn).await.unwrap().revision().expect("nobody else writes these keys");
                    last = Some(revision);
                    // One write(2) each: a line is whole or missing.
                    out.lock().unwrap().write_all(format!("\nack {writer} {n} {revision}\n").as_bytes()).unwrap();
                }
            }));
        }
        futures_util::future::try_join_all(tasks).await.unwrap();
    });
}

async fn count(store: &dyn Store, key: &Key) -> u64 {
    match store.get(key).await.unwrap() {
        Some(entry) => std::str::from_utf8(&entry.value).unwrap().parse().unwrap(),
        None => 0,
    }
}

struct Storm(Child);

impl Drop for Storm {
    fn drop(&mut self) {
        // Fails only when it is dead already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

type Acked = BTreeMap<u64, BTreeMap<u64, Revision>>;

/// Runs the storm, kills it after about `acks` acknowledgements and `delay`, and adds what it acknowledged.
fn storm_and_kill(dir: &Path, acks: usize, delay: Duration, acked: &mut Acked) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "storm", "--nocapture", "--test-threads=1"]).env(DIR, dir).stdout(Stdio::piped());
    let mut storm = Storm(command.spawn().unwrap());
    let lines = BufReader::new(storm.0.stdout.take().unwrap()).lines();
    let (mut seen, mut kill_at) = (0, None);
    for line in lines {
        let line = line.unwrap();
        let Some(rest) = line.strip_prefix("ack ") else { continue };
        let fields: Vec<_> = rest.split(' ').collect();
        let [writer, n, revision] = fields[..] else { continue };
        acked.entry(writer.parse().unwrap()).or_default().insert(n.parse().unwrap(), revision.parse().unwrap());
        seen += 1;
        if seen == acks {
            kill_at = Some(Instant::now() + delay);
        }
        if kill_at.is_some_and(|at| Instant::now() >= at) {
            storm.0.kill().unwrap();
            kill_at = None;
        }
    }
    assert!(seen >= acks, "the storm ended by itself after {seen} commits");
}

async fn verify(store: &dyn Store, acked: &Acked) {
    let head = store.revision().await.unwrap();
    for (writer, acks) in acked {
        let (&last, &revision) = acks.last_key_value().unwrap();
        let n = count(store, &key(&format!("/left/{writer}"))).await;
        assert!(n >= last, "writer {writer}: {last} was acknowledged, {n} is there");
        assert_eq!(count(store, &key(&format!("/right/{writer}"))).await, n, "half a commit");
        let rows = store.list(&Prefix::new(&format!("/row/{writer}")).unwrap(), 1000, None, None).await.unwrap();
        let expected: Vec<_> = (n.saturating_sub(49).max(1)..=n).map(|n| format!("/row/{writer}/{n:08}")).collect();
        assert_eq!(rows.entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), expected);
        for entry in rows.entries {
            let n: u64 = entry.key.last().parse().unwrap();
            assert!(entry.value.starts_with(format!("{n} x").as_bytes()) && entry.value.len() > 700);
            if let Some(acked) = acks.get(&n) {
                assert_eq!(entry.revision, *acked);
            }
        }
        assert_eq!(store.outcome(txn_id(*writer, last)).await.unwrap(), Some(revision));
        assert_eq!(store.outcome(txn_id(*writer, n + 1)).await.unwrap(), None);
        assert!(revision <= head);
    }
    history_is_whole(store, head).await;
}

/// From the oldest revision kept, list and watch together lead to what is there now.
async fn history_is_whole(store: &dyn Store, head: Revision) {
    let oldest = store.stats().await.unwrap().oldest;
    let entries = |page: oblak_store::Page| {
        page.entries.into_iter().map(|entry| (entry.key, entry.value)).collect::<BTreeMap<_, _>>()
    };
    let mut state = entries(store.list(&Prefix::all(), 10_000, None, Some(oldest)).await.unwrap());
    let mut stream = store.watch(&Prefix::all(), oldest).await.unwrap();
    let mut at = oldest;
    while at < head {
        let WatchItem::Event(event) = stream.next().await.unwrap().unwrap() else { panic!("no event after {at}") };
        assert_eq!(event.revision.n, at.n + 1, "a revision is missing");
        at = event.revision;
        for change in event.changes {
            match change.value {
                Some(value) => drop(state.insert(change.key, value)),
                None => drop(state.remove(&change.key)),
            }
        }
    }
    assert_eq!(state, entries(store.list(&Prefix::all(), 10_000, None, None).await.unwrap()));
}

#[test]
fn killed_in_a_storm_of_commits() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut acked = Acked::new();
    let mut chance = u64::from(std::process::id());
    for round in 0..ROUNDS {
        chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let acks = usize::try_from((chance >> 33) % 400).unwrap() + 1;
        let delay = Duration::from_micros((chance >> 45) % 3000);
        storm_and_kill(dir.path(), acks, delay, &mut acked);
        let store = open(dir.path());
        runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(60), verify(&store, &acked)).await.expect("verified in time");
        });
        println!("round {round}: killed after {acks} acknowledgements and {delay:?}");
    }
    assert!(acked.values().map(BTreeMap::len).sum::<usize>() > 500);
    // The child was killed while creating, opening or trimming too; nothing is left beside the database.
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["state.redb"]);
}
