//! Point-in-time copies: RBD's own snapshots, named after their id.

use oblak_model::{Size, SnapshotId, VolumeId};
use oblak_platform::driver::{DriverError, DriverResult};

use crate::command::{COPY, Ceph, QUICK};
use crate::image::{grow, info, name, snap, what};

/// Takes one; the size that a volume made of it needs at least.
pub async fn take(ceph: &Ceph, volume: VolumeId, id: SnapshotId) -> DriverResult<Size> {
    let at = format!("{}@{id}", ceph.image(&name(volume)));
    match ceph.run("rbd", &["snap", "create", "--no-progress", &at], QUICK).await? {
        Ok(_) => {}
        Err(failed) if failed.is_there() => {}
        Err(failed) if failed.is_missing() => return Err(gone(volume)),
        Err(failed) => return Err(failed.into_error(&what(volume))),
    }
    Ok(Size(snap(ceph, volume, id).await?.size))
}

/// Puts the volume back and gives it the size again that it had: rolling back also rolls the size back.
pub async fn restore(ceph: &Ceph, volume: VolumeId, id: SnapshotId) -> DriverResult<()> {
    let size = info(ceph, volume).await?.ok_or_else(|| gone(volume))?.size;
    let taken = snap(ceph, volume, id).await?;
    let (what, image) = (what(volume), ceph.image(&name(volume)));
    crate::fence::not_in_use(ceph, volume).await?;
    ceph.rbd(&what, &["snap", "rollback", "--no-progress", &format!("{image}@{id}")], COPY).await?;
    grow(ceph, volume, &name(volume), taken.size, size).await
}

/// Forgets one. Fine when there is nothing.
pub async fn remove(ceph: &Ceph, volume: VolumeId, id: SnapshotId) -> DriverResult<()> {
    let at = format!("{}@{id}", ceph.image(&name(volume)));
    match ceph.run("rbd", &["snap", "rm", "--no-progress", &at], COPY).await? {
        Err(failed) if !failed.is_missing() => Err(failed.into_error(&what(volume))),
        _ => Ok(()),
    }
}

fn gone(volume: VolumeId) -> DriverError {
    DriverError::gone(format!("volume {volume} does not exist"))
}
