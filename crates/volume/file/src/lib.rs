//! Volumes as files: qcow2 (overlays on images, or standing alone), raw, and directories for containers.
//!
//! ```text
//! <pool>/<id>/volume.json          what it is; written before and after the content is made
//! <pool>/<id>/<id>.qcow2 | .raw | .tree    the content, or in the directory the spec names
//! <pool>/<id>/epoch-<n>        who may write, in pools that several nodes have (epoch.rs)
//! <pool>/<id>/snapshots/<snapshot>.raw | .tree   read-only copies; those of qcow2 are inside the file
//! ```
//!
//! Clones of volumes and snapshots are always full copies that share nothing but blocks of the file system (reflinks, where it
//! has them), so volumes may be removed in any order. Only images are linked to, because their owner keeps them.
//!
//! Invariant: never mounts what a guest wrote; never lets qemu-img follow a backing file that the volume's record does not
//! name; never changes a file that a guest has open.
//!
//! Start reading at [`FileDriver`], then `pool.rs`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use oblak_model::{Size, SnapshotId, VolumeId};
use oblak_platform::driver::{Availability, DriverError, DriverResult};
use oblak_volume::locks::Stripes;
use oblak_volume::{Capabilities, Claim, SnapshotVolume, Source, VolumeDriver, VolumeHandle, VolumeSpec};

mod copy;
mod epoch;
mod pool;
mod qcow2;
mod qemu_img;
mod record;
mod snapshot;

use pool::Pool;

/// The driver. Cheap to clone; clones share their locks. One process uses a pool at a time; of a shared pool, one at a
/// time uses a volume.
#[derive(Clone)]
pub struct FileDriver {
    inner: Arc<Inner>,
}

struct Inner {
    pool: Pool,
    locks: Stripes,
}

impl FileDriver {
    /// For the pool in `dir`, which is made when first used.
    #[must_use]
    pub fn new(dir: impl AsRef<Path>) -> Self {
        let pool = Pool::new(dir.as_ref());
        Self { inner: Arc::new(Inner { pool, locks: Stripes::default() }) }
    }

    /// For a pool in `dir` that several nodes have, all under the same path: nothing in it depends on files of one node, and volumes must be
    /// claimed.
    #[must_use]
    pub fn shared(dir: impl AsRef<Path>) -> Self {
        let pool = Pool::shared(dir.as_ref());
        Self { inner: Arc::new(Inner { pool, locks: Stripes::default() }) }
    }

    /// The pool's directory.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.inner.pool.dir().into()
    }

    /// Runs blocking work that holds the locks of `ids`. They are taken before the work is handed over, so a call that is given
    /// up either did nothing or ends in order while who comes next waits for it; it never runs late.
    async fn with<T: Send + 'static>(
        &self,
        ids: &[VolumeId],
        work: impl FnOnce(&Pool) -> DriverResult<T> + Send + 'static,
    ) -> DriverResult<T> {
        let locks = self.inner.locks.lock(ids).await;
        let inner = Arc::clone(&self.inner);
        let done = tokio::task::spawn_blocking(move || {
            let _locks = locks;
            work(&inner.pool)
        });
        done.await
            .unwrap_or_else(|error| Err(DriverError::retry("internal", format!("a volume task ended badly: {error}"))))
    }
}

#[async_trait]
impl VolumeDriver for FileDriver {
    fn name(&self) -> &'static str {
        "file"
    }

    async fn probe(&self) -> Capabilities {
        let probed = self.with(&[], |pool| Ok(pool.probe())).await;
        probed.unwrap_or_else(|error| Capabilities {
            probed: vec![Availability::no("pool", error.to_string())],
            ..Capabilities::default()
        })
    }

    async fn ensure(&self, spec: &VolumeSpec, in_use: bool) -> DriverResult<VolumeHandle> {
        let mut ids = vec![spec.id];
        if let Source::Volume { id } | Source::Snapshot { volume: id, .. } = spec.source {
            ids.push(id);
        }
        let spec = spec.clone();
        self.with(&ids, move |pool| pool.ensure(&spec, in_use)).await
    }

    async fn observe(&self, id: VolumeId) -> DriverResult<Option<VolumeHandle>> {
        self.with(&[id], move |pool| pool.observe(id)).await
    }

    async fn list(&self) -> DriverResult<Vec<VolumeId>> {
        self.with(&[], Pool::list).await
    }

    async fn remove(&self, id: VolumeId) -> DriverResult<()> {
        self.with(&[id], move |pool| pool.remove(id)).await
    }

    async fn claim(&self, id: VolumeId, claim: &Claim) -> DriverResult<()> {
        let claim = claim.clone();
        self.with(&[id], move |pool| pool.claim(id, &claim)).await
    }

    fn snapshots(&self) -> Option<&dyn SnapshotVolume> {
        Some(self)
    }
}

#[async_trait]
impl SnapshotVolume for FileDriver {
    async fn snapshot(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<Size> {
        self.with(&[volume], move |pool| pool.snapshot(volume, id)).await
    }
    async fn restore(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<()> {
        self.with(&[volume], move |pool| pool.restore(volume, id)).await
    }
    async fn remove_snapshot(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<()> {
        self.with(&[volume], move |pool| pool.remove_snapshot(volume, id)).await
    }
}
