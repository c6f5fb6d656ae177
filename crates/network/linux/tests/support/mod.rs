//! A node played by network namespaces of its own: `host` runs the driver, `outside` is the rest of the world behind `host`.
#![allow(dead_code, missing_docs, clippy::unwrap_used, reason = "shared by several test programs, each uses a part")]

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use oblak_network::conformance::Testbed;
use oblak_network::{NetworkDriver, NetworkPlan, PortHandle, PortPlan, Rule};
use oblak_network_linux::{Config, LinuxNetwork};

pub mod cloud;
pub mod frames;

/// The host's address towards the outside, and the outside's.
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// Long enough for a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for an answer that must not come.
pub const SILENCE: Duration = Duration::from_millis(400);

pub struct Bed {
    dir: tempfile::TempDir,
    pub host: PathBuf,
    pub outside: PathBuf,
    names: [String; 2],
}

impl Bed {
    /// `None`, with the reason printed, where namespaces cannot be made.
    pub fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root to make network namespaces");
            return None;
        }
        if !Path::new("/dev/net/tun").exists() {
            println!("skipped: /dev/net/tun is missing");
            return None;
        }
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let tag = format!("obt{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let names = [format!("{tag}h"), format!("{tag}o")];
        let [host, outside] = [0, 1].map(|i| Path::new("/run/netns").join(&names[i]));
        let dir = tempfile::Builder::new().prefix("net-").tempdir().unwrap();
        let bed = Self { dir, host, outside, names };
        for name in &bed.names {
            run("ip", &["netns", "add", name]);
            run("ip", &["-n", name, "link", "set", "lo", "up"]);
        }
        let [h, o] = &bed.names;
        run("ip", &["-n", h, "link", "add", "wan", "type", "veth", "peer", "name", "wan", "netns", o]);
        for (name, address) in [(h, HOST), (o, OUTSIDE)] {
            run("ip", &["-n", name, "addr", "add", &format!("{address}/24"), "dev", "wan"]);
            run("ip", &["-n", name, "link", "set", "wan", "up"]);
        }
        Some(bed)
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub fn config(&self, netd: &[&str]) -> Config {
        let mut config = Config::new(self.data(), netd.iter().map(ToString::to_string).collect());
        config.run = self.run_dir();
        config.host_netns = Some(self.host.clone());
        config
    }

    pub fn linux(&self) -> LinuxNetwork {
        LinuxNetwork::new(&self.config(&[])).unwrap()
    }

    /// Names of the host's interfaces.
    pub fn links(&self) -> Vec<String> {
        let text = output(&self.host, "ip", &["-o", "link"]);
        text.lines().filter_map(|l| l.split([' ', ':', '@']).nth(2).map(Into::into)).collect()
    }

    /// Mounts, links, tables and addresses of the host, to compare before and after.
    pub fn traces(&self) -> String {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let ours = self.dir.path().to_string_lossy().into_owned();
        let mounts: Vec<_> = mounts.lines().filter(|l| l.contains(&ours)).collect();
        let links = output(&self.host, "ip", &["-4", "-o", "addr"]) + &self.links().join(" ");
        let tables = output(&self.host, "nft", &["list", "tables"]);
        let files = std::fs::read_dir(self.run_dir()).map_or(0, Iterator::count);
        format!("{mounts:?}\n{links}\n{tables}\n{files}")
    }
}

impl Testbed for Bed {
    fn underlay(&self) -> IpAddr {
        HOST.into()
    }
    fn driver(&self) -> Arc<dyn NetworkDriver> {
        Arc::new(self.linux())
    }
    fn occupy(&self, address: SocketAddr) -> Box<dyn Send> {
        Box::new(within(&self.host, || TcpListener::bind(address).unwrap()))
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let ours = self.dir.path().to_string_lossy().into_owned();
        for mount in mounts.lines().filter_map(|l| l.split(' ').nth(1)).filter(|m| m.starts_with(&ours)) {
            let _ = nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH);
        }
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

/// Runs `work` on a thread inside a namespace.
pub fn within<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> T {
    let file = std::fs::File::open(netns).unwrap_or_else(|e| panic!("{}: {e}", netns.display()));
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

pub fn run(program: &str, arguments: &[&str]) {
    let out = Command::new(program).args(arguments).output().unwrap();
    assert!(out.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// What a program prints inside a namespace.
pub fn output(netns: &Path, program: &str, arguments: &[&str]) -> String {
    let out = within(netns, || Command::new(program).args(arguments).output()).unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Whether an address answers a ping within `wait`.
pub fn pings(from: &Path, to: IpAddr, wait: Duration) -> bool {
    let end = Instant::now() + wait;
    loop {
        let arguments = ["-c1", "-W1", "-q", &to.to_string()];
        if within(from, || Command::new("ping").args(arguments).output()).unwrap().status.success() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
    }
}

/// A TCP server inside a namespace that tells every client its address.
pub struct Server {
    pub port: u16,
    stop: Arc<AtomicBool>,
}

impl Server {
    pub fn start(netns: &Path, address: impl Into<IpAddr>, port: u16) -> Self {
        let address = SocketAddr::new(address.into(), port);
        let listener = within(netns, || TcpListener::bind(address)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (port, stop) = (listener.local_addr().unwrap().port(), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((mut stream, peer)) => {
                        let _ = stream.write_all(peer.ip().to_string().as_bytes());
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Self { port, stop }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Connects from a namespace and returns what the [`Server`] says.
pub fn ask(from: &Path, to: impl Into<IpAddr>, port: u16, wait: Duration) -> io::Result<String> {
    let to = SocketAddr::new(to.into(), port);
    let mut stream = within(from, || TcpStream::connect_timeout(&to, wait))?;
    stream.set_read_timeout(Some(wait))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// The namespace of an instance's port.
pub fn guest(handle: &oblak_network::NetworkHandle, port: &PortPlan) -> PathBuf {
    match &handle.ports[&port.id] {
        PortHandle::Netns { netns, .. } => netns.clone(),
        PortHandle::Tap { .. } => panic!("port {} is a tap", port.id),
    }
}

/// The IPv4 address of a port.
pub fn v4(port: &PortPlan) -> Ipv4Addr {
    port.addresses.iter().find_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None }).unwrap()
}

pub fn everything() -> Vec<Rule> {
    vec![Rule { protocol: None, ports: None, peers: Vec::new() }]
}

/// A plan with ports of these kinds at 10.77.0.10, .11, ...
pub fn plan_with(name: &str, kinds: &[oblak_network::PortKind]) -> NetworkPlan {
    let mut plan = oblak_network::conformance::plan(name);
    plan.ports = (10..).zip(kinds).map(|(last, kind)| oblak_network::conformance::port(&plan, *kind, last)).collect();
    plan
}
