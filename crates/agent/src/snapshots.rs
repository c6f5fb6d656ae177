//! Snapshots of instances: taken and dropped by the owner, one at a time with everything else it does.

use std::sync::Arc;

use oblak_compute::ComputeDriver;
use oblak_model::wire::ReportItem;
use oblak_model::{Instance, InstanceId, Size, Snapshot, SnapshotId, SnapshotPhase};
use oblak_platform::driver::{DriverError, Remedy};

use crate::context::Context;

/// Status of a snapshot: its size and whether it holds memory, or why it could not be taken.
pub fn report(snapshot: &Snapshot, result: Result<(Size, bool), DriverError>) -> ReportItem {
    let (phase, message, size, has_memory) = match result {
        Ok((size, memory)) => (SnapshotPhase::Ready, String::new(), size, memory),
        Err(e) if e.remedy == Remedy::Retry => (SnapshotPhase::Pending, e.detail, Size::ZERO, false),
        Err(e) => (SnapshotPhase::Failed, e.detail, Size::ZERO, false),
    };
    let project = snapshot.metadata.project.clone().unwrap_or_default();
    ReportItem::Snapshot { project, id: SnapshotId(snapshot.metadata.id), phase, message, size, has_memory }
}

/// Snapshots of an instance that have work to do.
fn pending(ctx: &Context, id: InstanceId) -> Vec<Arc<Snapshot>> {
    let world = ctx.world();
    let of_it = world.snapshots.values().filter(|s| s.status.instance == Some(id));
    of_it.filter(|s| s.metadata.is_deleting() || s.status.phase == SnapshotPhase::Pending).cloned().collect()
}

/// Takes and drops what is asked for. True when something was done.
pub async fn work(ctx: &Context, driver: &Arc<dyn ComputeDriver>, instance: &Instance, running: bool) -> bool {
    let id = InstanceId(instance.metadata.id);
    let todo = pending(ctx, id);
    for snapshot in &todo {
        let snapshot_id = SnapshotId(snapshot.metadata.id);
        let Some(ability) = driver.snapshot() else {
            if snapshot.metadata.is_deleting() {
                release(ctx, snapshot);
            } else {
                ctx.report(report(
                    snapshot,
                    Err(DriverError::unsupported(format!(
                        "{} instances cannot be snapshotted; snapshot their volumes",
                        instance.status.resolved.isolation
                    ))),
                ));
            }
            continue;
        };
        if snapshot.metadata.is_deleting() {
            match ability.remove_snapshot(id, snapshot_id).await {
                Ok(()) => release(ctx, snapshot),
                Err(error) => tracing::warn!(snapshot = %snapshot.metadata.name, %error, "snapshot cannot be removed"),
            }
            continue;
        }
        let memory = snapshot.spec.memory && running;
        let taken = ability.snapshot(id, snapshot_id, memory).await;
        ctx.report(report(snapshot, taken.map(|size| (size, memory)).map_err(|e| with_names(instance, e))));
    }
    !todo.is_empty()
}

/// Drivers know volumes by id, people by name.
fn with_names(instance: &Instance, mut error: DriverError) -> DriverError {
    for (id, attachment) in instance.status.resolved.volumes.iter().zip(&instance.spec.volumes) {
        error.detail = error.detail.replace(&id.to_string(), &attachment.volume);
    }
    error
}

fn release(ctx: &Context, snapshot: &Snapshot) {
    let project = snapshot.metadata.project.clone().unwrap_or_default();
    ctx.report(ReportItem::Released { object_kind: "snapshot".into(), project, id: snapshot.metadata.id });
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{InstanceSpec, VolumeAttachment, VolumeId};

    #[test]
    fn errors_name_volumes_as_people_do() {
        let data = VolumeAttachment { volume: "data".into(), ..VolumeAttachment::default() };
        let mut web = Instance::new("web", InstanceSpec { volumes: vec![data], ..InstanceSpec::default() });
        let id = VolumeId(uuid::Uuid::from_u128(7));
        web.status.resolved.volumes = vec![id];
        let error = DriverError::permanent("volumes_attached", format!("volume {id} is not part of it"));
        assert_eq!(with_names(&web, error).detail, "volume data is not part of it");
    }
}
