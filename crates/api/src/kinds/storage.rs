//! Volumes and snapshots.

use oblak_identity::Principal;
use oblak_model::{
    ApiError, Code, InstanceId, InstanceKind, Isolation, Snapshot, SnapshotId, SnapshotKind, SnapshotPhase, Volume,
    VolumeId, VolumeKind, VolumePhase,
};

use super::{Access, Resource, can_clean, in_use, needs_node};
use crate::draft::Draft;

impl Resource for VolumeKind {
    const ACCESS: Access = Access::InProject;
    const NAMED_BY_OTHERS: bool = true;

    fn create(
        draft: &mut Draft,
        _: &Principal,
        volume: &mut Volume,
        _: Option<&str>,
    ) -> Result<Option<String>, ApiError> {
        let scope = volume.scope_key().to_string();
        if !volume.spec.pool.is_empty() {
            super::ha::check_pool(draft, &volume.spec.pool, "/spec/pool")?;
        }
        if let Some(name) = volume.spec.from_volume.clone() {
            let source = draft.need::<VolumeKind>(&scope, &name, "/spec/from_volume")?;
            starts_from(volume, &source, "/spec/from_volume")?;
            volume.status.source_volume = Some(VolumeId(source.metadata.id));
        }
        if let Some(name) = volume.spec.from_snapshot.clone() {
            let snapshot = draft.need::<SnapshotKind>(&scope, &name, "/spec/from_snapshot")?;
            let Some(of) = snapshot.status.volume else {
                return Err(ApiError::invalid("/spec/from_snapshot", "is a snapshot of an instance, not of a volume"));
            };
            if snapshot.status.phase != SnapshotPhase::Ready {
                return Err(ApiError::invalid("/spec/from_snapshot", "is not ready yet"));
            }
            let source = draft.get::<VolumeKind>(&scope, of.0)?;
            let source = source.ok_or_else(|| ApiError::invalid("/spec/from_snapshot", "has lost its volume"))?;
            starts_from(volume, &source, "/spec/from_snapshot")?;
            volume.status.source_snapshot = Some(SnapshotId(snapshot.metadata.id));
        }
        Ok(None)
    }

    fn may_delete(draft: &Draft, volume: &Volume) -> Result<(), ApiError> {
        let (scope, id) = (volume.scope_key(), VolumeId(volume.metadata.id));
        if let Some(instance) = volume.status.attached_to {
            let name = draft.get::<InstanceKind>(scope, instance.0)?.map_or(instance.to_string(), |i| i.metadata.name);
            return Err(in_use(&volume.describe(), &format!("instance/{name}; detach it first")));
        }
        let snapshots = draft.list::<SnapshotKind>(Some(scope))?;
        if let Some(snapshot) = snapshots.iter().find(|s| s.status.volume == Some(id)) {
            return Err(in_use(&volume.describe(), &format!("{}; delete it first", snapshot.describe())));
        }
        let copies = draft.list::<VolumeKind>(Some(scope))?;
        match copies.iter().find(|v| v.status.source_volume == Some(id) && v.status.phase == VolumePhase::Pending) {
            Some(copy) => {
                Err(in_use(&volume.describe(), &format!("{}, which is being copied from it", copy.describe())))
            }
            None => Ok(()),
        }
    }

    fn begin_delete(draft: &mut Draft, volume: &mut Volume) -> Result<(), ApiError> {
        volume.status.phase = VolumePhase::Deleting;
        if can_clean(draft, volume.status.node) {
            needs_node(volume);
        }
        Ok(())
    }
}

/// A copy is made where its source is.
fn starts_from(volume: &mut Volume, source: &Volume, field: &str) -> Result<(), ApiError> {
    if volume.spec.size < source.spec.size {
        return Err(ApiError::invalid(
            "/spec/size",
            format!("must be at least {}, the size of the source", source.spec.size),
        ));
    }
    if volume.spec.format != source.spec.format {
        return Err(ApiError::invalid("/spec/format", "must be the format of the source"));
    }
    let Some(node) = source.status.node else {
        return Err(ApiError::invalid(field, "has no content yet; wait until it is available"));
    };
    volume.spec.pool.clone_from(&source.spec.pool);
    volume.status.node = Some(node);
    needs_node(volume);
    Ok(())
}

impl Resource for SnapshotKind {
    const ACCESS: Access = Access::InProject;
    const NAMED_BY_OTHERS: bool = true;

    fn create(
        draft: &mut Draft,
        _: &Principal,
        snapshot: &mut Snapshot,
        _: Option<&str>,
    ) -> Result<Option<String>, ApiError> {
        let scope = snapshot.scope_key().to_string();
        if let Some(name) = snapshot.spec.instance.clone() {
            let instance = draft.need::<InstanceKind>(&scope, &name, "/spec/instance")?;
            let Some(placement) = &instance.status.placement else {
                return Err(ApiError::new(
                    Code::WrongState,
                    format!("{} has no disk yet; wait until it has been started once", instance.describe()),
                ));
            };
            if snapshot.spec.memory && instance.status.resolved.isolation == Isolation::Container {
                return Err(ApiError::new(Code::Unsupported, "snapshots of containers hold the disk only, not memory")
                    .at("/spec/memory"));
            }
            snapshot.status.instance = Some(InstanceId(instance.metadata.id));
            snapshot.status.node = Some(placement.node);
        } else if let Some(name) = snapshot.spec.volume.clone() {
            let volume = draft.need::<VolumeKind>(&scope, &name, "/spec/volume")?;
            let Some(node) = volume.status.node else {
                return Err(ApiError::new(
                    Code::WrongState,
                    format!("{} has no content yet; wait until it is available", volume.describe()),
                ));
            };
            snapshot.status.volume = Some(VolumeId(volume.metadata.id));
            snapshot.status.node = Some(node);
        }
        needs_node(snapshot);
        Ok(None)
    }

    fn may_delete(draft: &Draft, snapshot: &Snapshot) -> Result<(), ApiError> {
        let (scope, id) = (snapshot.scope_key(), SnapshotId(snapshot.metadata.id));
        let going_back = draft.list::<InstanceKind>(Some(scope))?.into_iter().find(|i| {
            let asked = i.spec.restore.as_ref().map_or(0, |r| r.generation);
            i.status.resolved.restore == Some(id) && i.status.observed.restore_generation < asked
        });
        if let Some(instance) = going_back {
            return Err(in_use(&snapshot.describe(), &format!("{}, which is going back to it", instance.describe())));
        }
        let copies = draft.list::<VolumeKind>(Some(scope))?;
        match copies.iter().find(|v| v.status.source_snapshot == Some(id) && v.status.phase == VolumePhase::Pending) {
            Some(copy) => {
                Err(in_use(&snapshot.describe(), &format!("{}, which is being made from it", copy.describe())))
            }
            None => Ok(()),
        }
    }

    fn begin_delete(draft: &mut Draft, snapshot: &mut Snapshot) -> Result<(), ApiError> {
        snapshot.status.phase = SnapshotPhase::Deleting;
        if can_clean(draft, snapshot.status.node) {
            needs_node(snapshot);
        }
        Ok(())
    }
}
