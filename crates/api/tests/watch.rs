//! Watches of clients and of agents.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a panic is how a test fails

mod common;

use std::time::Duration;

use common::{Cloud, Events, INSTANCES, released};
use oblak_store::{HistoryLimits, MemoryStore, Store};
use serde_json::{Value, json};

#[tokio::test]
async fn a_watch_resumes_where_it_was() {
    let cloud = Cloud::new().await;
    cloud.launch("a").await;
    let from = cloud.get(INSTANCES).await.ok()["revision"].as_str().unwrap().to_string();
    let path = format!("{INSTANCES}?watch=true&from={from}");
    let mut events = Events::open(&cloud, &path, &cloud.admin, None).await;
    assert_eq!(events.next().await.unwrap().0, "bookmark");
    let b = cloud.launch("b").await;
    let (kind, id, object) = events.change().await;
    assert_eq!((kind.as_str(), object), ("put", b.clone()));
    cloud.patch(&format!("{INSTANCES}/b"), json!({"metadata": {"labels": {"x": "y"}}})).await.ok();
    cloud.delete(&format!("{INSTANCES}/a")).await;
    cloud.delete(&format!("{INSTANCES}/b")).await;
    let mut names = Vec::new();
    let mut resumed = Events::open(&cloud, &format!("{INSTANCES}?watch=true&from={id}"), &cloud.admin, None).await;
    for events in [&mut events, &mut resumed] {
        for _ in 0..3 {
            let (kind, _, data) = events.change().await;
            names.push(format!("{kind} {}", data["name"].as_str().or(data["metadata"]["name"].as_str()).unwrap()));
        }
    }
    assert_eq!(names, ["put b", "delete a", "delete b", "put b", "delete a", "delete b"]);
}

#[tokio::test]
async fn a_filtered_watch_says_when_an_object_leaves_the_filter() {
    let cloud = Cloud::new().await;
    let path = format!("{INSTANCES}?watch=true&label=tier%3Dweb");
    let mut events = Events::open(&cloud, &path, &cloud.admin, None).await;
    cloud.launch("other").await;
    cloud.launch("web").await;
    cloud.patch(&format!("{INSTANCES}/web"), json!({"metadata": {"labels": {"tier": "web"}}})).await.ok();
    cloud.patch(&format!("{INSTANCES}/web"), json!({"metadata": {"labels": {"tier": "db"}}})).await.ok();
    let (kind, _, object) = events.change().await;
    assert_eq!((kind.as_str(), &object["metadata"]["name"]), ("put", &json!("web")));
    let (kind, _, data) = events.change().await;
    assert_eq!((kind.as_str(), &data["name"]), ("delete", &json!("web")));
}

#[tokio::test]
async fn a_revision_that_is_gone_is_said() {
    let cloud = Cloud::with(|_| {}, |clock| MemoryStore::with(clock, HistoryLimits::default())).await;
    let from = cloud.get(INSTANCES).await.ok()["revision"].as_str().unwrap().to_string();
    cloud.launch("a").await;
    let now = cloud.store.revision().await.unwrap();
    cloud.store.compact(now).await.unwrap();
    let path = format!("{INSTANCES}?watch=true&from={from}");
    let mut events = Events::open(&cloud, &path, &cloud.admin, None).await;
    let (kind, _, problem) = events.change().await;
    assert_eq!((kind.as_str(), &problem["code"]), ("error", &json!("compacted")));
    assert!(events.next().await.is_none(), "the stream ends");
    cloud.get(&format!("{INSTANCES}?watch=true&from=soon")).await.problem("malformed");
    cloud.get(&format!("{INSTANCES}?from=1-1")).await.problem("malformed");
}

#[tokio::test]
async fn watches_end_when_the_server_stops() {
    let cloud = Cloud::new().await;
    let mut events = Events::open(&cloud, &format!("{INSTANCES}?watch=true"), &cloud.admin, None).await;
    events.next().await.unwrap();
    cloud.server.stop_streams();
    assert!(events.next().await.is_none());
    cloud.get("/readyz").await.problem("unavailable");
}

async fn until_synced(events: &mut Events) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let (_, _, data) = events.next().await.expect("goes on");
        match data["type"].as_str().unwrap() {
            "synced" => return seen,
            "put" => seen.push(format!(
                "{}/{}",
                data["kind"].as_str().unwrap(),
                data["object"]["metadata"]["name"].as_str().unwrap()
            )),
            other => panic!("{other}"),
        }
    }
}

async fn describe(events: &mut Events) -> String {
    let (_, _, data) = events.next().await.expect("goes on");
    let name = data["object"]["metadata"]["name"].as_str().or(data["id"].as_str()).unwrap_or_default();
    format!("{} {}/{name}", data["type"].as_str().unwrap(), data["kind"].as_str().unwrap_or_default())
}

