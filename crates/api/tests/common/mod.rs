//! A server in process over a memory store, with a clock that only moves when told.
#![allow(dead_code)] // each test binary uses its own part

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use oblak_api::{ApiConfig, Bootstrap, PeerNode, Server, bootstrap};
use oblak_control::lifecycle::{Assignment, Batch, assign_instance};
use oblak_model::{
    Instance, InstanceKind, Kind, Node, NodeId, NodeKind, Object, Port, PortKind, Timestamp, Volume, VolumeKind,
};
use oblak_platform::clock::{Clock, SharedClock};
use oblak_store::objects::{self, Allocation};
use oblak_store::{CommitOutcome, HistoryLimits, MemoryStore, SharedStore, Store, Txn};
use serde_json::{Value, json};
use tower::ServiceExt;

/// Begins on 2026-03-01.
pub struct TestClock(AtomicU64);

impl Default for TestClock {
    fn default() -> Self {
        Self(AtomicU64::new(0))
    }
}

impl TestClock {
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_micros() as u64, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(1_772_323_200_000_000 + self.0.load(Ordering::SeqCst) as i64)
    }
    fn boottime(&self) -> Duration {
        Duration::from_secs(1000) + Duration::from_micros(self.0.load(Ordering::SeqCst))
    }
}

pub struct Cloud {
    pub server: Server,
    pub router: Router,
    pub store: Arc<MemoryStore>,
    pub clock: Arc<TestClock>,
    pub admin: String,
    pub password: String,
    _dir: tempfile::TempDir,
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub bytes: bytes::Bytes,
}

impl Answer {
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_else(|e| panic!("{e}: {:?}", self.bytes))
    }
    pub fn header(&self, name: &str) -> String {
        self.headers.get(name).map(|v| v.to_str().unwrap().to_string()).unwrap_or_default()
    }
    #[track_caller]
    pub fn ok(self) -> Value {
        assert!(self.status.is_success(), "{} {}", self.status, String::from_utf8_lossy(&self.bytes));
        if self.bytes.is_empty() { Value::Null } else { self.json() }
    }
    /// The problem, after checking that it is one.
    #[track_caller]
    pub fn problem(&self, code: &str) -> Value {
        assert_eq!(self.header("content-type"), "application/problem+json", "{:?}", self.bytes);
        let problem = self.json();
        assert_eq!(problem["code"], code, "{problem}");
        assert_eq!(problem["status"], self.status.as_u16());
        assert_eq!(problem["request_id"], self.header("x-request-id"));
        problem
    }
    pub fn etag(&self) -> String {
        self.header("etag")
    }
}

pub fn config(dir: &std::path::Path) -> ApiConfig {
    ApiConfig::new("127.0.0.1:0".parse().unwrap(), dir.join("pki"))
}

impl Cloud {
    pub async fn new() -> Self {
        Self::with(|_| {}, |clock| MemoryStore::with(clock, HistoryLimits::default())).await
    }

    pub async fn with(change: impl FnOnce(&mut ApiConfig), store: impl FnOnce(SharedClock) -> MemoryStore) -> Self {
        let clock = Arc::new(TestClock::default());
        let store = Arc::new(store(clock.clone()));
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        change(&mut config);
        let random = oblak_platform::random::system();
        let Bootstrap { admin_password } =
            bootstrap(store.clone() as SharedStore, clock.clone(), random.clone()).await.unwrap();
        let password = admin_password.expect("a new store");
        let server = Server::in_process(config, store.clone() as SharedStore, clock.clone(), random).await.unwrap();
        let router = server.router();
        let mut cloud = Self { server, router, store, clock, admin: String::new(), password, _dir: dir };
        cloud.admin = cloud.login("admin", &cloud.password.clone()).await;
        cloud
    }

    pub async fn login(&self, user: &str, password: &str) -> String {
        let answer = self.send("POST", "/v1/login", "", Some(json!({"user": user, "password": password})), &[]).await;
        answer.ok()["token"].as_str().unwrap().to_string()
    }

