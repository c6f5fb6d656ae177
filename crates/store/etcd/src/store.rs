//! The store itself: what its parts share, and the trait on top of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::GetOptions;
use oblak_platform::random::SharedRandom;
use oblak_store::{
    CommitOutcome, Entry, Key, Lease, LeaseId, Page, Prefix, Result, Revision, Store, StoreError, StoreStats, Txn,
    TxnId, WatchError, WatchStream,
};
use tokio::task::JoinHandle;

use crate::cluster::Cluster;
use crate::failure::{Failure, Kind};
use crate::hub::Hub;
use crate::keys::Space;
use crate::meta::{self, Known};
use crate::{EtcdOptions, commit, janitor, leases, read, watcher};

/// What every part needs.
pub struct Core {
    pub cluster: Cluster,
    pub space: Space,
    pub hub: Arc<Hub>,
    pub random: SharedRandom,
    known: RwLock<Known>,
    commits: AtomicU64,
}

impl Core {
    /// What is known of the cloud at the moment.
    pub fn known(&self) -> Known {
        self.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over what was read, unless something newer is known. A new life of the store ends all watches.
    pub fn adopt(&self, read: Known) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if read.modified <= known.modified {
            return;
        }
        let reborn = read.meta.incarnation != known.meta.incarnation;
        let begins = Revision::new(read.meta.incarnation, u64::try_from(read.modified).unwrap_or(0));
        *known = read;
        drop(known);
        if reborn {
            tracing::warn!(incarnation = begins.incarnation, "the store began a new incarnation");
            self.hub.reset(begins);
        }
    }

    /// A revision of etcd as one of the store.
    pub fn revision(&self, n: i64) -> Revision {
        self.at(u64::try_from(n).unwrap_or(0))
    }

    /// As [`Core::revision`].
    pub fn at(&self, n: u64) -> Revision {
        let incarnation = self.known.read().unwrap_or_else(PoisonError::into_inner).meta.incarnation;
        Revision::new(incarnation, n)
    }

    /// Oldest revision that lists and watches may name.
    pub fn oldest(&self) -> Revision {
        self.at(self.hub.floor())
    }

    /// Counts a commit that wrote.
    pub fn count_commit(&self) {
        self.commits.fetch_add(1, Ordering::Relaxed);
    }

    /// How many commits this process made.
    pub fn commits(&self) -> u64 {
        self.commits.load(Ordering::Relaxed)
    }
}

