//! Keeps the volumes of this node: makes, grows, snapshots and removes them, and says what is plugged in.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use oblak_model::wire::ReportItem;
use oblak_model::{About, Severity, Size, Snapshot, SnapshotPhase, Volume, VolumeFormat, VolumeId, VolumePhase};
use oblak_platform::driver::{DriverError, Remedy};
use oblak_volume::{Claim, Format, Source, VolumeHandle, VolumeSpec};

use crate::backoff::Backoff;
use crate::context::{Context, lock};

const SWEEP: Duration = Duration::from_secs(30);

type Made = BTreeMap<VolumeId, Result<VolumeHandle, DriverError>>;

/// Runs until the agent ends.
pub async fn run(ctx: Arc<Context>) {
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(15));
    let mut reported: BTreeMap<VolumeId, ReportItem> = BTreeMap::new();
    loop {
        let mut pause = SWEEP;
        if *ctx.synced.borrow() {
            if pass(&ctx, &mut reported).await {
                backoff.reset();
            } else {
                pause = backoff.next();
            }
        }
        tokio::select! {
            () = ctx.wake_volumes.notified() => {}
            () = tokio::time::sleep(pause) => {}
            () = ctx.cancel.cancelled() => return,
        }
    }
}

async fn pass(ctx: &Context, reported: &mut BTreeMap<VolumeId, ReportItem>) -> bool {
    let (volumes, snapshots) = {
        let world = ctx.world();
        let volumes: Vec<Arc<Volume>> =
            world.volumes.values().filter(|v| v.status.node == Some(ctx.config.node)).cloned().collect();
        let snapshots: Vec<Arc<Snapshot>> =
            world.snapshots.values().filter(|s| s.status.volume.is_some()).cloned().collect();
        (volumes, snapshots)
    };
    let mut made: Made = BTreeMap::new();
    let mut good = true;
    for volume in &volumes {
        let id = VolumeId(volume.metadata.id);
        if volume.metadata.is_deleting() {
            good &= remove(ctx, volume).await;
            reported.remove(&id);
            continue;
        }
        let plugged = lock(&ctx.plugged).contains_key(&id);
        let result = ensure(ctx, volume, plugged).await;
        good &= !matches!(&result, Err(e) if e.remedy == Remedy::Retry);
        let item = report(volume, plugged, &result);
        if reported.get(&id) != Some(&item) || differs(volume, &item) {
            ctx.report(item.clone());
            reported.insert(id, item);
        }
        made.insert(id, result);
    }
    reported.retain(|id, _| volumes.iter().any(|v| v.metadata.id == id.0));
    publish(ctx, made);
    for snapshot in snapshots {
        good &= take_or_drop(ctx, &snapshot).await;
    }
    good
}

fn publish(ctx: &Context, made: Made) {
    let paths = |m: &Made| {
        m.iter()
            .map(|(id, r)| (*id, r.as_ref().map(|h| (h.path.clone(), h.size)).map_err(|e| e.code.clone())))
            .collect::<Vec<_>>()
    };
    let changed = paths(&ctx.volumes.borrow()) != paths(&made);
    ctx.volumes.send_replace(Arc::new(made));
    if changed {
        ctx.wake_owners();
    }
}

/// Whether the server still shows something else than we reported (it may have lost or refused the report).
fn differs(volume: &Volume, item: &ReportItem) -> bool {
    let ReportItem::Volume { phase, plugged, .. } = item else { return false };
    let detached_there = volume.status.attached_to.is_none();
    match phase {
        VolumePhase::Failed => volume.status.phase != VolumePhase::Failed,
        _ => {
            volume.status.phase == VolumePhase::Pending
                || (!plugged && !detached_there && volume.status.phase == VolumePhase::InUse)
        }
    }
}

async fn ensure(ctx: &Context, volume: &Volume, in_use: bool) -> Result<VolumeHandle, DriverError> {
    let spec = VolumeSpec {
        id: VolumeId(volume.metadata.id),
        size: volume.spec.size,
        format: match volume.spec.format {
            VolumeFormat::Qcow2 => Format::Qcow2,
            VolumeFormat::Raw => Format::Raw,
            VolumeFormat::Directory => Format::Directory,
        },
        source: source(ctx, volume)?,
        dir: None,
        owner: (0, 0),
    };
    let driver = ctx.drivers.pool(&volume.spec.pool)?;
    claim(ctx, volume).await?;
    driver.ensure(&spec, in_use).await
}

