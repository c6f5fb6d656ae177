//! A member that this program runs: its process, TLS with authentication, a second member, and what happens when its space is used up.
#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::Duration;

use oblak_platform::process::Identity;
use oblak_store::{Key, Store, StoreError, Txn};
use oblak_store_etcd::admin::Admin;
use oblak_store_etcd::members::{self, Keeper, Step, View};
use oblak_store_etcd::supervise::{Certificates, Founding, Settings, SuperviseError, Supervisor, running, stop};
use oblak_store_etcd::testing::available;
use oblak_store_etcd::{EtcdOptions, EtcdStore, Tls};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(40);

/// A place for members with one authority. Their processes end with it.
struct Place {
    dir: TempDir,
}

impl Drop for Place {
    fn drop(&mut self) {
        let dirs: Vec<_> = std::fs::read_dir(self.dir.path()).unwrap().flatten().map(|entry| entry.path()).collect();
        // Inside of a runtime nothing can be waited for.
        let stopping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            for dir in dirs.iter().filter(|dir| running(dir).is_some()) {
                let _ = runtime.block_on(stop(dir));
            }
        });
        let _ = stopping.join();
    }
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("oblak-etcd-own-").tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "etcd");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(dir.path().join("ca.pem"), ca.pem()).unwrap();
        for name in ["root", "stranger"] {
            let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
            params.distinguished_name.push(DnType::CommonName, name);
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &ca).unwrap();
            std::fs::write(dir.path().join(format!("{name}.pem")), certificate.pem()).unwrap();
            std::fs::write(dir.path().join(format!("{name}.key")), key.serialize_pem()).unwrap();
        }
        Self { dir }
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn settings(&self, name: &str, founding: Founding, quota_bytes: u64) -> Settings {
        let port = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        std::fs::create_dir_all(self.file(name)).unwrap();
        Settings {
            dir: self.file(name),
            name: name.into(),
            address: Ipv4Addr::LOCALHOST.into(),
            client_port: port(),
            peer_port: port(),
            founding,
            founded: false,
            certificates: Certificates {
                ca: self.file("ca.pem"),
                certificate: self.file("root.pem"),
                key: self.file("root.key"),
            },
            quota_bytes,
        }
    }

    fn options(&self, who: &str, settings: &[&Settings]) -> EtcdOptions {
        let read = |name: &str| std::fs::read(self.file(name)).unwrap();
        let identity = Some((read(&format!("{who}.pem")), read(&format!("{who}.key"))));
        let urls = settings.iter().map(|s| format!("https://127.0.0.1:{}", s.client_port));
        EtcdOptions { tls: Some(Tls { ca: read("ca.pem"), identity, server_name: None }), ..EtcdOptions::new(urls) }
    }
}

fn new(token: &str) -> Founding {
    Founding::New { token: token.into() }
}

