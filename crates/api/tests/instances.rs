//! The life of an instance as the API sees it, with the test in the roles of scheduler and agent.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a panic is how a test fails

mod common;

use std::collections::BTreeSet;

use common::{Cloud, INSTANCES, instance_item, released};
use oblak_control::lifecycle::Batch;
use oblak_model::{InstanceKind, NodeId, VolumeKind};
use oblak_store::objects;
use serde_json::{Value, json};

fn volume_item(volume: &Value, plugged: bool) -> Value {
    json!({
        "kind": "volume", "project": "default", "id": volume["metadata"]["id"], "phase": "available", "reason": "", "message": "",
        "size": 1 << 30, "used": 4096, "generation": 1, "plugged": plugged,
    })
}

async fn reserved(cloud: &Cloud, node: NodeId) -> Value {
    cloud.get(&format!("/v1/nodes/{node}")).await.ok()["status"].clone()
}

#[tokio::test]
async fn from_creation_to_running_in_three_commits_and_away_without_a_trace() {
    let cloud = Cloud::new().await;
    let (node, epoch) = cloud.register("n1").await;
    let before: BTreeSet<String> = cloud.keys("/").await.into_iter().collect();
    let start = cloud.commits().await;
    let web = cloud.launch("web").await;
    assert_eq!((&web["status"]["phase"], &web["spec"]["flavor"]), (&json!("pending"), &json!("s")));
    assert_eq!(web["status"]["resolved"]["isolation"], "vm");
    assert_eq!(web["status"]["addresses"][0]["address"], "10.80.0.2");
    assert!(web["status"]["addresses"][0]["mac"].as_str().unwrap().starts_with("02:"));
    cloud.assign(&web, node).await;
    assert_eq!(cloud.running(node, epoch, &web).await["refused"], json!([]));
    assert_eq!(cloud.commits().await - start, 3);
    // The same report again costs nothing.
    cloud.running(node, epoch, &web).await;
    assert_eq!(cloud.commits().await - start, 3);
    let web = cloud.get(&format!("{INSTANCES}/web")).await.ok();
    assert_eq!((&web["status"]["phase"], &web["status"]["observed"]["run"]), (&json!("running"), &json!(1)));
    let status = reserved(&cloud, node).await;
    assert_eq!((&status["instances"], &status["allocated"]["memory"]), (&json!(1), &json!(512u64 << 20)));
    let explain = cloud.get(&format!("{INSTANCES}/web/explain")).await.ok();
    assert!(explain["text"].as_str().unwrap().starts_with("instance/web is running on n1"), "{explain}");

    let marked = cloud.delete(&format!("{INSTANCES}/web")).await;
    assert_eq!(marked.status, 202);
    assert_eq!(marked.json()["status"]["phase"], "deleting");
    cloud.patch(&format!("{INSTANCES}/web"), json!({"spec": {"power": "stopped"}})).await.problem("wrong_state");
    assert_eq!(cloud.delete(&format!("{INSTANCES}/web")).await.status, 202);
    // The agent's last words do not bring it back.
    cloud.report(node, epoch, vec![instance_item(&web, "running")]).await;
    assert_eq!(cloud.get(&format!("{INSTANCES}/web")).await.ok()["status"]["phase"], "deleting");
    assert_eq!(cloud.report(node, epoch, vec![released("instance", &web)]).await["refused"], json!([]));
    cloud.get(&format!("{INSTANCES}/web")).await.problem("not_found");
    assert_eq!(reserved(&cloud, node).await["instances"], 0);
    let after: BTreeSet<String> = cloud.keys("/").await.into_iter().collect();
    assert_eq!(after, before);
    // Said twice because the first answer was lost.
    assert_eq!(cloud.report(node, epoch, vec![released("instance", &web)]).await["refused"], json!([]));
}

