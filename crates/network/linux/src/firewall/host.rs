//! Our one table in the host's namespace: masquerading, published ports, and walls between networks and the host.

use std::net::IpAddr;

use oblak_model::NetworkId;
use oblak_network::Protocol;

use super::{chain, named, set};
use crate::names;
use crate::overlay::PORT;
use crate::state::HostPart;
use crate::sys::nft::Table;
use crate::uplink;

/// One network's way to the host.
pub(crate) struct Uplink<'a> {
    pub(crate) network: NetworkId,
    pub(crate) pair: u32,
    pub(crate) part: &'a HostPart,
}

/// One network's way to other nodes.
pub(crate) struct Tunnel<'a> {
    pub(crate) vni: u32,
    pub(crate) peers: &'a [IpAddr],
}

/// The table for all uplinks and tunnels.
pub(crate) fn host_table(name: String, uplinks: &[Uplink<'_>], tunnels: &[Tunnel<'_>]) -> Table {
    let mut body =
        named("set", "uplinks", "ifname", uplinks.iter().map(|u| format!("\"{}\"", names::uplink(u.network))));
    let nat = || uplinks.iter().filter(|u| u.part.nat);
    body += &named("set", "inside4", "ipv4_addr", nat().map(|u| uplink::network4(u.pair)));
    let six = nat().filter(|u| u.part.ipv6).map(|u| uplink::network6(u.pair));
    body += &named("set", "inside6", "ipv6_addr", six);
    body += &chain("publish", "", &publish(uplinks));
    // route_localnet is on for answers to the host's own loopback; nothing else may use it.
    let raw = "iifname @uplinks ip daddr 127.0.0.0/8 drop\n";
    body += &chain("martians", "filter hook prerouting priority -300; policy accept", raw);
    body += &chain("arriving", "nat hook prerouting priority -100; policy accept", "jump publish\n");
    body += &chain("own", "nat hook output priority -100; policy accept", "jump publish\n");
    body += &chain("leaving", "nat hook postrouting priority 100; policy accept", &leaving());
    body += &chain("forward", "filter hook forward priority 0; policy accept", &forward());
    body += &chain("input", "filter hook input priority 0; policy accept", &input());
    body += &underlay(tunnels);
    Table { family: "inet", name, body }
}

/// What comes in for one of our networks must come from a node that has ports of it. Tunnels of others are none of our business, so the
/// network's number is looked at: 24 bits behind the UDP header and the flags (RFC 7348, section 5).
fn underlay(tunnels: &[Tunnel<'_>]) -> String {
    let mut text = String::new();
    if tunnels.is_empty() {
        return text;
    }
    for tunnel in tunnels {
        let mut lines = String::new();
        for (side, v4) in [("ip saddr", true), ("ip6 saddr", false)] {
            let peers: Vec<_> = tunnel.peers.iter().filter(|p| p.is_ipv4() == v4).collect();
            if !peers.is_empty() {
                lines += &format!("{side} {} accept\n", set(peers));
            }
        }
        text += &chain(&format!("vni_{}", tunnel.vni), "", &(lines + "counter drop\n"));
    }
    let to = tunnels.iter().map(|t| format!("{:#08x} : goto vni_{}", t.vni, t.vni));
    let line = format!("udp dport {PORT} fib daddr type local @th,96,24 vmap {}\n", set(to));
    text + &chain("underlay", "filter hook prerouting priority -310; policy accept", &line)
}

fn publish(uplinks: &[Uplink<'_>]) -> String {
    let mut lines = String::new();
    for (name, protocol) in [("tcp", Protocol::Tcp), ("udp", Protocol::Udp)] {
        let (mut exact, mut any) = (Vec::new(), Vec::new());
        for uplink in uplinks {
            let to = uplink::network4(uplink.pair);
            for grant in uplink.part.grants.iter().filter(|g| g.protocol == protocol) {
                let target = format!("{to} . {}", grant.uplink_port);
                if grant.host.ip().is_unspecified() {
                    any.push(format!("{} : {target}", grant.host.port()));
                } else {
                    exact.push(format!("{} . {} : {target}", grant.host.ip(), grant.host.port()));
                }
            }
        }
        if !exact.is_empty() {
            lines += &format!("dnat ip to ip daddr . {name} dport map {}\n", set(exact));
        }
        if !any.is_empty() {
            lines += &format!("fib daddr type local dnat ip to {name} dport map {}\n", set(any));
        }
    }
    lines
}

fn leaving() -> String {
    let mut lines = "oifname @uplinks ip saddr 127.0.0.0/8 masquerade\n".to_string();
    // A guest that uses a published port of its own network would otherwise be answered past the host.
    lines += &format!("oifname @uplinks ip saddr {} masquerade\n", uplink::pool());
    lines + "ip saddr @inside4 oifname != @uplinks masquerade\nip6 saddr @inside6 oifname != @uplinks masquerade\n"
}

fn forward() -> String {
    let mut lines = "iifname != @uplinks oifname != @uplinks accept\n".to_string();
    lines += "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu\n";
    lines += "ct state vmap { established : accept, related : accept, invalid : drop }\n";
    lines += "ct status dnat accept\n";
    lines += "oifname @uplinks drop\n";
    lines + &format!("oifname \"ou*\" drop\nip daddr {} drop\n", uplink::pool())
}

fn input() -> String {
    "iifname != @uplinks accept\nct state vmap { established : accept, related : accept }\n".to_string()
        + "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept\ndrop\n"
}
