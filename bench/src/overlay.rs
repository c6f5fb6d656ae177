//! Throughput of tenants between two nodes, security groups and all, beside the same bridges, veths and VXLAN devices without a rule.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};
use oblak_model::PortId;
use oblak_network::overlay::guest_mtu;
use oblak_network::{
    NetworkDriver, NetworkPlan, OverlayPlan, PortHandle, PortKind, PortPlan, Protocol, Rule, conformance,
};
use oblak_network_linux::{Config, LinuxNetwork};

use crate::Context;
use crate::report::{Goal, Row, Table};
use crate::stats::Samples;

/// Pairs of measurements, ours and the floor in turn.
const ROUNDS: usize = 9;
/// Length of one transfer.
const TRANSFER: Duration = Duration::from_millis(1500);
const CHUNK: usize = 128 * 1024;
const PATIENCE: Duration = Duration::from_secs(10);
const UNDERLAY_MTU: u16 = 1500;
const ENDS: [IpAddr; 2] =
    [IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2))];
/// Ports of the network that are elsewhere while one of them moves.
const ELSEWHERE: u16 = 500;
const MOVES: usize = 21;
const PORT: u16 = 5201;

/// Runs the measurement.
pub fn run(context: &Context, table: &mut Table) -> Result<()> {
    let dir = context.temp()?;
    let bed = Bed::new(dir.path())?;
    let runtime = tokio::runtime::Runtime::new()?;
    let ours = runtime.block_on(tenants(&bed))?;
    let floor = bed.raw()?;
    let (mut raw, mut tenant) = (Samples::default(), Samples::default());
    for _ in 0..ROUNDS {
        raw.push(transfer(&floor[0], &floor[1], "10.99.0.2".parse()?)?);
        tenant.push(transfer(&ours.0, &ours.1, ours.2)?);
    }
    table.row(
        Row::beside("TCP between guests of two nodes, one stream", "Gbit/s", &raw, &tenant)
            .goal(Goal::RatioAtLeast(0.85)),
    );
    let moves = runtime.block_on(moves(&bed))?;
    table.row(Row::median(format!("a guest moves, one of {ELSEWHERE} elsewhere: a node follows"), "ms", &moves));
    table.note("floor: guest, veth, bridge, VXLAN, veth as underlay and back, made by hand, without nftables and without bridge netfilter");
    Ok(())
}

/// Two namespaces that play nodes, joined by a veth, and everything else made for the measurement.
struct Bed {
    drivers: [LinuxNetwork; 2],
    data: PathBuf,
    /// Taken away after what is mounted in them.
    _namespaces: Namespaces,
}

