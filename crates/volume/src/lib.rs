//! Block storage on one node or pool: the trait [`VolumeDriver`], its plain types, a fake and the conformance suite.
//!
//! Invariant: never mounts a file system that a guest wrote; never follows a backing file it did not make.
//!
//! Start reading at [`VolumeDriver`].

use std::path::PathBuf;

use async_trait::async_trait;
use oblak_model::{Size, SnapshotId, VolumeId};
use oblak_platform::driver::{Availability, DriverResult};
use serde::{Deserialize, Serialize};

pub mod conformance;
pub mod fake;
pub mod locks;

/// What the volume driver can do here.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Capabilities {
    /// Whether volumes can be made at all.
    pub available: bool,
    /// qemu-img, reflink, ... each with version or reason.
    pub probed: Vec<Availability>,
    /// Bytes in the pool.
    pub capacity: Size,
    /// Bytes free in the pool.
    pub free: Size,
}

/// Formats, fixed at creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// qcow2.
    Qcow2,
    /// Plain bytes, sparse.
    Raw,
    /// A directory, for containers. Its size is a limit only where the file system can enforce one; the handle says so.
    Directory,
}

/// What a new volume holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Source {
    /// Zeros (or an empty directory).
    Empty,
    /// A disk image of the content store; it is only read and must stay where it is while the volume lives.
    Image {
        /// The blob.
        path: PathBuf,
        /// Its format (qcow2 or raw).
        format: Format,
    },
    /// A copy of another volume of the pool as it is now.
    Volume {
        /// Which.
        id: VolumeId,
    },
    /// A copy of a snapshot.
    Snapshot {
        /// The volume it was taken of.
        volume: VolumeId,
        /// Which.
        id: SnapshotId,
    },
}

/// What a volume should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// The volume (for a root disk: the instance's id as a volume id).
    pub id: VolumeId,
    /// Size seen by the guest. Growing is allowed, shrinking is refused.
    pub size: Size,
    /// Format, fixed at creation.
    pub format: Format,
    /// What it holds when new.
    pub source: Source,
    /// Directory to put it in instead of the pool's own (root disks live beside their instance); absolute.
    #[serde(default)]
    pub dir: Option<PathBuf>,
    /// Host uid and gid that the guest's process runs as.
    #[serde(default)]
    pub owner: (u32, u32),
}

/// A volume as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeHandle {
    /// The volume.
    pub id: VolumeId,
    /// File or directory.
    pub path: PathBuf,
    /// Format.
    pub format: Format,
    /// Size seen by the guest.
    pub size: Size,
    /// Bytes it takes on the pool.
    pub used: Size,
    /// Snapshots it has.
    pub snapshots: Vec<SnapshotId>,
    /// Whether `size` is enforced.
    pub size_enforced: bool,
}

/// Who wants to write to a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The instance, for people.
    pub instance: String,
    /// The node.
    pub node: String,
    /// Grows whenever the volume is given to another instance or node.
    pub epoch: u64,
}

/// Keeps volumes. Every call may be repeated and cancelled.
#[async_trait]
pub trait VolumeDriver: Send + Sync + 'static {
    /// Short name: `file`, `fake`.
    fn name(&self) -> &'static str;

    /// Looks at the machine.
    async fn probe(&self) -> Capabilities;

    /// Makes the volume, or grows it to the spec's size. Never touches the content of one that exists.
    /// `in_use` says that a guest has it open: growing is then left to the guest's driver and only the record changes.
    async fn ensure(&self, spec: &VolumeSpec, in_use: bool) -> DriverResult<VolumeHandle>;

    /// The volume as it is; `None` when it does not exist.
    async fn observe(&self, id: VolumeId) -> DriverResult<Option<VolumeHandle>>;

    /// Every volume.
    async fn list(&self) -> DriverResult<Vec<VolumeId>>;

    /// Removes it with its snapshots. Fine when there is nothing.
    async fn remove(&self, id: VolumeId) -> DriverResult<()>;

    /// Takes a volume for an instance on a node, before it is opened for writing. In a pool that several nodes have, an outdated epoch is
    /// refused with `stale_epoch`, whoever comes when; where one node has the pool for itself there is nothing to do.
    async fn claim(&self, _: VolumeId, _: &Claim) -> DriverResult<()> {
        Ok(())
    }

    /// Point-in-time copies.
    fn snapshots(&self) -> Option<&dyn SnapshotVolume> {
        None
    }
}

/// Point-in-time copies of a volume no guest has open.
#[async_trait]
pub trait SnapshotVolume: Send + Sync {
    /// Takes one. Fine when it exists.
    async fn snapshot(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<Size>;
    /// Puts the volume back.
    async fn restore(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<()>;
    /// Forgets it. Fine when there is nothing.
    async fn remove_snapshot(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<()>;
}
