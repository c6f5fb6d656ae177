//! Ports of a network: taps, interfaces inside instances, and what is known of them.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use oblak_model::InstanceId;
use oblak_network::{NetworkHandle, NetworkPlan, PortHandle, PortKind, PortPlan};
use oblak_platform::driver::DriverResult;
use sha2::{Digest, Sha256};

use crate::names::{self, BRIDGE, PortAlias};
use crate::node::{At, Node, is_in};
use crate::plan;
use crate::state::HostPart;
use crate::sys::link::{Change, Link, Links, Peer};
use crate::sys::netns::NetNs;
use crate::sys::{arp, sysctl, tap, userns};

/// Makes the ports of the namespace equal to the plan.
pub(crate) fn ensure(
    node: &Node,
    plan: &NetworkPlan,
    before: Option<&NetworkPlan>,
    bridge: u32,
    netns: &NetNs,
    links: &mut Links,
) -> DriverResult<()> {
    let what = |step: &str| format!("network {}: {step}", plan.name);
    let present = links.list().at(|| what("listing links"))?;
    remove_stale(node, plan, before, &present, links)?;
    let mut fresh = Vec::new();
    for port in plan::local(plan) {
        let at = || what(&format!("plugging port {} of {}", port.id, port.hostname));
        let name = names::device(port.id, port.kind);
        let found = present.iter().find(|l| l.name == name);
        let alias = wanted_alias(plan, port);
        let finished = found.is_some_and(|l| l.up && is_in(l, bridge) && l.alias == alias.format());
        let mut inside = None;
        match port.kind {
            PortKind::Netns => inside = ensure_netns(node, plan, port, finished, links).at(at)?,
            PortKind::Tap if found.is_none() => {
                netns.within(|| tap::create_persistent(&name)).at(at)?.at(at)?;
            }
            PortKind::Tap | PortKind::Remote => {}
        }
        // A finished port whose inside had to be made anew came out of the bridge with it.
        if !(finished && inside.is_none()) {
            plug(plan, &name, &alias, bridge, links).at(at)?;
            if let Some(mut inside) = inside {
                notice(&mut inside, &names::guest_device(port.index)).at(at)?;
            }
            fresh.push(port);
        }
    }
    for port in plan::standby(plan) {
        let name = names::device(port.id, PortKind::Tap);
        if !present.iter().any(|l| l.name == name) {
            let at = || what(&format!("making port {} of {}", port.id, port.hostname));
            netns.within(|| tap::create_persistent(&name)).at(at)?.at(at)?;
        }
    }
    introduce(netns, &fresh, bridge, links).at(|| what("announcing new ports"))
}

/// Whoever had an address before is forgotten by the gateway and by the other guests.
fn introduce(netns: &NetNs, ports: &[&PortPlan], bridge: u32, links: &mut Links) -> io::Result<()> {
    for port in ports {
        for address in &port.addresses {
            links.set_neighbour(bridge, *address, plan::mac(port))?;
        }
    }
    let stations: Vec<_> = ports.iter().flat_map(|p| plan::ipv4(p).map(|a| (plan::mac(p), a))).collect();
    if stations.is_empty() {
        return Ok(());
    }
    netns.within(|| arp::announce(bridge, &stations))?
}

/// Puts a device into the bridge. Its alias comes last and says that everything is done.
fn plug(plan: &NetworkPlan, name: &str, alias: &PortAlias, bridge: u32, links: &mut Links) -> io::Result<()> {
    let link = links.find(name)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
    let mtu = Some(u32::from(plan.mtu));
    links.change(link.index, &Change { master: Some(bridge), mtu, ..Change::default() })?;
    links.pin_bridge_port(link.index)?;
    if let Some(old) = PortAlias::parse(&link.alias).filter(|old| old.mac != alias.mac) {
        links.unset_station(link.index, old.mac)?;
    }
    links.set_station(link.index, alias.mac)?;
    links.change(link.index, &Change { up: true, ..Change::default() })?;
    // The port has to be active before the bridge can have a carrier.
    notice(links, name)?;
    notice(links, BRIDGE)?;
    links.change(link.index, &Change { alias: Some(&alias.format()), ..Change::default() })
}