impl Bed {
    fn new(dir: &Path) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("needs root to make network namespaces");
        }
        let names = [0, 1].map(|i| name(&format!("h{i}")));
        let hosts = names.clone().map(|n| Path::new("/run/netns").join(n));
        let driver = |i: usize| {
            let mut config = Config::new(dir.join(format!("data{i}")), Vec::new());
            config.run = dir.join("run");
            config.host_netns = Some(hosts[i].clone());
            LinuxNetwork::new(&config)
        };
        let namespaces = Namespaces;
        for name in &names {
            ip(&["netns", "add", name])?;
        }
        ip(&["-n", &names[0], "link", "add", "wan", "type", "veth", "peer", "name", "wan", "netns", &names[1]])?;
        for (name, end) in names.iter().zip(ENDS) {
            ip(&["-n", name, "addr", "add", &format!("{end}/24"), "dev", "wan"])?;
            ip(&["-n", name, "link", "set", "wan", "up"])?;
        }
        let drivers = [driver(0)?, driver(1)?];
        Ok(Self { drivers, data: dir.to_path_buf(), _namespaces: namespaces })
    }

    /// The floor: namespaces of two guests.
    fn raw(&self) -> Result<[PathBuf; 2]> {
        let mtu = guest_mtu(ENDS[0], UNDERLAY_MTU).to_string();
        for i in 0..2 {
            let (host, net, guest) = (name(&format!("h{i}")), name(&format!("n{i}")), name(&format!("g{i}")));
            let (mac, far) = (format!("02:00:00:99:00:0{}", i + 1), format!("02:00:00:99:00:0{}", 2 - i));
            let (local, remote) = (ENDS[i].to_string(), ENDS[1 - i].to_string());
            ip(&["netns", "add", &net])?;
            ip(&["netns", "add", &guest])?;
            ip(&["-n", &net, "link", "add", "br0", "mtu", &mtu, "up", "type", "bridge"])?;
            ip(&[
                "-n",
                &host,
                "link",
                "add",
                "vx0",
                "netns",
                &net,
                "mtu",
                &mtu,
                "type",
                "vxlan",
                "id",
                "99",
                "local",
                &local,
                "dstport",
                "4789",
                "nolearning",
            ])?;
            ip(&["-n", &net, "link", "set", "vx0", "master", "br0", "up"])?;
            ip(&[
                "-n", &net, "link", "add", "v0", "mtu", &mtu, "type", "veth", "peer", "name", "eth0", "address", &mac,
                "mtu", &mtu, "netns", &guest,
            ])?;
            ip(&["-n", &net, "link", "set", "v0", "master", "br0", "up"])?;
            ip(&["-n", &guest, "addr", "add", &format!("10.99.0.{}/24", i + 1), "dev", "eth0"])?;
            ip(&["-n", &guest, "link", "set", "eth0", "up"])?;
            ip(&["-n", &guest, "neigh", "add", &format!("10.99.0.{}", 2 - i), "lladdr", &far, "dev", "eth0"])?;
            let told = Command::new("bridge")
                .args(["-n", &net, "fdb", "append", &far, "dev", "vx0", "dst", &remote, "self", "permanent"])
                .status()?;
            anyhow::ensure!(told.success(), "bridge fdb: {told}");
        }
        Ok([0, 1].map(|i| Path::new("/run/netns").join(name(&format!("g{i}")))))
    }

    /// The plan as one of the nodes gets it; `home` says where each port is.
    fn plan(&self, whole: &NetworkPlan, at: usize, home: impl Fn(usize) -> IpAddr) -> NetworkPlan {
        let mut plan = whole.clone();
        plan.mtu = guest_mtu(ENDS[at], UNDERLAY_MTU);
        plan.overlay = Some(OverlayPlan { vni: 5000, local: ENDS[at] });
        for (i, port) in plan.ports.iter_mut().enumerate().filter(|(i, _)| home(*i) != ENDS[at]) {
            (port.kind, port.tunnel) = (PortKind::Remote, Some(home(i)));
        }
        plan
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let ours = self.data.to_string_lossy().into_owned();
        for mount in mounts.lines().filter_map(|l| l.split(' ').nth(1)).filter(|m| m.starts_with(&ours)) {
            let _ = nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// Takes away every namespace that this process has named.
struct Namespaces;

impl Drop for Namespaces {
    fn drop(&mut self) {
        for part in ["h0", "h1", "n0", "n1", "g0", "g1"] {
            let _ = Command::new("ip").args(["netns", "del", &name(part)]).output();
        }
    }
}

fn name(part: &str) -> String {
    format!("oblak-bench-{}-{part}", std::process::id())
}

fn ip(arguments: &[&str]) -> Result<()> {
    let out = Command::new("ip").args(arguments).output().context("running ip")?;
    anyhow::ensure!(out.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// Two guests of one network on two nodes; the second lets in TCP from its group, which is the first. Namespaces, and the second's address.
async fn tenants(bed: &Bed) -> Result<(PathBuf, PathBuf, IpAddr)> {
    let mut whole = conformance::plan("bench");
    whole.ports = vec![conformance::port(&whole, PortKind::Netns, 10), conformance::port(&whole, PortKind::Netns, 11)];
    let peers = vec![whole.ports[0].addresses[0].into()];
    whole.ports[1].ingress.push(Rule { protocol: Some(Protocol::Tcp), ports: Some((PORT, PORT)), peers });
    let mut guests = Vec::new();
    for (at, driver) in bed.drivers.iter().enumerate() {
        let handle = driver.ensure(&bed.plan(&whole, at, |port| ENDS[port])).await?;
        guests.push(netns(handle.ports.get(&whole.ports[at].id), whole.ports[at].id)?);
    }
    Ok((guests.remove(0), guests.remove(0), whole.ports[1].addresses[0]))
}

fn netns(handle: Option<&PortHandle>, port: PortId) -> Result<PathBuf> {
    match handle {
        Some(PortHandle::Netns { netns, .. }) => Ok(netns.clone()),
        other => bail!("port {port} became {other:?}"),
    }
}

/// How long a node needs to follow when a guest elsewhere moves between two others.
async fn moves(bed: &Bed) -> Result<Samples> {
    let mut whole = conformance::plan("moves");
    whole.subnets[0].cidr = "10.77.0.0/16".parse()?;
    let numbered = |whole: &NetworkPlan, n: u16| -> PortPlan {
        let [high, low] = n.to_be_bytes();
        let mut port = conformance::port(whole, PortKind::Netns, low);
        port.mac = format!("02:00:00:78:{high:02x}:{low:02x}");
        port.addresses = vec![IpAddr::from([10, 77, 1 + high, low])];
        port
    };
    whole.ports = (0..=ELSEWHERE).map(|n| numbered(&whole, n)).collect();
    let other: [IpAddr; 2] = [[192, 0, 2, 3].into(), [192, 0, 2, 4].into()];
    let plan = |round: usize| {
        let mut plan = bed.plan(&whole, 0, |port| match port {
            0 => ENDS[0],
            1 => other[round % 2],
            _ => other[0],
        });
        plan.overlay = Some(OverlayPlan { vni: 5001, local: ENDS[0] });
        plan
    };
    bed.drivers[0].ensure(&plan(0)).await?;
    let mut samples = Samples::default();
    for round in 1..=MOVES {
        let (plan, started) = (plan(round), Instant::now());
        bed.drivers[0].ensure(&plan).await?;
        samples.push_ms(started.elapsed());
    }
    Ok(samples)
}

/// Gbit/s of one TCP stream, counted where it arrives.
fn transfer(from: &Path, into: &Path, to: IpAddr) -> Result<f64> {
    let to = SocketAddr::new(to, PORT);
    let listener = within(into, move || Ok(TcpListener::bind(to)?))?;
    let sender = std::thread::spawn({
        let from = from.to_path_buf();
        move || -> Result<()> {
            let mut stream = within(&from, move || Ok(TcpStream::connect_timeout(&to, PATIENCE)?))?;
            let (chunk, end) = (vec![0u8; CHUNK], Instant::now() + TRANSFER);
            while Instant::now() < end {
                stream.write_all(&chunk)?;
            }
            Ok(())
        }
    });
    listener.set_nonblocking(true)?;
    let end = Instant::now() + PATIENCE;
    let (mut stream, _) = loop {
        match listener.accept() {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => break other.context("nobody connected")?,
        }
    };
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut bytes, mut buffer, started) = (0u64, vec![0u8; CHUNK], Instant::now());
    while let size @ 1.. = stream.read(&mut buffer)? {
        bytes += size as u64;
    }
    let seconds = started.elapsed().as_secs_f64();
    sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    Ok(bytes as f64 * 8.0 / seconds / 1e9)
}

/// Runs `work` on a thread inside a namespace.
fn within<T: Send + 'static>(netns: &Path, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let file = std::fs::File::open(netns).with_context(|| format!("opening {}", netns.display()))?;
    let thread = std::thread::spawn(move || {
        setns(&file, CloneFlags::CLONE_NEWNET)?;
        work()
    });
    thread.join().map_err(|_| anyhow::anyhow!("a thread in a network namespace panicked"))?
}
