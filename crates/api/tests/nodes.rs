//! Nodes come, renew their certificates, and go; and what a hostile one can do: nothing beyond what is assigned to it.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use common::{Answer, Cloud, Events, INSTANCES, instance_item, released};
use oblak_identity::join::JoinToken;
use oblak_identity::pki;
use oblak_model::cluster::PROTOCOL;
use oblak_model::{ClusterLeader, ClusterServer, ClusterServers, ImageKind, InstanceKind, NodeId, ServerId};
use oblak_store::{Store, objects};
use serde_json::{Value, json};
use std::time::Duration;

const TOKENS: &str = "/v1/join-tokens";

async fn token(cloud: &Cloud, name: &str, spec: Value) -> JoinToken {
    let made = cloud.post(TOKENS, json!({"metadata": {"name": name}, "spec": spec})).await.ok();
    made["status"]["secret"].as_str().unwrap().parse().unwrap()
}

async fn join(cloud: &Cloud, secret: &str, csr: &str, name: &str) -> Answer {
    let body = json!({"join_token": secret, "csr_pem": csr, "name": name, "zone": "z2", "labels": {"disk": "ssd"}});
    cloud.send("POST", "/v1/nodes/enroll", "", Some(body), &[]).await
}

fn id_of(answer: &Value) -> NodeId {
    answer["id"].as_str().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_join_token_works_once() {
    let cloud = Cloud::new().await;
    let token = token(&cloud, "t1", json!({"ttl": "10m"})).await;
    let (_, csr) = pki::node_request().unwrap();
    // The secret is nowhere in the store, and shown never again.
    let shown = cloud.get(&format!("{TOKENS}/t1")).await.ok();
    assert_eq!(shown["status"]["secret"], Value::Null);
    let (entries, _) = oblak_store::list_all(&*cloud.store, &oblak_store::Prefix::all(), None).await.unwrap();
    let holds = |text: &str| entries.iter().any(|e| String::from_utf8_lossy(&e.value).contains(text));
    assert!(!holds(token.secret()) && holds(&token.digest()));

    let joined = join(&cloud, token.secret(), &csr, "n2").await.ok();
    let node = cloud.get("/v1/nodes/n2").await.ok();
    assert_eq!(node["metadata"]["id"], joined["id"]);
    assert_eq!((&node["spec"]["zone"], &node["metadata"]["labels"]["disk"]), (&json!("z2"), &json!("ssd")));
    assert_eq!(node["status"]["phase"], "unknown");
    let used = cloud.get(&format!("{TOKENS}/t1")).await.ok();
    assert_eq!((&used["status"]["node_name"], &used["status"]["node"]), (&json!("n2"), &joined["id"]));
    let events = cloud.get("/v1/events").await.ok();
    let said =
        |e: &Value| e["spec"]["reason"] == "Joined" && e["spec"]["message"].as_str().unwrap().contains("join-token/t1");
    assert!(events["items"].as_array().unwrap().iter().any(said), "{events}");

    // The machine that lost the answer asks again; another one with the same token is refused, whatever name it wants.
    assert_eq!(join(&cloud, token.secret(), &csr, "n2").await.ok()["id"], joined["id"]);
    let (_, other) = pki::node_request().unwrap();
    for name in ["n2", "n3"] {
        let refused = join(&cloud, token.secret(), &other, name).await.problem("join_token_used");
        assert!(refused["detail"].as_str().unwrap().contains("\"n2\""), "{refused}");
    }
    join(&cloud, token.secret(), &csr, "n3").await.problem("join_token_used");
    assert_eq!(cloud.get("/v1/nodes").await.ok()["items"].as_array().unwrap().len(), 1);
    assert_eq!(cloud.register_as(id_of(&joined), "n2").await, 1);
}

#[tokio::test]
async fn what_a_join_token_does_not_do() {
    let cloud = Cloud::new().await;
    let (_, csr) = pki::node_request().unwrap();
    // Expired, deleted, never made.
    let old = token(&cloud, "old", json!({"ttl": "10s"})).await;
    cloud.clock.advance(Duration::from_secs(10));
    join(&cloud, old.secret(), &csr, "n2").await.problem("join_token_expired");
    let gone = token(&cloud, "gone", json!({})).await;
    cloud.delete(&format!("{TOKENS}/gone")).await.ok();
    assert!(cloud.keys("/secret/join-token").await.iter().all(|key| !key.contains(&gone.digest())));
    join(&cloud, gone.secret(), &csr, "n2").await.problem("join_token_unknown");
    join(&cloud, "guess", &csr, "n2").await.problem("join_token_unknown");
    // Guessing is slowed down.
    let mut limited = false;
    for _ in 0..30 {
        limited |= join(&cloud, "guess", &csr, "n2").await.json()["code"] == "rate_limited";
    }
    assert!(limited);
    cloud.clock.advance(Duration::from_secs(120));
    // A name that is taken, by a live node or not, stays with its node; only its own key gets it again.
    let first = token(&cloud, "first", json!({})).await;
    let joined = join(&cloud, first.secret(), &csr, "n2").await.ok();
    let second = token(&cloud, "second", json!({})).await;
    let (_, other) = pki::node_request().unwrap();
    join(&cloud, second.secret(), &other, "n2").await.problem("name_taken");
    assert_eq!(join(&cloud, second.secret(), &csr, "n2").await.ok()["id"], joined["id"]);
    // It is no login, and only cloud admins make it.
    cloud.send("GET", "/v1/nodes", &first.reveal(), None, &[]).await.problem("unauthenticated");
    let eve = cloud.user("eve").await;
    let body = json!({"metadata": {"name": "x"}, "spec": {}});
    cloud.send("POST", TOKENS, &eve, Some(body.clone()), &[]).await.problem("forbidden");
    cloud.send("GET", TOKENS, &eve, None, &[]).await.problem("forbidden");
    // Servers cannot join where the state is in a file, and it is said why.
    let server = json!({"metadata": {"name": "s"}, "spec": {"role": "server"}});
    let refused = cloud.post(TOKENS, server).await.problem("unsupported");
    assert!(refused["detail"].as_str().unwrap().contains("state"), "{refused}");
    cloud.post(TOKENS, json!({"metadata": {"name": "l"}, "spec": {"ttl": "31d"}})).await.problem("invalid");
    join(&cloud, second.secret(), "junk", "n4").await.problem("invalid");
}

#[tokio::test]
async fn certificates_are_renewed_by_their_own_node_only() {
    let life = Duration::from_secs(900);
    let cloud = Cloud::with(
        |config| config.node_certificate_life = life,
        |clock| oblak_store::MemoryStore::with(clock, oblak_store::HistoryLimits::default()),
    )
    .await;
    let token = token(&cloud, "t", json!({})).await;
    let (_, csr) = pki::node_request().unwrap();
    let joined = join(&cloud, token.secret(), &csr, "n2").await.ok();
    let node = id_of(&joined);
    let now = oblak_platform::clock::Clock::now(&*cloud.clock);
    let at = |field: &str| joined[field].as_str().unwrap().parse::<oblak_model::Timestamp>().unwrap().since(now);
    assert_eq!(at("expires_at"), life);
    assert!((life * 7 / 12..=life * 2 / 3).contains(&at("renew_at")), "{:?}", at("renew_at"));
    let (_, next) = pki::node_request().unwrap();
    let renewed = cloud.as_node(node, "POST", "certificate", json!({"csr_pem": next})).await.ok();
    assert_eq!(renewed["id"], joined["id"]);
    let (_, pem) = x509(&renewed);
    assert_eq!(pki::node_of_certificate(&pem), Some(node));
    // Another node's certificate, a user, nobody.
    let (other, _) = cloud.register("n9").await;
    let path = format!("/v1/nodes/{node}/certificate");
    let body = || json!({"csr_pem": next}).to_string().into();
    cloud.raw("POST", &path, "", body(), &[], Some(other)).await.problem("forbidden");
    cloud.raw("POST", &path, &cloud.admin, body(), &[], None).await.problem("forbidden");
    cloud.raw("POST", &path, "", body(), &[], None).await.problem("unauthenticated");
}

fn x509(answer: &Value) -> (String, Vec<u8>) {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;
    let pem = answer["certificate_pem"].as_str().unwrap();
    (pem.to_string(), CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec())
}

#[tokio::test]
async fn a_removed_node_is_shut_out_and_what_it_had_says_so() {
    let cloud = Cloud::new().await;
    let (node, epoch) = cloud.register("n1").await;
    let web = cloud.launch("web").await;
    cloud.assign(&web, node).await;
    cloud.running(node, epoch, &web).await;
    let mut watch = Events::open(&cloud, &format!("/v1/nodes/{node}/watch"), "", Some(node)).await;
    watch.next().await.unwrap();

    let refused = cloud.post("/v1/nodes/n1/remove", json!({})).await.problem("in_use");
    assert!(refused["detail"].as_str().unwrap().contains("1 instance (default/web)"), "{refused}");
    assert_eq!(cloud.get("/v1/nodes/n1").await.ok()["status"]["phase"], "ready");
    let eve = cloud.user("eve").await;
    cloud.send("POST", "/v1/nodes/n1/remove", &eve, Some(json!({"force": true})), &[]).await.problem("forbidden");

    let lost = cloud.post("/v1/nodes/n1/remove", json!({"force": true})).await.ok();
    assert_eq!(lost["instances"], json!(["default/web"]));
    cloud.get("/v1/nodes/n1").await.problem("not_found");
    let after = cloud.get(&format!("{INSTANCES}/web")).await.ok();
    assert_eq!((&after["status"]["phase"], &after["status"]["reason"]), (&json!("failed"), &json!("NodeRemoved")));
    // What is open ends, and nothing opens any more.
    while watch.next().await.is_some() {}
    for (method, path) in
        [("POST", "register"), ("POST", "heartbeat"), ("POST", "report"), ("GET", "watch"), ("POST", "certificate")]
    {
        let answer = cloud.as_node(node, method, path, json!({})).await;
        assert_eq!(answer.status, 403);
        answer.problem("node_removed");
    }
    // The lost instance can be deleted without its node, and gives everything back.
    cloud.delete(&format!("{INSTANCES}/web")).await.ok();
    assert!(cloud.read::<InstanceKind>("default", &web["metadata"]["id"]).await.is_none());
    assert!(cloud.keys("/address").await.is_empty() && cloud.keys("/allocation").await.is_empty());
    // The name is free, for another node.
    let (again, _) = cloud.register("n1").await;
    assert_ne!(again, node);
    // An empty node goes without force.
    cloud.post("/v1/nodes/n1/remove", json!({})).await.ok();
    cloud.post("/v1/nodes/n1/remove", json!({})).await.problem("not_found");
}

async fn image(cloud: &Cloud, node: NodeId, epoch: u64, digest: &str) -> Value {
    let made = cloud
        .post(
            "/v1/projects/default/images",
            json!({"metadata": {"name": "own"}, "spec": {"source": {"type": "url", "url": "http://x/y"}}}),
        )
        .await
        .ok();
    // As the reconciler of images does.
    let mut image = cloud.read::<ImageKind>("default", &made["metadata"]["id"]).await.unwrap();
    image.status.node = Some(node);
    image.metadata.finalizers.insert("node".into());
    let mut ops = oblak_control::lifecycle::Ops::new();
    ops.update(&image);
    let mut batch = oblak_control::lifecycle::Batch::new();
    batch.absorb(ops);
    cloud.store.commit(batch.into_txn(oblak_store::Txn::random().id)).await.unwrap().revision().unwrap();
    cloud.settle().await;
    let ready = json!({
        "kind": "image", "project": "default", "id": made["metadata"]["id"], "phase": "ready", "reason": "", "message": "",
        "progress": 100, "digest": digest, "size": 5, "virtual_size": 5, "content": "disk", "generation": 1, "properties": {},
    });
    assert_eq!(cloud.report(node, epoch, vec![ready]).await["refused"], json!([]));
    made
}

fn copy(image: &Value, digest: &str, present: bool) -> Value {
    json!({"kind": "image_copy", "project": "default", "id": image["metadata"]["id"], "digest": digest, "present": present})
}

#[tokio::test]
async fn an_image_that_failed_is_tried_again_when_asked() {
    const OWN: &str = "/v1/projects/default/images/own";
    let cloud = Cloud::new().await;
    let (node, epoch) = cloud.register("n1").await;
    let ready = image(&cloud, node, epoch, "sha256:a").await;
    let again = |n: u32| json!({"spec": {"retry_generation": n}});
    // What is good stays as it is.
    let shown = cloud.patch(OWN, again(1)).await.ok();
    assert_eq!(shown["status"]["phase"], "ready", "{shown}");
    let failed = json!({"kind": "image", "project": "default", "id": ready["metadata"]["id"], "phase": "failed", "reason": "network",
        "message": "nobody answers", "progress": 0, "size": 0, "virtual_size": 0, "properties": {}, "generation": shown["metadata"]["generation"]});
    assert_eq!(cloud.report(node, epoch, vec![failed]).await["refused"], json!([]));
    assert_eq!(cloud.get(OWN).await.ok()["status"]["phase"], "failed");
    cloud.patch(OWN, again(0)).await.problem("invalid");
    let shown = cloud.patch(OWN, again(2)).await.ok();
    assert_eq!((&shown["status"]["phase"], &shown["status"]["node"]), (&json!("pending"), &json!(node)), "{shown}");
    assert!(shown["status"].get("message").is_none(), "{shown}");
}

#[tokio::test]
async fn copies_of_images_are_known_and_go_with_the_image() {
    let cloud = Cloud::new().await;
    let (first, e1) = cloud.register("n1").await;
    let (second, e2) = cloud.register("n2").await;
    let own = image(&cloud, first, e1, "sha256:a").await;
    let body = json!({"metadata": {"name": "web"}, "spec": {"image": "own", "isolation": "vm"}});
    let web = cloud.post(INSTANCES, body).await.ok();
    // Without an instance that uses it nobody may claim a copy.
    let refused = cloud.report(second, e2, vec![copy(&own, "sha256:a", true)]).await;
    assert_eq!(refused["refused"][0][1], "not on this node");
    cloud.assign(&web, second).await;
    let refused = cloud.report(second, e2, vec![copy(&own, "sha256:b", true)]).await;
    assert!(refused["refused"][0][1].as_str().unwrap().contains("other content"), "{refused}");
    assert_eq!(cloud.report(second, e2, vec![copy(&own, "sha256:a", true)]).await["refused"], json!([]));
    let shown = cloud.get("/v1/projects/default/images/own").await.ok();
    assert_eq!(shown["status"]["nodes"], json!([first, second]));
    assert_eq!(shown["status"]["node"], json!(first));

    // The image outlives the node that imported it.
    cloud.report(second, e2, vec![instance_item(&web, "stopped")]).await;
    cloud.post("/v1/nodes/n1/remove", json!({"force": true})).await.ok();
    let shown = cloud.get("/v1/projects/default/images/own").await.ok();
    assert_eq!((&shown["status"]["nodes"], &shown["status"]["node"]), (&json!([second]), &json!(second)));
    assert_eq!(shown["status"]["phase"], "ready");

    // A third one copies it, and both clean up before it goes.
    let (third, e3) = cloud.register("n3").await;
    let job = cloud
        .post(INSTANCES, json!({"metadata": {"name": "job"}, "spec": {"image": "own", "isolation": "vm"}}))
        .await
        .ok();
    cloud.assign(&job, third).await;
    assert_eq!(cloud.report(third, e3, vec![copy(&own, "sha256:a", true)]).await["refused"], json!([]));
    for (name, node, epoch, object) in [("web", second, e2, &web), ("job", third, e3, &job)] {
        cloud.delete(&format!("{INSTANCES}/{name}")).await.ok();
        assert_eq!(cloud.report(node, epoch, vec![released("instance", object)]).await["refused"], json!([]));
    }
    cloud.delete("/v1/projects/default/images/own").await.ok();
    cloud.report(second, e2, vec![released("image", &own)]).await;
    let rest = cloud.get("/v1/projects/default/images/own").await.ok();
    assert_eq!((&rest["status"]["nodes"], &rest["status"]["node"]), (&json!([third]), &json!(third)));
    cloud.report(third, e3, vec![released("image", &own)]).await;
    cloud.get("/v1/projects/default/images/own").await.problem("not_found");
}

#[tokio::test]
async fn a_hostile_node_gets_nothing_that_is_not_its_own() {
    let cloud = Cloud::new().await;
    let (good, e1) = cloud.register("good").await;
    let (evil, e2) = cloud.register("evil").await;
    let web = cloud.launch("web").await;
    cloud.assign(&web, good).await;
    cloud.running(good, e1, &web).await;
    let own = image(&cloud, good, e1, "sha256:a").await;

    // Paths of another node.
    for (method, path) in [
        ("POST", "register"),
        ("POST", "heartbeat"),
        ("POST", "report"),
        ("POST", "certificate"),
        ("GET", "watch"),
        ("GET", "tunnel"),
        ("GET", &format!("images/{}/content", own["metadata"]["id"].as_str().unwrap())),
    ] {
        let path = format!("/v1/nodes/{good}/{path}");
        let answer = cloud.raw(method, &path, "", "{}".into(), &[], Some(evil)).await;
        assert_eq!(answer.problem("forbidden")["code"], "forbidden", "{method} {path}");
    }
    // What people use.
    for (method, path) in [
        ("GET", INSTANCES.to_string()),
        ("GET", format!("{INSTANCES}/web")),
        ("DELETE", format!("{INSTANCES}/web")),
        ("POST", INSTANCES.to_string()),
        ("GET", format!("{INSTANCES}/web/logs")),
        ("GET", format!("{INSTANCES}/web/exec")),
        ("GET", "/v1/projects".into()),
        ("GET", "/v1/users".into()),
        ("GET", "/v1/tokens".into()),
        ("POST", "/v1/tokens".into()),
        ("GET", TOKENS.into()),
        ("POST", TOKENS.into()),
        ("GET", "/v1/nodes".into()),
        ("GET", "/v1/instances".into()),
        ("GET", "/v1/events".into()),
        ("GET", "/v1/flavors".into()),
        ("GET", "/metrics".into()),
        ("POST", "/v1/nodes/good/remove".into()),
        ("POST", "/v1/projects/default/apply".into()),
        ("PUT", "/v1/projects/default/images/own/content".into()),
    ] {
        let body = r#"{"metadata": {"name": "x"}, "spec": {}, "resources": []}"#;
        let answer = cloud.raw(method, &path, "", body.into(), &[], Some(evil)).await;
        assert!(answer.status == 403 || answer.status == 404, "{method} {path}: {}", answer.status);
    }
    // Words about what is elsewhere: each item is refused, nothing changes.
    let revision = cloud.store.revision().await.unwrap();
    let claims = vec![
        instance_item(&web, "failed"),
        released("instance", &web),
        released("image", &own),
        copy(&own, "sha256:a", true),
    ];
    let refused = cloud.report(evil, e2, claims).await;
    assert_eq!(refused["refused"].as_array().unwrap().len(), 4, "{refused}");
    let about = json!({"kind": "instance", "name": "web", "id": web["metadata"]["id"]});
    let event = json!({"project": "default", "about": about, "severity": "warning", "reason": "Lies", "message": "x"});
    cloud.as_node(evil, "POST", "report", json!({"epoch": e2, "items": [], "events": [event]})).await.ok();
    assert_eq!(cloud.store.revision().await.unwrap(), revision);
    // Content of an image that none of its instances uses.
    let content = format!("images/{}/content", own["metadata"]["id"].as_str().unwrap());
    cloud.as_node(evil, "GET", &content, json!({})).await.problem("not_found");
    // Its own watch shows nothing of the others.
    let mut watch = Events::open(&cloud, &format!("/v1/nodes/{evil}/watch"), "", Some(evil)).await;
    loop {
        let (_, _, event) = watch.next().await.unwrap();
        if event["type"] == "synced" {
            break;
        }
        assert_eq!((&event["kind"], &event["object"]["metadata"]["name"]), (&json!("node"), &json!("evil")), "{event}");
    }
}

#[tokio::test]
async fn only_the_pulling_node_learns_the_password_of_a_registry() {
    let cloud = Cloud::new().await;
    let (puller, _) = cloud.register("puller").await;
    let (user, _) = cloud.register("user").await;
    let source = json!({"type": "registry", "reference": "r.example/a:1", "username": "u", "password": "s3cret-word"});
    let body = json!({"metadata": {"name": "app"}, "spec": {"source": source, "content": "oci"}});
    let made = cloud.post("/v1/projects/default/images", body).await.ok();
    let mut image = cloud.read::<ImageKind>("default", &made["metadata"]["id"]).await.unwrap();
    image.status.node = Some(puller);
    let mut ops = oblak_control::lifecycle::Ops::new();
    ops.update(&image);
    let mut batch = oblak_control::lifecycle::Batch::new();
    batch.absorb(ops);
    cloud.store.commit(batch.into_txn(oblak_store::Txn::random().id)).await.unwrap().revision().unwrap();
    cloud.settle().await;
    let body = json!({"metadata": {"name": "job"}, "spec": {"image": "app", "isolation": "container"}});
    let job = cloud.post(INSTANCES, body).await.ok();
    cloud.assign(&job, user).await;
    for (node, sees) in [(puller, true), (user, false)] {
        let mut watch = Events::open(&cloud, &format!("/v1/nodes/{node}/watch"), "", Some(node)).await;
        let mut shown = Vec::new();
        loop {
            let (_, _, event) = watch.next().await.unwrap();
            if event["type"] == "synced" {
                break;
            }
            shown.push(event);
        }
        let app = shown.iter().find(|e| e["kind"] == "image").expect("both are told about the image");
        assert_eq!(app.to_string().contains("s3cret-word"), sees, "{app}");
    }
}

#[tokio::test]
async fn everybody_who_is_known_learns_where_the_servers_are() {
    let cloud = Cloud::new().await;
    let path = "/v1/cluster/servers";
    assert_eq!(cloud.get(path).await.ok(), json!({"servers": [], "leader": null}));
    let (one, two) = (ServerId(uuid::Uuid::from_u128(1)), ServerId(uuid::Uuid::from_u128(2)));
    let server = |id: ServerId| ClusterServer {
        id,
        name: "s".into(),
        endpoints: vec![format!("https://{}:7443", id.short())],
        version: "1".into(),
        protocol: PROTOCOL,
        started_at: oblak_model::Timestamp::EPOCH,
    };
    let lease = cloud.store.grant(Duration::from_secs(5)).await.unwrap();
    let leader = ClusterLeader { server: two, epoch: 7, since: oblak_model::Timestamp::EPOCH };
    let txn = oblak_store::Txn::random()
        .put(objects::server_key(one), objects::encode_value(&server(one)))
        .put_leased(objects::server_key(two), objects::encode_value(&server(two)), lease.id)
        .put_leased(objects::leader_key(), objects::encode_value(&leader), lease.id);
    let at = cloud.store.commit(txn).await.unwrap().revision().unwrap().to_string();
    let seen: ClusterServers = serde_json::from_value(
        cloud.send("GET", path, &cloud.admin, None, &[("x-oblak-min-revision", &at)]).await.ok(),
    )
    .unwrap();
    assert_eq!(seen, ClusterServers { servers: vec![server(one), server(two)], leader: Some(leader) });
    cloud.send("GET", path, "", None, &[]).await.problem("unauthenticated");
    let node = NodeId(uuid::Uuid::from_u128(9));
    cloud.register_as(node, "n1").await;
    assert_eq!(cloud.raw("GET", path, "", axum::body::Body::empty(), &[], Some(node)).await.ok()["leader"]["epoch"], 7);
    // Who dies is out of the list.
    cloud.store.revoke(lease.id).await.unwrap();
    let at = cloud.store.revision().await.unwrap().to_string();
    let left = cloud.send("GET", path, &cloud.admin, None, &[("x-oblak-min-revision", &at)]).await.ok();
    assert_eq!((left["servers"].as_array().unwrap().len(), &left["leader"]), (1, &Value::Null));
}
