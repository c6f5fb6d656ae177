//! The real server over TLS, the real client, and an agent that plays its part on a real tunnel.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a panic is how a test fails

mod common;

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::instance_item;
use futures_util::{SinkExt, StreamExt};
use oblak_api::{ApiConfig, Server, bootstrap};
use oblak_client::{Auth, Client, ClientConfig, ExecOptions, ListOptions};
use oblak_control::lifecycle::{Assignment, Batch, assign_instance};
use oblak_identity::pki;
use oblak_model::wire::{NodeEvent, Register, Report, ReportItem, StreamAnswer, StreamRequest};
use oblak_model::{
    Code, Image, ImageKind, ImagePhase, Instance, InstanceKind, InstanceSpec, Isolation, Node, NodeFacts, NodeId,
    NodeKind, Resources, Size,
};
use oblak_platform::frame::{Channel, Control, Frame, FrameCodec};
use oblak_store::objects::{self, Allocation};
use oblak_store::{MemoryStore, SharedStore, Store, Txn};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio_util::codec::Framed;
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(20);

struct World {
    server: String,
    ca_pem: String,
    admin: Client,
    agent: Client,
    node: NodeId,
    epoch: u64,
    store: Arc<MemoryStore>,
    shutdown: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new(change: impl FnOnce(&mut ApiConfig)) -> Self {
        let (clock, random) = (oblak_platform::clock::system(), oblak_platform::random::system());
        let store = Arc::new(MemoryStore::new());
        let dir = tempfile::tempdir().unwrap();
        let mut config = common::config(dir.path());
        change(&mut config);
        let pki_dir = config.pki.clone();
        let made = bootstrap(store.clone() as SharedStore, clock.clone(), random.clone()).await.unwrap();
        let server = Server::bind(config, store.clone() as SharedStore, clock.clone(), random).await.unwrap();
        let address = format!("https://localhost:{}", server.local_addr().unwrap().port());
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { server.serve(shutdown).await.unwrap() }
        });
        let ca = pki::ensure_ca(&pki_dir, clock.now()).unwrap();
        let ca_pem = ca.certificate_pem().to_string();
        let client = |auth| Client::new(&ClientConfig::new(address.clone(), ca_pem.clone(), auth)).unwrap();
        let login = client(Auth::None).login("admin", &made.admin_password.unwrap()).await.unwrap();
        let node = NodeId(uuid::Uuid::now_v7());
        let certified = pki::issue_node_cert(&ca, node, clock.now()).unwrap();
        let agent = client(Auth::Certificate { cert_pem: certified.certificate_pem, key_pem: certified.key_pem });
        let facts = NodeFacts { isolations: vec![Isolation::Vm, Isolation::Container], ..NodeFacts::default() };
        let capacity = Resources { vcpus: "8".parse().unwrap(), memory: Size::gib(16), disk: Size::gib(100) };
        let register = Register { name: "n1".into(), facts, capacity, ..Register::default() };
        let registered = agent.node_register(node, &register).await.unwrap();
        Self {
            admin: client(Auth::Bearer(login.token)),
            agent,
            node,
            epoch: registered.epoch,
            server: address,
            ca_pem,
            store,
            shutdown,
            serving,
            _dir: dir,
        }
    }

    async fn running(&self, name: &str) -> Instance {
        let spec = InstanceSpec { image: "tiny".into(), ..InstanceSpec::default() };
        let made = self.admin.create::<InstanceKind>("default", &Instance::new(name, spec)).await.unwrap();
        let entry = self.store.get(&objects::key_of(&made)).await.unwrap().unwrap();
        let instance: Instance = objects::decode(&entry).unwrap();
        let key = objects::object_key::<NodeKind>("_", self.node.0);
        let node: Node = objects::decode(&self.store.get(&key).await.unwrap().unwrap()).unwrap();
        let key = objects::allocation_key(self.node);
        let entry = self.store.get(&key).await.unwrap().unwrap();
        let allocation = Some((objects::decode_value::<Allocation>(&key, &entry.value).unwrap(), entry.revision));
        let at = node.metadata.created_at;
        let ops = assign_instance(&Assignment {
            instance: &instance,
            node: &node,
            why: "",
            at,
            ports: &[],
            volumes: &[],
            allocation,
        });
        let mut batch = Batch::new();
        batch.absorb(ops);
        self.store.commit(batch.into_txn(Txn::random().id)).await.unwrap().revision().unwrap();
        let item: ReportItem = serde_json::from_value(instance_item(
            &json!({"metadata": {"project": "default", "id": instance.metadata.id}}),
            "running",
        ))
        .unwrap();
        let report = Report { epoch: self.epoch, items: vec![item], events: vec![] };
        let answer = self.agent.node_report(self.node, &report).await.unwrap();
        assert!(answer.refused.is_empty(), "{answer:?}");
        instance
    }

    /// An agent that serves streams until it is dropped.
    async fn tunnel(&self) -> FakeAgent {
        let bytes = self.agent.node_tunnel(self.node).await.unwrap();
        let open = Arc::new(AtomicUsize::new(0));
        let (agent, node, epoch) = (self.agent.clone(), self.node, self.epoch);
        let counter = open.clone();
        let task = tokio::spawn(async move {
            let mut connection = yamux::Connection::new(bytes.compat(), yamux::Config::default(), yamux::Mode::Server);
            while let Some(Ok(stream)) = poll_fn(|cx| connection.poll_next_inbound(cx)).await {
                let (agent, counter) = (agent.clone(), counter.clone());
                tokio::spawn(async move {
                    counter.fetch_add(1, Ordering::SeqCst);
                    play(stream.compat(), &agent, node, epoch).await;
                    counter.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        let fake = FakeAgent { task, open };
        // The tunnel counts once the server has seen the upgrade through.
        eventually(async || self.metric("oblak_tunnels").await == 1).await;
        fake
    }

    async fn metric(&self, name: &str) -> u64 {
        let mut stream = self.admin.get_stream("/metrics").await.unwrap();
        let mut text = Vec::new();
        while let Some(bytes) = stream.next().await.unwrap() {
            text.extend_from_slice(&bytes);
        }
        let text = String::from_utf8(text).unwrap();
        let line = text.lines().find(|l| l.starts_with(&format!("{name} "))).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(DEADLINE, self.serving).await.expect("stops in time").unwrap();
    }
}

struct FakeAgent {
    task: tokio::task::JoinHandle<()>,
    open: Arc<AtomicUsize>,
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn eventually(mut holds: impl AsyncFnMut() -> bool) {
    tokio::time::timeout(DEADLINE, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("in time");
}

type AgentStream = BufReader<Compat<yamux::Stream>>;

async fn say(stream: &mut AgentStream, answer: &StreamAnswer) {
    let line = format!("{}\n", serde_json::to_string(answer).unwrap());
    stream.write_all(line.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
}

/// What a node would do.
async fn play(stream: Compat<yamux::Stream>, agent: &Client, node: NodeId, epoch: u64) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).await.unwrap();
    match serde_json::from_str(&line).unwrap() {
        StreamRequest::Console { .. } => {
            say(&mut stream, &StreamAnswer::Ok).await;
            let mut frames = Framed::new(stream, FrameCodec);
            while let Some(Ok(frame)) = frames.next().await {
                if frame.channel == Channel::Stdin {
                    let _ = frames.send(Frame::new(Channel::Stdout, frame.payload)).await;
                }
            }
        }
        StreamRequest::Exec { argv, tty, env, .. } if argv[0] == "show" => {
            say(&mut stream, &StreamAnswer::Ok).await;
            let mut frames = Framed::new(stream, FrameCodec);
            let text = format!("{argv:?} {env:?} {tty:?}");
            frames.send(Frame::control(&Control::Ready)).await.unwrap();
            frames.send(Frame::new(Channel::Stdout, text)).await.unwrap();
            frames.send(Frame::new(Channel::Stderr, "err")).await.unwrap();
            frames.send(Frame::control(&Control::Exit { code: 7 })).await.unwrap();
            frames.close().await.unwrap();
        }
        StreamRequest::Exec { .. } => {
            let detail = "there is no such program".to_string();
            say(&mut stream, &StreamAnswer::Error { code: "not_found".into(), detail }).await;
        }
        StreamRequest::Logs { follow, .. } => {
            say(&mut stream, &StreamAnswer::Ok).await;
            stream.write_all(b"one\ntwo\n").await.unwrap();
            stream.flush().await.unwrap();
            if follow {
                let _ = stream.read(&mut [0; 1]).await;
            }
            let _ = stream.shutdown().await;
        }
        StreamRequest::Forward { port: 9, .. } => {
            // Never reads: what is sent must wait at the sender, not pile up in the server.
            say(&mut stream, &StreamAnswer::Ok).await;
            tokio::time::sleep(DEADLINE).await;
        }
        StreamRequest::Forward { .. } | StreamRequest::Vnc { .. } => {
            say(&mut stream, &StreamAnswer::Ok).await;
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            all.reverse();
            stream.write_all(&all).await.unwrap();
            stream.shutdown().await.unwrap();
        }
        StreamRequest::ImagePut { image, checksum, .. } => {
            say(&mut stream, &StreamAnswer::Ok).await;
            let mut all = Vec::new();
            let mut frames = Framed::new(stream, FrameCodec);
            while let Some(Ok(frame)) = frames.next().await {
                if frame.as_control() == Some(Control::Eof) {
                    break;
                }
                all.extend_from_slice(&frame.payload);
            }
            let mut stream = frames.into_inner();
            if checksum.as_deref() != Some(CHECKSUM) {
                let detail = format!("the content does not have the digest {checksum:?}");
                say(&mut stream, &StreamAnswer::Error { code: "invalid".into(), detail }).await;
                return;
            }
            let item = json!({
                "kind": "image", "project": "default", "id": image, "phase": "ready", "reason": "", "message": "", "progress": 100,
                "digest": CHECKSUM, "size": all.len(), "virtual_size": all.len(), "content": "disk", "generation": 1, "properties": {},
            });
            let report = Report { epoch, items: vec![serde_json::from_value(item).unwrap()], events: vec![] };
            agent.node_report(node, &report).await.unwrap();
            say(&mut stream, &StreamAnswer::Ok).await;
        }
        StreamRequest::ImageGet { .. } => {
            say(&mut stream, &StreamAnswer::Ok).await;
            stream.write_all(&vec![7; 3 << 20]).await.unwrap();
            stream.shutdown().await.unwrap();
        }
    }
}

const CHECKSUM: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_is_reached_through_the_tunnel() {
    let world = World::new(|_| {}).await;
    world.running("web").await;
    // Nobody there yet.
    let error = world.admin.console("default", "web").await.err().unwrap();
    assert_eq!(error.code(), Some(Code::NodeUnreachable), "{error}");
    let agent = world.tunnel().await;

    let options = ExecOptions {
        argv: vec!["show".into(), "a b&c".into()],
        env: vec!["X=1".into()],
        tty: Some((100, 30)),
        ..ExecOptions::default()
    };
    let mut exec = world.admin.exec("default", "web", &options).await.unwrap();
    let mut seen = Vec::new();
    while let Some(frame) = exec.next().await.unwrap() {
        seen.push(frame);
    }
    assert_eq!(seen[0].as_control(), Some(Control::Ready));
    assert_eq!(seen[1], Frame::new(Channel::Stdout, r#"["show", "a b&c"] ["X=1"] Some((100, 30))"#));
    assert_eq!(seen[2], Frame::new(Channel::Stderr, "err"));
    assert_eq!(seen[3].as_control(), Some(Control::Exit { code: 7 }));

    let missing = ExecOptions { argv: vec!["nonsense".into()], ..ExecOptions::default() };
    let error = world.admin.exec("default", "web", &missing).await.err().unwrap();
    assert!(error.to_string().contains("no such program"), "{error}");

    let mut console = world.admin.console("default", "web").await.unwrap();
    for text in ["hello", "again"] {
        console.send(&Frame::new(Channel::Stdin, text)).await.unwrap();
        assert_eq!(console.next().await.unwrap().unwrap(), Frame::new(Channel::Stdout, text));
    }
    drop(console);
    // The agent's side ends when the person goes away.
    eventually(async || agent.open.load(Ordering::SeqCst) == 0).await;
    eventually(async || world.metric("oblak_streams").await == 0).await;

    // The agent goes away: so does the person's stream.
    let mut console = world.admin.console("default", "web").await.unwrap();
    drop(agent);
    let end = tokio::time::timeout(DEADLINE, console.next()).await.expect("ends in time");
    assert!(matches!(end, Ok(None) | Err(_)), "{end:?}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_logs_and_images_pass() {
    let world = World::new(|_| {}).await;
    let web = world.running("web").await;
    let _agent = world.tunnel().await;
    let mut forward = world.admin.forward("default", "web", 22).await.unwrap().into_bytes();
    let sent: Vec<u8> = (0..600_000u32).map(|i| (i % 251) as u8).collect();
    forward.write_all(&sent).await.unwrap();
    forward.shutdown().await.unwrap();
    let mut got = Vec::new();
    forward.read_to_end(&mut got).await.unwrap();
    got.reverse();
    assert!(got == sent, "{} bytes", got.len());

    let mut logs = world.admin.logs("default", "web", Some(2), false).await.unwrap();
    let mut text = Vec::new();
    while let Some(bytes) = logs.next().await.unwrap() {
        text.extend_from_slice(&bytes);
    }
    assert_eq!(text, b"one\ntwo\n");
    let mut following = world.admin.logs("default", "web", None, true).await.unwrap();
    assert_eq!(&following.next().await.unwrap().unwrap()[..], b"one\ntwo\n");

    let image = |name: &str| -> Image {
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"source": {"type": "upload"}}})).unwrap()
    };
    world.admin.create::<ImageKind>("default", &image("mine")).await.unwrap();
    // Larger than any limit on bodies.
    let content = || futures_util::stream::iter((0..48).map(|_| Ok(bytes::Bytes::from(vec![1u8; 64 * 1024]))));
    let wrong = CHECKSUM.replace('0', "1");
    let error = world.admin.upload_image("default", "mine", Some(&wrong), 3 << 20, content()).await.err().unwrap();
    assert!(error.to_string().contains("digest"), "{error}");
    let failed = world.admin.get::<ImageKind>("default", "mine").await.unwrap();
    assert_eq!((failed.status.phase, failed.status.reason.as_str()), (ImagePhase::Pending, "UploadFailed"));
    let done = world.admin.upload_image("default", "mine", Some(CHECKSUM), 3 << 20, content()).await.unwrap();
    assert_eq!((done.status.phase, done.status.size), (ImagePhase::Ready, Size::mib(3)));
    let error = world.admin.upload_image("default", "mine", Some(CHECKSUM), 3 << 20, content()).await.err().unwrap();
    assert_eq!(error.code(), Some(Code::WrongState), "{error}");

    // An agent reads an image only when one of its instances uses it.
    let path = |id: String| format!("/v1/nodes/{}/images/{id}/content", world.node);
    let error = world.agent.get_stream(&path(done.metadata.id.to_string())).await.err().unwrap();
    assert_eq!(error.code(), Some(Code::NotFound), "{error}");
    let error = world.agent.get_stream(&path(web.status.resolved.image.to_string())).await.err().unwrap();
    assert_eq!(error.code(), Some(Code::WrongState), "{error}");
    // A stream that follows does not hold up the end of the server.
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_does_not_read_slows_the_sender_down() {
    let world = World::new(|config| config.limits.streams_per_principal = 1).await;
    world.running("web").await;
    let _agent = world.tunnel().await;
    let mut forward = world.admin.forward("default", "web", 9).await.unwrap().into_bytes();
    let error = world.admin.forward("default", "web", 9).await.err().unwrap();
    assert_eq!(error.code(), Some(Code::RateLimited), "{error}");
    let mut sent = 0usize;
    let chunk = vec![0u8; 64 * 1024];
    let stalled = tokio::time::timeout(Duration::from_secs(3), async {
        loop {
            forward.write_all(&chunk).await.unwrap();
            forward.flush().await.unwrap();
            sent += chunk.len();
        }
    });
    assert!(stalled.await.is_err());
    assert!(sent < 32 << 20, "{sent} bytes went into buffers");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_knows_who_calls() {
    let world = World::new(|_| {}).await;
    let client = |auth| Client::new(&ClientConfig::new(world.server.clone(), world.ca_pem.clone(), auth)).unwrap();
    // No certificate, and one of an authority of somebody else.
    let anybody = client(Auth::None);
    let register = Register { name: "evil".into(), ..Register::default() };
    let error = anybody.node_register(world.node, &register).await.err().unwrap();
    assert_eq!(error.code(), Some(Code::Unauthenticated), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let now = oblak_platform::clock::system().now();
    let other = pki::ensure_ca(dir.path(), now).unwrap();
    let forged = pki::issue_node_cert(&other, world.node, now).unwrap();
    let forger = client(Auth::Certificate { cert_pem: forged.certificate_pem, key_pem: forged.key_pem });
    assert_eq!(forger.node_register(world.node, &register).await.err().unwrap().code(), None, "the handshake fails");

    // Basic authentication, and a watch over the wire.
    let list = world.admin.list::<InstanceKind>("default", &ListOptions::default()).await.unwrap();
    let mut watch = world.admin.watch::<InstanceKind>("default", list.revision, &ListOptions::default()).await.unwrap();
    world.running("web").await;
    let mut phases = Vec::new();
    while phases.len() < 3 {
        match tokio::time::timeout(DEADLINE, watch.next()).await.expect("in time").unwrap() {
            oblak_client::WatchEvent::Put(instance, _) => phases.push(instance.status.phase.as_str().to_string()),
            oblak_client::WatchEvent::Bookmark(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(phases, ["pending", "scheduled", "running"]);
    let mut node_watch = world.agent.node_watch(world.node).await.unwrap();
    let mut seen = Vec::new();
    loop {
        match tokio::time::timeout(DEADLINE, node_watch.next()).await.expect("in time").unwrap().unwrap() {
            NodeEvent::Put { kind, .. } => seen.push(kind),
            NodeEvent::Synced { .. } => break,
            NodeEvent::Delete { .. } => panic!("nothing was deleted"),
        }
    }
    assert_eq!(seen.last().map(String::as_str), Some("instance"));

    // A machine that joins with a token.
    let who: Value = world.admin.get_json("/v1/whoami").await.unwrap();
    assert_eq!(who["user"], "admin");
    let token: Value =
        world.admin.post_json("/v1/tokens", &json!({"metadata": {"name": "join"}, "spec": {}})).await.unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let csr = rcgen::CertificateParams::new(vec![]).unwrap().serialize_request(&key).unwrap().pem().unwrap();
    let body = json!({"token": token["status"]["secret"], "csr_pem": csr, "name": "n2"});
    let enrolled: Value = anybody.post_json("/v1/nodes/enroll", &body).await.unwrap();
    let id: NodeId = enrolled["id"].as_str().unwrap().parse().unwrap();
    let cert_pem = enrolled["certificate_pem"].as_str().unwrap().to_string();
    let n2 = client(Auth::Certificate { cert_pem, key_pem: key.serialize_pem() });
    let register = Register { name: "n2".into(), ..Register::default() };
    assert_eq!(n2.node_register(id, &register).await.unwrap().name, "n2");
    // While it is alive nobody else takes its name.
    let error = anybody.post_json::<Value>("/v1/nodes/enroll", &body).await.err().unwrap();
    assert_eq!(error.code(), Some(Code::NameTaken), "{error}");
    let bad = json!({"token": "oblak_nonsense", "csr_pem": csr, "name": "n3"});
    let error = anybody.post_json::<Value>("/v1/nodes/enroll", &bad).await.err().unwrap();
    assert_eq!(error.code(), Some(Code::Unauthenticated), "{error}");
    world.stop().await;
}
