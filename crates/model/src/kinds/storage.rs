//! Volumes and snapshots.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{InstanceId, NodeId, SnapshotId, VolumeId};
use crate::meta::Condition;
use crate::object::{Kind, Object, Scope};
use crate::size::Size;
use crate::validate::Problems;

/// Kind of volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeKind;
/// Storage that outlives instances.
pub type Volume = Object<VolumeKind>;

/// How the bytes are kept; fixed at creation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VolumeFormat {
    /// A block device in a qcow2 file.
    #[default]
    Qcow2,
    /// A block device in a plain file.
    Raw,
    /// A directory, for containers.
    Directory,
}

/// What is asked for of a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeSpec {
    /// Size; may grow, not shrink.
    pub size: Size,
    /// How the bytes are kept.
    #[serde(default)]
    pub format: VolumeFormat,
    /// Pool; the node's default when empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pool: String,
    /// Starts as a copy of this volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_volume: Option<String>,
    /// Starts as a copy of this snapshot of a volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_snapshot: Option<String>,
}

/// Where a volume is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VolumePhase {
    /// Not made yet; `message` says what it waits for.
    #[default]
    Pending,
    /// Can be attached.
    Available,
    /// Plugged into an instance.
    InUse,
    /// Could not be made or kept; `message` says why.
    Failed,
    /// Being removed.
    Deleting,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde passes a reference
fn is_zero(epoch: &u64) -> bool {
    *epoch == 0
}

/// What is, of a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VolumeStatus {
    /// Where it is in its life.
    #[serde(default)]
    pub phase: VolumePhase,
    /// Stable reason.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The node that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// The instance that has it, from the moment the attachment was accepted until it is really unplugged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attached_to: Option<InstanceId>,
    /// Grows with every instance and node that the volume is given to. In a pool that several nodes share it is written beside the volume,
    /// and who comes with a smaller one may not open it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub epoch: u64,
    /// Size it really has.
    #[serde(default)]
    pub size: Size,
    /// Bytes it takes.
    #[serde(default)]
    pub used: Size,
    /// Ids behind `from_volume` and `from_snapshot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_volume: Option<VolumeId>,
    /// See `source_volume`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_snapshot: Option<SnapshotId>,
    /// Generation of the spec that has been carried out.
    #[serde(default)]
    pub observed_generation: u64,
    /// Facts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

impl Kind for VolumeKind {
    const KIND: &'static str = "volume";
    const PLURAL: &'static str = "volumes";
    const SCOPE: Scope = Scope::Project;
    const ALIASES: &'static [&'static str] = &["vol"];
    type Spec = VolumeSpec;
    type Status = VolumeStatus;
    fn validate(spec: &VolumeSpec, problems: &mut Problems) {
        problems.require(
            (Size::mib(1)..=Size::gib(64 * 1024)).contains(&spec.size),
            "/spec/size",
            "must be 1 MiB to 64 TiB",
        );
        problems.require(spec.size.0.is_multiple_of(512), "/spec/size", "must be a multiple of 512 bytes");
        let both = spec.from_volume.is_some() && spec.from_snapshot.is_some();
        problems.require(!both, "/spec/from_snapshot", "cannot be given together with from_volume");
    }
    fn validate_update(old: &VolumeSpec, new: &VolumeSpec, problems: &mut Problems) {
        problems.require(new.size >= old.size, "/spec/size", format!("cannot shrink below {}", old.size));
        problems.require(new.format == old.format, "/spec/format", "cannot change; copy the data to a new volume");
        problems.require(new.pool == old.pool, "/spec/pool", "cannot change");
        let same = (&old.from_volume, &old.from_snapshot) == (&new.from_volume, &new.from_snapshot);
        problems.require(same, "/spec/from_volume", "cannot change");
    }
}

/// Kind of snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotKind;
/// A point-in-time copy in the same pool.
pub type Snapshot = Object<SnapshotKind>;

/// What is asked for of a snapshot. Exactly one of `instance` and `volume` is set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotSpec {
    /// Of this instance: its root disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// Of this volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// With the memory of a running instance.
    #[serde(default)]
    pub memory: bool,
}

/// Where a snapshot is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotPhase {
    /// Being taken.
    #[default]
    Pending,
    /// Can be restored.
    Ready,
    /// Could not be taken; `message` says why.
    Failed,
    /// Being removed.
    Deleting,
}

/// What is, of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotStatus {
    /// Where it is in its life.
    #[serde(default)]
    pub phase: SnapshotPhase,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
    /// The volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeId>,
    /// The node that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Bytes it takes.
    #[serde(default)]
    pub size: Size,
    /// Whether it holds memory.
    #[serde(default)]
    pub has_memory: bool,
}

impl Kind for SnapshotKind {
    const KIND: &'static str = "snapshot";
    const PLURAL: &'static str = "snapshots";
    const SCOPE: Scope = Scope::Project;
    const ALIASES: &'static [&'static str] = &["snap"];
    type Spec = SnapshotSpec;
    type Status = SnapshotStatus;
    fn validate(spec: &SnapshotSpec, problems: &mut Problems) {
        let one = spec.instance.is_some() != spec.volume.is_some();
        problems.require(one, "/spec/instance", "give exactly one of instance and volume");
        problems.require(!spec.memory || spec.instance.is_some(), "/spec/memory", "is only for snapshots of instances");
    }
    fn validate_update(old: &SnapshotSpec, new: &SnapshotSpec, problems: &mut Problems) {
        problems.require(old == new, "/spec", "cannot change; take a new snapshot");
    }
}