fn record(dir: &Path) -> Identity {
    oblak_platform::fsx::read_json(&dir.join("process.json")).unwrap().unwrap()
}

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let end = tokio::time::Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn put(store: &EtcdStore, key: &str, bytes: usize) -> Result<(), StoreError> {
    let key = Key::new(key).unwrap();
    store.commit(Txn::random().put(key, vec![b'x'; bytes])).await.map(|outcome| assert!(outcome.revision().is_some()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_is_started_again_adopted_and_never_begun_empty() {
    if !available(&["etcd"]) {
        return;
    }
    let place = Place::new();
    let mut settings = place.settings("a", new("t1"), 1 << 30);
    let first = CancellationToken::new();
    let running_first = tokio::spawn(Supervisor::new(settings.clone()).unwrap().run(first.clone()));
    let admin = Admin::new(&place.options("root", &[&settings])).unwrap();
    until("an answer", async || admin.members().await.ok()).await;
    admin.require_root().await.unwrap();
    admin.require_root().await.unwrap();
    let store = EtcdStore::open(place.options("root", &[&settings])).await.unwrap();
    put(&store, "/a/b", 1).await.unwrap();
    // Of the right authority, but not root.
    let stranger = EtcdStore::open(place.options("stranger", &[&settings])).await.err().unwrap();
    assert!(matches!(stranger, StoreError::Refused { .. }), "{stranger}");

    // It dies: another one is started.
    let before = record(&settings.dir);
    assert!(before.kill());
    let second =
        until("another etcd", async || Some(record(&settings.dir)).filter(|now| *now != before && now.is_alive()))
            .await;
    until("the data", async || store.get(&Key::new("/a/b").unwrap()).await.ok().flatten()).await;

    // Its supervisor ends: it goes on, and the next one adopts it, also when the record was lost.
    first.cancel();
    running_first.await.unwrap();
    assert!(second.is_alive());
    settings.founded = true;
    std::fs::remove_file(settings.dir.join("process.json")).unwrap();
    let mut adopting = Supervisor::new(settings.clone()).unwrap();
    adopting.ensure().unwrap();
    assert_eq!(record(&settings.dir), second);

    // Stopped when asked; without its data it is not started.
    assert!(stop(&settings.dir).await.unwrap());
    assert!(!second.is_alive() && !stop(&settings.dir).await.unwrap());
    std::fs::rename(settings.data(), settings.dir.join("gone")).unwrap();
    let error = Supervisor::new(settings.clone()).unwrap().ensure().unwrap_err();
    assert!(matches!(error, SuperviseError::DataGone { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_member_learns_and_the_store_is_told_of_it() {
    if !available(&["etcd"]) {
        return;
    }
    let place = Place::new();
    let a = place.settings("a", new("t2"), 1 << 30);
    let shutdown = CancellationToken::new();
    tokio::spawn(Supervisor::new(a.clone()).unwrap().run(shutdown.clone()));
    let options = place.options("root", &[&a]);
    let admin = Admin::new(&options).unwrap();
    until("an answer", async || admin.members().await.ok()).await;
    let store = EtcdStore::open(options.clone()).await.unwrap();
    put(&store, "/a/b", 1).await.unwrap();

    let mut b = place.settings("b", new(""), 1 << 30);
    let peer = |settings: &Settings| format!("https://127.0.0.1:{}", settings.peer_port);
    let view = members::admit(&admin, &options, &peer(&b)).await.unwrap();
    assert_eq!((view.members.len(), view.voters()), (2, 1));
    // The same again changes nothing, and one more has to wait.
    assert_eq!(members::admit(&admin, &options, &peer(&b)).await.unwrap().members.len(), 2);
    let other = members::admit(&admin, &options, "https://127.0.0.1:1").await.unwrap_err();
    assert!(matches!(other, StoreError::Unreachable { .. }), "{other}");
    let name = |url: &str| if *url == peer(&a) { "a" } else { "b" };
    let all = view.members.iter().map(|m| (name(&m.peer_urls[0]).into(), m.peer_urls[0].clone())).collect();
    b.founding = Founding::Joining { members: all };
    tokio::spawn(Supervisor::new(b.clone()).unwrap().run(shutdown.clone()));
    let mut keeper = Keeper::new(options).unwrap();
    let learning =
        |view: &View| view.members.iter().any(|m| m.learner && m.name == "b" && view.statuses[&m.id].is_ok());
    let view =
        until("it learns", async || keeper.look().await.ok().filter(|v| v.statuses.len() == 2 && learning(v))).await;
    assert!(keeper.plan(&view, view.leader().unwrap(), 0).is_empty(), "two members have one vote");
    // A learner is asked first and does not answer: the next one is.
    store.retarget(&place.options("root", &[&b, &a]), false).unwrap();
    put(&store, "/a/c", 1).await.unwrap();
    assert_eq!(store.endpoints().len(), 2);
    shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_store_makes_room() {
    if !available(&["etcd"]) {
        return;
    }
    let place = Place::new();
    let settings = place.settings("a", new("t3"), 16 << 20);
    tokio::spawn(Supervisor::new(settings.clone()).unwrap().run(CancellationToken::new()));
    let options = place.options("root", &[&settings]);
    let admin = Admin::new(&options).unwrap();
    until("an answer", async || admin.members().await.ok()).await;
    let store = EtcdStore::open(options.clone()).await.unwrap();
    let mut full = None;
    for _ in 0..100 {
        if let Err(error) = put(&store, "/a/b", 500_000).await {
            full = Some(error);
            break;
        }
    }
    assert!(matches!(full, Some(StoreError::Quota { .. })), "{full:?}");
    let mut keeper = Keeper::new(options).unwrap();
    let view = keeper.look().await.unwrap();
    let own = view.members[0].id;
    assert_eq!(keeper.plan(&view, own, 0), [Step::MakeRoom]);
    keeper.make_room(&view, own, &store).await.unwrap();
    put(&store, "/a/b", 500_000).await.unwrap();
    let after = keeper.look().await.unwrap();
    assert!(after.alarms.is_empty());
    let bytes = |view: &View| view.statuses[&own].as_ref().unwrap().bytes;
    assert!(bytes(&after) < bytes(&view) / 2, "{} of {}", bytes(&after), bytes(&view));
}
