//! Locks of volumes, for drivers: who works on the same volume works one after the other.

use std::sync::Arc;

use oblak_model::VolumeId;
use tokio::sync::{Mutex, OwnedMutexGuard};

/// Two volumes share a lock when the last bytes of their ids say so.
const STRIPES: usize = 64;

/// A fixed number of locks for any number of volumes.
#[derive(Debug)]
pub struct Stripes([Arc<Mutex<()>>; STRIPES]);

impl Default for Stripes {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Arc::default()))
    }
}

impl Stripes {
    /// Takes the locks of `ids`, in the order of the stripes, so that two callers never wait for each other.
    pub async fn lock(&self, ids: &[VolumeId]) -> Vec<OwnedMutexGuard<()>> {
        let mut stripes: Vec<usize> = ids.iter().map(|id| usize::from(id.0.as_bytes()[15]) % STRIPES).collect();
        stripes.sort_unstable();
        stripes.dedup();
        let mut locks = Vec::with_capacity(stripes.len());
        for stripe in stripes {
            locks.push(Arc::clone(&self.0[stripe]).lock_owned().await);
        }
        locks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_same_volume_twice_is_locked_once_and_others_are_free() {
        let stripes = Stripes::default();
        let id = |n: u128| VolumeId(uuid::Uuid::from_u128(n));
        let held = stripes.lock(&[id(1), id(1), id(2)]).await;
        assert_eq!(held.len(), 2);
        assert!(futures_util::FutureExt::now_or_never(stripes.lock(&[id(2)])).is_none());
        assert!(futures_util::FutureExt::now_or_never(stripes.lock(&[id(3)])).is_some());
        drop(held);
        assert!(futures_util::FutureExt::now_or_never(stripes.lock(&[id(2)])).is_some());
    }
}
