//! Downloads: they go on where they stopped, also after a kill, and never mix two versions.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use oblak_image::{Code, ImageStore, Options, Phase, Progress, Source};
use support::{Reply, Server, digest, fixture, names};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A raw disk whose bytes differ everywhere.
fn disk(seed: u8) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed).collect();
    bytes.truncate(bytes.len() / 512 * 512);
    bytes[446..510].fill(0);
    bytes[510..512].copy_from_slice(b"\x55\xaa");
    bytes[512..520].fill(0);
    bytes
}

fn url(server: &Server, path: &str) -> Source {
    Source::Url { url: server.url(path), headers: Vec::new() }
}

#[tokio::test]
async fn a_broken_connection_is_resumed() {
    let body = Arc::new(disk(0));
    let content = body.clone();
    let server = Server::start(move |seen| Reply { cut: Some(700_000), ..Reply::ranged(seen, &content, "\"v1\"") });
    let f = fixture();
    let progress = watch::Sender::new(Progress::default());
    let seen = progress.subscribe();
    let expected = Some(digest(&body).parse().unwrap());
    let record =
        f.store.import("a", "a", url(&server, "/disk"), expected, progress, CancellationToken::new()).await.unwrap();
    assert_eq!(record.digest.as_str(), digest(&body));
    let ranges: Vec<_> = server.requests().iter().map(|r| r.header("range").map(str::to_owned)).collect();
    assert_eq!(ranges[0], None);
    assert_eq!(ranges[1].as_deref(), Some("bytes=700000-"));
    assert_eq!(server.requests()[1].header("if-range"), Some("\"v1\""));
    assert_eq!((seen.borrow().phase, seen.borrow().percent), (Phase::Done, 100));
    assert_eq!(f.names("tmp/downloads"), Vec::<String>::new());
}

#[tokio::test]
async fn content_that_changes_on_the_way_is_fetched_anew() {
    let count = AtomicUsize::new(0);
    let server = Server::start(move |seen| {
        let first = count.fetch_add(1, Ordering::SeqCst) == 0;
        let (body, etag) = if first { (disk(1), "\"v1\"") } else { (disk(2), "\"v2\"") };
        Reply { cut: first.then_some(900_000), ..Reply::ranged(seen, &body, etag) }
    });
    let f = fixture();
    let record = f.import("a", url(&server, "/disk")).await.unwrap();
    assert_eq!(record.digest.as_str(), digest(&disk(2)));
}

#[tokio::test]
async fn servers_that_fail_are_reported() {
    let server = Server::start(|seen| match seen.path.as_str() {
        "/404" => Reply::new(404, ""),
        "/403" => Reply::new(403, ""),
        "/503" => Reply::new(503, ""),
        "/loop" => Reply::new(302, "").with("location", "/loop"),
        "/short" => Reply { cut: Some(1000), ..Reply::new(200, disk(0)).with("accept-ranges", "none") },
        _ => Reply::new(200, "hello"),
    });
    let f = fixture();
    for (path, code) in [
        ("/404", Code::NotFound),
        ("/403", Code::Invalid),
        ("/503", Code::Network),
        ("/loop", Code::Network),
        ("/short", Code::ImageTruncated),
        ("/text", Code::UnsupportedFormat),
    ] {
        let error = f.import("x", url(&server, path)).await.unwrap_err();
        assert_eq!(error.code, code, "{path}: {error}");
    }
    f.store.remove("x").unwrap();
    f.assert_empty();
    assert_eq!(f.names("tmp/downloads"), Vec::<String>::new(), "a removed image takes its downloads along");
    let closed = Source::Url { url: "http://127.0.0.1:1/x".into(), headers: Vec::new() };
    assert_eq!(f.import("x", closed).await.unwrap_err().code, Code::Network);
}

#[tokio::test]
async fn redirects_are_followed_without_the_credentials() {
    let body = Arc::new(disk(0));
    let content = body.clone();
    let target = Server::start(move |seen| Reply::ranged(seen, &content, "\"v\""));
    let location = target.url("/real");
    let front = Server::start(move |_| Reply::new(307, "").with("location", location.clone()));
    let f = fixture();
    let headers = vec![("Authorization".to_owned(), "Bearer secret".to_owned())];
    let record = f.import("a", Source::Url { url: front.url("/x?token=hidden"), headers }).await.unwrap();
    assert_eq!(front.requests()[0].header("authorization"), Some("Bearer secret"));
    assert_eq!(target.requests()[0].header("authorization"), None);
    assert!(!record.properties["source"].contains("hidden"));
    // The same again is already here.
    f.import("a", Source::Url { url: front.url("/x?token=hidden"), headers: Vec::new() }).await.unwrap();
    assert_eq!(front.requests().len(), 1);
}

