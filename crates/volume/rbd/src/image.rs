//! Volumes as images: made, grown, looked at, removed. Everything here runs under the volume's lock.
//!
//! ```text
//! nothing ──► <name>.new, empty ──► filled, sized, described ──► renamed
//! ```
//! A crash between two arrows leaves `<name>.new`; the next `ensure` starts again and `remove` removes it.

use oblak_model::{Size, SnapshotId, VolumeId};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_volume::{Format, Source, VolumeHandle, VolumeSpec};
use serde::Deserialize;

use crate::command::{COPY, Ceph, QUICK};

const PREFIX: &str = "oblak-";
const NEW: &str = ".new";
/// Metadata: the size that was asked for. Differs from the image's while a guest has yet to grow it.
const SIZE: &str = "oblak.size";

/// `rbd info`.
#[derive(Deserialize)]
pub struct Info {
    pub size: u64,
}

/// One line of `rbd snap ls`.
#[derive(Deserialize)]
pub struct Snap {
    pub name: String,
    pub size: u64,
}

#[derive(Deserialize)]
struct Usage {
    images: Vec<Used>,
}
#[derive(Deserialize)]
struct Used {
    used_size: u64,
}

/// Name of a volume's image.
pub fn name(id: VolumeId) -> String {
    format!("{PREFIX}{id}")
}

pub fn what(id: VolumeId) -> String {
    format!("volume {id}")
}

pub async fn ensure(ceph: &Ceph, spec: &VolumeSpec, in_use: bool) -> DriverResult<VolumeHandle> {
    check(spec)?;
    match info(ceph, spec.id).await? {
        Some(info) => update(ceph, spec, &info, in_use).await?,
        None => create(ceph, spec).await?,
    }
    observe(ceph, spec.id)
        .await?
        .ok_or_else(|| DriverError::retry("ceph_failed", format!("{}: it went away meanwhile", what(spec.id))))
}

fn check(spec: &VolumeSpec) -> DriverResult<()> {
    let what = what(spec.id);
    if spec.size == Size(0) {
        return Err(DriverError::permanent("invalid_size", format!("{what}: the size must not be 0")));
    }
    if spec.format == Format::Directory {
        let detail = format!("{what}: a Ceph pool holds disks; directories need a pool of files");
        return Err(DriverError::unsupported(detail));
    }
    if spec.dir.is_some() {
        return Err(DriverError::permanent("invalid_dir", format!("{what}: a Ceph pool has no directories")));
    }
    Ok(())
}

async fn update(ceph: &Ceph, spec: &VolumeSpec, info: &Info, in_use: bool) -> DriverResult<()> {
    let what = what(spec.id);
    if spec.format != Format::Raw {
        let detail = format!("{what}: it is raw; the format of a volume is fixed when it is made");
        return Err(DriverError::permanent("format_fixed", detail));
    }
    let wanted = recorded_size(ceph, spec.id).await?.unwrap_or(info.size).max(info.size);
    if spec.size.0 < wanted {
        let detail = format!("{what}: it has {} and cannot shrink to {}", Size(wanted), spec.size);
        return Err(DriverError::permanent("shrink", detail));
    }
    if spec.size.0 > wanted {
        describe(ceph, spec.id, &name(spec.id), spec.size).await?;
    }
    if in_use {
        return Ok(());
    }
    grow(ceph, spec.id, &name(spec.id), info.size, spec.size.0).await
}

async fn create(ceph: &Ceph, spec: &VolumeSpec) -> DriverResult<()> {
    let what = what(spec.id);
    if spec.format != Format::Raw {
        return Err(DriverError::unsupported(format!("{what}: a Ceph pool holds raw disks only")));
    }
    let new = format!("{}{NEW}", name(spec.id));
    erase(ceph, spec.id, &new).await?;
    let made = async {
        fill(ceph, spec, &new).await?;
        describe(ceph, spec.id, &new, spec.size).await?;
        ceph.rbd(&what, &["rename", &ceph.image(&new), &ceph.image(&name(spec.id))], QUICK).await
    };
    if let Err(error) = made.await {
        if let Err(left) = erase(ceph, spec.id, &new).await {
            tracing::warn!(volume = %spec.id, error = %left, "an image that could not be completed is still there");
        }
        return Err(error);
    }
    Ok(())
}

/// Makes the image with its content and its final size.
async fn fill(ceph: &Ceph, spec: &VolumeSpec, new: &str) -> DriverResult<()> {
    let (what, image, size) = (what(spec.id), ceph.image(new), format!("{}B", spec.size.0));
    let (from, original_bytes) = match &spec.source {
        Source::Empty => {
            ceph.rbd(&what, &["create", "--size", &size, &image], QUICK).await?;
            return Ok(());
        }
        Source::Image { path, format } => {
            ceph.rbd(&what, &["create", "--size", &size, &image], QUICK).await?;
            let format = if *format == Format::Qcow2 { "qcow2" } else { "raw" };
            return ceph.import(&what, path, format, new).await;
        }
        Source::Volume { id } => {
            let original = info(ceph, *id).await?;
            let original = original.ok_or_else(|| DriverError::gone(format!("volume {id} does not exist")))?;
            (ceph.image(&name(*id)), original.size)
        }
        Source::Snapshot { volume, id } => {
            (format!("{}@{id}", ceph.image(&name(*volume))), snap(ceph, *volume, *id).await?.size)
        }
    };
    if spec.size.0 < original_bytes {
        let detail = format!("{what}: {} is less than its original has ({})", spec.size, Size(original_bytes));
        return Err(DriverError::permanent("too_small", detail));
    }
    ceph.rbd(&what, &["cp", "--no-progress", &from, &image], COPY).await?;
    grow(ceph, spec.id, new, original_bytes, spec.size.0).await
}

