//! The steps of `ensure` and `remove`, blocking, one at a time per data directory.
//!
//! Order of `ensure`: directory, namespace, what is taken from the host with its rules and, at the same time, bridge, wish for netd
//! (which binds to the bridge) and rules, then uplink, tunnel, ports. Ports come last, so none is ever up without its rules, and after the wish, so that their instances are known to
//! whoever cleans up; each is finished by its alias, so one that a crash left half-made is seen as such.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use oblak_model::{InstanceId, NetworkId};
use oblak_network::{NetworkHandle, NetworkPlan};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;

use crate::names::{self, BRIDGE, Names, OVERLAY, PortAlias, UPLINK};
use crate::state::{HostPart, NetdFile, State};
use crate::sys::link::{Change, Link, Links};
use crate::sys::netns::NetNs;
use crate::sys::nft::{self, NftError};
use crate::sys::sysctl;
use crate::{firewall, host, overlay, plan, ports, uplink};

/// How long another process may hold the lock: longer than any `ensure` takes.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);
const LOCK_POLL: Duration = Duration::from_millis(5);

/// One data directory on one machine.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) names: Names,
    pub(crate) state: State,
    /// The namespace that plays the host, that of the process unless a test says otherwise.
    pub(crate) host: NetNs,
}

/// Adds what was being done to an error of the system.
pub(crate) trait At<T> {
    /// `what` as in "network web: {what}: no such device".
    fn at(self, what: impl FnOnce() -> String) -> DriverResult<T>;
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, what: impl FnOnce() -> String) -> DriverResult<T> {
        self.map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => {
                DriverError::permanent("not_permitted", format!("{}: {e}; networks need root", what()))
            }
            _ => DriverError::io(&what(), &e),
        })
    }
}

impl<T> At<T> for Result<T, NftError> {
    fn at(self, what: impl FnOnce() -> String) -> DriverResult<T> {
        self.map_err(|e| match e {
            NftError::Run(source) if source.kind() == std::io::ErrorKind::NotFound => DriverError::permanent(
                "nft_missing",
                format!("{}: nft is not installed; install the package nftables", what()),
            ),
            NftError::Run(source) => DriverError::io(&format!("{}: running nft", what()), &source),
            NftError::Refused(_) => DriverError::permanent("nft_refused", format!("{}: {e}", what())),
        })
    }
}

impl Node {
    /// Makes the node equal to the plan.
    pub(crate) fn ensure(&self, plan: &NetworkPlan) -> DriverResult<NetworkHandle> {
        plan::check(plan)?;
        let _lock = self.lock()?;
        let what = |step: &str| format!("network {}: {step}", plan.name);
        self.state.create(plan.id)?;
        let path = self.names.network_ns(plan.id);
        fsx::create_dir_private(self.names.netns_dir(), 0o700).at(|| what("making the directory of namespaces"))?;
        let netns = NetNs::ensure(&path).at(|| what("making its namespace"))?;
        let (part, parts) = host::settle(self, plan)?;
        let mut links = Links::of(&netns).at(|| what("opening netlink"))?;
        let before = self.state.plan(plan.id)?;
        let tables = [firewall::guard_table(plan), firewall::network_table(plan, &part)];
        // The walls on the host's side and all of the inside know nothing of each other.
        let bridge = std::thread::scope(|scope| {
            let walls = scope.spawn(|| parts.map_or(Ok(()), |parts| host::apply_table(self, &parts)));
            let inside = (|| {
                let bridge = ensure_bridge(plan, &netns, &mut links).at(|| what("making the bridge"))?;
                self.state.write_netd(&NetdFile { netns: path, bridge: BRIDGE.into(), plan: plan.clone() })?;
                netns
                    .within(|| nft::apply(&tables))
                    .at(|| what("entering its namespace"))?
                    .at(|| what("setting its rules"))?;
                Ok(bridge)
            })();
            let walls = walls.join().unwrap_or_else(|_| {
                Err(DriverError::retry("panicked", "setting the rules of the host failed inside; see the log"))
            });
            walls.and(inside)
        })?;
        host::connect(self, plan, &part, &netns, &mut links)?;
        overlay::ensure(self, plan, bridge, &netns, &mut links)?;
        ports::ensure(self, plan, before.as_ref(), bridge, &netns, &mut links)?;
        Ok(ports::handle(self, Some(plan), &links.list().at(|| what("listing links"))?, &netns, part))
    }

