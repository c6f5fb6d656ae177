//! Deletions that a server began and did not live to end.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::time::Duration;

use axum::http::StatusCode;
use common::Cloud;
use oblak_api::Server;
use oblak_model::{FlavorKind, Kind, Object, Timestamp, VolumeKind};
use oblak_platform::clock::Clock;
use oblak_store::{CommitOutcome, SharedStore, Store, Txn, objects};
use serde_json::{Value, json};

/// Leaves an object as a server that is killed after the first step of its deletion does.
async fn mark<K: Kind>(cloud: &Cloud, scope: &str, object: &Value, at: Timestamp) {
    let mut object: Object<K> = cloud.read::<K>(scope, &object["metadata"]["id"]).await.unwrap();
    object.metadata.deleted_at = Some(at);
    object.metadata.finalizers.insert("api".into());
    let (guard, write) = objects::update_ops(&object);
    let outcome = cloud.store.commit(Txn::random().guard(guard).write(write)).await.unwrap();
    assert!(matches!(outcome, CommitOutcome::Committed(_)), "{outcome:?}");
}

#[tokio::test]
async fn a_deletion_that_was_cut_off_is_finished_without_being_asked_again() {
    let cloud = Cloud::new().await;
    let flavor =
        |name: &str| json!({"metadata": {"name": name}, "spec": {"vcpus": 1, "memory": "64MiB", "disk": "1GiB"}});
    let unused = cloud.post("/v1/flavors", flavor("unused")).await.ok();
    let used = cloud.post("/v1/flavors", flavor("used")).await.ok();
    let young = cloud.post("/v1/flavors", flavor("young")).await.ok();
    let volumes = "/v1/projects/default/volumes";
    let data = cloud.post(volumes, json!({"metadata": {"name": "data"}, "spec": {"size": "1GiB"}})).await.ok();
    let spec = json!({"image": "tiny", "flavor": "used"});
    cloud.post(common::INSTANCES, json!({"metadata": {"name": "web"}, "spec": spec})).await.ok();
    let before = cloud.clock.now();
    mark::<FlavorKind>(&cloud, "_", &unused, before).await;
    mark::<FlavorKind>(&cloud, "_", &used, before).await;
    mark::<VolumeKind>(&cloud, "default", &data, before).await;
    cloud.clock.advance(Duration::from_secs(70));
    mark::<FlavorKind>(&cloud, "_", &young, cloud.clock.now()).await;
    cloud.settle().await;
    assert!(cloud.get("/v1/flavors/unused").await.ok()["metadata"]["deleted_at"].is_string());
    // The server that comes after the one that was killed.
    let dir = tempfile::tempdir().unwrap();
    let (store, clock) = (cloud.store.clone() as SharedStore, cloud.clock.clone());
    let random = oblak_platform::random::system();
    let _next = Server::in_process(common::config(dir.path()), store, clock, random).await.unwrap();
    let begun = std::time::Instant::now();
    while cloud.get("/v1/flavors/used").await.ok()["metadata"]["deleted_at"].is_string()
        || cloud.get(&format!("{volumes}/data")).await.status != StatusCode::NOT_FOUND
    {
        assert!(begun.elapsed() < Duration::from_secs(20), "nobody finishes the deletions");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(cloud.get("/v1/flavors/unused").await.status, StatusCode::NOT_FOUND);
    assert!(cloud.keys("/name/flavor").await.iter().all(|key| !key.ends_with("/unused")), "its name is free again");
    let kept = cloud.get("/v1/flavors/used").await.ok();
    assert!(kept["metadata"]["deleted_at"].is_null() && kept["metadata"]["finalizers"].is_null(), "{kept}");
    let waiting = cloud.get("/v1/flavors/young").await.ok();
    assert!(waiting["metadata"]["deleted_at"].is_string(), "its request may still be under way: {waiting}");
}