    pub async fn send(
        &self,
        method: &str,
        path: &str,
        token: &str,
        body: Option<Value>,
        headers: &[(&str, &str)],
    ) -> Answer {
        let body = body.map(|b| b.to_string()).unwrap_or_default();
        self.raw(method, path, token, body.into(), headers, None).await
    }

    pub async fn raw(
        &self,
        method: &str,
        path: &str,
        token: &str,
        body: Body,
        headers: &[(&str, &str)],
        node: Option<NodeId>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(body).unwrap();
        if let Some(node) = node {
            request.extensions_mut().insert(PeerNode(node));
        }
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        Answer { status: parts.status, headers: parts.headers, bytes: body.collect().await.unwrap().to_bytes() }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &self.admin, None, &[]).await
    }
    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.send("POST", path, &self.admin, Some(body), &[]).await
    }
    pub async fn patch(&self, path: &str, body: Value) -> Answer {
        self.send("PATCH", path, &self.admin, Some(body), &[]).await
    }
    pub async fn delete(&self, path: &str) -> Answer {
        self.send("DELETE", path, &self.admin, None, &[]).await
    }

    /// A user with a password, and its token.
    pub async fn user(&self, name: &str) -> String {
        self.post("/v1/users", json!({"metadata": {"name": name}, "spec": {"password": "correct horse"}})).await.ok();
        self.login(name, "correct horse").await
    }

    pub async fn project(&self, name: &str, grants: &[(&str, &str)]) {
        let grants: Vec<_> = grants.iter().map(|(user, role)| json!({"user": user, "role": role})).collect();
        self.post("/v1/projects", json!({"metadata": {"name": name}, "spec": {"grants": grants}})).await.ok();
    }

    pub async fn launch(&self, name: &str) -> Value {
        self.post(INSTANCES, json!({"metadata": {"name": name}, "spec": {"image": "tiny"}})).await.ok()
    }

    pub async fn as_node(&self, node: NodeId, method: &str, path: &str, body: Value) -> Answer {
        let path = format!("/v1/nodes/{node}/{path}");
        self.raw(method, &path, "", body.to_string().into(), &[], Some(node)).await
    }

    pub async fn register(&self, name: &str) -> (NodeId, u64) {
        let node = NodeId(uuid::Uuid::now_v7());
        let epoch = self.register_as(node, name).await;
        (node, epoch)
    }

    pub async fn register_as(&self, node: NodeId, name: &str) -> u64 {
        let body = json!({
            "name": name, "zone": "zone-1", "version": "0.1.0", "boot_id": "b",
            "facts": {"isolations": ["vm", "container"]},
            "capacity": {"vcpus": 8, "memory": "16GiB", "disk": "200GiB"},
        });
        self.as_node(node, "POST", "register", body).await.ok()["epoch"].as_u64().unwrap()
    }

    pub async fn read<K: Kind>(&self, scope: &str, id: &Value) -> Option<Object<K>> {
        let key = objects::object_key::<K>(scope, id.as_str().unwrap().parse().unwrap());
        self.store.get(&key).await.unwrap().map(|entry| objects::decode(&entry).unwrap())
    }

    /// Does what the scheduler's reconciler does.
    pub async fn assign(&self, instance: &Value, node: NodeId) {
        let scope = instance["metadata"]["project"].as_str().unwrap();
        let instance: Instance = self.read::<InstanceKind>(scope, &instance["metadata"]["id"]).await.unwrap();
        let node: Node = self.read::<NodeKind>("_", &json!(node.to_string())).await.unwrap();
        let mut ports: Vec<Port> = Vec::new();
        for id in &instance.status.resolved.ports {
            ports.push(self.read::<PortKind>(scope, &json!(id.to_string())).await.unwrap());
        }
        let mut volumes: Vec<Volume> = Vec::new();
        for id in &instance.status.resolved.volumes {
            volumes.push(self.read::<VolumeKind>(scope, &json!(id.to_string())).await.unwrap());
        }
        let key = objects::allocation_key(NodeId(node.metadata.id));
        let allocation = self.store.get(&key).await.unwrap();
        let allocation = allocation.map(|e| (objects::decode_value::<Allocation>(&key, &e.value).unwrap(), e.revision));
        let assignment = Assignment {
            instance: &instance,
            node: &node,
            why: "test",
            at: self.clock.now(),
            ports: &ports,
            volumes: &volumes,
            allocation,
        };
        let mut batch = Batch::new();
        batch.absorb(assign_instance(&assignment));
        let outcome = self.store.commit(batch.into_txn(Txn::random().id)).await.unwrap();
        assert!(matches!(outcome, CommitOutcome::Committed(_)), "{outcome:?}");
        self.settle().await;
    }

    /// Waits until the server has seen what was written behind its back.
    pub async fn settle(&self) {
        let newest = self.store.revision().await.unwrap().to_string();
        self.send("GET", "/v1/whoami", &self.admin, None, &[("x-oblak-min-revision", &newest)]).await.ok();
    }

    pub async fn report(&self, node: NodeId, epoch: u64, items: Vec<Value>) -> Value {
        self.as_node(node, "POST", "report", json!({"epoch": epoch, "items": items})).await.ok()
    }

    pub async fn running(&self, node: NodeId, epoch: u64, instance: &Value) -> Value {
        self.report(node, epoch, vec![instance_item(instance, "running")]).await
    }

    pub async fn commits(&self) -> u64 {
        self.store.stats().await.unwrap().commits
    }

    /// First segments of every key in the store.
    pub async fn keys(&self, prefix: &str) -> Vec<String> {
        let prefix = oblak_store::Prefix::new(prefix).unwrap();
        let (entries, _) = oblak_store::list_all(&*self.store, &prefix, None).await.unwrap();
        entries.into_iter().map(|e| e.key.to_string()).collect()
    }
}

