//! The tunnel of a network: made with the first port on another node, told where every such port is, gone with the last one.
//!
//! Nothing is learned and nothing is flooded: the tunnel knows at which node each MAC is, the bridge that it is behind the tunnel, and
//! the bridge's neighbour table, from which it answers ARP and neighbour solicitations of guests, which MAC each address has.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use oblak_network::overlay::{Underlay, tunnels};
use oblak_network::{NetworkPlan, OverlayPlan};
use oblak_platform::driver::{DriverError, DriverResult};

use crate::names::OVERLAY;
use crate::node::{At, Node, is_in};
use crate::plan;
use crate::state::OverlayPart;
use crate::sys::arp;
use crate::sys::link::{Change, Link, Links, Mac};
use crate::sys::netns::NetNs;
use crate::sys::tunnel::Tunnel;

/// UDP port of VXLAN (RFC 7348, section 4.1).
pub(crate) const PORT: u16 = 4789;

/// What the network takes from the underlay; `None` without ports on other nodes.
pub(crate) fn part(plan: &NetworkPlan) -> Option<OverlayPart> {
    let peers: BTreeSet<IpAddr> = tunnels(plan).map(|(_, far)| far).collect();
    plan.overlay.filter(|_| !peers.is_empty()).map(|o| OverlayPart { vni: o.vni, peers: peers.into_iter().collect() })
}

/// Makes the tunnel and everything that is told to it and to the bridge equal to the plan.
pub(crate) fn ensure(
    node: &Node,
    plan: &NetworkPlan,
    bridge: u32,
    netns: &NetNs,
    links: &mut Links,
) -> DriverResult<()> {
    let what = |step: &str| format!("network {}: {step}", plan.name);
    match plan.overlay.filter(|_| tunnels(plan).next().is_some()) {
        Some(overlay) => {
            let tunnel = device(node, plan, overlay, bridge, netns, links)?;
            stations(plan, tunnel, links).at(|| what("telling its tunnel where stations are"))?;
        }
        None => links.delete(OVERLAY).at(|| what("removing its tunnel"))?,
    }
    let fresh = neighbours(plan, bridge, links).at(|| what("telling the bridge its neighbours"))?;
    if fresh.is_empty() {
        return Ok(());
    }
    // Guests here may remember who had the address before. The tunnel is never flooded, so this stays on the node.
    netns.within(|| arp::announce(bridge, &fresh)).and_then(|r| r).at(|| what("announcing ports elsewhere"))
}

/// The device, in the bridge and up. Returns its index.
fn device(
    node: &Node,
    plan: &NetworkPlan,
    overlay: OverlayPlan,
    bridge: u32,
    netns: &NetNs,
    links: &mut Links,
) -> DriverResult<u32> {
    let what = || format!("network {}: making its tunnel", plan.name);
    let (mtu, alias) = (u32::from(plan.mtu), format!("oblak {} {}", overlay.vni, overlay.local));
    let finished = |l: &Link| l.up && is_in(l, bridge) && l.alias == alias;
    if let Some(link) = links.find(OVERLAY).at(what)?.filter(finished) {
        if link.mtu != mtu {
            links.change(link.index, &Change { mtu: Some(mtu), ..Change::default() }).at(what)?;
        }
        return Ok(link.index);
    }
    links.delete(OVERLAY).at(what)?;
    let tunnel = Tunnel { name: OVERLAY, vni: overlay.vni, local: overlay.local, port: PORT, mtu };
    let mut host = Links::of(&node.host).at(what)?;
    match host.add_tunnel(&tunnel, netns) {
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
            let vni = overlay.vni;
            return Err(DriverError::retry(
                "vni_taken",
                format!("{}: this host already has a tunnel with vni {vni}", what()),
            ));
        }
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            return Err(DriverError::unsupported(format!(
                "{}: the kernel has no vxlan; load the module vxlan",
                what()
            )));
        }
        made => made.at(what)?,
    }
    let made = links.find(OVERLAY).at(what)?;
    let link = made.ok_or_else(|| io::Error::other("the tunnel vanished")).at(what)?;
    links.change(link.index, &Change { master: Some(bridge), mtu: Some(mtu), ..Change::default() }).at(what)?;
    links.pin_tunnel(link.index).at(what)?;
    match links.change(link.index, &Change { up: true, ..Change::default() }) {
        Err(e) if e.raw_os_error() == Some(libc::EADDRINUSE) => {
            let detail = format!("{}: UDP port {PORT} of the host is used by another program; stop it", what());
            return Err(DriverError::retry("underlay_port_taken", detail));
        }
        up => up.at(what)?,
    }
    // Asking makes the kernel act on the carrier now, not up to a second later.
    links.find(OVERLAY).at(what)?;
    links.change(link.index, &Change { alias: Some(&alias), ..Change::default() }).at(what)?;
    Ok(link.index)
}