#[tokio::test]
async fn many_at_once_get_an_address_each() {
    let cloud = Cloud::new().await;
    let path = "/v1/projects/default/subnets";
    cloud.post("/v1/projects/default/networks", json!({"metadata": {"name": "small"}, "spec": {}})).await.ok();
    cloud
        .post(path, json!({"metadata": {"name": "small"}, "spec": {"network": "small", "cidr": "10.1.0.0/27"}}))
        .await
        .ok();
    let create = |i: usize| {
        let cloud = &cloud;
        async move {
            let body = json!({"metadata": {"name": format!("i{i}")}, "spec": {"image": "tiny", "networks": [{"network": "small"}]}});
            cloud.post(INSTANCES, body).await
        }
    };
    // 32 addresses, of which network, gateway and broadcast are not given out.
    let answers = futures_util::future::join_all((0..32).map(create)).await;
    let mut addresses = BTreeSet::new();
    let mut refused = 0;
    for answer in answers {
        if answer.status == 201 {
            addresses.insert(answer.json()["status"]["addresses"][0]["address"].to_string());
        } else {
            answer.problem("addresses_exhausted");
            refused += 1;
        }
    }
    assert_eq!((addresses.len(), refused), (29, 3));
    assert_eq!(cloud.keys("/address").await.len(), 29);
    // What becomes free is given out again; a wanted address is checked.
    assert_eq!(cloud.delete(&format!("{INSTANCES}/i0")).await.status, 204);
    create(40).await.ok();
    let wants = |address: &str| json!({"metadata": {"name": "w"}, "spec": {"image": "tiny", "networks": [{"network": "small", "address": address}]}});
    assert_eq!(cloud.post(INSTANCES, wants("10.1.0.5")).await.problem("conflict")["field"], "/spec/networks/0/address");
    cloud.post(INSTANCES, wants("10.2.0.5")).await.problem("invalid");
    cloud.post(INSTANCES, wants("10.1.0.1")).await.problem("invalid");
}

#[tokio::test]
async fn what_does_not_exist_is_named() {
    let cloud = Cloud::new().await;
    for (spec, field) in [
        (json!({"image": "nonsense"}), "/spec/image"),
        (json!({"image": "tiny", "flavor": "huge"}), "/spec/flavor"),
        (json!({"image": "tiny", "keys": ["k"]}), "/spec/keys/0"),
        (json!({"image": "tiny", "networks": [{"network": "n"}]}), "/spec/networks/0/network"),
        (
            json!({"image": "tiny", "networks": [{"network": "default", "security_groups": ["g"]}]}),
            "/spec/networks/0/security_groups/0",
        ),
        (json!({"image": "tiny", "volumes": [{"volume": "v"}]}), "/spec/volumes/0/volume"),
        (json!({"image": "tiny", "isolation": "container"}), "/spec/isolation"),
        (json!({"image": "busybox", "isolation": "vm"}), "/spec/isolation"),
        (json!({"image": "tiny", "disk": "1GiB"}), "/spec/disk"),
        (json!({"image": "tiny", "networks": [], "publish": [{"host_port": 80, "port": 80}]}), "/spec/publish"),
        (
            json!({"image": "tiny", "publish": (1..=60).map(|p| json!({"host_port": p, "port": 1})).collect::<Vec<_>>()}),
            "/spec/publish",
        ),
    ] {
        let answer = cloud.post(INSTANCES, json!({"metadata": {"name": "x"}, "spec": spec})).await;
        let problem = answer.problem("invalid");
        assert_eq!(problem["field"], field, "{problem}");
    }
    assert!(cloud.keys("/port").await.is_empty() && cloud.keys("/address").await.is_empty());
    let debian = cloud.post(INSTANCES, json!({"metadata": {"name": "d"}, "spec": {"image": "debian-12"}})).await.ok();
    assert_eq!(debian["status"]["resolved"]["isolation"], "vm");
    assert_eq!(cloud.get("/v1/projects/default/images/debian-12").await.ok()["status"]["wanted"], true);
    let job = cloud.post(INSTANCES, json!({"metadata": {"name": "job"}, "spec": {"image": "busybox"}})).await.ok();
    assert_eq!(job["status"]["resolved"]["isolation"], "container");
    // Public images of one project serve the others.
    cloud.project("other", &[]).await;
    cloud
        .post("/v1/projects/other/instances", json!({"metadata": {"name": "x"}, "spec": {"image": "tiny"}}))
        .await
        .ok();
}