/// Grows an image. `rbd` refuses to give one the size that it has.
pub async fn grow(ceph: &Ceph, id: VolumeId, name: &str, from_bytes: u64, to_bytes: u64) -> DriverResult<()> {
    if to_bytes > from_bytes {
        let size = format!("{to_bytes}B");
        ceph.rbd(&what(id), &["resize", "--no-progress", "--size", &size, &ceph.image(name)], QUICK).await?;
    }
    Ok(())
}

async fn describe(ceph: &Ceph, id: VolumeId, name: &str, size: Size) -> DriverResult<()> {
    set_meta(ceph, id, name, SIZE, &size.0.to_string()).await
}

/// Writes one entry of an image's metadata.
pub async fn set_meta(ceph: &Ceph, id: VolumeId, name: &str, key: &str, value: &str) -> DriverResult<()> {
    ceph.rbd(&what(id), &["image-meta", "set", &ceph.image(name), key, value], QUICK).await.map(drop)
}

/// Reads one entry; `None` when it or the image is absent.
pub async fn meta(ceph: &Ceph, id: VolumeId, key: &str) -> DriverResult<Option<String>> {
    let all: Option<std::collections::BTreeMap<String, String>> =
        ceph.rbd_json(&what(id), &["image-meta", "list", &ceph.image(&name(id))]).await?;
    Ok(all.and_then(|mut all| all.remove(key)))
}

async fn recorded_size(ceph: &Ceph, id: VolumeId) -> DriverResult<Option<u64>> {
    Ok(meta(ceph, id, SIZE).await?.and_then(|text| text.parse().ok()))
}

pub async fn info(ceph: &Ceph, id: VolumeId) -> DriverResult<Option<Info>> {
    ceph.rbd_json(&what(id), &["info", &ceph.image(&name(id))]).await
}

/// Snapshots of a volume; none when the volume is absent.
pub async fn snaps(ceph: &Ceph, id: VolumeId) -> DriverResult<Vec<Snap>> {
    Ok(ceph.rbd_json(&what(id), &["snap", "ls", &ceph.image(&name(id))]).await?.unwrap_or_default())
}

pub async fn snap(ceph: &Ceph, volume: VolumeId, id: SnapshotId) -> DriverResult<Snap> {
    let found = snaps(ceph, volume).await?.into_iter().find(|s| s.name == id.to_string());
    found.ok_or_else(|| DriverError::gone(format!("volume {volume} has no snapshot {id}")))
}

pub async fn observe(ceph: &Ceph, id: VolumeId) -> DriverResult<Option<VolumeHandle>> {
    let Some(info) = info(ceph, id).await? else { return Ok(None) };
    let usage: Option<Usage> = ceph.rbd_json(&what(id), &["du", &ceph.image(&name(id))]).await?;
    let mut snapshots: Vec<SnapshotId> = snaps(ceph, id).await?.iter().filter_map(|s| s.name.parse().ok()).collect();
    snapshots.sort_unstable();
    Ok(Some(VolumeHandle {
        id,
        path: ceph.uri(&name(id)).into(),
        format: Format::Raw,
        size: Size(recorded_size(ceph, id).await?.unwrap_or(info.size).max(info.size)),
        used: Size(usage.map_or(0, |u| u.images.iter().map(|i| i.used_size).sum())),
        snapshots,
        size_enforced: true,
    }))
}

/// Every volume, half-made ones too: they are to be found and removed.
pub async fn list(ceph: &Ceph) -> DriverResult<Vec<VolumeId>> {
    let what = format!("pool {}", ceph.config.pool);
    let names: Option<Vec<String>> = ceph.rbd_json(&what, &["ls", &ceph.config.pool]).await?;
    let names =
        names.ok_or_else(|| DriverError::permanent("pool_missing", format!("{what}: Ceph has no such pool")))?;
    let id = |name: &String| name.strip_prefix(PREFIX)?.trim_end_matches(NEW).parse().ok();
    let mut ids: Vec<VolumeId> = names.iter().filter_map(id).collect();
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

pub async fn remove(ceph: &Ceph, id: VolumeId) -> DriverResult<()> {
    erase(ceph, id, &name(id)).await?;
    erase(ceph, id, &format!("{}{NEW}", name(id))).await?;
    crate::fence::forget(ceph, id).await
}

/// Removes an image with its snapshots. Fine when there is none.
async fn erase(ceph: &Ceph, id: VolumeId, name: &str) -> DriverResult<()> {
    let (what, image) = (what(id), ceph.image(name));
    for args in [["snap", "purge"].as_slice(), &["rm"]] {
        match ceph.run("rbd", &[args, &["--no-progress", &image]].concat(), COPY).await? {
            Ok(_) => {}
            Err(failed) if failed.is_missing() => return Ok(()),
            Err(failed) => return Err(failed.into_error(&what)),
        }
    }
    Ok(())
}