/// Who is behind the tunnel, and at which node. The difference to what the kernel knows is settled, so a change costs what it changes.
fn stations(plan: &NetworkPlan, tunnel: u32, links: &mut Links) -> io::Result<()> {
    let wanted: BTreeMap<Mac, IpAddr> = tunnels(plan).map(|(port, far)| (plan::mac(port), far)).collect();
    let (mut bridge, mut far): (BTreeSet<Mac>, BTreeMap<Mac, IpAddr>) = Default::default();
    for known in links.behind(tunnel)? {
        match known.far {
            Some(end) => drop(far.insert(known.mac, end)),
            None => drop(bridge.insert(known.mac)),
        }
    }
    for mac in far.keys().filter(|mac| !wanted.contains_key(*mac)) {
        links.unset_far(tunnel, *mac)?;
    }
    for mac in bridge.iter().filter(|mac| !wanted.contains_key(*mac)) {
        links.unset_station(tunnel, *mac)?;
    }
    for (mac, end) in &wanted {
        if far.get(mac) != Some(end) {
            links.set_far(tunnel, *mac, *end)?;
        }
        if !bridge.contains(mac) {
            links.set_station(tunnel, *mac)?;
        }
    }
    Ok(())
}

/// Which MAC each address elsewhere has. Returns the IPv4 addresses that are new or have another one than before.
fn neighbours(plan: &NetworkPlan, bridge: u32, links: &mut Links) -> io::Result<Vec<(Mac, std::net::Ipv4Addr)>> {
    let wanted: BTreeMap<IpAddr, Mac> =
        tunnels(plan).flat_map(|(port, _)| port.addresses.iter().map(|a| (*a, plan::mac(port)))).collect();
    let known: BTreeMap<IpAddr, Mac> = links.fixed_neighbours(bridge)?.into_iter().collect();
    for ip in known.keys().filter(|ip| !wanted.contains_key(*ip)) {
        links.forget_neighbour(bridge, *ip)?;
    }
    let mut fresh = Vec::new();
    for (ip, mac) in wanted.iter().filter(|(ip, mac)| known.get(*ip) != Some(*mac)) {
        links.fix_neighbour(bridge, *ip, *mac)?;
        if let IpAddr::V4(ip) = ip {
            fresh.push((*mac, *ip));
        }
    }
    Ok(fresh)
}

/// Whether tunnels can begin at an address of the host.
pub(crate) fn underlay(node: &Node, address: IpAddr) -> DriverResult<Underlay> {
    let what = || format!("looking for the underlay address {address}");
    let vxlan = crate::probe::vxlan();
    if !vxlan.available {
        return Err(DriverError::unsupported(format!("networks stay on this node: {}", vxlan.detail)));
    }
    let mut links = Links::of(&node.host).at(what)?;
    let index = links.addresses().at(what)?.into_iter().find(|a| a.ip == address).map(|a| a.index);
    let link = links.list().at(what)?.into_iter().find(|l| Some(l.index) == index && l.up);
    let Some(link) = link else {
        let detail =
            format!("no interface of this node that is up has the underlay address {address}; name another one");
        return Err(DriverError::permanent("underlay_missing", detail));
    };
    Ok(Underlay { address, mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX) })
}