#[tokio::test]
async fn a_volume_goes_from_one_instance_to_another() {
    let cloud = Cloud::new().await;
    let (node, epoch) = cloud.register("n1").await;
    let volumes = "/v1/projects/default/volumes";
    cloud.post(volumes, json!({"metadata": {"name": "data"}, "spec": {"size": "1GiB"}})).await.ok();
    let (a, b) = (cloud.launch("a").await, cloud.launch("b").await);
    cloud.assign(&a, node).await;
    cloud.assign(&b, node).await;
    let (pa, pb) = (format!("{INSTANCES}/a"), format!("{INSTANCES}/b"));
    let with = json!({"spec": {"volumes": [{"volume": "data"}]}});
    cloud.running(node, epoch, &a).await;
    cloud.patch(&pa, with.clone()).await.ok();
    let data = cloud.get(&format!("{volumes}/data")).await.ok();
    assert_eq!(
        (&data["status"]["attached_to"], &data["status"]["node"]),
        (&a["metadata"]["id"], &json!(node.to_string()))
    );
    cloud.report(node, epoch, vec![volume_item(&data, true)]).await;
    assert_eq!(cloud.get(&format!("{volumes}/data")).await.ok()["status"]["phase"], "in_use");
    let problem = cloud.patch(&pb, with.clone()).await.problem("in_use");
    assert!(problem["detail"].as_str().unwrap().contains("instance/a"), "{problem}");
    cloud.delete(&format!("{volumes}/data")).await.problem("in_use");

    cloud.patch(&pa, json!({"spec": {"volumes": []}})).await.ok();
    // Asked for, but still plugged in.
    cloud.patch(&pb, with.clone()).await.problem("in_use");
    cloud.report(node, epoch, vec![volume_item(&data, true)]).await;
    cloud.patch(&pb, with.clone()).await.problem("in_use");
    cloud.report(node, epoch, vec![volume_item(&data, false)]).await;
    cloud.patch(&pb, with).await.ok();
    // A report from before the attachment does not end it.
    cloud.report(node, epoch, vec![volume_item(&data, false)]).await;
    assert_eq!(cloud.get(&format!("{volumes}/data")).await.ok()["status"]["attached_to"], b["metadata"]["id"]);
    cloud.delete(&pb).await;
    cloud.report(node, epoch, vec![released("instance", &b)]).await;
    let data = cloud.get(&format!("{volumes}/data")).await.ok();
    assert_eq!((&data["status"]["attached_to"], &data["status"]["phase"]), (&Value::Null, &json!("available")));
    assert_eq!(cloud.delete(&format!("{volumes}/data")).await.status, 202);
    cloud.report(node, epoch, vec![released("volume", &data)]).await;
    cloud.get(&format!("{volumes}/data")).await.problem("not_found");
}

#[tokio::test]
async fn resizing_keeps_to_what_the_node_has() {
    let cloud = Cloud::new().await;
    let (node, epoch) = cloud.register("n1").await;
    let web = cloud.launch("web").await;
    cloud.assign(&web, node).await;
    cloud.running(node, epoch, &web).await;
    let path = format!("{INSTANCES}/web");
    let before = cloud.commits().await;
    let grown = cloud.patch(&path, json!({"spec": {"flavor": "l"}})).await.ok();
    assert_eq!(cloud.commits().await - before, 1);
    assert_eq!(grown["status"]["placement"]["resources"]["memory"], 8u64 << 30);
    assert_eq!(reserved(&cloud, node).await["allocated"]["memory"], 8u64 << 30);
    let problem = cloud.patch(&path, json!({"spec": {"flavor": "xl"}})).await.problem("does_not_fit");
    assert_eq!(problem["explanation"]["constraints"][0]["constraint"], "memory");
    assert_eq!(reserved(&cloud, node).await["allocated"]["memory"], 8u64 << 30);
    cloud.patch(&path, json!({"spec": {"flavor": "s"}})).await.problem("invalid");
    let stopped = cloud.patch(&path, json!({"spec": {"power": "stopped"}})).await.ok();
    assert_eq!(stopped["metadata"]["generation"], 3);
    cloud.patch(&path, json!({"spec": {"power": "paused"}})).await.problem("wrong_state");
    cloud.patch(&path, json!({"spec": {"restart_generation": 1}})).await.ok();
    cloud.patch(&path, json!({"spec": {"restart_generation": 0}})).await.problem("invalid");
    let huge = cloud
        .post(INSTANCES, json!({"metadata": {"name": "huge"}, "spec": {"image": "tiny", "flavor": "xl"}}))
        .await
        .ok();
    assert_eq!(huge["status"]["phase"], "pending");
    let explain = cloud.get(&format!("{INSTANCES}/huge/explain")).await.ok();
    assert_eq!(explain["text"], "0 of 1 nodes fit: memory 32 GiB asked, 8 GiB free on n1 (1 node)");
}