#[tokio::test]
async fn a_node_sees_what_concerns_it_and_nothing_else() {
    let cloud = Cloud::new().await;
    let (n1, e1) = cloud.register("n1").await;
    let (n2, _) = cloud.register("n2").await;
    cloud.project("other", &[]).await;
    let (a, b) = (cloud.launch("a").await, cloud.launch("b").await);
    let elsewhere = cloud
        .post("/v1/projects/other/instances", json!({"metadata": {"name": "x"}, "spec": {"image": "busybox"}}))
        .await
        .ok();
    cloud.assign(&a, n1).await;
    cloud.assign(&elsewhere, n2).await;
    let path = format!("/v1/nodes/{n1}/watch");
    let settle = cloud.store.revision().await.unwrap().to_string();
    cloud.send("GET", "/v1/whoami", &cloud.admin, None, &[("x-oblak-min-revision", &settle)]).await.ok();
    let mut events = Events::open(&cloud, &path, "", Some(n1)).await;
    let mut seen = until_synced(&mut events).await;
    assert_eq!(seen.last().unwrap(), "instance/a", "what it needs comes first");
    seen.sort();
    let expected = [
        "image/tiny",
        "instance/a",
        "network/default",
        "node/n1",
        "port/a-0",
        "port/b-0",
        "security-group/default",
        "subnet/default",
    ];
    assert_eq!(seen, expected);

    // Another instance here: its placement, and its port's.
    cloud.assign(&b, n1).await;
    let mut seen = vec![describe(&mut events).await, describe(&mut events).await];
    while !seen.iter().any(|s| s == "put instance/b") || !seen.iter().any(|s| s == "put port/b-0") {
        seen.push(describe(&mut events).await);
    }
    // Nothing of other nodes and projects comes by.
    cloud.patch("/v1/projects/other/instances/x", json!({"metadata": {"labels": {"a": "b"}}})).await.ok();
    cloud.patch(&format!("{INSTANCES}/a"), json!({"metadata": {"labels": {"a": "b"}}})).await.ok();
    assert_eq!(describe(&mut events).await, "put instance/a");

    // Both go: what no instance needs any more is taken back.
    for instance in [&a, &b] {
        cloud.delete(&format!("{INSTANCES}/{}", instance["metadata"]["name"].as_str().unwrap())).await.ok();
        cloud.report(n1, e1, vec![released("instance", instance)]).await;
    }
    let mut gone = Vec::new();
    while gone.len() < 8 {
        let (_, _, data) = events.next().await.unwrap();
        if data["type"] == "delete" {
            gone.push(data["kind"].as_str().unwrap().to_string());
        }
    }
    gone.sort();
    assert_eq!(gone, ["image", "instance", "instance", "network", "port", "port", "security-group", "subnet"]);
}

/// An image is kept ready on every node as long as there is an instance anywhere that may have to be started there.
#[tokio::test]
async fn an_image_is_taken_back_with_the_last_instance_that_it_was_kept_for() {
    let cloud = Cloud::new().await;
    let (n1, _) = cloud.register("n1").await;
    let mut events = Events::open(&cloud, &format!("/v1/nodes/{n1}/watch"), "", Some(n1)).await;
    assert_eq!(until_synced(&mut events).await, ["node/n1"]);
    for name in ["a", "b"] {
        let spec = json!({"image": "tiny", "isolation": "vm", "ha": true, "ephemeral": true});
        cloud.post(INSTANCES, json!({"metadata": {"name": name}, "spec": spec})).await.ok();
    }
    assert_eq!(describe(&mut events).await, "put image/tiny");
    cloud.delete(&format!("{INSTANCES}/a")).await.ok();
    cloud.patch("/v1/nodes/n1", json!({"spec": {"schedulable": false}})).await.ok();
    loop {
        match describe(&mut events).await.as_str() {
            "put image/tiny" => {}
            other => break assert_eq!(other, "put node/n1", "it is kept for the other one"),
        }
    }
    cloud.delete(&format!("{INSTANCES}/b")).await.ok();
    let gone = describe(&mut events).await;
    assert!(gone.starts_with("delete image/"), "{gone}");
}

