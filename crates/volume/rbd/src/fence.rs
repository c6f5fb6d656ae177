//! Who may write to a volume: the one that comes with the largest epoch.
//!
//! The epoch and its holder are metadata of the image. A claim locks a RADOS object beside it, compares, writes the new epoch, and then shuts out
//! whoever has the image open from before: the cluster puts their address on its blocklist, after which no write of theirs is taken by any OSD,
//! however late it arrives, and their exclusive lock is broken. Written first and shut out second: a claim that was interrupted
//! in between is repeated by the same holder, and does the rest.

use std::time::Duration;

use oblak_model::VolumeId;
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_volume::Claim;
use serde::Deserialize;

use crate::command::{Ceph, QUICK};
use crate::image::{info, meta, name, set_meta, what};

/// Metadata: JSON of the [`Claim`].
const EPOCH: &str = "oblak.claim";
/// Name of the lock on the object.
const LOCK: &str = "oblak.claim";
/// How long the lock lasts when its holder dies; longer than comparing and writing takes.
const LOCK_SECONDS: &str = "60";
/// Longest time between taking the lock and the last write under it.
const CLAIM: Duration = Duration::from_secs(45);
/// How often, and how long apart, a lock that somebody else has is asked for.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(250);
/// How long an address stays on the blocklist: far longer than any write can be under way, and than a frozen process keeps trying
/// before its node has been cleaned.
const BLOCK_SECONDS: &str = "86400";

#[derive(Deserialize)]
struct Status {
    watchers: Vec<Watcher>,
}
#[derive(Deserialize)]
struct Watcher {
    address: String,
}
#[derive(Deserialize)]
struct Lock {
    id: String,
    locker: String,
    address: String,
}

/// Claims the volume, or refuses with `stale_epoch`.
pub async fn claim(ceph: &Ceph, id: VolumeId, claim: &Claim) -> DriverResult<()> {
    if info(ceph, id).await?.is_none() {
        return Err(DriverError::gone(format!("{} does not exist", what(id))));
    }
    let cookie = format!("{}-{}", claim.node, claim.epoch);
    lock(ceph, id, &cookie).await?;
    // Given up before the lock can have ended: what is still running is killed, so nothing is written late.
    let done = tokio::time::timeout(CLAIM, compare_and_take(ceph, id, claim)).await.unwrap_or_else(|_| {
        Err(DriverError::retry("ceph_timeout", format!("{}: Ceph is too slow to claim it", what(id))))
    });
    unlock(ceph, id, &cookie).await;
    done
}

async fn compare_and_take(ceph: &Ceph, id: VolumeId, claim: &Claim) -> DriverResult<()> {
    let held: Option<Held> = meta(ceph, id, EPOCH).await?.and_then(|text| serde_json::from_str(&text).ok());
    match &held {
        Some(held) if held.claim.epoch > claim.epoch => return Err(stale(id, claim, &held.claim)),
        Some(held)
            if held.claim.epoch == claim.epoch
                && (&held.claim.node, &held.claim.instance) != (&claim.node, &claim.instance) =>
        {
            return Err(stale(id, claim, &held.claim));
        }
        // Ours already, and nobody from before is left: who has it open now is our own guest.
        Some(held) if held.claim.epoch == claim.epoch && held.alone => return Ok(()),
        _ => {}
    }
    write(ceph, id, &Held { claim: claim.clone(), alone: false }).await?;
    shut_out(ceph, id).await?;
    write(ceph, id, &Held { claim: claim.clone(), alone: true }).await
}

/// The claim that counts.
#[derive(serde::Serialize, Deserialize)]
struct Held {
    claim: Claim,
    /// Everybody from before has been shut out.
    alone: bool,
}

async fn write(ceph: &Ceph, id: VolumeId, held: &Held) -> DriverResult<()> {
    let text =
        serde_json::to_string(held).map_err(|e| DriverError::permanent("internal", format!("{}: {e}", what(id))))?;
    set_meta(ceph, id, &name(id), EPOCH, &text).await
}

fn stale(id: VolumeId, claim: &Claim, held: &Claim) -> DriverError {
    let detail = format!(
        "{}: node {} for instance {} has it with epoch {}; epoch {} came too late",
        what(id),
        held.node,
        held.instance,
        held.epoch,
        claim.epoch
    );
    DriverError::permanent("stale_epoch", detail)
}

