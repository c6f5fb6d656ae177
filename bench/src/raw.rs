//! The floor of durability: raw redb, one thread, one table, one fsync for whatever waits.

use std::path::Path;
use std::sync::mpsc;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use oblak_store::{Key, RedbOptions};
use redb::{Database, TableDefinition};
use tokio::sync::oneshot;

const TABLE: TableDefinition<&str, &[u8]> = TableDefinition::new("raw");
/// Transactions made durable by one fsync, at most: as many as our writer takes.
const BATCH: usize = 512;

/// What is written together.
pub type Writes = Vec<(Key, Bytes)>;

/// A database with one writer.
pub struct Raw {
    queue: mpsc::Sender<(Writes, oneshot::Sender<()>)>,
}

impl Raw {
    /// A new database.
    pub fn open(path: &Path) -> Result<Self> {
        let cache = RedbOptions::default().cache_bytes;
        let database = Database::builder().set_cache_size(cache).create(path).context("cannot make a database")?;
        let (queue, jobs) = mpsc::channel();
        std::thread::spawn(move || {
            // Without its writer every commit fails, which is how this error is seen.
            if let Err(error) = write(&database, &jobs) {
                eprintln!("raw redb: {error}");
            }
        });
        Ok(Self { queue })
    }

    /// Returns when the writes are durable.
    pub async fn commit(&self, writes: Writes) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.queue.send((writes, reply)).ok().context("the writer has ended")?;
        answer.await.context("the writer has ended")
    }
}

fn write(database: &Database, jobs: &mpsc::Receiver<(Writes, oneshot::Sender<()>)>) -> Result<(), redb::Error> {
    while let Ok(first) = jobs.recv() {
        let mut replies = Vec::new();
        let txn = database.begin_write()?;
        {
            let mut table = txn.open_table(TABLE)?;
            for (writes, reply) in std::iter::once(first).chain(jobs.try_iter().take(BATCH - 1)) {
                for (key, value) in &writes {
                    table.insert(key.as_str(), &**value)?;
                }
                replies.push(reply);
            }
        }
        txn.commit()?;
        // A client that went away needs no answer.
        for reply in replies {
            let _ = reply.send(());
        }
    }
    Ok(())
}
