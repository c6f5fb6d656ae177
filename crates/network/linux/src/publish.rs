//! Which published ports are granted. Pure: whether an address of the host can be taken is asked through a function.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use oblak_model::{NetworkId, PortId};
use oblak_network::{NetworkPlan, Protocol, PublishPlan};

use crate::plan;
use crate::state::{Grant, HostPart};

/// Uplink ports for host ports that are published on several addresses start here.
const SPARE_PORTS: u16 = 20_000;

/// What other networks have, and what this one had.
pub(crate) struct Known<'a> {
    /// This network before.
    pub(crate) before: &'a [Grant],
    /// All others.
    pub(crate) others: &'a [(NetworkId, HostPart)],
}

/// Decides about all published ports of the plan. `take` tests whether the host's address is free; it is not asked about
/// those that are already ours.
pub(crate) fn decide(
    plan: &NetworkPlan,
    known: &Known<'_>,
    mut take: impl FnMut(&PublishPlan) -> Result<(), String>,
) -> (Vec<Grant>, Vec<(PortId, SocketAddr, String)>) {
    let mut wanted: Vec<(PortId, Option<IpAddr>, &PublishPlan)> = plan::local(plan)
        .flat_map(|port| port.publish.iter().map(move |p| (port.id, plan::ipv4(port).next().map(IpAddr::V4), p)))
        .collect();
    let had = |port: PortId, p: &PublishPlan| {
        known.before.iter().find(|g| g.port == port && g.host == p.host && g.protocol == p.protocol)
    };
    // Who already has it keeps it; else the older port (ids are ordered by time) wins.
    wanted.sort_by_key(|(port, _, p)| (had(*port, p).is_none(), *port, p.host, p.protocol as u8));
    let (mut grants, mut refused): (Vec<Grant>, Vec<_>) = (Vec::new(), Vec::new());
    for (port, guest, publish) in wanted {
        let verdict = reason_against(publish, guest)
            .or_else(|| conflict(publish, port, &grants, known.others))
            .map_or(Ok(()), Err)
            .and_then(|()| if had(port, publish).is_some() { Ok(()) } else { take(publish) });
        match (verdict, guest) {
            (Ok(()), Some(guest)) => {
                let before = had(port, publish).map(|g| g.uplink_port);
                let uplink_port = uplink_port(publish, before, &grants);
                let guest = SocketAddr::new(guest, publish.guest_port);
                grants.push(Grant { port, host: publish.host, protocol: publish.protocol, uplink_port, guest });
            }
            (Err(reason), _) => refused.push((port, publish.host, reason)),
            (Ok(()), None) => {}
        }
    }
    grants.sort_by_key(|g| (g.host, g.protocol as u8));
    refused.sort();
    (grants, refused)
}

fn reason_against(publish: &PublishPlan, guest: Option<IpAddr>) -> Option<String> {
    if publish.protocol == Protocol::Icmp {
        return Some("only tcp and udp ports can be published".into());
    }
    if publish.host.port() == 0 || publish.guest_port == 0 {
        return Some("port 0 cannot be published; name a port".into());
    }
    if publish.host.is_ipv6() {
        return Some("an IPv6 address of the host cannot be published; use 0.0.0.0 or an IPv4 address".into());
    }
    guest.is_none().then(|| "the guest has no IPv4 address in this network".into())
}

fn conflict(publish: &PublishPlan, port: PortId, own: &[Grant], others: &[(NetworkId, HostPart)]) -> Option<String> {
    let clash = |g: &&Grant| g.protocol == publish.protocol && meet(g.host, publish.host);
    if let Some(grant) = own.iter().find(clash) {
        let whose = if grant.port == port { "this port".into() } else { format!("port {}", grant.port) };
        return Some(format!("{} is already published by {whose} of the network", publish.host));
    }
    let (network, grant) = others.iter().find_map(|(id, part)| Some((id, part.grants.iter().find(clash)?)))?;
    Some(format!("{} is already published by port {} of network {network}", publish.host, grant.port))
}

fn meet(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}

/// A port of the uplink address that no other grant uses; the host's own number when it can be.
fn uplink_port(publish: &PublishPlan, before: Option<u16>, grants: &[Grant]) -> u16 {
    let used: BTreeSet<u16> = grants.iter().filter(|g| g.protocol == publish.protocol).map(|g| g.uplink_port).collect();
    let wish = before.into_iter().chain([publish.host.port()]);
    wish.chain(SPARE_PORTS..=u16::MAX).chain(1..SPARE_PORTS).find(|p| !used.contains(p)).unwrap_or(publish.host.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_network::{PortKind, conformance};

    fn publishing(hosts: &[&str]) -> NetworkPlan {
        let mut plan = conformance::plan("p");
        let mut port = conformance::port(&plan, PortKind::Netns, 10);
        let publish =
            |host: &&str| PublishPlan { host: host.parse().unwrap(), guest_port: 80, protocol: Protocol::Tcp };
        port.publish = hosts.iter().map(publish).collect();
        plan.ports = vec![port];
        plan
    }

    #[test]
    fn one_number_on_two_addresses_gets_two_uplink_ports_that_stay() {
        let plan = publishing(&["10.0.0.1:80", "10.0.0.2:80", "10.0.0.1:81"]);
        let nothing = Known { before: &[], others: &[] };
        let (grants, refused) = decide(&plan, &nothing, |_| Ok(()));
        assert_eq!(refused, []);
        let ports: BTreeSet<u16> = grants.iter().map(|g| g.uplink_port).collect();
        assert_eq!(ports.len(), 3);
        let plan = NetworkPlan { ports: plan.ports.clone(), ..publishing(&[]) };
        let again = decide(&plan, &Known { before: &grants, others: &[] }, |_| Err("not asked again".into()));
        assert_eq!(again, (grants, Vec::new()));
    }

    #[test]
    fn a_wildcard_meets_every_address() {
        let nothing = Known { before: &[], others: &[] };
        let (grants, refused) = decide(&publishing(&["0.0.0.0:80", "10.0.0.2:80"]), &nothing, |_| Ok(()));
        assert_eq!((grants.len(), refused.len()), (1, 1));
        let part = HostPart { grants, ..HostPart::default() };
        let others = [(uuid::Uuid::nil().into(), part)];
        let (grants, refused) =
            decide(&publishing(&["10.0.0.9:80"]), &Known { before: &[], others: &others }, |_| Ok(()));
        assert!(grants.is_empty());
        assert!(refused[0].2.contains("already published by port"), "{refused:?}");
    }
}
