//! Power loss: of what was written since the last fsync any part may be on the disk. Every such disk must open and hold what was acknowledged.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::conformance::{key, prefix};
use crate::redb::backend::{Meter, Traced};
use crate::redb::{RedbOptions, RedbStore};
use crate::{Store, Txn};

const WRITERS: u64 = 8;
const COMMITS: u64 = 12;
const CUTS: usize = 60;

/// An xorshift generator: the chances of one run are the same in each.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }
}

fn play(disk: &mut Vec<u8>, op: &Traced) {
    match op {
        Traced::Write(offset, data) => {
            let at = usize::try_from(*offset).unwrap();
            if disk.len() < at + data.len() {
                disk.resize(at + data.len(), 0);
            }
            disk[at..at + data.len()].copy_from_slice(data);
        }
        Traced::SetLen(len) => disk.resize(usize::try_from(*len).unwrap(), 0),
        Traced::Sync => {}
    }
}

/// The disk when the power fails after `cut` operations: everything up to the last sync, and some of what came after, in any selection.
fn disk_after(before: &[u8], trace: &[Traced], cut: usize, chance: &mut Chance) -> Vec<u8> {
    let mut disk = before.to_vec();
    let synced = trace[..cut].iter().rposition(|op| matches!(op, Traced::Sync)).map_or(0, |at| at + 1);
    trace[..synced].iter().for_each(|op| play(&mut disk, op));
    for op in &trace[synced..cut] {
        // The length is metadata that fdatasync(2) orders; here it reaches the disk.
        if matches!(op, Traced::SetLen(_)) || chance.below(2) == 0 {
            play(&mut disk, op);
        }
    }
    disk
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_any_selection_of_unsynced_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    drop(RedbStore::open(&path, RedbOptions::default()).unwrap());
    let before = std::fs::read(&path).unwrap();
    let meter = Arc::new(Meter::default());
    *meter.trace.lock().unwrap() = Some(Vec::new());
    let store = Arc::new(RedbStore::open_metered(&path, RedbOptions::default(), Arc::clone(&meter)).unwrap());
    let traced = |meter: &Meter| meter.trace.lock().unwrap().as_ref().map_or(0, Vec::len);
    // For each commit: how many operations had reached the file when it was acknowledged.
    let acked: Arc<Vec<Vec<AtomicUsize>>> =
        Arc::new((0..WRITERS).map(|_| (0..COMMITS).map(|_| AtomicUsize::new(usize::MAX)).collect()).collect());
    let mut tasks = Vec::new();
    for writer in 0..WRITERS {
        let (store, meter, acked) = (Arc::clone(&store), Arc::clone(&meter), Arc::clone(&acked));
        tasks.push(tokio::spawn(async move {
            for n in 0..COMMITS {
                let txn = Txn::random()
                    .put(key(&format!("/left/{writer}")), n.to_string())
                    .put(key(&format!("/right/{writer}")), n.to_string());
                let txn = txn.put(key(&format!("/row/{writer}/{n}")), "x".repeat(900));
                store.commit(txn).await.unwrap().revision().unwrap();
                acked[writer as usize][n as usize].store(traced(&meter), Ordering::SeqCst);
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    drop(store);
    let trace = meter.trace.lock().unwrap().take().unwrap();
    let mut chance = Chance(0x9e37_79b9_7f4a_7c15);
    for round in 0..CUTS {
        let cut = chance.below(trace.len()) + 1;
        let copy = dir.path().join(format!("cut-{round}.redb"));
        std::fs::write(&copy, disk_after(&before, &trace, cut, &mut chance)).unwrap();
        let store = RedbStore::open(&copy, RedbOptions::default())
            .unwrap_or_else(|error| panic!("cut at {cut} of {}: {error}", trace.len()));
        for (writer, acks) in acked.iter().enumerate() {
            let count = |name: String| {
                let store = &store;
                async move {
                    let entry = store.get(&key(&name)).await.unwrap()?;
                    std::str::from_utf8(&entry.value).unwrap().parse::<usize>().ok()
                }
            };
            let left = count(format!("/left/{writer}")).await;
            assert_eq!(count(format!("/right/{writer}")).await, left, "half a commit at {cut}");
            let rows = store.list(&prefix(&format!("/row/{writer}")), 1000, None, None).await.unwrap().entries;
            assert_eq!(rows.len(), left.map_or(0, |n| n + 1));
            let durable = acks.iter().filter(|at| at.load(Ordering::SeqCst) <= cut).count();
            assert!(
                rows.len() >= durable,
                "{durable} commits were acknowledged before {cut}, {} are there",
                rows.len()
            );
        }
        drop(store);
        std::fs::remove_file(&copy).unwrap();
    }
}