/// What is told of other nodes is where to reach those that have ports of the same project, and nothing else.
#[tokio::test]
async fn a_node_learns_where_the_nodes_of_its_networks_are() {
    let cloud = Cloud::new().await;
    let (n1, _) = cloud.register("n1").await;
    let (n2, e2) = cloud.register("n2").await;
    let (n3, _) = cloud.register("n3").await;
    cloud.project("other", &[]).await;
    let at = |name: &str, address: &str| {
        json!({
            "name": name, "zone": "z", "version": "0.1.0", "boot_id": "b", "capacity": {"vcpus": 8, "memory": "16GiB", "disk": "200GiB"},
            "facts": {"isolations": ["vm"], "hostname": "secret", "underlay": {"address": address, "mtu": 1500}},
        })
    };
    cloud.as_node(n2, "POST", "register", at("n2", "192.0.2.2")).await.ok();
    cloud.as_node(n3, "POST", "register", at("n3", "192.0.2.3")).await.ok();
    let (a, b, c) = (cloud.launch("a").await, cloud.launch("b").await, cloud.launch("c").await);
    let body = json!({"metadata": {"name": "x"}, "spec": {"image": "busybox"}});
    let foreign = cloud.post("/v1/projects/other/instances", body).await.ok();
    cloud.assign(&a, n1).await;
    cloud.assign(&b, n2).await;
    cloud.assign(&foreign, n3).await;
    let mut events = Events::open(&cloud, &format!("/v1/nodes/{n1}/watch"), "", Some(n1)).await;
    let (mut peers, mut order) = (Vec::new(), Vec::new());
    loop {
        let (_, _, data) = events.next().await.unwrap();
        if data["type"] == "synced" {
            break;
        }
        order.push(
            data["kind"].as_str().unwrap().to_string()
                + data["object"]["metadata"]["name"].as_str().unwrap_or_default(),
        );
        if data["kind"] == "peer" {
            peers.push(data["object"].clone());
        }
    }
    let whole = json!({"id": n2, "name": "n2", "underlay": {"address": "192.0.2.2", "mtu": 1500}});
    assert_eq!(peers, [whole], "no other node, and nothing else of this one");
    let place = |what: &str| order.iter().position(|o| o == what);
    assert!(place("peer") < place("portb-0"), "{order:?}");

    // It moves its tunnels, another one gets a port, and the first loses its last.
    cloud.as_node(n2, "POST", "register", at("n2", "192.0.2.22")).await.ok();
    let (_, _, data) = events.next().await.unwrap();
    assert_eq!((&data["kind"], &data["object"]["underlay"]["address"]), (&json!("peer"), &json!("192.0.2.22")));
    cloud.assign(&c, n3).await;
    let (_, _, data) = events.next().await.unwrap();
    assert_eq!((&data["kind"], &data["object"]["name"]), (&json!("peer"), &json!("n3")), "before the port");
    assert_eq!(describe(&mut events).await, "put port/c-0");
    cloud.delete(&format!("{INSTANCES}/b")).await.ok();
    cloud.report(n2, e2 + 2, vec![released("instance", &b)]).await;
    let mut last = String::new();
    while last != format!("delete peer/{n2}") {
        last = describe(&mut events).await;
        assert!(!last.contains("n3"), "{last}");
    }
}

#[tokio::test]
async fn a_lease_lives_by_heartbeats() {
    let cloud = Cloud::new().await;
    let (node, epoch) = cloud.register("n1").await;
    let web = cloud.launch("web").await;
    cloud.assign(&web, node).await;
    let usage = json!({"cpu_ns": 5_000_000_000u64, "cpu_milli": 500, "memory": 1 << 20, "disk_read": 0, "disk_write": 0, "net_rx": 0, "net_tx": 0, "at": "2026-03-01T00:00:00Z"});
    let beat = |epoch: u64| {
        let (cloud, usage, id) = (&cloud, usage.clone(), web["metadata"]["id"].clone());
        async move {
            let body = json!({"epoch": epoch, "usage": [[id, usage], [uuid::Uuid::now_v7(), usage]]});
            cloud.as_node(node, "POST", "heartbeat", body).await.ok()["valid"] == json!(true)
        }
    };
    cloud.get(&format!("{INSTANCES}/web/usage")).await.problem("not_found");
    for _ in 0..4 {
        cloud.clock.advance(Duration::from_secs(4));
        assert!(beat(epoch).await);
    }
    assert_eq!(cloud.get(&format!("{INSTANCES}/web/usage")).await.ok()["cpu_milli"], 500);
    let all: Value = cloud.get(&format!("{INSTANCES}/web/usage?all=true")).await.ok();
    assert_eq!(all["items"].as_array().unwrap().len(), 4);
    let metrics = String::from_utf8(cloud.get("/metrics").await.bytes.to_vec()).unwrap();
    assert!(
        metrics.contains("oblak_guest_cpu_seconds_total{project=\"default\",instance=\"web\",node=\"n1\"} 5.000000"),
        "{metrics}"
    );
    assert!(!beat(epoch + 1).await);
    cloud.clock.advance(Duration::from_secs(16));
    let _ = cloud.store.expire();
    assert!(!beat(epoch).await);
    assert!(cloud.keys("/lease").await.is_empty());
    let next = cloud.register_as(node, "n1").await;
    assert_eq!(next, epoch + 1);
    assert!(beat(next).await);
    assert!(!beat(epoch).await, "the old epoch is over");
    cloud.clock.advance(Duration::from_secs(4));
    let _ = cloud.store.expire();
    assert_eq!(cloud.keys("/lease").await.len(), 1);
}