pub const INSTANCES: &str = "/v1/projects/default/instances";

pub fn instance_item(instance: &Value, phase: &str) -> Value {
    json!({
        "kind": "instance", "project": instance["metadata"]["project"], "id": instance["metadata"]["id"], "phase": phase,
        "reason": "Started", "message": "", "conditions": [],
        "observed": {"generation": 1, "run": 1, "restart_generation": 0, "restore_generation": 0, "restart_count": 0},
    })
}

pub fn released(kind: &str, object: &Value) -> Value {
    json!({"kind": "released", "object_kind": kind, "project": object["metadata"]["project"], "id": object["metadata"]["id"]})
}

/// Reads events of a stream until `done` says so.
pub struct Events {
    body: Body,
    text: String,
}

impl Events {
    pub async fn open(cloud: &Cloud, path: &str, token: &str, node: Option<NodeId>) -> Self {
        let mut request = Request::builder().uri(path).header("authorization", format!("Bearer {token}"));
        if token.is_empty() {
            request = Request::builder().uri(path);
        }
        let mut request = request.body(Body::empty()).unwrap();
        if let Some(node) = node {
            request.extensions_mut().insert(PeerNode(node));
        }
        let response = cloud.router.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { body: response.into_body(), text: String::new() }
    }

    /// The next event as (event, id, data); none when the stream has ended.
    pub async fn next(&mut self) -> Option<(String, String, Value)> {
        loop {
            while let Some((block, rest)) = self.text.split_once("\n\n") {
                let field = |name: &str| {
                    block.lines().find_map(|l| l.strip_prefix(&format!("{name}: "))).unwrap_or_default().to_string()
                };
                let event = (field("event"), field("id"), field("data"));
                self.text = rest.to_string();
                if !event.2.is_empty() {
                    return Some((event.0, event.1, serde_json::from_str(&event.2).unwrap()));
                }
            }
            let frame =
                tokio::time::timeout(Duration::from_secs(10), self.body.frame()).await.expect("an event in time")?;
            if let Ok(data) = frame.unwrap().into_data() {
                self.text.push_str(std::str::from_utf8(&data).unwrap());
            }
        }
    }

    /// The next event that is not a bookmark.
    pub async fn change(&mut self) -> (String, String, Value) {
        loop {
            let event = self.next().await.expect("the stream goes on");
            if event.0 != "bookmark" {
                return event;
            }
        }
    }
}
