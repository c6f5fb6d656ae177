//! Leases are etcd's, each with a key attached to it that shows, to a transaction, that it lives.
//!
//! etcd counts whole seconds, and no fewer than one and a half elections (2 s with its defaults). A grant is rounded up, and the caller is
//! told what it got. A holder that counts from before it asked, or for the shorter time that it asked for, ends before etcd does.

use std::time::Duration;

use etcd_client::{Error, GetOptions, LeaseGrantOptions, PutOptions};
use oblak_store::{Lease, LeaseId, Result, StoreError};

use crate::cluster::Cluster;
use crate::failure::{Failure, Kind};
use crate::keys::Space;
use crate::store::Core;

/// etcd refuses longer leases (`lease.MaxLeaseTTL`).
const MAX_TTL_SECONDS: u64 = 9_000_000_000;

fn seconds(ttl: Duration) -> i64 {
    let whole = ttl.as_secs().saturating_add(u64::from(ttl.subsec_nanos() > 0));
    whole.clamp(1, MAX_TTL_SECONDS).cast_signed()
}

fn granted(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// A name that was never used: 63 random bits, positive, since zero and negative names mean something else to etcd.
fn fresh(core: &Core) -> i64 {
    let mut bytes = [0; 8];
    core.random.fill(&mut bytes);
    (i64::from_le_bytes(bytes) & i64::MAX).max(1)
}

/// A new lease.
pub async fn grant(core: &Core, ttl: Duration) -> Result<Lease> {
    let mut pauses = core.cluster.pauses();
    loop {
        // A name for each attempt: a lease of an attempt that seemed to fail has no keys and ends by itself.
        let id = fresh(core);
        let failure = match attempt(core, id, ttl).await {
            Ok(ttl) => return Ok(Lease { id: LeaseId(id.cast_unsigned()), ttl }),
            Err(failure) => failure,
        };
        // "No such lease": it ended between the two steps, because etcd or this process stood still for so long.
        if !(failure.is_transient() || failure.kind == Kind::NoLease) || !pauses.pause().await {
            return Err(failure.into_store_error());
        }
    }
}

async fn attempt(core: &Core, id: i64, ttl: Duration) -> Result<Duration, Failure> {
    let options = LeaseGrantOptions::new().with_id(id);
    let answer =
        core.cluster.attempt(|mut client| async move { client.lease_grant(seconds(ttl), Some(options)).await }).await?;
    core.cluster.note(answer.header())?;
    let marker = core.space.lease(LeaseId(id.cast_unsigned()));
    let put = core.cluster.call(|mut client| {
        let (marker, options) = (marker.clone(), PutOptions::new().with_lease(id));
        async move { client.put(marker, "", Some(options)).await }
    });
    core.cluster.note(put.await?.header())?;
    Ok(granted(answer.ttl()))
}

/// Starts the life of a lease anew.
pub async fn renew(core: &Core, id: LeaseId) -> Result<Lease> {
    let name = id.0.cast_signed();
    if name <= 0 {
        return Err(StoreError::LeaseGone(id));
    }
    let renewed = core.cluster.call(|mut client| async move {
        let (mut keeper, mut answers) = client.lease_keep_alive(name).await?;
        // The client library drops the first answer, which has the time to live.
        keeper.keep_alive().await?;
        answers.message().await?.ok_or_else(|| Error::LeaseKeepAliveError("the stream ended".into()))
    });
    match renewed.await {
        Ok(answer) if answer.ttl() > 0 => {
            core.cluster.note(answer.header()).map_err(Failure::into_store_error)?;
            Ok(Lease { id, ttl: granted(answer.ttl()) })
        }
        Ok(_) => Err(StoreError::LeaseGone(id)),
        Err(failure) if failure.kind == Kind::NoLease => Err(StoreError::LeaseGone(id)),
        Err(failure) => Err(failure.into_store_error()),
    }
}

/// Ends a lease and deletes its keys.
pub async fn revoke(cluster: &Cluster, id: LeaseId) -> Result<()> {
    let name = id.0.cast_signed();
    if name <= 0 {
        return Ok(());
    }
    match cluster.call(|mut client| async move { client.lease_revoke(name).await }).await {
        Ok(answer) => cluster.note(answer.header()).map(drop).map_err(Failure::into_store_error),
        Err(failure) if failure.kind == Kind::NoLease => Ok(()),
        Err(failure) => Err(failure.into_store_error()),
    }
}

/// Ends all leases of the cloud.
pub async fn revoke_all(cluster: &Cluster, space: &Space) -> Result<()> {
    let (start, end) = space.leases();
    let options = GetOptions::new().with_range(end).with_keys_only();
    let answer = cluster.call(|mut client| {
        let (start, options) = (start.clone(), options.clone());
        async move { client.get(start, Some(options)).await }
    });
    let answer = answer.await.map_err(Failure::into_store_error)?;
    for marker in answer.kvs() {
        revoke(cluster, LeaseId(marker.lease().cast_unsigned())).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_are_rounded_up() {
        let of = |millis| seconds(Duration::from_millis(millis));
        assert_eq!((of(0), of(1), of(1000), of(1001), of(5000)), (1, 1, 1, 2, 5));
        assert_eq!(seconds(Duration::MAX), 9_000_000_000);
    }
}
