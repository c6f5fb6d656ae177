//! OCI images: from a real registry, from a scripted one that behaves badly, from layouts and tars.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use oblak_image::{BasicAuth, Code, Payload, Source};
use support::{Oci, Reply, Server, arch, digest, fixture, have, oci, root};

/// bcrypt of `s3cret`, the only form of htpasswd that the registry takes.
const HTPASSWD: &str = "puller:$2b$05$juAkoYLbWvjzHhz2rpuz5u97MX2ctbp7w9chiYDQylHo2vmq2m8O6\n";

struct Registry {
    process: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Registry {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("htpasswd"), HTPASSWD).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let at = dir.path().display();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {at}/data}}}}\n\
             http: {{addr: 127.0.0.1:{port}}}\nauth: {{htpasswd: {{realm: test, path: {at}/htpasswd}}}}\n"
        );
        std::fs::write(dir.path().join("config.yml"), config).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.path().join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "the registry does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { process, port, _dir: dir }
    }

    fn request(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> (u16, HashMap<String, String>) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{}\r\nauthorization: Basic cHVsbGVyOnMzY3JldA==\r\ncontent-type: {kind}\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n",
            self.port,
            body.len()
        )
        .unwrap();
        stream.write_all(body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let text = String::from_utf8_lossy(&answer).into_owned();
        let mut lines = text.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines
            .take_while(|l| !l.is_empty())
            .filter_map(|l| l.split_once(": "))
            .map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned()))
            .collect();
        (status, headers)
    }

    fn push_blob(&self, repository: &str, bytes: &[u8]) {
        let (status, headers) =
            self.request("POST", &format!("/v2/{repository}/blobs/uploads/"), "application/octet-stream", b"");
        assert_eq!(status, 202);
        let location = headers["location"].split_once(&format!(":{}", self.port)).unwrap().1;
        let path = format!("{location}&digest={}", digest(bytes));
        assert_eq!(self.request("PUT", &path, "application/octet-stream", bytes).0, 201);
    }

    fn push(&self, repository: &str, tag: &str, image: &Oci) {
        image.blobs.values().for_each(|b| self.push_blob(repository, b));
        let kind = "application/vnd.oci.image.manifest.v1+json";
        assert_eq!(self.request("PUT", &format!("/v2/{repository}/manifests/{tag}"), kind, &image.manifest).0, 201);
    }
}

fn source(reference: String, auth: Option<(&str, &str)>) -> Source {
    let auth = auth.map(|(u, p)| BasicAuth { username: u.into(), password: p.into() });
    Source::Registry { reference, auth, insecure_http: true }
}

fn read(layers: &[std::path::PathBuf], name: &str) -> Option<String> {
    layers.iter().rev().find_map(|l| std::fs::read_to_string(l.join(name)).ok())
}

#[tokio::test]
async fn a_real_registry_with_password_and_architectures() {
    if !root() || !have("docker-registry") {
        return;
    }
    let registry = Registry::start();
    let mine = oci(&[&[("etc/name", "base")], &[("etc/name", "top"), ("bin/run", "x")], &[("more", "3")]], arch());
    let other = oci(&[&[("etc/name", "wrong machine")]], "s390x");
    registry.push("team/app", "mine", &mine);
    registry.push("team/app", "other", &other);
    let entry = |image: &Oci, architecture: &str| {
        serde_json::json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(&image.manifest),
            "size": image.manifest.len(), "platform": {"os": "linux", "architecture": architecture}})
    };
    let index = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry(&other, "s390x"), entry(&mine, arch())]
    }))
    .unwrap();
    assert_eq!(
        registry.request("PUT", "/v2/team/app/manifests/all", "application/vnd.oci.image.index.v1+json", &index).0,
        201
    );

    let f = fixture();
    let at = |version: &str| format!("127.0.0.1:{}/team/app{version}", registry.port);
    let error = f.import("x", source(at(":all"), None)).await.unwrap_err();
    assert_eq!(error.code, Code::RegistryAuth, "{error}");
    let error = f.import("x", source(at(":all"), Some(("puller", "wrong")))).await.unwrap_err();
    assert_eq!(error.code, Code::RegistryAuth, "{error}");
    assert!(!error.detail.contains("wrong"), "{error}");
    let good = Some(("puller", "s3cret"));
    assert_eq!(f.import("x", source(at(":absent"), good)).await.unwrap_err().code, Code::NotFound);
    let error = f.import("x", source(at(":other"), good)).await.unwrap_err();
    assert!(error.code == Code::UnsupportedFormat && error.detail.contains("s390x"), "{error}");

    let record = f.import("a", source(at(":all"), good)).await.unwrap();
    assert_eq!(record.digest.as_str(), digest(&mine.manifest));
    let Payload::Oci { config, layers, .. } = &record.payload else { panic!("{record:?}") };
    assert_eq!(
        (config.cmd.as_slice(), config.exposed_ports.as_slice()),
        (["sh".to_owned()].as_slice(), ["80/tcp".to_owned()].as_slice())
    );
    assert_eq!(layers.len(), 3);
    let trees = f.store.unpack_layers("a").await.unwrap();
    assert_eq!(trees, layers.iter().map(|l| l.path.clone()).collect::<Vec<_>>());
    assert_eq!(read(&trees, "etc/name").as_deref(), Some("top"));
    // By digest, and nothing is pulled twice.
    f.import("b", source(at(&format!("@{}", digest(&mine.manifest))), good)).await.unwrap();
    assert_eq!(f.names("blobs/sha256").len(), 5);
    f.store.remove("a").unwrap();
    assert!(trees[0].exists());
    f.store.remove("b").unwrap();
    f.assert_empty();
    assert_eq!(f.names("unpacked"), Vec::<String>::new());
}

