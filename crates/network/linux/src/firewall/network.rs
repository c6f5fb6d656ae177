//! The `inet` table of a network: stateful security groups, NAT, and what the gateway itself answers.

use std::collections::{BTreeMap, BTreeSet};

use oblak_model::PortId;
use oblak_network::{NetworkPlan, PortPlan, Protocol};

use super::rules::{Peer, rule_lines};
use super::{chain, named, set};
use crate::names::{self, BRIDGE, UPLINK};
use crate::plan::{self, METADATA};
use crate::state::HostPart;
use crate::sys::nft::Table;
use crate::uplink;

/// TCP that opens nothing. Tracking of the connection begins in its middle (net.netfilter.nf_conntrack_tcp_loose).
const MIDSTREAM: &str = "tcp flags & syn == 0x0";
const ND: &str = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }";

/// The table of a network with what it has of the host.
pub(crate) fn network_table(plan: &NetworkPlan, host: &HostPart) -> Table {
    let ports: Vec<&PortPlan> = plan::local(plan).collect();
    let mut body = String::new();
    body += &named("set", "local4", "ipv4_addr", ports.iter().flat_map(|p| plan::ipv4(p)));
    body += &named("set", "local6", "ipv6_addr", ports.iter().flat_map(|p| plan::ipv6(p)));
    body += &named("set", "remote4", "ipv4_addr", plan::elsewhere(plan).flat_map(plan::ipv4));
    body += &named("set", "remote6", "ipv6_addr", plan::elsewhere(plan).flat_map(plan::ipv6));
    for port in &ports {
        let midstream = |verdict: &str| if port.midstream { format!("{MIDSTREAM} {verdict}\n") } else { String::new() };
        let lines = midstream("accept") + &rule_lines(&port.ingress, Peer::Source, "accept");
        body += &chain(&format!("in_{}", port.id.short()), "", &lines);
        if let Some(egress) = &port.egress {
            let lines = midstream("return") + &rule_lines(egress, Peer::Destination, "return") + "drop\n";
            body += &chain(&format!("out_{}", port.id.short()), "", &lines);
        }
    }
    body += &maps(plan, &ports);
    body += &chain("forward", "filter hook forward priority 0; policy drop", &forward(host));
    body += &chain("input", "filter hook input priority 0; policy drop", &input(plan));
    body += &nat(plan, host);
    Table { family: "inet", name: names::TABLE.into(), body }
}

/// A number per local port, carried as packet mark from the bridge to the stateful rules. It stays the same for a port as far
/// as possible, so that a packet between two rulesets is not taken for another port's.
pub(crate) fn marks(plan: &NetworkPlan) -> BTreeMap<PortId, u32> {
    let mut used = BTreeSet::from([0]);
    let mut ids: Vec<PortId> = plan::local(plan).map(|p| p.id).collect();
    ids.sort_unstable();
    ids.into_iter()
        .map(|id| {
            let tail = id.0.as_bytes();
            let mut mark = u32::from_be_bytes([tail[12], tail[13], tail[14], tail[15]]);
            while !used.insert(mark) {
                mark = mark.wrapping_add(1);
            }
            (id, mark)
        })
        .collect()
}

fn maps(plan: &NetworkPlan, ports: &[&PortPlan]) -> String {
    let marks = marks(plan);
    let enter = |p: &PortPlan| format!("goto in_{}", p.id.short());
    let limited = || ports.iter().filter(|p| p.egress.is_some());
    let leave = |p: &PortPlan| format!("jump out_{}", p.id.short());
    let mut text = String::new();
    let bridged = ports.iter().map(|p| format!("{:#010x} : {}", marks[&p.id], enter(p)));
    text += &named("map", "bridged", "mark : verdict", bridged);
    let to = ports.iter().flat_map(|p| plan::ipv4(p).map(move |a| format!("{a} : {}", enter(p))));
    text += &named("map", "to4", "ipv4_addr : verdict", to);
    let to = ports.iter().flat_map(|p| plan::ipv6(p).map(move |a| format!("{a} : {}", enter(p))));
    text += &named("map", "to6", "ipv6_addr : verdict", to);
    let from = limited().flat_map(|p| plan::ipv4(p).map(move |a| format!("{a} : {}", leave(p))));
    text += &named("map", "from4", "ipv4_addr : verdict", from);
    let from = limited().flat_map(|p| plan::ipv6(p).map(move |a| format!("{a} : {}", leave(p))));
    text + &named("map", "from6", "ipv6_addr : verdict", from)
}