/// Not a test of its own: the process that the next one kills.
#[tokio::test]
#[ignore = "child process of a_killed_import_is_resumed"]
async fn child_that_imports() {
    let (Ok(dir), Ok(url)) = (std::env::var("IMAGE_TEST_DIR"), std::env::var("IMAGE_TEST_URL")) else { return };
    let store = ImageStore::open_with(dir.as_ref(), Options::default()).unwrap();
    let source = Source::Url { url, headers: Vec::new() };
    let progress = watch::Sender::new(Progress::default());
    drop(store.import("a", "a", source, None, progress, CancellationToken::new()).await);
}

#[tokio::test]
async fn a_killed_import_is_resumed() {
    let body = Arc::new(disk(3));
    let content = body.clone();
    let slow = Some(Duration::from_millis(30));
    let server = Server::start(move |seen| Reply { slow, ..Reply::ranged(seen, &content, "\"v\"") });
    let dir = tempfile::tempdir().unwrap();
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_imports", "--ignored"])
        .env("IMAGE_TEST_DIR", dir.path())
        .env("IMAGE_TEST_URL", server.url("/disk"))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let part = || {
        let entries = std::fs::read_dir(dir.path().join("tmp/downloads")).ok()?;
        let sizes = entries.flatten().filter(|e| e.path().extension().is_some_and(|x| x == "part"));
        sizes.filter_map(|e| e.metadata().ok()).map(|m| m.len()).max()
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    while part().is_none_or(|size| size < 200_000) {
        assert!(Instant::now() < deadline, "the child downloads nothing");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    child.kill().unwrap();
    child.wait().unwrap();

    let store = ImageStore::open_with(dir.path(), Options::default()).unwrap();
    assert!(store.list().unwrap().is_empty());
    assert_eq!(names(&dir.path().join("tmp")), ["downloads"]);
    assert_eq!(names(&dir.path().join("records")), Vec::<String>::new());
    let source = Source::Url { url: server.url("/disk"), headers: Vec::new() };
    let progress = watch::Sender::new(Progress::default());
    let record = store.import("a", "a", source, None, progress, CancellationToken::new()).await.unwrap();
    assert_eq!(record.digest.as_str(), digest(&body));
    let last = server.requests().pop().unwrap();
    assert!(last.header("range").is_some(), "began anew instead of going on: {last:?}");
}

/// One https server with a certificate of an authority that only the test knows.
async fn https(body: Arc<Vec<u8>>) -> (u16, String) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_pem = authority.self_signed(&key).unwrap().pem();
    let issuer = rcgen::Issuer::new(authority, key);
    let leaf_key = rcgen::KeyPair::generate().unwrap();
    let leaf =
        rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&leaf_key, &issuer).unwrap();
    let secret = rustls::pki_types::PrivateKeyDer::Pkcs8(leaf_key.serialize_der().into());
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], secret)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (acceptor, body) = (acceptor.clone(), body.clone());
            tokio::spawn(async move {
                let Ok(mut tls) = acceptor.accept(tcp).await else { return };
                let mut request = vec![0; 4096];
                let n = tls.read(&mut request).await.unwrap();
                let down = String::from_utf8_lossy(&request[..n]).starts_with("GET /down");
                let head = if down {
                    "HTTP/1.1 302 X\r\nlocation: http://localhost:1/x\r\ncontent-length: 0\r\n\r\n".to_owned()
                } else {
                    format!("HTTP/1.1 200 X\r\ncontent-length: {}\r\n\r\n", body.len())
                };
                let _ = tls.write_all(head.as_bytes()).await;
                if !down {
                    let _ = tls.write_all(&body).await;
                }
                let _ = tls.shutdown().await;
            });
        }
    });
    (port, authority_pem)
}

#[tokio::test]
async fn https_trusts_known_authorities_only() {
    let body = Arc::new(disk(4));
    let (port, authority) = https(body.clone()).await;
    let source = |path: &str| Source::Url { url: format!("https://localhost:{port}{path}"), headers: Vec::new() };
    let strict = fixture();
    let error = strict.import("x", source("/disk")).await.unwrap_err();
    assert!(error.code == Code::Network && error.detail.contains("cannot be trusted"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, authority).unwrap();
    let f = support::fixture_with(Options { extra_ca: Some(ca), ..Options::default() });
    assert_eq!(f.import("a", source("/disk")).await.unwrap().digest.as_str(), digest(&body));
    let error = f.import("b", source("/down")).await.unwrap_err();
    assert!(error.detail.contains("https to http"), "{error}");
}