#[tokio::test]
async fn host_ports_are_published_once() {
    let cloud = Cloud::new().await;
    let (node, _) = cloud.register("n1").await;
    let publish = |port: u16| json!([{"host_port": port, "port": 80}]);
    let a = cloud
        .post(INSTANCES, json!({"metadata": {"name": "a"}, "spec": {"image": "busybox", "publish": publish(8080)}}))
        .await
        .ok();
    let b = cloud.launch("b").await;
    cloud.assign(&a, node).await;
    cloud.assign(&b, node).await;
    let pb = format!("{INSTANCES}/b");
    let problem = cloud.patch(&pb, json!({"spec": {"publish": publish(8080)}})).await.problem("in_use");
    assert!(problem["detail"].as_str().unwrap().contains("instance/a"), "{problem}");
    cloud.patch(&pb, json!({"spec": {"publish": publish(8081)}})).await.ok();
    assert_eq!(cloud.keys("/hostport").await.len(), 2);
    cloud.patch(&format!("{INSTANCES}/a"), json!({"spec": {"publish": null}})).await.ok();
    cloud.patch(&pb, json!({"spec": {"publish": publish(8080)}})).await.ok();
    assert_eq!(cloud.keys("/hostport").await, [format!("/hostport/{node}/tcp-8080")]);
}

#[tokio::test]
async fn snapshots_are_taken_restored_and_go_with_their_instance() {
    let cloud = Cloud::new().await;
    let (node, epoch) = cloud.register("n1").await;
    let web = cloud.launch("web").await;
    let path = "/v1/projects/default/snapshots";
    let of_web = |name: &str| json!({"metadata": {"name": name}, "spec": {"instance": "web", "memory": true}});
    cloud.post(path, of_web("s1")).await.problem("wrong_state");
    cloud.assign(&web, node).await;
    cloud.running(node, epoch, &web).await;
    let s1 = cloud.post(path, of_web("s1")).await.ok();
    assert_eq!((&s1["status"]["instance"], &s1["status"]["node"]), (&web["metadata"]["id"], &json!(node.to_string())));
    let restore = json!({"spec": {"restore": {"snapshot": "s1", "generation": 1}}});
    let web_path = format!("{INSTANCES}/web");
    cloud.patch(&web_path, restore.clone()).await.problem("wrong_state");
    let ready = json!({"kind": "snapshot", "project": "default", "id": s1["metadata"]["id"], "phase": "ready", "message": "", "size": 1, "has_memory": true});
    cloud.report(node, epoch, vec![ready]).await;
    let restored = cloud.patch(&web_path, restore).await.ok();
    assert_eq!(restored["status"]["resolved"]["restore"], s1["metadata"]["id"]);
    cloud.delete(&format!("{path}/s1")).await.problem("in_use");
    cloud.delete(&web_path).await.ok();
    assert_eq!(cloud.get(&format!("{path}/s1")).await.ok()["status"]["phase"], "deleting");
    cloud.report(node, epoch, vec![released("snapshot", &s1), released("instance", &web)]).await;
    cloud.get(&format!("{path}/s1")).await.problem("not_found");
    cloud.get(&web_path).await.problem("not_found");
}