/// A registry that wants a bearer token and serves `image`; `twist` may change any answer.
fn scripted(image: Oci, twist: impl Fn(&str, usize, Reply) -> Reply + Send + Sync + 'static) -> Server {
    let count = Arc::new(AtomicUsize::new(0));
    Server::start(move |seen| {
        let host = seen.header("host").unwrap_or_default().to_owned();
        if seen.path.starts_with("/token") {
            assert!(seen.path.contains("scope=repository%3Aapp%3Apull"), "{}", seen.path);
            return Reply::new(200, r#"{"token":"t0ken"}"#);
        }
        if seen.header("authorization") != Some("Bearer t0ken") {
            let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\",scope=\"repository:app:pull\"");
            return Reply::new(401, "{}").with("www-authenticate", challenge);
        }
        let reply = match seen.path.strip_prefix("/v2/app/") {
            Some("manifests/latest") => Reply::new(200, image.manifest.clone()),
            Some(path) => path
                .strip_prefix("blobs/")
                .and_then(|d| image.blobs.get(d))
                .map_or_else(|| Reply::new(404, ""), |blob| Reply::ranged(seen, blob, "\"b\"")),
            None => Reply::new(404, ""),
        };
        twist(&seen.path, count.fetch_add(1, Ordering::SeqCst), reply)
    })
}

#[tokio::test]
async fn tokens_are_fetched_and_broken_layers_resumed() {
    if !root() {
        return;
    }
    // Letters that do not compress away (xorshift).
    let mut state = 1u32;
    let big: String = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        char::from(b'a' + (state % 26) as u8)
    })
    .take(400_000)
    .collect();
    let image = oci(&[&[("big", &big)]], arch());
    let server = scripted(image, |path, _, reply| {
        let long = path.contains("blobs") && reply.body.len() > 100_000;
        Reply { cut: long.then_some(60_000), ..reply }
    });
    let f = fixture();
    f.import("a", source(format!("127.0.0.1:{}/app", server.port), None)).await.unwrap();
    assert_eq!(read(&f.store.unpack_layers("a").await.unwrap(), "big").as_deref(), Some(big.as_str()));
    assert!(server.requests().iter().any(|r| r.header("range").is_some()));
    assert_eq!(server.requests().iter().filter(|r| r.path.starts_with("/token")).count(), 1);
}

