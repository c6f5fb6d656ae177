//! The `bridge` table of a network: no port can pass for another.

use std::net::Ipv6Addr;

use oblak_network::overlay::tunnels;
use oblak_network::{NetworkPlan, PortPlan};

use super::{chain, named, set};
use crate::names::{self, OVERLAY};
use crate::plan;
use crate::sys::nft::Table;

const UNICAST: &str = "ether daddr & 01:00:00:00:00:00 == 00:00:00:00:00:00";
const GROUP: &str = "ether daddr & 01:00:00:00:00:00 != 00:00:00:00:00:00";

/// The table. Frames of interfaces it does not know are dropped, so a port that is plugged before its rules can do nothing.
pub(crate) fn guard_table(plan: &NetworkPlan) -> Table {
    let ports: Vec<&PortPlan> = plan::local(plan).collect();
    let device = |p: &PortPlan| names::device(p.id, p.kind);
    let mut body = String::new();
    body += &named(
        "set",
        "to4",
        "ifname . ipv4_addr",
        ports.iter().flat_map(|p| plan::ipv4(p).map(move |a| format!("\"{}\" . {a}", device(p)))),
    );
    body += &named(
        "set",
        "to6",
        "ifname . ipv6_addr",
        ports.iter().flat_map(|p| plan::ipv6(p).map(move |a| format!("\"{}\" . {a}", device(p)))),
    );
    for port in &ports {
        body += &chain(&format!("from_{}", port.id.short()), "", &from_port(plan, port));
    }
    let overlay = tunnels(plan).next().is_some();
    let mut sources = String::new();
    let mut jumps: Vec<String> =
        ports.iter().map(|p| format!("\"{}\" : goto from_{}", device(p), p.id.short())).collect();
    if overlay {
        body += &elsewhere(plan, &ports);
        jumps.push(format!("\"{OVERLAY}\" : goto from_tunnel"));
    }
    if !jumps.is_empty() {
        sources = format!("iifname vmap {}\n", set(jumps));
    }
    body += &chain("prerouting", "filter hook prerouting priority -300; policy drop", &sources);
    body += &chain(
        "forward",
        "filter hook forward priority -200; policy accept",
        &(to_tunnel(overlay) + &forward(plan, &ports)),
    );
    Table { family: "bridge", name: names::TABLE.into(), body }
}

/// What is known of ports on other nodes, and what may come from them and go to them. Their node has let out only what is theirs; this
/// side does not rely on it, so what somebody slips into the underlay can only be in the name of a port that is elsewhere.
fn elsewhere(plan: &NetworkPlan, local: &[&PortPlan]) -> String {
    let there = || plan::elsewhere(plan).map(|p| (p, names::mac_text(plan::mac(p))));
    let mut text = named("set", "here", "ether_addr", local.iter().map(|p| names::mac_text(plan::mac(p))));
    text += &named("set", "there", "ether_addr", there().map(|(_, mac)| mac));
    let pairs = there().flat_map(|(p, mac)| plan::ipv4(p).map(move |a| format!("{mac} . {a}")));
    text += &named("set", "there4", "ether_addr . ipv4_addr", pairs);
    let pairs = there().flat_map(|(p, mac)| plan::ipv6(p).map(move |a| format!("{mac} . {a}")));
    text += &named("set", "there6", "ether_addr . ipv6_addr", pairs);
    text += &named("set", "routed4", "ipv4_addr", plan::elsewhere(plan).flat_map(plan::ipv4));
    text += &named("set", "routed6", "ipv6_addr", plan::elsewhere(plan).flat_map(plan::ipv6));
    text += &chain("from_tunnel", "", &from_tunnel(plan));
    let neighbours = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }";
    let mut lines = format!("{GROUP} drop\nether type arp accept\n");
    lines += "ether type ip ether daddr . ip daddr @there4 accept\n";
    lines += "ether type ip6 ether daddr . ip6 daddr @there6 accept\n";
    lines += &format!("ether type ip6 ether daddr @there ip6 daddr fe80::/10 {neighbours} accept\ndrop\n");
    text + &chain("to_tunnel", "", &lines)
}

/// Frames for stations of this node only: nothing for groups, and nothing for the gateway, which every node has for itself.
fn from_tunnel(plan: &NetworkPlan) -> String {
    let mut lines = "ether daddr != @here drop\n".to_string();
    lines += "ether type arp ether saddr . arp saddr ip @there4 arp saddr ether . arp saddr ip @there4 accept\n";
    lines += "ether type arp drop\nether type ip ether saddr . ip saddr @there4 accept\n";
    let gateway = names::mac_text(names::bridge_mac(plan.id));
    // What the gateway of the sender's node has routed from another subnet carries the gateway's MAC.
    lines += &format!("ether type ip ether saddr {gateway} ip saddr @routed4 accept\n");
    let link_local = format!("{:#034x}", link_local(names::bridge_mac(plan.id)).to_bits());
    lines += &format!("ether type ip6 icmpv6 type nd-neighbor-advert @th,64,128 {link_local} drop\n");
    lines += "ether type ip6 icmpv6 type { nd-router-advert, nd-redirect } drop\n";
    lines += "ether type ip6 ether saddr . ip6 saddr @there6 accept\n";
    lines += &format!("ether type ip6 ether saddr {gateway} ip6 saddr @routed6 accept\n");
    let neighbours = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }";
    lines + &format!("ether type ip6 ether saddr @there ip6 saddr fe80::/10 {neighbours} accept\ndrop\n")
}

