//! Control: what makes the world follow the specs.
//!
//! Reconcilers read mirrors of the store, plan with pure functions and commit guarded changes. They take no input but the store, so running
//! one twice, or killing it between any two lines, is harmless.
//!
//! Invariant: nothing here calls a driver or a node; the only output is guarded commits.
//!
//! Start reading at [`run`], then [`placement`]; [`lifecycle`] holds the pure plans that the API shares.

mod caches;
mod change;
mod drive;
pub mod election;
mod garbage;
pub mod ha;
mod images;
pub mod lifecycle;
mod liveness;
mod migration;
pub mod placement;
mod volumes;
mod world;

pub use election::Candidate;
use election::Election;
use oblak_platform::clock::SharedClock;
use oblak_platform::random::SharedRandom;
use oblak_store::{SharedStore, StoreError};
use tokio_util::sync::CancellationToken;

/// Takes part in the election of a leader and, while this server leads, runs every reconciler. Until cancelled.
///
/// The mirrors are kept while others lead too, so that taking over takes no longer than being elected.
///
/// # Errors
/// When the store cannot be read at the start.
pub async fn run(
    store: SharedStore,
    clock: SharedClock,
    random: SharedRandom,
    candidate: Candidate,
    cancel: CancellationToken,
) -> Result<(), StoreError> {
    run_with(store, clock, random, candidate, ha::HaConfig::default(), cancel).await
}

/// [`run`] with other settings of high availability.
///
/// # Errors
/// As [`run`].
pub async fn run_with(
    store: SharedStore,
    clock: SharedClock,
    random: SharedRandom,
    candidate: Candidate,
    ha: ha::HaConfig,
    cancel: CancellationToken,
) -> Result<(), StoreError> {
    let caches = caches::Caches::start(&store).await?;
    let election = Election::new(store.clone(), clock.clone(), random.clone(), candidate, cancel);
    let lead = |fence| {
        let driver = drive::Driver::new(store.clone(), caches.clone(), clock.clone(), random.clone(), fence);
        let ha = ha::Ha::new(ha.clone());
        async move {
            tokio::join!(
                driver.run(placement::Placer::default()),
                driver.run(images::Images),
                driver.run(volumes::Volumes),
                driver.run(liveness::Liveness),
                driver.run(ha),
                driver.run(migration::Migrations),
                driver.run(garbage::Garbage::default()),
            );
        }
    };
    election.run(lead).await;
    Ok(())
}
