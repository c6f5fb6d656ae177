//! A machine becomes a server and stops being one; backups; over members that only remember what they were told.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Answer, Cloud};
use oblak_api::{Cluster, ClusterLook, Room};
use oblak_backup::archive;
use oblak_identity::join::JoinToken;
use oblak_identity::members::Keys;
use oblak_identity::pki;
use oblak_model::members::{MemberAddress, MemberRole, StoreMember};
use oblak_model::{ApiError, Code};
use oblak_store::MemoryStore;
use serde_json::{Value, json};

const TOKENS: &str = "/v1/join-tokens";
const JOIN: &str = "/v1/cluster/join";
const KEY: &str = "0123456789abcdef0123456789abcdef";
const OTHER: &str = "fedcba9876543210fedcba9876543210";

/// Peer URLs of members with their names; none until they have come.
#[derive(Default)]
struct Members(Mutex<Vec<(String, Option<String>)>>);

#[async_trait::async_trait]
impl Cluster for Members {
    async fn look(&self) -> Result<ClusterLook, ApiError> {
        let member = |(peer_url, name): &(String, Option<String>)| StoreMember {
            name: name.clone().unwrap_or_default(),
            role: if name.is_some() { MemberRole::Voter } else { MemberRole::Unstarted },
            healthy: name.is_some(),
            peer_url: peer_url.clone(),
            ..StoreMember::default()
        };
        let members = self.0.lock().unwrap().iter().map(member).collect();
        Ok(ClusterLook { members, quota_bytes: 7, ..ClusterLook::default() })
    }

    async fn admit(&self, name: &str, peer_url: &str) -> Result<Room, ApiError> {
        let mut all = self.0.lock().unwrap();
        if all.iter().any(|(url, name)| name.is_none() && url != peer_url) {
            return Err(ApiError::new(Code::Unavailable, "another one is coming"));
        }
        if all.iter().all(|(url, _)| url != peer_url) {
            all.push((peer_url.into(), None));
        }
        let address = |(url, known): &(String, Option<String>)| MemberAddress {
            name: known.clone().unwrap_or_else(|| name.into()),
            peer_url: url.clone(),
        };
        let members = all.iter().map(address).collect();
        Ok(Room { members, endpoints: vec!["https://192.0.2.1:2379".into()], prefix: "oblak/".into(), quota_bytes: 7 })
    }

    async fn remove(&self, name: &str, peer_url: Option<&str>) -> Result<usize, ApiError> {
        let mut all = self.0.lock().unwrap();
        let before = all.len();
        all.retain(|(url, known)| {
            known.as_deref() != Some(name) && !(known.is_none() && Some(url.as_str()) == peer_url)
        });
        if all.len() == before { Err(ApiError::not_found("server", name)) } else { Ok(all.len()) }
    }

    async fn defragment(&self) -> Result<(), ApiError> {
        Ok(())
    }
}

struct Test {
    cloud: Cloud,
    members: Arc<Members>,
    pki: PathBuf,
}

async fn test() -> Test {
    let mut pki = PathBuf::new();
    let cloud = Cloud::with(
        |config| pki.clone_from(&config.pki),
        |clock| MemoryStore::with(clock, oblak_store::HistoryLimits::default()),
    )
    .await;
    oblak_identity::members::ensure_etcd_ca(&pki, oblak_model::Timestamp::from_micros(1_772_323_200_000_000)).unwrap();
    let members = Arc::new(Members(Mutex::new(vec![("https://192.0.2.1:2380".into(), Some("n1".into()))])));
    cloud.server.with_cluster(members.clone());
    Test { cloud, members, pki }
}

impl Test {
    async fn token(&self, name: &str, role: &str) -> JoinToken {
        let body = json!({"metadata": {"name": name}, "spec": {"role": role}});
        let made = self.cloud.post(TOKENS, body).await.ok();
        made["status"]["secret"].as_str().unwrap().parse().unwrap()
    }

    async fn join(&self, secret: &str, key: &str, name: &str, peer_url: &str) -> Answer {
        let body = json!({"join_token": secret, "key": key, "name": name, "peer_url": peer_url});
        self.cloud.send("POST", JOIN, "", Some(body), &[]).await
    }

    async fn role(&self, secret: &str) -> Answer {
        self.cloud.send("POST", "/v1/cluster/join-token", "", Some(json!({"join_token": secret})), &[]).await
    }
}

const N2: &str = "https://192.0.2.2:2380";