fn to_tunnel(overlay: bool) -> String {
    if overlay { format!("oifname \"{OVERLAY}\" goto to_tunnel\n") } else { String::new() }
}

/// What a port may send: its own MAC with its own addresses, asking for an address, finding its neighbours.
fn from_port(plan: &NetworkPlan, port: &PortPlan) -> String {
    let mac = names::mac_text(plan::mac(port));
    let v4: Vec<_> = plan::ipv4(port).collect();
    let v6: Vec<_> = plan::ipv6(port).collect();
    let mut lines = format!("ether saddr != {mac} drop\n");
    // 0.0.0.0 is the sender of an address probe (RFC 5227).
    let senders = v4.iter().map(ToString::to_string).chain(["0.0.0.0".to_string()]);
    lines += &format!("ether type arp arp saddr ether {mac} arp saddr ip {} accept\n", set(senders));
    lines += "ether type arp drop\n";
    // Answers of a DHCP server come from the gateway alone.
    lines += "ether type ip udp sport 67 udp dport 68 drop\n";
    lines += "ether type ip ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept\n";
    if !v4.is_empty() {
        lines += &format!("ether type ip ip saddr {} accept\n", set(v4));
    }
    if !v6.is_empty() {
        lines += &from_port_v6(plan, &v6);
    }
    lines + "drop\n"
}

fn from_port_v6(plan: &NetworkPlan, own: &[Ipv6Addr]) -> String {
    let gateway = link_local(names::bridge_mac(plan.id));
    let mut lines = format!("ether type ip6 ip6 saddr {gateway} drop\n");
    lines += "ether type ip6 icmpv6 type { nd-router-advert, nd-redirect } drop\n";
    lines += "ether type ip6 udp sport 547 udp dport 546 drop\n";
    // The target of an advertisement lies 8 bytes into the message (RFC 4861); this nft has no name for it.
    let targets = set(own.iter().map(|a| format!("{:#034x}", a.to_bits())));
    let foreign = format!("@th,64,16 != {:#x} @th,64,128 != {targets}", 0xfe80_u16);
    lines += &format!("ether type ip6 icmpv6 type nd-neighbor-advert {foreign} drop\n");
    lines += &format!("ether type ip6 icmpv6 type nd-neighbor-advert @th,64,128 {:#034x} drop\n", gateway.to_bits());
    lines += "ether type ip6 ip6 saddr :: icmpv6 type { nd-neighbor-solicit, mld2-listener-report } accept\n";
    lines + &format!("ether type ip6 ip6 saddr {} accept\nether type ip6 ip6 saddr fe80::/10 accept\n", set(own))
}

/// Between ports: a frame reaches a port only with an address of that port (or of a group), and carries a mark that names the
/// port to the stateful rules.
fn forward(plan: &NetworkPlan, ports: &[&PortPlan]) -> String {
    let groups = plan::ipv4_subnets(plan).map(|n| n.broadcast()).map(|a| a.to_string());
    let groups = set(["224.0.0.0/4".to_string(), "255.255.255.255".into()].into_iter().chain(groups));
    let mut lines = format!("ether type ip {UNICAST} oifname . ip daddr != @to4 drop\n");
    lines += &format!("ether type ip {GROUP} ip daddr != {groups} drop\n");
    lines += &format!("ether type ip6 {UNICAST} ip6 daddr != fe80::/10 oifname . ip6 daddr != @to6 drop\n");
    lines += &format!("ether type ip6 {GROUP} ip6 daddr != ff00::/8 drop\n");
    if !ports.is_empty() {
        let marks = super::network::marks(plan);
        let items = ports.iter().map(|p| format!("\"{}\" : {:#010x}", names::device(p.id, p.kind), marks[&p.id]));
        lines += &format!("meta mark set oifname map {}\n", set(items));
    }
    lines
}

/// The link-local address the kernel gives an interface with this MAC (RFC 4291, appendix A).
fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let word = |a: u8, b: u8| u16::from_be_bytes([a, b]);
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::new(0xfe80, 0, 0, 0, word(a ^ 0x02, b), word(c, 0xff), word(0xfe, d), word(e, f))
}
