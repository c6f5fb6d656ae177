//! Durable creates per second, beside the floor: bare redb writing the same keys and bytes with the same group commit.
//!
//! Both run in the same process, in turn, so that a busy machine slows both.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use redb::{Database, TableDefinition};
use tokio::sync::oneshot;

use crate::{Key, RedbOptions, RedbStore, Result, Store, StoreError, Txn};

const TABLE: TableDefinition<&str, &[u8]> = TableDefinition::new("raw");

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct CreatesOptions {
    /// Clients, each with one create under way.
    pub clients: u64,
    /// Turns of each side.
    pub rounds: usize,
    /// Creates in one turn.
    pub creates: u64,
    /// Bytes of each value.
    pub value_bytes: usize,
}

impl Default for CreatesOptions {
    /// 64 clients; 21 turns of 6,400 creates of 800 bytes, about the size of an instance.
    fn default() -> Self {
        Self { clients: 64, rounds: 21, creates: 6400, value_bytes: 800 }
    }
}

/// One side, medians over the turns.
#[derive(Clone, Copy, Debug, Default)]
pub struct Side {
    /// Creates acknowledged in a second.
    pub per_second: f64,
    /// Creates made durable by one fsync.
    pub per_fsync: f64,
}

/// The result.
#[derive(Clone, Copy, Debug)]
pub struct Creates {
    /// What was measured.
    pub options: CreatesOptions,
    /// This store.
    pub store: Side,
    /// Bare redb.
    pub raw: Side,
    /// Median of the ratios of neighbouring turns; more is better, the goal is 0.8.
    pub ratio: f64,
    /// Median time of one get through the store.
    pub get: Duration,
    /// Median time of one commit by a single client.
    pub single: Duration,
}

/// Measures in `dir`, which should lie on the disk that counts. Blocks; must not be called inside a tokio runtime.
///
/// # Errors
/// When the databases cannot be written.
pub fn durable_creates(dir: &Path, options: CreatesOptions) -> Result<Creates> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| StoreError::Io { action: "measure", path: dir.to_path_buf(), source })?;
    let store = Arc::new(RedbStore::open(&dir.join("bench-store.redb"), RedbOptions::default())?);
    let raw = Arc::new(Raw::open(&dir.join("bench-raw.redb"))?);
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let (mut our_fsyncs, mut their_batches) = (Vec::new(), Vec::new());
    runtime.block_on(async {
        for round in 0..options.rounds as u64 {
            let fsyncs = store.stats().await?.fsyncs;
            let batches = raw.batches.load(Ordering::Relaxed);
            let mut speeds = [0.0; 2];
            // Who goes first changes, so that neither always finds the disk tired.
            for side in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                speeds[side] = match side {
                    0 => storm(round, options, &store, create_in_store).await?,
                    _ => storm(round, options, &raw, create_in_raw).await?,
                };
            }
            ours.push(speeds[0]);
            theirs.push(speeds[1]);
            ratios.push(speeds[0] / speeds[1]);
            our_fsyncs.push(options.creates as f64 / (store.stats().await?.fsyncs - fsyncs).max(1) as f64);
            their_batches.push(options.creates as f64 / (raw.batches.load(Ordering::Relaxed) - batches).max(1) as f64);
        }
        let get = median(repeat(2000, || async { store.get(&name(0, 1)?).await.map(drop) }).await?);
        let single = median(
            repeat(500, || async { store.commit(Txn::random().put(name(u64::MAX, 0)?, "x")).await.map(drop) }).await?,
        );
        Ok(Creates {
            options,
            store: Side { per_second: median(ours), per_fsync: median(our_fsyncs) },
            raw: Side { per_second: median(theirs), per_fsync: median(their_batches) },
            ratio: median(ratios),
            get: Duration::from_secs_f64(get),
            single: Duration::from_secs_f64(single),
        })
    })
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(0.0)
}

