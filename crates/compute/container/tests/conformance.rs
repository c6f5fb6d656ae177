//! The driver passes the conformance suite of the family on real runtimes.

mod common;

use common::World;
use oblak_compute::conformance;

#[tokio::test(flavor = "multi_thread")]
async fn crun() {
    if let Some(world) = World::with_runtime("crun", &["crun"]).await {
        conformance::suite(&world).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn runc() {
    if let Some(world) = World::with_runtime("runc", &["runc"]).await {
        conformance::suite(&world).await;
    }
}
