//! What this node is: read from the kernel and asked of the drivers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use oblak_model::{Cpus, DiskFact, NodeFacts, NodeUnderlay, NumaNode, PoolFact, Probe, Resources, Size};
use oblak_platform::driver::Availability;

use crate::config::UnderlayChoice;
use crate::context::Context;

/// Looks at the machine and the drivers.
pub async fn gather(ctx: &Context) -> NodeFacts {
    let mut facts = ctx.config.machine.clone().unwrap_or_else(|| machine(ctx.config.layout.root()));
    let mut probes: Vec<Availability> = Vec::new();
    for driver in distinct(ctx) {
        let capabilities = driver.probe().await;
        facts.isolations.extend(capabilities.isolations);
        facts.unavailable.extend(capabilities.unavailable);
        facts.notices.extend(capabilities.notices);
        if !capabilities.accelerator.is_empty() {
            facts.accelerator = capabilities.accelerator;
        }
        probes.extend(capabilities.probed);
    }
    probes.extend(ctx.drivers.network.probe().await.probed);
    match underlay(ctx).await {
        Ok(found) => facts.underlay = found,
        Err(reason) => facts.notices.push(format!("networks stay on this node: {reason}")),
    }
    for (name, pool) in &ctx.drivers.pools {
        let found = pool.driver.probe().await;
        let why = found.probed.iter().find(|p| !p.available && p.name == "pool").map(|p| p.detail.clone());
        let problem = if found.available { String::new() } else { why.unwrap_or_else(|| "it cannot be used".into()) };
        facts.pools.push(PoolFact { name: name.clone(), shared: true, path: pool.path.display().to_string(), problem });
    }
    let volumes = ctx.drivers.volume.probe().await;
    probes.extend(volumes.probed);
    facts.probes =
        probes.into_iter().map(|p| Probe { name: p.name, available: p.available, detail: p.detail }).collect();
    facts.isolations.sort_unstable();
    facts.isolations.dedup();
    facts.unavailable.retain(|(isolation, _)| !facts.isolations.contains(isolation));
    for isolation in [
        oblak_model::Isolation::Container,
        oblak_model::Isolation::Microvm,
        oblak_model::Isolation::Vm,
        oblak_model::Isolation::Metal,
    ] {
        let known = facts.isolations.contains(&isolation) || facts.unavailable.iter().any(|(i, _)| *i == isolation);
        if !known {
            facts.unavailable.push((isolation, "this version of the agent has no driver for it".into()));
        }
    }
    facts
}

/// Where tunnels to other nodes begin; `None` when none are wanted.
async fn underlay(ctx: &Context) -> Result<Option<NodeUnderlay>, String> {
    let address = match ctx.config.underlay {
        UnderlayChoice::Off => return Ok(None),
        UnderlayChoice::Address(address) => address,
        UnderlayChoice::Route => match route(&ctx.client.server()).await {
            Ok(address) if address.is_loopback() => return Ok(None),
            Ok(address) => address,
            Err(e) => {
                return Err(format!("the way to {} is not known: {e}; give --underlay ADDR", ctx.client.server()));
            }
        },
    };
    let Some(overlay) = ctx.drivers.network.overlay() else {
        return Err(format!("the network driver {} cannot make tunnels", ctx.drivers.network.name()));
    };
    let found = overlay.underlay(address).await.map_err(|e| e.detail)?;
    Ok(Some(NodeUnderlay { address: found.address, mtu: found.mtu }))
}