async fn repeat<F: Future<Output = Result<()>>>(times: usize, work: impl Fn() -> F) -> Result<Vec<f64>> {
    let mut took = Vec::with_capacity(times);
    for _ in 0..times {
        let start = Instant::now();
        work().await?;
        took.push(start.elapsed().as_secs_f64());
    }
    Ok(took)
}

/// The key of one object: ids are ordered by time, as those of version 7 are, with a part that looks random.
fn name(round: u64, n: u64) -> Result<Key> {
    let noise = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    Key::new(format!("/instance/default/{round:08x}-{:04x}-7{:03x}-{noise:016x}", n >> 12, n & 0xfff))
}

/// Lets the clients create as fast as they can; creates per second.
async fn storm<S, F>(
    round: u64,
    options: CreatesOptions,
    on: &Arc<S>,
    create: fn(Arc<S>, Key, bytes::Bytes) -> F,
) -> Result<f64>
where
    S: Send + Sync + 'static,
    F: Future<Output = Result<()>> + Send + 'static,
{
    let value = bytes::Bytes::from(vec![b'v'; options.value_bytes]);
    let next = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let clients: Vec<_> = (0..options.clients)
        .map(|_| {
            let (on, next, value) = (Arc::clone(on), Arc::clone(&next), value.clone());
            tokio::spawn(async move {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= options.creates {
                        return Ok(());
                    }
                    create(Arc::clone(&on), name(round, n)?, value.clone()).await?;
                }
            })
        })
        .collect();
    for client in clients {
        client.await.map_err(|_| StoreError::Closed)??;
    }
    Ok(options.creates as f64 / start.elapsed().as_secs_f64())
}

async fn create_in_store(store: Arc<RedbStore>, key: Key, value: bytes::Bytes) -> Result<()> {
    let outcome = store.commit(Txn::random().create(key.clone(), value)).await?;
    match outcome.revision() {
        Some(_) => Ok(()),
        None => Err(StoreError::Codec { key, reason: format!("the create was refused: {outcome:?}") }),
    }
}

async fn create_in_raw(raw: Arc<Raw>, key: Key, value: bytes::Bytes) -> Result<()> {
    let (reply, answer) = oneshot::channel();
    raw.queue.send((key, value, reply)).map_err(|_| StoreError::Closed)?;
    answer.await.map_err(|_| StoreError::Closed)
}

type RawJob = (Key, bytes::Bytes, oneshot::Sender<()>);

/// The least that can be called durable: one thread, one table, one fsync for everything that waits.
struct Raw {
    queue: mpsc::Sender<RawJob>,
    batches: Arc<AtomicU64>,
}

impl Raw {
    fn open(path: &Path) -> Result<Self> {
        let fail = |error: redb::Error| StoreError::Corrupt { path: path.to_path_buf(), detail: error.to_string() };
        let database = Database::builder()
            .set_cache_size(RedbOptions::default().cache_bytes)
            .create(path)
            .map_err(|e| fail(e.into()))?;
        let (queue, jobs) = mpsc::channel();
        let batches = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&batches);
        std::thread::spawn(move || {
            if let Err(error) = write_raw(&database, &jobs, &counter) {
                tracing::error!(%error, "the floor of the measurement gave up");
            }
        });
        Ok(Self { queue, batches })
    }
}

fn write_raw(database: &Database, jobs: &mpsc::Receiver<RawJob>, batches: &AtomicU64) -> Result<(), redb::Error> {
    while let Ok(first) = jobs.recv() {
        let mut replies = Vec::new();
        let txn = database.begin_write()?;
        {
            let mut table = txn.open_table(TABLE)?;
            for (key, value, reply) in std::iter::once(first).chain(jobs.try_iter().take(511)) {
                table.insert(key.as_str(), &*value)?;
                replies.push(reply);
            }
        }
        txn.commit()?;
        batches.fetch_add(1, Ordering::Relaxed);
        for reply in replies {
            // A client that went away needs no answer.
            let _ = reply.send(());
        }
    }
    Ok(())
}