#[tokio::test]
async fn a_registry_that_lies_is_caught() {
    if !root() {
        return;
    }
    let image = oci(&[&[("a", "b")]], arch());
    let server = scripted(image, |path, _, mut reply| {
        if path.contains("blobs") && reply.body.starts_with(b"\x1f\x8b") {
            let last = reply.body.len() - 1;
            reply.body[last] ^= 1;
        }
        reply
    });
    let f = fixture();
    let reference = format!("127.0.0.1:{}/app", server.port);
    assert_eq!(f.import("x", source(reference.clone(), None)).await.unwrap_err().code, Code::ImageCorrupt);
    f.assert_empty();
    assert_eq!(f.names("tmp/downloads"), Vec::<String>::new());
    // https by default: a plain registry is not spoken to.
    let secure = Source::Registry { reference, auth: None, insecure_http: false };
    assert_eq!(f.import("x", secure).await.unwrap_err().code, Code::Network);
}

fn write_layout(dir: &Path, image: &Oci, tag: &str) {
    std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    for bytes in image.blobs.values().chain([&image.manifest]) {
        std::fs::write(dir.join("blobs/sha256").join(&digest(bytes)[7..]), bytes).unwrap();
    }
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(&image.manifest), "size": image.manifest.len(),
        "annotations": {"org.opencontainers.image.ref.name": tag}}]});
    std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
}

#[tokio::test]
async fn layouts_and_tars() {
    if !root() {
        return;
    }
    let f = fixture();
    let image = oci(&[&[("a", "1")], &[("b", "2")]], arch());
    write_layout(&f.path("layout"), &image, "v1");
    let layout = |tag: Option<&str>| Source::OciLayout { path: f.path("layout"), tag: tag.map(str::to_owned) };
    assert_eq!(f.import("x", layout(Some("v2"))).await.unwrap_err().code, Code::NotFound);
    let record = f.import("a", layout(Some("v1"))).await.unwrap();
    assert_eq!(record.digest.as_str(), digest(&image.manifest));

    let tar = f.path("image.tar");
    support::run("tar", &["-C", f.path("layout").to_str().unwrap(), "-czf", tar.to_str().unwrap(), "."]);
    let from_tar = f.import("b", Source::OciTar { path: tar.clone() }).await.unwrap();
    assert_eq!(from_tar.digest, record.digest);
    let bytes = std::fs::read(&tar).unwrap();
    assert_eq!(f.upload("c", bytes.clone(), Some(bytes.len() as u64)).await.unwrap().digest, record.digest);

    // Export of one store, import into another.
    let mut export = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut f.store.export("a").unwrap().reader(0), &mut export).await.unwrap();
    let there = fixture();
    assert_eq!(there.upload("a", export, None).await.unwrap().digest, record.digest);
    assert_eq!(read(&there.store.unpack_layers("a").await.unwrap(), "b").as_deref(), Some("2"));

    let layer = image.blobs.iter().find(|(_, b)| b.starts_with(b"\x1f\x8b")).unwrap().0;
    std::fs::remove_file(f.path("layout/blobs/sha256").join(&layer[7..])).unwrap();
    let fresh = fixture();
    let broken = Source::OciLayout { path: f.path("layout"), tag: None };
    assert_eq!(fresh.import("x", broken).await.unwrap_err().code, Code::ImageTruncated);
    fresh.assert_empty();
}

#[tokio::test]
async fn a_layer_that_is_not_what_the_config_says_is_refused() {
    if !root() {
        return;
    }
    let f = fixture();
    let (mut image, other) = (oci(&[&[("a", "1")]], arch()), oci(&[&[("a", "2")]], arch()));
    // The manifest of one with the layer of the other: all digests of the transfer fit, the diff id does not.
    let layer = |i: &Oci| {
        i.blobs.iter().find(|(_, b)| b.starts_with(b"\x1f\x8b")).map(|(d, b)| (d.clone(), b.clone())).unwrap()
    };
    let ((mine, _), (theirs, bytes)) = (layer(&image), layer(&other));
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest).unwrap();
    assert_eq!(manifest["layers"][0]["digest"], mine);
    manifest["layers"][0]["digest"] = theirs.clone().into();
    manifest["layers"][0]["size"] = bytes.len().into();
    image.manifest = serde_json::to_vec(&manifest).unwrap();
    image.blobs.insert(theirs, bytes);
    write_layout(&f.path("layout"), &image, "t");
    let error = f.import("x", Source::OciLayout { path: f.path("layout"), tag: None }).await.unwrap_err();
    assert_eq!(error.code, Code::ImageCorrupt, "{error}");
    f.store.remove("x").unwrap();
    f.assert_empty();
    assert_eq!(f.names("unpacked"), Vec::<String>::new());
}