#[tokio::test]
async fn a_server_is_let_in_once_and_gets_the_keys() {
    let t = test().await;
    let token = t.token("t1", "server").await;
    assert_eq!(t.role(token.secret()).await.ok()["role"], "server");
    t.role("guess").await.problem("join_token_unknown");
    let answer = t.join(token.secret(), KEY, "n2", N2).await;
    assert_eq!(answer.header("cache-control"), "no-store");
    let got = answer.ok();
    let keys = Keys::load(&t.pki).unwrap();
    assert_eq!((&got["ca_key_pem"], &got["etcd_ca_key_pem"]), (&json!(keys.ca_key_pem), &json!(keys.etcd_ca_key_pem)));
    let addresses = json!([{"name": "n1", "peer_url": "https://192.0.2.1:2380"}, {"name": "n2", "peer_url": N2}]);
    assert_eq!(got["members"], addresses);

    // Who lost the answer asks again; nobody else gets anything, with whatever they change.
    assert_eq!(t.join(token.secret(), KEY, "n2", N2).await.ok(), got);
    t.join(token.secret(), OTHER, "n2", N2).await.problem("name_taken");
    t.join(token.secret(), OTHER, "n3", "https://192.0.2.3:2380").await.problem("join_token_used");
    t.join(token.secret(), KEY, "n3", N2).await.problem("join_token_used");
    t.join(token.secret(), KEY, "n2", "https://192.0.2.9:2380").await.problem("join_token_used");
    let next = t.token("t2", "server").await;
    t.join(next.secret(), OTHER, "n2", N2).await.problem("name_taken");
    t.join(next.secret(), OTHER, "n1", "https://192.0.2.4:2380").await.problem("name_taken");
    // A place that is not free yet: the same token works a moment later.
    t.join(next.secret(), OTHER, "n3", "https://192.0.2.3:2380").await.problem("unavailable");
    t.members.0.lock().unwrap()[1].1 = Some("n2".into());
    t.join(next.secret(), OTHER, "n3", "https://192.0.2.3:2380").await.ok();
    // The secret that a machine made is nowhere in the store.
    let (entries, _) = oblak_store::list_all(&*t.cloud.store, &oblak_store::Prefix::all(), None).await.unwrap();
    assert!(entries.iter().all(|e| !String::from_utf8_lossy(&e.value).contains(KEY)));
    // The one that has not come is named, and its place can be taken away.
    let status = t.cloud.get("/v1/cluster/status").await.ok();
    let unstarted: Vec<_> = status["members"].as_array().unwrap().iter().filter(|m| m["role"] == "unstarted").collect();
    assert_eq!(unstarted.iter().map(|m| &m["name"]).collect::<Vec<_>>(), [&json!("n3")]);
    assert!(status["advice"].to_string().contains("n3 was let in and has not come"), "{status}");
    t.cloud.post("/v1/cluster/servers/n3/remove", json!({})).await.ok();
    assert!(t.cloud.keys("/secret/server-admission").await.iter().all(|key| !key.ends_with("n3")));
    t.cloud.post("/v1/cluster/servers/n3/remove", json!({})).await.problem("not_found");
}

#[tokio::test]
async fn tokens_do_only_what_they_are_for() {
    let t = test().await;
    let (node, server) = (t.token("n", "node").await, t.token("s", "server").await);
    t.join(node.secret(), KEY, "n2", N2).await.problem("forbidden");
    let (_, csr) = pki::node_request().unwrap();
    let body = json!({"join_token": server.secret(), "csr_pem": csr, "name": "x"});
    t.cloud.send("POST", "/v1/nodes/enroll", "", Some(body), &[]).await.problem("forbidden");
    for (name, url, key, field) in [
        ("N 2", N2, KEY, "/name"),
        ("n2", "http://192.0.2.2:2380", KEY, "/peer_url"),
        ("n2", "https://0.0.0.0:2380", KEY, "/peer_url"),
        ("n2", "https://host:2380", KEY, "/peer_url"),
        ("n2", N2, "short", "/key"),
    ] {
        assert_eq!(t.join(server.secret(), key, name, url).await.problem("invalid")["field"], field);
    }
    t.cloud.clock.advance(Duration::from_secs(3601));
    t.join(server.secret(), KEY, "n2", N2).await.problem("join_token_expired");
    assert_eq!(t.members.0.lock().unwrap().len(), 1);
    let eve = t.cloud.user("eve").await;
    t.cloud.send("GET", "/v1/cluster/status", &eve, None, &[]).await.problem("forbidden");
    t.cloud.send("POST", "/v1/cluster/servers/n1/remove", &eve, Some(json!({})), &[]).await.problem("forbidden");
    let backup = Some(json!({"passphrase": "correct horse battery"}));
    t.cloud.send("POST", "/v1/cluster/backup", &eve, backup.clone(), &[]).await.problem("forbidden");
    t.cloud.send("POST", "/v1/cluster/backup", "", backup, &[]).await.problem("unauthenticated");
}

#[tokio::test]
async fn a_backup_holds_the_store_and_the_keys() {
    let t = test().await;
    t.cloud.project("kept", &[]).await;
    let short = t.cloud.post("/v1/cluster/backup", json!({"passphrase": "short"})).await.problem("invalid");
    assert_eq!(short["field"], "/passphrase");
    let file = t.cloud.post("/v1/cluster/backup", json!({"passphrase": "correct horse battery"})).await;
    assert!(file.status.is_success());
    let archive = archive::read("correct horse battery", &file.bytes[..]).unwrap();
    let keys: Keys = serde_json::from_value::<Keys>(archive.keys.clone()).unwrap();
    assert_eq!(keys, Keys::load(&t.pki).unwrap());
    let holds = |text: &str| archive.entries.iter().any(|(_, value)| String::from_utf8_lossy(value).contains(text));
    assert!(holds("\"kept\""));
    let text = String::from_utf8_lossy(&file.bytes).into_owned();
    assert!(!text.contains("kept") && !text.contains("PRIVATE"));
    let _: Value = t.cloud.get("/v1/cluster/status").await.ok();
}
