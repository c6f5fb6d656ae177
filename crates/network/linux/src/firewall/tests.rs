use ipnet::IpNet;
use oblak_network::{Protocol, Rule};

use super::rules::{Peer, rule_lines};

fn rule(protocol: Option<Protocol>, ports: Option<(u16, u16)>, peers: &[&str]) -> Rule {
    Rule { protocol, ports, peers: peers.iter().map(|p| p.parse::<IpNet>().unwrap()).collect() }
}

#[test]
fn rules_of_groups() {
    let lines = |r: Rule| rule_lines(&[r], Peer::Source, "accept");
    assert_eq!(lines(rule(None, None, &[])), "accept\n");
    assert_eq!(lines(rule(Some(Protocol::Tcp), Some((80, 80)), &[])), "tcp dport 80 accept\n");
    assert_eq!(
        lines(rule(Some(Protocol::Udp), Some((5, 9)), &["10.0.0.0/8", "10.1.0.0/16", "fd00::/8"])),
        "ip saddr { 10.0.0.0/8 } udp dport 5-9 accept\nip6 saddr { fd00::/8 } udp dport 5-9 accept\n"
    );
    assert_eq!(lines(rule(Some(Protocol::Tcp), Some((9, 5)), &[])), "", "an empty range matches nothing");
    assert_eq!(
        rule_lines(&[rule(None, None, &["1.2.3.4/32"])], Peer::Destination, "return"),
        "ip daddr { 1.2.3.4/32 } return\n"
    );
}