fn forward(host: &HostPart) -> String {
    let mut lines = "ct state vmap { established : accept, related : accept, invalid : drop }\n".to_string();
    lines += &format!("iifname \"{BRIDGE}\" oifname \"{BRIDGE}\" {ND} accept\n");
    // The guard made sources unforgeable inside; outside nobody may claim an inside address.
    for inside in ["ip saddr @local4", "ip6 saddr @local6", "ip saddr @remote4", "ip6 saddr @remote6"] {
        lines += &format!("iifname \"{UPLINK}\" {inside} drop\n");
    }
    lines += &format!("iifname \"{UPLINK}\" ct status dnat accept\n");
    for stranger in ["ip saddr != @local4 ip saddr != @remote4", "ip6 saddr != @local6 ip6 saddr != @remote6"] {
        lines += &format!("iifname \"{BRIDGE}\" {stranger} drop\n");
    }
    lines += &format!("iifname \"{BRIDGE}\" ip saddr vmap @from4\niifname \"{BRIDGE}\" ip6 saddr vmap @from6\n");
    if host.nat && host.uplink.is_some() {
        lines += &format!("iifname \"{BRIDGE}\" oifname \"{UPLINK}\" accept\n");
    }
    lines += "meta mark vmap @bridged\nip daddr vmap @to4\nip6 daddr vmap @to6\n";
    // What goes to another node is judged there, by the groups of the port that receives it.
    lines + &format!("iifname \"{BRIDGE}\" ip daddr @remote4 accept\niifname \"{BRIDGE}\" ip6 daddr @remote6 accept\n")
}

/// The gateway answers DHCP, DNS, metadata, neighbours and pings; to guests only.
fn input(plan: &NetworkPlan) -> String {
    let mut lines =
        "iifname \"lo\" accept\nct state vmap { established : accept, related : accept, invalid : drop }\n".to_string();
    lines += &format!("{ND} accept\niifname != \"{BRIDGE}\" drop\n");
    lines += "udp dport { 67, 547 } accept\n";
    let gateways4 = plan.subnets.iter().map(|s| s.gateway).filter(std::net::IpAddr::is_ipv4).map(|a| a.to_string());
    let gateways4 = set(gateways4.chain([METADATA.to_string()]));
    lines += &format!("ip daddr {gateways4} meta l4proto {{ tcp, udp }} th dport 53 accept\n");
    lines += &format!("ip daddr {METADATA} tcp dport 80 accept\n");
    lines += &format!("ip daddr {gateways4} icmp type echo-request accept\n");
    let gateways6: Vec<_> = plan.subnets.iter().map(|s| s.gateway).filter(std::net::IpAddr::is_ipv6).collect();
    if !gateways6.is_empty() {
        let gateways6 = set(gateways6);
        lines += &format!("ip6 daddr {gateways6} meta l4proto {{ tcp, udp }} th dport 53 accept\n");
        lines += &format!("ip6 daddr {gateways6} icmpv6 type echo-request accept\n");
    }
    lines + "icmpv6 type { nd-router-solicit, mld2-listener-report } accept\n"
}

fn nat(plan: &NetworkPlan, host: &HostPart) -> String {
    let Some(pair) = host.uplink else { return String::new() };
    let mut text = String::new();
    let (own4, own6) = (uplink::network4(pair), uplink::network6(pair));
    let mut lines = String::new();
    for (name, protocol) in [("tcp", Protocol::Tcp), ("udp", Protocol::Udp)] {
        let grants = host.grants.iter().filter(|g| g.protocol == protocol);
        let items: Vec<_> =
            grants.map(|g| format!("{} : {} . {}", g.uplink_port, g.guest.ip(), g.guest.port())).collect();
        if !items.is_empty() {
            lines += &format!("iifname \"{UPLINK}\" ip daddr {own4} dnat ip to {name} dport map {}\n", set(items));
        }
    }
    text += &chain("publish", "nat hook prerouting priority -100; policy accept", &lines);
    if host.nat {
        let mut lines = String::new();
        let subnets: Vec<_> = plan::ipv4_subnets(plan).collect();
        if !subnets.is_empty() {
            lines += &format!("oifname \"{UPLINK}\" snat ip to {own4}\n");
        }
        if host.ipv6 {
            lines += &format!("oifname \"{UPLINK}\" snat ip6 to {own6}\n");
        }
        text += &chain("leave", "nat hook postrouting priority 100; policy accept", &lines);
    }
    text
}
