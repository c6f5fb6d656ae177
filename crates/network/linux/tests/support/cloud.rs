//! Several nodes, played by network namespaces on one underlay, and a stranger on it who is no node.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use oblak_network::{NetworkDriver, NetworkHandle, NetworkPlan, OverlayPlan, PortKind, overlay};
use oblak_network_linux::{Config, LinuxNetwork};

use super::{output, run};

/// MTU of the underlay.
pub const UNDERLAY_MTU: u16 = 1500;

pub struct Cloud {
    dir: tempfile::TempDir,
    pub nodes: Vec<Node>,
    /// Plugged into the underlay, but not one of the nodes.
    pub stranger: PathBuf,
    names: Vec<String>,
}

pub struct Node {
    pub host: PathBuf,
    pub v4: IpAddr,
    pub v6: IpAddr,
    pub driver: LinuxNetwork,
}

impl Node {
    pub fn address(&self, v4: bool) -> IpAddr {
        if v4 { self.v4 } else { self.v6 }
    }
}

impl Cloud {
    /// `None`, with the reason printed, where namespaces cannot be made.
    pub fn new(count: u8) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root to make network namespaces");
            return None;
        }
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let tag = format!("obc{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let names: Vec<String> = (0..=count + 1).map(|i| format!("{tag}n{i}")).collect();
        let place = |i: u8| Path::new("/run/netns").join(&names[usize::from(i)]);
        let dir = tempfile::Builder::new().prefix("cloud-").tempdir().unwrap();
        let mut cloud = Self { dir, nodes: Vec::new(), stranger: place(count + 1), names: names.clone() };
        for name in &names {
            run("ip", &["netns", "add", name]);
            run("ip", &["-n", name, "link", "set", "lo", "up"]);
        }
        let switch = &names[0];
        run("ip", &["-n", switch, "link", "add", "sw", "up", "type", "bridge"]);
        for i in 1..=count + 1 {
            let (name, port) = (&names[usize::from(i)], format!("p{i}"));
            run("ip", &["-n", switch, "link", "add", &port, "type", "veth", "peer", "name", "wan", "netns", name]);
            run("ip", &["-n", switch, "link", "set", &port, "master", "sw", "up"]);
            let (v4, v6) = ([192, 0, 2, i].into(), format!("2001:db8::{i}").parse().unwrap());
            for address in [format!("{v4}/24"), format!("{v6}/64")] {
                run("ip", &["-n", name, "addr", "add", &address, "dev", "wan", "nodad"]);
            }
            run("ip", &["-n", name, "link", "set", "wan", "up"]);
            if i <= count {
                let host = place(i);
                let driver = cloud.driver(i, &host);
                cloud.nodes.push(Node { host, v4, v6, driver });
            }
        }
        Some(cloud)
    }

    fn driver(&self, i: u8, host: &Path) -> LinuxNetwork {
        let mut config = Config::new(self.dir.path().join(format!("data{i}")), Vec::new());
        config.run = self.dir.path().join("run");
        config.host_netns = Some(host.to_path_buf());
        LinuxNetwork::new(&config).unwrap()
    }

    /// The plan as node `at` gets it: `home` says for each port on which node it is.
    pub fn plan_at(&self, whole: &NetworkPlan, home: &[usize], at: usize, v4: bool) -> NetworkPlan {
        let local = self.nodes[at].address(v4);
        let mut plan = whole.clone();
        plan.overlay = Some(OverlayPlan { vni: 0x0012_3456, local });
        plan.mtu = overlay::guest_mtu(local, UNDERLAY_MTU);
        for (port, home) in plan.ports.iter_mut().zip(home) {
            if *home != at {
                port.kind = PortKind::Remote;
                port.tunnel = Some(self.nodes[*home].address(v4));
            }
        }
        plan
    }

    /// Carries the network out on every node that has a port of it, and removes it from the others.
    pub async fn apply(&self, whole: &NetworkPlan, home: &[usize], v4: bool) -> Vec<NetworkHandle> {
        let mut handles = Vec::new();
        for (at, node) in self.nodes.iter().enumerate() {
            if home.contains(&at) {
                handles.push(node.driver.ensure(&self.plan_at(whole, home, at, v4)).await.unwrap());
            } else {
                node.driver.remove(whole.id).await.unwrap();
                handles.push(NetworkHandle::default());
            }
        }
        handles
    }

    /// Mounts, links and tables of all nodes, to compare before and after.
    pub fn traces(&self) -> String {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let ours = self.dir.path().to_string_lossy().into_owned();
        let mut text: String = mounts.lines().filter(|l| l.contains(&ours)).collect();
        for node in &self.nodes {
            text += &output(&node.host, "ip", &["-br", "link"]);
            text += &output(&node.host, "nft", &["list", "tables"]);
            text += &output(&node.host, "ss", &["-Hlun"]);
        }
        text
    }
}

impl Drop for Cloud {
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

/// Packets that a device of a namespace has sent so far.
pub fn sent(netns: &Path, device: &str) -> u64 {
    let text = output(netns, "ip", &["-s", "-j", "link", "show", device]);
    let links: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{device}: {e}: {text}"));
    links[0]["stats64"]["tx"]["packets"].as_u64().unwrap()
}
