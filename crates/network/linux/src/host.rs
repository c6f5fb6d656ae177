//! What networks take from the host: a pair of uplink addresses, published ports, our table, the veth.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};

use ipnet::IpNet;
use oblak_model::NetworkId;
use oblak_network::{NetworkPlan, Protocol, PublishPlan};
use oblak_platform::driver::DriverResult;

use crate::firewall::{Tunnel, Uplink, host_table};
use crate::names::{self, UPLINK};
use crate::node::{At, Node, uplink_addresses};
use crate::publish::{self, Known};
use crate::state::HostPart;
use crate::sys::link::{Change, Links, Peer};
use crate::sys::netns::NetNs;
use crate::sys::{nft, sysctl};
use crate::{overlay, plan, uplink};

/// What each network has of the host.
pub(crate) type Parts = Vec<(NetworkId, HostPart)>;

/// Decides what the network gets and writes it down. Returns what all networks have now, when our table has to be made to fit it
/// ([`apply_table`]). The uplink itself comes later, behind these walls.
pub(crate) fn settle(node: &Node, plan: &NetworkPlan) -> DriverResult<(HostPart, Option<Parts>)> {
    let mut parts: Parts = node.state.hosts()?.into_iter().collect();
    let before = parts.iter().position(|(id, _)| *id == plan.id).map(|at| parts.remove(at).1);
    let mut part = decide(node, plan, before.as_ref(), &parts)?;
    part.overlay = overlay::part(plan);
    if before.is_none() && part == HostPart::default() {
        return Ok((part, None));
    }
    node.state.write_host(plan.id, &part)?;
    parts.push((plan.id, part.clone()));
    Ok((part, Some(parts)))
}

fn decide(
    node: &Node,
    plan: &NetworkPlan,
    before: Option<&HostPart>,
    others: &[(NetworkId, HostPart)],
) -> DriverResult<HostPart> {
    if !plan::needs_uplink(plan) {
        return Ok(HostPart::default());
    }
    let what = || format!("network {}: choosing uplink addresses", plan.name);
    let subnets: Vec<IpNet> = plan.subnets.iter().map(|s| s.cidr).collect();
    let kept = before.and_then(|b| b.uplink).filter(|pair| !uplink::overlaps(*pair, &subnets));
    let pair = match kept {
        Some(pair) => pair,
        None => {
            let taken: Vec<u32> = others.iter().filter_map(|(_, part)| part.uplink).collect();
            let mut links = Links::of(&node.host).at(what)?;
            let used = links.addresses().at(what)?.into_iter().map(|a| (a.ip, a.prefix));
            let routed = links.routes().at(what)?;
            let busy = uplink::busy(used.chain(routed));
            uplink::choose(node.names.tag(), plan.id, &taken, &busy, &subnets)?
        }
    };
    let published = plan::local(plan).any(|p| !p.publish.is_empty());
    let (grants, refused) = if published {
        let table = node.names.host_table();
        node.host
            .within(|| -> io::Result<_> {
                // Without our table (a new boot, a flushed ruleset) nothing was ours in the meantime: ask for everything again.
                let held = nft::exists("inet", &table)?;
                let before = before.filter(|_| held).map_or(&[][..], |b| &b.grants);
                Ok(publish::decide(plan, &Known { before, others }, try_bind))
            })
            .at(what)?
            .at(what)?
    } else {
        (Vec::new(), Vec::new())
    };
    let ipv6 = plan.nat && plan::has_ipv6(plan);
    Ok(HostPart { uplink: Some(pair), nat: plan.nat, ipv6, overlay: None, grants, refused })
}

/// Whether a process of the host has the address.
fn try_bind(publish: &PublishPlan) -> Result<(), String> {
    let address: SocketAddr = publish.host;
    let result = match publish.protocol {
        Protocol::Tcp => TcpListener::bind(address).map(drop),
        Protocol::Udp | Protocol::Icmp => UdpSocket::bind(address).map(drop),
    };
    result.map_err(|e| match e.kind() {
        io::ErrorKind::AddrInUse => {
            format!("{address} is in use by another process on the host; publish another port or stop that process")
        }
        io::ErrorKind::AddrNotAvailable => format!("{} is not an address of the host", address.ip()),
        _ => format!("{address} cannot be used: {e}"),
    })
}