/// The kernel acts on a new carrier up to a second later (net/core/link_watch.c), but at once when somebody asks for the link.
fn notice(links: &mut Links, name: &str) -> io::Result<()> {
    links.find(name).map(drop)
}

/// Devices of ports that are not wanted any more, or are wanted as another kind.
fn remove_stale(
    node: &Node,
    plan: &NetworkPlan,
    before: Option<&NetworkPlan>,
    present: &[Link],
    links: &mut Links,
) -> DriverResult<()> {
    let what = || format!("network {}: removing old ports", plan.name);
    let coming = plan::standby(plan).map(|p| names::device(p.id, PortKind::Tap));
    let wanted: BTreeSet<String> = plan::local(plan).map(|p| names::device(p.id, p.kind)).chain(coming).collect();
    let in_netns: BTreeSet<InstanceId> =
        plan::local(plan).filter(|p| p.kind == PortKind::Netns).map(|p| p.instance).collect();
    let mut left: BTreeSet<InstanceId> = BTreeSet::new();
    for link in present {
        if names::device_kind(&link.name).is_some() && !wanted.contains(&link.name) {
            links.delete(&link.name).at(what)?;
            left.extend(PortAlias::parse(&link.alias).map(|a| a.instance));
        }
    }
    let known = before.into_iter().flat_map(plan::local).filter(|p| p.kind == PortKind::Netns);
    left.extend(known.map(|p| p.instance));
    for instance in left.difference(&in_netns) {
        node.release_instance(&instance.short())?;
    }
    Ok(())
}

/// The interface inside the instance's namespace. When `finished` it is enough that it is still there, else the links of the
/// namespace are returned.
fn ensure_netns(
    node: &Node,
    plan: &NetworkPlan,
    port: &PortPlan,
    finished: bool,
    links: &mut Links,
) -> io::Result<Option<Links>> {
    let short = port.instance.short();
    let path = node.names.instance_ns(&short);
    let there = NetNs::open(&path)?;
    if finished && there.is_some() {
        return Ok(None);
    }
    let netns = match there {
        Some(netns) => netns,
        None => match port.userns {
            Some(base) => owned(&path, &node.names.user_ns(&short), base)?,
            None => NetNs::ensure(&path)?,
        },
    };
    let (device, inner_name) = (names::device(port.id, port.kind), names::guest_device(port.index));
    let (mac, mtu) = (plan::mac(port), u32::from(plan.mtu));
    let owner = format!("oblak {}", port.id);
    let mut inner = Links::of(&netns)?;
    let same = inner.find(&inner_name)?.is_some_and(|l| l.alias == owner && l.mac == Some(mac));
    if !(same && links.find(&device)?.is_some()) {
        links.delete(&device)?;
        inner.delete(&inner_name)?;
        links.add_veth(&device, mtu, &Peer::new(&inner_name, &netns, Some(mac)))?;
    }
    netns.within(|| instance_settings(&inner_name, plan::ipv6(port).next().is_some()))??;
    let link = inner.find(&inner_name)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
    // The loopback interface is always the first of a namespace.
    inner.change(1, &Change { up: true, ..Change::default() })?;
    inner.change(link.index, &Change { alias: Some(&owner), mtu: Some(mtu), up: true, ..Change::default() })?;
    let prefix =
        |a: IpAddr| plan::subnet_of(plan, a).map_or(if a.is_ipv4() { 32 } else { 128 }, |s| s.cidr.prefix_len());
    let addresses: Vec<_> = port.addresses.iter().map(|a| (*a, prefix(*a))).collect();
    inner.set_addresses(link.index, &addresses)?;
    if port.index == 0 {
        for gateway in gateways(plan, port) {
            inner.set_default_route(link.index, gateway)?;
        }
    }
    Ok(Some(inner))
}

