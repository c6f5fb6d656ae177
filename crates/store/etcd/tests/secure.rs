//! TLS with client certificates, and user with password.
#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::path::Path;

use etcd_client::{Client, Permission, PermissionType};
use oblak_store::{Key, Store, StoreError, Txn};
use oblak_store_etcd::testing::{Server, Settings, available};
use oblak_store_etcd::{EtcdOptions, EtcdStore, Tls};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, name: &str) -> (Vec<u8>, Vec<u8>) {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        // etcd's gateway is a client of its own server.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (certificate.pem().into_bytes(), key.serialize_pem().into_bytes())
    }

    fn pem(&self) -> Vec<u8> {
        self.0.pem().into_bytes()
    }
}

fn save(dir: &Path, name: &str, pem: &[u8]) -> String {
    let path = dir.join(name);
    std::fs::write(&path, pem).unwrap();
    path.display().to_string()
}

async fn works(options: EtcdOptions) {
    let store = EtcdStore::open(options).await.unwrap();
    let key = Key::new("/a/b").unwrap();
    assert!(store.commit(Txn::random().put(key.clone(), "1")).await.unwrap().revision().is_some());
    assert_eq!(store.get(&key).await.unwrap().unwrap().value, "1");
    let mut watch = store.watch(&oblak_store::Prefix::all(), oblak_store::Revision::ZERO).await.unwrap();
    assert!(watch.next().await.unwrap().is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_checked_on_both_sides() {
    if !available(&["etcd", "setpriv"]) {
        return;
    }
    let (authority, stranger) = (Authority::new("ours"), Authority::new("not ours"));
    let dir = tempfile::tempdir().unwrap();
    let (certificate, secret) = authority.issue("etcd");
    let flags = vec![
        format!("--cert-file={}", save(dir.path(), "server.pem", &certificate)),
        format!("--key-file={}", save(dir.path(), "server.key", &secret)),
        format!("--trusted-ca-file={}", save(dir.path(), "ca.pem", &authority.pem())),
        "--client-cert-auth".to_owned(),
    ];
    let server = Server::start(&Settings { flags, tls: true, ..Settings::default() });
    let with = |ca: &Authority, identity| EtcdOptions {
        tls: Some(Tls { ca: ca.pem(), identity, server_name: None }),
        ..EtcdOptions::new([server.url()])
    };
    works(with(&authority, Some(authority.issue("oblak")))).await;
    for wrong in [
        with(&authority, None),
        with(&authority, Some(stranger.issue("oblak"))),
        with(&stranger, Some(authority.issue("oblak"))),
    ] {
        let error = EtcdStore::open(wrong).await.err().unwrap();
        assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    }
    assert!(matches!(EtcdStore::open(EtcdOptions::new([server.url()])).await, Err(StoreError::Refused { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_that_may_use_the_prefix_is_enough() {
    if !available(&["etcd", "setpriv"]) {
        return;
    }
    let server = Server::start(&Settings::default());
    let mut root = Client::connect([server.url()], None).await.unwrap();
    for user in ["root", "cloud"] {
        root.user_add(user, "secret", None).await.unwrap();
        root.role_add(user).await.unwrap();
        root.user_grant_role(user, user).await.unwrap();
    }
    let permission = Permission::new(PermissionType::Readwrite, "oblak/").with_prefix();
    root.role_grant_permission("cloud", permission).await.unwrap();
    root.auth_enable().await.unwrap();
    let user = |password: &str| EtcdOptions {
        user: Some(("cloud".into(), password.into())),
        ..EtcdOptions::new([server.url()])
    };
    works(user("secret")).await;
    assert!(format!("{:?}", user("secret")).find("secret").is_none(), "passwords are not shown");
    for wrong in
        [user("guess"), EtcdOptions::new([server.url()]), EtcdOptions { prefix: "other/".into(), ..user("secret") }]
    {
        assert!(matches!(EtcdStore::open(wrong).await, Err(StoreError::Refused { .. })));
    }
}