/// Puts everybody who has the image open on the blocklist and breaks their locks.
async fn shut_out(ceph: &Ceph, id: VolumeId) -> DriverResult<()> {
    let what = what(id);
    let image = ceph.image(&name(id));
    let locks: Vec<Lock> = ceph.rbd_json(&what, &["lock", "ls", &image]).await?.unwrap_or_default();
    let mut addresses: Vec<String> = watchers(ceph, id).await?;
    addresses.extend(locks.iter().map(|l| l.address.clone()));
    addresses.sort_unstable();
    addresses.dedup();
    for address in &addresses {
        let args = ["osd", "blocklist", "add", address, BLOCK_SECONDS];
        ceph.run("ceph", &args, QUICK).await?.map_err(|f| f.into_error(&what))?;
        tracing::info!(volume = %id, address, "a client from before is shut out");
    }
    for lock in &locks {
        match ceph.run("rbd", &["lock", "rm", &image, &lock.id, &lock.locker], QUICK).await? {
            Err(failed) if !failed.is_missing() => return Err(failed.into_error(&what)),
            _ => {}
        }
    }
    Ok(())
}

async fn watchers(ceph: &Ceph, id: VolumeId) -> DriverResult<Vec<String>> {
    let status: Option<Status> = ceph.rbd_json(&what(id), &["status", &ceph.image(&name(id))]).await?;
    Ok(status.map(|s| s.watchers.into_iter().map(|w| w.address).collect()).unwrap_or_default())
}

/// Refuses while somebody has the image open.
pub async fn not_in_use(ceph: &Ceph, id: VolumeId) -> DriverResult<()> {
    if watchers(ceph, id).await?.is_empty() {
        return Ok(());
    }
    let detail = format!("{}: the volume is in use; stop its instance first", what(id));
    Err(DriverError::retry("volume_in_use", detail))
}

fn object(id: VolumeId) -> String {
    format!("{}.claim", name(id))
}

async fn lock(ceph: &Ceph, id: VolumeId, cookie: &str) -> DriverResult<()> {
    let (pool, object) = (&ceph.config.pool, object(id));
    for _ in 0..LOCK_TRIES {
        let args = ["-p", pool, "lock", "get", &object, LOCK, "--lock-cookie", cookie, "--lock-duration", LOCK_SECONDS];
        match ceph.run("rados", &args, QUICK).await? {
            Ok(_) => return Ok(()),
            Err(failed) if failed.is_busy() || failed.is_there() => {}
            Err(failed) => return Err(failed.into_error(&what(id))),
        }
        tokio::time::sleep(LOCK_PAUSE).await;
    }
    Err(DriverError::retry("volume_in_use", format!("{}: somebody else claims it at this moment", what(id))))
}

/// The lock ends by itself when this fails.
async fn unlock(ceph: &Ceph, id: VolumeId, cookie: &str) {
    if let Err(error) = try_unlock(ceph, id, cookie).await {
        tracing::debug!(volume = %id, %error, "the lock on a claim ends by itself");
    }
}

async fn try_unlock(ceph: &Ceph, id: VolumeId, cookie: &str) -> DriverResult<()> {
    #[derive(Deserialize)]
    struct LockInfo {
        #[serde(default)]
        lockers: Vec<Locker>,
    }
    #[derive(Deserialize)]
    struct Locker {
        name: String,
        cookie: String,
    }
    let (pool, object) = (&ceph.config.pool, object(id));
    let text = ceph.run("rados", &["-p", pool, "lock", "info", &object, LOCK], QUICK).await?;
    let text = text.map_err(|f| f.into_error(&what(id)))?;
    let info: LockInfo = crate::command::parse(&what(id), &text)?;
    for locker in info.lockers.iter().filter(|l| l.cookie == cookie) {
        let args = ["-p", pool, "lock", "break", &object, LOCK, &locker.name, "--lock-cookie", cookie];
        let _ = ceph.run("rados", &args, QUICK).await?;
    }
    Ok(())
}

/// Removes the object that claims lock. Fine when there is none.
pub async fn forget(ceph: &Ceph, id: VolumeId) -> DriverResult<()> {
    match ceph.run("rados", &["-p", &ceph.config.pool, "rm", &object(id)], QUICK).await? {
        Err(failed) if !failed.is_missing() => Err(failed.into_error(&what(id))),
        _ => Ok(()),
    }
}
