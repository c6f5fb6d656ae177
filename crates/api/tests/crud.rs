//! What a client sees of objects: create, read, list, change, delete, and every way to get it wrong.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a panic is how a test fails

mod common;

use common::{Cloud, INSTANCES};
use oblak_model::NetworkKind;
use oblak_store::{Store, Txn, Write, objects};
use serde_json::{Value, json};
use std::time::Duration;

const KEYS: &str = "/v1/projects/default/keys";

fn key(name: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"n": name}}, "spec": {"public_key": format!("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBase64base64base64base64base64base64base64 {name}")}})
}

#[tokio::test]
async fn an_object_lives_and_dies() {
    let cloud = Cloud::new().await;
    let network = json!({"metadata": {"name": "blue"}, "spec": {"mtu": 1400}});
    let path = "/v1/projects/default/networks";
    let made = cloud.post(path, network.clone()).await;
    assert_eq!(made.status, 201);
    assert_eq!(made.header("location"), "/v1/projects/default/networks/blue");
    let etag = made.etag();
    let made = made.json();
    assert_eq!(format!("\"{}\"", made["metadata"]["revision"].as_str().unwrap()), etag);
    assert_eq!(
        (&made["kind"], &made["metadata"]["generation"], &made["spec"]["nat"]),
        (&json!("network"), &json!(1), &json!(true))
    );
    cloud.post(path, network).await.problem("name_taken");

    let by_id = format!("{path}/{}", made["metadata"]["id"].as_str().unwrap());
    let read = cloud.get(&by_id).await;
    assert_eq!((read.etag(), read.json()), (etag.clone(), made.clone()));
    let again = cloud.send("GET", &by_id, &cloud.admin, None, &[("if-none-match", &etag)]).await;
    assert_eq!(again.status, 304);

    let blue = format!("{path}/blue");
    let changed =
        cloud.patch(&blue, json!({"metadata": {"labels": {"a": "b"}}, "spec": {"mtu": 1300, "nat": null}})).await.ok();
    assert_eq!(
        (&changed["metadata"]["generation"], &changed["spec"]["mtu"], &changed["spec"]["nat"]),
        (&json!(2), &json!(1300), &json!(true))
    );
    let same = cloud.patch(&blue, json!({"spec": {"mtu": 1300}})).await.ok();
    assert_eq!(same, changed, "a patch that changes nothing writes nothing");
    let labelled = cloud.patch(&blue, json!({"metadata": {"labels": null}})).await.ok();
    assert_eq!((&labelled["metadata"]["generation"], &labelled["metadata"]["labels"]), (&json!(2), &json!({})));

    // Who read it before the change is told so.
    let stale =
        cloud.send("PATCH", &blue, &cloud.admin, Some(json!({"spec": {"mtu": 1500}})), &[("if-match", &etag)]).await;
    assert_eq!(stale.status, 412);
    stale.problem("precondition_failed");
    let mut body = made.clone();
    body["spec"]["mtu"] = json!(1500);
    cloud.send("PUT", &blue, &cloud.admin, Some(body.clone()), &[]).await.problem("precondition_failed");
    body["metadata"].as_object_mut().unwrap().remove("revision");
    assert_eq!(cloud.send("PUT", &blue, &cloud.admin, Some(body), &[]).await.ok()["spec"]["mtu"], 1500);
    cloud.delete(&format!("{blue}?if_match={}", etag.trim_matches('"'))).await.problem("precondition_failed");
    assert_eq!(cloud.delete(&blue).await.status, 204);
    cloud.get(&blue).await.problem("not_found");
    cloud.delete(&blue).await.problem("not_found");
    assert!(cloud.keys("/name/network/default").await.iter().all(|k| !k.ends_with("/blue")));
}

