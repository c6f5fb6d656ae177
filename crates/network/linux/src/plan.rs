//! Questions about a plan, and whether it can be carried out at all.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use oblak_network::overlay::{self, tunnels};
use oblak_network::{NetworkPlan, PortKind, PortPlan, SubnetPlan};
use oblak_platform::driver::{DriverError, DriverResult};

use crate::names;
use crate::sys::link::Mac;

/// The smallest MTU every IPv4 link must carry (RFC 791).
const MIN_MTU: u16 = 68;
/// Interfaces one instance can have; keeps names short and loops limited.
const MAX_INDEX: u32 = 63;

/// The address of the metadata service.
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Refuses plans that cannot be carried out, or would let two ports pass for one another.
pub(crate) fn check(plan: &NetworkPlan) -> DriverResult<()> {
    let bad = |detail: String| Err(DriverError::permanent("plan_invalid", format!("network {}: {detail}", plan.name)));
    if plan.mtu < MIN_MTU {
        return bad(format!("mtu {} is below {MIN_MTU}", plan.mtu));
    }
    for subnet in &plan.subnets {
        if !subnet.cidr.contains(&subnet.gateway) {
            return bad(format!("gateway {} is outside of its subnet {}", subnet.gateway, subnet.cidr));
        }
    }
    overlay::check(plan)?;
    let (mut macs, mut addresses, mut short) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for port in &plan.ports {
        let Some(mac) = names::parse_mac(&port.mac) else {
            return bad(format!("port {}: mac `{}` is not of the form aa:bb:cc:dd:ee:ff", port.id, port.mac));
        };
        if mac[0] & 1 == 1 || mac == [0; 6] {
            return bad(format!("port {}: mac {} does not name one station", port.id, port.mac));
        }
        if !macs.insert(mac) || !short.insert(port.id.short()) {
            return bad(format!("port {}: its mac or id is used twice", port.id));
        }
        if port.index > MAX_INDEX {
            return bad(format!("port {}: interface index {} is above {MAX_INDEX}", port.id, port.index));
        }
        for address in &port.addresses {
            let Some(subnet) = subnet_of(plan, *address) else {
                return bad(format!("port {}: {address} is in no subnet of the network", port.id));
            };
            if *address == subnet.gateway || !addresses.insert(*address) {
                return bad(format!("port {}: {address} is used twice", port.id));
            }
        }
    }
    Ok(())
}

/// Ports that are plugged on this node.
pub(crate) fn local(plan: &NetworkPlan) -> impl Iterator<Item = &PortPlan> {
    plan.ports.iter().filter(|p| p.kind != PortKind::Remote)
}

/// Ports whose tap is made but not plugged.
pub(crate) fn standby(plan: &NetworkPlan) -> impl Iterator<Item = &PortPlan> {
    plan.ports.iter().filter(|p| p.kind == PortKind::Remote && p.standby)
}

/// Ports behind a tunnel to another node.
pub(crate) fn elsewhere(plan: &NetworkPlan) -> impl Iterator<Item = &PortPlan> {
    tunnels(plan).map(|(port, _)| port)
}

/// The MAC of a port of a checked plan.
pub(crate) fn mac(port: &PortPlan) -> Mac {
    names::parse_mac(&port.mac).unwrap_or_default()
}

/// The subnet an address belongs to.
pub(crate) fn subnet_of(plan: &NetworkPlan, address: IpAddr) -> Option<&SubnetPlan> {
    plan.subnets.iter().find(|s| s.cidr.contains(&address))
}

/// Whether there is an IPv6 subnet.
pub(crate) fn has_ipv6(plan: &NetworkPlan) -> bool {
    plan.subnets.iter().any(|s| s.cidr.network().is_ipv6())
}

/// Whether the network needs a way to the host.
pub(crate) fn needs_uplink(plan: &NetworkPlan) -> bool {
    plan.nat || local(plan).any(|p| !p.publish.is_empty())
}

/// IPv4 addresses of a port.
pub(crate) fn ipv4(port: &PortPlan) -> impl Iterator<Item = Ipv4Addr> {
    port.addresses.iter().filter_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None })
}

/// IPv6 addresses of a port.
pub(crate) fn ipv6(port: &PortPlan) -> impl Iterator<Item = std::net::Ipv6Addr> {
    port.addresses.iter().filter_map(|a| if let IpAddr::V6(a) = a { Some(*a) } else { None })
}

/// IPv4 subnets of a network.
pub(crate) fn ipv4_subnets(plan: &NetworkPlan) -> impl Iterator<Item = Ipv4Net> {
    plan.subnets.iter().filter_map(|s| if let IpNet::V4(net) = s.cidr { Some(net) } else { None })
}

/// Text for the resolv.conf of a port's guest: the gateways of its subnets answer DNS.
pub(crate) fn resolv_conf(plan: &NetworkPlan, port: &PortPlan) -> String {
    let gateways: BTreeSet<IpAddr> =
        port.addresses.iter().filter_map(|a| subnet_of(plan, *a)).map(|s| s.gateway).collect();
    let mut text = format!("search {}.{}.oblak.internal\n", plan.name, plan.project);
    for gateway in gateways {
        text += &format!("nameserver {gateway}\n");
    }
    text
}
