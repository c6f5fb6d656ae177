//! Shared by the tests: a scripted HTTP server, a store in a temporary directory, images made by qemu-img.
#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use oblak_image::{ImageRecord, ImageStore, Options, Progress, Result, Source};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A request as the server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub headers: HashMap<String, String>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What the server answers.
#[derive(Clone, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// The connection breaks after so many bytes of the body.
    pub cut: Option<usize>,
    /// Pause after each 64 KiB.
    pub slow: Option<std::time::Duration>,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
    /// Of a file that supports ranges.
    pub fn ranged(seen: &Seen, body: &[u8], etag: &str) -> Self {
        let range =
            seen.header("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
        let same = seen.header("if-range").is_none_or(|v| v == etag);
        match range.filter(|_| same) {
            Some(from) if from < body.len() => Self::new(206, &body[from..])
                .with("content-range", format!("bytes {from}-{}/{}", body.len() - 1, body.len()))
                .with("etag", etag),
            Some(_) => Self::new(416, ""),
            None => Self::new(200, body).with("etag", etag),
        }
    }
}

type Handler = dyn Fn(&Seen) -> Reply + Send + Sync;

/// Serves on a port of its own until dropped with the process.
pub struct Server {
    pub port: u16,
    pub seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    pub fn start(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (log, handler): (_, Arc<Handler>) = (seen.clone(), Arc::new(handler));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, handler) = (log.clone(), handler.clone());
                std::thread::spawn(move || drop(serve(stream, &log, &*handler)));
            }
        });
        Self { port, seen }
    }
    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }
    pub fn requests(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

fn serve(mut stream: TcpStream, log: &Mutex<Vec<Seen>>, handler: &Handler) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let seen = Seen { path, headers };
    let reply = handler(&seen);
    log.lock().unwrap().push(seen);
    write!(stream, "HTTP/1.1 {} X\r\ncontent-length: {}\r\nconnection: close\r\n", reply.status, reply.body.len())?;
    for (name, value) in &reply.headers {
        write!(stream, "{name}: {value}\r\n")?;
    }
    write!(stream, "\r\n")?;
    let body = &reply.body[..reply.cut.unwrap_or(reply.body.len()).min(reply.body.len())];
    for piece in body.chunks(64 * 1024) {
        stream.write_all(piece)?;
        reply.slow.inspect(|pause| std::thread::sleep(*pause));
    }
    Ok(())
}

/// A store and the directory it lives in.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub store: ImageStore,
}

pub fn fixture() -> Fixture {
    fixture_with(Options::default())
}

pub fn fixture_with(options: Options) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open_with(&dir.path().join("images"), options).unwrap();
    Fixture { dir, store }
}

impl Fixture {
    pub async fn import(&self, id: &str, source: Source) -> Result<ImageRecord> {
        self.import_expecting(id, source, None).await
    }
    pub async fn import_expecting(&self, id: &str, source: Source, expected: Option<&str>) -> Result<ImageRecord> {
        let expected = expected.map(|e| e.parse().unwrap());
        self.store
            .import(id, id, source, expected, watch::Sender::new(Progress::default()), CancellationToken::new())
            .await
    }
    pub async fn upload(&self, id: &str, bytes: Vec<u8>, length: Option<u64>) -> Result<ImageRecord> {
        let content = std::io::Cursor::new(bytes);
        let progress = watch::Sender::new(Progress::default());
        self.store.put_stream(id, id, content, length, None, progress, CancellationToken::new()).await
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    pub fn file(&self, name: &str) -> Source {
        Source::File { path: self.path(name) }
    }
    /// Names below a directory of the store.
    pub fn names(&self, below: &str) -> Vec<String> {
        names(&self.store.dir().join(below))
    }
    /// Nothing is left of a failed import.
    pub fn assert_empty(&self) {
        assert!(self.store.list().unwrap().is_empty());
        assert_eq!(self.names("blobs/sha256"), Vec::<String>::new());
        assert_eq!(self.names("tmp"), ["downloads"]);
    }
}

pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

pub fn have(tool: &str) -> bool {
    let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|d: PathBuf| d.join(tool).is_file());
    if !found {
        eprintln!("skipped: {tool} is not installed");
    }
    found
}

pub fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

pub fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A qcow2 disk with a few clusters of data.
pub fn qcow2(path: &Path) {
    let text = path.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", text, "64M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "write -P 8 32M 512k", text]);
}

/// One-layer image: tar, diff id, gzip of it.
pub fn layer(files: &[(&str, &str)]) -> (Vec<u8>, String) {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        builder.append_data(&mut header, name, content.as_bytes()).unwrap();
    }
    let tar = builder.into_inner().unwrap();
    let diff_id = digest(&tar);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    (gzip.finish().unwrap(), diff_id)
}

pub fn digest(bytes: &[u8]) -> String {
    oblak_image::Digest::of(bytes).to_string()
}

pub struct Oci {
    pub manifest: Vec<u8>,
    pub blobs: HashMap<String, Vec<u8>>,
}

/// An image of the given layers for `architecture`.
pub fn oci(layers: &[&[(&str, &str)]], architecture: &str) -> Oci {
    let mut blobs = HashMap::new();
    let (mut descriptors, mut diff_ids) = (Vec::new(), Vec::new());
    for files in layers {
        let (bytes, diff_id) = layer(files);
        descriptors.push(serde_json::json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest(&bytes), "size": bytes.len()}));
        diff_ids.push(diff_id);
        blobs.insert(digest(&bytes), bytes);
    }
    let config = serde_json::to_vec(&serde_json::json!({
        "architecture": architecture, "os": "linux", "config": {"Cmd": ["sh"], "Env": ["A=1"], "ExposedPorts": {"80/tcp": {}}},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}
    }))
    .unwrap();
    let manifest = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len()},
        "layers": descriptors
    }))
    .unwrap();
    blobs.insert(digest(&config), config);
    Oci { manifest, blobs }
}

/// This machine as OCI calls it.
pub fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