/// What the manual shows of an object and of a list is in every answer, also when it is empty.
#[tokio::test]
async fn every_answer_has_the_promised_shape() {
    let cloud = Cloud::new().await;
    let made = cloud.post("/v1/projects/default/networks", json!({"metadata": {"name": "blue"}, "spec": {}})).await;
    let check = |object: &Value, project: Value| {
        for field in ["kind", "metadata", "spec", "status"] {
            assert!(object.get(field).is_some(), "{field}: {object}");
        }
        for field in ["id", "name", "generation", "revision", "created_at"] {
            assert!(!object["metadata"][field].is_null(), "{field}: {object}");
        }
        assert_eq!(object["metadata"].get("project"), Some(&project), "{object}");
        assert!(object["metadata"]["labels"].is_object(), "{object}");
    };
    check(&made.json(), json!("default"));
    check(&cloud.get("/v1/projects/default/networks/blue").await.ok(), json!("default"));
    for (path, project) in [
        ("/v1/projects/default/networks", json!("default")),
        ("/v1/projects/default/networks?limit=1", json!("default")),
        // A filter takes the longer way.
        ("/v1/projects/default/networks?field=metadata.name=blue", json!("default")),
        ("/v1/flavors", Value::Null),
        ("/v1/users", Value::Null),
        ("/v1/projects", Value::Null),
    ] {
        let list = cloud.get(path).await.ok();
        let items = list["items"].as_array().unwrap();
        assert!(!items.is_empty(), "{path}");
        items.iter().for_each(|item| check(item, project.clone()));
        let next = list.get("next").expect(path);
        assert_eq!(next.is_string(), path.contains("limit"), "{path}: {next}");
        assert!(list["revision"].is_string());
    }
}