/// The store. Dropping it ends its watches; what was committed stays.
pub struct EtcdStore {
    pub(crate) core: Arc<Core>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for EtcdStore {
    fn drop(&mut self) {
        self.core.hub.close();
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl EtcdStore {
    /// Connects, and makes the cloud where there is none below the prefix. Must be called inside a tokio runtime, which then follows etcd.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] when no server answers within 10 s, [`StoreError::Refused`] when the options or credentials are wrong or
    /// the data are of another program version.
    pub async fn open(options: EtcdOptions) -> Result<Self> {
        let cluster = Cluster::new(&options)?;
        let space = Space::new(&options.prefix);
        let known = meta::open(&cluster, &space, options.first_incarnation).await?;
        // The log is followed from a revision that is in it.
        let start = janitor::tick(&cluster, &space).await.map_err(Failure::into_store_error)?;
        let hub = Hub::new(known.meta.incarnation, start);
        let core = Arc::new(Core {
            cluster,
            space,
            hub,
            random: options.random,
            known: RwLock::new(known),
            commits: AtomicU64::new(0),
        });
        let mut tasks = vec![
            tokio::spawn(janitor::follow(Arc::clone(&core), start)),
            tokio::spawn(janitor::nudge(Arc::clone(&core))),
            tokio::spawn(janitor::forget(Arc::clone(&core))),
        ];
        if let Some(limits) = options.history {
            tasks.push(tokio::spawn(janitor::compact(Arc::clone(&core), limits, options.clock)));
        }
        Ok(Self { core, tasks })
    }

    /// Begins a new incarnation, as after a restore from a backup: leases end with their keys, revisions and watches of before are answered
    /// with `Compacted`. A restore that gives the cluster a new identity (etcd's `--initial-cluster-token`) does this by itself when the
    /// store is opened.
    ///
    /// # Errors
    /// When etcd does not answer, or somebody else did the same at the same time.
    pub async fn new_incarnation(&self) -> Result<Revision> {
        let known = self.core.known();
        let next =
            meta::next_incarnation(&self.core.cluster, &self.core.space, known.clone(), &known.meta.cluster).await?;
        self.core.adopt(next);
        leases::revoke_all(&self.core.cluster, &self.core.space).await?;
        self.revision().await
    }

    /// Uses other servers of the same cluster, or other certificates, from now on: members come and go, certificates are renewed. Watches
    /// and calls under way are left alone.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when the options contradict each other; nothing is changed then.
    pub fn retarget(&self, options: &EtcdOptions, same_certificates: bool) -> Result<()> {
        self.core.cluster.retarget(options, same_certificates)
    }

    /// The servers that are used.
    pub fn endpoints(&self) -> Vec<String> {
        self.core.cluster.urls()
    }

    /// Number of keys in a range.
    async fn count(&self, (start, end): (Vec<u8>, Vec<u8>)) -> Result<u64> {
        let options = GetOptions::new().with_range(end).with_count_only();
        let answer = self.core.cluster.call(|mut client| {
            let (start, options) = (start.clone(), options.clone());
            async move { client.get(start, Some(options)).await }
        });
        let answer = answer.await.map_err(Failure::into_store_error)?;
        self.core.cluster.note(answer.header()).map_err(Failure::into_store_error)?;
        Ok(u64::try_from(answer.count()).unwrap_or(0))
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &Key) -> Result<Option<Entry>> {
        read::get(&self.core, key).await
    }

    async fn list(
        &self,
        prefix: &Prefix,
        limit: usize,
        start_after: Option<Key>,
        at: Option<Revision>,
    ) -> Result<Page> {
        read::list(&self.core, prefix, limit, start_after, at).await
    }

    async fn commit(&self, txn: Txn) -> Result<CommitOutcome> {
        commit::commit(&self.core, txn).await
    }

    async fn outcome(&self, id: TxnId) -> Result<Option<Revision>> {
        commit::outcome(&self.core, id).await
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<WatchStream, WatchError> {
        let known = self.core.known();
        let gone = || WatchError::Compacted { oldest: self.core.oldest() };
        let from = match from {
            // Nothing was there before the cloud was made.
            Revision::ZERO => self.core.revision(known.created),
            from if from.incarnation == known.meta.incarnation => from,
            _ => return Err(gone()),
        };
        if !self.core.hub.covers(from.n) && !read::is_kept(&self.core, from.n).await? {
            return Err(gone());
        }
        Ok(watcher::watch(Arc::clone(&self.core), prefix, from))
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        leases::grant(&self.core, ttl).await
    }

    async fn renew(&self, id: LeaseId) -> Result<Lease> {
        leases::renew(&self.core, id).await
    }

    async fn revoke(&self, id: LeaseId) -> Result<()> {
        leases::revoke(&self.core.cluster, id).await
    }

    async fn revision(&self) -> Result<Revision> {
        let n = read::newest(&self.core).await?;
        // Whoever asks will wait until a cache is that far; where others write to etcd too, it would never be.
        self.core.hub.want(n);
        Ok(self.core.at(n))
    }

    async fn compact(&self, keep_from: Revision) -> Result<()> {
        let newest = self.revision().await?;
        if keep_from.incarnation != newest.incarnation {
            return Err(StoreError::Compacted { oldest: newest });
        }
        let n = keep_from.n.min(newest.n);
        match janitor::compact_to(&self.core, n).await {
            Err(failure) if failure.kind != Kind::Compacted => Err(failure.into_store_error()),
            _ => Ok(()),
        }
    }

    async fn stats(&self) -> Result<StoreStats> {
        let (start, end) = self.core.space.range(&Prefix::all(), None).unwrap_or_default();
        let keys = self.count((start, end)).await?;
        let leases = self.count(self.core.space.leases()).await?;
        let status = self.core.cluster.call(|mut client| async move { client.status().await }).await;
        let status = status.map_err(Failure::into_store_error)?;
        Ok(StoreStats {
            backend: "etcd",
            keys,
            bytes: u64::try_from(status.db_size()).unwrap_or(0),
            commits: self.core.commits(),
            // Batches and their fsyncs are etcd's own affair.
            batches: 0,
            fsyncs: 0,
            watchers: self.core.hub.watchers(),
            leases,
            revision: self.core.at(self.core.cluster.seen()),
            oldest: self.core.oldest(),
        })
    }
}
