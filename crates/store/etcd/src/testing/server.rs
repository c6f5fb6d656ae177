//! One server on loopback.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const STARTS: usize = 5;
const READY: Duration = Duration::from_secs(20);

/// What is unusual about a server.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Further flags.
    pub flags: Vec<String>,
    /// Whether it must survive a loss of power. Otherwise it does not wait for the disk.
    pub durable: bool,
    /// Whether clients come with `https://`; the certificates are given by `flags`.
    pub tls: bool,
}

/// A running etcd of one member. Dropping it kills the server and deletes its data.
pub struct Server {
    child: Child,
    dir: TempDir,
    url: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts one and waits until it answers. Must be called on a thread that lives as long as the server should.
    pub fn start(settings: &Settings) -> Self {
        Self::start_from(settings, |_, _, _| {})
    }

    /// As [`Server::start`]; `prepare` fills the data directory, given its path, the name of the member and its URL for peers.
    pub fn start_from(settings: &Settings, prepare: impl Fn(&Path, &str, &str)) -> Self {
        // etcd must be told its ports, and another process can take a free one before etcd does.
        for _ in 0..STARTS {
            if let Some(server) = Self::attempt(settings, &prepare) {
                return server;
            }
        }
        panic!("etcd did not start {STARTS} times");
    }

    fn attempt(settings: &Settings, prepare: &impl Fn(&Path, &str, &str)) -> Option<Self> {
        let dir = tempfile::Builder::new().prefix("oblak-etcd-").tempdir().unwrap();
        let (client, peer) = (free_port(), free_port());
        let url = format!("{}://127.0.0.1:{client}", if settings.tls { "https" } else { "http" });
        let peer = format!("http://127.0.0.1:{peer}");
        prepare(&dir.path().join("data"), "one", &peer);
        let mut flags = vec![
            "--name=one".to_owned(),
            format!("--data-dir={}", dir.path().join("data").display()),
            format!("--listen-client-urls={url}"),
            format!("--advertise-client-urls={url}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=one={peer}"),
        ];
        if !settings.durable && !is_old() {
            flags.push("--unsafe-no-fsync".into());
        }
        flags.extend(settings.flags.iter().cloned());
        let child = spawn(&[], &flags, &dir.path().join("log"));
        let mut server = Self { child, dir, url };
        server.answers(client).then_some(server)
    }

    fn answers(&mut self, port: u16) -> bool {
        let start = Instant::now();
        while start.elapsed() < READY {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("etcd does not answer: {}", std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default());
    }

    /// Where clients connect.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where its data are.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }
}

/// `--unsafe-no-fsync` came with etcd 3.5.
fn is_old() -> bool {
    let output = Command::new("etcd").arg("--version").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.contains("Version: 3.4") || text.contains("Version: 3.3")
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// Starts etcd behind `enter` so that it dies with this thread.
pub fn spawn(enter: &[String], flags: &[String], log: &Path) -> Child {
    let log = File::options().create(true).append(true).open(log).unwrap();
    let line: Vec<String> =
        enter.iter().cloned().chain(["setpriv", "--pdeathsig", "KILL", "etcd"].map(String::from)).collect();
    Command::new(&line[0])
        .args(&line[1..])
        .args(flags)
        .env("ETCD_LOG_LEVEL", "warn")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}