#[tokio::test]
async fn lists_have_pages_and_filters() {
    let cloud = Cloud::new().await;
    for i in [3, 1, 4, 2, 5] {
        cloud.post(KEYS, key(&format!("k{i}"))).await.ok();
    }
    let mut names = Vec::new();
    let mut path = format!("{KEYS}?limit=2");
    loop {
        let page = cloud.get(&path).await.ok();
        let items = page["items"].as_array().unwrap();
        assert!(items.len() <= 2);
        names.extend(items.iter().map(|i| i["metadata"]["name"].as_str().unwrap().to_string()));
        let Some(next) = page["next"].as_str() else { break };
        path = format!("{KEYS}?limit=2&cursor={next}");
    }
    assert_eq!(names, ["k1", "k2", "k3", "k4", "k5"]);
    let names = |list: Value| {
        list["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|i| i["metadata"]["name"].as_str().unwrap().to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(cloud.get(&format!("{KEYS}?label=n%3Dk3")).await.ok()), ["k3"]);
    assert_eq!(names(cloud.get(&format!("{KEYS}?label=n!=k3&limit=3")).await.ok()), ["k1", "k2", "k4"]);
    assert_eq!(names(cloud.get(&format!("{KEYS}?field=metadata.name=k4")).await.ok()), ["k4"]);
    // A page of a cache is not shown after a change.
    assert_eq!(names(cloud.get(KEYS).await.ok()).len(), 5);
    assert_eq!(names(cloud.get(KEYS).await.ok()).len(), 5);
    cloud.delete(&format!("{KEYS}/k1")).await;
    assert_eq!(names(cloud.get(KEYS).await.ok()), ["k2", "k3", "k4", "k5"]);

    cloud.get(&format!("{KEYS}?limit=0")).await.problem("malformed");
    cloud.get(&format!("{KEYS}?limit=1001")).await.problem("malformed");
    cloud.get(&format!("{KEYS}?cursor=nonsense")).await.problem("malformed");
    let problem = cloud.get(&format!("{KEYS}?lable=x")).await.problem("malformed");
    assert!(problem["detail"].as_str().unwrap().contains("label"), "{problem}");
}

#[tokio::test]
async fn the_same_creation_sent_twice_creates_once() {
    let cloud = Cloud::new().await;
    let create = |key_name: &'static str, name: &'static str| {
        let cloud = &cloud;
        async move { cloud.send("POST", KEYS, &cloud.admin, Some(key(name)), &[("idempotency-key", key_name)]).await }
    };
    let first = create("a", "one").await;
    let second = create("a", "one").await;
    assert_eq!((second.status.as_u16(), second.header("idempotency-replayed")), (201, "true".into()));
    assert_eq!(first.json(), second.json());
    create("a", "two").await.problem("idempotency_mismatch");
    create("b", "one").await.problem("name_taken");
    // Both at once: one creates, the other gets its answer.
    let (x, y) = tokio::join!(create("c", "three"), create("c", "three"));
    assert_eq!((x.status.as_u16(), y.status.as_u16()), (201, 201));
    assert_eq!(x.json()["metadata"]["id"], y.json()["metadata"]["id"]);
    // Keys of different users have nothing to do with each other.
    let bob = cloud.user("bob").await;
    cloud.patch("/v1/projects/default", json!({"spec": {"grants": [{"user": "bob", "role": "member"}]}})).await.ok();
    let other = cloud.send("POST", KEYS, &bob, Some(key("four")), &[("idempotency-key", "a")]).await;
    assert_eq!(other.status, 201);
    // After a day the key is free again.
    cloud.clock.advance(Duration::from_secs(25 * 3600));
    assert_eq!(create("a", "five").await.status, 201);
}

#[tokio::test]
async fn every_error_is_a_problem_document() {
    let cloud = Cloud::new().await;
    let at = |path: &'static str| cloud.get(path);
    assert_eq!(at("/nothing/here").await.problem("not_found")["status"], 404);
    let method = cloud.send("PATCH", "/v1/whoami", &cloud.admin, Some(json!({})), &[]).await;
    assert_eq!(method.status, 405);
    method.problem("unsupported");
    let sent = cloud.send("GET", "/v1/whoami", "", None, &[("x-request-id", "abc-123")]).await;
    assert_eq!(sent.header("x-request-id"), "abc-123");
    sent.problem("unauthenticated");
    assert!(sent.headers.contains_key("www-authenticate"));

    let broken = cloud.raw("POST", KEYS, &cloud.admin, "{\"metadata\":".into(), &[], None).await;
    assert_eq!(broken.status, 400);
    broken.problem("malformed");
    let wrong = cloud
        .post(
            INSTANCES,
            json!({"metadata": {"name": "a"}, "spec": {"image": "tiny", "publish": [{"host_port": "x", "port": 1}]}}),
        )
        .await;
    assert_eq!(wrong.problem("malformed")["field"], "/spec/publish/0/host_port");
    let unknown =
        cloud.post(INSTANCES, json!({"metadata": {"name": "a"}, "spec": {"image": "tiny", "flavour": "s"}})).await;
    let problem = unknown.problem("malformed");
    assert!(problem["detail"].as_str().unwrap().contains("flavour"), "{problem}");
    let invalid = cloud.post(INSTANCES, json!({"metadata": {"name": "Not A Name"}, "spec": {"image": ""}})).await;
    assert_eq!(invalid.status, 422);
    let problem = invalid.problem("invalid");
    assert_eq!(problem["errors"].as_array().unwrap().len(), 2, "{problem}");

    let large = cloud.raw("POST", KEYS, &cloud.admin, vec![b' '; (1 << 20) + 1].into(), &[], None).await;
    assert_eq!(large.status, 413);
    large.problem("too_large");
    let chunks = futures_util::stream::iter((0..40).map(|_| Ok::<_, std::io::Error>(vec![b' '; 64 * 1024])));
    let endless = cloud.raw("POST", KEYS, &cloud.admin, axum::body::Body::from_stream(chunks), &[], None).await;
    endless.problem("too_large");
    cloud.patch(&format!("{INSTANCES}/none"), json!({"status": {}})).await.problem("not_found");
    cloud.launch("web").await;
    cloud.patch(&format!("{INSTANCES}/web"), json!({"status": {"phase": "running"}})).await.problem("invalid");
    cloud.patch(&format!("{INSTANCES}/web"), json!([1])).await.problem("malformed");
    cloud.patch(&format!("{INSTANCES}/web"), json!({"spec": {"image": "busybox"}})).await.problem("invalid");
}

#[tokio::test]
async fn a_caller_reads_what_it_has_written() {
    let cloud = Cloud::new().await;
    let made = cloud.post(KEYS, key("one")).await;
    let revision = made.header("x-oblak-revision");
    let list = cloud.send("GET", KEYS, &cloud.admin, None, &[("x-oblak-min-revision", &revision)]).await;
    assert_eq!(list.json()["items"].as_array().unwrap().len(), 1);
    cloud.send("GET", KEYS, &cloud.admin, None, &[("x-oblak-min-revision", "soon")]).await.problem("malformed");
}

#[tokio::test]
async fn what_is_used_stays() {
    let cloud = Cloud::new().await;
    cloud.post(KEYS, key("mine")).await.ok();
    let web = cloud
        .post(INSTANCES, json!({"metadata": {"name": "web"}, "spec": {"image": "tiny", "keys": ["mine"]}}))
        .await
        .ok();
    assert!(web["status"]["resolved"]["public_keys"]["mine"].as_str().unwrap().starts_with("ssh-ed25519"));
    for (path, by) in [
        ("/v1/projects/default/keys/mine", "instance/web"),
        ("/v1/projects/default/networks/default", "instance/web"),
        ("/v1/projects/default/subnets/default", "instance/web"),
        ("/v1/projects/default/images/tiny", "instance/web"),
        ("/v1/flavors/s", "instance/web"),
    ] {
        let problem = cloud.delete(path).await.problem("in_use");
        assert!(problem["detail"].as_str().unwrap().contains(by), "{problem}");
        assert!(cloud.get(path).await.ok()["metadata"]["deleted_at"].is_null(), "{path}");
    }
    cloud.delete("/v1/projects/default/security-groups/default").await.problem("wrong_state");
    cloud.delete("/v1/projects/default").await.problem("wrong_state");
    cloud.delete("/v1/users/admin").await.problem("wrong_state");
    cloud.project("other", &[]).await;
    cloud
        .post("/v1/projects/other/instances", json!({"metadata": {"name": "x"}, "spec": {"image": "tiny"}}))
        .await
        .ok();
    let problem = cloud.delete("/v1/projects/other").await.problem("in_use");
    assert!(problem["detail"].as_str().unwrap().contains("instance/x"), "{problem}");
    assert_eq!(cloud.delete("/v1/projects/other/instances/x").await.status, 204);
    assert_eq!(cloud.delete("/v1/projects/other").await.status, 204);
    for prefix in ["/network/other", "/name/subnet/other", "/security-group/other"] {
        assert!(cloud.keys(prefix).await.is_empty(), "{prefix}");
    }
}

#[tokio::test]
async fn a_spec_of_defaults_may_be_left_out() {
    let cloud = Cloud::new().await;
    let path = "/v1/projects/default/networks";
    let made = cloud.post(path, json!({"metadata": {"name": "blue"}})).await.ok();
    assert_eq!((&made["spec"]["mtu"], &made["spec"]["nat"]), (&json!(1500), &json!(true)));
    let apply = json!({"resources": [{"kind": "network", "metadata": {"name": "red"}}]});
    cloud.post("/v1/projects/default/apply", apply).await.ok();
    assert_eq!(cloud.get(&format!("{path}/red")).await.ok()["spec"], made["spec"]);

    let problem = cloud.post(INSTANCES, json!({"metadata": {"name": "web"}})).await.problem("malformed");
    assert!(problem["detail"].as_str().unwrap().contains("missing field `image`"), "{problem}");
    let apply = json!({"resources": [{"kind": "instance", "metadata": {"name": "web"}}]});
    let problem = cloud.post("/v1/projects/default/apply", apply).await.problem("malformed");
    assert!(problem["detail"].as_str().unwrap().contains("missing field `image`"), "{problem}");
    // The description of the API says the same of each kind.
    let document = cloud.send("GET", "/openapi.json", "", None, &[]).await.json();
    let required = |schema: &str| document["components"]["schemas"][schema]["required"].clone();
    assert_eq!(required("NewNetwork"), json!(["metadata"]));
    assert_eq!(required("NewInstance"), json!(["metadata", "spec"]));
    let body = &document["paths"][path.replace("default", "{project}")]["post"]["requestBody"]["content"];
    assert_eq!(body["application/json"]["schema"]["$ref"], "#/components/schemas/NewNetwork");

    // Replacing everything with defaults has to be said.
    let body = json!({"metadata": {"name": "blue"}});
    let problem = cloud.send("PUT", &format!("{path}/blue"), &cloud.admin, Some(body), &[]).await.problem("invalid");
    assert_eq!(problem["field"], "/spec");
}

/// What one command made goes with one command, whole or not at all.
#[tokio::test]
async fn a_network_takes_its_subnets_with_it() {
    let cloud = Cloud::new().await;
    let (networks, subnets) = ("/v1/projects/default/networks", "/v1/projects/default/subnets");
    let subnet = |name: &str, network: &str, n: usize| json!({"metadata": {"name": name}, "spec": {"network": network, "cidr": format!("10.9.{n}.0/24")}});
    for name in ["blue", "red"] {
        cloud.post(networks, json!({"metadata": {"name": name}, "spec": {}})).await.ok();
        cloud.post(subnets, subnet(&format!("{name}-a"), name, 0)).await.ok();
        cloud.post(subnets, subnet(&format!("{name}-b"), name, 1)).await.ok();
    }
    for name in ["one", "two"] {
        let body = json!({"metadata": {"name": name}, "spec": {"image": "tiny", "networks": [{"network": "blue"}]}});
        cloud.post(INSTANCES, body).await.ok();
    }
    let blue = format!("{networks}/blue");
    let problem = cloud.delete(&blue).await.problem("in_use");
    assert_eq!(problem["detail"], "network/blue is used by instance/one, instance/two");
    assert_eq!(cloud.get(&format!("{subnets}/blue-b")).await.status, 200, "nothing is gone");
    for name in ["one", "two"] {
        assert_eq!(cloud.delete(&format!("{INSTANCES}/{name}")).await.status, 204);
    }
    assert_eq!(cloud.delete(&blue).await.status, 204);
    let left: Vec<_> = cloud.keys("/name/subnet/default").await;
    assert_eq!(left.len(), 3, "default and those of red stay: {left:?}");
    assert!(cloud.keys("/name/network/default").await.iter().all(|key| !key.ends_with("/blue")));

    // A commit has a limit.
    for n in 2..31 {
        cloud.post(subnets, subnet(&format!("red-{n}"), "red", n)).await.ok();
    }
    let red = format!("{networks}/red");
    let problem = cloud.delete(&red).await.problem("in_use");
    assert!(problem["detail"].as_str().unwrap().contains("31 subnets; delete all but 30"), "{problem}");
    assert_eq!(cloud.delete(&format!("{subnets}/red-a")).await.status, 204);
    assert_eq!(cloud.delete(&red).await.status, 204);
    assert_eq!(cloud.keys("/subnet/default").await.len(), 1);
}

#[tokio::test]
async fn apply_makes_all_or_nothing_and_a_plan_makes_nothing() {
    let cloud = Cloud::new().await;
    cloud.register("n1").await;
    cloud.patch("/v1/flavors/s", json!({"spec": {"price_per_hour_micros": 700}})).await.ok();
    let path = "/v1/projects/default/apply";
    let instance = |name: &str, image: &str| json!({"kind": "instance", "metadata": {"name": name}, "spec": {"image": image, "volumes": [{"volume": "data"}], "networks": [{"network": "blue"}]}});
    let stack = |image: &str| {
        json!({"resources": [
            instance("web", image),
            {"kind": "volume", "metadata": {"name": "data"}, "spec": {"size": "1GiB"}},
            {"kind": "subnet", "metadata": {"name": "blue"}, "spec": {"network": "blue", "cidr": "10.9.0.0/24"}},
            {"kind": "network", "metadata": {"name": "blue"}, "spec": {}},
        ]})
    };
    let before = cloud.commits().await;
    let problem = cloud.post(path, stack("nonsense")).await.problem("invalid");
    assert_eq!(problem["field"], "/resources/0/spec/image");
    let plan = cloud.post(&format!("{path}?plan=true"), stack("tiny")).await.ok();
    assert_eq!(
        (&plan["committed"], &plan["changes"][0]["action"], &plan["changes"][0]["node"]),
        (&json!(false), &json!("create"), &json!("n1"))
    );
    assert_eq!(plan["price_per_hour_micros"], 700);
    assert_eq!(cloud.commits().await, before, "neither wrote anything");

    let applied = cloud.send("POST", path, &cloud.admin, Some(stack("tiny")), &[("idempotency-key", "s")]).await.ok();
    assert_eq!(cloud.commits().await, before + 1, "one commit");
    assert_eq!(applied["committed"], true);
    let repeated = cloud.send("POST", path, &cloud.admin, Some(stack("tiny")), &[("idempotency-key", "s")]).await;
    assert_eq!(repeated.header("idempotency-replayed"), "true");
    let again = cloud.post(path, stack("tiny")).await.ok();
    assert!(again["changes"].as_array().unwrap().iter().all(|c| c["action"] == "unchanged"), "{again}");
    let web = cloud.get(&format!("{INSTANCES}/web")).await.ok();
    assert_eq!(web["status"]["addresses"][0]["address"], "10.9.0.2");
    assert_eq!(
        cloud.get("/v1/projects/default/volumes/data").await.ok()["status"]["attached_to"],
        web["metadata"]["id"]
    );

    let mut grown = stack("tiny");
    grown["resources"][1]["spec"]["size"] = json!("2GiB");
    let changed = cloud.post(path, grown).await.ok();
    assert_eq!(changed["changes"][1]["action"], "update");
    assert_eq!(
        changed["changes"][1]["fields"][0],
        json!({"field": "/spec/size", "old": 1u64 << 30, "new": 2u64 << 30})
    );
    let many: Vec<_> = (0..40)
        .map(|i| json!({"kind": "key", "metadata": {"name": format!("k{i}")}, "spec": key("x")["spec"]}))
        .collect();
    cloud.post(path, json!({"resources": many})).await.problem("too_large");
    let huge = json!({"resources": [{"kind": "instance", "metadata": {"name": "huge"}, "spec": {"image": "tiny", "flavor": "xl"}}]});
    let plan = cloud.post(&format!("{path}?plan=true"), huge).await.ok();
    assert!(plan["changes"][0]["why"].as_str().unwrap().contains("memory 32 GiB asked, 16 GiB free on n1"), "{plan}");
}

#[tokio::test]
async fn service_paths_answer() {
    let cloud = Cloud::new().await;
    assert_eq!(cloud.send("GET", "/healthz", "", None, &[]).await.status, 200);
    assert_eq!(cloud.send("GET", "/readyz", "", None, &[]).await.status, 200);
    assert!(cloud.send("GET", "/v1/ca.pem", "", None, &[]).await.bytes.starts_with(b"-----BEGIN CERTIFICATE"));
    assert_eq!(cloud.send("GET", "/openapi.json", "", None, &[]).await.json()["openapi"], "3.1.0");
    let docs = cloud.send("GET", "/docs", "", None, &[]).await;
    let page = String::from_utf8(docs.bytes.to_vec()).unwrap();
    assert!(page.contains("/openapi.json") && !page.contains("http://") && !page.contains("https://"));
    cloud.launch("web").await;
    cloud.send("GET", "/metrics", "", None, &[]).await.problem("unauthenticated");
    let metrics = String::from_utf8(cloud.get("/metrics").await.bytes.to_vec()).unwrap();
    for line in [
        "oblak_instances{phase=\"pending\",isolation=\"vm\"} 1",
        "oblak_http_requests_total{route=\"/v1/projects/{project}/instances\",method=\"POST\",status=\"201\"} 1",
        "oblak_tunnels 0",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
    let me = cloud.get("/v1/whoami").await.ok();
    assert_eq!((&me["user"], &me["cloud_admin"]), (&json!("admin"), &json!(true)));
    let flavors = cloud.get("/v1/flavors").await.ok();
    assert_eq!(flavors["items"].as_array().unwrap().len(), 5);
    let images = cloud.get("/v1/projects/default/images").await.ok();
    assert_eq!(images["items"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn too_many_requests_wait() {
    let cloud = Cloud::with(
        |config| {
            config.limits.requests_per_second = 1;
            config.limits.requests_burst = 3;
        },
        |clock| oblak_store::MemoryStore::with(clock, oblak_store::HistoryLimits::default()),
    )
    .await;
    for _ in 0..3 {
        cloud.get("/v1/whoami").await.ok();
    }
    let limited = cloud.get("/v1/whoami").await;
    assert_eq!(limited.status, 429);
    limited.problem("rate_limited");
    cloud.clock.advance(Duration::from_secs(1));
    cloud.get("/v1/whoami").await.ok();
}

/// Every network has a number of its own between nodes, taken with it and given back with it.
#[tokio::test]
async fn networks_have_numbers_of_their_own() {
    let cloud = Cloud::new().await;
    let path = "/v1/projects/default/networks";
    let number = |network: &Value| network["status"]["vni"].as_u64().unwrap();
    let first = number(&cloud.get(&format!("{path}/default")).await.ok());
    cloud.project("other", &[]).await;
    let second = number(&cloud.get("/v1/projects/other/networks/default").await.ok());
    let forged = json!({"metadata": {"name": "blue"}, "spec": {}, "status": {"vni": first}});
    let third = number(&cloud.post(path, forged).await.ok());
    assert!(first != second && second != third && first != third, "{first} {second} {third}");
    let key = |n: u64| format!("/vni/_/{n}");
    let mut expected = [first, second, third].map(key);
    expected.sort();
    let mut keys = cloud.keys("/vni").await;
    keys.sort();
    assert_eq!(keys, expected);
    cloud.patch(&format!("{path}/blue"), json!({"spec": {"mtu": 1400}, "status": {"vni": 7}})).await;
    assert_eq!(number(&cloud.get(&format!("{path}/blue")).await.ok()), third, "nobody changes it");
    cloud.delete(&format!("{path}/blue")).await.ok();
    cloud.delete("/v1/projects/other").await.ok();
    assert_eq!(cloud.keys("/vni").await, [key(first)]);
}

/// Networks from before there were numbers get theirs when a server starts, or with the next instance.
#[tokio::test]
async fn old_networks_get_their_numbers() {
    let cloud = Cloud::new().await;
    let forget = async || {
        let shown = cloud.get("/v1/projects/default/networks/default").await.ok();
        let mut network = cloud.read::<NetworkKind>("default", &shown["metadata"]["id"]).await.unwrap();
        let key = objects::vni_key(network.status.vni.take().unwrap());
        let (guard, write) = objects::update_ops(&network);
        let txn = Txn { guards: vec![guard], writes: vec![write, Write::Delete { key }], ..Txn::random() };
        assert!(cloud.store.commit(txn).await.unwrap().revision().is_some());
        cloud.settle().await;
        assert_eq!(cloud.get("/v1/projects/default/networks/default").await.ok()["status"]["vni"], Value::Null);
    };
    let has_one = async || {
        cloud.settle().await;
        let shown = cloud.get("/v1/projects/default/networks/default").await.ok();
        assert_eq!(cloud.keys("/vni").await, [format!("/vni/_/{}", shown["status"]["vni"].as_u64().unwrap())]);
    };
    forget().await;
    let random = oblak_platform::random::system();
    oblak_api::bootstrap(cloud.store.clone(), cloud.clock.clone(), random).await.unwrap();
    has_one().await;
    forget().await;
    cloud.launch("web").await;
    has_one().await;
}
