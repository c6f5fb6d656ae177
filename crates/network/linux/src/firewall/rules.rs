//! Rules of security groups as lines of nft.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use oblak_network::{Protocol, Rule};

use super::set;

/// Which end of a packet the rule's peer is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    /// For what comes in.
    Source,
    /// For what goes out.
    Destination,
}

/// One line per rule and address family, each ending with `verdict`.
pub(crate) fn rule_lines(rules: &[Rule], peer: Peer, verdict: &str) -> String {
    let side = if peer == Peer::Source { "saddr" } else { "daddr" };
    let mut text = String::new();
    for rule in rules {
        let Some(transport) = transport(rule) else { continue };
        if rule.peers.is_empty() {
            text += &format!("{transport}{verdict}\n");
            continue;
        }
        // Merged, because nft refuses sets with overlapping prefixes.
        let v4: Vec<Ipv4Net> =
            rule.peers.iter().filter_map(|p| if let IpNet::V4(p) = p { Some(*p) } else { None }).collect();
        let v6: Vec<Ipv6Net> =
            rule.peers.iter().filter_map(|p| if let IpNet::V6(p) = p { Some(*p) } else { None }).collect();
        if !v4.is_empty() {
            text += &format!("ip {side} {} {transport}{verdict}\n", set(Ipv4Net::aggregate(&v4)));
        }
        if !v6.is_empty() {
            text += &format!("ip6 {side} {} {transport}{verdict}\n", set(Ipv6Net::aggregate(&v6)));
        }
    }
    text
}

/// The match on protocol and ports with a space behind it; `None` for a rule that nothing can match.
fn transport(rule: &Rule) -> Option<String> {
    let ports = match rule.ports {
        Some((first, last)) if first > last => return None,
        Some((first, last)) if first == last => Some(first.to_string()),
        Some((first, last)) => Some(format!("{first}-{last}")),
        None => None,
    };
    Some(match (rule.protocol, ports) {
        (None, None) => String::new(),
        (None, Some(ports)) => format!("meta l4proto {{ tcp, udp }} th dport {ports} "),
        (Some(Protocol::Tcp), None) => "meta l4proto tcp ".into(),
        (Some(Protocol::Tcp), Some(ports)) => format!("tcp dport {ports} "),
        (Some(Protocol::Udp), None) => "meta l4proto udp ".into(),
        (Some(Protocol::Udp), Some(ports)) => format!("udp dport {ports} "),
        (Some(Protocol::Icmp), _) => "meta l4proto { icmp, ipv6-icmp } ".into(),
    })
}