/// Makes our table in the host's namespace fit.
pub(crate) fn apply_table(node: &Node, parts: &[(NetworkId, HostPart)]) -> DriverResult<()> {
    let what = || "setting the rules of the host".to_string();
    let mut uplinks: Vec<Uplink<'_>> = parts
        .iter()
        .filter_map(|(network, part)| Some(Uplink { network: *network, pair: part.uplink?, part }))
        .collect();
    uplinks.sort_by_key(|u| u.network);
    let mut tunnels: Vec<Tunnel<'_>> = parts
        .iter()
        .filter_map(|(_, part)| part.overlay.as_ref())
        .map(|o| Tunnel { vni: o.vni, peers: &o.peers })
        .collect();
    tunnels.sort_by_key(|t| t.vni);
    // Two networks with one number is a mistake of whoever gives numbers; the kernel refuses the second device.
    tunnels.dedup_by_key(|t| t.vni);
    let name = node.names.host_table();
    if uplinks.is_empty() && tunnels.is_empty() {
        return node.host.within(|| nft::delete("inet", &name)).at(what)?.at(what);
    }
    let (table, ipv6) = (host_table(name, &uplinks, &tunnels), uplinks.iter().any(|u| u.part.ipv6));
    node.host
        .within(|| -> DriverResult<()> {
            if !uplinks.is_empty() {
                sysctl::set("ipv4/ip_forward", "1").at(what)?;
            }
            if ipv6 {
                forward_ipv6().at(what)?;
            }
            nft::apply(std::slice::from_ref(&table)).at(what).map(drop)
        })
        .at(what)?
}

/// Forwarding makes Linux ignore router advertisements; interfaces that used them shall go on doing so (ip-sysctl.rst, accept_ra).
fn forward_ipv6() -> io::Result<()> {
    if sysctl::get("ipv6/conf/all/forwarding").as_deref() == Some("1") {
        return Ok(());
    }
    for entry in std::fs::read_dir("/proc/sys/net/ipv6/conf")?.flatten() {
        let name = format!("ipv6/conf/{}/accept_ra", entry.file_name().to_string_lossy());
        if sysctl::get(&name).as_deref() == Some("1") {
            sysctl::set(&name, "2")?;
        }
    }
    sysctl::set("ipv6/conf/all/forwarding", "1")
}

/// Makes the veth between the network and the host as `part` says, or takes it away.
pub(crate) fn connect(
    node: &Node,
    plan: &NetworkPlan,
    part: &HostPart,
    netns: &NetNs,
    inner: &mut Links,
) -> DriverResult<()> {
    let what = || format!("network {}: making the uplink", plan.name);
    let name = names::uplink(plan.id);
    let mut outer = Links::of(&node.host).at(what)?;
    let Some(pair) = part.uplink else {
        return outer.delete(&name).at(what);
    };
    let mtu = u32::from(plan.mtu);
    let (mut far, mut near) = (outer.find(&name).at(what)?, inner.find(UPLINK).at(what)?);
    if far.is_none() || near.is_none() {
        outer.delete(&name).at(what)?;
        inner.delete(UPLINK).at(what)?;
        outer.add_veth(&name, mtu, &Peer::new(UPLINK, netns, None)).at(what)?;
        (far, near) = (outer.find(&name).at(what)?, inner.find(UPLINK).at(what)?);
    }
    let (Some(far), Some(near)) = (far, near) else {
        return Err(io::Error::other("the uplink vanished")).at(what);
    };
    let mut outside: Vec<(IpAddr, u8)> = vec![(uplink::host4(pair).into(), uplink::PREFIX)];
    if part.ipv6 {
        outside.push((uplink::host6(pair).into(), uplink::PREFIX6));
    }
    let off = if part.ipv6 { "0" } else { "1" };
    let quiet = |device: &str| -> io::Result<()> {
        sysctl::set_if_known(&format!("ipv6/conf/{device}/disable_ipv6"), off)?;
        sysctl::set_if_known(&format!("ipv6/conf/{device}/accept_ra"), "0")
    };
    node.host
        .within(|| {
            sysctl::set(&format!("ipv4/conf/{name}/route_localnet"), "1")?;
            sysctl::set(&format!("ipv4/conf/{name}/send_redirects"), "0")?;
            quiet(&name)
        })
        .at(what)?
        .at(what)?;
    netns.within(|| quiet(UPLINK)).at(what)?.at(what)?;
    if !(far.up && far.mtu == mtu) {
        outer.change(far.index, &Change { mtu: Some(mtu), up: true, ..Change::default() }).at(what)?;
    }
    outer.set_addresses(far.index, &outside).at(what)?;
    if !(near.up && near.mtu == mtu) {
        inner.change(near.index, &Change { mtu: Some(mtu), up: true, ..Change::default() }).at(what)?;
    }
    // Asking makes the kernel act on the carrier now, not up to a second later.
    outer.find(&name).at(what)?;
    inner.find(UPLINK).at(what)?;
    inner.set_addresses(near.index, &uplink_addresses(part, pair)).at(what)?;
    inner.set_default_route(near.index, uplink::host4(pair).into()).at(what)?;
    if part.ipv6 {
        inner.set_default_route(near.index, uplink::host6(pair).into()).at(what)?;
    }
    Ok(())
}

/// Gives back everything the network had of the host.
pub(crate) fn disconnect(node: &Node, id: NetworkId) -> DriverResult<()> {
    let what = || format!("network {id}: removing the uplink");
    Links::of(&node.host).at(what)?.delete(&names::uplink(id)).at(what)?;
    node.state.remove_host(id)?;
    let parts: Parts = node.state.hosts()?.into_iter().collect();
    apply_table(node, &parts)
}
