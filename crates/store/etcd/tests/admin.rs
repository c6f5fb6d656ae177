//! Looking after etcd: what an operator sees, and what helps when it is full.
#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use oblak_store::{Key, Store, StoreError, Txn};
use oblak_store_etcd::admin::{Admin, AlarmKind};
use oblak_store_etcd::testing::{Server, Settings, available};
use oblak_store_etcd::{EtcdOptions, EtcdStore};

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_etcd_says_so_and_recovers() {
    if !available(&["etcd", "setpriv"]) {
        return;
    }
    let server =
        Server::start(&Settings { flags: vec!["--quota-backend-bytes=16777216".into()], ..Settings::default() });
    let options = EtcdOptions::new([server.url()]);
    let (store, admin) = (EtcdStore::open(options.clone()).await.unwrap(), Admin::new(&options).unwrap());
    let fill = |n: usize| Txn::random().put(key("/big"), vec![n as u8; 900_000]);
    let mut n = 0;
    let error = loop {
        n += 1;
        match store.commit(fill(n)).await {
            Ok(_) => assert!(n < 100, "the quota is not reached"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::Quota { .. }), "{error}");
    let alarms = admin.alarms().await.unwrap();
    assert_eq!(alarms.iter().map(|alarm| alarm.kind).collect::<Vec<_>>(), [AlarmKind::NoSpace]);
    assert!(store.get(&key("/big")).await.unwrap().is_some(), "reads go on");
    let full = admin.statuses().await.remove(0).1.unwrap();
    assert!(full.bytes > 10 << 20 && !full.errors.is_empty(), "{full:?}");
    store.compact(store.revision().await.unwrap()).await.unwrap();
    admin.defragment().await.unwrap();
    for alarm in alarms {
        admin.clear(alarm).await.unwrap();
    }
    assert!(admin.alarms().await.unwrap().is_empty());
    assert!(admin.statuses().await.remove(0).1.unwrap().bytes < full.bytes / 2);
    assert!(store.commit(fill(0)).await.unwrap().revision().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_becomes_a_cluster_with_the_same_data_and_a_new_incarnation() {
    if !available(&["etcd", "etcdctl", "setpriv"]) {
        return;
    }
    let server = Server::start(&Settings::default());
    let options = EtcdOptions::new([server.url()]);
    let (store, admin) = (EtcdStore::open(options.clone()).await.unwrap(), Admin::new(&options).unwrap());
    let kept = store.commit(Txn::random().put(key("/kept"), "1")).await.unwrap().revision().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("snapshot.db");
    let snapshot = admin.snapshot(&file).await.unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().len(), snapshot.bytes);
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(admin.snapshot(&file).await, Err(StoreError::Io { .. })), "nothing is overwritten");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left over");
    let lost = store.commit(Txn::random().put(key("/lost"), "1")).await.unwrap().revision().unwrap();

    let restored = Server::start_from(&Settings::default(), |data, name, peer| {
        let status = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["snapshot", "restore"])
            .arg(&file)
            .arg("--data-dir")
            .arg(data)
            .args(["--initial-cluster-token", "after the restore"])
            .arg(format!("--name={name}"))
            .arg(format!("--initial-cluster={name}={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .output()
            .unwrap();
        assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    });
    let again = EtcdStore::open(EtcdOptions::new([restored.url()])).await.unwrap();
    let now = again.revision().await.unwrap();
    assert_eq!(now.incarnation, lost.incarnation + 1);
    assert_eq!(again.get(&key("/kept")).await.unwrap().unwrap().revision.n, kept.n);
    assert_eq!(again.get(&key("/lost")).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_and_leader_are_shown() {
    if !available(&["etcd", "setpriv"]) {
        return;
    }
    let server = Server::start(&Settings::default());
    let mut options = EtcdOptions::new([server.url()]);
    options.endpoints.push("http://127.0.0.1:1".into());
    let admin = Admin::new(&options).unwrap();
    let members = admin.members().await.unwrap();
    assert_eq!((members.len(), members[0].name.as_str(), members[0].learner), (1, "one", false));
    assert_eq!(members[0].client_urls, [server.url()]);
    let statuses = admin.statuses().await;
    let alive = statuses[0].1.as_ref().unwrap();
    assert_eq!((alive.member, alive.leader), (members[0].id, members[0].id));
    assert!(alive.bytes > 0 && alive.term > 0 && !alive.version.is_empty());
    assert!(matches!(statuses[1].1, Err(StoreError::Unreachable { .. })));
}