/// Before anything is written: another node may have the volume by now, and know it earlier than we do.
pub async fn claim(ctx: &Context, volume: &Volume) -> Result<(), DriverError> {
    let claim = Claim {
        instance: volume.status.attached_to.map(|id| id.to_string()).unwrap_or_default(),
        node: ctx.config.name.clone(),
        epoch: volume.status.epoch,
    };
    ctx.drivers.pool(&volume.spec.pool)?.claim(VolumeId(volume.metadata.id), &claim).await
}

fn source(ctx: &Context, volume: &Volume) -> Result<Source, DriverError> {
    if let Some(id) = volume.status.source_volume {
        return Ok(Source::Volume { id });
    }
    let Some(id) = volume.status.source_snapshot else { return Ok(Source::Empty) };
    let of = ctx.world().snapshots.get(&id).and_then(|s| s.status.volume);
    of.map(|volume| Source::Snapshot { volume, id }).ok_or_else(|| {
        DriverError::permanent(
            "snapshot_gone",
            format!("the snapshot {id} that this volume starts from is not on this node"),
        )
    })
}

fn report(volume: &Volume, plugged: bool, result: &Result<VolumeHandle, DriverError>) -> ReportItem {
    let (phase, reason, message, size, used) = match result {
        Ok(handle) => (VolumePhase::Available, String::new(), String::new(), handle.size, handle.used),
        Err(error) if error.remedy == Remedy::Retry => {
            (VolumePhase::Pending, error.code.clone(), error.detail.clone(), Size::ZERO, Size::ZERO)
        }
        Err(error) => (VolumePhase::Failed, error.code.clone(), error.detail.clone(), Size::ZERO, Size::ZERO),
    };
    ReportItem::Volume {
        project: volume.metadata.project.clone().unwrap_or_default(),
        id: VolumeId(volume.metadata.id),
        phase,
        reason,
        message,
        size,
        used,
        generation: volume.metadata.generation,
        plugged,
    }
}

async fn remove(ctx: &Context, volume: &Volume) -> bool {
    let id = VolumeId(volume.metadata.id);
    if lock(&ctx.plugged).contains_key(&id) {
        return false; // the owner pulls it first
    }
    let removed = match (ctx.drivers.pool(&volume.spec.pool), claim(ctx, volume).await) {
        (Ok(driver), Ok(())) => driver.remove(id).await,
        (Err(error), _) | (_, Err(error)) => Err(error),
    };
    match removed {
        Ok(()) => {
            let project = volume.metadata.project.clone().unwrap_or_default();
            ctx.report(ReportItem::Released { object_kind: "volume".into(), project, id: volume.metadata.id });
            true
        }
        Err(error) => {
            let about = About { kind: "volume".into(), name: volume.metadata.name.clone(), id: volume.metadata.id };
            ctx.event(volume.metadata.project.as_deref(), about, Severity::Warning, "RemoveFailed", error.detail);
            false
        }
    }
}

async fn take_or_drop(ctx: &Context, snapshot: &Snapshot) -> bool {
    let id = oblak_model::SnapshotId(snapshot.metadata.id);
    let Some(volume) = snapshot.status.volume else { return true };
    let pool = ctx.world().volumes.get(&volume).map(|v| v.spec.pool.clone()).unwrap_or_default();
    let Some(driver) = ctx.drivers.pool(&pool).ok().and_then(|driver| driver.snapshots()) else { return true };
    if snapshot.metadata.is_deleting() {
        let Ok(()) = driver.remove_snapshot(volume, id).await else { return false };
        let project = snapshot.metadata.project.clone().unwrap_or_default();
        ctx.report(ReportItem::Released { object_kind: "snapshot".into(), project, id: snapshot.metadata.id });
        return true;
    }
    if snapshot.status.phase != SnapshotPhase::Pending {
        return true;
    }
    let result = if lock(&ctx.plugged).contains_key(&volume) {
        Err(DriverError::permanent(
            "in_use",
            "the volume is plugged into a running guest; detach it or stop the instance first",
        ))
    } else {
        driver.snapshot(volume, id).await
    };
    let again = matches!(&result, Err(e) if e.remedy == Remedy::Retry);
    ctx.report(crate::snapshots::report(snapshot, result.map(|size| (size, false))));
    !again
}