    /// Removes everything of the network.
    pub(crate) fn remove(&self, id: NetworkId) -> DriverResult<()> {
        let _lock = self.lock()?;
        let what = |step: &str| format!("network {id}: {step}");
        self.state.begin_removal(id)?;
        let plan = self.state.plan(id)?;
        host::disconnect(self, id)?;
        let mut instances: Vec<InstanceId> = plan.iter().flat_map(plan::local).map(|p| p.instance).collect();
        let path = self.names.network_ns(id);
        if let Some(netns) = NetNs::open(&path).at(|| what("opening its namespace"))? {
            let mut links = Links::of(&netns).at(|| what("opening netlink"))?;
            for link in links.list().at(|| what("listing links"))? {
                instances.extend(PortAlias::parse(&link.alias).map(|a| a.instance));
                if names::device_kind(&link.name).is_some() || [BRIDGE, OVERLAY, UPLINK].contains(&link.name.as_str()) {
                    links.delete(&link.name).at(|| what("deleting a link"))?;
                }
            }
        }
        NetNs::remove(&path).at(|| what("removing its namespace"))?;
        instances.sort_unstable();
        instances.dedup();
        for instance in instances {
            self.release_instance(&instance.short())?;
        }
        self.state.finish_removal(id)?;
        self.tidy();
        Ok(())
    }

    /// Takes away namespaces of instances that have no port left, which only a crash at a bad moment leaves behind.
    pub(crate) fn sweep(&self) -> DriverResult<()> {
        let _lock = self.lock()?;
        let Ok(entries) = std::fs::read_dir(self.names.netns_dir()) else { return Ok(()) };
        for entry in entries.flatten() {
            if let Some(short) = entry.file_name().to_str().and_then(names::instance_of) {
                self.release_instance(short)?;
            }
        }
        Ok(())
    }

    /// Removes an instance's namespaces when no port is left in them; `short` is that of its id.
    pub(crate) fn release_instance(&self, short: &str) -> DriverResult<()> {
        let path = self.names.instance_ns(short);
        let what = || format!("releasing {}", path.display());
        if let Some(netns) = NetNs::open(&path).at(what)? {
            let links = Links::of(&netns).at(what)?.list().at(what)?;
            if links.iter().any(|l| l.name.starts_with("eth")) {
                return Ok(());
            }
        }
        NetNs::remove(&path).at(what)?;
        NetNs::remove(&self.names.user_ns(short)).at(what)
    }

    /// Empty directories of ours go, so that a removed cloud leaves nothing; failure means that they are in use.
    fn tidy(&self) {
        let dir = self.names.netns_dir();
        if std::fs::remove_dir(dir).is_ok()
            && let Some(parent) = dir.parent()
        {
            let _ = std::fs::remove_dir(parent);
        }
    }

    /// Only one `ensure` or `remove` at a time, also across processes.
    fn lock(&self) -> DriverResult<Flock<File>> {
        let what = || "locking the network directory".to_string();
        fsx::create_dir_private(self.state.dir(), 0o700).at(what)?;
        let path = self.state.dir().join("driver.lock");
        let open = || OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let (mut file, end) = (open().at(what)?, Instant::now() + LOCK_TIMEOUT);
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((again, nix::Error::EWOULDBLOCK | nix::Error::EINTR)) if Instant::now() < end => file = again,
                Err((_, nix::Error::EWOULDBLOCK | nix::Error::EINTR)) => {
                    return Err(DriverError::retry("busy", "another process is changing the networks of this node"));
                }
                Err((_, e)) => return Err::<_, std::io::Error>(e.into()).at(what),
            }
            std::thread::sleep(LOCK_POLL);
        }
    }
}

