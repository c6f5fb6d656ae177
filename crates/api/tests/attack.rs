//! From the attacker's side.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a panic is how a test fails

mod common;

use common::{Cloud, Events, INSTANCES, instance_item, released};
use serde_json::json;
use std::time::Duration;

#[tokio::test]
async fn objects_of_other_projects_do_not_exist() {
    let cloud = Cloud::new().await;
    let web = cloud.launch("web").await;
    let eve = cloud.user("eve").await;
    cloud.project("hers", &[("eve", "admin")]).await;
    let id = web["metadata"]["id"].as_str().unwrap();
    let missing =
        cloud.send("GET", "/v1/projects/none/instances/web", &eve, None, &[]).await.problem("not_found")["detail"]
            .clone();
    for (method, path) in [
        ("GET", format!("{INSTANCES}/web")),
        ("GET", format!("{INSTANCES}/{id}")),
        ("GET", INSTANCES.to_string()),
        ("GET", format!("{INSTANCES}?watch=true")),
        ("DELETE", format!("{INSTANCES}/web")),
        ("GET", format!("{INSTANCES}/web/explain")),
        ("GET", format!("{INSTANCES}/web/logs")),
        ("GET", format!("{INSTANCES}/web/console")),
        ("GET", "/v1/projects/default".into()),
        ("DELETE", "/v1/projects/default".into()),
    ] {
        let problem = cloud.send(method, &path, &eve, None, &[]).await.problem("not_found");
        // Word for word what is said about a project that does not exist.
        assert_eq!(
            problem["detail"].as_str().unwrap().replace("default", "none"),
            missing.as_str().unwrap(),
            "{method} {path}"
        );
    }
    // An id of another project under the own one.
    cloud.send("GET", &format!("/v1/projects/hers/instances/{id}"), &eve, None, &[]).await.problem("not_found");
    let body = json!({"metadata": {"name": "x"}, "spec": {"image": "tiny", "networks": [{"network": web["status"]["resolved"]["image"]}]}});
    cloud.send("POST", "/v1/projects/hers/instances", &eve, Some(body), &[]).await.problem("invalid");
    // Lists of the cloud's own kinds show only what is hers.
    let names = |list: serde_json::Value| {
        list["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|i| i["metadata"]["name"].as_str().unwrap().to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(cloud.send("GET", "/v1/projects", &eve, None, &[]).await.ok()), ["hers"]);
    assert_eq!(names(cloud.send("GET", "/v1/users", &eve, None, &[]).await.ok()), ["eve"]);
    assert!(names(cloud.send("GET", "/v1/tokens", &eve, None, &[]).await.ok()).iter().all(|n| n.starts_with("login-")));
    cloud.send("GET", "/v1/users/admin", &eve, None, &[]).await.problem("not_found");
    for path in ["/v1/nodes", "/v1/instances", "/v1/events", "/metrics"] {
        cloud.send("GET", path, &eve, None, &[]).await.problem("forbidden");
    }
}

/// What a project offers to everybody is read everywhere and changed nowhere else; what it keeps does not exist for others.
#[tokio::test]
async fn public_images_are_read_everywhere_and_private_ones_nowhere_else() {
    let cloud = Cloud::new().await;
    let eve = cloud.user("eve").await;
    cloud.project("hers", &[("eve", "admin")]).await;
    let images = "/v1/projects/default/images";
    let source = json!({"source": {"type": "upload"}});
    let secret = cloud.post(images, json!({"metadata": {"name": "secret"}, "spec": source})).await.ok();
    let tiny = cloud.get(&format!("{images}/tiny")).await.ok();
    let as_eve = |method: &'static str, path: String, body| {
        let (cloud, eve) = (&cloud, &eve);
        async move { cloud.send(method, &path, eve, body, &[]).await }
    };
    let names = |list: serde_json::Value| {
        let name = |i: &serde_json::Value| i["metadata"]["name"].as_str().unwrap().to_string();
        list["items"].as_array().unwrap().iter().map(name).collect::<Vec<_>>()
    };
    let hers = "/v1/projects/hers/images";
    assert_eq!(names(as_eve("GET", "/v1/images".into(), None).await.ok()), ["busybox", "debian-12", "tiny"]);
    assert!(names(as_eve("GET", hers.into(), None).await.ok()).is_empty(), "she owns none");
    let id = tiny["metadata"]["id"].as_str().unwrap();
    for name in ["tiny", id] {
        let read = as_eve("GET", format!("{hers}/{name}"), None).await.ok();
        assert_eq!(read, tiny, "it says whose it is");
        let patch = json!({"metadata": {"labels": {"x": "y"}}});
        for (method, body) in [("PATCH", Some(patch)), ("PUT", Some(tiny.clone())), ("DELETE", None)] {
            let problem = as_eve(method, format!("{hers}/{name}"), body).await.problem("forbidden");
            assert!(problem["detail"].as_str().unwrap().contains("belongs to project \"default\""), "{problem}");
        }
    }
    assert_eq!(cloud.get(&format!("{images}/tiny")).await.ok(), tiny);
    // Her own one of that name comes first.
    as_eve("POST", hers.into(), Some(json!({"metadata": {"name": "tiny"}, "spec": source}))).await.ok();
    assert_eq!(as_eve("GET", format!("{hers}/tiny"), None).await.ok()["metadata"]["project"], "hers");

    let secret_id = secret["metadata"]["id"].as_str().unwrap();
    for method in ["GET", "PATCH", "DELETE"] {
        let body = (method == "PATCH").then(|| json!({"spec": {}}));
        let absent = as_eve(method, format!("{hers}/absent"), body.clone()).await.problem("not_found");
        for name in ["secret", secret_id] {
            let problem = as_eve(method, format!("{hers}/{name}"), body.clone()).await.problem("not_found");
            assert_eq!(
                problem["detail"].as_str().unwrap().replace(name, "absent"),
                absent["detail"],
                "{method} {name}"
            );
        }
    }
    // Not even by what a watch says about its end.
    let mut events = Events::open(&cloud, "/v1/images?watch=true", &eve, None).await;
    let secret_path = format!("{images}/secret");
    cloud.patch(&secret_path, json!({"metadata": {"labels": {"x": "y"}}})).await.ok();
    cloud.delete(&secret_path).await;
    let busybox = format!("{images}/busybox");
    cloud.patch(&busybox, json!({"metadata": {"labels": {"x": "y"}}})).await.ok();
    let (kind, _, data) = events.change().await;
    assert_eq!((kind.as_str(), &data["metadata"]["name"]), ("put", &json!("busybox")));
    cloud.patch(&busybox, json!({"spec": {"visibility": "private"}})).await.ok();
    let (kind, _, data) = events.change().await;
    assert_eq!((kind.as_str(), &data["name"]), ("delete", &json!("busybox")), "no longer offered");
}

/// The end of what one may not see is not said either.
#[tokio::test]
async fn watches_are_silent_about_what_is_hidden() {
    let cloud = Cloud::new().await;
    let eve = cloud.user("eve").await;
    cloud.project("hers", &[("eve", "reader")]).await;
    cloud.project("other", &[]).await;
    let from = cloud.get("/v1/projects").await.ok()["revision"].as_str().unwrap().to_string();
    cloud.patch("/v1/projects/other", json!({"spec": {"description": "x"}})).await.ok();
    assert_eq!(cloud.delete("/v1/projects/other").await.status, 204);
    cloud.patch("/v1/projects/hers", json!({"spec": {"grants": []}})).await.ok();
    let mut events = Events::open(&cloud, &format!("/v1/projects?watch=true&from={from}"), &eve, None).await;
    let (kind, _, data) = events.change().await;
    assert_eq!((kind.as_str(), &data["name"]), ("delete", &json!("hers")), "she lost it, and heard of no other");
}

#[tokio::test]
async fn nobody_lifts_himself() {
    let cloud = Cloud::new().await;
    let eve = cloud.user("eve").await;
    cloud.project("p", &[("eve", "member")]).await;
    let as_eve = |method: &'static str, path: &'static str, body| cloud.send(method, path, &eve, Some(body), &[]);
    as_eve("PATCH", "/v1/users/eve", json!({"spec": {"cloud_admin": true}})).await.problem("forbidden");
    as_eve("PATCH", "/v1/users/admin", json!({"spec": {"password": "mine now!"}})).await.problem("not_found");
    as_eve("POST", "/v1/users", json!({"metadata": {"name": "eve2"}, "spec": {"cloud_admin": true}}))
        .await
        .problem("forbidden");
    as_eve("POST", "/v1/tokens", json!({"metadata": {"name": "t"}, "spec": {"user": "admin"}}))
        .await
        .problem("forbidden");
    as_eve("PATCH", "/v1/projects/p", json!({"spec": {"grants": [{"user": "eve", "role": "admin"}]}}))
        .await
        .problem("forbidden");
    as_eve("POST", "/v1/projects", json!({"metadata": {"name": "q"}, "spec": {}})).await.problem("forbidden");
    as_eve(
        "POST",
        "/v1/flavors",
        json!({"metadata": {"name": "f"}, "spec": {"vcpus": 1, "memory": "1GiB", "disk": 0}}),
    )
    .await
    .problem("forbidden");
    as_eve("PATCH", "/v1/flavors/s", json!({"spec": {"price_per_hour_micros": 1}})).await.problem("forbidden");
    let image =
        json!({"metadata": {"name": "debian-12"}, "spec": {"source": {"type": "upload"}, "visibility": "public"}});
    as_eve("POST", "/v1/projects/p/images", image).await.problem("forbidden");
    let host = json!({"metadata": {"name": "x"}, "spec": {"image": "busybox", "container": {"userns": "host"}}});
    as_eve("POST", "/v1/projects/p/instances", host).await.problem("forbidden");
    // Her own password she may change, and then the old one is worthless.
    as_eve("PATCH", "/v1/users/eve", json!({"spec": {"password": "new password"}})).await.ok();
    cloud.login("eve", "new password").await;
    let old = cloud.send("POST", "/v1/login", "", Some(json!({"user": "eve", "password": "correct horse"})), &[]).await;
    old.problem("unauthenticated");
}

#[tokio::test]
async fn readers_only_read() {
    let cloud = Cloud::new().await;
    let rob = cloud.user("rob").await;
    cloud.patch("/v1/projects/default", json!({"spec": {"grants": [{"user": "rob", "role": "reader"}]}})).await.ok();
    cloud.launch("web").await;
    let web = format!("{INSTANCES}/web");
    cloud.send("GET", &web, &rob, None, &[]).await.ok();
    cloud.send("PATCH", &web, &rob, Some(json!({"spec": {"power": "stopped"}})), &[]).await.problem("forbidden");
    cloud.send("DELETE", &web, &rob, None, &[]).await.problem("forbidden");
    cloud.send("GET", &format!("{web}/exec?argv=sh"), &rob, None, &[]).await.problem("forbidden");
    let apply = json!({"resources": []});
    cloud.send("POST", "/v1/projects/default/apply", &rob, Some(apply.clone()), &[]).await.problem("forbidden");
    cloud.send("POST", "/v1/projects/default/apply?plan=true", &rob, Some(apply), &[]).await.ok();
}

#[tokio::test]
async fn dead_credentials_are_dead() {
    let cloud = Cloud::new().await;
    let bob = cloud.user("bob").await;
    let made = cloud
        .send(
            "POST",
            "/v1/tokens",
            &bob,
            Some(json!({"metadata": {"name": "ci"}, "spec": {"expires_at": "2026-03-02T00:00:00Z"}})),
            &[],
        )
        .await
        .ok();
    let ci = made["status"]["secret"].as_str().unwrap().to_string();
    let whoami = |token: String| {
        let cloud = &cloud;
        async move { cloud.send("GET", "/v1/whoami", &token, None, &[]).await }
    };
    whoami(ci.clone()).await.ok();
    let shown = cloud.send("GET", "/v1/tokens/ci", &bob, None, &[]).await;
    assert!(!String::from_utf8_lossy(&shown.bytes).contains(&ci), "shown once only");
    cloud.clock.advance(Duration::from_secs(86_400));
    whoami(ci).await.problem("unauthenticated");
    cloud.patch("/v1/users/bob", json!({"spec": {"disabled": true}})).await.ok();
    whoami(bob.clone()).await.problem("unauthenticated");
    let login = json!({"user": "bob", "password": "correct horse"});
    cloud.send("POST", "/v1/login", "", Some(login), &[]).await.problem("unauthenticated");
    cloud.patch("/v1/users/bob", json!({"spec": {"disabled": false}})).await.ok();
    whoami(bob.clone()).await.ok();
    // A later user of the same name is somebody else.
    assert_eq!(cloud.delete("/v1/users/bob").await.status, 204);
    cloud.post("/v1/users", json!({"metadata": {"name": "bob"}, "spec": {"password": "another one"}})).await.ok();
    whoami(bob).await.problem("unauthenticated");
    assert!(
        cloud.get("/v1/tokens").await.ok()["items"].as_array().unwrap().iter().all(|t| t["spec"]["user"] == "admin")
    );
    for junk in ["oblak_", "x", "oblak_../../user", &"a".repeat(5000)] {
        whoami(junk.to_string()).await.problem("unauthenticated");
    }
}

#[tokio::test]
async fn secrets_do_not_come_back() {
    let cloud = Cloud::new().await;
    cloud.user("bob").await;
    let image = json!({"metadata": {"name": "private"}, "spec": {"source": {"type": "registry", "reference": "r.example/x:1", "username": "u", "password": "s3cr3t-pull"}}});
    let made = cloud.post("/v1/projects/default/images", image).await;
    let texts = [
        made.bytes,
        cloud.get("/v1/users").await.bytes,
        cloud.get("/v1/users/bob").await.bytes,
        cloud.get("/v1/projects/default/images").await.bytes,
        cloud.get("/metrics").await.bytes,
    ];
    for text in texts {
        let text = String::from_utf8_lossy(&text).to_string();
        for secret in ["s3cr3t-pull", "correct horse", "argon2", &cloud.password] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
    assert_eq!(cloud.get("/v1/users/bob").await.ok()["status"]["has_password"], true);
    // A change of something else keeps the password.
    cloud.patch("/v1/users/bob", json!({"spec": {"full_name": "Bob"}})).await.ok();
    cloud.login("bob", "correct horse").await;
}

#[tokio::test]
async fn guessing_passwords_is_slow() {
    let cloud = Cloud::with(
        |config| config.limits.failed_logins_per_minute = 3,
        |clock| oblak_store::MemoryStore::with(clock, oblak_store::HistoryLimits::default()),
    )
    .await;
    let guess = |user: &'static str| {
        cloud.send("POST", "/v1/login", "", Some(json!({"user": user, "password": "wrong password"})), &[])
    };
    for _ in 0..3 {
        guess("admin").await.problem("unauthenticated");
    }
    guess("admin").await.problem("rate_limited");
    // Nor does the right one help now; another user is not locked out.
    let right = json!({"user": "admin", "password": cloud.password});
    cloud.send("POST", "/v1/login", "", Some(right.clone()), &[]).await.problem("rate_limited");
    guess("somebody").await.problem("unauthenticated");
    cloud.clock.advance(Duration::from_secs(60));
    cloud.send("POST", "/v1/login", "", Some(right), &[]).await.ok();
}

#[tokio::test]
async fn a_node_speaks_for_itself_only() {
    let cloud = Cloud::new().await;
    let (n1, e1) = cloud.register("n1").await;
    let (n2, e2) = cloud.register("n2").await;
    let web = cloud.launch("web").await;
    cloud.assign(&web, n1).await;
    // The right certificate on another node's path.
    let path = format!("/v1/nodes/{n1}/report");
    let body = json!({"epoch": e1, "items": []}).to_string();
    cloud.raw("POST", &path, "", body.into(), &[], Some(n2)).await.problem("forbidden");
    cloud.send("POST", &path, &cloud.admin, Some(json!({"epoch": e1, "items": []})), &[]).await.problem("forbidden");
    // Its own path with another node's instance.
    let answer = cloud.running(n2, e2, &web).await;
    assert_eq!(answer["refused"], json!([[0, "not on this node"]]));
    let answer = cloud.report(n2, e2, vec![released("instance", &web)]).await;
    assert_eq!(answer["refused"], json!([[0, "not on this node"]]));
    // Nor is anything removed that nobody asked to remove.
    let answer = cloud.report(n1, e1, vec![released("instance", &web)]).await;
    assert_eq!(answer["refused"], json!([[0, "it is not being deleted"]]));
    let answer = cloud.report(n1, e1 - 1, vec![instance_item(&web, "running")]).await;
    assert!(answer["refused"][0][1].as_str().unwrap().contains("stale epoch"));
    assert_eq!(cloud.get(&format!("{INSTANCES}/web")).await.ok()["status"]["phase"], "scheduled");
    let mut escape = instance_item(&web, "running");
    escape["project"] = json!("../default");
    assert_eq!(cloud.report(n1, e1, vec![escape]).await["refused"], json!([[0, "gone"]]));
    // With its certificate alone it sees nothing of the API for people.
    cloud.raw("GET", INSTANCES, "", axum::body::Body::empty(), &[], Some(n1)).await.problem("forbidden");
    // Removed from the cloud, it is shut out although its certificate is still valid.
    cloud.delete("/v1/nodes/n1").await.problem("in_use");
    assert_eq!(cloud.delete("/v1/nodes/n2").await.status, 204);
    cloud.as_node(n2, "POST", "register", json!({})).await.problem("node_removed");
}