#[tokio::test]
async fn one_report_of_many_instances_is_few_commits() {
    let cloud = Cloud::new().await;
    let (node, epoch) = cloud.register("n1").await;
    cloud
        .patch(
            &format!("/v1/nodes/{node}"),
            json!({"spec": {"overcommit": {"memory_percent": 10000, "cpu_percent": 10000, "disk_percent": 10000}}}),
        )
        .await
        .ok();
    let mut items = Vec::new();
    for i in 0..60 {
        let instance = cloud.launch(&format!("i{i}")).await;
        cloud.assign(&instance, node).await;
        items.push(instance_item(&instance, "running"));
    }
    items.push(instance_item(&json!({"metadata": {"project": "default", "id": uuid::Uuid::nil()}}), "running"));
    let before = cloud.commits().await;
    assert_eq!(cloud.report(node, epoch, items).await["refused"], json!([[60, "gone"]]));
    assert_eq!(cloud.commits().await - before, 2);
    let list = cloud.get(&format!("{INSTANCES}?field=status.phase=running")).await.ok();
    assert_eq!(list["items"].as_array().unwrap().len(), 60);
    let about = json!({"kind": "instance", "name": "i0", "id": list["items"][0]["metadata"]["id"]});
    let event = |about: &Value| json!({"project": "default", "about": about, "severity": "warning", "reason": "Crashed", "message": "qemu ended"});
    let stranger = json!({"kind": "instance", "name": "x", "id": uuid::Uuid::now_v7()});
    let body = json!({"epoch": epoch, "items": [], "events": [event(&about), event(&about), event(&stranger)]});
    cloud.as_node(node, "POST", "report", body).await.ok();
    let events = cloud.get("/v1/projects/default/events").await.ok();
    assert_eq!(events["items"].as_array().unwrap().len(), 1);
    assert_eq!(
        (&events["items"][0]["spec"]["count"], &events["items"][0]["spec"]["source"]),
        (&json!(2), &json!("agent/n1"))
    );
    assert_eq!(cloud.get("/v1/events").await.ok()["items"].as_array().unwrap().len(), 1);
    let path = format!("/v1/projects/default/events/{}", events["items"][0]["metadata"]["id"].as_str().unwrap());
    cloud.patch(&path, json!({"spec": {"message": "nothing happened"}})).await.problem("unsupported");
    cloud.delete(&path).await.problem("unsupported");
    cloud.get(&path).await.ok();
}

/// Status and spec are written by different hands at the same time; nothing of either is lost.
#[tokio::test]
async fn reports_and_changes_do_not_lose_each_other() {
    let cloud = Cloud::new().await;
    let (node, epoch) = cloud.register("n1").await;
    let web = cloud.launch("web").await;
    cloud.assign(&web, node).await;
    let path = format!("{INSTANCES}/web");
    let report = async {
        for run in 1..=20 {
            let mut item = instance_item(&web, "running");
            item["observed"]["run"] = json!(run);
            cloud.report(node, epoch, vec![item]).await;
        }
    };
    let change = async {
        for n in 1..=20 {
            cloud
                .patch(&path, json!({"spec": {"restart_generation": n}, "metadata": {"labels": {"n": n.to_string()}}}))
                .await
                .ok();
        }
    };
    let behind = async {
        // Somebody else writes the object too.
        for _ in 0..10 {
            let mut object = cloud.read::<InstanceKind>("default", &web["metadata"]["id"]).await.unwrap();
            object.status.message.push('.');
            let (guard, write) = objects::update_ops(&object);
            let mut batch = Batch::new();
            batch.guard(guard);
            batch.write(write);
            let _ =
                oblak_store::Store::commit(&*cloud.store, batch.into_txn(oblak_store::Txn::random().id)).await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    tokio::join!(report, change, behind);
    let web = cloud.get(&path).await.ok();
    assert_eq!(
        (&web["spec"]["restart_generation"], &web["status"]["observed"]["run"], &web["metadata"]["generation"]),
        (&json!(20), &json!(20), &json!(21))
    );
    assert!(cloud.read::<VolumeKind>("default", &web["metadata"]["id"]).await.is_none());
}