/// Settings of the namespace and the bridge with its addresses. Returns the index of the bridge.
fn ensure_bridge(plan: &NetworkPlan, netns: &NetNs, links: &mut Links) -> std::io::Result<u32> {
    let ipv6 = plan::has_ipv6(plan);
    netns.within(|| namespace_settings(ipv6))??;
    let mtu = u32::from(plan.mtu);
    let alias = names::bridge_alias(plan.id);
    let found = links.find(BRIDGE)?;
    let link = match found {
        Some(link) => link,
        None => {
            links.add_bridge(BRIDGE, names::bridge_mac(plan.id))?;
            links.find(BRIDGE)?.ok_or_else(|| std::io::Error::other("the bridge vanished"))?
        }
    };
    if !(link.up && link.mtu == mtu && link.alias == alias) {
        // The loopback interface is always the first of a namespace.
        links.change(1, &Change { up: true, ..Change::default() })?;
        netns.within(|| {
            sysctl::set_if_known(&format!("ipv6/conf/{BRIDGE}/disable_ipv6"), if ipv6 { "0" } else { "1" })
        })??;
        links.change(link.index, &Change { mtu: Some(mtu), alias: Some(&alias), up: true, ..Change::default() })?;
    }
    if ipv6 {
        netns.within(|| sysctl::set_if_known(&format!("ipv6/conf/{BRIDGE}/disable_ipv6"), "0"))??;
    }
    let mut addresses: Vec<_> = plan.subnets.iter().map(|s| (s.gateway, s.cidr.prefix_len())).collect();
    addresses.push((plan::METADATA.into(), 32));
    links.set_addresses(link.index, &addresses)?;
    Ok(link.index)
}

fn namespace_settings(ipv6: bool) -> std::io::Result<()> {
    if sysctl::get("bridge/bridge-nf-call-iptables").is_none() {
        load_br_netfilter();
    }
    // Without it the rules of security groups would not see traffic between guests of one bridge, so failing is right.
    sysctl::set("bridge/bridge-nf-call-iptables", "1")?;
    sysctl::set("bridge/bridge-nf-call-ip6tables", "1")?;
    sysctl::set("bridge/bridge-nf-call-arptables", "0")?;
    sysctl::set("ipv4/ip_forward", "1")?;
    for (name, value) in [("send_redirects", "0"), ("accept_redirects", "0"), ("rp_filter", "0")] {
        sysctl::set(&format!("ipv4/conf/all/{name}"), value)?;
        sysctl::set(&format!("ipv4/conf/default/{name}"), value)?;
    }
    // A machine that comes from another node brings its connections along; see `PortPlan::midstream`.
    sysctl::set_if_known("netfilter/nf_conntrack_tcp_loose", "1")?;
    // The bridge answers for its own addresses only, never for the uplink's.
    sysctl::set("ipv4/conf/all/arp_ignore", "1")?;
    sysctl::set("ipv4/conf/all/arp_announce", "2")?;
    sysctl::set("ipv4/conf/all/promote_secondaries", "1")?;
    // Ports of the bridge need no addresses of their own; the bridge and the uplink get IPv6 by name where it is wanted.
    sysctl::set_if_known("ipv6/conf/default/disable_ipv6", "1")?;
    sysctl::set_if_known("ipv6/conf/default/accept_ra", "0")?;
    sysctl::set_if_known("ipv6/conf/all/accept_ra", "0")?;
    if ipv6 {
        sysctl::set("ipv6/conf/all/forwarding", "1")?;
    }
    Ok(())
}

fn load_br_netfilter() {
    let result = std::process::Command::new("modprobe").arg("br_netfilter").output();
    if !result.is_ok_and(|out| out.status.success()) {
        tracing::warn!("the kernel has no br_netfilter and modprobe could not load it");
    }
}

/// The name of a link's bridge is known by index only.
pub(crate) fn is_in(link: &Link, bridge: u32) -> bool {
    link.master == bridge
}

/// Addresses of a network's uplink on the network's side.
pub(crate) fn uplink_addresses(part: &HostPart, pair: u32) -> Vec<(std::net::IpAddr, u8)> {
    let mut all = vec![(uplink::network4(pair).into(), uplink::PREFIX)];
    if part.ipv6 {
        all.push((uplink::network6(pair).into(), uplink::PREFIX6));
    }
    all
}