/// A namespace that belongs to a user namespace of its own; where the kernel makes none, one of the initial user namespace.
fn owned(path: &Path, user: &Path, base: u32) -> io::Result<NetNs> {
    match NetNs::create_owned(path, user, base) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EPERM | libc::EINVAL | libc::ENOSYS)) => {
            tracing::warn!(path = %path.display(), error = %e, "no user namespace can be made; the instance cannot use raw sockets");
            NetNs::remove(user)?;
            NetNs::ensure(path)
        }
        made => made,
    }
}

/// The first gateway of each address family.
fn gateways(plan: &NetworkPlan, port: &PortPlan) -> impl Iterator<Item = IpAddr> {
    let of = |v4: bool| {
        let address = port.addresses.iter().find(|a| a.is_ipv4() == v4)?;
        plan::subnet_of(plan, *address).map(|s| s.gateway)
    };
    of(true).into_iter().chain(of(false))
}

fn instance_settings(device: &str, ipv6: bool) -> io::Result<()> {
    // What container engines set as well: unprivileged pings and low ports.
    sysctl::set("ipv4/ping_group_range", "0 2147483647")?;
    sysctl::set("ipv4/ip_unprivileged_port_start", "0")?;
    // Without it the removal of an old address takes the new one of the same subnet along.
    sysctl::set("ipv4/conf/all/promote_secondaries", "1")?;
    sysctl::set_if_known("ipv6/conf/default/accept_ra", "0")?;
    sysctl::set_if_known(&format!("ipv6/conf/{device}/accept_ra"), "0")?;
    sysctl::set_if_known(&format!("ipv6/conf/{device}/disable_ipv6"), if ipv6 { "0" } else { "1" })
}

/// The alias of the finished port; its last word changes with every setting that is applied to the device.
fn wanted_alias(plan: &NetworkPlan, port: &PortPlan) -> PortAlias {
    let mut text = format!("{} {} {:?}", plan.mtu, port.index, port.kind);
    for address in &port.addresses {
        let subnet = plan::subnet_of(plan, *address).map(|s| format!("{} {}", s.cidr, s.gateway));
        text += &format!(" {address} {}", subnet.unwrap_or_default());
    }
    let settings = Sha256::digest(text.as_bytes()).iter().take(8).map(|b| format!("{b:02x}")).collect();
    PortAlias { port: port.id, instance: port.instance, mac: plan::mac(port), settings }
}

/// What exists, from the kernel's list of links. The plan only adds the text for resolv.conf.
pub(crate) fn handle(
    node: &Node,
    plan: Option<&NetworkPlan>,
    links: &[Link],
    netns: &NetNs,
    part: HostPart,
) -> NetworkHandle {
    let mut handle =
        NetworkHandle { refused: part.refused, netns: Some(netns.path().to_path_buf()), ..NetworkHandle::default() };
    for link in links.iter().filter(|l| l.up) {
        let (Some(kind), Some(alias)) = (names::device_kind(&link.name), PortAlias::parse(&link.alias)) else {
            continue;
        };
        let port = if kind == PortKind::Tap {
            PortHandle::Tap { netns: netns.path().to_path_buf(), device: link.name.clone(), vnet_hdr: true }
        } else {
            let wanted = plan.and_then(|p| Some((p, p.ports.iter().find(|q| q.id == alias.port)?)));
            let short = alias.instance.short();
            let (netns, user) = (node.names.instance_ns(&short), node.names.user_ns(&short));
            PortHandle::Netns {
                userns: userns::owns(&user, &netns).unwrap_or_default().then_some(user),
                netns,
                resolv_conf: wanted.map(|(plan, port)| plan::resolv_conf(plan, port)).unwrap_or_default(),
            }
        };
        handle.ports.insert(alias.port, port);
    }
    for port in plan.into_iter().flat_map(plan::standby) {
        let device = names::device(port.id, PortKind::Tap);
        if links.iter().any(|l| l.name == device) {
            let netns = netns.path().to_path_buf();
            handle.ports.insert(port.id, PortHandle::Tap { netns, device, vnet_hdr: true });
        }
    }
    handle
}
