//! Volumes in a Ceph pool: one RBD image each, raw, shared by every node that reaches the cluster.
//!
//! ```text
//! oblak-<id>        the volume
//! oblak-<id>.new    one that is being made; renamed when it is complete
//! oblak-<id>.claim  RADOS object that is locked while an epoch is compared and written
//! ```
//! What a volume should be (size, epoch) is metadata of its image, so every node knows the same. Snapshots are RBD's own, named after
//! their id; clones are full copies, so volumes may be removed in any order.
//!
//! Everything is done with Ceph's programs (`rbd`, `rados`, `ceph`) and `qemu-img`: they speak to every release of Ceph, and librbd stays out of
//! our process. Their exit codes are error numbers (errno(3)).
//!
//! Invariant: never mounts or maps an image on the host; never opens one for writing without being told the epoch that may.
//!
//! Start reading at [`RbdDriver`], then `image.rs` and `fence.rs`.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use oblak_model::{Size, SnapshotId, VolumeId};
use oblak_platform::driver::{Availability, DriverError, DriverResult};
use oblak_volume::locks::Stripes;
use oblak_volume::{Capabilities, Claim, SnapshotVolume, Source, VolumeDriver, VolumeHandle, VolumeSpec};

mod command;
mod fence;
mod image;
mod probe;
mod snapshot;

use command::Ceph;

/// Where the cluster is and who we are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbdConfig {
    /// Ceph's configuration file; it names the monitors and, with `keyring`, the key.
    pub conf: PathBuf,
    /// User without `client.`; needs `mon 'profile rbd' osd 'profile rbd pool=<pool>'`.
    pub user: String,
    /// Pool, prepared by `rbd pool init`.
    pub pool: String,
}

/// The driver. Cheap to clone; clones share their locks.
#[derive(Clone)]
pub struct RbdDriver {
    inner: Arc<Inner>,
}

struct Inner {
    ceph: Ceph,
    locks: Stripes,
}

impl RbdDriver {
    /// For one pool. Nothing is looked at before the first call.
    #[must_use]
    pub fn new(config: RbdConfig) -> Self {
        Self { inner: Arc::new(Inner { ceph: Ceph::new(config), locks: Stripes::default() }) }
    }

    /// Runs work that holds the locks of `ids` in a task of its own: a call that is given up ends in order, and who comes next waits for it.
    async fn with<T, F, W>(&self, ids: &[VolumeId], work: W) -> DriverResult<T>
    where
        T: Send + 'static,
        F: Future<Output = DriverResult<T>> + Send,
        W: FnOnce(Arc<Inner>) -> F + Send + 'static,
    {
        let locks = self.inner.locks.lock(ids).await;
        let inner = Arc::clone(&self.inner);
        let done = tokio::spawn(async move {
            let _locks = locks;
            work(inner).await
        });
        done.await
            .unwrap_or_else(|error| Err(DriverError::retry("internal", format!("a volume task ended badly: {error}"))))
    }
}

#[async_trait]
impl VolumeDriver for RbdDriver {
    fn name(&self) -> &'static str {
        "rbd"
    }

    async fn probe(&self) -> Capabilities {
        match self.with(&[], |inner| async move { Ok(probe::probe(&inner.ceph).await) }).await {
            Ok(found) => found,
            Err(error) => {
                Capabilities { probed: vec![Availability::no("rbd", error.to_string())], ..Capabilities::default() }
            }
        }
    }

    async fn ensure(&self, spec: &VolumeSpec, in_use: bool) -> DriverResult<VolumeHandle> {
        let mut ids = vec![spec.id];
        if let Source::Volume { id } | Source::Snapshot { volume: id, .. } = spec.source {
            ids.push(id);
        }
        let spec = spec.clone();
        self.with(&ids, move |inner| async move { image::ensure(&inner.ceph, &spec, in_use).await }).await
    }

    async fn observe(&self, id: VolumeId) -> DriverResult<Option<VolumeHandle>> {
        self.with(&[id], move |inner| async move { image::observe(&inner.ceph, id).await }).await
    }

    async fn list(&self) -> DriverResult<Vec<VolumeId>> {
        self.with(&[], |inner| async move { image::list(&inner.ceph).await }).await
    }

    async fn remove(&self, id: VolumeId) -> DriverResult<()> {
        self.with(&[id], move |inner| async move { image::remove(&inner.ceph, id).await }).await
    }

    async fn claim(&self, id: VolumeId, claim: &Claim) -> DriverResult<()> {
        let claim = claim.clone();
        self.with(&[id], move |inner| async move { fence::claim(&inner.ceph, id, &claim).await }).await
    }

    fn snapshots(&self) -> Option<&dyn SnapshotVolume> {
        Some(self)
    }
}

#[async_trait]
impl SnapshotVolume for RbdDriver {
    async fn snapshot(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<Size> {
        self.with(&[volume], move |inner| async move { snapshot::take(&inner.ceph, volume, id).await }).await
    }

    async fn restore(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<()> {
        self.with(&[volume], move |inner| async move { snapshot::restore(&inner.ceph, volume, id).await }).await
    }

    async fn remove_snapshot(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<()> {
        self.with(&[volume], move |inner| async move { snapshot::remove(&inner.ceph, volume, id).await }).await
    }
}