/// The address of this machine from which a server is reached. Connecting a UDP socket asks for the route and sends nothing.
async fn route(url: &str) -> std::io::Result<IpAddr> {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest).split('/').next().unwrap_or_default();
    let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
    for to in tokio::net::lookup_host(authority).await? {
        let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let tried = std::net::UdpSocket::bind((any, 0)).and_then(|s| {
            s.connect(to)?;
            s.local_addr()
        });
        match tried {
            Ok(address) => return Ok(address.ip()),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Each driver once, though it may serve several isolations.
fn distinct(ctx: &Context) -> Vec<std::sync::Arc<dyn oblak_compute::ComputeDriver>> {
    let mut out: Vec<std::sync::Arc<dyn oblak_compute::ComputeDriver>> = Vec::new();
    for driver in ctx.drivers.compute.values() {
        if !out.iter().any(|d| d.name() == driver.name()) {
            out.push(driver.clone());
        }
    }
    out
}

/// What can be given to guests.
#[must_use]
pub fn capacity(facts: &NodeFacts, reserved: Size) -> Resources {
    let disk = facts.disks.first().map_or(Size::ZERO, |d| d.free);
    Resources { vcpus: Cpus(facts.cpus.saturating_mul(1000)), memory: facts.memory - reserved, disk }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).map(|s| s.trim().to_string()).unwrap_or_default()
}

/// What the kernel says (proc(5), sysfs).
fn machine(data: &Path) -> NodeFacts {
    let cpuinfo = read("/proc/cpuinfo");
    let field = |text: &str, name: &str| {
        text.lines().find_map(|l| l.strip_prefix(name)?.split_once(':').map(|(_, v)| v.trim().to_string()))
    };
    let uname = nix::sys::utsname::uname().ok();
    let text = |s: Option<&std::ffi::OsStr>| s.map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    NodeFacts {
        hostname: text(uname.as_ref().map(nix::sys::utsname::UtsName::nodename)),
        kernel: text(uname.as_ref().map(nix::sys::utsname::UtsName::release)),
        architecture: text(uname.as_ref().map(nix::sys::utsname::UtsName::machine)),
        os: os_name(&read("/etc/os-release")),
        cpu_model: field(&cpuinfo, "model name").unwrap_or_default(),
        cpus: u32::try_from(std::thread::available_parallelism().map_or(1, usize::from)).unwrap_or(u32::MAX),
        memory: memory(&read("/proc/meminfo")),
        numa: numa(),
        cgroup: cgroup(),
        disks: disk(data).into_iter().collect(),
        addresses: addresses(),
        ..NodeFacts::default()
    }
}

fn os_name(release: &str) -> String {
    release
        .lines()
        .find_map(|l| l.strip_prefix("PRETTY_NAME="))
        .map(|v| v.trim_matches('"').to_string())
        .unwrap_or_default()
}

/// `MemTotal` of /proc/meminfo, which counts in KiB.
fn memory(meminfo: &str) -> Size {
    let kib = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:")?.split_ascii_whitespace().next()?.parse().ok());
    Size::kib(kib.unwrap_or(0))
}

fn numa() -> Vec<NumaNode> {
    let mut out = Vec::new();
    for id in 0..1024u32 {
        let base = format!("/sys/devices/system/node/node{id}");
        if !Path::new(&base).exists() {
            break;
        }
        // Lines look like "Node 0 MemTotal:  16384 kB".
        let meminfo: String = read(&format!("{base}/meminfo"))
            .lines()
            .filter_map(|l| l.split_once(&format!("Node {id} ")).map(|(_, r)| format!("{r}\n")))
            .collect();
        out.push(NumaNode { id, cpus: read(&format!("{base}/cpulist")), memory: memory(&meminfo) });
    }
    out
}

/// `v2` when the unified tree is the only one, `hybrid` when it is mounted beside v1 controllers, else `v1` (cgroups(7)).
fn cgroup() -> String {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return "v2".into();
    }
    if Path::new("/sys/fs/cgroup/unified/cgroup.procs").exists() { "hybrid".into() } else { "v1".into() }
}

fn disk(data: &Path) -> Option<DiskFact> {
    let stat = nix::sys::statvfs::statvfs(data).ok()?;
    let unit = stat.fragment_size();
    let fs = nix::sys::statfs::statfs(data).map(|s| format!("{:#x}", s.filesystem_type().0)).unwrap_or_default();
    Some(DiskFact {
        path: data.display().to_string(),
        fs: fs_name(&fs),
        size: Size(stat.blocks().saturating_mul(unit)),
        free: Size(stat.blocks_available().saturating_mul(unit)),
    })
}

/// Magic numbers of statfs(2).
fn fs_name(magic: &str) -> String {
    match magic {
        "0xef53" => "ext4".into(),
        "0x58465342" => "xfs".into(),
        "0x9123683e" => "btrfs".into(),
        "0x1021994" => "tmpfs".into(),
        "0x794c7630" => "overlayfs".into(),
        "0x2fc12fc1" => "zfs".into(),
        other => other.into(),
    }
}

fn addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    let mut out: Vec<IpAddr> = interfaces
        .filter(|i| !i.interface_name.starts_with("oblak") && !i.interface_name.starts_with("ob"))
        .filter_map(|i| {
            let address = i.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        })
        .filter(|a| !a.is_loopback())
        .collect();
    out.sort_unstable();
    out.dedup();
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_this_machine() {
        let facts = machine(Path::new("/"));
        assert!(facts.cpus > 0);
        assert!(facts.memory > Size::mib(64));
        assert!(["v1", "v2", "hybrid"].contains(&facts.cgroup.as_str()));
        let capacity = capacity(&facts, Size::mib(1));
        assert!(capacity.memory < facts.memory);
    }

    #[tokio::test]
    async fn the_way_to_a_server_begins_at_an_address_of_ours() {
        assert!(route("https://127.0.0.1:7443").await.unwrap().is_loopback());
        assert!(route("https://[::1]:7443/v1").await.is_ok_and(|a| a.is_loopback() && a.is_ipv6()));
        assert!(route("https://127.0.0.1").await.is_err(), "without a port");
    }

    #[test]
    fn parses() {
        assert_eq!(memory("MemTotal:       1024 kB\nMemFree: 1 kB"), Size::mib(1));
        assert_eq!(os_name("NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12\""), "Debian GNU/Linux 12");
    }
}
